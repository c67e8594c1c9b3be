"""systemd's manager: jobs that are awaited, units that are asked, and what becomes of them.

Methods, signals and results are those of org.freedesktop.systemd1(5).
"""

import itertools
import logging
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import trio
from dbus_next.signature import Variant

from .bus import (
    CALL_TIMEOUT,
    NO_REPLY,
    Bus,
    BusError,
    BusFailure,
    BusGone,
    BusTimeout,
    Gap,
    Match,
    Received,
    properties,
)
from .watch import (
    ENDED,
    STATE_PROPERTIES,
    UNITS,
    Changes,
    Resync,
    UnitChange,
    UnitState,
    Watch,
    unit_path,
    unit_state_of,
)

Property = tuple[str, Variant]
"""A property of a unit, as StartTransientUnit and SetUnitProperties take them."""

NO_SUCH_UNIT = "org.freedesktop.systemd1.NoSuchUnit"
"""The BusError of a call about a unit that is not loaded."""

UNIT_EXISTS = "org.freedesktop.systemd1.UnitExists"
"""The BusError of a transient start while a unit of that name is loaded, be it only as failed."""

_SYSTEMD = "org.freedesktop.systemd1"
_ROOT = "/org/freedesktop/systemd1"
_MANAGER = f"{_SYSTEMD}.Manager"
_UNIT = f"{_SYSTEMD}.Unit"
_SERVICE = f"{_SYSTEMD}.Service"
_PROPERTIES = "org.freedesktop.DBus.Properties"
_ALREADY_SUBSCRIBED = f"{_SYSTEMD}.AlreadySubscribed"
_RELOAD_TIMEOUT = 120.0  # seconds: hosts have many units, and systemd may be busy
_RETURN_TIMEOUT = 60.0  # seconds in which a job must be queued, however often systemd goes away
_PAUSE = 0.05  # seconds between questions that are cut off

_AWAY = frozenset(
    {
        NO_REPLY,
        "org.freedesktop.DBus.Error.NameHasNoOwner",
        "org.freedesktop.DBus.Error.ServiceUnknown",
    }
)
"""Errors by which the bus says that systemd is not there."""

