"""The way up: choose a backend, prepare the files, start the unit, wait until the guest runs."""

import dataclasses
import functools
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import trio

from agent.model import canonical
from agent.model.config import HYPERVISORS
from agent.model.errors import CocoonError, Exists, Failed, Invalid, Missing, TimedOut, Unsupported
from agent.model.launch import Bind, LaunchPlan
from agent.model.seed import instance_id, seed_for_boot
from agent.model.snapshot import STATE_FILES, Snapshot
from agent.model.vm import FIRMWARE_FORMATS, BootFiles, DirtyBase, State, Vm
from agent.systemd.unit import environment_file, running_properties, vm_unit
from agent.systemd.users import write_user
from agent.vmm.driver import Driver, Version, Vmm, VmmState

from . import images
from .affinity import check_queue_cpus
from .pause import connected
from .services import RESTING, Services
from .steps import step
from .stop import KILL_LIMIT, check_not_killed, describe_exit, ended, last_words, let_go

_AFTERWARDS = 0.01  # seconds
_LATEST = 5.0  # seconds after which a VM is shown, however many others start
_UNDO_LIMIT = 15.0  # seconds
_FIRST_LOOK = 0.002  # seconds
_log = logging.getLogger(__name__)
_START_LIMIT = 60.0  # seconds, from the contract's table of verbs


@dataclass(frozen=True, slots=True)
class Loading:
    """That a start goes on from `snapshot`; `state` is what the VM is in until it runs."""

    snapshot: Snapshot
    reason: str
    state: State = State.STARTING


async def start(services: Services, vm_id: str) -> None:
    """Start the VM; returns when its guest runs.

    All that can be refused is checked and prepared before the unit is started; when it fails after
    that, the unit is ended and the VM is in error.
    """
    vm = services.vm(vm_id)
    if vm.state is State.RUNNING:
        return
    if vm.state not in RESTING:
        raise Invalid(f"VM {vm.name} is {vm.state}: start takes one that is created or stopped")
    with trio.move_on_after(_START_LIMIT) as scope:
        prepared, plan = await prepare(services, vm)
        await launch(services, prepared, plan)
    if scope.cancelled_caught:
        late = TimedOut(
            f"VM {vm.name} did not start within {_START_LIMIT:.0f} seconds: "
            f"see journalctl -u {vm.unit}"
        )
        await cut_off(services, vm_id, late)
        raise late


async def recollect(services: Services, vm_id: str) -> Vm:
    """Record what an agent that died right after the VM's first start had no time to record."""
    vm = services.vm(vm_id)
    if vm.hypervisor:
        return vm
    loads = vm.is_to_be_cloned
    booted = vm.booted if loads else await _store_boot_files(services, vm)
    vm = dataclasses.replace(vm, booted=booted, seed=vm.seed if loads else seed_for_boot(vm))
    vm, _ = await plan_launch(services.drivers, vm, loads=loads)
    return services.note(
        vm_id,
        hypervisor=vm.hypervisor,
        hypervisor_version=vm.hypervisor_version,
        booted=booted,
        seed=vm.seed,
    )


async def plan_launch(
    by_name: Mapping[str, Driver], vm: Vm, *, loads: bool = False, nics: int = 0
) -> tuple[Vm, LaunchPlan]:
    """Return `vm` with its backend chosen, and what to launch; Unsupported says why not.

    With `loads` it goes on from a snapshot, whose guest has so many `nics`.
    """
    if vm.config.hypervisor != "auto":
        driver = by_name.get(vm.config.hypervisor)
        if driver is None:
            raise Unsupported(
                f"this version of the agent has no backend {vm.config.hypervisor}: "
                f"set hypervisor to one of {', '.join(by_name)}"
            )
        return _planned(by_name, vm, driver, await driver.version(), loads, nics)
    drivers = [by_name[name] for name in HYPERVISORS if name in by_name]
    obstacles = {driver.name: await driver.obstacle() for driver in drivers}
    reasons = []
    # Those that most guests would fail on come last, and better than nothing.
    for driver in sorted(drivers, key=lambda driver: bool(obstacles[driver.name])):
        try:
            return _planned(by_name, vm, driver, await driver.version(), loads, nics)
        except CocoonError as error:
            reasons.append(f"{driver.name}: {error}")
    raise Unsupported(f"no backend of this host can run VM {vm.name}: {'; '.join(reasons)}")


