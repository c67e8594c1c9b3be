"""Changes to the hardware of a VM that runs: its CPUs, its memory, disks of the agent's own.

What is wanted is recorded before the VMM is asked (`Vm.changing`), and afterwards what came of it,
which is what the VMM says that the guest has: whoever finds such a record need only ask again.
"""

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import trio

from agent.model.config import MAXIMUM_DISKS, Disk, VmConfig
from agent.model.disks import own_disks
from agent.model.errors import Busy, CocoonError, Failed, Invalid, TimedOut, Unsupported
from agent.model.launch import LaunchPlan
from agent.model.size import show_size
from agent.model.vm import State, Vm
from agent.systemd.unit import environment_file, resource_limits, running_properties
from agent.vmm.driver import Hardware, LiveChanges, Vmm

from .affinity import check_queue_cpus
from .pause import connected
from .services import Services
from .steps import step

HARDWARE = ("cpu", "memory", "disks")
"""The keys that stand for it."""

_LET_GO_LIMIT = 5.0  # seconds that a guest has to let go of what it was asked for
_FIRST_LOOK, _LONGEST_PAUSE = 0.01, 0.25  # seconds
_log = logging.getLogger(__name__)


def keep_room(vm: Vm, config: VmConfig, changes: Mapping[str, Any]) -> VmConfig:
    """Return `config` with the maxima that the VM was started with, where they are not written.

    Else one that follows its value would go with it.
    """
    if "max_cpu" not in changes:
        config = dataclasses.replace(config, max_cpu=_most(vm.config.most_cpu, config.cpu))
    if "max_memory" not in changes:
        most = _most(vm.config.most_memory, config.memory)
        config = dataclasses.replace(config, max_memory=most)
    return config


def check(services: Services, vm: Vm, config: VmConfig, names: Collection[str]) -> None:
    """Raise Unsupported, Busy or Invalid for a change of the keys `names` that cannot be.

    It is known without asking the VMM.
    """
    keys = " and ".join(names)
    driver = services.drivers.get(vm.hypervisor)
    if driver is None or not driver.capabilities.live_changes:
        able = [each.name for each in services.drivers.values() if each.capabilities.live_changes]
        raise Unsupported(
            f"{vm.hypervisor} changes no {keys} of a VM that runs, {' and '.join(able)} does: stop "
            f"VM {vm.name} first (write stop to its state)"
        )
    if vm.state is not State.RUNNING:
        raise Busy(f"VM {vm.name} is {vm.state}: {keys} can change while it runs or is stopped")
    _check_room(vm, "max_cpu", config.cpu, vm.config.most_cpu, str)
    _check_room(vm, "max_memory", config.memory, vm.config.most_memory, show_size)
    _check_disks(vm, vm.config.disks, config.disks)
    if {*config.disks} - {*vm.config.disks}:
        check_queue_cpus(vm.name, config)


def _check_disks(vm: Vm, before: tuple[Disk, ...], after: tuple[Disk, ...]) -> None:
    # What is behind a path in the jail is bound there by its place in the list.
    fixed = max((place for place, disk in enumerate(before, 1) if disk.is_host_path), default=0)
    if before[:fixed] != after[:fixed] or any(disk.is_host_path for disk in after[fixed:]):
        raise Busy(
            f"VM {vm.name} runs: disks of the host, and those before them in the list, can change "
            "only while it is stopped"
        )
    known = {disk.name: disk for disk in before}
    for disk in after[fixed:]:
        if known.get(disk.name, disk) != disk:
            raise Busy(
                f"VM {vm.name} runs: it can be given a disk and have one taken away, but "
                f"{disk.name} itself can change only while it is stopped"
            )
    both = [*before, *(disk for disk in after if disk not in before)]
    serials = [disk.serial for disk in both if disk.serial]
    if len(both) > MAXIMUM_DISKS or len({*serials}) < len(serials):
        raise Invalid(
            f"VM {vm.name} runs, and has both old disks and new ones until its guest lets go: with "
            f"more than {MAXIMUM_DISKS}, or two of the same serial, take the old ones away first"
        )


