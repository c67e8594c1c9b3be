"""What an agent that died has left half done to a VM: finished or undone by the next one.

Each VM that needs it gets its turn before anything else is done to it. A clone or restore whose
guest runs is finished, one that had not come so far is undone or begun again; a VM that was being
saved goes on, unless its user had paused it.
"""

import contextlib
import logging
from collections.abc import Iterator

import trio

from agent.model.errors import CocoonError, Failed
from agent.model.image import ImageState
from agent.model.snapshot import Snapshot, SnapshotState
from agent.model.vm import State, Vm
from agent.systemd.unit import memory_limit
from agent.vmm.driver import VmmState

from . import images, library, restore, snapshot
from .pause import connected
from .reconcile import ALIVE, settle_without_process
from .services import RESTING, Services
from .start import Loading, loaded, look_after, plan_launch, recollect, with_seed
from .stop import KILL_LIMIT, ended
from .watch import settle

_ASK_LIMIT = 10.0  # seconds for one question to a VMM
_ASK_AGAIN = 0.1  # seconds
_SAVING_LIMIT = 600.0  # seconds for a VMM to finish writing what an agent asked for that is gone
_log = logging.getLogger(__name__)


def is_unfinished(vm: Vm) -> bool:
    """Whether the record says that something may be half done, so that `recover` must look."""
    hibernating = vm.state is State.STOPPING and vm.reason == "hibernate"
    return bool(vm.restoring) or vm.is_to_be_cloned or vm.state is State.SAVING or hibernating


async def recover(services: Services, vm_id: str) -> None:
    """Finish or undo what is half done; in the VM's turn."""
    vm = services.vm(vm_id)
    unit = await services.units.state(vm)
    active = unit.active if unit else "inactive"
    if vm.restoring:
        await _recover_restore(services, vm, active)
    elif vm.state is State.STOPPING:
        await snapshot.finish_hibernation(services, vm_id)
    elif active not in ALIVE:
        if vm.state not in RESTING:
            await settle_without_process(services, vm)
    elif vm.is_to_be_cloned:
        with contextlib.suppress(CocoonError):
            vm = await recollect(services, vm_id)
        await _recover_clone(services, vm)
    else:
        await _recover_saving(services, vm)


async def _recover_clone(services: Services, vm: Vm) -> None:
    source = services.index.snapshots.get(vm.from_snapshot)
    if source is not None and await _runs(services, vm):
        await _complete(services, vm, Loading(source, "clone"))
        return
    await services.units.kill(vm, KILL_LIMIT)
    lost = "the agent went away while the VM was being cloned: start it again"
    await ended(services, vm.id, State.STOPPED, reason="agent-restart", error=lost)


async def _recover_saving(services: Services, vm: Vm) -> None:
    await settle(services, vm.id)
    if services.vm(vm.id).state is not State.SAVING:
        return
    services.background.start_soon(look_after, services, vm.id)
    deadline = trio.current_time() + _SAVING_LIMIT
    while True:
        try:
            # A VMM answers nothing while it writes.
            async with connected(services, vm) as vmm:
                state = await vmm.state(timeout=_ASK_LIMIT)
                if state is VmmState.PAUSED and not vm.user_paused:
                    await vmm.resume(timeout=_ASK_LIMIT)
            break
        except CocoonError as error:
            if trio.current_time() > deadline:
                raise Failed(f"VM {vm.name} does not go on after its snapshot: {error}") from error
        if await _has_ended(services, vm):
            return
        await trio.sleep(_ASK_AGAIN)
    services.note(vm.id, state=State.PAUSED if vm.user_paused else State.RUNNING)
    _, plan = await plan_launch(services.drivers, vm, loads=True)
    await services.units.set_properties(vm, memory_limit(plan.memory))


async def _has_ended(services: Services, vm: Vm) -> bool:
    await settle(services, vm.id)
    now = services.vm(vm.id)
    return now.state is not State.SAVING or now.pid != vm.pid


