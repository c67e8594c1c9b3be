"""Long files that are copied out and in: archives of snapshots, base images."""

import errno
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from .context import Context
from .node import File, Handle, Refused
from .permissions import Attributes, Opener, ended_badly, file_of

if TYPE_CHECKING:
    from agent.lifecycle.importing import Import
    from agent.storage.archive import ArchiveView

BLOCK: Final = 1 << 20
"""The most that the kernel asks for or brings in one request."""


@dataclass(frozen=True, slots=True)
class ImportFile(File):
    """One on its way in, to the directory `where`."""

    context: Context
    where: str
    arriving: "Import[Any]"

    @property
    def path(self) -> str:
        """Where it is, relative to the mount."""
        return f"{self.where}/{self.arriving.file_name}"

    async def attributes(self) -> Attributes:
        """Return who is bringing it, and how much has arrived."""
        return arriving_attributes(self.arriving)

    async def open(self, opener: Opener) -> Handle:
        """Return a handle that takes more; nothing of it can be read yet."""
        if not opener.writes:
            raise Refused(errno.EACCES)
        return ImportHandle(self.context, opener, self.arriving)

    async def set_access(
        self, opener: Opener, uid: int | None, gid: int | None, mode: int | None
    ) -> None:
        """Change whose it will be."""
        self.arriving.set_access(uid, gid, mode)

    async def set_size(self, size: int) -> None:
        """Take the zeros at the end, which `cp` leaves out."""
        await self.arriving.set_size(size)


class ViewHandle(Handle):
    """One that is read."""

    def __init__(self, view: "ArchiveView") -> None:
        self._view = view

    async def read(self, offset: int, size: int) -> memoryview:
        """Return what is there."""
        return await self._view.pread(offset, size)

    async def release(self) -> None:
        """Let go of the files."""
        self._view.close()


class ImportHandle(Handle):
    """One that is written."""

    def __init__(self, context: Context, opener: Opener, arriving: "Import[Any]") -> None:
        self._context = context
        self._opener = opener
        self._arriving = arriving
        self._written = False
        arriving.opened()

    async def write(self, offset: int, data: bytes) -> int:
        """Take the next bytes; Refused(ESPIPE) for those before them."""
        if self._arriving.refusal is None and offset < self._arriving.size:
            # Who has brought nothing of it has nothing to complete.
            raise Refused(errno.ESPIPE)
        self._written = True
        if self._arriving.refusal is not None:
            raise self._arriving.refusal
        with self._context.host.reporting(self._opener.caller):
            await self._arriving.write(offset, data)
        return len(data)

    async def flush(self) -> None:
        """Publish what is whole; raise Damaged for what is not, once something was written."""
        if self._arriving.refusal is not None:
            raise self._arriving.refusal
        if self._written:
            with self._context.host.reporting(self._opener.caller):
                if self._arriving.ends_unmarked and ended_badly(self._opener.process):
                    # The kernel closes its files: that does not say that all was written.
                    self._arriving.abandon()
                await self._arriving.finish()

    async def release(self) -> None:
        """Throw away what nobody will complete."""
        await self._arriving.closed()


def arriving_attributes(arriving: "Import[Any]") -> Attributes:
    """Return the attributes of one on its way in."""
    attributes = file_of(arriving.access, True, arriving.size, arriving.began)
    return replace(attributes, block=BLOCK)
