"""The snapshots there are: names, archives, descriptions, delegation, removal."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from agent.model.access import READ, Access, Caller
from agent.model.errors import Damaged, Denied, Exists, Failed, Invalid, Missing, NotPermitted
from agent.model.names import check_name
from agent.model.size import MIB
from agent.model.snapshot import (
    Snapshot,
    SnapshotState,
    check_description,
    metadata_size,
    show_metadata,
)
from agent.model.vm import timestamp
from agent.storage.archive import ArchiveView, Layout, open_view

from .services import Services
from .steps import step

_LARGEST_STATE = 64 * MIB


def find(services: Services, name: str) -> Snapshot | None:
    """Return the snapshot of that name, if it is complete and not being removed."""
    snapshot = services.index.snapshots.named(name)
    return snapshot if snapshot is not None and snapshot.state is SnapshotState.READY else None


def ready(services: Services, snapshot_id: str) -> Snapshot:
    """Return the snapshot of that id; raise Missing when there is none any more."""
    snapshot = services.index.snapshots.get(snapshot_id)
    if snapshot is None or snapshot.state is not SnapshotState.READY:
        raise Missing("the snapshot was removed meanwhile")
    return snapshot


def check_state(services: Services, snapshot: Snapshot, read: Callable[[], bytes]) -> None:
    """Raise Damaged or Unsupported for a state, got by `read`, that the VMM would not load.

    Blocks.
    """
    driver = services.drivers.get(snapshot.hypervisor)
    state = snapshot.state_files.state
    sizes = [file.size for file in snapshot.files if file.name == state]
    if driver is None or not sizes:
        return
    if sizes[0] > _LARGEST_STATE:
        raise Damaged(f"{state} of {sizes[0]} bytes is too large to be one")
    driver.check_state(read())


def readable(services: Services, caller: Caller, name: str) -> Snapshot:
    """Return the snapshot of that name; raise Missing, or Denied when `caller` may not read it."""
    snapshot = find(services, name)
    if snapshot is None:
        raise Missing(f"there is no snapshot {name[:80]!r}: look into snapshots/")
    if not snapshot.access.allows(caller, READ):
        raise Denied(
            f"snapshot {name} is not yours to read: its owner or root may allow it with chmod or "
            "chown"
        )
    return snapshot


def check_free(services: Services, name: str) -> None:
    """Raise Exists when there is a snapshot of that name, or one on its way in."""
    if services.index.snapshots.named(name) is not None or name in services.reserved:
        raise Exists(f"there is a snapshot {name} already: choose another name or remove that one")


async def published(services: Services, draft: Snapshot) -> Layout:
    """Let a sealed snapshot appear under its final name; return its archive's layout."""
    store = services.snapshots

    def publish() -> Layout:
        store.publish(draft.id)
        return store.layout(draft)

    layout = await services.tree.in_thread("publishing a snapshot", publish)
    services.layouts[draft.id] = layout
    return layout


async def open_archive(services: Services, snapshot_id: str) -> ArchiveView:
    """Open the archive for one reader, who reads it to its end even if it is removed meanwhile."""
    snapshot = ready(services, snapshot_id)
    layout = services.layouts.get(snapshot_id)
    if layout is None:
        layout = await services.tree.in_thread(
            "laying out an archive", services.snapshots.layout, snapshot
        )
        services.layouts[snapshot_id] = layout
        if layout.size != snapshot.archive_size:
            # The files were copied to another filesystem, which keeps holes otherwise.
            changed = dataclasses.replace(ready(services, snapshot_id), archive_size=layout.size)
            services.index.snapshots.note(changed)
    metadata = show_metadata(ready(services, snapshot_id))
    if len(metadata) != metadata_size(snapshot):
        raise Failed(f"the description of snapshot {snapshot.name} does not fit its place")
    with services.snapshots.opened(snapshot) as directory:
        return await open_view(layout, directory, metadata, services.reading)


def describe(snapshot: Snapshot) -> dict[str, Any]:
    """Return what `<name>.json` shows."""
    access = snapshot.access
    return {
        "name": snapshot.name,
        "description": snapshot.description,
        "id": snapshot.id,
        "hypervisor": snapshot.hypervisor,
        "hypervisor_version": snapshot.hypervisor_version,
        "cpu": snapshot.cpu,
        "memory": snapshot.memory,
        "storage": snapshot.storage,
        "image": snapshot.image,
        "image_digest": snapshot.image_digest,
        "source_vm_id": snapshot.source_vm_id,
        "pause_ms": snapshot.pause_ms,
        # QEMU boots the image where no kernel was named.
        "boots_cold": bool(snapshot.kernel or snapshot.firmware)
        or (snapshot.hypervisor == "qemu" and bool(snapshot.image_digest)),
        "files": {file.name: file.size for file in snapshot.files},
        "archive_size": snapshot.archive_size,
        "owner": {"uid": access.uid, "gid": access.gid, "mode": f"{access.mode:04o}"},
        "created_at": timestamp(snapshot.created_at),
        "generation": snapshot.generation,
    }


