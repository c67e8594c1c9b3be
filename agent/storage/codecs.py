"""Decompresses streams piece by piece: gzip, xz, zstd and the legacy LZ4 frame.

Sentences of errors are to follow the name of what holds the stream.

The first two are Python's. For the others, Python packages exist, but every Debian host has the C
libraries already (apt and systemd need them): they are called directly, so that nothing has to be
installed for a kernel to boot. Their calls let other threads run meanwhile.
"""

import ctypes
import lzma
import struct
import zlib
from collections.abc import Iterable, Iterator
from functools import cache

from agent.model.errors import Damaged, Unsupported

_PIECE = 1 << 20
_XZ_MEMORY = 256 << 20  # kernels are packed with a dictionary of 32 MiB at most
# lz4, doc/lz4_Frame_format.md, "Legacy frame": a magic number, then blocks of up to 8 MiB.
_LZ4_LEGACY_MAGIC = 0x184C2102
_LZ4_LEGACY_BLOCK = 8 << 20


def gunzip(source: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what one gzip member holds; raise Damaged when it is broken or ends early."""
    inner = zlib.decompressobj(wbits=31)
    try:
        for data in source:
            if not inner.eof:
                yield inner.decompress(data, _PIECE)
            while inner.unconsumed_tail and not inner.eof:
                yield inner.decompress(inner.unconsumed_tail, _PIECE)
    except zlib.error as error:
        raise Damaged(f"has damaged gzip data: {error}") from None
    if not inner.eof:
        raise Damaged("has gzip data that ends early")


def unxz(source: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what one xz stream holds; raise Damaged when it is broken or ends early."""
    inner = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
    try:
        for data in source:
            if not inner.eof:
                yield inner.decompress(data, _PIECE)
            while not inner.eof and not inner.needs_input:
                yield inner.decompress(b"", _PIECE)
    except lzma.LZMAError as error:
        raise Damaged(f"has damaged xz data: {error}") from None
    if not inner.eof:
        raise Damaged("has xz data that ends early")


def unzstd(source: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what one zstd frame holds; raise Damaged when it is broken or ends early."""
    library = libzstd()
    stream = library.ZSTD_createDStream()
    if not stream:
        raise MemoryError
    target = ctypes.create_string_buffer(int(library.ZSTD_DStreamOutSize()))
    left = 1  # ZSTD_decompressStream returns 0 at the end of a frame
    try:
        for data in source:
            given = ZstdBuffer(ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p), len(data), 0)
            flushed = False
            while left and (given.position < given.size or not flushed):
                room = ZstdBuffer(ctypes.cast(target, ctypes.c_void_p), len(target), 0)
                left = library.ZSTD_decompressStream(
                    stream, ctypes.byref(room), ctypes.byref(given)
                )
                if library.ZSTD_isError(left):
                    reason = library.ZSTD_getErrorName(left).decode()
                    raise Damaged(f"has damaged zstd data: {reason}")
                flushed = room.position < room.size
                yield ctypes.string_at(target, room.position)
    finally:
        library.ZSTD_freeDStream(stream)
    if left:
        raise Damaged("has zstd data that ends early")


def unlz4_legacy(source: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what one legacy LZ4 frame holds; raise Damaged when it is broken or ends early."""
    library = _liblz4()
    target = ctypes.create_string_buffer(_LZ4_LEGACY_BLOCK)
    bound = int(library.LZ4_compressBound(_LZ4_LEGACY_BLOCK))
    pieces = _Reader(source)
    if _number(pieces.read(4)) != _LZ4_LEGACY_MAGIC:
        raise Damaged("has LZ4 data that does not start as a legacy frame")
    while head := pieces.read(4):
        size = _number(head)
        block = pieces.read(size) if size <= bound else b""
        if size == 0 or len(block) < size:
            raise Damaged("has LZ4 data that ends early or is damaged")
        length = library.LZ4_decompress_safe(block, target, size, _LZ4_LEGACY_BLOCK)
        if length < 0:
            raise Damaged("has damaged LZ4 data")
        yield ctypes.string_at(target, length)


class _Reader:
    """Hands out exact numbers of bytes of a stream of pieces."""

    def __init__(self, source: Iterable[bytes]) -> None:
        self._source = iter(source)
        self._held = bytearray()

    def read(self, size: int) -> bytes:
        """Return `size` bytes, or what is left when the stream ends before."""
        while len(self._held) < size and (piece := next(self._source, b"")):
            self._held += piece
        data = bytes(self._held[:size])
        del self._held[:size]
        return data


class ZstdBuffer(ctypes.Structure):
    """ZSTD_inBuffer and ZSTD_outBuffer of zstd.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("position", ctypes.c_size_t),
    )


def _number(data: bytes) -> int:
    if len(data) < 4:
        raise Damaged("has LZ4 data that ends early")
    (number,) = struct.unpack("<I", data)
    return int(number)


@cache
def libzstd() -> ctypes.CDLL:
    library = _load("libzstd.so.1", "libzstd1")
    library.ZSTD_createDStream.restype = ctypes.c_void_p
    library.ZSTD_freeDStream.argtypes = [ctypes.c_void_p]
    library.ZSTD_DStreamOutSize.restype = ctypes.c_size_t
    library.ZSTD_decompressStream.argtypes = [ctypes.c_void_p] * 3
    library.ZSTD_decompressStream.restype = ctypes.c_size_t
    library.ZSTD_isError.argtypes = [ctypes.c_size_t]
    library.ZSTD_getErrorName.argtypes = [ctypes.c_size_t]
    library.ZSTD_getErrorName.restype = ctypes.c_char_p
    return library


@cache
def _liblz4() -> ctypes.CDLL:
    library = _load("liblz4.so.1", "liblz4-1")
    library.LZ4_decompress_safe.argtypes = [
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_int,
    ]
    return library


def _load(name: str, package: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(name)
    except OSError:
        raise Unsupported(f"{name} is missing on this host: install {package}") from None
