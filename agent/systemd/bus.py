"""The D-Bus daemon as others see it: calls, signals, failures, and a connection that comes back.

Other modules import this one only. `connection` has one socket, `wire` the bytes; all three follow
https://dbus.freedesktop.org/doc/dbus-specification.html.
"""

import contextlib
import logging
import math
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from typing import Any

import trio
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message

from .connection import (
    CALL_TIMEOUT,
    THE_BUS,
    BusError,
    BusFailure,
    BusGone,
    BusTimeout,
    Connection,
    bus_message,
    checked,
    connect,
)
from .wire import Received, close_all, properties

__all__ = [
    "CALL_TIMEOUT",
    "NO_REPLY",
    "Bus",
    "BusError",
    "BusFailure",
    "BusGone",
    "BusTimeout",
    "Gap",
    "Match",
    "Received",
    "Signals",
    "open_bus",
    "properties",
]

NO_REPLY = "org.freedesktop.DBus.Error.NoReply"
"""The error by which the bus says that the callee left while the call was under way."""

_SYSTEM_BUS = "unix:path=/run/dbus/system_bus_socket"
_MAX_IN_FLIGHT = 100  # a system bus refuses a connection's calls beyond 128 without an answer
_FIRST_DELAY, _LAST_DELAY = 0.05, 5.0  # seconds between attempts to reach the bus again

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Gap:
    """Stands among a subscriber's signals where some may be missing.

    The bus, or the sender, went away and is back; from here on signals are complete again.
    """


@dataclass(frozen=True, slots=True)
class Match:
    """Which signals to get; empty fields match anything. `sender` may be a well-known name."""

    sender: str = ""
    interface: str = ""
    member: str = ""
    path: str = ""
    path_namespace: str = ""
    arg0: str = ""

    @property
    def rule(self) -> str:
        """The match rule as the bus wants it."""
        wanted = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return ",".join(["type='signal'", *(f"{key}='{value}'" for key, value in wanted if value)])

    def fits(self, signal: Received, sender: str) -> bool:
        """Whether this asks for `signal`; `sender` is the unique name behind `self.sender`."""
        return (
            (not self.member or signal.member == self.member)
            and (not self.interface or signal.interface == self.interface)
            and (not self.path or signal.path == self.path)
            and (not self.path_namespace or _is_within(signal.path, self.path_namespace))
            and (not self.sender or signal.sender == sender)
            and (not self.arg0 or (signal.signature[:1] == "s" and signal.body[0] == self.arg0))
        )


Signals = AsyncIterator[Received | Gap]
"""What a subscriber iterates over."""


