"""Takes a tar stream apart: bytes in, members and their data out, in whatever pieces they come.

Without I/O. What it keeps in memory is bounded: one header, one extended header, one sparse map.
"""

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass

from agent.model.errors import Damaged, UnknownFormat
from agent.model.size import MIB

from . import tar
from .sparse import Extents, MapReader, parse_cocoon, parse_pairs
from .tar import BLOCK

Buffer = bytes | bytearray | memoryview

EXTENDED_LIMIT = 8 * MIB
"""Bytes of an extended header: enough for Cocoon's map of 300 000 data ranges."""
_NAME_LIMIT = 4096
_ZEROS = bytes(128 * 1024)
_RANGE_KEYS = ("GNU.sparse.offset", "GNU.sparse.numbytes")


@dataclass(frozen=True, slots=True)
class MemberStart:
    """A regular file begins: its name, its size, and how many bytes of data are to come."""

    name: str
    size: int
    stored: int


@dataclass(frozen=True, slots=True)
class MemberData:
    """Data of the present member, from `offset` in the file on; `data` is not copied."""

    offset: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class MemberEnd:
    """All data of the present member has come."""


Event = MemberStart | MemberData | MemberEnd


@dataclass(frozen=True, slots=True)
class _Collect:
    """The parser wants `size` bytes in one piece."""

    size: int


@dataclass(frozen=True, slots=True)
class _Store:
    """The parser wants the data of these ranges passed on, and `padding` bytes dropped."""

    member: MemberStart
    extents: Extents
    padding: int


_Parser = Generator[_Collect | _Store, bytes, None]


class TarReader:
    """What is known between two pieces of a stream. Any error it raises is final.

    `ended` is true once the two blocks of zeros that end an archive have come.
    """

    def __init__(self) -> None:
        self.ended = False
        self._parser = _parse()
        self._want = next(self._parser)
        self._collected = bytearray()
        self._ranges: Iterator[tuple[int, int]] = iter(())
        self._offset = self._length = self._padding = 0

    def feed(self, data: Buffer) -> Iterator[Event]:
        """Yield what `data`, the next piece, completes.

        Raises UnknownFormat when the stream is no archive of regular files, Damaged when it is
        damaged. Take all events before the next piece: what they hold is valid until then.
        """
        view = memoryview(data)
        while len(view):
            if self.ended:
                if bytes(view).strip(b"\0"):
                    raise Damaged("the archive has data behind its end mark")
                return
            match self._want:
                case _Collect(size):
                    missing = size - len(self._collected)
                    self._collected += view[:missing]
                    view = view[missing:]
                    if len(self._collected) == size:
                        collected = bytes(self._collected)
                        self._collected.clear()
                        yield from self._proceed(collected)
                case _Store():
                    if self._length:
                        piece = view[: self._length]
                        yield MemberData(self._offset, piece)
                    else:
                        piece = view[: self._padding]
                    view = view[len(piece) :]
                    yield from self._consume(len(piece))

    def feed_zeros(self, count: int) -> Iterator[Event]:
        """Take `count` zero bytes without yielding any data: a hole reads as zeros anyway."""
        while count and not self.ended:
            match self._want:
                case _Collect(size):
                    taken = min(count, len(_ZEROS), size - len(self._collected))
                    yield from self.feed(_ZEROS[:taken])
                case _Store():
                    taken = min(count, self._length or self._padding)
                    yield from self._consume(taken)
            count -= taken

    def where(self) -> str:
        """Say where in the archive the stream stands."""
        match self._want:
            case _Store(member):
                return f"in the member {member.name[:80]!r}"
            case _Collect():
                return "before its end mark"

    def _consume(self, count: int) -> Iterator[Event]:
        """Note that `count` bytes of the present range, or of the padding, have come."""
        if not self._length:
            self._padding -= count
            if not self._padding:
                yield from self._proceed(b"")
            return
        self._offset += count
        self._length -= count
        if not self._length:
            yield from self._next_range()

    def _next_range(self) -> Iterator[Event]:
        for offset, length in self._ranges:
            if length:
                self._offset, self._length = offset, length
                return
        yield MemberEnd()
        if not self._padding:
            yield from self._proceed(b"")

    def _proceed(self, collected: bytes) -> Iterator[Event]:
        """Give the parser what it wanted."""
        try:
            self._want = self._parser.send(collected)
        except StopIteration:
            self.ended = True
            return
        match self._want:
            case _Store(member, extents, padding):
                self._ranges = iter(extents)
                self._padding = padding
                yield member
                yield from self._next_range()


