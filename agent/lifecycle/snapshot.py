"""Taking a snapshot: pause, save, copy, resume whatever happens, and only then make it whole.

Before the pause one commit records both the pending snapshot and the VM that is being saved, so
that after a crash it is known that the pause was ours, and whether the user had paused the VM.
"""

import dataclasses
import errno
import functools
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from agent.model import canonical, sidecar
from agent.model.disks import drives, host_disk_binds
from agent.model.errors import Busy, CocoonError, Invalid, NoSpace, TimedOut, Unsupported
from agent.model.image import DIGEST
from agent.model.names import check_name, new_id
from agent.model.pinned import boot_files
from agent.model.sidecar import Sidecar, show_sidecar
from agent.model.snapshot import (
    SIDECAR,
    STATE_FILES,
    Snapshot,
    SnapshotBoot,
    SnapshotDisk,
    SnapshotState,
)
from agent.model.vm import DirtyBase, State, Vm
from agent.storage.snapshots import SAVE, Base
from agent.systemd.unit import memory_limit
from agent.vmm.driver import Vmm

from . import live
from .library import check_free, published
from .pause import connected
from .services import Services
from .steps import step
from .stop import KILL_LIMIT, ended

_PAUSE_LIMIT = 10.0  # seconds, from the contract's table of verbs
_RESUME_LIMIT = 10.0
_STALL_LIMIT = 60.0  # seconds without a block written after which the disk makes no progress
_UNDO_LIMIT = 60.0
_LOOK = 1.0
_LOADING_LIMIT = 60.0
_FIRST_LOOK = 0.002
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_log = logging.getLogger(__name__)


async def take(services: Services, vm_id: str, name: str, *, hibernate: bool = False) -> None:
    """Take a snapshot of a VM that runs or is paused; with `hibernate` it is stopped after it.

    When it fails the VM goes on as it was, and nothing is left of the snapshot.
    """
    what = "hibernate" if hibernate else "take"
    await _wait_until_loaded(services, services.vm(vm_id))
    vm = services.vm(vm_id)
    if vm.state not in (State.RUNNING, State.PAUSED):
        raise Invalid(f"VM {vm.name} is {vm.state}: a snapshot takes one that is running or paused")
    _check(services, vm, name)
    if services.drivers[vm.hypervisor].capabilities.live_changes:
        await live.check_settled(services, vm_id)
        vm = services.vm(vm_id)
    limit = await _process_limit(services, vm)
    base = await _open_base(services, vm)
    try:
        vm, snapshot = await _record(services, vm, name)
        step(f"{what}:recorded")
        try:
            await _take(services, vm, snapshot, base, limit, hibernate=hibernate)
        except BaseException:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _UNDO_LIMIT):
                await _undo(services, vm, snapshot)
            raise
    finally:
        if base is not None:
            base.close()
    if hibernate:
        # From here on the guest is in its snapshot alone, which nothing may undo.
        await finish_hibernation(services, vm_id)


async def _wait_until_loaded(services: Services, vm: Vm) -> None:
    """Wait while the VMM of a clone loads memory beside its guest; raise Busy when that is long."""
    driver = services.drivers.get(vm.hypervisor)
    pause = _FIRST_LOOK
    with trio.move_on_after(_LOADING_LIMIT) as scope:
        while driver is not None and vm.pid and driver.is_loading(vm.pid):
            await trio.sleep(pause)
            pause *= 9 / 8
    if scope.cancelled_caught:
        raise Busy(
            f"VM {vm.name} still loads its memory from its snapshot, and none is taken of it till "
            "then: try later, or set restore_mode to copy for the next clone"
        )


def _check(services: Services, vm: Vm, name: str) -> None:
    check_name(name)
    check_free(services, name)
    if not services.drivers[vm.hypervisor].capabilities.snapshot:
        raise Unsupported(f"{vm.hypervisor} takes no snapshots: others do")
    writable = [bind.source for bind in host_disk_binds(vm.config) if not bind.readonly]
    if writable:
        raise Unsupported(
            f"VM {vm.name} writes to {writable[0]}, a disk of the host, which no snapshot holds: "
            "make it readonly, or give the VM a disk of the agent's own"
        )


