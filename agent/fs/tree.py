"""Directories and files of the tree itself, which are root's and there as long as the mount."""

import stat
from dataclasses import dataclass

from .content import Content
from .context import Context
from .node import Directory, File, Handle
from .permissions import PLAIN_DIRECTORY, PUBLIC, Attributes, Opener


@dataclass(frozen=True, slots=True)
class TreeDirectory(Directory):
    """A directory that nobody writes to."""

    lasting = True
    context: Context

    async def attributes(self) -> Attributes:
        """Return that it is root's."""
        return self.shown()

    def shown(self) -> Attributes:
        """Return what `stat` shows."""
        return Attributes(stat.S_IFDIR | PLAIN_DIRECTORY, time=self.context.since)


@dataclass(frozen=True, slots=True)
class TreeFile(File):
    """A file that everybody may read."""

    context: Context

    def shown(self, size: int = 0) -> Attributes:
        """Return what `stat` shows of a file of `size` bytes."""
        return Attributes(stat.S_IFREG | PUBLIC, size=size, time=self.context.since)

    def for_group(self, mode: int, size: int = 0) -> Attributes:
        """Return the same of a file that belongs to the group."""
        gid, time = self.context.host.group, self.context.since
        return Attributes(stat.S_IFREG | mode, gid=gid, size=size, time=time)

    async def size(self) -> int:
        """Return how long the content is now, in bytes."""
        return len(await self.show())

    async def show(self) -> bytes:
        """Return the content."""
        raise NotImplementedError

    async def attributes(self) -> Attributes:
        """Return what `stat` shows."""
        return self.shown(await self.size())

    async def open(self, opener: Opener) -> Handle:
        """Return a handle that reads."""
        return Content(self.show)