class Bus:
    """A connection that is made again whenever it is lost; `open_bus` makes one."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._connection: Connection | None = None
        self._ready = False
        self._subscriptions: list[_Subscription] = []
        # Who owns the names that signals are wanted from: None while asked for, "" for nobody.
        self._owners: dict[str, str | None] = {}
        self._changed = trio.Event()
        self._in_flight = trio.Semaphore(_MAX_IN_FLIGHT)

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        fds: Sequence[int] = (),
        timeout: float = CALL_TIMEOUT,
    ) -> Received:
        """Call a method and return its answer, within `timeout` seconds.

        Structs in `body` are lists; an `h` in it is an index into `fds`, which stay the caller's;
        the `fds` of the answer become the caller's.
        While the bus is away, or a destination that somebody gets signals from, the call waits.
        Raises BusError, BusGone or BusTimeout; ValueError or TypeError for a body that does not
        fit its signature. A cancelled call may have its effect all the same; its answer is dropped.
        """
        message = Message(destination, path, interface, member, signature=signature)
        message.body, message.unix_fds = list(body), list(fds)
        sent = False
        with trio.move_on_after(timeout):
            async with self._in_flight:
                connection = await self._reach(destination)
                sent = True
                answer = await connection.call(message)
            return checked(answer)
        if sent:
            raise BusTimeout(f"{destination} did not answer {member} within {timeout:g} s")
        raise BusGone(f"{destination} could not be reached within {timeout:g} s")

    @asynccontextmanager
    async def subscribe(self, *matches: Match) -> AsyncIterator[Signals]:
        """Get every signal that fits one of `matches`, once each, in the order they were sent.

        Nothing bounds the queue: a consumer that is slow costs memory, but neither delays others
        nor loses a signal. A Gap marks where some may be missing. Descriptors in signals are not
        passed on. Raises BusError when the bus refuses a rule, BusGone when it is not there.
        """
        into, signals = trio.open_memory_channel[Received | Gap](math.inf)
        async with self.listen(into.send_nowait, *matches):
            yield signals

    @asynccontextmanager
    async def listen(
        self, handle: Callable[[Received | Gap], None], *matches: Match
    ) -> AsyncIterator[None]:
        """As `subscribe`, but call `handle` with each signal before anything later is read.

        An answer that comes after a signal is not seen before `handle` has returned. What it raises
        ends the bus.
        """
        subscription = _Subscription(matches, handle)
        with trio.move_on_after(CALL_TIMEOUT) as patience:
            connection = await self._reach()
        if patience.cancelled_caught:
            raise BusGone(f"the bus could not be reached within {CALL_TIMEOUT:g} s")
        self._subscriptions.append(subscription)
        try:
            # When it is lost meanwhile, the next connection adds the rules and puts a Gap.
            with contextlib.suppress(BusGone):
                await self._add_rules(connection, [subscription])
            yield
        finally:
            self._remove(subscription)

    async def _run(self, connection: "Connection") -> None:
        """Serve `connection`, and each that follows it, until cancelled."""
        while True:
            await self._serve(connection)
            connection = await self._connect_again()

    async def _serve(self, connection: "Connection") -> None:
        """Return when the connection is lost."""
        self._connection = connection
        self._ready = not self._subscriptions
        self._notify()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.write)
                if not self._ready:
                    nursery.start_soon(self._restore, connection)
                reason = await connection.read(self._route)
                nursery.cancel_scope.cancel()
            _log.warning("The D-Bus connection is lost: %s", reason)
        finally:
            self._connection, self._ready = None, False
            self._owners = dict.fromkeys(self._owners)
            connection.close()

    async def _connect_again(self) -> "Connection":
        delay = _FIRST_DELAY
        while True:
            await trio.sleep(delay)
            try:
                connection = await connect(self._address)
            except BusGone as error:
                delay = min(2 * delay, _LAST_DELAY)
                _log.debug("%s; the next attempt is in %.2f s", error, delay)
            else:
                _log.info("Connected to D-Bus again")
                return connection

    async def _restore(self, connection: "Connection") -> None:
        """Bring a connection to where the one before was."""
        subscriptions = list(self._subscriptions)
        try:
            with trio.fail_after(CALL_TIMEOUT):
                await self._add_rules(connection, subscriptions)
        except (BusFailure, trio.TooSlowError) as error:
            _log.error("The D-Bus connection cannot be restored: %r", error)
            connection.shut_down()
            return
        self._ready = True
        self._notify()
        for subscription in subscriptions:
            # For the others it comes with their sender.
            if all(self._owners.get(name) for name in subscription.senders):
                subscription.put(Gap())

    async def _add_rules(
        self, connection: "Connection", subscriptions: Sequence["_Subscription"]
    ) -> None:
        """Send all before the first answer is awaited, so that what is sent later comes later.

        Each subscription adds its own: the bus counts how often a rule was added.
        """
        added = [
            connection.ask(bus_message("AddMatch", rule))
            for subscription in subscriptions
            for rule in subscription.rules
        ]
        names = {name for subscription in subscriptions for name in subscription.senders}
        unknown = [name for name in names if not self._owners.get(name)]
        self._owners |= dict.fromkeys(unknown)
        owners = [connection.ask(bus_message("GetNameOwner", name)) for name in unknown]
        for answer in added:
            checked(await answer.wait())
        for name, answer in zip(unknown, owners, strict=True):
            received = await answer.wait()
            # A NameOwnerChanged that came after the answer is the newer truth.
            if self._owners.get(name, "") is None:
                nobody = received.kind is MessageType.ERROR
                self._owners[name] = "" if nobody else received.body[0]
                self._notify()

    def _remove(self, subscription: "_Subscription") -> None:
        self._subscriptions.remove(subscription)
        wanted = {name for other in self._subscriptions for name in other.senders}
        for name in subscription.senders - wanted:
            self._owners.pop(name, None)
        self._notify()
        if self._connection is not None:
            for rule in subscription.rules:
                self._connection.send(
                    bus_message("RemoveMatch", rule, flags=MessageFlag.NO_REPLY_EXPECTED)
                )

    async def _reach(self, destination: str = "") -> "Connection":
        """Wait until `destination` can be called."""
        while not (
            self._connection is not None
            and self._ready
            and self._owners.get(destination, "unknown")
        ):
            await self._changed.wait()
        return self._connection

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _route(self, signal: Received) -> None:
        """Put a signal where it belongs."""
        close_all(signal.fds)
        if signal.member == "NameOwnerChanged" and signal.sender == THE_BUS:
            self._note_owner(*signal.body)
        for subscription in self._subscriptions:
            for match in subscription.matches:
                # Checked again, whatever the bus matched: anybody may send a signal straight to us.
                if match.fits(signal, self._owners.get(match.sender, match.sender) or "nobody"):
                    subscription.put(signal)
                    break

    def _note_owner(self, name: str, _old: str, new: str) -> None:
        if name in self._owners:
            self._owners[name] = new
            self._notify()
            for subscription in self._subscriptions:
                if new and name in subscription.senders:
                    subscription.put(Gap())


@asynccontextmanager
async def open_bus(address: str | None = None) -> AsyncIterator[Bus]:
    """Connect to the bus at `address` (the system bus) and serve it until the block is left.

    Raises BusGone when it cannot be reached at first; later it is awaited.
    """
    if address is None:
        address = os.environ.get("DBUS_SYSTEM_BUS_ADDRESS", _SYSTEM_BUS)
    connection = await connect(address)
    bus = Bus(address)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bus._run, connection)
        try:
            yield bus
        finally:
            nursery.cancel_scope.cancel()


class _Subscription:
    """Which signals go where, and the rules that bring them here."""

    def __init__(self, matches: Sequence[Match], put: Callable[[Received | Gap], None]) -> None:
        self.matches = matches
        self.put = put
        senders = {match.sender for match in matches}
        self.senders = {name for name in senders - {"", THE_BUS} if not name.startswith(":")}
        owners = [Match(THE_BUS, THE_BUS, "NameOwnerChanged", arg0=name) for name in self.senders]
        self.rules = [match.rule for match in (*owners, *matches)]


def _is_within(path: str, namespace: str) -> bool:
    return path == namespace or path.startswith(namespace.rstrip("/") + "/")
