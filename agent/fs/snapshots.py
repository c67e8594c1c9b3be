"""`snapshots/`: archives to copy out and in, and what is known of each."""

import errno
import functools
import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from agent.model.errors import Exists, Invalid
from agent.model.names import check_name, is_name
from agent.model.snapshot import Snapshot

from .arriving import BLOCK, ImportFile, ImportHandle, ViewHandle, arriving_attributes
from .content import Document, object_of
from .context import Context
from .node import Entry, File, Handle, Link, Node, Place, Refused
from .permissions import MEMBERS_DIRECTORY, Attributes, Opener, file_of
from .tree import TreeDirectory

ARCHIVE_SLOT: Final = 1
DESCRIPTION_SLOT: Final = 2
LINK_SLOT: Final = 3

WHERE: Final = "snapshots"
ARCHIVE: Final = ".tar"
DESCRIPTION: Final = ".json"


class SnapshotsDirectory(TreeDirectory):
    """`snapshots`: an archive copied into it is imported."""

    lasting = False

    def shown(self) -> Attributes:
        """Return that members of the group may write to it."""
        mode = stat.S_IFDIR | MEMBERS_DIRECTORY
        return Attributes(mode, gid=self.context.host.group, time=self.context.since)

    def child(self, name: str) -> Node:
        """Return the archive or description of that name, or an archive on its way in."""
        shelf = self.context.host.snapshots
        arriving = shelf.find_import(name)
        if arriving is not None:
            return ImportFile(
                _place(self.context, arriving.id, ARCHIVE_SLOT), self.context, WHERE, arriving
            )
        stem, suffix = _split(name)
        snapshot = shelf.find(stem)
        if snapshot is None:
            raise Refused(errno.ENOENT)
        kind = ArchiveFile if suffix == ARCHIVE else DescriptionFile
        slot = ARCHIVE_SLOT if suffix == ARCHIVE else DESCRIPTION_SLOT
        return kind(_place(self.context, snapshot.id, slot), self.context, snapshot.id)

    def entries(self) -> Iterator[Entry]:
        """Return two files for each snapshot, and archives on their way in."""
        for snapshot in self.context.host.snapshots.all():
            archive = _place(self.context, snapshot.id, ARCHIVE_SLOT)
            yield Entry(f"{snapshot.name}{ARCHIVE}", archive.number, _archive_attributes(snapshot))
            description = _place(self.context, snapshot.id, DESCRIPTION_SLOT)
            attributes = file_of(snapshot.access, True, 0, snapshot.mtime)
            yield Entry(f"{snapshot.name}{DESCRIPTION}", description.number, attributes)
        for arriving in self.context.host.snapshots.imports():
            place = _place(self.context, arriving.id, ARCHIVE_SLOT)
            yield Entry(arriving.file_name, place.number, arriving_attributes(arriving))

    async def unlink(self, opener: Opener, name: str) -> None:
        """Remove a snapshot, or what has arrived of one."""
        shelf = self.context.host.snapshots
        arriving = shelf.find_import(name)
        if arriving is not None:
            await arriving.discard()
            if shelf.get(arriving.id) is None:
                return
            # The last of it came first: it is a snapshot now.
        stem, suffix = _split(name)
        snapshot = shelf.find(stem)
        if snapshot is None:
            raise Refused(errno.ENOENT)
        if suffix != ARCHIVE:
            raise Refused(errno.EPERM)
        await self.context.finish(opener, shelf.remove(opener.caller, snapshot.id))

    async def rename(self, opener: Opener, old: str, new: str) -> None:
        """Rename a snapshot, or let an archive that has arrived be one."""
        host = self.context.host
        arriving = host.snapshots.find_import(old)
        with host.reporting(opener.caller):
            stem = new.removesuffix(ARCHIVE)
            if stem == new:
                raise Invalid(f"{new[:80]} is not the name of an archive: end it in {ARCHIVE}")
            check_name(stem)
        if arriving is not None:
            with host.reporting(opener.caller):
                await arriving.rename(new)
            return
        old_stem, suffix = _split(old)
        snapshot = host.snapshots.find(old_stem)
        if snapshot is None:
            raise Refused(errno.ENOENT)
        if suffix != ARCHIVE:
            raise Refused(errno.EPERM)
        operation = host.snapshots.rename(opener.caller, snapshot.id, stem)
        await self.context.finish(opener, operation)

    async def create(self, opener: Opener, name: str) -> tuple[File, Handle]:
        """Begin an import."""
        host = self.context.host
        with host.reporting(opener.caller):
            arriving = await host.snapshots.begin_import(opener.caller, name)
        place = _place(self.context, arriving.id, ARCHIVE_SLOT)
        node = ImportFile(place, self.context, WHERE, arriving)
        return node, ImportHandle(self.context, opener, arriving)