async def save(
    services: Services, snapshot_id: str, *, frees: bool = False, **changes: Any
) -> Snapshot:
    """Commit a transition of a snapshot, and tell of it once it is on disk."""
    now = time.time()
    snapshot = ready(services, snapshot_id)
    snapshot = dataclasses.replace(
        snapshot, **changes, generation=snapshot.generation + 1, updated_at=now
    )
    await services.index.snapshots.save(snapshot, frees=frees)
    services.events.happened("MODIFIED", snapshot)
    return snapshot


async def rename(services: Services, caller: Caller, snapshot_id: str, name: str) -> None:
    """Give the snapshot another name."""
    check_name(name)
    snapshot = ready(services, snapshot_id)
    _check_owner(snapshot, caller, "renames")
    if name != snapshot.name:
        check_free(services, name)
        await save(services, snapshot_id, name=name, mtime=time.time(), reason="rename")


async def configure(
    services: Services, caller: Caller, snapshot_id: str, changes: Mapping[str, Any]
) -> None:
    """Change the description; what else is there already may be written too."""
    snapshot = ready(services, snapshot_id)
    shown = describe(snapshot)
    for key, value in changes.items():
        if key not in shown:
            raise Invalid(f"a snapshot has no {key[:40]!r}: only its description is written")
        if key != "description" and value != shown[key]:
            raise Invalid(f"{key} of snapshot {snapshot.name} cannot change: only description can")
    text = changes.get("description", snapshot.description)
    if not isinstance(text, str):
        raise Invalid("description is not a text")
    check_description(text)
    if text != snapshot.description:
        await save(services, snapshot_id, description=text, mtime=time.time(), reason="describe")


async def delegate(
    services: Services, snapshot_id: str, uid: int | None, gid: int | None, mode: int | None
) -> None:
    """Change owner, group or permission bits."""
    snapshot = ready(services, snapshot_id)
    access = changed_access(snapshot.access, uid, gid, mode)
    if access != snapshot.access:
        await save(services, snapshot_id, access=access, reason="delegate")


def changed_access(access: Access, uid: int | None, gid: int | None, mode: int | None) -> Access:
    """Return `access` with what is not None."""
    return Access(
        uid=access.uid if uid is None else uid,
        gid=access.gid if gid is None else gid,
        mode=access.mode if mode is None else mode & 0o777,
    )


async def remove(services: Services, caller: Caller, snapshot_id: str) -> None:
    """Remove the snapshot; who reads its archive reads on, and VMs cloned from it stay."""
    snapshot = ready(services, snapshot_id)
    _check_owner(snapshot, caller, "removes")
    changes = {"state": SnapshotState.DELETING, "reason": "remove"}
    snapshot = await save(services, snapshot_id, frees=True, **changes)
    step("delete:recorded")
    await finish_removal(services, snapshot)


async def finish_removal(services: Services, snapshot: Snapshot) -> None:
    """Remove what belongs to a snapshot that is recorded as going; can be repeated."""
    await services.tree.in_thread("removing a snapshot", services.snapshots.discard, snapshot.id)
    step("delete:removed")
    await forget(services, snapshot)
    step("delete:forgotten")


async def forget(services: Services, snapshot: Snapshot) -> None:
    """Remove the record of a snapshot whose files are gone, and tell of it."""
    services.layouts.pop(snapshot.id, None)
    services.index.snapshots.forget(snapshot)
    source = services.index.vms.get(snapshot.source_vm_id)
    if source is not None and snapshot.id in source.snapshots:
        left = tuple(taken for taken in source.snapshots if taken != snapshot.id)
        services.index.vms.note(dataclasses.replace(source, snapshots=left))
    await services.index.sync(frees=True)
    gone = dataclasses.replace(snapshot, generation=snapshot.generation + 1, updated_at=time.time())
    services.events.happened("REMOVED", gone)


def _check_owner(snapshot: Snapshot, caller: Caller, verb: str) -> None:
    if not snapshot.access.owned_by(caller):
        raise NotPermitted(f"only its owner or root {verb} snapshot {snapshot.name}")