async def _process_limit(services: Services, vm: Vm) -> int:
    driver = services.drivers[vm.hypervisor]
    # It runs: whether it could be loaded once more is no question here.
    return driver.plan(vm, await driver.version(), loads=vm.config.boot is None).memory


async def _open_base(services: Services, vm: Vm) -> Base | None:
    """Open what the VMM's record of changes counts from, when it keeps one."""
    known = vm.dirty_base
    if not vm.config.track_dirty or known is None or known.pid != vm.pid:
        return None
    last = services.index.snapshots.get(known.snapshot)
    if last is None:
        return None
    return await services.tree.in_thread(
        "opening the memory of the last snapshot", services.snapshots.open_base, last
    )


async def _record(services: Services, vm: Vm, name: str) -> tuple[Vm, Snapshot]:
    now = time.time()
    snapshot = Snapshot(
        id=new_id(),
        name=name,
        access=vm.access,
        hypervisor=vm.hypervisor,
        hypervisor_version=vm.hypervisor_version,
        cpu=vm.config.cpu,
        memory=vm.config.memory,
        max_cpu=vm.config.max_cpu,
        max_memory=vm.config.max_memory,
        storage=vm.config.own_size,
        **_image(vm),
        disks=_disks(vm),
        boot=_boot(vm),
        host_disks={bind.target: bind.source for bind in host_disk_binds(vm.config)},
        kernel=vm.booted.kernel,
        initrd=vm.booted.initrd,
        firmware=vm.booted.firmware,
        source_vm_id=vm.id,
        reason="snapshot",
        generation=1,
        created_at=now,
        updated_at=now,
        mtime=now,
    )
    before = vm
    # Both go with one commit. From here on nobody may count changes from an older snapshot.
    vm = services.note(vm.id, state=State.SAVING, reason="snapshot", dirty_base=None)
    try:
        await services.index.snapshots.save(snapshot)
    except CocoonError:
        services.note(vm.id, state=before.state, reason=before.reason, dirty_base=before.dirty_base)
        raise
    return vm, snapshot


def _disks(vm: Vm) -> tuple[SnapshotDisk, ...]:
    return tuple(
        SnapshotDisk(
            path=drive.path,
            readonly=drive.readonly,
            serial=drive.serial,
            role=drive.role,
            fstype=drive.fstype,
        )
        for drive in drives(vm.config, seed=bool(vm.seed))
    )


def _image(vm: Vm) -> dict[str, Any]:
    """Return how the snapshot names the image that the VM's disk stands on, as Cocoon does."""
    base = vm.config.base
    if base is None or base.copied:
        return {}
    return {
        "image": vm.config.image,
        "image_digest": f"{DIGEST}{base.digest}",
        "image_type": "cloudimg",
        "image_blobs": (base.digest,),
    }


def _boot(vm: Vm) -> SnapshotBoot:
    # No paths: Cocoon opens what they name when it clones, and what was booted travels as files.
    return SnapshotBoot(cmdline=vm.config.boot.cmdline if vm.config.boot else "")


async def _take(
    services: Services,
    vm: Vm,
    snapshot: Snapshot,
    base: Base | None,
    limit: int,
    *,
    hibernate: bool,
) -> None:
    what = "hibernate" if hibernate else "take"
    tree, store = services.tree, services.snapshots
    await tree.in_thread("preparing a snapshot", store.begin, snapshot.id, vm)
    step(f"{what}:prepared")
    async with _raised_limit(services, vm, limit), connected(services, vm) as vmm:
        # One that does not answer is found out, too, before its guest stands still.
        await vmm.prepare_snapshot()
        began = trio.current_time()
        try:
            await _pause(vm, vmm)
            step(f"{what}:paused")
            await _save(services, vm, vmm, diff=base is not None)
            step(f"{what}:written")
            live = snapshot.memory_is_live
            await tree.in_thread("copying disks", store.copy_disks, snapshot.id, vm, live)
            step(f"{what}:copied")
            if hibernate:
                await _complete(services, vm, snapshot, base, began, hibernate=True)
        except BaseException:
            await _resume(services, vm, vmm)
            raise
        if not hibernate:
            await _resume(services, vm, vmm)
            step(f"{what}:resumed")
            pause = 0.0 if vm.user_paused else trio.current_time() - began
            await _complete(services, vm, snapshot, base, trio.current_time() - pause)


