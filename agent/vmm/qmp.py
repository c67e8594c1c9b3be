"""QMP, QEMU's machine protocol, on the assumption that the VMM may be hostile.

The protocol (docs/interop/qmp-spec.txt of QEMU) is JSON objects, one a line: a greeting, replies
with the `id` of their command, and events between them. `QmpReader` knows it without any I/O,
`QmpConnection` speaks it over a Unix socket that is reached by descriptor, so that a VMM that swaps
its path for a link gains nothing. What comes back is bounded in time and size.
"""

import array
import json
import socket
from collections import deque
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from agent.model.errors import Failed, TimedOut

MAXIMUM_LINE = 1 << 20
"""Bytes of one message; the longest replies that are asked for have some KiB."""

_MOST_EVENTS = 1000  # that nobody has waited for yet; the oldest go
_LONGEST_MESSAGE = 500
_PIECE = 65536
_LISTENS_WITHIN = 1.0  # seconds: QEMU makes the socket's file before it listens
_LOOK = 0.005


@dataclass(frozen=True, slots=True)
class Greeting:
    """What QEMU says first."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened by itself."""

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply:
    """What the command with the number `id` returned."""

    id: int
    value: Any


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the command with the number `id` failed; without one, QEMU could not read it."""

    id: int | None
    message: str


Message = Greeting | Event | Reply | Refusal


class QmpReader:
    """Turns bytes into messages; raises ValueError for what is no QMP."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Return the messages that `data`, the next bytes, completes."""
        searched = len(self._pending)
        self._pending += data
        messages = []
        while (end := self._pending.find(b"\n", searched)) >= 0:
            if line := bytes(self._pending[:end]).strip():
                messages.append(parse_message(line))
            del self._pending[: end + 1]
            searched = 0
        if len(self._pending) > MAXIMUM_LINE:
            raise ValueError(f"a message of more than {MAXIMUM_LINE} bytes")
        return messages


def parse_message(line: bytes) -> Message:
    """Return the message in a line; raise ValueError for what is none."""
    try:
        match json.loads(line):
            case {"QMP": {}}:
                return Greeting()
            case {"event": str(name), **rest}:
                data = rest.get("data")
                return Event(name, data if isinstance(data, dict) else {})
            case {"return": value, "id": int(number)}:
                return Reply(number, value)
            case {"error": {"desc": str(message)}, **rest}:
                command = rest.get("id")
                return Refusal(command if isinstance(command, int) else None, printable(message))
    except RecursionError:
        pass
    except ValueError:
        raise ValueError("a line that is no JSON") from None
    raise ValueError("a message of an unknown kind")


def show_command(number: int, command: str, arguments: Mapping[str, Any]) -> bytes:
    """Return a command as it is sent; its reply will have the number."""
    message: dict[str, Any] = {"execute": command, "id": number}
    if arguments:
        message["arguments"] = dict(arguments)
    return json.dumps(message).encode() + b"\r\n"


