"""The blocks of a tar archive: headers written and read, PAX records among them.

POSIX pax interchange format, with what GNU tar adds when it reads: numbers in base 256, long names,
old-style sparse headers (tar/header.h of GNU tar; the manual's "Basic Tar Format").
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from agent.model.errors import Damaged

BLOCK = 512
TRAILER = bytes(2 * BLOCK)
MODE = 0o600
"""Of members: guest memory is nobody else's to read once it is extracted."""

REGULAR, PAX, PAX_GLOBAL = b"0", b"x", b"g"
GNU_LONG_NAME, GNU_LONG_LINK, GNU_SPARSE = b"L", b"K", b"S"
_OLD_REGULAR = b"\0"
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a directory",
    b"6": "a FIFO",
}

_CHECKSUM = slice(148, 156)
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x")
_SPARSE_ENTRY = 24
_IN_HEADER, _IN_EXTENSION = (386, 4), (0, 21)
_MOST = 1 << 62


@dataclass(frozen=True, slots=True)
class Header:
    """A member's header. `size` is what follows it in the archive, in bytes."""

    name: str
    size: int
    kind: bytes

    @property
    def what(self) -> str:
        """What the member is, for a sentence."""
        return _KINDS.get(self.kind, f"of the type {self.kind.decode('latin-1')!r}")


def show_header(name: str, size: int, mtime: int, kind: bytes = REGULAR) -> bytes:
    """Return a ustar header; a size that it cannot hold is 0 there and belongs into PAX records."""
    block = _HEADER.pack(
        name.encode(),
        b"%07o" % MODE,
        b"%07o" % 0,
        b"%07o" % 0,
        b"%011o" % (size if fits(size) else 0),
        b"%011o" % mtime,
        b" " * 8,
        kind,
        b"",
        b"ustar\0",
        b"00",
        b"",
        b"",
        b"%07o" % 0,
        b"%07o" % 0,
        b"",
    )
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def fits(size: int) -> bool:
    """Whether `size` bytes can be written in a ustar header."""
    return size < 8**11


def show_pax(name: str, records: Iterable[tuple[str, str]], mtime: int) -> bytes:
    """Return the extended header, padding included, that stands before the member `name`."""
    body = b"".join(_show_record(key, value) for key, value in records)
    return (
        show_header(f"PaxHeaders/{name}", len(body), mtime, PAX) + body + bytes(padding(len(body)))
    )


def padding(size: int) -> int:
    """Return how many zeros stand between `size` bytes of data and the next header."""
    return -size % BLOCK


def parse_header(block: bytes) -> Header:
    """Return what the 512 bytes of `block` say; raise Damaged when they are no header."""
    raw = block[_CHECKSUM]
    plain = sum(block) - sum(raw) + 8 * ord(" ")
    if _number(raw) != plain:
        raise Damaged("a header in the archive has a wrong checksum")
    kind = block[156:157]
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return Header(
        name=(prefix + b"/" + name if prefix else name).decode(errors="replace"),
        size=_number(block[124:136]),
        kind=REGULAR if kind == _OLD_REGULAR else kind,
    )


def parse_pax(data: bytes) -> list[tuple[str, str]]:
    """Return the records of an extended header, in order; raise Damaged when they are none."""
    records = []
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 20)
        digits = data[position:space]
        if space < 0 or not digits.isdigit():
            raise Damaged("an extended header in the archive is no list of records")
        end = position + int(digits)
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not equals or end > len(data) or data[end - 1 : end] != b"\n":
            raise Damaged("an extended header in the archive is no list of records")
        records.append((key.decode(errors="replace"), value.decode(errors="replace")))
        position = end
    return records


def old_sparse(block: bytes, extension: bool) -> tuple[list[tuple[int, int]], bool]:
    """Return the sparse entries of an old GNU header or its extension, and whether more follow."""
    start, count = _IN_EXTENSION if extension else _IN_HEADER
    entries = []
    for position in range(start, start + count * _SPARSE_ENTRY, _SPARSE_ENTRY):
        if block[position : position + 1] == b"\0":
            break
        entries.append(
            (
                _number(block[position : position + 12]),
                _number(block[position + 12 : position + 24]),
            )
        )
    return entries, bool(block[start + count * _SPARSE_ENTRY])


def old_real_size(block: bytes) -> int:
    """Return the size of the file that an old GNU sparse header describes."""
    return _number(block[483:495])


def _show_record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    length = len(body)
    # The length counts its own digits.
    while (total := len(body) + len(str(length))) != length:
        length = total
    return str(length).encode() + body


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # base 256, two's complement, for what octal digits cannot hold
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if field[0] & 0x40 or value > _MOST:
            raise Damaged("a header in the archive has a number out of bounds")
        return value
    digits = field.partition(b"\0")[0].strip(b" ")
    if not digits:
        return 0
    try:
        value = int(digits, 8)
    except ValueError:
        value = -1
    if value < 0 or not digits.isdigit():
        raise Damaged("a header in the archive has a field that is no number")
    return value
