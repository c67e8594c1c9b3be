"""A snapshot's archive as a view: laid out once from its directory, computed at each read.

The layout says for each byte of the tar whence it comes: header bytes, `snapshot.json`, or an
extent of a data file. It depends on the snapshot's immutable files alone, so all readers of a
snapshot share it, and two reads give the same bytes. Only the bytes of `snapshot.json`, of fixed
size, differ between views: each keeps those it was opened with.
"""

import errno
import mmap
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

import trio

from agent.model.errors import Failed, from_os_error
from agent.model.size import KIB
from agent.model.snapshot import METADATA

from . import tar
from .sparse import Extents, encode_map, scan

_LITERAL, _METADATA = -1, -2
_SMALLEST = 128 * KIB  # bytes of memory to read into: what the kernel asks for unless told more
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Member:
    """A data file: its name, its size in bytes, and where it has data."""

    name: str
    size: int
    extents: Extents


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where every byte of an archive of `size` bytes comes from.

    Piece i lies between `starts[i]` and `starts[i + 1]`. It is taken, from `origins[i]` on, of the
    file `names[sources[i]]`, or of `literals`, or of `snapshot.json`. A piece takes 18 bytes.
    """

    size: int
    names: tuple[str, ...]
    starts: "array[int]"
    sources: "array[int]"
    origins: "array[int]"
    literals: bytes


def lay_out(members: Iterable[Member], metadata_size: int, mtime: int) -> Layout:
    """Return the layout of an archive of `members`, in name order, behind `snapshot.json`.

    `metadata_size` is in bytes; `mtime`, seconds since the epoch, is what all headers say.
    """
    starts, sources, origins = array("q"), array("h"), array("q")
    literals = bytearray()
    size = 0

    def add(source: int, origin: int, length: int) -> None:
        nonlocal size
        if length:
            starts.append(size)
            sources.append(source)
            origins.append(origin)
            size += length

    def add_literal(data: bytes) -> None:
        add(_LITERAL, len(literals), len(data))
        literals.extend(data)

    add_literal(tar.show_header(METADATA, metadata_size, mtime))
    add(_METADATA, 0, metadata_size)
    add_literal(bytes(tar.padding(metadata_size)))
    names = []
    for number, member in enumerate(sorted(members, key=lambda member: member.name)):
        names.append(member.name)
        head, extents = _head(member, mtime)
        add_literal(head)
        for start, length in extents:
            add(number, start, length)
        add_literal(bytes(tar.padding(extents.stored)))
    add_literal(tar.TRAILER)
    starts.append(size)
    return Layout(size, tuple(names), starts, sources, origins, bytes(literals))


def _head(member: Member, mtime: int) -> tuple[bytes, Extents]:
    """Return what stands before the member's data, and which data that is."""
    name, size = member.name, member.size
    sparse_map = encode_map(member.extents, size)
    stored = len(sparse_map) + member.extents.stored
    records = [
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.name", name),
        ("GNU.sparse.realsize", str(size)),
    ]
    if not tar.fits(stored):
        records.append(("size", str(stored)))
    pax = tar.show_pax(name, records, mtime)
    if len(pax) + stored < size:
        header = tar.show_header(f"GNUSparseFile.0/{name}", stored, mtime)
        return pax + header + sparse_map, member.extents
    pax = b"" if tar.fits(size) else tar.show_pax(name, [("size", str(size))], mtime)
    return pax + tar.show_header(name, size, mtime), Extents([(0, size)])


def read_layout(directory: int, names: Iterable[str], metadata_size: int, mtime: int) -> Layout:
    """Return the layout of the snapshot in `directory`, with the data files `names`.

    Blocks on I/O: for a worker thread. Else as `lay_out`; raises the error of `from_os_error`.
    """
    return lay_out(_scan_members(directory, names), metadata_size, mtime)


async def open_view(
    layout: Layout, directory: int, metadata: bytes, limiter: trio.CapacityLimiter
) -> "ArchiveView":
    """Open the archive for one reader; `directory` is needed only until this returns.

    All files are opened at once, in a thread of `limiter`: a snapshot that is deleted afterwards
    is read to its end, and its space is free once the view is closed. Raises the error of
    `from_os_error` when one cannot be opened.
    """
    files = await trio.to_thread.run_sync(_open_files, directory, layout.names, limiter=limiter)
    return ArchiveView(layout, files, metadata, limiter)


