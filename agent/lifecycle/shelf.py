"""What the filesystem may ask for about snapshots and images: the other half of `host`."""

import functools
from collections.abc import Mapping
from typing import Any, Generic

from agent.model.access import Caller
from agent.model.image import Image
from agent.model.snapshot import Snapshot
from agent.storage.archive import ArchiveView

from . import images, library
from .archives import Archives
from .importing import Import, Imports, Kind, R
from .operation import Operation, Operations
from .services import Services


class _Arrivals(Generic[R]):
    """The part that deals with what is on its way in."""

    def __init__(self, services: Services, kind: Kind[R], group: int) -> None:
        self._imports: Imports[R] = Imports(services, kind, group)

    def imports(self) -> list[Import[R]]:
        """Return those on their way in."""
        return self._imports.all()

    def find_import(self, file_name: str) -> Import[R] | None:
        """Return the one on its way in whose file has that name."""
        return self._imports.find(file_name)

    async def begin_import(self, caller: Caller, file_name: str) -> Import[R]:
        """Begin an import; raise Exists for a name taken, Invalid for one that is none."""
        return await self._imports.begin(caller, file_name)

    def is_arriving(self, object_id: str) -> bool:
        """Whether one on its way in has that id."""
        return any(arriving.id == object_id for arriving in self.imports())


class Shelf(_Arrivals[Snapshot]):
    """All snapshots that are complete. What changes something returns an Operation, as in Host."""

    def __init__(self, services: Services, operations: Operations, group: int) -> None:
        super().__init__(services, Archives(services), group)
        self._services = services
        self._operations = operations

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
        return self.is_arriving(object_id) or self.get(object_id) is not None

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


class ImageShelf(_Arrivals[Image]):
    """All images that are complete; as Shelf."""

    def __init__(self, services: Services, operations: Operations, group: int) -> None:
        super().__init__(services, images.Images(services), group)
        self._services = services
        self._operations = operations

    def all(self) -> list[Image]:
        """Return all images, in no order."""
        found = self._services.index.images.all()
        return [image for image in found if self.get(image.id) is not None]

    def find(self, name: str) -> Image | None:
        """Return the image of that name."""
        return images.find(self._services, name)

    def get(self, image_id: str) -> Image | None:
        """Return the image of that id."""
        image = self._services.index.images.get(image_id)
        return images.find(self._services, image.name) if image else None

    def exists(self, object_id: str) -> bool:
        """Whether there is an image of that id, or a file that will be one."""
        return self.is_arriving(object_id) or self.get(object_id) is not None

    async def open_file(self, image_id: str) -> ArchiveView:
        """Open the image's file for one reader, to be closed by it."""
        return await images.open_file(self._services, image_id)

    def rename(self, caller: Caller, image_id: str, name: str) -> Operation:
        """Give the image another name."""
        work = functools.partial(images.rename, self._services, caller, image_id, name)
        return self._operations.submit(caller, image_id, work)

    def set_access(
        self, caller: Caller, image_id: str, uid: int | None, gid: int | None, mode: int | None
    ) -> Operation:
        """Change owner, group or permission bits; the kernel has checked that the caller may."""
        work = functools.partial(images.delegate, self._services, image_id, uid, gid, mode)
        return self._operations.submit(caller, image_id, work)

    def remove(self, caller: Caller, image_id: str) -> Operation:
        """Remove the image."""
        work = functools.partial(images.remove, self._services, caller, image_id)
        return self._operations.submit(caller, image_id, work)
