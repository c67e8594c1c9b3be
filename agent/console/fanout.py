"""One writer, any number of readers: the live streams.

The data is kept once, for all readers, and each reader is a position in it: 500 readers that wait
cost 500 small objects. What all have read is let go; a reader that falls behind the limit loses the
oldest of what it has not read, and the others notice nothing.
"""

from collections.abc import Callable
from typing import Final, Protocol

import trio

LIMIT: Final = 256 * 1024
"""Bytes that are kept for readers who have not read them yet."""
_TRIM: Final = 16 * 1024


class History(Protocol):
    """What a stream shows before its live part."""

    async def read(self, size: int) -> bytes:
        """Return the next bytes, b"" at the end."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


class Fanout:
    """What one source says, to all who listen.

    `overflow` makes the line that tells a reader how many bytes it lost; with it, the data is
    lines, published whole, and the reader goes on at the start of one. Without, it just goes on.
    """

    __slots__ = ("_base", "_buffer", "_closed", "_limit", "_overflow", "_readers", "_waiting")

    def __init__(
        self, *, limit: int = LIMIT, overflow: Callable[[int], bytes] | None = None
    ) -> None:
        self._limit = limit
        self._overflow = overflow
        self._buffer = bytearray()
        self._base = 0  # stream position of the buffer's first byte
        self._readers: set[ByteStream] = set()
        self._waiting = trio.lowlevel.ParkingLot()
        self._closed = False

    @property
    def readers(self) -> int:
        """How many streams are open."""
        return len(self._readers)

    def subscribe(self, history: History | None = None) -> "ByteStream":
        """Return a stream of `history`, if any, and what is published from now on; close it."""
        return ByteStream(self, history)

    def publish(self, data: bytes) -> None:
        """Give `data` to every reader; waits for none."""
        if not self._readers or self._closed:
            self._base += len(data)
            return
        self._buffer += data
        if len(self._buffer) >= _TRIM:
            self._trim()
        self._waiting.unpark_all()

    def close(self) -> None:
        """End every stream, and those to come, after what is there."""
        self._closed = True
        self._waiting.unpark_all()

    @property
    def _end(self) -> int:
        return self._base + len(self._buffer)

    def _trim(self) -> None:
        slowest = min((reader._position for reader in self._readers), default=self._end)
        start = max(slowest, self._end - self._limit)
        if start > self._base:
            del self._buffer[: start - self._base]
            self._base = start


class ByteStream:
    """One reader of a Fanout. Leave it with `close`, or use it in an `async with` statement."""

    __slots__ = (
        "_ended",
        "_fanout",
        "_history",
        "_inside_line",
        "_parked",
        "_pending",
        "_position",
    )

    def __init__(self, fanout: Fanout, history: History | None) -> None:
        self._fanout = fanout
        self._history = history
        self._position = fanout._end
        self._pending = b""
        self._inside_line = False
        self._parked = 0
        self._ended = False
        fanout._readers.add(self)

    async def __aenter__(self) -> "ByteStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def read(self, size: int) -> bytes:
        """Return up to `size` bytes, waiting for the first; b"" when the source has ended for good.

        Cancelling it loses nothing: the next call returns what this one would have.
        """
        if self._history is not None:
            history = self._history
            data = await history.read(size)
            if data:
                return self._deliver(data)
            history.close()
            self._history = None
        await trio.lowlevel.checkpoint()
        while True:
            data = self._take(size)
            if data or self._ended or self._fanout._closed:
                return data
            self._parked += 1
            try:
                await self._fanout._waiting.park()
            finally:
                self._parked -= 1

    def end(self) -> None:
        """Let the reader have what is there, then end this stream."""
        self._ended = True
        self._wake()

    def close(self) -> None:
        """Give up the stream; a read that waits in it returns b""."""
        self._ended = True
        if self._history is not None:
            self._history.close()
            self._history = None
        self._position = self._fanout._end
        self._pending = b""
        self._fanout._readers.discard(self)
        self._fanout._trim()
        self._wake()

    def _wake(self) -> None:
        # All who wait share one lot; waking them for nothing is dear when there are many.
        if self._parked:
            self._fanout._waiting.unpark_all()

    def _take(self, size: int) -> bytes:
        fanout = self._fanout
        if self._position < fanout._base:
            self._skip_lost()
        if self._pending:
            data, self._pending = self._pending[:size], self._pending[size:]
            return self._deliver(data)
        start = self._position - fanout._base
        data = bytes(fanout._buffer[start : start + size])
        self._position += len(data)
        return self._deliver(data)

    def _skip_lost(self) -> None:
        """Go to the oldest byte there is; with an overflow line, to the oldest whole line."""
        fanout = self._fanout
        position = fanout._base
        if fanout._overflow is not None:
            newline = fanout._buffer.find(b"\n")
            position = fanout._base + newline + 1 if newline >= 0 else fanout._end
            if not self._pending:
                line = fanout._overflow(position - self._position)
                # A reader that had half a line must not find the notice glued to it.
                self._pending = b"\n" + line if self._inside_line else line
        self._position = position

    def _deliver(self, data: bytes) -> bytes:
        if data:
            self._inside_line = not data.endswith(b"\n")
        return data