def _planned(
    by_name: Mapping[str, Driver], vm: Vm, driver: Driver, version: Version, loads: bool, nics: int
) -> tuple[Vm, LaunchPlan]:
    _check_firmware(by_name, vm, driver)
    if nics and not driver.capabilities.live_changes:
        raise Unsupported(
            f"the snapshot has {nics} network interfaces, which VMs do not have here, and "
            f"{driver.name} cannot take them out: take it again of a VM without"
        )
    if vm.seed and not driver.capabilities.first_boot_seed:
        raise Unsupported(
            f"{driver.name} VMs get no first-boot configuration: leave out hostname, user, "
            "password, ssh_keys and user_data"
        )
    _check_affinity(by_name, vm, driver)
    base, config = vm.config.base, vm.config
    if base is not None and base.format == "raw" and not (vm.started_at or vm.from_snapshot):
        # Whichever the first backend has, a copy or an overlay, the disk stays.
        copied = not driver.capabilities.qcow2
        config = dataclasses.replace(config, base=dataclasses.replace(base, copied=copied))
    vm = dataclasses.replace(
        vm, config=config, hypervisor=driver.name, hypervisor_version=version.text
    )
    return vm, driver.plan(vm, version, loads=loads, nics=nics)


def _check_firmware(by_name: Mapping[str, Driver], vm: Vm, driver: Driver) -> None:
    """Raise Unsupported for a firmware that `driver` does not boot, with the names of who does."""
    kind = vm.booted.firmware_format
    if not kind or driver.capabilities.firmware == kind:
        return
    others = [name for name, each in by_name.items() if each.capabilities.firmware == kind]
    name = vm.config.boot.firmware if vm.config.boot else "the firmware"
    raise Unsupported(
        f"{driver.name} cannot boot {name} ({FIRMWARE_FORMATS[kind]}): "
        + (f"{' and '.join(others)} can" if others else "no backend can")
    )


def _check_affinity(by_name: Mapping[str, Driver], vm: Vm, driver: Driver) -> None:
    if not vm.config.ties_queues or driver.capabilities.queue_affinity:
        return
    able = [name for name, each in by_name.items() if each.capabilities.queue_affinity]
    raise Unsupported(
        f"{driver.name} ties no queues of disks to CPUs of the host, {' and '.join(able)} does: "
        "write [] to queue_affinity, or another hypervisor"
    )


async def prepare(
    services: Services, vm: Vm, loading: Loading | None = None
) -> tuple[Vm, LaunchPlan]:
    """Make all that the unit needs; nothing of it changes what the VM is.

    For a VM that is loaded, its directory has been filled already.
    """
    services.claim_host()
    if vm.config.cpu > services.host_cpus:
        raise Invalid(f"VM {vm.name} has {vm.config.cpu} CPUs, this host {services.host_cpus}")
    check_queue_cpus(vm.name, vm.config)
    base = await _base(services, vm)
    if loading is None and services.snapshots.has_loaded(vm):
        forgetting = f"removing what VM {vm.name} was loaded from"
        await services.tree.in_thread(forgetting, services.snapshots.forget_loaded, vm)
    if loading is None or vm.config.boot is not None:
        vm = dataclasses.replace(vm, booted=await _store_boot_files(services, vm))
    has_seed = bool(vm.seed)
    vm = with_seed(vm, loading)
    nics = loading.snapshot.nics if loading else 0
    vm, plan = await plan_launch(services.drivers, vm, loads=loading is not None, nics=nics)
    binds = (*plan.binds, *await _boot_binds(services, vm), *_base_binds(vm, base))
    plan = dataclasses.replace(plan, binds=binds)
    if loading is not None:
        plan = dataclasses.replace(plan, binds=(*plan.binds, *_bound(services, vm, loading)))
    environment = environment_file(vm, plan, services.paths(vm), boot=loading is None)
    try:
        # In memory, as all of /run. First: by it the next agent sees what to give back.
        write_user(vm.uid)
        devices = await services.tree.prepare_vm(vm, plan.files, environment, base)
        if vm.seed or has_seed:
            await services.tree.write_seed(vm, loads=loading is not None)
        await services.open_console(vm)
    except BaseException:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _UNDO_LIMIT):
            await let_go(services, vm)
        raise
    return vm, dataclasses.replace(plan, devices=(*plan.devices, *devices))