def _scan_members(directory: int, names: Iterable[str]) -> list[Member]:
    names = tuple(names)
    members = []
    files = _open_files(directory, names)
    try:
        for name, fd in zip(names, files, strict=True):
            size = os.fstat(fd).st_size
            members.append(Member(name, size, scan(fd, size)))
    except OSError as error:
        raise from_os_error(error, f"laying out {name}") from None
    finally:
        _close_files(files)
    return members


def _open_files(directory: int, names: Iterable[str]) -> tuple[int, ...]:
    files: list[int] = []
    try:
        for name in names:
            files.append(os.open(name, _OPEN, dir_fd=directory))
    except OSError as error:
        _close_files(files)
        raise from_os_error(error, f"opening {name}") from None
    return tuple(files)


def _close_files(files: Iterable[int]) -> None:
    for fd in files:
        os.close(fd)


def _pages(size: int) -> memoryview:
    """Return memory that begins with a page: the kernel copies it page by page."""
    return memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class ArchiveView:
    """One reader's archive: `size` bytes that never change, readable at any offset.

    Reads may overlap; `close` must wait for them.
    """

    def __init__(
        self,
        layout: Layout,
        files: tuple[int, ...],
        metadata: bytes,
        limiter: trio.CapacityLimiter,
    ) -> None:
        self.size = layout.size
        self._layout = layout
        self._files = files
        self._metadata = metadata
        self._limiter = limiter
        self._at_once = os.RWF_NOWAIT
        self._spare: memoryview | None = None

    async def pread(self, offset: int, size: int) -> memoryview:
        """Return `size` bytes from `offset` on, fewer only at the end.

        They are good until the caller's next checkpoint: by then they have been sent, and their
        memory takes what comes next. What is in the page cache is returned without a checkpoint;
        the rest is waited for in a thread. Raises Failed when a file cannot be read.
        """
        wanted = max(0, min(size, self.size - offset))
        memory, self._spare = self._spare, None
        if memory is None or len(memory) < wanted:
            memory = _pages(max(wanted, _SMALLEST))
        buffer = memory[:wanted]
        done = self._fill(buffer, offset, 0, self._at_once) if self._at_once else 0
        if done < wanted:
            await trio.to_thread.run_sync(
                self._fill, buffer, offset, done, 0, limiter=self._limiter
            )
        self._spare = memory
        return buffer

    def close(self) -> None:
        """Close the files; harmless when that was done before."""
        files, self._files = self._files, ()
        self._spare = None
        _close_files(files)

    def _fill(self, buffer: memoryview, offset: int, done: int, flags: int) -> int:
        """Fill `buffer` from `done` on; return how far it is filled, with `flags` maybe not all."""
        layout, files = self._layout, self._files
        starts, sources, origins = layout.starts, layout.sources, layout.origins
        wanted = len(buffer)
        piece = bisect_right(starts, offset + done) - 1
        skipped = offset + done - starts[piece]
        # A scattered memory file has 256 pieces in a read of 1 MiB: every step here counts.
        while done < wanted:
            source = sources[piece]
            origin = origins[piece] + skipped
            end = min(starts[piece + 1] - offset, wanted)
            if source >= 0:
                try:
                    got = os.preadv(files[source], [buffer[done:end]], origin, flags)
                except OSError as error:
                    got = self._failed(error, source, flags)
                done += got
                if done < end:
                    if flags:
                        return done
                    if not got:
                        raise Failed(
                            f"{layout.names[source]} was cut short: its snapshot is broken"
                        )
                    skipped += got
                    continue
            else:
                data = layout.literals if source == _LITERAL else self._metadata
                buffer[done:end] = data[origin : origin + end - done]
                done = end
            piece += 1
            skipped = 0
        return done

    def _failed(self, error: OSError, source: int, flags: int) -> int:
        if flags and error.errno == errno.EOPNOTSUPP:  # tmpfs, for one
            self._at_once = 0
        elif not isinstance(error, BlockingIOError):
            raise from_os_error(error, f"reading {self._layout.names[source]}") from None
        return 0