@dataclass(frozen=True, slots=True)
class SnapshotFile(File):
    """A file of a snapshot; it is no more when the snapshot is gone."""

    context: Context
    snapshot_id: str

    @property
    def file_name(self) -> str:
        """Its name in the directory."""
        raise NotImplementedError

    @property
    def snapshot(self) -> Snapshot:
        """The record as it is now."""
        snapshot = self.context.host.snapshots.get(self.snapshot_id)
        if snapshot is None:
            raise Refused(errno.ENOENT)
        return snapshot

    async def set_access(
        self, opener: Opener, uid: int | None, gid: int | None, mode: int | None
    ) -> None:
        """Delegate the snapshot."""
        shelf = self.context.host.snapshots
        operation = shelf.set_access(opener.caller, self.snapshot_id, uid, gid, mode)
        await self.context.finish(opener, operation)


class ArchiveFile(SnapshotFile):
    """`<name>.tar`: a complete snapshot, as an archive that is made up as it is read."""

    @property
    def file_name(self) -> str:
        """Its name in the directory."""
        return f"{self.snapshot.name}{ARCHIVE}"

    async def attributes(self) -> Attributes:
        """Return owner, group and mode of the snapshot, and the exact size."""
        return _archive_attributes(self.snapshot)

    async def open(self, opener: Opener) -> Handle:
        """Return a reader of the archive as it is now; nobody writes to one."""
        host = self.context.host
        if opener.writes:
            with host.reporting(opener.caller):
                raise Exists(
                    f"there is a snapshot {self.snapshot.name} already: choose another name or "
                    "remove that one"
                )
        with host.reporting(opener.caller):
            return ViewHandle(await host.snapshots.open_archive(self.snapshot_id))


class DescriptionFile(SnapshotFile):
    """`<name>.json`: what is known of a snapshot."""

    @property
    def file_name(self) -> str:
        """Its name in the directory."""
        return f"{self.snapshot.name}{DESCRIPTION}"

    async def attributes(self) -> Attributes:
        """Return owner, group and mode of the snapshot, and the exact size."""
        snapshot = self.snapshot
        return file_of(snapshot.access, True, len(await self.show()), snapshot.mtime)

    async def show(self) -> bytes:
        """Return what is known."""
        document = self.context.host.snapshots.describe(self.snapshot)
        return f"{json.dumps(document, indent=2, ensure_ascii=False)}\n".encode()

    async def open(self, opener: Opener) -> Handle:
        """Return a handle that takes a description."""
        host = self.context.host

        async def store(data: bytes) -> None:
            with host.reporting(opener.caller):
                changes = object_of(data)
            operation = host.snapshots.configure(opener.caller, self.snapshot_id, changes)
            await self.context.finish(opener, operation)

        return Document(self.show, store, functools.partial(host.reporting, opener.caller))


def snapshot_node(context: Context, object_id: str, place: Place) -> Node:
    """Return the node of a snapshot that stands at `place`; raise Refused(ENOENT) for none."""
    shelf = context.host.snapshots
    snapshot = shelf.get(object_id)
    if snapshot is None:
        for arriving in shelf.imports():
            if arriving.id == object_id and place.slot == ARCHIVE_SLOT:
                return ImportFile(place, context, WHERE, arriving)
        raise Refused(errno.ENOENT)
    match place.slot:
        case 1:
            return ArchiveFile(place, context, object_id)
        case 2:
            return DescriptionFile(place, context, object_id)
        case 3:
            return snapshot_link(context, snapshot)
    raise Refused(errno.ENOENT)


def snapshot_link(context: Context, snapshot: Snapshot) -> Link:
    """Return the link to a snapshot's archive in the directory of the VM it was taken of."""
    place = _place(context, snapshot.id, LINK_SLOT)
    return Link(place, f"../../../snapshots/{snapshot.name}{ARCHIVE}", snapshot.created_at)


def _place(context: Context, object_id: str, slot: int) -> Place:
    return Place(context.objects.number(object_id), slot)


def _split(name: str) -> tuple[str, str]:
    for suffix in (ARCHIVE, DESCRIPTION):
        stem = name.removesuffix(suffix)
        if stem != name and is_name(stem):
            return stem, suffix
    raise Refused(errno.ENOENT)


def _archive_attributes(snapshot: Snapshot) -> Attributes:
    attributes = file_of(snapshot.access, False, snapshot.archive_size, snapshot.mtime)
    return replace(attributes, block=BLOCK)