def with_seed(vm: Vm, loading: Loading | None) -> Vm:
    """Return `vm` with the seed that it has once it boots or, with `loading`, goes on.

    Then there is one if the snapshot had one: the VMM's state fixes what disks there are.
    """
    if loading is None:
        seed = seed_for_boot(vm)
    else:
        seed = instance_id(vm) if loading.snapshot.has_file(canonical.SEED) else ""
    return dataclasses.replace(vm, seed=seed)


async def _base(services: Services, vm: Vm) -> str:
    """Return the path of the image behind the VM's disk, "" for none; raise Missing when gone."""
    image = images.of_vm(services, vm)
    if image is None:
        return ""
    return await services.tree.in_thread("looking at an image", services.images.check, image)


def _base_binds(vm: Vm, path: str) -> Iterator[Bind]:
    """Return what puts the image where an overlay's VMM looks for it."""
    base = vm.config.base
    if base is not None and not base.copied:
        yield Bind(path, canonical.base_path(base.digest, base.format))


async def _store_boot_files(services: Services, vm: Vm) -> BootFiles:
    boot = vm.config.boot
    if vm.config.is_disk_boot and _has_firmware(services, vm):
        return BootFiles()
    if boot is None and vm.from_snapshot:
        raise Missing(
            f"VM {vm.name} came from a snapshot without its kernel or firmware, so it cannot boot "
            'again: write {"kernel": NAME} or {"firmware": NAME} to its boot file, with a file '
            "from the agent's boot directory"
        )
    if boot is None:
        raise Invalid(
            f'VM {vm.name} has nothing to boot: write {{"kernel": NAME}} or {{"firmware": NAME}} '
            "to its boot file, with a file from the agent's boot directory"
        )
    return await services.kernels.store(boot, before=vm.booted)


def _has_firmware(services: Services, vm: Vm) -> bool:
    """Whether a backend that may run the VM boots disks."""
    named = services.drivers.get(vm.config.hypervisor)
    drivers = [named] if named else services.drivers.values()
    return any(driver.capabilities.disk_boot for driver in drivers)


async def _boot_binds(services: Services, vm: Vm) -> tuple[Bind, ...]:
    """Return what puts the boot files where the VMM looks for them."""
    binds = []
    if vm.booted.kernel:
        needs_elf = services.drivers[vm.hypervisor].capabilities.elf_kernel
        kernel = services.kernels.path(vm.booted.kernel)
        if needs_elf:
            name = vm.config.boot.kernel if vm.config.boot else "the kernel"
            kernel = await services.kernels.elf(vm.booted.kernel, name)
        binds.append(Bind(kernel, canonical.KERNEL))
    if vm.booted.initrd:
        binds.append(Bind(services.kernels.path(vm.booted.initrd), canonical.INITRD))
    if vm.booted.firmware:
        binds.append(Bind(services.kernels.path(vm.booted.firmware), canonical.FIRMWARE))
    return tuple(binds)


def _bound(services: Services, vm: Vm, loading: Loading) -> Iterator[Bind]:
    """Return what puts disks where the VMM's state expects them."""
    for bound in loading.snapshot.bound:
        yield Bind(services.snapshots.bound(vm, bound.name), bound.path, readonly=False)