def _parse() -> _Parser:
    """Read headers one after the other, up to the two blocks of zeros."""
    global_records: dict[str, str] = {}
    records: dict[str, str] = {}
    pairs: list[str] = []
    long_name = ""
    first = True
    while any(block := (yield _Collect(BLOCK))):
        header = _parse_header(block, first)
        first = False
        match header.kind:
            case tar.PAX:
                listed = tar.parse_pax((yield from _extension(header, EXTENDED_LIMIT)))
                records = dict(listed)
                # GNU sparse 0.0 repeats two keys for each range.
                pairs = [value for key, value in listed if key in _RANGE_KEYS]
            case tar.PAX_GLOBAL:
                listed = tar.parse_pax((yield from _extension(header, EXTENDED_LIMIT)))
                global_records |= dict(listed)
            case tar.GNU_LONG_NAME:
                raw = yield from _extension(header, _NAME_LIMIT)
                long_name = raw.partition(b"\0")[0].decode(errors="replace")
            case tar.GNU_LONG_LINK:
                yield from _extension(header, _NAME_LIMIT)
            case tar.REGULAR | tar.GNU_SPARSE:
                yield from _member(header, block, global_records | records, pairs, long_name)
                records, pairs, long_name = {}, [], ""
            case _:
                raise UnknownFormat(
                    f"the archive's member {header.name[:80]!r} is {header.what} and no regular "
                    "file: this is no snapshot"
                )
    if first:
        raise UnknownFormat("this is no snapshot: it begins with zeros")
    if any((yield _Collect(BLOCK))):
        raise Damaged("the archive has data behind a block of zeros")


def _parse_header(block: bytes, first: bool) -> tar.Header:
    try:
        return tar.parse_header(block)
    except Damaged:
        if not first:
            raise
        raise UnknownFormat(
            "this is no snapshot: it is neither a tar archive nor one compressed with gzip or zstd"
        ) from None


def _extension(header: tar.Header, limit: int) -> Generator[_Collect, bytes, bytes]:
    if not 0 < header.size <= limit:
        raise Damaged(f"the archive has an extended header of {header.size} bytes")
    data = yield _Collect(header.size + tar.padding(header.size))
    return data[: header.size]


def _member(
    header: tar.Header,
    block: bytes,
    records: Mapping[str, str],
    pairs: list[str],
    long_name: str,
) -> _Parser:
    """Read what stands between a member's header and its data; then have the data stored."""
    name = records.get("GNU.sparse.name") or records.get("path") or long_name or header.name
    size = stored = _size(records, "size", header.size)
    padding = tar.padding(stored)
    extents = Extents([(0, size)])
    if header.kind == tar.GNU_SPARSE:
        size = tar.old_real_size(block)
        extents = yield from _old_map(block)
    elif "GNU.sparse.major" in records:
        version = f"{records['GNU.sparse.major']}.{records.get('GNU.sparse.minor')}"
        if version != "1.0":
            raise UnknownFormat(f"{name[:80]!r} has a sparse map of the version {version[:40]}")
        size = _size(records, "GNU.sparse.realsize")
        extents, measured = yield from _new_map(stored)
        stored -= measured
    elif "GNU.sparse.size" in records:
        size = _size(records, "GNU.sparse.size")
        listed = records.get("GNU.sparse.map")
        extents = parse_pairs(pairs if listed is None else filter(None, listed.split(",")))
    elif "COCOON.sparse.map" in records:
        size = _size(records, "COCOON.sparse.size")
        extents = parse_cocoon(records["COCOON.sparse.map"])
    if extents.end > size:
        raise Damaged(f"the sparse map of {name[:80]!r} reaches past the end of the file")
    if extents.stored != stored:
        raise Damaged(
            f"{name[:80]!r} has {stored} bytes in the archive where its map tells of "
            f"{extents.stored}"
        )
    yield _Store(MemberStart(name, size, stored), extents, padding)


def _old_map(block: bytes) -> Generator[_Collect, bytes, Extents]:
    entries, more = tar.old_sparse(block, extension=False)
    extents = Extents(entries)
    while more:
        entries, more = tar.old_sparse((yield _Collect(BLOCK)), extension=True)
        for start, length in entries:
            extents.append(start, length)
    return extents


def _new_map(stored: int) -> Generator[_Collect, bytes, tuple[Extents, int]]:
    reader = MapReader()
    while not reader.done:
        if reader.size + BLOCK > stored:
            raise Damaged("a sparse map in the archive is longer than its member")
        reader.feed((yield _Collect(BLOCK)))
    return reader.extents, reader.size


def _size(records: Mapping[str, str], key: str, otherwise: int | None = None) -> int:
    text = records.get(key)
    if text is None and otherwise is not None:
        return otherwise
    if text is None or not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise Damaged(f"the archive gives {text!r:.40} as {key}")
    return int(text)
