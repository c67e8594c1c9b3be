"""The base images there are: names, imports, delegation, removal, and who needs which.

A VM or snapshot needs an image by its digest: one of any name will do.
"""

import dataclasses
import re
import time
from typing import Any

from agent.model import canonical
from agent.model.access import READ, Access, Caller
from agent.model.config import BaseImage
from agent.model.errors import (
    Busy,
    CocoonError,
    Denied,
    Exists,
    Missing,
    NotPermitted,
)
from agent.model.image import DIGEST, Image, ImageState
from agent.model.names import check_name, is_name
from agent.model.snapshot import Snapshot
from agent.model.vm import Vm
from agent.storage.archive import ArchiveView, open_view
from agent.storage.directory import opened
from agent.storage.image_sink import ImageSink
from agent.storage.sink import Sink

from .library import changed_access
from .services import Services
from .steps import step

_TEMPORARY = re.compile(r"\.(.+)\.[A-Za-z0-9]{6}")  # rsync's, before it renames
_NAMED = 3  # of those that need an image, how many a refusal names


def find(services: Services, name: str) -> Image | None:
    """Return the image of that name, if it is complete and not being removed."""
    image = services.index.images.named(name)
    return image if image is not None and image.state is ImageState.READY else None


def ready(services: Services, image_id: str) -> Image:
    """Return the image of that id; raise Missing when there is none any more."""
    image = services.index.images.get(image_id)
    if image is None or image.state is not ImageState.READY:
        raise Missing("the image was removed meanwhile")
    return image


def readable(services: Services, caller: Caller, name: str) -> Image:
    """Return the image of that name; raise Missing, or Denied when `caller` may not read it."""
    image = find(services, name)
    if image is None:
        raise Missing(f"there is no image {name[:80]!r}: copy it to images/, or look what is there")
    if not image.access.allows(caller, READ):
        raise Denied(
            f"image {name} is not yours to read: its owner or root may allow it with chmod or chown"
        )
    return image


def by_digest(services: Services, digest: str) -> list[Image]:
    """Return the images with that content, hex SHA-256."""
    return [
        image
        for image in services.index.images.all()
        if image.digest == digest and image.state is ImageState.READY
    ]


def of_vm(services: Services, vm: Vm) -> Image | None:
    """Return the image that the VM's own disk stands on, None when it needs none.

    Raises Missing, with what to do, when it is not there.
    """
    base = vm.config.base
    if base is None or base.copied:
        return None
    found = by_digest(services, base.digest)
    if not found:
        raise Missing(
            f"the image {vm.config.image} that VM {vm.name} stands on is gone: copy the one whose "
            f"sha256sum is {base.digest} to images/, under any name"
        )
    return found[0]


def base_of(services: Services, snapshot: Snapshot, caller: Caller | None = None) -> Image | None:
    """Return the image that the snapshot stands on, None when it needs none.

    Raises Missing, with what to do, when it is not there, and Denied when `caller` may not read it.
    """
    digest = _needed(snapshot)
    if digest is None:
        return None
    found = by_digest(services, digest)
    if not found:
        what = f"whose sha256sum is {digest}" if digest else "that the archive does not tell"
        raise Missing(
            f"snapshot {snapshot.name} stands on an image that is not here: copy {snapshot.image} "
            f"({what}) to images/, under any name"
        )
    allowed = [image for image in found if caller is None or image.access.allows(caller, READ)]
    if not allowed:
        raise Denied(
            f"snapshot {snapshot.name} stands on the image {found[0].name}, which is not yours to "
            "read: its owner or root may allow it with chmod or chown"
        )
    return allowed[0]


def missing_base(services: Services, snapshot: Snapshot) -> str:
    """Return name and digest of the image that a snapshot needs and that is not here, or ""."""
    digest = _needed(snapshot)
    if digest is None or by_digest(services, digest):
        return ""
    return f"{snapshot.image} {DIGEST}{digest}".strip()


def _needed(snapshot: Snapshot) -> str | None:
    if not snapshot.has_file(canonical.OVERLAY):
        return None
    return snapshot.image_digest.removeprefix(DIGEST)


def check_free(services: Services, name: str) -> None:
    """Raise Exists when there is an image of that name, or one on its way in."""
    if services.index.images.named(name) is not None or name in services.reserved_images:
        raise Exists(f"there is an image {name} already: choose another name or remove that one")


def configured(services: Services, caller: Caller, name: str) -> BaseImage | None:
    """Return what a VM whose `image` is set to `name` stands on; raises as `readable` does."""
    return readable(services, caller, name).base if name else None


async def open_file(services: Services, image_id: str) -> ArchiveView:
    """Open the image's file for one reader, who reads it to its end even if it is removed."""
    image = ready(services, image_id)
    await services.tree.in_thread("looking at an image", services.images.check, image)
    layout = services.images.layout(image)
    with opened(services.images.directory(image_id)) as directory:
        return await open_view(layout, directory, b"", services.reading)


async def save(services: Services, image_id: str, *, frees: bool = False, **changes: Any) -> Image:
    """Commit a transition of an image, and tell of it once it is on disk."""
    image = ready(services, image_id)
    image = dataclasses.replace(
        image, **changes, generation=image.generation + 1, updated_at=time.time()
    )
    await services.index.images.save(image, frees=frees)
    services.events.happened("MODIFIED", image)
    return image