async def launch(
    services: Services, vm: Vm, plan: LaunchPlan, loading: Loading | None = None
) -> None:
    """Start the unit and wait until the guest runs; else end it and leave the VM in error.

    One that is cancelled because the agent stops is left as it is: the next agent adopts the VM.
    Who cancels it for another reason calls `cut_off`.
    """
    began, again = time.time(), bool(vm.started_at)
    try:
        if vm.state is State.ERROR:
            await services.units.reset_failed(vm)
        check_not_killed(services, vm)
        changes: dict[str, Any] = {
            "state": loading.state if loading else State.STARTING,
            "reason": loading.reason if loading else "boot",
            "error": "",
            "config": vm.config,
            "hypervisor": vm.hypervisor,
            "hypervisor_version": vm.hypervisor_version,
            "booted": vm.booted,
            "seed": vm.seed,
            "changing": None,
            "started_at": began,
        }
        if vm.config.base is not None and not vm.started_at:
            # Nothing tells later which kind of disk was made from the image.
            vm = await services.save(vm.id, **changes)
        else:
            vm = services.note(vm.id, **changes)
        properties = vm_unit(_restartable(vm, plan), plan, services.paths(vm))
        if loading is None:
            # A boot is not throttled by what leaves room for the guest and its devices.
            properties += running_properties(vm)
        result = await services.units.start(vm, properties)
        check_not_killed(services, vm)
        if result != "done":
            raise await _failure(services, vm, f"systemd says {result}")
        unit = await services.units.started_state(vm)
        if unit is None or not unit.main_pid:
            raise await _failure(services, vm, "it ended")
        await _wait_until_running(services, vm, plan, unit.main_pid, loading)
        if loading is not None:
            step(f"{loading.reason}:loaded")
            await loaded(services, vm, plan, loading, unit.main_pid)
            return
        check_not_killed(services, vm)
        # A VM that runs has a console that outlives the agent.
        await services.consoles.keep(vm, unit.main_pid)
        services.note(
            vm.id, state=State.RUNNING, pid=unit.main_pid, first_booted=True, restored_by=""
        )
        services.background.start_soon(show_machine, services, vm.id)
        if again:
            # In turn: a disk that is being added is in no record yet.
            remove = functools.partial(_remove_stale_disks, services, vm.id, unit.main_pid)
            services.in_turn(vm.id, remove)
    except Exception as error:
        await _fail(services, vm, error)
        raise


async def cut_off(services: Services, vm_id: str, late: TimedOut) -> None:
    """End the VM whose launch was cancelled, if it had come so far, and leave it in error."""
    vm = services.vm(vm_id)
    if vm.state not in RESTING:
        await _fail(services, vm, late)


async def _fail(services: Services, vm: Vm, error: Exception) -> None:
    with trio.CancelScope(shield=True, deadline=trio.current_time() + _UNDO_LIMIT):
        if not isinstance(error, Exists):  # else the unit is somebody else's
            await services.units.kill(vm, KILL_LIMIT)
        await ended(services, vm.id, State.ERROR, reason="crash", error=str(error))


async def loaded(services: Services, vm: Vm, plan: LaunchPlan, loading: Loading, pid: int) -> None:
    """Record that the process `pid` has loaded its guest."""
    # What systemd restarts by itself boots from its own disk.
    environment = environment_file(vm, plan, services.paths(vm))
    await services.tree.write_environment(vm, environment)
    await services.consoles.keep(vm, pid)
    check_not_killed(services, vm)
    services.note(
        vm.id,
        state=State.RUNNING,
        reason=loading.reason,
        config=vm.config,
        booted=vm.booted,
        pid=pid,
        restored_by=plan.restore_mode,
        user_paused=False,
        first_booted=True,
        unwritten=loading.state is State.STARTING,  # those of a restore are written first
        restoring="",
        changing=None,
        seed=vm.seed,
        seeded="",  # the guest is the one that the snapshot was taken of
        dirty_base=DirtyBase(loading.snapshot.id, pid) if vm.config.track_dirty else None,
    )
    services.background.start_soon(look_after, services, vm.id)


def _restartable(vm: Vm, plan: LaunchPlan) -> Vm:
    """Return `vm` as systemd may restart it: not at all without anything to boot."""
    if plan.boot_arguments:
        return vm
    return dataclasses.replace(vm, config=dataclasses.replace(vm.config, restart="no"))


