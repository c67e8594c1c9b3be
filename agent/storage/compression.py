"""Tells gzip and zstd from plain archives by their first bytes, and unpacks them piece by piece.

Without I/O, and in bounded memory, however much a piece unpacks to. zstd is done by libzstd itself,
which every Debian host has. The module `zstandard` would have to be installed, and unpacks what it
is given without a bound; the program, a child process behind two pipes, would need a thread and
could die half-way.
"""

import ctypes
import weakref
import zlib
from collections.abc import Iterator
from typing import Protocol

from agent.model.errors import Damaged
from agent.model.size import MIB

from .codecs import ZstdBuffer, libzstd

MAGIC_LENGTH = 4
_OUTPUT = MIB
_GZIP_MAGIC = b"\x1f\x8b"  # RFC 1952, 2.3.1
_ZSTD_MAGIC = (0xFD2FB528).to_bytes(4, "little")  # RFC 8878, 3.1.1
_SKIPPABLE_MAGIC = range(0x184D2A50, 0x184D2A60)  # RFC 8878, 3.1.2


class Unpacker(Protocol):
    """Turns the stream that arrives into the tar stream."""

    def feed(self, data: memoryview) -> Iterator[bytes | memoryview]:
        """Yield what `data` unpacks to, each part valid until the next; raise Damaged."""
        ...

    @property
    def complete(self) -> bool:
        """Whether the stream may end here."""
        ...


def choose(first: bytes) -> Unpacker:
    """Return the unpacker for a stream that begins with `first`, `MAGIC_LENGTH` bytes.

    Raises Unsupported for zstd where libzstd is not installed.
    """
    if first.startswith(_GZIP_MAGIC):
        return Gzip()
    if first == _ZSTD_MAGIC or int.from_bytes(first, "little") in _SKIPPABLE_MAGIC:
        return Zstd()
    return Plain()


class Plain:
    """A stream that is not compressed."""

    complete = True

    def feed(self, data: memoryview) -> Iterator[bytes | memoryview]:
        yield data


class Gzip:
    """One or more gzip members, and zeros behind them, which gzip ignores too."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(16 + zlib.MAX_WBITS)
        self._between = False
        self._padded = False

    @property
    def complete(self) -> bool:
        return self._between

    def feed(self, data: memoryview) -> Iterator[bytes | memoryview]:
        rest: bytes | memoryview = data
        while len(rest):
            if self._between:
                if self._padded or not rest[0]:
                    self._padded = True
                    if bytes(rest).strip(b"\0"):
                        raise Damaged("the archive has data behind the end of its gzip stream")
                    return
                self._member = zlib.decompressobj(16 + zlib.MAX_WBITS)
                self._between = False
            yield from self._inflate(rest)
            self._between = self._member.eof
            rest = self._member.unused_data

    def _inflate(self, data: bytes | memoryview) -> Iterator[bytes]:
        while True:
            try:
                unpacked = self._member.decompress(data, _OUTPUT)
            except zlib.error as error:
                raise Damaged(f"the archive's gzip stream is damaged: {error}") from None
            if unpacked:
                yield unpacked
            data = self._member.unconsumed_tail
            if self._member.eof or (not data and len(unpacked) < _OUTPUT):
                return


class Zstd:
    """One or more zstd frames, skippable ones among them."""

    def __init__(self) -> None:
        self._library = libzstd()
        self._stream = self._library.ZSTD_createDStream()
        if not self._stream:
            raise MemoryError
        weakref.finalize(self, self._library.ZSTD_freeDStream, self._stream)
        self._output = ctypes.create_string_buffer(_OUTPUT)
        self._left = 1  # 0 at the end of a frame (zstd.h, ZSTD_decompressStream)

    @property
    def complete(self) -> bool:
        return self._left == 0

    def feed(self, data: memoryview) -> Iterator[memoryview]:
        raw = bytes(data)
        given = ZstdBuffer(ctypes.cast(ctypes.c_char_p(raw), ctypes.c_void_p), len(raw), 0)
        while True:
            room = ZstdBuffer(ctypes.cast(self._output, ctypes.c_void_p), _OUTPUT, 0)
            self._left = self._library.ZSTD_decompressStream(
                self._stream, ctypes.byref(room), ctypes.byref(given)
            )
            if self._library.ZSTD_isError(self._left):
                reason = self._library.ZSTD_getErrorName(self._left).decode()
                raise Damaged(f"the archive's zstd stream is damaged: {reason}")
            if room.position:
                yield memoryview(self._output).cast("B")[: room.position]
            if given.position == given.size and (not self._left or room.position < room.size):
                return