async def change(services: Services, vm_id: str, config: VmConfig) -> None:
    """Bring the VM, which runs and whose turn it is, to `config`; `check` has found it possible.

    Raises Unsupported, Invalid or NoSpace with nothing changed. When it fails later, with Failed,
    TimedOut or Busy, the record says what was reached. One that is cancelled, for the agent stops,
    is left to the next agent.
    """
    vm = services.vm(vm_id)
    plan = await _plan(services, dataclasses.replace(vm, config=config))
    failure: CocoonError | None = None
    async with connected(services, vm) as vmm:
        live = _live(vm, vmm)
        now = await _look(live, vm, config)
        live.check(now, config)
        vm = await services.save(vm_id, changing=config, reason="configure")
        step("change:recorded")
        try:
            await _reach(services, vm, config, plan, live, now)
        except CocoonError as error:
            failure = error
    try:
        await settle(services, vm_id)
    except CocoonError as error:
        if failure is None:
            raise
        _log.warning("what became of a change to VM %s is not known yet: %s", vm.name, error)
    if failure is not None:
        raise failure


async def settle(services: Services, vm_id: str) -> None:
    """Record what came of a change that was begun, if one was; in the VM's turn."""
    vm = services.index.vms.get(vm_id)
    if vm is None or vm.changing is None or not vm.pid:
        return
    wanted = vm.changing
    async with connected(services, vm) as vmm:
        live = _live(vm, vmm)
        now = await _look(live, vm, wanted)
        after = dataclasses.replace(vm, config=_reached(vm, wanted, now))
        if now.claimed_cpu != now.cpu:
            # Else a snapshot would hold more CPUs than it goes on with.
            await live.set_cpus(now.cpu)
    plan = await _plan(services, after)
    # For systemd may start the unit again by itself.
    environment = environment_file(after, plan, services.paths(vm))
    await services.tree.write_environment(vm, environment)
    step("change:written")
    await _limit(services, after, plan)
    await services.save(vm_id, config=after.config, changing=None, reason="configure")
    step("change:settled")
    gone = {*own_disks(vm.config), *own_disks(wanted)} - {*own_disks(after.config)}
    await services.tree.remove_disks(vm, gone)
    step("change:removed")


async def check_settled(services: Services, vm_id: str) -> None:
    """Raise Busy for a VM whose guest has not let go of a disk or of a network interface.

    No snapshot with such a disk could be loaded, and from one with such an interface a guest would
    go on without it, and without having let go. What the guest let go of later than it had time to
    is recorded first. In the VM's turn.
    """
    await settle(services, vm_id)
    vm = services.vm(vm_id)
    async with connected(services, vm) as vmm:
        if vmm.live is None:
            return
        now = await _look(vmm.live, vm, vm.config)
        nics = await vmm.live.leaving_nics()
    if nics:
        raise Busy(
            f"the guest of VM {vm.name} has not let go of {' and '.join(nics)}, which came with "
            "its snapshot and no VM has here: try again once it has, or stop and start the VM"
        )
    for name, drive in own_disks(vm.config).items():
        if drive not in now.disks - now.leaving:
            raise Busy(
                f"VM {vm.name} was to lose its disk {name}: write disks without it again once the "
                "guest has let go of it, or stop the VM"
            )
    if now.cpu < vm.config.cpu:
        late = dataclasses.replace(vm.config, cpu=now.cpu)
        await services.save(vm_id, changing=keep_room(vm, late, {}), reason="configure")
        await settle(services, vm_id)