async def rename(services: Services, caller: Caller, image_id: str, name: str) -> None:
    """Give the image another name; VMs made from it show that, and keep their disks."""
    check_name(name)
    image = ready(services, image_id)
    _check_owner(image, caller, "renames")
    if name == image.name:
        return
    check_free(services, name)
    for vm in services.index.vms.all():
        base = vm.config.base
        if base is not None and base.digest == image.digest and vm.config.image == image.name:
            config = dataclasses.replace(vm.config, image=name)
            services.index.vms.note(dataclasses.replace(vm, config=config))
    # All with one commit.
    await save(services, image_id, name=name, mtime=time.time(), reason="rename")


async def delegate(
    services: Services, image_id: str, uid: int | None, gid: int | None, mode: int | None
) -> None:
    """Change owner, group or permission bits."""
    image = ready(services, image_id)
    access = changed_access(image.access, uid, gid, mode)
    if access != image.access:
        await save(services, image_id, access=access, reason="delegate")


async def remove(services: Services, caller: Caller, image_id: str) -> None:
    """Remove the image; raise Busy, naming them, while VMs or snapshots need it."""
    image = ready(services, image_id)
    _check_owner(image, caller, "removes")
    if len(by_digest(services, image.digest)) == 1:
        _check_unused(services, image)
    image = await save(services, image_id, frees=True, state=ImageState.DELETING, reason="remove")
    step("image-delete:recorded")
    await finish_removal(services, image)


async def finish_removal(services: Services, image: Image) -> None:
    """Remove what belongs to an image that is recorded as going; can be repeated."""
    await services.tree.in_thread("removing an image", services.images.clear, image.id)
    step("image-delete:removed")
    services.index.images.forget(image)
    await services.index.sync(frees=True)
    gone = dataclasses.replace(image, generation=image.generation + 1, updated_at=time.time())
    services.events.happened("REMOVED", gone)


def _check_unused(services: Services, image: Image) -> None:
    bases = [(vm, vm.config.base) for vm in services.index.vms.all()]
    users = [
        f"VM {vm.name}"
        for vm, base in bases
        if base is not None and base.digest == image.digest and not base.copied
    ]
    users += [
        f"snapshot {snapshot.name}"
        for snapshot in services.index.snapshots.all()
        if _needed(snapshot) == image.digest
    ]
    # A snapshot that is being taken has no files yet: its VM is among the users.
    if users:
        more = f" and {len(users) - _NAMED} more" if len(users) > _NAMED else ""
        raise Busy(
            f"image {image.name} is needed by {', '.join(sorted(users)[:_NAMED])}{more}: remove "
            "those first"
        )


def _check_owner(image: Image, caller: Caller, verb: str) -> None:
    if not image.access.owned_by(caller):
        raise NotPermitted(f"only its owner or root {verb} image {image.name}")


class Images:
    """The kind of import that makes images; see Kind."""

    noun = "image"
    steps = "image-import"
    ends_unmarked = True

    def __init__(self, services: Services) -> None:
        self.store = services.images
        self.reserved = services.reserved_images
        self._services = services

    def name_of(self, file_name: str) -> str:
        """Return the image's name, which is the file's; see Kind."""
        temporary = _TEMPORARY.fullmatch(file_name)
        if temporary is not None and is_name(temporary[1]):
            return ""
        return check_name(file_name)

    def check_free(self, name: str) -> None:
        """Raise Exists for a name taken; see Kind."""
        check_free(self._services, name)

    def sink(self, staging: int) -> Sink:
        """Return what takes an image; see Kind."""
        return ImageSink(staging)

    def finish(self, object_id: str, sink: Sink) -> Image:
        """Return the record of an image that is whole; see Kind."""
        assert isinstance(sink, ImageSink)
        found = sink.finish()
        now = time.time()
        return Image(
            id=object_id,
            name="",
            access=Access(0, 0),
            format=found.format,
            size=found.size,
            file_size=found.file_size,
            digest=found.digest,
            reason="import",
            created_at=now,
            updated_at=now,
            mtime=now,
        )

    async def publish(self, draft: Image, name: str, access: Access, size: int) -> None:
        """Let the image appear; see Kind."""
        services = self._services
        draft = dataclasses.replace(draft, name=name, access=access)
        try:
            # A directory under its final name has a record from the first moment on.
            await services.index.images.save(draft)
            step("image-import:recorded")
            await services.tree.in_thread("publishing an image", self.store.publish, draft.id)
            step("image-import:published")
            image = dataclasses.replace(draft, state=ImageState.READY, generation=1)
            await services.index.images.save(image)
        except CocoonError:
            await services.tree.in_thread("ending an import", self.store.clear, draft.id)
            if services.index.images.get(draft.id) is not None:
                services.index.images.forget(draft)
            raise
        digest = f"{DIGEST}{image.digest}"
        services.events.happened("ADDED", image, bytes=size, format=image.format, digest=digest)

    def provisional(self, object_id: str, name: str, access: Access, reason: str) -> Image:
        """Return a record to tell of the import by; see Kind."""
        return Image(object_id, name, access, reason=reason, updated_at=time.time())
