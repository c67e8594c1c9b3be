"""Archives on their way in: from the first byte until they are snapshots or thrown away.

Nothing is recorded before an archive is whole: what stands in staging when an agent starts has been
left by one that died, and goes.
"""

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

import trio

from agent.model.access import Access, Caller
from agent.model.errors import CocoonError, Exists, Invalid, Unsupported
from agent.model.names import check_name, is_name, new_id
from agent.model.size import MIB
from agent.model.snapshot import Snapshot, SnapshotState
from agent.storage.importer import ImportSink
from agent.storage.snapshots import STATE

from . import library
from .services import Services
from .steps import step

T = TypeVar("T")

_GATHER = MIB
_EVENTS_APART = 1.0  # seconds
_SUFFIX = ".tar"
_TEMPORARY = re.compile(r"\.(.+)\.tar\..+")  # rsync's, before it renames


class Imports:
    """All archives on their way in, by the names of their files."""

    def __init__(self, services: Services, group: int) -> None:
        self._services = services
        self._group = group
        self._arriving: dict[str, Import] = {}

    def all(self) -> list["Import"]:
        """Return all, in no order."""
        return list(self._arriving.values())

    def find(self, file_name: str) -> "Import | None":
        """Return the one whose file has that name."""
        return self._arriving.get(file_name)

    async def begin(self, caller: Caller, file_name: str) -> "Import":
        """Begin an import; raise Exists for a name taken, Invalid for one that is none."""
        name = _name_of(file_name)
        if file_name in self._arriving:
            raise Exists(f"{file_name} is on its way in already")
        if name:
            library.check_free(self._services, name)
        access = Access(caller.uid, self._group)
        arriving = Import(self._services, self._arriving, access, file_name)
        self._arriving[file_name] = arriving
        if name:
            self._services.reserved.add(name)
        try:
            await arriving.begin()
        except BaseException:
            await arriving.discard()
            raise
        return arriving


