"""Clones: a VM whose first start goes on from a snapshot."""

import logging

import trio

from agent.model.access import Caller
from agent.model.errors import CocoonError, Invalid, Missing, TimedOut
from agent.model.pinned import boot_files, pin
from agent.model.vm import Vm

from . import images, library
from .configure import empty_trash
from .services import RESTING, Services
from .start import Loading, cut_off, launch, prepare, start
from .steps import step

_LIMIT = 60.0  # seconds, from the contract's table of verbs
_log = logging.getLogger(__name__)


async def set_source(services: Services, caller: Caller, vm_id: str, name: str) -> None:
    """Let the VM's first start clone the snapshot `name`; "" for an ordinary start.

    The VM takes over what the snapshot fixes. Raises Missing or Denied when there is no such
    snapshot or `caller` may not read it, Invalid when the VM was started before.
    """
    vm = services.vm(vm_id)
    source = services.index.snapshots.get(vm.from_snapshot)
    if name == (source.name if source else ""):
        return
    if vm.state not in RESTING or vm.first_booted:
        raise Invalid(
            f"VM {vm.name} is {vm.state}: from takes one that was never started; write to restore "
            "to put a VM back to a snapshot of it"
        )
    if not name:
        await services.save(vm_id, from_snapshot="", reason="configure")
        return
    snapshot = library.readable(services, caller, name)
    image = images.base_of(services, snapshot, caller)
    config = pin(vm.config, snapshot, image)
    checking = "looking at a snapshot's configuration"
    await services.tree.in_thread(checking, services.snapshots.check_config, snapshot)
    await services.tree.in_thread("storing a kernel", services.snapshots.store_boot, snapshot)
    await services.save(
        vm_id,
        from_snapshot=snapshot.id,
        config=config,
        booted=boot_files(snapshot),
        reason="configure",
    )


async def start_or_clone(services: Services, vm_id: str) -> None:
    """Start the VM, the first time from its snapshot if it has one."""
    vm = services.vm(vm_id)
    with services.rush.start():
        if not vm.is_to_be_cloned or vm.state not in RESTING:
            await start(services, vm_id)
            return
        with trio.move_on_after(_LIMIT) as scope:
            await _clone(services, vm)
    if scope.cancelled_caught:
        late = TimedOut(f"VM {vm.name} was not cloned within {_LIMIT:.0f} seconds")
        await cut_off(services, vm_id, late)
        raise late


async def _clone(services: Services, vm: Vm) -> None:
    try:
        snapshot = library.ready(services, vm.from_snapshot)
    except Missing:
        raise Missing(
            f"the snapshot that VM {vm.name} is to be cloned from is gone: write another one to "
            "its from file, or nothing to boot it"
        ) from None
    loading = Loading(snapshot, "clone")
    filling = f"cloning snapshot {snapshot.name}"
    await services.tree.in_thread(filling, services.snapshots.fill, snapshot, vm)
    step("clone:filled")
    try:
        vm, plan = await prepare(services, vm, loading)
        step("clone:prepared")
    except BaseException:
        with trio.CancelScope(shield=True):
            await services.tree.remove_vm(vm)
        services.background.start_soon(empty_trash, services)
        raise
    await launch(services, vm, plan, loading)
    step("clone:running")
    services.background.start_soon(write_out, services, vm.id)


async def write_out(services: Services, vm_id: str) -> None:
    """Write out the clone's disks, which nobody else would before the guest asks for it."""
    vm = services.index.vms.get(vm_id)
    if vm is None:
        return
    try:
        await services.tree.in_thread("writing disks out", services.snapshots.sync_disks, vm)
        services.note(vm_id, unwritten=False)
    except CocoonError as error:
        if services.index.vms.get(vm_id) is not None:  # else it was removed meanwhile
            _log.error("the disks of VM %s are not written out: %s", vm.name, error)


async def tell_unwritten(services: Services, vm_id: str) -> None:
    """Say of a clone that its disks were not surely written out when the host went down.

    Nothing is done about it: its guest may have run on for long while there was no agent.
    """
    vm = services.vm(vm_id)
    lost = (
        f"the host went down before the disks of VM {vm.name} were known to be written out: if it "
        "had run for less than a minute they may have holes; remove it and clone it again"
    )
    _log.error("%s", lost)
    services.note(vm_id, unwritten=False, error=lost)
