"""A growing file with an upper bound: what `console` and `events` show.

A log lives at its path between writes and over restarts of the agent. When an append would take it
past its limit, its older half is dropped at a line boundary: the newer half goes to a temporary
file that is renamed over the log, so a crash leaves either the old log or the new one. Nothing is
synced: the kernel writes a log back when it likes, and only a crash of the host loses some of it.
"""

import os
from collections.abc import Callable
from typing import Any, Final, TypeVar

import trio

_T = TypeVar("_T")

LIMIT: Final = 1 << 20
"""Default upper bound of a log, in bytes."""
SMALL_APPEND: Final = 4096
LINE_SEARCH: Final = 64 * 1024
"""How far into the kept half a line boundary is looked for, in bytes."""


class BoundedLog:
    """One log file. Appending keeps it open until `close`; reading alone leaves no descriptor.

    One object a file may append; any number may read, in this one or others by path. `threads`
    bounds how many threads wait for disks (trio's default limit without it).
    """

    __slots__ = ("_appending", "_fd", "_limit", "_path", "_size", "_threads")

    def __init__(
        self, path: str, limit: int = LIMIT, threads: trio.CapacityLimiter | None = None
    ) -> None:
        self._path = path
        self._limit = limit
        self._threads = threads
        self._fd = -1
        self._size = 0
        self._appending = trio.Lock()

    @property
    def size(self) -> int:
        """The bytes that can be read now; 0 when there is no file."""
        if self._fd >= 0:
            return self._size
        try:
            return os.stat(self._path, follow_symlinks=False).st_size
        except FileNotFoundError:
            return 0

    async def open(self) -> None:
        """Have the file open before the first append; raises OSError."""
        async with self._appending:
            await self._open()

    async def append(self, data: bytes) -> None:
        """Add `data` at the end, dropping the older half first where the limit asks for it.

        There is no checkpoint between the moment when the data can be read and the return, so a
        caller that publishes it next does both in one step. Raises OSError (a full disk, say); what
        fitted of `data` may then be in the log.
        """
        await self.append_from(lambda: data)

    async def append_from(self, read: Callable[[], bytes]) -> None:
        """Add what `read` returns, as `append` does.

        A little of it is in the log with no checkpoint since it was read: an agent that is killed
        has nothing in its hands that is neither at its source any more nor here.
        """
        async with self._appending:
            await self._open()
            data = read()
            if not data:
                return
            if self._size + len(data) > self._limit:
                old = self._fd
                self._fd, self._size = await self._in_thread(self._halve, data)
                os.close(old)
                return
            try:
                if len(data) > SMALL_APPEND:
                    await self._in_thread(_write_all, self._fd, data)
                else:
                    # A few bytes into the page cache, most often into a page that is there and
                    # dirty already, take 2 microseconds; a thread takes 100. The kernel makes a
                    # writer wait for the disk only for the pages that it has dirtied itself
                    # (balance_dirty_pages): those who write many go to a thread, above.
                    _write_all(self._fd, data)
            except OSError:
                self._size = os.fstat(self._fd).st_size
                raise
            self._size += len(data)

    async def pread(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from `offset`; less only at the end, b"" past it."""
        if self._fd < 0:
            return await self._in_thread(_pread_path, self._path, offset, size)
        wanted = min(size, self._size - offset)
        if wanted <= 0:
            return b""
        return await _pread(self._fd, offset, wanted, self._threads)

    def excerpt(self, size: int) -> "Excerpt":
        """Return the last `size` bytes as they are at this moment; waits for nothing."""
        if self._fd >= 0:
            start = max(0, self._size - size)
            return Excerpt(os.dup(self._fd), start, self._size, self._threads)
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return Excerpt(-1, 0, 0, None)
        end = os.fstat(fd).st_size
        return Excerpt(fd, max(0, end - size), end, self._threads)

    async def close(self) -> None:
        """Let go of the descriptor; the file stays and the next append opens it again."""
        async with self._appending:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    async def remove(self) -> None:
        """Close the log and delete the file."""
        await self.close()
        for path in (self._path, _temporary(self._path)):
            try:
                os.unlink(path)
            except FileNotFoundError:
                continue

    async def _open(self) -> None:
        if self._fd < 0:
            self._fd, self._size = await self._in_thread(_open_for_append, self._path)

    async def _in_thread(self, function: Callable[..., _T], *arguments: Any) -> _T:
        return await trio.to_thread.run_sync(function, *arguments, limiter=self._threads)

    def _halve(self, data: bytes) -> tuple[int, int]:
        """Put the newer half of the log and `data` in its place; return its descriptor and size."""
        half = self._limit // 2
        start = self._size + len(data) - half
        # One byte earlier, so that a cut that falls on the start of a line keeps that line.
        kept = _pread_all(self._fd, start - 1, self._size - start + 1)
        kept = (kept + data)[-half - 1 :]
        newline = kept.find(b"\n", 0, min(half // 2, LINE_SEARCH))
        kept = kept[newline + 1 :] if newline >= 0 else kept[1:]
        temporary = _temporary(self._path)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o600)
        try:
            _write_all(fd, kept)
            os.rename(temporary, self._path)
        except OSError:
            os.close(fd)
            os.unlink(temporary)
            raise
        return fd, len(kept)


class Excerpt:
    """A part of a log as it was at one moment, whatever happens to the log; read it once.

    It holds the file that the log was then: appends go past its end, and a halved log is another
    file.
    """

    __slots__ = ("_end", "_fd", "_position", "_reading", "_threads")

    def __init__(self, fd: int, start: int, end: int, threads: trio.CapacityLimiter | None) -> None:
        self._fd = fd
        self._position = start
        self._end = end
        self._threads = threads
        self._reading = trio.Lock()

    async def read(self, size: int) -> bytes:
        """Return the next bytes, `size` at most; b"" at the end or once closed."""
        async with self._reading:
            wanted = min(size, self._end - self._position)
            if wanted <= 0 or self._fd < 0:
                return b""
            data = await _pread(self._fd, self._position, wanted, self._threads)
            self._position += len(data)
            return data

    def close(self) -> None:
        """Let go of the file; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _temporary(path: str) -> str:
    return f"{path}.new"


def _open_for_append(path: str) -> tuple[int, int]:
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    return fd, os.fstat(fd).st_size


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


async def _pread(fd: int, offset: int, size: int, threads: trio.CapacityLimiter | None) -> bytes:
    """Read from the page cache at once where the kernel can, else in a thread."""
    try:
        buffer = bytearray(size)
        if os.preadv(fd, [buffer], offset, os.RWF_NOWAIT) == size:
            await trio.lowlevel.checkpoint()
            return bytes(buffer)
    except OSError:
        pass  # EAGAIN: not in memory; EOPNOTSUPP: a filesystem that cannot tell
    # The log may close its descriptor, and the number be another file's, while the thread reads.
    own = os.dup(fd)
    try:
        return await trio.to_thread.run_sync(_pread_all, own, offset, size, limiter=threads)
    finally:
        os.close(own)


def _pread_path(path: str, offset: int, size: int) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    try:
        return _pread_all(fd, offset, size)
    finally:
        os.close(fd)


def _pread_all(fd: int, offset: int, size: int) -> bytes:
    pieces = []
    while size > 0 and (piece := os.pread(fd, size, offset)):
        pieces.append(piece)
        offset += len(piece)
        size -= len(piece)
    return b"".join(pieces)
