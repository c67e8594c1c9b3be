"""What kernel files look like: ELF as VMMs load it, and bzImage, which has one packed inside."""

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from agent.model.errors import Damaged, UnknownFormat

from .codecs import gunzip, unlz4_legacy, unxz, unzstd

Read = Callable[[int, int], bytes]
"""Reads a file: `read(size, offset)` returns fewer bytes only at its end."""

MAXIMUM_ELF = 1 << 30
"""Bytes that an unpacked kernel may have; Debian's has some 60 MiB."""

_PIECE = 1 << 20
_ELF_MAGIC = b"\x7fELF"
_ELF64, _X86_64 = 2, 62  # elf(5): ELFCLASS64, EM_X86_64
_LOAD, _INTERPRETER = 1, 3  # elf(5): PT_LOAD, PT_INTERP
# Documentation/arch/x86/boot.rst of Linux: the setup header; payload fields from protocol 2.08.
_SETUP_MAGIC, _SETUP_MAGIC_AT = b"HdrS", 0x202
_BOOT_FLAG, _BOOT_FLAG_AT = b"\x55\xaa", 0x1FE
_SETUP_SECTORS_AT, _PROTOCOL_AT, _PAYLOAD_AT = 0x1F1, 0x206, 0x248
_FIRST_PROTOCOL = 0x0208
_HEADER = 0x250
_PACKED_WITH: tuple[tuple[bytes, str, Callable[[Iterable[bytes]], Iterator[bytes]] | None], ...] = (
    (b"\x1f\x8b", "gzip", gunzip),
    (b"\xfd7zXZ\x00", "xz", unxz),
    (b"\x28\xb5\x2f\xfd", "zstd", unzstd),
    (b"\x02\x21\x4c\x18", "LZ4", unlz4_legacy),
    (_ELF_MAGIC, "nothing", iter),
    (b"BZh", "bzip2", None),
    (b"\x5d\x00\x00", "LZMA", None),
    (b"\x89LZO\x00", "LZO", None),
)


@dataclass(frozen=True, slots=True)
class Payload:
    """Where the packed ELF lies in a bzImage, in bytes."""

    offset: int
    length: int


def inspect_kernel(read: Read, size: int) -> Payload | None:
    """Return where the ELF lies in the kernel file of `size` bytes, or None when it is the file.

    Raises UnknownFormat for what is no kernel, Damaged for one that is cut off; their sentences
    are to follow the file's name.
    """
    header = read(_HEADER, 0)
    if header.startswith(_ELF_MAGIC):
        _check_elf(read, size)
        return None
    boot_flag = header[_BOOT_FLAG_AT : _BOOT_FLAG_AT + 2]
    setup_magic = header[_SETUP_MAGIC_AT : _SETUP_MAGIC_AT + 4]
    if boot_flag != _BOOT_FLAG or setup_magic != _SETUP_MAGIC:
        raise UnknownFormat(
            "is no kernel: give an x86-64 vmlinux (ELF), or a bzImage as distributions have it"
        )
    if len(header) < _HEADER:
        raise Damaged("is cut off: it ends in the header of its bzImage")
    (protocol,) = struct.unpack_from("<H", header, _PROTOCOL_AT)
    if protocol < _FIRST_PROTOCOL:
        raise UnknownFormat("is a bzImage older than Linux 2.6.26, which does not tell its payload")
    offset, length = struct.unpack_from("<II", header, _PAYLOAD_AT)
    # The boot protocol: 0 sectors stand for 4.
    offset += ((header[_SETUP_SECTORS_AT] or 4) + 1) * 512
    if offset + length > size or length < 8:
        raise Damaged(f"is cut off: its bzImage should have {offset + length} bytes and has {size}")
    return Payload(offset, length)


def unpack_kernel(read: Read, payload: Payload) -> Iterator[bytes]:
    """Yield the ELF packed in a bzImage, piece by piece; errors are as those of inspect_kernel."""
    magic = read(8, payload.offset)
    packing = next((entry for entry in _PACKED_WITH if magic.startswith(entry[0])), None)
    if packing is None:
        raise UnknownFormat("is packed in a way that is unknown: give its vmlinux instead")
    _, name, unpack = packing
    if unpack is None:
        raise UnknownFormat(
            f"is packed with {name}: gzip, xz, zstd and LZ4 can be read; give its vmlinux instead"
        )
    # All packers but gzip, whose own data ends so, are followed by the length of what they hold.
    (expected,) = struct.unpack("<I", read(4, payload.offset + payload.length - 4))
    packed = payload.length if unpack in (gunzip, iter) else payload.length - 4
    if unpack is iter:
        expected = packed
    if expected > MAXIMUM_ELF:
        raise Damaged(f"says that it unpacks to {expected} bytes, more than any kernel has")
    length = 0
    for piece in unpack(_pieces(read, payload.offset, packed)):
        if length == 0 and piece and not piece.startswith(_ELF_MAGIC):
            raise UnknownFormat("holds something packed that is no ELF: give its vmlinux instead")
        length += len(piece)
        if length > expected:
            break
        yield piece
    if length != expected:
        raise Damaged(f"does not unpack to the {expected} bytes that it says")


def _pieces(read: Read, offset: int, length: int) -> Iterator[bytes]:
    end = offset + length
    while offset < end and (piece := read(min(_PIECE, end - offset), offset)):
        yield piece
        offset += len(piece)


def _check_elf(read: Read, size: int) -> None:
    """Raise unless this is a whole ELF64 for x86-64."""
    header = read(64, 0)
    if len(header) < 64:
        raise Damaged("is cut off: it ends in its ELF header")
    (machine,) = struct.unpack_from("<H", header, 18)
    if header[4] != _ELF64 or machine != _X86_64:
        raise UnknownFormat("is an ELF file, but not a 64-bit one for x86-64")
    (table,) = struct.unpack_from("<Q", header, 32)
    entry, count = struct.unpack_from("<HH", header, 54)
    segments = read(entry * count, table) if entry >= 56 else b""
    if not segments or len(segments) < entry * count:
        raise Damaged("has no program headers in its ELF: it is cut off, or no kernel")
    for index in range(count):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", segments, index * entry)
        if kind == _INTERPRETER:
            raise UnknownFormat("is a program for Linux, no kernel")
        if kind == _LOAD and offset + length > size:
            raise Damaged(f"is cut off: it should have {offset + length} bytes and has {size}")
