"""What the operations work with, and how they record what they did."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import trio

from agent.console.consoles import Consoles
from agent.index.store import Index
from agent.model.errors import CocoonError, Missing
from agent.model.vm import State, Vm
from agent.storage.archive import Layout
from agent.storage.images import ImageStore
from agent.storage.kernel import KernelStore
from agent.storage.snapshots import SnapshotStore
from agent.storage.tree import Tree
from agent.systemd.exit_record import ExitRecord, read_exit_record
from agent.systemd.unit import Paths
from agent.vmm.driver import Driver

from .events import Events
from .operation import Work
from .rush import Rush
from .units import Units


@dataclass
class Services:
    """The rooms below, as one value that every operation gets.

    `background` runs what nobody waits for, `in_turn` the agent's own work on a VM once its turn
    comes, `rush` tells when there is time for it. `killed` holds the ids of VMs whose end a user
    asked for since their last start began, whatever else it looks like, `killing` the ends of the
    kills under way. `claim_host` raises Busy when another agent runs VMs on this host. `jail` is
    the skeleton that all VMMs start in. `reserved` are the names of snapshots on their way in,
    `reserved_images` those of images, `layouts` those of archives, by snapshot, and `reading`
    limits the threads that read them.
    """

    index: Index
    units: Units
    consoles: Consoles
    tree: Tree
    kernels: KernelStore
    drivers: Mapping[str, Driver]
    events: Events
    background: trio.Nursery
    in_turn: Callable[[str, Work], None]
    host_cpus: int
    jail: str
    claim_host: Callable[[], None]
    snapshots: SnapshotStore
    images: ImageStore
    rush: Rush = field(default_factory=Rush)
    killed: set[str] = field(default_factory=set)
    killing: dict[str, trio.Event] = field(default_factory=dict)
    reserved: set[str] = field(default_factory=set)
    reserved_images: set[str] = field(default_factory=set)
    layouts: dict[str, Layout] = field(default_factory=dict)
    reading: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(8))

    def vm(self, vm_id: str) -> Vm:
        """Return the record as it is now; raise Missing when the VM was removed meanwhile."""
        vm = self.index.vms.get(vm_id)
        if vm is None:
            raise Missing("the VM was removed meanwhile")
        return vm

    def paths(self, vm: Vm) -> Paths:
        """Return where the parts of the VM's unit lie on the host."""
        tree = self.tree
        return Paths(tree.run_directory(vm.id), tree.directory(vm.id), self.jail)

    def exit_record(self, vm: Vm) -> ExitRecord | None:
        """Return how the VM's last process ended; None when none has since the last start."""
        return read_exit_record(self.paths(vm).exit_record)

    async def open_console(self, vm: Vm) -> None:
        """Make the console ready for the VM's VMM, or take over that of one that runs."""
        driver = self.drivers.get(vm.hypervisor)
        by_socket = driver is not None and driver.capabilities.serial_socket
        await self.consoles.open(vm, serial_socket=by_socket)

    def note(self, vm_id: str, **changes: Any) -> Vm:
        """Commit a transition that can be found out again after a crash, and tell of it."""
        vm = self._next(vm_id, changes)
        self.index.vms.note(vm)
        self.events.happened("MODIFIED", vm)
        return vm

    async def save(self, vm_id: str, *, frees: bool = False, **changes: Any) -> Vm:
        """Commit a transition that must not be lost, and tell of it once it is on disk.

        One that `frees` room is committed on a full disk too.
        """
        vm = self._next(vm_id, changes)
        await self.index.vms.save(vm, frees=frees)
        self.events.happened("MODIFIED", vm)
        return vm

    async def flush(self) -> None:
        """Wait until what was noted is on disk.

        Where that fails it is done all the same, and goes with the next commit.
        """
        with contextlib.suppress(CocoonError):
            await self.index.sync()

    def note_error(self, vm_id: str, error: str) -> None:
        """Set the sentence in the VM's `error` file; no transition, so no event."""
        vm = self.index.vms.get(vm_id)
        if vm is not None and vm.error != error:
            self.index.vms.note(dataclasses.replace(vm, error=error))

    def _next(self, vm_id: str, changes: Mapping[str, Any]) -> Vm:
        vm = self.vm(vm_id)
        return dataclasses.replace(
            vm, **changes, generation=vm.generation + 1, updated_at=time.time()
        )


PROCESS_GONE: Mapping[str, Any] = {"pid": 0, "user_paused": False}
"""Changes that go with every transition to a state without a process."""

RESTING = frozenset({State.CREATED, State.STOPPED, State.ERROR})
"""States in which nothing runs and nothing is under way."""
