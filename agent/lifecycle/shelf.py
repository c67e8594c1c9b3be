"""What the filesystem may ask for about snapshots: the other half of `host`."""

import functools
from collections.abc import Mapping
from typing import Any

from agent.model.access import Caller
from agent.model.snapshot import Snapshot
from agent.storage.archive import ArchiveView

from . import library
from .importing import Import, Imports
from .operation import Operation, Operations
from .services import Services


class Shelf:
    """All snapshots that are complete. What changes something returns an Operation, as in Host."""

    def __init__(self, services: Services, operations: Operations, group: int) -> None:
        self._services = services
        self._operations = operations
        self._imports = Imports(services, group)

    def all(self) -> list[Snapshot]:
        """Return all snapshots, in no order."""
        found = self._services.index.snapshots.all()
        return [snapshot for snapshot in found if self.get(snapshot.id) is not None]

    def find(self, name: str) -> Snapshot | None:
        """Return the snapshot of that name."""
        return library.find(self._services, name)

    def get(self, snapshot_id: str) -> Snapshot | None:
        """Return the snapshot of that id."""
        snapshot = self._services.index.snapshots.get(snapshot_id)
        return library.find(self._services, snapshot.name) if snapshot else None

    def exists(self, object_id: str) -> bool:
        """Whether there is a snapshot of that id, or an archive that will be one."""
        arriving = any(arriving.id == object_id for arriving in self.imports())
        return arriving or self.get(object_id) is not None

    def imports(self) -> list[Import]:
        """Return the archives on their way in."""
        return self._imports.all()

    def find_import(self, file_name: str) -> Import | None:
        """Return the archive on its way in whose file has that name."""
        return self._imports.find(file_name)

    async def begin_import(self, caller: Caller, file_name: str) -> Import:
        """Begin an import; raise Exists for a name taken, Invalid for one that is none."""
        return await self._imports.begin(caller, file_name)

    def describe(self, snapshot: Snapshot) -> dict[str, Any]:
        """Return what `<name>.json` shows."""
        return library.describe(snapshot)

    async def open_archive(self, snapshot_id: str) -> ArchiveView:
        """Open the archive for one reader, to be closed by it."""
        return await library.open_archive(self._services, snapshot_id)

    def rename(self, caller: Caller, snapshot_id: str, name: str) -> Operation:
        """Give the snapshot another name."""
        work = functools.partial(library.rename, self._services, caller, snapshot_id, name)
        return self._operations.submit(caller, snapshot_id, work)

    def configure(self, caller: Caller, snapshot_id: str, changes: Mapping[str, Any]) -> Operation:
        """Change the description."""
        work = functools.partial(library.configure, self._services, caller, snapshot_id, changes)
        return self._operations.submit(caller, snapshot_id, work)

    def set_access(
        self, caller: Caller, snapshot_id: str, uid: int | None, gid: int | None, mode: int | None
    ) -> Operation:
        """Change owner, group or permission bits; the kernel has checked that the caller may."""
        work = functools.partial(library.delegate, self._services, snapshot_id, uid, gid, mode)
        return self._operations.submit(caller, snapshot_id, work)

    def remove(self, caller: Caller, snapshot_id: str) -> Operation:
        """Remove the snapshot."""
        work = functools.partial(library.remove, self._services, caller, snapshot_id)
        return self._operations.submit(caller, snapshot_id, work)
