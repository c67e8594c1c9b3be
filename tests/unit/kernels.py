"""Makes files of the shape of kernels: an ELF, and bzImages that have it packed in every way."""

import bz2
import gzip
import lzma
import random
import struct
import subprocess

EXECUTABLE, X86_64, LOAD, INTERPRETER = 2, 62, 1, 3


def make_elf(size=300_000, *, machine=X86_64, wide=2, segment=LOAD, seed=1):
    """An ELF with one segment, which ends with the file."""
    noise = random.Random(seed)
    ident = b"\x7fELF" + bytes([wide, 1, 1]) + bytes(9)
    header = ident + struct.pack(
        "<HHIQQQIHHHHHH", EXECUTABLE, machine, 1, 0x1000000, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    start = len(header) + 56
    entry = struct.pack("<IIQQQQQQ", segment, 5, start, 0x1000000, 0x1000000, size, size, 4096)
    body = noise.randbytes(size // 3) + bytes(size // 3)
    return header + entry + body + noise.randbytes(size - len(body))


def _piped(*command):
    return lambda data: subprocess.run(command, input=data, capture_output=True, check=True).stdout


# The formats are those of Linux's scripts/Makefile.lib; each but gzip's is followed by the length.
PACKERS = {
    "gzip": gzip.compress,
    "xz": _piped("xz", "--check=crc32", "--x86", "--lzma2=preset=1,dict=32MiB"),
    "zstd": _piped("zstd", "--long=27", "--stdout"),
    "lz4": _piped("lz4", "-l", "-9", "--stdout", "-"),
}
REFUSED = {
    "bzip2": bz2.compress,
    "LZMA": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "LZO": lambda data: b"\x89LZO\x00\r\n\x1a\n" + data,
}


def make_payload(packing, elf, length=None):
    """What a bzImage has of the ELF; `length` is what it says the ELF has."""
    if packing == "none":
        return elf
    packed = (PACKERS | REFUSED)[packing](elf)
    if packing == "gzip" and length is None:
        return packed
    return packed + struct.pack("<I", len(elf) if length is None else length)


def make_bzimage(payload, *, sectors=1, protocol=0x20F):
    """A bzImage around a payload, with some bytes of unpacking code before and after it."""
    code = b"\x90" * 0x300
    header = bytearray(((sectors or 4) + 1) * 512)
    header[0x1F1] = sectors
    header[0x1FE:0x200] = b"\x55\xaa"
    header[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", header, 0x206, protocol)
    struct.pack_into("<II", header, 0x248, len(code), len(payload))
    return bytes(header) + code + payload + code