async def _reach(
    services: Services,
    vm: Vm,
    config: VmConfig,
    plan: LaunchPlan,
    live: LiveChanges,
    now: Hardware,
) -> None:
    """Give the guest what it lacks, then ask it for what it shall lose."""
    most = dataclasses.replace(config, cpu=max(config.cpu, vm.config.cpu))
    await _limit(services, dataclasses.replace(vm, config=most), plan)
    step("change:limited")
    wanted = own_disks(config)
    missing = {name: drive for name, drive in wanted.items() if drive not in now.disks}
    await services.tree.make_disks(vm, config, missing)
    step("change:made")
    if config.cpu > now.cpu:
        await live.set_cpus(config.cpu)
        step("change:cpu")
    if config.memory > now.memory:
        await live.set_memory(config.memory)
        step("change:memory")
    for drive in missing.values():
        await live.add_disk(drive, config)
        step("change:added")
    leaving = {
        name: drive
        for name, drive in own_disks(vm.config).items()
        if name not in wanted and drive in now.disks
    }
    for drive in leaving.values():
        if drive not in now.leaving:
            await live.remove_disk(drive)
    if config.cpu < now.cpu:
        await live.set_cpus(config.cpu)
    step("change:asked")
    what = [f"disk {name}" for name in leaving]
    what += [f"{now.cpu - config.cpu} of its CPUs"] if config.cpu < now.cpu else []
    with trio.move_on_after(_LET_GO_LIMIT) as scope:
        pause = _FIRST_LOOK
        while now.disks & {*leaving.values()} or now.cpu > config.cpu:
            await trio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            now = await live.hardware(vm.pid, leaving.values())
    if scope.cancelled_caught:
        raise TimedOut(
            f"the guest of VM {vm.name} did not let go of {' and '.join(what)} within "
            f"{_LET_GO_LIMIT:.0f} seconds, and keeps that until it does: write again then, or stop "
            "the VM"
        )


def _reached(vm: Vm, wanted: VmConfig, now: Hardware) -> VmConfig:
    """Return the configuration that the guest has, somewhere from the VM's own to `wanted`.

    It may have fewer CPUs than either: those that it let go of late.
    """
    before = vm.config
    most = max(before.cpu, wanted.cpu)
    if now.cpu > most or now.memory not in (before.memory, wanted.memory):
        raise Failed(
            f"the VMM of {vm.name} says that its guest has {now.cpu} CPUs and "
            f"{show_size(now.memory)} of memory, which nobody asked for: stop the VM"
        )
    drives = own_disks(before) | own_disks(wanted)
    names = {name for name, drive in drives.items() if drive in now.disks}
    known = {disk.name for disk in wanted.disks}
    disks = tuple(
        disk
        for disk in (*wanted.disks, *(disk for disk in before.disks if disk.name not in known))
        if disk.is_host_path or disk.name in names
    )
    if {*disks} == {*before.disks} and {*disks} != {*wanted.disks}:
        disks = before.disks
    if (now.cpu, now.memory, disks) == (wanted.cpu, wanted.memory, wanted.disks):
        return wanted
    reached = dataclasses.replace(before, cpu=now.cpu, memory=now.memory, disks=disks)
    return keep_room(vm, reached, {})


def _most(most: int, value: int) -> int:
    """Return the maximum `most` as the configuration keeps it: 0 where it equals the value."""
    return 0 if value == most else most


def _check_room(vm: Vm, key: str, value: int, most: int, show: Callable[[int], str]) -> None:
    if value > most:
        raise Invalid(
            f"VM {vm.name} was started with {key} {show(most)}, and cannot come to {show(value)}: "
            f"stop it and write a larger {key}"
        )


def _live(vm: Vm, vmm: Vmm) -> LiveChanges:
    if vmm.live is None:
        raise Unsupported(f"{vm.hypervisor} changes nothing of a VM that runs")
    return vmm.live


async def _look(live: LiveChanges, vm: Vm, config: VmConfig) -> Hardware:
    return await live.hardware(vm.pid, {**own_disks(vm.config), **own_disks(config)}.values())


async def _plan(services: Services, vm: Vm) -> LaunchPlan:
    driver = services.drivers[vm.hypervisor]
    return driver.plan(vm, await driver.version(), loads=vm.config.boot is None)


async def _limit(services: Services, vm: Vm, plan: LaunchPlan) -> None:
    """Let the VM's unit use what a guest of that configuration needs."""
    limits = [*resource_limits(vm, plan.memory), *running_properties(vm)]
    await services.units.set_properties(vm, limits)
