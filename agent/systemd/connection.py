"""One socket to a D-Bus daemon: authentication, calls and their answers, descriptors.

Only `bus` uses this module.
"""

import array
import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence

import trio
from dbus_next._private.address import parse_address
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message

from .wire import MAX_MESSAGE, Framer, Malformed, Received, close_all

CALL_TIMEOUT = 25.0
"""Seconds that a call may take unless it is told otherwise: as with libdbus and sd-bus."""

THE_BUS = "org.freedesktop.DBus"
"""The name of the bus itself."""

_MAX_FDS = 253  # SCM_MAX_FD of Linux
_READ_SIZE = 64 << 10

_log = logging.getLogger(__name__)


class BusFailure(Exception):
    """A call over the bus did not succeed."""


class BusError(BusFailure):
    """The callee, or the bus in its place, answered with an error."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{text} ({name})" if text else name)
        self.name = name
        self.text = text


class BusGone(BusFailure):
    """The connection was lost before the answer came: the call may have had its effect."""


class BusTimeout(BusFailure):
    """No answer came in time: the call may have had its effect, or may have it later."""


class Answer:
    """An answer that somebody waits for."""

    def __init__(self) -> None:
        self.event = trio.Event()
        self.received: Received | None = None

    async def wait(self) -> Received:
        await self.event.wait()
        if self.received is None:
            raise BusGone("the D-Bus connection was lost before the answer came")
        return self.received


class Connection:
    """One socket to a bus, and the answers awaited on it."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._framer = Framer()
        self._serial = 0
        self._answers: dict[int, Answer] = {}
        self._outgoing: deque[tuple[memoryview, list[int]]] = deque()
        self._backlog = trio.Event()
        self._closed = False

    def send(self, message: Message) -> None:
        """Queue a message, with own copies of its descriptors, and write what the socket takes."""
        self._serial = self._serial % 0xFFFFFFFF + 1
        message.serial = self._serial
        data = message._marshall(negotiate_unix_fd=True)  # type: ignore[no-untyped-call]
        if len(data) > MAX_MESSAGE:
            raise ValueError(f"D-Bus allows no message of {len(data)} bytes")
        self._outgoing.append((memoryview(data), [os.dup(fd) for fd in message.unix_fds]))
        if len(self._outgoing) == 1:
            self._flush()
        if self._outgoing:
            self._backlog.set()

    def ask(self, message: Message) -> Answer:
        """Send a call whose answer will be awaited."""
        answer = Answer()
        if self._closed:
            answer.event.set()
        else:
            self.send(message)
            self._answers[message.serial] = answer
        return answer

    async def call(self, message: Message) -> Received:
        """Send a call and return its answer, or raise BusGone."""
        answer = self.ask(message)
        try:
            return await answer.wait()
        finally:
            self._answers.pop(message.serial, None)

    async def write(self) -> None:
        """Write what the socket did not take at once, until cancelled."""
        while True:
            await self._backlog.wait()
            self._backlog = trio.Event()
            while self._outgoing:
                await trio.lowlevel.wait_writable(self._socket)
                self._flush()

    def _flush(self) -> None:
        while self._outgoing:
            data, fds = self._outgoing[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                sent = self._socket.sendmsg([data], rights)
            except BlockingIOError:
                return
            except OSError as error:
                _log.warning("A D-Bus message cannot be sent: %s", error)
                self._discard_outgoing()
                self.shut_down()
                return
            close_all(fds)
            if sent < len(data):
                self._outgoing[0] = data[sent:], []
                return
            self._outgoing.popleft()

    async def read(self, route: Callable[[Received], None]) -> str:
        """Hand signals to `route` and answers to who awaits them; return why it ended."""
        try:
            while True:
                for message in await self._receive():
                    if message.kind is MessageType.SIGNAL:
                        route(message)
                    elif message.kind is MessageType.METHOD_CALL:
                        self._refuse(message)
                    else:
                        self._answer(message)
        except (OSError, EOFError, Malformed) as error:
            return str(error)

    async def handshake(self) -> None:
        """Authenticate and get a name. Raises OSError, EOFError, Malformed or BusError."""
        identity = str(os.geteuid()).encode().hex()
        self._socket.sendall(
            b"\0AUTH EXTERNAL %s\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n" % identity.encode()
        )
        answers = b""
        while answers.count(b"\r\n") < 2:
            answers += (await self._read())[0]
        granted, agreed, _ = answers.split(b"\r\n", 2)
        if not granted.startswith(b"OK ") or agreed != b"AGREE_UNIX_FD":
            raise Malformed(f"the bus answers {answers!r}")
        hello = self.ask(bus_message("Hello"))
        while not hello.event.is_set():
            for message in await self._receive():
                self._answer(message)
        checked(await hello.wait())

    async def _receive(self) -> list[Received]:
        data, fds = await self._read()
        return self._framer.feed(data, fds)

    async def _read(self) -> tuple[bytes, Sequence[int]]:
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                data, control, flags, _ = self._socket.recvmsg(
                    _READ_SIZE, socket.CMSG_SPACE(4 * _MAX_FDS), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                continue
            fds = array.array("i")
            for level, kind, content in control:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.frombytes(content)
            if flags & socket.MSG_CTRUNC:
                close_all(fds)
                raise Malformed("descriptors were lost: too many are open")
            if not data:
                raise EOFError("the bus closed it")
            return data, fds

    def _answer(self, message: Received) -> None:
        answer = self._answers.pop(message.reply_serial, None)
        if answer is None:
            close_all(message.fds)
        else:
            answer.received = message
            answer.event.set()

    def _refuse(self, call: Received) -> None:
        """Answer a call: nothing can be called here."""
        close_all(call.fds)
        if not call.flags & MessageFlag.NO_REPLY_EXPECTED:
            self.send(
                Message(
                    call.sender,
                    message_type=MessageType.ERROR,
                    error_name="org.freedesktop.DBus.Error.UnknownMethod",
                    reply_serial=call.serial,
                    signature="s",
                    body=["nothing can be called here"],
                )
            )

    def shut_down(self) -> None:
        """Make the reader notice that this connection is over."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Free everything; who awaits an answer gets BusGone."""
        self._closed = True
        self._socket.close()
        self._framer.close()
        self._discard_outgoing()
        for answer in self._answers.values():
            answer.event.set()
        self._answers.clear()

    def _discard_outgoing(self) -> None:
        for _, fds in self._outgoing:
            close_all(fds)
        self._outgoing.clear()


async def connect(address: str) -> Connection:
    """Return a connection that has a name. Raises BusGone."""
    failures = []
    for transport, options in parse_address(address):  # type: ignore[no-untyped-call]
        path = options.get("path") or "\0" + options.get("abstract", "")
        if transport != "unix" or path == "\0":
            failures.append(f"{transport} is no way to reach a bus from here")
            continue
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection = Connection(sock)
        try:
            with trio.fail_after(CALL_TIMEOUT):
                await trio.socket.from_stdlib_socket(sock).connect(path)
                await connection.handshake()
        except (OSError, EOFError, Malformed, BusFailure, trio.TooSlowError) as error:
            connection.close()
            failures.append(f"{path}: {error}")
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise BusGone(f"no D-Bus daemon at {address}: {'; '.join(failures)}")


def bus_message(member: str, *arguments: str, flags: MessageFlag = MessageFlag.NONE) -> Message:
    """Return a call of the bus's own method."""
    return Message(
        THE_BUS,
        "/org/freedesktop/DBus",
        THE_BUS,
        member,
        flags=flags,
        signature="s" * len(arguments),
        body=list(arguments),
    )


def checked(answer: Received) -> Received:
    """Return an answer that is no error. Raises BusError."""
    if answer.kind is MessageType.ERROR:
        close_all(answer.fds)
        raise BusError(answer.error_name, answer.body[0] if answer.signature[:1] == "s" else "")
    return answer
