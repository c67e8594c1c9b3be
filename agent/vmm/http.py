"""JSON over HTTP to a VMM's Unix socket, on the assumption that the VMM may be hostile.

The socket is a descriptor, so that a VMM that swaps its path for a link gains nothing. What comes
back is bounded in time and size, and reaches people only as one printable line.
"""

import array
import json
import socket
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import h11
import trio

from agent.model.errors import Failed, TimedOut

# httpx offers its command line only where that can be imported: with Debian's library it can, and
# takes a fifth of the time in which the agent starts.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
import httpx  # noqa: E402

MAXIMUM_REPLY = 1 << 20
"""Bytes of a reply's body; Cloud Hypervisor's longest, `vm.info` of a large VM, has some 20 KiB."""

_LONGEST_MESSAGE = 500
_READ_SIZE = 64 << 10
_LISTENS_WITHIN = 0.25  # seconds
_LISTEN_STEP = 0.001
_DESCRIPTORS = "descriptors"


class HttpApi:
    """The API of one VMM; `name` is what errors call it.

    Each call is a connection of its own, so that one that failed or was cancelled leaves nothing
    behind for the next.
    """

    def __init__(self, socket: int, name: str) -> None:
        """Reach the socket that `socket`, an O_PATH descriptor, stands for."""
        self._transport = _UnixTransport(f"/proc/self/fd/{socket}", name)
        self._name = name

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        descriptors: Sequence[int] = (),
        timeout: float,
    ) -> Any:
        """Return the JSON that the VMM replies with, or None when it replies with nothing.

        With the request it gets copies of `descriptors` (SCM_RIGHTS of unix(7), at most 253).

        Raises Failed with the VMM's own message when it refuses, or when it is gone, and TimedOut
        after `timeout` seconds.
        """
        doing = f"{method} {path}"
        request = httpx.Request(
            method,
            f"http://localhost{path}",
            headers={"Accept": "application/json", "Content-Type": "application/json"},
            content=b"" if body is None else json.dumps(body).encode(),
            extensions={_DESCRIPTORS: descriptors},
        )
        try:
            with trio.fail_after(timeout):
                response = await self._exchange_once_it_listens(request)
        except trio.TooSlowError:
            raise TimedOut(f"{self._name} did not answer {doing} within {timeout:g} s") from None
        except httpx.ConnectError as error:
            raise Failed(f"{self._name} does not answer on its API socket: {error}") from None
        except httpx.TransportError as error:
            raise Failed(f"{self._name} broke off during {doing}: {_line(str(error))}") from None
        status, content = response.status_code, response.content
        if status >= 400:
            self._refuse(doing, status, content)
        if not content.strip():
            return None
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise Failed(f"{self._name} answered {doing} with something that is no JSON") from None

    async def _exchange_once_it_listens(self, request: httpx.Request) -> httpx.Response:
        patience = trio.current_time() + _LISTENS_WITHIN
        while True:
            try:
                return await self._transport.handle_async_request(request)
            except httpx.ConnectError:
                # Nothing was sent. A VMM that begins has its socket a moment before it listens.
                if trio.current_time() > patience:
                    raise
            await trio.sleep(_LISTEN_STEP)

    def _refuse(self, doing: str, status: int, content: bytes) -> NoReturn:
        raise Failed(f"{self._name} refused {doing}: {_message(content) or f'status {status}'}")


class _UnixTransport(httpx.AsyncBaseTransport):
    """One connection a request, to the socket at `path`.

    httpx's own transport brings a pool, locks and TLS to each VMM: a question to one is part of
    every start, and costs half as much without them.
    """

    def __init__(self, path: str, name: str) -> None:
        self._path = path
        self._name = name

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Return the whole response; raises Failed for one too long, and httpx.TransportError."""
        with trio.socket.socket(socket.AF_UNIX) as connection:
            try:
                await connection.connect(self._path)
            except OSError as error:
                raise httpx.ConnectError(str(error)) from error
            try:
                return await self._converse(request, connection)
            except (OSError, h11.ProtocolError) as error:
                raise httpx.TransportError(str(error)) from error

    async def _converse(
        self, request: httpx.Request, connection: trio.socket.SocketType
    ) -> httpx.Response:
        protocol = h11.Connection(h11.CLIENT)
        head = h11.Request(
            method=request.method, target=request.url.raw_path, headers=request.headers.raw
        )
        events = (head, h11.Data(data=request.content), h11.EndOfMessage())
        unsent = memoryview(b"".join(protocol.send(event) or b"" for event in events))
        if descriptors := request.extensions[_DESCRIPTORS]:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
            unsent = unsent[await connection.sendmsg([unsent], [rights]) :]
        while unsent:
            unsent = unsent[await connection.send(unsent) :]
        status, content = 0, bytearray()
        while True:
            match protocol.next_event():
                case h11.NEED_DATA:
                    received = await connection.recv(_READ_SIZE)
                    if not received and not status:
                        raise httpx.TransportError("it closed the connection")
                    protocol.receive_data(received)
                case h11.Response(status_code=status):
                    pass
                case h11.Data(data=data):
                    content += data
                    if len(content) > MAXIMUM_REPLY:
                        raise Failed(f"{self._name} answered with more than {MAXIMUM_REPLY} bytes")
                case h11.EndOfMessage():
                    return httpx.Response(status, content=bytes(content))


def _message(content: bytes) -> str:
    """Return the error message in a reply: Firecracker's, Cloud Hypervisor's, or plain text."""
    try:
        reply = json.loads(content)
    except (ValueError, RecursionError):
        return _line(content[: 4 * _LONGEST_MESSAGE].decode(errors="replace"))
    match reply:
        case {"fault_message": str(message)}:
            return _line(message)
        case [*messages]:
            return _line(": ".join(str(message) for message in messages))
        case _:
            return _line(str(reply))


def _line(text: str) -> str:
    """Return `text` as one printable line of bounded length, as logs and terminals want it."""
    words = " ".join(text[: 4 * _LONGEST_MESSAGE].split())
    line = "".join(char if char.isprintable() else "?" for char in words)
    return line if len(line) <= _LONGEST_MESSAGE else f"{line[:_LONGEST_MESSAGE]}…"
