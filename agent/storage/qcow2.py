"""The header of a qcow2 file, read and checked before anything else looks at the file.

The format is QEMU's docs/interop/qcow2.txt. Sentences of errors are to follow the name of the file.
"""

import os
import struct
from dataclasses import dataclass

from agent.model.config import MAXIMUM_STORAGE
from agent.model.errors import Damaged, UnknownFormat
from agent.model.size import show_size

MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_NEWER = struct.Struct(">QQQII")  # from version 3 on
_EXTENSION = struct.Struct(">II")
_END, _DATA_FILE, _ENCRYPTION = 0, 0x44415441, 0x0537BE77
_DIRTY, _CORRUPT, _EXTERNAL, _COMPRESSION, _SUBCLUSTERS = (1 << bit for bit in range(5))
_KNOWN = _DIRTY | _CORRUPT | _EXTERNAL | _COMPRESSION | _SUBCLUSTERS
_LONGEST_NAME = 1023
_ENDLESS = 1 << 64
_MOST_EXTENSIONS = 64


@dataclass(frozen=True, slots=True)
class Header:
    """What the header says: bytes of the disk, and whether the file needs others to be read."""

    size: int
    has_backing: bool
    is_dirty: bool


def read_header(file: int, *, whole: bool = True) -> Header:
    """Return the header of the file open as `file`, of which more is to come unless it is `whole`.

    Raises UnknownFormat when it is no qcow2, or one that is encrypted or newer than known; Damaged
    when it is broken or keeps its data in another file.
    """
    length = os.fstat(file).st_size if whole else _ENDLESS
    head = os.pread(file, _HEADER.size + _NEWER.size, 0)
    if not head.startswith(MAGIC):
        raise UnknownFormat("is no qcow2 file")
    if len(head) < _HEADER.size:
        raise Damaged("ends within its qcow2 header")
    _, version, backing, backing_length, bits, size, encryption, *more = _HEADER.unpack_from(head)
    entries, table, counts, tables = more[:4]
    if version not in (2, 3):
        raise UnknownFormat(f"is qcow2 of version {version}: known are 2 and 3")
    features, end = 0, _HEADER.size
    if version > 2:
        if len(head) < _HEADER.size + _NEWER.size:
            raise Damaged("ends within its qcow2 header")
        features, _, _, _, end = _NEWER.unpack_from(head, _HEADER.size)
        if end < _HEADER.size + _NEWER.size or end % 8:
            raise Damaged(f"has a qcow2 header of {end} bytes")
    if features & ~_KNOWN:
        raise UnknownFormat("is qcow2 with features that are not known here")
    if features & _CORRUPT:
        raise Damaged("is marked as corrupt: repair it with qemu-img check -r all")
    if not 9 <= bits <= 21:
        raise Damaged(f"has qcow2 clusters of 2^{bits} bytes")
    cluster = 1 << bits
    # An entry of the first table stands for a cluster of entries of 8 bytes (16 with subclusters).
    covered = cluster * (cluster // (16 if features & _SUBCLUSTERS else 8))
    if not 0 < size <= MAXIMUM_STORAGE or size % 512:
        raise Damaged(f"holds a disk of {show_size(size)}: {size} bytes")
    if (
        entries < -(-size // covered)
        or _is_outside(table, 8 * entries, cluster, length)
        or _is_outside(counts, tables * cluster, cluster, length)
    ):
        raise Damaged("is cut short or broken: its tables lie outside of it")
    if backing and (backing_length > _LONGEST_NAME or backing + backing_length > cluster):
        raise Damaged("has a broken name of a backing file")
    extensions = _extensions(file, end, backing or cluster)
    if encryption or _ENCRYPTION in extensions:
        raise UnknownFormat("is encrypted: write it out with qemu-img convert")
    if features & _EXTERNAL or _DATA_FILE in extensions:
        raise Damaged(
            "keeps its data in another file: put both into one with qemu-img convert -O qcow2"
        )
    return Header(size, bool(backing), bool(features & _DIRTY))


def _is_outside(offset: int, length: int, cluster: int, file_length: int) -> bool:
    return not offset or offset % cluster != 0 or offset + length > file_length


def _extensions(file: int, start: int, end: int) -> set[int]:
    """Return the kinds of the header's extensions, which lie between `start` and `end`."""
    kinds: set[int] = set()
    for _ in range(_MOST_EXTENSIONS):
        head = os.pread(file, _EXTENSION.size, start)
        if start + _EXTENSION.size > end or len(head) < _EXTENSION.size:
            return kinds
        kind, length = _EXTENSION.unpack(head)
        if kind == _END:
            return kinds
        kinds.add(kind)
        start += _EXTENSION.size + -(-length // 8) * 8
    raise Damaged(f"has more than {_MOST_EXTENSIONS} header extensions")
