"""The two FIFOs that are a VMM's standard input and output.

They lie in the VM's run directory, which is root's alone. The agent opens them by path, for reading
and writing both, with descriptions of its own: so a start never waits for a second end, a VMM that
systemd starts again finds them open, and nothing that a VMM does to the flags of its descriptors
makes the agent's block. Further descriptions, made for that, go to the fd store of the VM's unit:
they keep the FIFOs and what is in them while there is no agent, and go when the unit stops.
"""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Sequence
from typing import Final

import trio

from agent.model.errors import Failed, TimedOut, from_os_error

INPUT: Final = "console.in"
OUTPUT: Final = "console.out"
"""Names of the FIFOs in the run directory: the unit's StandardInputFile and StandardOutputFile."""
NOTIFY_SOCKET: Final = "/run/systemd/notify"
CAPACITY: Final = 1 << 20
"""Bytes of output that a FIFO keeps while nobody reads it: fs.pipe-max-size's default."""
KEEP_TIMEOUT: Final = 10.0
_PIECE: Final = 4096  # PIPE_BUF: written whole or not at all, pipe(7)


class Fifos:
    """The open FIFOs of one VM."""

    __slots__ = ("_input", "_output", "_writing")

    def __init__(self, directory: str) -> None:
        """Open the FIFOs in `directory`, making what is missing; raises CocoonError.

        The directory is made 0700 and the user's own; what stands there in a FIFO's place goes.
        """
        try:
            folder = ensure_private(directory)
            try:
                self._input = _open_fifo(folder, INPUT)
                try:
                    self._output = _open_fifo(folder, OUTPUT)
                except BaseException:
                    os.close(self._input)
                    raise
            finally:
                os.close(folder)
        except OSError as error:
            raise from_os_error(error, f"opening the console in {directory}") from error
        # Users of a host may have lowered what a pipe can hold (fs.pipe-max-size).
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._output, fcntl.F_SETPIPE_SZ, CAPACITY)
        self._writing = trio.Lock()

    async def wait(self) -> None:
        """Return when there is output; raises trio.ClosedResourceError after `close`."""
        if self._output < 0:
            raise trio.ClosedResourceError
        await trio.lowlevel.wait_readable(self._output)

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes of output, b"" when there is none now, or after `close`."""
        if self._output < 0:
            return b""
        try:
            return os.read(self._output, size)
        except BlockingIOError:
            return b""

    async def write(self, data: bytes, timeout: float) -> int:
        """Send `data` to the guest; return how much of it the FIFO took within `timeout` seconds.

        Writers take turns. Raises trio.ClosedResourceError when the FIFOs are closed meanwhile.
        """
        written = 0
        with trio.move_on_after(timeout):
            async with self._writing:
                while written < len(data):
                    if self._input < 0:
                        raise trio.ClosedResourceError
                    try:
                        written += os.write(self._input, data[written : written + _PIECE])
                    except BlockingIOError:
                        await trio.lowlevel.wait_writable(self._input)
        return written

    async def keep(self, main_pid: int, notify_socket: str = NOTIFY_SOCKET) -> None:
        """Put both FIFOs into the fd store of the unit whose main process is `main_pid`.

        Protocol: sd_notify(3), FDSTORE. systemd finds the unit by the sender's credentials, and
        root may name another process there. Returns once systemd has been told: the messages hold
        the FIFOs from then on. May be repeated: what the unit kept before is replaced. Raises
        Failed, or TimedOut when systemd does not take the messages.
        """
        with contextlib.ExitStack() as opened:
            own = []
            try:
                for fd in (self._input, self._output):
                    own.append(_reopen(fd))
                    opened.callback(os.close, own[-1])
            except OSError as error:
                reason = error.strerror or error
                raise Failed(f"opening the console of process {main_pid}: {reason}") from error
            await store_descriptors(main_pid, own, notify_socket)

    def close(self) -> None:
        """Let go of the FIFOs, which stay in the directory; may be called twice."""
        for fd in (self._input, self._output):
            if fd >= 0:
                trio.lowlevel.notify_closing(fd)
                os.close(fd)
        self._input = self._output = -1


async def store_descriptors(main_pid: int, own: Sequence[int], notify_socket: str) -> None:
    """Put `own` into the fd store of the unit of `main_pid`; see `Fifos.keep`."""
    try:
        with trio.fail_after(KEEP_TIMEOUT), _connected(notify_socket) as notify:
            credentials = struct.pack("3i", main_pid, os.geteuid(), os.getegid())
            # Without this, what an earlier agent stored would fill the store.
            remove = b"FDSTOREREMOVE=1\nFDNAME=console"
            await _send(notify, remove, [_credentials(credentials)])
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(own)}i", *own))
            store = b"FDSTORE=1\nFDNAME=console"
            await _send(notify, store, [_credentials(credentials), rights])
    except trio.TooSlowError:
        raise TimedOut(f"systemd did not take the console of process {main_pid}") from None
    except ProcessLookupError:
        return  # The process has ended, and what kept its console would have gone with it.
    except OSError as error:
        reason = error.strerror or error
        raise Failed(f"giving the console to process {main_pid} failed: {reason}") from error


def remove_fifos(directory: str) -> None:
    """Delete the FIFOs in `directory`, where they are there."""
    for name in (INPUT, OUTPUT):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, name))


def ensure_private(path: str) -> int:
    """Make a directory 0700 and the user's own; return it open. Raises OSError."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "the directory belongs to another user", path)
        os.fchmod(fd, 0o700)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_fifo(folder: int, name: str) -> int:
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISFIFO(found.st_mode) or found.st_uid != os.geteuid():
            os.unlink(name, dir_fd=folder)
    with contextlib.suppress(FileExistsError):
        os.mkfifo(name, 0o600, dir_fd=folder)
    flags = os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=folder)


def _reopen(fd: int) -> int:
    flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
    return os.open(f"/proc/self/fd/{fd}", flags)


def _connected(path: str) -> socket.socket:
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        notify.setblocking(False)
        notify.connect(path)
    except BaseException:
        notify.close()
        raise
    return notify


def _credentials(packed: bytes) -> tuple[int, int, bytes]:
    return (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, packed)


async def _send(
    notify: socket.socket, message: bytes, ancillary: list[tuple[int, int, bytes]]
) -> None:
    while True:
        try:
            notify.sendmsg([message], ancillary)
        except BlockingIOError:
            await trio.lowlevel.wait_writable(notify)
        else:
            return
