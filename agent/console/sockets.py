"""`console.sock`: the Unix socket of one VM's console, for interactive use.

The socket is there as long as the VM has a process. Any number of clients; each gets the output
from when it connected and may send input; one that reads too slowly loses output and holds nobody.
It belongs to the VM's owner and group: connecting needs write permission on it (unix(7)).
"""

import contextlib
import os
import select
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from agent.model.access import Access
from agent.model.errors import CocoonError, from_os_error

from .fanout import ByteStream, Fanout

BACKLOG: Final = 64
MOST_CLIENTS: Final = 1000
"""Of one console: whoever may use a VM shall not use up the agent's descriptors."""
FAREWELL: Final = 1.0
"""Seconds that clients have to read the last output after the VM has stopped."""
_PIECE: Final = 64 * 1024
_HANG_UP_CHECK: Final = 1.0


class ConsoleSocket:
    """A listening console socket and its clients."""

    def __init__(self, path: str, private: str, access: Access) -> None:
        """Put a socket at `path`, in the place of any other; raises CocoonError.

        It is made in the directory `private`, which is root's alone and on the same filesystem, and
        renamed once its owner and mode are right.
        """
        self._path = path
        self._streams: set[ByteStream] = set()
        self._closing = trio.Event()
        self._socket = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._bind(private, access)
        except OSError as error:
            self._socket.close()
            raise from_os_error(error, f"making the console socket {path}") from error

    async def serve(self, fanout: Fanout, write: Callable[[bytes], Awaitable[int]]) -> None:
        """Connect clients to `fanout` and `write` until `close`, then send them what is left."""

        async def serve_client(client: trio.SocketStream) -> None:
            async with client, fanout.subscribe() as output:
                if len(self._streams) >= MOST_CLIENTS:
                    return
                self._streams.add(output)
                try:
                    await _serve_client(client, output, write)
                finally:
                    self._streams.discard(output)

        async def accept() -> None:
            listener = trio.SocketListener(self._socket)
            await trio.serve_listeners(serve_client, [listener], handler_nursery=clients)

        try:
            async with trio.open_nursery() as clients:
                async with trio.open_nursery() as accepting:
                    accepting.start_soon(accept)
                    await self._closing.wait()
                    accepting.cancel_scope.cancel()
                for stream in self._streams:
                    stream.end()
                clients.cancel_scope.deadline = trio.current_time() + FAREWELL
        finally:
            self._socket.close()

    def set_access(self, access: Access) -> None:
        """Let the socket follow its VM's owner, group and mode; raises CocoonError."""
        try:
            # Nobody gains what neither the old owner nor the new one was granted.
            os.chmod(self._path, 0o600)
            _give(self._path, access)
        except OSError as error:
            raise from_os_error(error, f"changing the console socket {self._path}") from error

    def close(self) -> None:
        """Take the socket away; `serve` then ends by itself."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self._closing.set()

    def _bind(self, private: str, access: Access) -> None:
        # Through a descriptor: a socket's path has 107 bytes, and the run directory may be deep.
        folder = os.open(private, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fresh = f"/proc/self/fd/{folder}/console.sock"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(fresh)
            _bind_now(self._socket, fresh)
            self._socket.listen(BACKLOG)
            _give(fresh, access)
            os.rename(fresh, self._path)
        finally:
            os.close(folder)


def _bind_now(unbound: trio.socket.SocketType, path: str) -> None:
    # trio's bind is asynchronous for the sake of host names only.
    with socket.socket(fileno=os.dup(unbound.fileno())) as same:
        same.bind(path)


def _give(path: str, access: Access) -> None:
    os.chown(path, access.uid, access.gid, follow_symlinks=False)
    os.chmod(path, access.mode & 0o666)


async def _serve_client(
    client: trio.SocketStream, output: ByteStream, write: Callable[[bytes], Awaitable[int]]
) -> None:
    async def forward_output() -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while data := await output.read(_PIECE):
                await client.send_all(data)
        both.cancel_scope.cancel()

    async def forward_input() -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while data := await client.receive_some(_PIECE):
                # A guest that is gone or does not read loses what is typed, as on a serial line.
                with contextlib.suppress(CocoonError):
                    await write(data)
        # `echo reboot | socat - UNIX:…` shuts down its sending half and goes on reading. No event
        # tells when such a client is gone altogether, and a quiet guest has nothing to send it.
        while not _hung_up(client.socket):  # noqa: ASYNC110
            await trio.sleep(_HANG_UP_CHECK)
        both.cancel_scope.cancel()

    async with trio.open_nursery() as both:
        both.start_soon(forward_output)
        both.start_soon(forward_input)


def _hung_up(connection: trio.socket.SocketType) -> bool:
    poll = select.poll()
    poll.register(connection.fileno(), 0)  # POLLHUP and POLLERR are always told
    return bool(poll.poll(0))
