"""Streams: files that wait for what happens next."""

import errno
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Final, Protocol

import trio

from .interrupt import Interrupts
from .node import Handle, Refused
from .permissions import Opener

NONBLOCK_PATIENCE: Final = 0.02
"""Seconds that a read with O_NONBLOCK takes to look whether there is something.

`poll` calls these files always ready, so this is also what keeps a program that polls and reads
from using a whole processor.
"""


class ByteStream(Protocol):
    """One live reader of a source."""

    async def read(self, size: int) -> bytes:
        """Return up to `size` bytes, waiting for the first; b"" when the source ended for good."""
        ...


class Stream(Handle):
    """An open stream: each read waits for something, and none has an offset."""

    streaming = True

    def __init__(
        self,
        source: AbstractAsyncContextManager[ByteStream],
        opener: Opener,
        interrupts: Interrupts,
    ) -> None:
        self._source = source
        self._opener = opener
        self._interrupts = interrupts
        self._stack = AsyncExitStack()
        self._reading = trio.Lock()
        self._stream: ByteStream | None = None

    async def begin(self) -> None:
        """Attach to the source: what it says from now on will be read."""
        self._stream = await self._stack.enter_async_context(self._source)

    async def read(self, offset: int, size: int) -> bytes:
        """Return what came, waiting for it; Refused(EAGAIN) instead when opened with O_NONBLOCK."""
        if self._stream is None:
            raise Refused(errno.EBADF)
        if self._opener.nonblock:
            with trio.move_on_after(NONBLOCK_PATIENCE):
                return await self._next(self._stream, size)
            raise Refused(errno.EAGAIN)
        with self._interrupts.ending(self._opener):
            return await self._next(self._stream, size)

    async def release(self) -> None:
        """Detach from the source."""
        self._stream = None
        await self._stack.aclose()

    async def _next(self, stream: ByteStream, size: int) -> bytes:
        async with self._reading:
            return await stream.read(size)