_Goal = Literal["start", "stop", "restart"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ListedUnit:
    """A line of `systemctl list-units`."""

    unit: str
    load: str
    active: str
    sub: str


class Manager:
    """The system's service manager; `open_manager` makes one.

    Every call raises BusError when systemd refuses (its `name` tells why, its `text` is for
    people), BusGone when systemd cannot be reached, BusTimeout when it does not answer. Calls about
    jobs return the job's result: done, canceled, timeout, failed, dependency, skipped…; they wait
    for the job however long it takes. When systemd or the bus is restarted meanwhile, what became
    of the job is found out by asking for the unit; a call that left no trace there is repeated.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._waits: dict[str, list[_JobWait]] = {}
        self._watches: list[Watch] = []
        self._reloading = False
        self._returned = trio.Event()

    async def start_transient(self, unit: str, settings: Sequence[Property]) -> str:
        """Create and start a transient unit; return its job's result.

        `done` says that it has started, not that it still runs.
        """
        body = [unit, "fail", [list(item) for item in settings], []]
        return await self._job("start", unit, "StartTransientUnit", "ssa(sv)a(sa(sv))", body)

    async def stop(self, unit: str) -> str:
        """Stop a unit; return its job's result. BusError NO_SUCH_UNIT when it is not loaded."""
        return await self._job("stop", unit, "StopUnit", "ss", [unit, "replace"])

    async def restart(self, unit: str) -> str:
        """Stop and start a unit; return its job's result."""
        return await self._job("restart", unit, "RestartUnit", "ss", [unit, "replace"])

    async def kill(self, unit: str, who: Literal["main", "control", "all"], signal: int) -> None:
        """Send a signal to a unit's processes."""
        await self._call("KillUnit", "ssi", [unit, who, signal])

    async def reset_failed(self, unit: str) -> None:
        """Make systemd forget that a unit failed; nothing happens if it is not loaded."""
        try:
            await self._call("ResetFailedUnit", "s", [unit])
        except BusError as error:
            if error.name != NO_SUCH_UNIT:
                raise

    async def set_properties(
        self, unit: str, settings: Sequence[Property], *, runtime: bool = True
    ) -> None:
        """Change properties of a unit, until the next boot if `runtime`."""
        body = [unit, runtime, [list(item) for item in settings]]
        await self._call("SetUnitProperties", "sba(sv)", body)

    async def reload(self) -> None:
        """Make systemd read its unit files again. Consumers of changes get a Resync."""
        # systemd answers when it is done.
        await self._call("Reload", timeout=_RELOAD_TIMEOUT)

    async def list_units(self, *patterns: str) -> list[ListedUnit]:
        """Return the loaded units whose names match one of the globs, in one round trip."""
        body = (await self._call("ListUnitsByPatterns", "asas", [[], list(patterns)]))[0]
        return [ListedUnit(name, load, active, sub) for name, _, load, active, sub, *_ in body]

    async def unit_state(self, unit: str) -> UnitState | None:
        """Return the state of a service, None when there is no such unit."""
        # No interface's name stands for all interfaces: one round trip, one moment.
        reply = await self._ask_unit(unit, "GetAll", "")
        values = properties(reply, {"LoadState", *STATE_PROPERTIES})
        state = unit_state_of(values)
        absent = values["LoadState"] != "loaded" and state.active == "inactive"
        return None if absent else state

    def told_state(self, unit: str) -> UnitState | None:
        """Return what systemd told last of a service that somebody gets the changes of.

        When a job has ended, that is at least what the job led to. None when nothing was told.
        """
        return next((state for watch in self._watches if (state := watch.state(unit))), None)

    async def control_group(self, unit: str) -> str:
        """Return a service's control group as a path below /sys/fs/cgroup, "" when it has none."""
        reply = await self._ask_unit(unit, "Get", _SERVICE, "ControlGroup")
        return str(reply.body[0].value)

    @asynccontextmanager
    async def changes(self, prefix: str) -> AsyncIterator[Changes]:
        """Get the new state of each service whose name starts with `prefix`, whenever it differs.

        States come in the order in which systemd told them. Nothing bounds the queue.
        """
        into, changes = trio.open_memory_channel[UnitChange | Resync](math.inf)
        watch = Watch(prefix, into.send_nowait)
        self._watches.append(watch)
        try:
            yield changes
        finally:
            self._watches.remove(watch)

    async def _call(
        self,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        timeout: float = CALL_TIMEOUT,
    ) -> list[Any]:
        reply = await self._bus.call(
            _SYSTEMD, _ROOT, _MANAGER, member, signature, body, timeout=timeout
        )
        return reply.body

    async def _ask_unit(self, unit: str, member: str, *arguments: str) -> Received:
        return await self._bus.call(
            _SYSTEMD, unit_path(unit), _PROPERTIES, member, "s" * len(arguments), arguments
        )

    async def _job(self, goal: _Goal, unit: str, member: str, signature: str, body: Any) -> str:
        """Queue a job and wait until it is gone; return its result."""
        wait = _JobWait()
        self._waits.setdefault(unit, []).append(wait)
        try:
            job = await self._queue(wait, member, signature, body)
            while True:
                await wait.event.wait()
                wait.event = trio.Event()
                if job is not None and job in wait.results:
                    return wait.results[job]
                if not wait.must_look:
                    continue
                wait.must_look = False
                try:
                    active, queued = await self._look(unit)
                except BusFailure as error:
                    if not _is_cut(error) or (job is None and wait.is_overdue()):
                        raise
                    await trio.sleep(_PAUSE)
                    wait.look()
                    continue
                if queued:
                    job = queued
                elif verdict := _deduce(goal, active, known=job is not None):
                    return verdict
                else:
                    job = await self._queue(wait, member, signature, body)
        finally:
            self._waits[unit].remove(wait)
            if not self._waits[unit]:
                del self._waits[unit]

    async def _queue(self, wait: "_JobWait", member: str, signature: str, body: Any) -> str | None:
        """Return the path of the new job; None when systemd left before it told."""
        try:
            return str((await self._call(member, signature, body))[0])
        except BusFailure as error:
            if not _is_cut(error) or wait.is_overdue():
                raise
            _log.info("%s of %s was cut off: %s", member, body[0], error)
            wait.look()
            return None

    async def _look(self, unit: str) -> tuple[str, str]:
        """Return a unit's active state and the path of its job, "" for none."""
        reply = await self._ask_unit(unit, "GetAll", _UNIT)
        values = properties(reply, {"ActiveState", "Job"})
        number, path = values["Job"]
        return values["ActiveState"], path if number else ""

    def _handle(self, signal: Received | Gap) -> None:
        """Take what systemd tells."""
        if isinstance(signal, Gap):
            self._returned.set()
        elif signal.member == "PropertiesChanged":
            for watch in self._watches:
                watch.properties_changed(signal)
        elif signal.member == "JobRemoved":
            _, job, unit, result = signal.body
            for wait in self._waits.get(unit, ()):
                wait.results[job] = result
                wait.event.set()
        elif signal.member == "UnitRemoved" and not self._reloading:
            for watch in self._watches:
                watch.unit_removed(*signal.body)
        elif signal.member == "Reloading":
            # Meanwhile systemd forgets all units, says so, and reads them again.
            (self._reloading,) = signal.body
            for watch in () if self._reloading else self._watches:
                watch.resynchronise()

    async def _run(self) -> None:
        """Go on whenever systemd, or the bus, was away and is back, until cancelled."""
        while True:
            await self._returned.wait()
            self._returned = trio.Event()
            self._reloading = False
            try:
                await self._subscribe()
            except BusFailure as error:
                if not _is_cut(error):
                    raise
                continue  # It is away again, and will be back again.
            for wait in itertools.chain.from_iterable(self._waits.values()):
                wait.look()
            for watch in self._watches:
                watch.resynchronise()

    async def _subscribe(self) -> None:
        """Make systemd send its signals to this connection."""
        while True:
            try:
                await self._call("Subscribe")
            except BusTimeout as error:
                _log.warning("systemd does not answer: %s", error)
            except BusError as error:
                if error.name != _ALREADY_SUBSCRIBED:
                    raise
                return
            else:
                return


@asynccontextmanager
async def open_manager(bus: Bus) -> AsyncIterator[Manager]:
    """Follow systemd's signals, and offer its calls, until the block is left."""
    matches = [
        Match(_SYSTEMD, _MANAGER, member, _ROOT)
        for member in ("JobRemoved", "UnitRemoved", "Reloading")
    ]
    matches.append(Match(_SYSTEMD, _PROPERTIES, "PropertiesChanged", path_namespace=UNITS))
    manager = Manager(bus)
    async with bus.listen(manager._handle, *matches):
        await manager._subscribe()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(manager._run)
            try:
                yield manager
            finally:
                nursery.cancel_scope.cancel()


@dataclass(slots=True)
class _JobWait:
    """What was seen of a unit's jobs since somebody waits for one."""

    event: trio.Event = field(default_factory=trio.Event)
    results: dict[str, str] = field(default_factory=dict)
    must_look: bool = False
    began: float = field(default_factory=trio.current_time)

    def look(self) -> None:
        """Have the unit asked: something may have gone unseen."""
        self.must_look = True
        self.event.set()

    def is_overdue(self) -> bool:
        """Whether it is time to give up on a job that nobody knows of."""
        return trio.current_time() > self.began + _RETURN_TIMEOUT


def _deduce(goal: _Goal, active: str, *, known: bool) -> str:
    """Return what a job came to whose end nobody saw, by the unit's state; "" to repeat it.

    `known` says that systemd had accepted the job.
    """
    if goal == "stop":
        if active in ENDED:
            return "done"
        return "canceled" if known else ""
    if not known and (goal == "restart" or active == "inactive"):
        return ""
    return "failed" if active == "failed" else "done"


def _is_cut(error: BusFailure) -> bool:
    """Whether systemd or the bus was away, so that nothing is known of the call's effect."""
    return isinstance(error, BusGone) or (isinstance(error, BusError) and error.name in _AWAY)
