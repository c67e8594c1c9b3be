"""Restoring: a VM put back to a snapshot, in steps that each can be finished or undone.

All that can fail is checked and staged beside the VM's directory before its VMM is touched. Then
the intent is recorded (`Vm.restoring`), the VMM ended, the directories exchanged, and the unit
started with what the snapshot holds. The directory replaced stays until that has succeeded.
"""

import dataclasses
import functools
import logging

import trio

from agent.model.access import Caller
from agent.model.errors import CocoonError, Invalid, TimedOut, Unsupported
from agent.model.image import DIGEST
from agent.model.pinned import boot_files, pin
from agent.model.snapshot import Snapshot
from agent.model.vm import State, Vm

from . import images, library
from .affinity import check_queue_cpus
from .services import PROCESS_GONE, RESTING, Services
from .start import Loading, cut_off, launch, plan_launch, prepare
from .steps import step
from .stop import KILL_LIMIT, begin_start, ended

_LIMIT = 60.0  # seconds, from the contract's table of verbs, once everything is staged
_FROM = frozenset({State.RUNNING, State.PAUSED, State.STOPPED, State.ERROR})
_log = logging.getLogger(__name__)


async def restore(services: Services, caller: Caller, vm_id: str, name: str) -> None:
    """Put the VM back to the snapshot `name`, which was taken of it or which it was cloned from.

    Raises Missing, Denied, Invalid, Damaged and the like with the VM going on as it was. When the
    VMM cannot load what was staged, the VM is in error, with the disks it had.
    """
    await begin_start(services, vm_id)
    vm = services.vm(vm_id)
    if vm.state not in _FROM:
        raise Invalid(f"VM {vm.name} is {vm.state}: restore takes one that runs or has run")
    snapshot = library.readable(services, caller, name)
    own = vm.config.base
    if own is None or snapshot.image_digest != f"{DIGEST}{own.digest}":
        # An archive can name an image that who brought it may not read.
        images.base_of(services, snapshot, caller)
    await _stage(services, vm, snapshot)
    try:
        step("restore:staged")
        await services.save(vm_id, state=State.RESTORING, reason="restore", restoring=snapshot.id)
    except BaseException:
        with trio.CancelScope(shield=True):
            await _unstage(services, vm)
        raise
    step("restore:recorded")
    with trio.move_on_after(_LIMIT) as scope:
        await go_on(services, vm_id, snapshot)
    if scope.cancelled_caught:
        late = TimedOut(f"VM {vm.name} was not restored within {_LIMIT:.0f} seconds")
        await cut_off(services, vm_id, late)
        with trio.CancelScope(shield=True):
            await undo(services, vm_id, str(late))
        raise late


async def _stage(services: Services, vm: Vm, snapshot: Snapshot) -> None:
    if vm.id != snapshot.source_vm_id and snapshot.id != vm.from_snapshot:
        raise Invalid(
            f"snapshot {snapshot.name} was not taken of VM {vm.name}: make a directory for another "
            "VM and write the snapshot's name to its from file"
        )
    if snapshot.cpu > services.host_cpus:
        raise Unsupported(
            f"snapshot {snapshot.name} has {snapshot.cpu} CPUs, this host {services.host_cpus}"
        )
    check_queue_cpus(vm.name, vm.config)
    planned = restored(services, vm, snapshot)
    await plan_launch(services.drivers, planned, loads=True, nics=snapshot.nics)
    tree, store = services.tree, services.snapshots
    # Else this restore would take what an earlier one could not remove for the VM's own files.
    await tree.in_thread("removing a VM's old files", store.forget_old, vm)
    await tree.in_thread("storing a kernel", store.store_boot, snapshot)
    await tree.in_thread(f"staging snapshot {snapshot.name}", store.stage_restore, snapshot, vm)
    try:
        read = functools.partial(store.read_state, snapshot)
        await tree.in_thread("checking a state", library.check_state, services, snapshot, read)
    except BaseException:
        with trio.CancelScope(shield=True):
            await _unstage(services, vm)
        raise


def restored(services: Services, vm: Vm, snapshot: Snapshot) -> Vm:
    """Return `vm` with the configuration that the snapshot brings back.

    Raises Missing when the image that it stands on is gone.
    """
    image = images.base_of(services, snapshot)
    config = pin(vm.config, snapshot, image)
    booted = boot_files(snapshot)
    if vm.booted.digests() == booted.digests() and vm.config.boot is not None:
        # The same files: they keep the names that the user knows.
        boot = dataclasses.replace(vm.config.boot, cmdline=snapshot.boot.cmdline)
        config = dataclasses.replace(config, boot=boot)
        booted = dataclasses.replace(booted, source=boot)
    return dataclasses.replace(vm, config=config, booted=booted)


async def go_on(services: Services, vm_id: str, snapshot: Snapshot) -> None:
    """Do what is left of a restore that is recorded and staged, from whatever step it reached.

    One that fails is undone. One that is cancelled, for the agent stops, is left to the next agent.
    """
    tree, store = services.tree, services.snapshots
    vm = services.vm(vm_id)
    try:
        await services.units.kill(vm, KILL_LIMIT)
        step("restore:killed")
        await services.consoles.close(vm)
        await tree.release_disks(vm)
        await tree.in_thread("exchanging a VM's files", store.exchange, snapshot, vm)
        step("restore:exchanged")
        vm = dataclasses.replace(restored(services, vm, snapshot), **PROCESS_GONE)
        loading = Loading(snapshot, "restore", State.RESTORING)
        vm, plan = await prepare(services, vm, loading)
        await launch(services, vm, plan, loading)
    except Exception as error:
        with trio.CancelScope(shield=True):
            await undo(services, vm_id, str(error))
        raise
    step("restore:running")
    await services.index.sync(frees=True)
    step("restore:synced")
    await tree.in_thread("removing a VM's old files", store.forget_old, vm)
    step("restore:forgotten")


async def undo(services: Services, vm_id: str, error: str = "") -> None:
    """Give the VM, which has no process, the files that it had."""
    vm = services.vm(vm_id)
    try:
        await services.tree.in_thread(
            "giving a VM its files back", services.snapshots.exchange_back, vm
        )
    except CocoonError as failure:
        _log.error("the files of VM %s are left as they are: %s", vm.name, failure)
    if services.vm(vm_id).state not in RESTING:
        await ended(services, vm_id, State.ERROR, reason="restore", error=error)
    await services.save(vm_id, restoring="")


async def _unstage(services: Services, vm: Vm) -> None:
    await services.tree.in_thread(
        "removing a staged restore", services.snapshots.unstage_restore, vm
    )