class QmpConnection:
    """A conversation with one QEMU, which talks to one client at a time.

    It begins with the first command. Commands wait for each other.
    """

    def __init__(self, path: str, name: str) -> None:
        """`path` is that of the socket; `name` is what errors call the VMM."""
        self._path = path
        self._name = name
        self._reader = QmpReader()
        self._socket: trio.socket.SocketType | None = None
        self._messages: deque[Message] = deque()
        self._events: deque[Event] = deque(maxlen=_MOST_EVENTS)
        self._number = 0
        self._turn = trio.Lock()

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        descriptor: int | None = None,
        timeout: float,
    ) -> Any:
        """Return what the command returns; `descriptor` goes to QEMU with it.

        Raises Failed with QEMU's own message when it refuses, or when it is gone, and TimedOut
        after `timeout` seconds. What the command does then is unknown, others may follow.
        """
        (value,) = await self._converse([(command, arguments or {})], descriptor, timeout)
        return value

    async def execute_all(
        self, *commands: tuple[str, Mapping[str, Any]], timeout: float
    ) -> list[Any]:
        """Return what each of the commands returns; all are sent at once.

        Raises as `execute` does, for the first that fails; those after it are executed all the
        same.
        """
        return await self._converse(commands, None, timeout)

    async def wait_for(self, name: str, key: str, values: Collection[Any], timeout: float) -> Any:
        """Return the value of `key` in the next event `name` in which it is one of `values`.

        Events that came since the conversation began, and that nobody waited for, count. Raises
        Failed or TimedOut.
        """
        try:
            with trio.fail_after(timeout):
                async with self._turn:
                    while True:
                        while self._events:
                            event = self._events.popleft()
                            if event.name == name and event.data.get(key) in values:
                                return event.data[key]
                        message = await self._receive()
                        if isinstance(message, Event):
                            self._events.append(message)
        except trio.TooSlowError:
            raise TimedOut(f"{self._name} did not tell of {name} within {timeout:g} s") from None
        except OSError as error:
            raise Failed(f"{self._name} broke off before {name}: {error.strerror}") from None
        except ValueError as error:
            raise Failed(f"{self._name} told of {error}") from None

    def close(self) -> None:
        """End the conversation."""
        if self._socket is not None:
            self._socket.close()

    async def _converse(
        self,
        commands: Sequence[tuple[str, Mapping[str, Any]]],
        descriptor: int | None,
        timeout: float,
    ) -> list[Any]:
        what = ", ".join(command for command, _ in commands)
        try:
            with trio.fail_after(timeout):
                async with self._turn:
                    if self._socket is None:
                        await self._begin()
                    return await self._execute(commands, descriptor)
        except trio.TooSlowError:
            raise TimedOut(f"{self._name} did not answer {what} within {timeout:g} s") from None
        except OSError as error:
            raise Failed(f"{self._name} broke off during {what}: {error.strerror}") from None
        except ValueError as error:
            raise Failed(f"{self._name} answered {what} with {error}") from None

    async def _begin(self) -> None:
        self._socket = await self._connect()
        while not isinstance(await self._receive(), Greeting):
            pass
        await self._execute([("qmp_capabilities", {})])

    async def _connect(self) -> trio.socket.SocketType:
        began = trio.current_time()
        while True:
            client = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                await client.connect(self._path)
            except BaseException as error:
                client.close()
                waited = trio.current_time() - began
                if not isinstance(error, ConnectionRefusedError) or waited > _LISTENS_WITHIN:
                    raise
            else:
                return client
            await trio.sleep(_LOOK)

    async def _execute(
        self, commands: Sequence[tuple[str, Mapping[str, Any]]], descriptor: int | None = None
    ) -> list[Any]:
        numbered = list(enumerate(commands, self._number + 1))
        self._number += len(numbered)
        lines = [show_command(number, *command) for number, command in numbered]
        await self._send(b"".join(lines), descriptor)
        return [await self._reply(number, command) for number, (command, _) in numbered]

    async def _reply(self, expected: int, command: str) -> Any:
        while True:
            match await self._receive():
                case Event() as event:
                    self._events.append(event)
                case Reply(number, value) if number == expected:
                    return value
                case Refusal(number, message) if number in (expected, None):
                    raise Failed(f"{self._name} refused {command}: {message}")
                # Else the answer to a command that nobody waits for any more.

    async def _send(self, data: bytes, descriptor: int | None) -> None:
        assert self._socket is not None
        rights = []
        if descriptor is not None:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
        sent = await self._socket.sendmsg([data], rights)
        while sent < len(data):
            sent += await self._socket.send(data[sent:])

    async def _receive(self) -> Message:
        assert self._socket is not None
        while not self._messages:
            data = await self._socket.recv(_PIECE)
            if not data:
                raise ConnectionResetError(0, "it ended")
            self._messages.extend(self._reader.feed(data))
        return self._messages.popleft()


@asynccontextmanager
async def open_qmp(socket: int, name: str) -> AsyncIterator[QmpConnection]:
    """Talk QMP through `socket`, an O_PATH descriptor; `name` is what errors call the VMM."""
    connection = QmpConnection(f"/proc/self/fd/{socket}", name)
    try:
        yield connection
    finally:
        connection.close()


def printable(text: str) -> str:
    """Return `text` as one printable line of bounded length, as logs and terminals want it."""
    words = " ".join(text[: 4 * _LONGEST_MESSAGE].split())
    line = "".join(char if char.isprintable() else "?" for char in words)
    return line if len(line) <= _LONGEST_MESSAGE else f"{line[:_LONGEST_MESSAGE]}…"
