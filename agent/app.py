"""Builds the rooms, hands them to each other, and runs them until told to stop."""

import functools
import grp
import logging
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from . import logs
from .console.consoles import Consoles
from .console.inherited import Inherited
from .fs.mount import mounted
from .index.store import open_index
from .lifecycle.clone import tell_unwritten, write_out
from .lifecycle.configure import empty_trash
from .lifecycle.doctor import Doctor
from .lifecycle.events import Events
from .lifecycle.host import Host, report
from .lifecycle.operation import Operations
from .lifecycle.pause import resume_held
from .lifecycle.reconcile import ask_vmms, host_has_booted, reconcile
from .lifecycle.recover import clear_images, clear_snapshots, is_unfinished, recover
from .lifecycle.services import Services
from .lifecycle.units import Units
from .lifecycle.watch import watch
from .lock import VmsLock, only_agent
from .model.access import AGENT
from .model.errors import CocoonError
from .model.finding import Finding
from .model.vm import State
from .service import Service
from .settings import Settings
from .storage.images import ImageStore
from .storage.kernel import KernelStore
from .storage.snapshots import SnapshotStore
from .storage.tree import Tree
from .systemd.bus import BusGone, open_bus
from .systemd.drop_in import drop_in, write_drop_in
from .systemd.facts import SystemdAnswers, systemd_answers
from .systemd.jail import make_jail
from .systemd.manager import Manager, open_manager
from .vmm.cloud_hypervisor import CloudHypervisor
from .vmm.driver import Driver
from .vmm.firecracker import Firecracker
from .vmm.qemu import Qemu

_HELPERS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "helpers")
_log = logging.getLogger(__name__)


async def run(settings: Settings, load: Callable[[], Settings]) -> None:
    """Run the agent until SIGTERM or SIGINT; VMs go on when it ends.

    `load` gives the settings anew on SIGHUP. Raises CocoonError, saying what to do, when the agent
    cannot start; groups of errors hold faults only.
    """
    inherited = Inherited(os.environ)
    tree = Tree(settings.root_dir, settings.run_dir)
    await tree.prepare()
    with only_agent(tree.root):
        async with (
            open_index(tree.index) as index,
            open_bus() as bus,
            open_manager(bus) as manager,
            _lasting_nursery() as lasting,
            trio.open_nursery() as nursery,
        ):
            service = Service()
            await _prepare_systemd(tree, manager)
            events = Events(tree.log, settings.events_limit)
            # Operations that are cut off tell of it, and close consoles, when all else ends.
            lasting.start_soon(events.run)
            consoles = Consoles(
                tree.run, tree.log, log_limit=settings.console_limit, inherited=inherited
            )
            await lasting.start(consoles.run)
            drivers = _drivers(settings)
            doctor = Doctor(drivers, tree, settings.group)
            nursery.start_soon(doctor.run, bus)
            operations = Operations(
                nursery, lambda caller, vm_id, error: report(services, caller, vm_id, error)
            )
            services = Services(
                index=index,
                units=Units(manager, bus),
                consoles=consoles,
                tree=tree,
                kernels=KernelStore(tree),
                drivers=drivers,
                events=events,
                background=nursery,
                in_turn=operations.run_in_turn,
                host_cpus=os.cpu_count() or 1,
                jail=_jail(tree),
                claim_host=VmsLock().claim,
                snapshots=SnapshotStore(tree),
                images=ImageStore(tree),
            )
            booted = await host_has_booted(services)
            unfinished = [vm for vm in index.vms.all() if is_unfinished(vm)]
            for vm in unfinished:
                operations.run_in_turn(vm.id, functools.partial(recover, services, vm.id))
            await nursery.start(watch, services, operations)
            running = await reconcile(services, unfinished)
            await clear_snapshots(services)
            await clear_images(services)
            for vm in index.vms.all():
                if vm.unwritten and booted:
                    operations.run_in_turn(
                        vm.id, functools.partial(tell_unwritten, services, vm.id)
                    )
                elif vm.unwritten:
                    nursery.start_soon(write_out, services, vm.id)
            nursery.start_soon(empty_trash, services)
            host = Host(services, operations, _group(settings.group), doctor)
            nursery.start_soon(
                service.obey_signals,
                nursery.cancel_scope.cancel,
                functools.partial(_reload, load),
            )
            # Before anybody may ask for something: that waits for the answers.
            ask_vmms(services, running)
            async with mounted(host, settings.mount):
                service.ready()
                nursery.start_soon(resume_held, services, operations)
                nursery.start_soon(service.feed_watchdog, settings.mount)
                nursery.start_soon(service.show_status, functools.partial(_status, host))
                if booted:
                    _autostart(host)
                try:
                    await trio.sleep_forever()
                finally:
                    service.stopping()


async def examine(settings: Settings) -> list[Finding]:
    """Look at this host as an agent with these settings would; none need run."""
    doctor = Doctor(_drivers(settings), Tree(settings.root_dir, settings.run_dir), settings.group)
    try:
        async with open_bus() as bus:
            answers = await systemd_answers(bus)
    except BusGone as error:
        answers = SystemdAnswers(trouble=str(error))
    return await doctor.examine(answers)


def _drivers(settings: Settings) -> dict[str, Driver]:
    """Return all backends, by name."""
    drivers: tuple[Driver, ...] = (
        CloudHypervisor(settings.cloud_hypervisor),
        Firecracker(settings.firecracker),
        Qemu(settings.qemu),
    )
    return {driver.name: driver for driver in drivers}


@asynccontextmanager
async def _lasting_nursery() -> AsyncIterator[trio.Nursery]:
    """Lend a nursery whose tasks run until the body has ended, however that ends."""
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        finally:
            nursery.cancel_scope.cancel()


async def _prepare_systemd(tree: Tree, manager: Manager) -> None:
    """Make what all VMs' units share: the jail's skeleton and the drop-in."""
    await tree.in_thread("making the jail", make_jail, _jail(tree))
    text = drop_in(_HELPERS, sys.executable)
    if await tree.in_thread("writing the drop-in of the VMs' units", write_drop_in, text):
        await manager.reload()


def _jail(tree: Tree) -> str:
    return f"{tree.run}/jail"


def _group(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        _log.warning(
            "there is no group %s: only root creates VMs (groupadd --system %s)", name, name
        )
        return 0


def _reload(load: Callable[[], Settings]) -> None:
    try:
        settings = load()
    except CocoonError as error:
        _log.error("the settings stay as they are: %s", error)
        return
    logs.set_level(settings.log_level)
    _log.info("settings read again; what is not log_level holds from the next start")


def _status(host: Host) -> str:
    counts = Counter(vm.state for vm in host.vms())
    running = counts[State.RUNNING] + counts[State.PAUSED]
    failed = f", {counts[State.ERROR]} in error" if counts[State.ERROR] else ""
    return f"{sum(counts.values())} VMs, {running} running{failed}"


def _autostart(host: Host) -> None:
    for vm in host.vms():
        # Whatever it ended with before the boot; what is still to be recovered has its turn first.
        if vm.config.autostart and vm.state not in (State.RUNNING, State.PAUSED):
            host.command(AGENT, vm.id, "start")
