"""FUSE requests as calls on nodes and handles."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final, NoReturn

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, RequestContext, SetattrFields, StatvfsData

from agent.model.access import AGENT, Caller
from agent.model.errors import Failed

from .context import Context
from .guard import Guarded
from .node import Directory, Entry, File, Handle, Link, Node, Refused
from .permissions import Attributes, Opener, opener_of
from .root import find_node, path_of

_BLOCK: Final = 4096
_SECTOR: Final = 512
_LONGEST_NAME: Final = 255
_NANOSECONDS: Final = 1_000_000_000
_PERMISSIONS: Final = 0o777
_LASTING: Final = 3600
"""Seconds for which the kernel need not ask about what never changes."""


class TreeOperations(Guarded):
    """What the kernel may ask for. Names and numbers in it are looked up anew each time."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.begun = trio.Event()
        self._context = context
        self._handles: dict[int, Handle] = {}
        self._listings: dict[int, Listing] = {}
        self._last = 0

    @property
    def open_files(self) -> int:
        """How many files and directories are open."""
        return len(self._handles) + len(self._listings)

    @property
    def waiting(self) -> int:
        """How many requests wait for an operation or a stream."""
        return len(self._context.interrupts)

    def on_fault(self, handler: str, error: BaseException) -> None:
        """Put a sentence where people look for it."""
        with contextlib.suppress(Exception), self._context.host.reporting(AGENT):
            raise Failed(f"the agent has a fault ({error!r}): see journalctl -u cocoon-host")

    def init(self) -> None:
        """Note that the kernel has begun to ask."""
        self.begun.set()

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Return the entry of that name."""
        return await _entry(self._directory(parent_inode).child(_known(name)))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Do nothing: inode numbers are computed, so none is kept."""

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """Return the attributes of that very inode."""
        return await _entry(find_node(self._context, inode), inode)

    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """Change owner, group, mode; times are what they are, so touch does nothing."""
        node = find_node(self._context, inode)
        uid = attr.st_uid if fields.update_uid else None
        gid = attr.st_gid if fields.update_gid else None
        mode = attr.st_mode & _PERMISSIONS if fields.update_mode else None
        if fields.update_size and isinstance(node, File):
            await node.set_size(attr.st_size)
        if (uid, gid, mode) != (None, None, None):
            if not isinstance(node, Directory | File):
                raise Refused(errno.EPERM)
            await node.set_access(self._opener(ctx, path_of(node)), uid, gid, mode)
        return await _entry(node, inode)

    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """Return where a link leads to."""
        node = find_node(self._context, inode)
        if not isinstance(node, Link):
            raise Refused(errno.EINVAL)
        return node.target.encode()

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        """Create an object; only a mode that was asked for, as by `mkdir -m`, counts."""
        parent, text = self._directory(parent_inode), _shown(name)
        usual = _PERMISSIONS & ~ctx.umask
        wanted = None if mode & _PERMISSIONS == usual else mode & _PERMISSIONS
        opener = self._opener(ctx, _below(parent, text))
        return await _entry(await parent.make_directory(opener, text, wanted))

    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Destroy an object."""
        parent, text = self._directory(parent_inode), _known(name)
        await parent.remove_directory(self._opener(ctx, _below(parent, text)), text)

    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove a file."""
        parent, text = self._directory(parent_inode), _known(name)
        await parent.unlink(self._opener(ctx, _below(parent, text)), text)

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        """Rename an object where it is; never EXDEV, upon which `mv` would copy and delete."""
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise Refused(errno.EINVAL)
        if parent_inode_old != parent_inode_new:
            raise Refused(errno.EPERM)
        parent, text = self._directory(parent_inode_old), _known(name_old)
        opener = self._opener(ctx, _below(parent, text))
        await parent.rename(opener, text, _shown(name_new))

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Make a file and open it; where objects are directories, files come and go with those."""
        parent, text = self._directory(parent_inode), _shown(name)
        opener = replace(self._opener(ctx, _below(parent, text)), writes=True)
        node, handle = await parent.create(opener, text)
        return self._opened(handle), await _entry(node)

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> NoReturn:
        """Refuse."""
        raise Refused(errno.EPERM)

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> NoReturn:
        """Refuse."""
        raise Refused(errno.EPERM)

    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> NoReturn:
        """Refuse."""
        raise Refused(errno.EPERM)

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file. `O_TRUNC` and `O_APPEND` change nothing: a write sets the value."""
        node = find_node(self._context, inode)
        if not isinstance(node, File):
            raise Refused(errno.EISDIR)
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        if writes or node.waits:
            opener = self._opener(ctx, path_of(node))
        else:
            opener = Opener(Caller(ctx.uid, ctx.gid, pid=ctx.pid), ctx.pid)
        nonblock = bool(flags & os.O_NONBLOCK)
        handle = await node.open(replace(opener, writes=writes, nonblock=nonblock))
        return self._opened(handle)

    # pyfuse3 takes any buffer, and each copy of a mebibyte counts.
    async def read(  # type: ignore[override]
        self, fh: int, off: int, size: int
    ) -> bytes | memoryview:
        """Return content, never more than asked for, which would end the mount."""
        data = await self._handle(fh).read(off, size)
        return data if len(data) <= size else data[:size]

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Act on what is written; how much of it was taken."""
        return await self._handle(fh).write(off, buf)

    async def flush(self, fh: int) -> None:
        """Act on what was written, where that had to wait for its end."""
        await self._handle(fh).flush()

    async def release(self, fh: int) -> None:
        """Let go of a file."""
        handle = self._handles.pop(fh, None)
        if handle is not None:
            await handle.release()

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Begin a listing."""
        number = self._next()
        self._listings[number] = Listing(self._directory(inode), inode)
        return number

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Return as much of a listing as fits."""
        self._listings[fh].reply(start_id, token)

    async def releasedir(self, fh: int) -> None:
        """End a listing."""
        self._listings.pop(fh, None)

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Return, as other filesystems that store nothing do, no blocks at all."""
        data = StatvfsData()
        data.f_bsize = data.f_frsize = _BLOCK
        data.f_namemax = _LONGEST_NAME
        return data

    def _directory(self, inode: int) -> Directory:
        node = find_node(self._context, inode)
        if not isinstance(node, Directory):
            raise Refused(errno.ENOTDIR)
        return node

    def _handle(self, fh: int) -> Handle:
        try:
            return self._handles[fh]
        except KeyError:
            raise Refused(errno.EBADF) from None

    def _opened(self, handle: Handle) -> FileInfo:
        number = self._next()
        self._handles[number] = handle
        return FileInfo(fh=number, direct_io=True, keep_cache=False, nonseekable=handle.streaming)

    def _next(self) -> int:
        self._last += 1
        return self._last

    @staticmethod
    def _opener(ctx: RequestContext, path: str) -> Opener:
        return opener_of(ctx.uid, ctx.gid, ctx.pid, path)