async def _wait_until_running(
    services: Services, vm: Vm, plan: LaunchPlan, pid: int, loading: Loading | None
) -> None:
    """Wait until the VMM answers that its guest runs; raise Failed when it ends instead."""
    driver = services.drivers[vm.hypervisor]
    is_empty = loading is not None and not plan.load_arguments
    began = trio.current_time()
    async with _process(pid) as ended:
        while not (services.tree.has_socket(vm) and driver.answers(pid, loads=is_empty)):
            # Looks follow each other by a fixed part of the time gone by: a start that takes 20 ms
            # is seen within 2, and 64 starts at once that take a second each cost next to nothing.
            if await ended(max(_FIRST_LOOK, (trio.current_time() - began) / 8)):
                raise await _failure(services, vm, "it ended")
    try:
        async with connected(services, vm) as vmm:
            if loading is not None:
                await _load(vm, plan, vmm, loading)
                return
            state = await vmm.state()
    except CocoonError as error:
        raise await _failure(services, vm, str(error)) from error
    if state is not VmmState.RUNNING:
        raise await _failure(services, vm, "its guest does not run")


async def _load(vm: Vm, plan: LaunchPlan, vmm: Vmm, loading: Loading) -> None:
    files = STATE_FILES[vm.hypervisor]
    state, memory = (f"{canonical.VM}/{name}" for name in (files.state, files.memory))
    replaces_nics = loading.snapshot.nics > 0
    await vmm.load(
        state,
        memory,
        track_dirty=vm.config.track_dirty,
        restore_mode=plan.restore_mode,
        resume=not replaces_nics,
    )
    if replaces_nics:
        step(f"{loading.reason}:paused")
        assert vmm.live is not None
        # They are connected to nothing. VMs have no networks yet: nothing takes their place.
        await vmm.live.remove_nics()
        step(f"{loading.reason}:unplugged")
        await vmm.resume()


@asynccontextmanager
async def _process(pid: int) -> AsyncIterator[Callable[[float], Awaitable[bool]]]:
    """Give a function that waits, some seconds at most, for the process to end."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        descriptor = -1

    async def ended(within: float) -> bool:
        if descriptor < 0:
            return True
        with trio.move_on_after(within):
            await trio.lowlevel.wait_readable(descriptor)
            return True
        return False

    try:
        yield ended
    finally:
        if descriptor >= 0:
            os.close(descriptor)


async def _failure(services: Services, vm: Vm, what: str) -> CocoonError:
    record = services.exit_record(vm)
    status = f" ({describe_exit(record)})" if record else ""
    words = await last_words(services, vm)
    said = f": {words}" if words else ""
    return Failed(f"{vm.hypervisor} did not start VM {vm.name}: {what}{status}{said}")


async def look_after(services: Services, vm_id: str) -> None:
    """Do what a VM needs that runs already or has loaded its guest: fd store, quota, machined.

    Each of it can be repeated; an agent that died in between is made good by the next.
    """
    vm = services.index.vms.get(vm_id)
    if vm is not None and vm.pid:
        with _reporting_trouble(services, vm):
            await services.consoles.keep(vm, vm.pid)
            now = services.index.vms.get(vm_id)
            if now is not None and now.pid == vm.pid:
                await services.units.set_properties(now, running_properties(now))
    await show_machine(services, vm_id)


async def show_machine(services: Services, vm_id: str) -> None:
    """Show the VM in `machinectl`, a moment after all who wait for a start have been told."""
    await trio.sleep(_AFTERWARDS)
    await services.rush.over(_LATEST)
    vm = services.index.vms.get(vm_id)
    if vm is not None and vm.pid:
        with _reporting_trouble(services, vm):
            await services.units.register_machine(vm)


async def _remove_stale_disks(services: Services, vm_id: str, pid: int) -> None:
    """Remove disks that were taken out of the configuration, now that `pid` has run without."""
    vm = services.index.vms.get(vm_id)
    if vm is not None and vm.pid == pid and vm.changing is None:
        with _reporting_trouble(services, vm):
            await services.tree.remove_stale_disks(vm)


@contextmanager
def _reporting_trouble(services: Services, vm: Vm) -> Iterator[None]:
    try:
        yield
    except CocoonError as error:
        now = services.index.vms.get(vm.id)
        if now is not None and now.pid == vm.pid:
            _log.warning("VM %s runs, but not all about it is set up: %s", vm.name, error)
