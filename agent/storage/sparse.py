"""Where a sparse file has data: read from the filesystem, and written and read as archives do.

Archives know three encodings: GNU sparse 1.0 (a map at the head of the member's data), GNU sparse
0.0 and 0.1 (a map in PAX records), and Cocoon's (JSON in a PAX record). GNU tar's manual describes
the GNU ones ("Storing Sparse Files").
"""

import errno
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator

from agent.model.errors import Damaged

BLOCK = 512
MOST_EXTENTS = 1 << 20
"""The extents that a foreign map may have: 16 MiB of memory for them."""
_MAP_LIMIT = (1 << 20) - 2 * BLOCK
"""The bytes of map that Go's archive/tar reads, and so Cocoon (CVE-2025-58183)."""
_DIGITS = 19  # of 2**63 - 1

_COCOON_ENTRY = re.compile(r"(\{[^{}]{1,200}\})\s*(,?)\s*")


class Extents:
    """Data ranges of a file, in order and apart from each other: 16 bytes of memory each."""

    __slots__ = ("lengths", "starts", "stored")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self.starts = array("q")
        self.lengths = array("q")
        self.stored = 0
        for start, length in ranges:
            self.append(start, length)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.starts, self.lengths, strict=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Extents) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def end(self) -> int:
        """Where the last range ends; 0 without any."""
        return self.starts[-1] + self.lengths[-1] if self.starts else 0

    def append(self, start: int, length: int) -> None:
        """Add a range behind the others; raise Damaged when it is not behind, or one too many."""
        if length < 0 or start < self.end or start + length > 1 << 62:
            raise Damaged("a sparse map in the archive is out of order or overlaps itself")
        if len(self.starts) >= MOST_EXTENTS:
            raise Damaged(f"a sparse map in the archive has more than {MOST_EXTENTS} entries")
        self.starts.append(start)
        self.lengths.append(length)
        self.stored += length


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield offset and length of the file's data, in order; blocks on I/O, raises OSError.

    A filesystem that knows no holes gives one range. `size` is the file's, in bytes.
    """
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            raise
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, end - start


def scan(fd: int, size: int) -> Extents:
    """Return the file's data as an archive has it: whole blocks, and no more ranges than readers
    take. Blocks on I/O, raises OSError."""
    ranges: list[tuple[int, int]] = []
    for start, length in data_ranges(fd, size):
        # GNU tar pads each range to a block where others do not: ours leave nothing to pad.
        end = min(-(-(start + length) // BLOCK) * BLOCK, size)
        start -= start % BLOCK
        if ranges and start <= sum(ranges[-1]):
            start = ranges.pop()[0]
        ranges.append((start, end - start))
    most = _MAP_LIMIT // (2 * len(f"{size}\n"))
    return Extents(_fewer(ranges, most))


def _fewer(ranges: list[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """Return at most `most` ranges that cover `ranges`, the smallest holes filled in."""
    if len(ranges) <= most:
        return ranges

    def gap(index: int) -> int:
        start, length = ranges[index]
        return ranges[index + 1][0] - start - length

    smallest = sorted(range(len(ranges) - 1), key=gap)[: len(ranges) - most]
    filled = set(smallest)
    merged: list[tuple[int, int]] = []
    for index, (start, length) in enumerate(ranges):
        if index - 1 in filled:
            first = merged.pop()[0]
            merged.append((first, start + length - first))
        else:
            merged.append((start, length))
    return merged


def encode_map(extents: Extents, size: int) -> bytes:
    """Return the GNU sparse 1.0 map of a file of `size` bytes, padded to whole blocks."""
    ranges = list(extents)
    if extents.end < size:
        ranges.append((size, 0))  # as GNU tar does, so that readers learn the size from the map
    lines = [str(len(ranges)), *(f"{start}\n{length}" for start, length in ranges), ""]
    text = "\n".join(lines).encode()
    return text.ljust(-(-len(text) // BLOCK) * BLOCK, b"\0")


class MapReader:
    """Reads a GNU sparse 1.0 map block by block; `size` is what it measured once it is `done`."""

    def __init__(self) -> None:
        self.extents = Extents()
        self.size = 0
        self.done = False
        self._rest = b""
        self._missing: int | None = None
        self._start: int | None = None

    def feed(self, block: bytes) -> None:
        """Take the next 512 bytes; raise Damaged when they are not such a map."""
        self.size += len(block)
        *lines, self._rest = (self._rest + block).split(b"\n")
        for line in lines:
            if self.done:
                break
            self._line(_number(line.decode("latin-1")))
        # What follows a finished map is padding, which need not end in a newline.
        if not self.done and len(self._rest) > _DIGITS:
            raise Damaged("a sparse map in the archive is not made of numbers")

    def _line(self, number: int) -> None:
        if self._missing is None:
            if number > MOST_EXTENTS:
                raise Damaged(f"a sparse map in the archive has {number} entries: too many")
            self._missing = number
        elif self._start is None:
            self._start = number
        else:
            self.extents.append(self._start, number)
            self._start = None
            self._missing -= 1
        self.done = self._missing == 0


def parse_pairs(numbers: Iterable[str]) -> Extents:
    """Return the map of GNU sparse 0.0 and 0.1: offsets and lengths by turns; or raise Damaged."""
    extents = Extents()
    start: int | None = None
    for text in numbers:
        if start is None:
            start = _number(text)
        else:
            extents.append(start, _number(text))
            start = None
    if start is not None:
        raise Damaged("a sparse map in the archive has an offset without a length")
    return extents


def parse_cocoon(text: str) -> Extents:
    """Return Cocoon's map, `[{"o": offset, "l": length}, …]` or `null`; or raise Damaged."""
    extents = Extents()
    stripped = text.strip()
    if stripped == "null":  # how Go writes the list of a file without data
        return extents
    if not (stripped.startswith("[") and stripped.endswith("]")):
        raise Damaged("a sparse map in the archive is no list")
    inner = stripped[1:-1].strip()
    position = 0
    # Entry by entry: a list of objects takes thirty times the memory of its text.
    while position < len(inner):
        match = _COCOON_ENTRY.match(inner, position)
        position = match.end() if match else 0
        if match is None or bool(match[2]) != (position < len(inner)):
            raise Damaged("a sparse map in the archive is no list of offsets and lengths")
        extents.append(*_cocoon_entry(match[1]))
    return extents


def _cocoon_entry(text: str) -> tuple[int, int]:
    try:
        entry = json.loads(text)
    except ValueError:
        entry = None
    match entry:
        case {"o": int(start), "l": int(length)} if start >= 0 <= length:
            return start, length
    raise Damaged(f"a sparse map in the archive has the entry {text[:60]!r}")


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS):
        raise Damaged(f"a sparse map in the archive has {text[:20]!r} for a number")
    return int(text)
