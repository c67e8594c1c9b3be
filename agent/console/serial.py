"""A serial console that its VMM offers as a Unix socket: Cloud Hypervisor's.

The VMM takes one client, and evicts it for the next. What no client takes it keeps, up to 1 MiB,
and gives to the next one. Three of its ways (53, vmm/src/serial_manager.rs) want care. What found
no room in the socket goes out with the guest's next output only: so after a burst that went silent
the agent connects anew, which makes the VMM send the rest. A client that is gone with bytes unread
ends the VMM's part for good (ECONNRESET), and one that hangs up in order has the guest read a NUL.
So an agent hangs up when it leaves in order, and reads what is left: from then on the VMM keeps
what the guest says. Of one that is killed its own unit keeps the connection for the next one, and
the VM's unit keeps it open even where no next one comes.
"""

import contextlib
import math
import os
import socket
import stat
import struct
from typing import Final

import trio

from agent.model.errors import TimedOut, from_os_error
from agent.model.vm import Vm

from .inherited import Inherited
from .source import KEEP_TIMEOUT, NOTIFY_SOCKET, ensure_private, store_descriptors

DIRECTORY: Final = "sock"
"""Name, in the VM's run directory, of the directory in which its VMM makes its sockets."""
SOCKET: Final = "console"
_BURST: Final = 128  # bytes at once, of those sent one by one: 277 fill the socket
_QUIET: Final = 0.1  # seconds
_SHORTEST_LOOK, _LONGEST_LOOK = 0.002, 0.25  # seconds between looks for the VMM's socket
_HANG_UP: Final = 1.0  # seconds that a VMM may take to let go of a connection
_CREDENTIALS = struct.Struct("3i")