async def _recover_restore(services: Services, vm: Vm, active: str) -> None:
    store, tree = services.snapshots, services.tree
    found = services.index.snapshots.get(vm.restoring)
    source = found if found and found.state is SnapshotState.READY else None
    exchanged = await tree.in_thread("looking at a restore", store.is_exchanged, vm)
    if not exchanged and active in ("active", "reloading"):
        await _go_on_as_before(services, vm)
    elif exchanged and active == "active" and found is not None and await _runs(services, vm):
        restored = restore.restored(services, vm, found)
        await _complete(services, restored, Loading(found, "restore", State.RESTORING))
        await services.index.sync(frees=True)
        await tree.in_thread("removing a VM's old files", store.forget_old, vm)
    elif source is not None:
        await services.units.kill(vm, KILL_LIMIT)
        # A guest that ran for a moment has written to the disks that are there.
        await tree.in_thread("staging a restore again", store.restage, source, vm)
        await restore.go_on(services, vm.id, source)
    else:
        await services.units.kill(vm, KILL_LIMIT)
        await restore.undo(services, vm.id, "the snapshot went away while the VM was restored")


async def _go_on_as_before(services: Services, vm: Vm) -> None:
    """Let the VM run on whose VMM a restore had not come to end."""
    store = services.snapshots
    await settle(services, vm.id)
    await services.tree.in_thread("removing a staged restore", store.unstage_restore, vm)
    paused = vm.user_paused
    # One that does not answer is not to be restored later, when nobody expects it.
    with contextlib.suppress(CocoonError):
        async with connected(services, vm) as vmm:
            paused = await vmm.state(timeout=_ASK_LIMIT) is VmmState.PAUSED
    await services.save(
        vm.id,
        restoring="",
        state=State.PAUSED if paused else State.RUNNING,
        error="the agent went away before the VM was restored: write to restore again",
    )
    services.background.start_soon(look_after, services, vm.id)


async def _runs(services: Services, vm: Vm) -> bool:
    """Whether the VMM has loaded its guest and let it go on, which is the last that is done."""
    try:
        async with connected(services, vm) as vmm:
            return await vmm.state(timeout=_ASK_LIMIT) is VmmState.RUNNING
    except CocoonError as error:
        _log.warning("VM %s does not say whether its guest runs: %s", vm.name, error)
        return False


async def _complete(services: Services, vm: Vm, loading: Loading) -> None:
    unit = await services.units.state(vm)
    if unit is None or not unit.main_pid:
        raise Failed(f"VM {vm.name} ended")
    await services.open_console(vm)
    vm, plan = await plan_launch(services.drivers, with_seed(vm, loading), loads=True)
    await loaded(services, vm, plan, loading, unit.main_pid)


async def clear_snapshots(services: Services) -> None:
    """Remove snapshots that never were complete, and those whose removal had begun.

    Before anybody may ask.
    """
    store, tree = services.snapshots, services.tree
    for record in services.index.snapshots.all():
        with _logged(f"snapshot {record.name}"):
            match record.state:
                case SnapshotState.PENDING:
                    await _drop(services, record)
                case SnapshotState.DELETING:
                    await library.finish_removal(services, record)
    for snapshot_id in await tree.in_thread("looking for unfinished snapshots", store.stagings):
        with _logged(f"what is left of snapshot {snapshot_id}"):
            await tree.in_thread("removing an unfinished snapshot", store.discard, snapshot_id)
    for vm_id in await tree.in_thread("looking for old files of VMs", store.leftovers):
        vm = services.index.vms.get(vm_id)
        if vm is not None and not vm.restoring:
            with _logged(f"what is left of a restore of VM {vm.name}"):
                await tree.in_thread("removing old files of a VM", store.forget_old, vm)
                await tree.in_thread("removing a staged restore", store.unstage_restore, vm)


async def clear_images(services: Services) -> None:
    """Remove images that never were complete, and those whose removal had begun; as the above."""
    store, tree = services.images, services.tree
    for record in services.index.images.all():
        with _logged(f"image {record.name}"):
            if record.state is not ImageState.READY:
                await images.finish_removal(services, record)
    for image_id in await tree.in_thread("looking for unfinished images", store.stagings):
        with _logged(f"what is left of image {image_id}"):
            await tree.in_thread("removing an unfinished image", store.clear, image_id)


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    """Let what cannot be removed keep no agent from starting: the next one tries again."""
    try:
        yield
    except CocoonError as error:
        _log.error("%s is not removed yet: %s", what, error)


async def _drop(services: Services, record: Snapshot) -> None:
    vm = services.index.vms.get(record.source_vm_id)
    await services.tree.in_thread(
        "removing an unfinished snapshot", services.snapshots.discard, record.id, vm
    )
    services.index.snapshots.forget(record)
    await services.index.sync()
    _log.info("snapshot %s was not complete when the agent went away: it is gone", record.name)