class Import:
    """One archive on its way in. Calls wait for each other; `size` is how much has arrived."""

    def __init__(
        self, services: Services, among: dict[str, "Import"], access: Access, file_name: str
    ) -> None:
        self.id = new_id()
        self.file_name = file_name
        self.access = access
        self.began = time.time()
        self.size = 0
        self.refusal: CocoonError | None = None
        self._services = services
        self._among = among
        self._handles = 0
        self._staging = -1
        self._sink: ImportSink | None = None
        self._pending = bytearray()
        self._turn = trio.Lock()
        self._fed = trio.Event()
        self._fed.set()
        self._draft: Snapshot | None = None
        self._is_over = False
        self._told = 0.0
        self._members: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name that the snapshot will have, "" while the file is rsync's temporary one."""
        return _name_of(self.file_name)

    async def begin(self) -> None:
        """Make the staging directory."""
        store = self._services.snapshots

        def make() -> int:
            store.begin(self.id)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(store.staging(self.id), flags)

        self._staging = await self._services.tree.in_thread("beginning an import", make)
        self._sink = ImportSink(self._staging)
        step("import:begun")

    def opened(self) -> None:
        """Note that one more has the file open."""
        self._handles += 1

    async def closed(self) -> None:
        """Note that one has closed it; what nobody will complete is thrown away."""
        self._handles -= 1
        if not self._handles and self._draft is None:
            await self.discard()

    def set_access(self, uid: int | None, gid: int | None, mode: int | None) -> None:
        """Change whose the snapshot will be."""
        self.access = library.changed_access(self.access, uid, gid, mode)

    async def write(self, offset: int, data: bytes) -> None:
        """Take the next bytes; what lies between them and the last ones is zeros."""
        async with self._turn:
            await self._skip_to(offset)
            self._check_open()
            self._pending += data
            self.size += len(data)
            if self.size == len(data):
                # The first bytes at once: they tell what it is.
                await self._feed()
            elif len(self._pending) >= _GATHER:
                await self._fed.wait()
                self._check_open()
                self._fed = trio.Event()
                pending, self._pending = self._pending, bytearray()
                self._services.background.start_soon(self._feed_meanwhile, pending)

    async def set_size(self, size: int) -> None:
        """Take zeros up to `size` bytes; raise Invalid when more has arrived."""
        async with self._turn:
            if size < self.size:
                raise Invalid(f"{self.file_name} cannot be cut off: its start is unpacked already")
            await self._skip_to(size)

    async def finish(self) -> None:
        """Let a whole archive be a snapshot; raise Damaged for one that is not whole yet."""
        async with self._turn:
            if self._is_over or self._draft is not None:
                return
            self._check_open()
            await self._feed()
            sink = self._sink
            assert sink is not None
            self._draft = await self._in_thread("finishing an import", self._finish, sink)
            step("import:whole")
            if self.name:
                await self._publish()

    async def rename(self, file_name: str) -> None:
        """Give the file another name; publish it when it is whole and the name is a snapshot's."""
        async with self._turn:
            name = _name_of(file_name)
            if name and name != self.name:
                library.check_free(self._services, name)
            self.forget()
            self.file_name = file_name
            self._among[file_name] = self
            if name:
                self._services.reserved.add(name)
            if self._draft is not None and name:
                try:
                    await self._publish()
                except CocoonError:
                    if not self._handles:  # nobody will close it
                        await self._throw_away()
                    raise

    async def discard(self) -> None:
        """Throw away what has arrived; harmless when it is a snapshot already."""
        with trio.CancelScope(shield=True):
            async with self._turn:
                await self._throw_away()

    def forget(self) -> None:
        """Give the name free."""
        self._among.pop(self.file_name, None)
        self._services.reserved.discard(self.name)

    async def _throw_away(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        self.forget()
        with trio.CancelScope(shield=True):
            await self._fed.wait()
            await self._services.tree.in_thread("ending an import", self._remove)
        if self._told:
            self._services.events.happened("REMOVED", self._provisional("import-failed"))

    async def _skip_to(self, offset: int) -> None:
        if offset <= self.size:
            return
        self._check_open()
        await self._feed()
        sink = self._sink
        assert sink is not None
        await self._in_thread("importing", sink.skip, offset - self.size)
        self.size = offset

    def _check_open(self) -> None:
        if self.refusal is not None:
            raise self.refusal
        if self._is_over or self._draft is not None:
            raise Invalid(f"the archive {self.file_name} was complete: nothing may follow it")

    async def _feed(self) -> None:
        """Unpack all that has arrived."""
        await self._fed.wait()
        self._check_open()
        if self._pending:
            data, self._pending = self._pending, bytearray()
            await self._unpack(data)

    async def _feed_meanwhile(self, data: bytearray) -> None:
        """Unpack `data` while the next bytes arrive; a refusal is for whoever brings those."""
        try:
            with contextlib.suppress(CocoonError):
                await self._unpack(data)
        finally:
            self._fed.set()

    async def _unpack(self, data: bytearray) -> None:
        sink = self._sink
        assert sink is not None
        await self._in_thread("importing", sink.feed, data)
        self._tell(sink)

    async def _in_thread(self, doing: str, act: Callable[..., T], *args: Any) -> T:
        try:
            return await self._services.tree.in_thread(doing, act, *args)
        except CocoonError as error:
            if self._sink is None or self._sink.is_refused or self._sink.is_finished:
                self.refusal = error
            raise

    def _finish(self, sink: ImportSink) -> Snapshot:
        draft = sink.finish()
        store = self._services.snapshots
        with contextlib.suppress(Unsupported):  # another host can load it
            library.check_state(self._services, draft, lambda: store.read_staged(self.id, STATE))
        kernel, initrd = (
            store.digest(self.id, name) if draft.has_file(name) else ""
            for name in ("kernel", "initrd")
        )
        now = time.time()
        return dataclasses.replace(
            draft,
            id=self.id,
            reason="import",
            created_at=draft.created_at or int(now),
            updated_at=now,
            mtime=now,
            kernel=kernel,
            initrd=initrd,
        )

    async def _publish(self) -> None:
        assert self._draft is not None
        services = self._services
        draft = dataclasses.replace(self._draft, name=self.name, access=self.access)
        try:
            # A directory under its final name has a record from the first moment on.
            await services.index.snapshots.save(draft)
            step("import:recorded")
            layout = await library.published(services, draft)
            step("import:published")
            snapshot = dataclasses.replace(
                draft, state=SnapshotState.READY, archive_size=layout.size, generation=1
            )
            await services.index.snapshots.save(snapshot)
        except CocoonError as error:
            self.refusal, self._draft = error, None
            await services.tree.in_thread("ending an import", services.snapshots.discard, self.id)
            if services.index.snapshots.get(draft.id) is not None:
                services.index.snapshots.forget(draft)
            raise
        self._is_over = True
        self.forget()
        os.close(self._staging)
        services.events.happened("ADDED", snapshot, bytes=self.size)
        step("import:ready")

    def _remove(self) -> None:
        if self._sink is not None:
            self._sink.discard()
        if self._staging >= 0:
            with contextlib.suppress(OSError):
                os.close(self._staging)
        self._services.snapshots.discard(self.id)

    def _tell(self, sink: ImportSink) -> None:
        progress = sink.progress
        now = time.monotonic()
        if progress.members == self._members and now - self._told < _EVENTS_APART:
            return
        self._told, self._members = now, progress.members
        member = progress.members[-1] if progress.members else ""
        snapshot = self._provisional("import")
        self._services.events.happened("MODIFIED", snapshot, bytes=progress.bytes_in, member=member)

    def _provisional(self, reason: str) -> Snapshot:
        return Snapshot(
            id=self.id,
            name=self.name or self.file_name,
            access=self.access,
            hypervisor="",
            reason=reason,
            updated_at=time.time(),
        )


def _name_of(file_name: str) -> str:
    """Return the snapshot's name, "" for rsync's temporary file; raise Invalid for another."""
    temporary = _TEMPORARY.fullmatch(file_name)
    if temporary is not None and is_name(temporary[1]):
        return ""
    name = file_name.removesuffix(_SUFFIX)
    if name == file_name:
        raise Invalid(f"{file_name[:80]} is not the name of an archive: end it in {_SUFFIX}")
    return check_name(name)
