"""Operations on a VM that need no process: create, configure, rename, delegate, remove."""

import dataclasses
import logging
import time
from collections.abc import Mapping
from typing import Any

import trio

from agent.model.access import Access, Caller
from agent.model.config import KEYS, VmConfig, parse_config
from agent.model.errors import Busy, CocoonError, Exists, Invalid, NotPermitted, Unsupported
from agent.model.names import check_name
from agent.model.password import hash_password, is_hashed
from agent.model.pinned import PINNED
from agent.model.vm import State, Vm
from agent.systemd.users import remove_user

from . import images, live
from .services import RESTING, Services

_log = logging.getLogger(__name__)


async def new_vm(
    services: Services,
    caller: Caller,
    group: int,
    vm_id: str,
    name: str,
    changes: Mapping[str, Any],
) -> None:
    """Record a new VM with `changes` to the default configuration; its files come with its start.

    Raises Exists for a name taken, Invalid and the like for what cannot be configured.
    """
    check_name(name)
    config = await _configured(services, caller, VmConfig(), changes)
    if services.index.vms.named(name) is not None:
        raise Exists(f"there is a VM {name} already: choose another name or remove that one")
    config = _with_image(services, caller, config, VmConfig())
    now = time.time()
    vm = Vm(
        id=vm_id,
        name=name,
        uid=services.index.free_uid(),
        access=Access(caller.uid, group),
        config=config,
        state=State.CREATED,
        reason="create",
        generation=1,
        created_at=now,
        updated_at=now,
    )
    try:
        await services.index.vms.save(vm)
    except BaseException:
        services.index.release_uid(vm.uid)
        raise
    services.events.happened("ADDED", vm)


async def configure(
    services: Services, caller: Caller, vm_id: str, changes: Mapping[str, Any]
) -> None:
    """Merge `changes` into the configuration; what is there already may always be written."""
    await live.settle(services, vm_id)
    vm = services.vm(vm_id)
    config = await _configured(services, caller, vm.config, changes)
    if vm.state not in RESTING:
        config = live.keep_room(vm, config, changes)
    if config == vm.config:
        return
    changed = [name for name, key in KEYS.items() if key.show(config) != key.show(vm.config)]
    hardware = [name for name in live.HARDWARE if name in changed]
    if vm.state not in RESTING:
        fixed = [name for name in changed if not (KEYS[name].live or name in hardware)]
        if fixed:
            raise Busy(
                f"VM {vm.name} is {vm.state}: {', '.join(fixed)} can change only while it is "
                "stopped (write stop to its state first)"
            )
    pinned = [name for name in changed if name in PINNED]
    if vm.is_to_be_cloned and pinned:
        raise Unsupported(
            f"VM {vm.name} will be cloned from a snapshot, which fixes its {', '.join(pinned)} "
            "(neither firecracker nor a guest in mid-flight takes others): start and stop it, then "
            "write"
        )
    if config.storage < vm.config.storage and vm.started_at:
        raise Invalid(
            f"storage of VM {vm.name} is {vm.config.storage} bytes and cannot shrink: "
            "write that or more"
        )
    _check_disks(vm, config)
    if hardware and vm.state not in RESTING:
        live.check(services, vm, config, hardware)
        await live.change(services, vm_id, config)
        return
    config = _with_image(services, caller, config, vm.config)
    await services.save(vm_id, config=config, reason="configure")


def _check_disks(vm: Vm, config: VmConfig) -> None:
    """Raise Invalid for what cannot become of disks that the VM has."""
    if not vm.started_at:
        return
    if config.image != vm.config.image:
        raise Invalid(
            f"VM {vm.name} was started with a disk made from {vm.config.image or 'no image'}, "
            "which stays what it is: make another VM for another image"
        )
    sizes = {disk.name: disk.size for disk in vm.config.disks if disk.name}
    for disk in config.disks:
        if disk.size < sizes.get(disk.name, 0):
            raise Invalid(
                f"disk {disk.name} of VM {vm.name} is {sizes[disk.name]} bytes and cannot shrink: "
                "write that or more"
            )