class Listing:
    """One reading of a directory, as it was when it began."""

    def __init__(self, directory: Directory, inode: int) -> None:
        self._directory = directory
        self._inode = inode
        self._entries: Iterator[Entry] = iter(())
        self._pending: Entry | None = None
        self._position = -1

    def reply(self, start: int, token: pyfuse3.ReaddirToken) -> None:
        """Put entries from the `start`th on into the reply, as many as fit."""
        if start == 0 or start != self._position:
            self._entries = self._all()
            self._position, self._pending = 0, None
            while self._position < start and next(self._entries, None):
                self._position += 1
        # The kernel copies it with each entry, and asks again before it uses what is in it.
        reply = EntryAttributes()
        last: Attributes | None = None
        while entry := self._pending or next(self._entries, None):
            if entry.attributes is not last:
                last = entry.attributes
                _fill(reply, last)
            reply.st_ino = entry.number
            if not pyfuse3.readdir_reply(token, entry.name.encode(), reply, self._position + 1):
                self._pending = entry
                return
            self._pending = None
            self._position += 1

    def _all(self) -> Iterator[Entry]:
        this = Attributes(stat.S_IFDIR)
        yield Entry(".", self._inode, this)
        yield Entry("..", pyfuse3.ROOT_INODE, this)
        yield from self._directory.entries()


async def _entry(node: Node, inode: int = 0) -> EntryAttributes:
    """Return a node's attributes, as those of the inode that the kernel asked about, if any."""
    entry = EntryAttributes()
    entry.st_ino = inode or node.place.number
    _fill(entry, await node.attributes())
    if node.lasting:
        entry.entry_timeout = entry.attr_timeout = _LASTING
    return entry


def _fill(entry: EntryAttributes, attributes: Attributes) -> None:
    # VMs come and go, and change by themselves: the kernel must ask each time.
    entry.entry_timeout = entry.attr_timeout = 0
    entry.st_mode = attributes.mode
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_size = attributes.size
    entry.st_blocks = -(-attributes.size // _SECTOR)
    entry.st_blksize = attributes.block
    entry.st_nlink = 1
    entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = int(attributes.time * _NANOSECONDS)


def _below(parent: Directory, name: str) -> str:
    return f"{path_of(parent)}/{name}".lstrip("/")


def _known(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise Refused(errno.ENOENT) from None


def _shown(name: bytes) -> str:
    return name.decode(errors="replace")