async def finish_hibernation(services: Services, vm_id: str) -> None:
    """End the VMM of a VM whose snapshot is durable; can be repeated."""
    await services.units.kill(services.vm(vm_id), KILL_LIMIT)
    step("hibernate:killed")
    await ended(services, vm_id, State.STOPPED, reason="hibernate")


async def _pause(vm: Vm, vmm: Vmm) -> None:
    with trio.move_on_after(_PAUSE_LIMIT) as scope:
        await vmm.pause()
    if scope.cancelled_caught:
        raise TimedOut(f"the VMM of {vm.name} did not pause within {_PAUSE_LIMIT:.0f} seconds")


async def _save(services: Services, vm: Vm, vmm: Vmm, *, diff: bool) -> None:
    """Let the VMM write its state and memory, as long as the disk makes progress."""
    stalled = False
    failure: CocoonError | None = None

    async def look() -> None:
        nonlocal stalled
        blocks, changed = -1, trio.current_time()
        while trio.current_time() - changed < _STALL_LIMIT:
            await trio.sleep(_LOOK)
            now = services.snapshots.saved_blocks(vm)
            if now != blocks:
                blocks, changed = now, trio.current_time()
        stalled = True
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        files = STATE_FILES[vm.hypervisor]
        state, memory = (f"{canonical.VM}/{SAVE}/{name}" for name in (files.state, files.memory))
        try:
            await vmm.snapshot(state, memory, diff=diff, timeout=math.inf)
        except CocoonError as error:
            failure = error
        nursery.cancel_scope.cancel()
    if stalled:
        raise TimedOut(f"the VMM of {vm.name} wrote nothing for {_STALL_LIMIT:.0f} seconds")
    if failure is not None:
        # Firecracker words it in one way for the memory, in another for the state.
        words = [word for code in _NO_ROOM for word in (f"os error {code})", f"code: {code},")]
        if any(word in str(failure) for word in words):
            raise NoSpace(f"no room for the memory of VM {vm.name}: {failure}") from failure
        raise failure


async def _resume(services: Services, vm: Vm, vmm: Vmm) -> None:
    """Let the guest go on, unless the user had paused it."""
    state = State.PAUSED
    if not vm.user_paused:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _RESUME_LIMIT):
            try:
                await vmm.resume(timeout=_RESUME_LIMIT)
                state = State.RUNNING
            except CocoonError as error:
                # Gone, most likely: who watches the unit will record it.
                _log.warning("VM %s cannot be resumed after its snapshot: %s", vm.name, error)
    now = services.index.vms.get(vm.id)
    if now is not None and now.state is State.SAVING:
        services.note(vm.id, state=state)