class SerialSocket:
    """The connection to one VM's console; see `Fifos`, which has the same calls."""

    def __init__(self, directory: str, vm: Vm, inherited: Inherited) -> None:
        """Look in the VM's run directory for a socket that is its VMM's; raises CocoonError.

        The connection is made, and made again when a VMM is restarted, while `wait` waits; unless
        there is an `inherited` one.
        """
        try:
            os.close(ensure_private(directory))
        except OSError as error:
            raise from_os_error(error, f"opening the console in {directory}") from error
        self._parent = os.path.join(directory, DIRECTORY)
        self._vm_id, self._uid = vm.id, vm.uid
        self._inherited = inherited
        self._connection: socket.socket | None = None
        self._connected = trio.Event()
        self._is_expected = trio.Event()
        self._left = bytearray()
        self._is_suspect = False
        self._is_closed = False
        self._notify_socket = ""
        self._writing = trio.Lock()
        if (fd := inherited.take(vm.id)) is not None:
            self._connection = socket.socket(fileno=fd)
            self._connection.setblocking(False)
            self._connected.set()
            self._is_suspect = True

    async def wait(self) -> None:
        """Return when there is output; raises trio.ClosedResourceError after `close`."""
        while not self._left:
            connection = await self._reached()
            with trio.move_on_after(_QUIET if self._is_suspect else math.inf):
                await trio.lowlevel.wait_readable(connection)
                return
            self._is_suspect = False
            await self._connect_anew(connection)

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes of output, b"" when there is none now."""
        if self._left:
            data = bytes(self._left[:size])
            del self._left[:size]
            return data
        if self._connection is None:
            return b""
        received = self._receive(self._connection, size)
        if received is None:
            self._drop(self._connection)
            return b""
        self._is_suspect = self._is_suspect or len(received) >= _BURST
        return received

    async def write(self, data: bytes, timeout: float) -> int:
        """Send `data` to the guest; see `Fifos.write`."""
        written = 0
        with trio.move_on_after(timeout):
            async with self._writing:
                while written < len(data):
                    await self._connected.wait()
                    if self._connection is None:
                        raise trio.ClosedResourceError
                    try:
                        written += self._connection.send(data[written:])
                    except BlockingIOError:
                        await self._wait_writable(self._connection)
                    except OSError:  # the VMM has ended, or is about to
                        await trio.sleep(_SHORTEST_LOOK)
        return written

    async def keep(self, main_pid: int, notify_socket: str = NOTIFY_SOCKET) -> None:
        """Have the unit of the process `main_pid` keep the connection, and those that follow it.

        Waits until there is one. Raises as `Fifos.keep` does.
        """
        self._notify_socket = notify_socket
        self._is_expected.set()  # its guest runs, so the socket is there: the next look is due
        with trio.move_on_after(KEEP_TIMEOUT):
            await self._connected.wait()
            if self._connection is not None:
                await store_descriptors(main_pid, [self._connection.fileno()], notify_socket)
            return
        raise TimedOut(f"process {main_pid} offers no console: {self._parent}/{SOCKET} is missing")

    def hang_up(self) -> None:
        """End the connection in order; `wait` and `read` give what is left, then it is closed."""
        self._is_closed = True
        self._is_suspect = False
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Let go of the connection; may be called twice."""
        self._is_closed = True
        if self._connection is not None:
            self._drop(self._connection)
        self._connected.set()  # nobody waits for what does not come

    async def _reached(self) -> socket.socket:
        """Return the connection, once there is one."""
        look = _SHORTEST_LOOK
        while self._connection is None:
            if self._is_closed:
                raise trio.ClosedResourceError
            if connection := self._connect():
                self._connection = connection
                self._connected.set()
                await self._keep_following(connection)
                continue
            with trio.move_on_after(look) as pause:
                await self._is_expected.wait()
                self._is_expected = trio.Event()
            look = min(2 * look, _LONGEST_LOOK) if pause.cancelled_caught else _SHORTEST_LOOK
        return self._connection

    def _connect(self) -> socket.socket | None:
        """Return a connection to the VMM's socket if there is one that is its own."""
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
            parent = os.open(self._parent, flags | os.O_DIRECTORY)
            opened.callback(os.close, parent)
            entry = os.open(SOCKET, flags, dir_fd=parent)
            opened.callback(os.close, entry)
            facts = os.fstat(entry)
            if not stat.S_ISSOCK(facts.st_mode) or facts.st_uid != self._uid:
                return None
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                connection.setblocking(False)
                connection.connect(f"/proc/self/fd/{entry}")
                self._inherited.store(self._vm_id, connection.fileno())
            except BaseException:
                connection.close()
                raise
            return connection
        return None

    async def _connect_anew(self, old: socket.socket) -> None:
        """Take the place of the old connection; what came through that one is read first."""
        connection = self._connect()
        if connection is None or self._connection is not old:
            return
        self._connection = connection
        with trio.move_on_after(_HANG_UP):
            while (rest := self._receive(old, 1 << 16)) is not None:
                self._left += rest
                if not rest:
                    await trio.lowlevel.wait_readable(old)
        trio.lowlevel.notify_closing(old)
        old.close()
        await self._keep_following(connection)

    async def _keep_following(self, connection: socket.socket) -> None:
        """Do for a further connection what `keep` did for the first."""
        if not self._notify_socket:
            return
        size = _CREDENTIALS.size
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        pid, uid, _ = _CREDENTIALS.unpack(peer)
        if uid == self._uid:
            # Without it only the agent's death would be worse.
            with contextlib.suppress(TimedOut):
                await store_descriptors(pid, [connection.fileno()], self._notify_socket)

    async def _wait_writable(self, connection: socket.socket) -> None:
        try:
            await trio.lowlevel.wait_writable(connection)
        except trio.ClosedResourceError:
            if self._is_closed:
                raise

    def _receive(self, connection: socket.socket, size: int) -> bytes | None:
        """Return what there is, b"" for nothing now, None at the end."""
        try:
            return connection.recv(size) or None
        except BlockingIOError:
            return b""
        except OSError:
            return None

    def _drop(self, connection: socket.socket) -> None:
        trio.lowlevel.notify_closing(connection)
        connection.close()
        if self._connection is connection:
            self._connection = None
            self._connected = trio.Event()