async def rename(services: Services, vm_id: str, name: str) -> None:
    """Give the VM another name; it must have no process, for its unit carries the name."""
    check_name(name)
    vm = services.vm(vm_id)
    if name == vm.name:
        return
    if vm.state not in RESTING:
        raise Busy(f"VM {vm.name} is {vm.state}: stop it before you rename it")
    if services.index.vms.named(name) is not None:
        raise Exists(f"there is a VM {name} already: choose another name")
    await services.units.reset_failed(vm)
    await services.save(vm_id, name=name, reason="rename")


async def delegate(
    services: Services, vm_id: str, uid: int | None, gid: int | None, mode: int | None
) -> None:
    """Change owner, group or permission bits, and those of the console socket with them."""
    vm = services.vm(vm_id)
    access = Access(
        uid=vm.access.uid if uid is None else uid,
        gid=vm.access.gid if gid is None else gid,
        mode=vm.access.mode if mode is None else mode & 0o777,
    )
    if access != vm.access:
        vm = await services.save(vm_id, access=access, reason="delegate")
        await services.consoles.set_access(vm)


async def remove(services: Services, caller: Caller, vm_id: str) -> None:
    """Remove the VM with its disks; one with a process is Busy."""
    vm = services.vm(vm_id)
    if not vm.access.owned_by(caller):
        raise NotPermitted(f"only its owner or root removes VM {vm.name}")
    if vm.state not in RESTING and vm.state is not State.DELETING:
        raise Busy(f"VM {vm.name} is {vm.state}: stop or kill it before you remove it")
    vm = await services.save(vm_id, state=State.DELETING, reason="remove", frees=True)
    await finish_removal(services, vm)


async def finish_removal(services: Services, vm: Vm) -> None:
    """Remove what belongs to a VM recorded as being removed; each step can be repeated."""
    with trio.CancelScope(shield=True):
        await services.units.reset_failed(vm)
        await services.consoles.forget(vm)
        await services.tree.remove_vm(vm)
        await services.tree.in_thread("forgetting the user of the VM", remove_user, vm.uid)
        services.index.vms.forget(vm)
        services.index.release_uid(vm.uid)
        services.killed.discard(vm.id)
        await services.index.sync(frees=True)
    services.background.start_soon(empty_trash, services)
    gone = dataclasses.replace(vm, generation=vm.generation + 1, updated_at=time.time())
    services.events.happened("REMOVED", gone)


async def empty_trash(services: Services) -> None:
    """Delete the files of removed VMs, which nobody waits for."""
    try:
        await services.tree.empty_trash()
        # On a disk that was full, the index keeps room for the next removal again.
        await services.index.sync()
    except CocoonError as error:
        _log.warning("files of removed VMs stay until the agent's next start: %s", error)


async def _configured(
    services: Services, caller: Caller, base: VmConfig, changes: Mapping[str, Any]
) -> VmConfig:
    config = parse_config(base, changes, services.host_cpus)
    if not caller.is_root:
        new_paths = config.host_paths() - base.host_paths()
        if new_paths:
            raise NotPermitted(
                f"{min(new_paths)} is a path of the host, which only root may name: use the name "
                "of a file that root put into the agent's boot directory"
            )
    if config.password and not is_hashed(config.password):
        hashed = await trio.to_thread.run_sync(hash_password, config.password)
        config = dataclasses.replace(config, password=hashed)
    if config.boot != base.boot:
        await services.kernels.check(config.boot)
    return config


def _with_image(services: Services, caller: Caller, config: VmConfig, before: VmConfig) -> VmConfig:
    """Return `config` with what its `image` names; nothing may wait between this and the record.

    Else the image could be removed meanwhile.
    """
    if config.image == before.image:
        return config
    base = images.configured(services, caller, config.image)
    # As if written, for the checks that need to know its size.
    return parse_config(dataclasses.replace(config, base=base), {}, services.host_cpus)