async def _complete(
    services: Services,
    vm: Vm,
    snapshot: Snapshot,
    base: Base | None,
    paused_since: float,
    *,
    hibernate: bool = False,
) -> None:
    """Make the snapshot whole, let it appear, record it."""
    what = "hibernate" if hibernate else "take"
    pause = trio.current_time() - paused_since
    tree, store = services.tree, services.snapshots
    written = not snapshot.memory_is_live
    await tree.in_thread("collecting a snapshot", store.collect, snapshot.id, vm, base, written)
    step(f"{what}:collected")
    draft = await tree.in_thread("finishing a snapshot", _finish_files, services, snapshot, vm)
    step(f"{what}:sealed")
    layout = await published(services, draft)
    step(f"{what}:published")
    now = time.time()
    ready = dataclasses.replace(
        draft,
        state=SnapshotState.READY,
        archive_size=layout.size,
        pause_ms=round(pause * 1000, 1),
        generation=2,
        updated_at=now,
        mtime=now,
    )
    before = services.vm(vm.id)
    is_base = vm.config.track_dirty and before.pid == vm.pid
    after = dataclasses.replace(
        before,
        snapshots=(*before.snapshots, snapshot.id),
        dirty_base=DirtyBase(snapshot.id, vm.pid) if is_base else None,
    )
    # Both go with one commit.
    services.index.vms.note(after)
    if hibernate:
        services.note(vm.id, state=State.STOPPING, reason="hibernate")
    try:
        await services.index.snapshots.save(ready)
    except BaseException:
        # Cancelled, too: a VM that goes on must not be one that hibernates. It may have ended, too.
        last = services.vm(vm.id)
        going = before if hibernate and last.state is State.STOPPING else last
        services.index.vms.note(
            dataclasses.replace(
                last,
                state=going.state,
                reason=going.reason,
                snapshots=before.snapshots,
                dirty_base=before.dirty_base,
            )
        )
        raise
    services.events.happened("ADDED", ready, pause_ms=ready.pause_ms)
    step(f"{what}:ready")


def _finish_files(services: Services, snapshot: Snapshot, vm: Vm) -> Snapshot:
    store = services.snapshots
    booted = boot_files(snapshot).digests()
    paths = {name: services.kernels.path(digest) for name, digest in booted.items()}
    store.link_boot(snapshot.id, paths)
    if vm.config.ties_queues:
        store.untie(snapshot.id)
    document = Sidecar(snapshot.disks, snapshot.boot, snapshot.cpu, snapshot.memory)
    store.write(snapshot.id, SIDECAR, show_sidecar(document))
    files = store.seal(snapshot.id)
    read = functools.partial(store.read_staged, snapshot.id)
    return sidecar.complete(snapshot, files, read)


@asynccontextmanager
async def _raised_limit(services: Services, vm: Vm, limit: int) -> AsyncIterator[None]:
    """Let the VM's unit use more memory: the page cache of what its VMM writes counts."""
    await services.units.set_properties(vm, memory_limit(limit + vm.config.memory))
    try:
        yield
    finally:
        services.background.start_soon(_lower_limit, services, vm, limit)


async def _lower_limit(services: Services, vm: Vm, limit: int) -> None:
    now = services.index.vms.get(vm.id)
    if now is None or now.changing is not None or now.config.memory != vm.config.memory:
        return  # a change to the VM sets it
    try:
        await services.units.set_properties(vm, memory_limit(limit))
    except CocoonError as error:
        _log.debug("the memory limit of VM %s stays raised: %s", vm.name, error)


async def _undo(services: Services, vm: Vm, snapshot: Snapshot) -> None:
    try:
        await services.tree.in_thread(
            "removing a snapshot", services.snapshots.discard, snapshot.id, vm
        )
    except CocoonError as error:
        _log.error("snapshot %s leaves files until the next start: %s", snapshot.name, error)
    if is_recorded := services.index.snapshots.get(snapshot.id) is not None:
        services.index.snapshots.forget(snapshot)
    now = services.index.vms.get(vm.id)
    if now is not None and (snapshot.id in now.snapshots or now.state is State.SAVING):
        left = tuple(taken for taken in now.snapshots if taken != snapshot.id)
        state = now.state
        if state is State.SAVING:
            state = State.PAUSED if vm.user_paused else State.RUNNING
        services.note(vm.id, state=state, snapshots=left, dirty_base=None)
    if is_recorded:
        try:
            await services.index.sync(frees=True)
        except CocoonError as error:
            # It goes with the next commit; an agent that dies before is undone by the next one.
            _log.error("snapshot %s stays in the index for now: %s", snapshot.name, error)
