"""What the filesystem may ask for: the one door into the lifecycle."""

import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import trio

from agent.console.consoles import Consoles
from agent.model.access import AGENT, Caller
from agent.model.errors import CocoonError, Exists, Invalid
from agent.model.names import check_name, new_id
from agent.model.vm import State, Vm

from . import clone, configure, pause, restore, snapshot, stop
from .describe import describe_index, describe_vm
from .doctor import Doctor
from .events import Events
from .operation import Operation, Operations
from .services import Services
from .shelf import ImageShelf, Shelf

VERBS = ("start", "stop", "kill", "pause", "resume", "restart")
_STATS_LIMIT = 1.0  # seconds that systemd and the VMM have for their figures


class Host:
    """All VMs of this host. Reading never waits; what changes something returns an Operation.

    A refusal that is known at once is raised by the call itself, all others by the Operation's
    `wait`; both are recorded by the time they are raised.
    """

    def __init__(
        self, services: Services, operations: Operations, group: int, doctor: Doctor
    ) -> None:
        self._services = services
        self._operations = operations
        self.group = group
        self.doctor = doctor
        self.snapshots = Shelf(services, operations, group)
        self.images = ImageShelf(services, operations, group)

    @property
    def events(self) -> Events:
        return self._services.events

    @property
    def consoles(self) -> Consoles:
        return self._services.consoles

    def vms(self) -> list[Vm]:
        """Return all VMs, in no order."""
        return self._services.index.vms.all()

    def vm_names(self) -> list[str]:
        """Return the names of all VMs, in no order."""
        return self._services.index.vms.names()

    def find_vm(self, name: str) -> Vm | None:
        """Return the VM of that name."""
        return self._services.index.vms.named(name)

    def find_vm_by_id(self, vm_id: str) -> Vm | None:
        """Return the VM of that id."""
        return self._services.index.vms.get(vm_id)

    def info(self, vm: Vm) -> dict[str, Any]:
        """Return the full record of `vm`, in Cocoon's shape with our keys on top."""
        return describe_vm(vm)

    def index_document(self) -> dict[str, Any]:
        """Return the whole index, in Cocoon's shape."""
        return describe_index(self.vms())

    async def stats(self, vm: Vm) -> str:
        """Return `key value` lines: what systemd counts for the unit, and the VMM for its guest.

        What cannot be had within a second is left out.
        """
        figures: dict[str, int] = {}
        if vm.has_process:
            with trio.move_on_after(_STATS_LIMIT):
                try:
                    figures.update(await self._services.units.usage(vm))
                    async with pause.connected(self._services, vm) as vmm:
                        figures.update(await vmm.stats())
                except CocoonError as error:
                    logging.getLogger(__name__).debug("no stats of %s: %s", vm.name, error)
        return "".join(f"{name} {value}\n" for name, value in figures.items())

    def create(self, caller: Caller, name: str) -> Operation:
        """Create a VM with the default configuration, the caller's own."""
        return self.create_document(caller, {"name": name})

    def create_document(self, caller: Caller, document: Mapping[str, Any]) -> Operation:
        """Create a VM from one object: `name`, keys of its configuration, `from` and `state`.

        With `"state": "start"` it is started too; if that fails there is no VM.
        """
        changes = dict(document)
        name, verb = changes.pop("name", None), changes.pop("state", None)
        source = changes.pop("from", "")
        with self.reporting(caller):
            if not isinstance(name, str):
                raise Invalid('create takes a JSON object with at least {"name": NAME}')
            if verb not in (None, "created", "start"):
                raise Invalid(f"state {verb!r} is nothing to create VM {name} with: only start is")
            check_name(name)
            if self.find_vm(name) is not None:
                raise Exists(f"there is a VM {name} already: choose another name")
            _check_source(source)

        vm_id = new_id()

        async def work() -> None:
            first = {} if source else changes
            await configure.new_vm(self._services, caller, self.group, vm_id, name, first)
            try:
                if source:
                    await clone.set_source(self._services, caller, vm_id, source)
                    await configure.configure(self._services, caller, vm_id, changes)
                if verb == "start":
                    await clone.start_or_clone(self._services, vm_id)
            except CocoonError:
                await configure.remove(self._services, AGENT, vm_id)
                raise

        return self._operations.submit(caller, vm_id, work)

    def configure(self, caller: Caller, vm_id: str, changes: Mapping[str, Any]) -> Operation:
        """Merge `changes` into the VM's configuration.

        `from` may name a snapshot, which counts first, and `state` a verb, which is run afterwards.
        """
        values = dict(changes)
        verb, source = values.pop("state", None), values.pop("from", None)
        with self.reporting(caller, vm_id):
            if verb is not None:
                _check_verb(verb)
            if source is not None:
                _check_source(source)

        async def work() -> None:
            if source is not None:
                await clone.set_source(self._services, caller, vm_id, source)
            await configure.configure(self._services, caller, vm_id, values)
            if verb is not None:
                await self._run(vm_id, verb)

        return self._operations.submit(caller, vm_id, work)

    def command(self, caller: Caller, vm_id: str, verb: str) -> Operation:
        """Run one of VERBS; `kill` goes past whatever else runs or waits for the VM."""
        with self.reporting(caller, vm_id):
            _check_verb(verb)
        work = functools.partial(self._run, vm_id, verb)
        if verb == "kill":
            return self._operations.submit_at_once(caller, vm_id, work)
        return self._operations.submit(caller, vm_id, work)

    def take(self, caller: Caller, vm_id: str, name: str, *, hibernate: bool = False) -> Operation:
        """Take a snapshot of the VM; with `hibernate` the VM is stopped after it."""
        work = functools.partial(snapshot.take, self._services, vm_id, name, hibernate=hibernate)
        return self._operations.submit(caller, vm_id, work)

    def restore(self, caller: Caller, vm_id: str, name: str) -> Operation:
        """Put the VM back to a snapshot of it."""
        work = functools.partial(restore.restore, self._services, caller, vm_id, name)
        return self._operations.submit(caller, vm_id, work)

    def remove(self, caller: Caller, vm_id: str) -> Operation:
        """Remove a VM that has no process, with its disks."""
        work = functools.partial(configure.remove, self._services, caller, vm_id)
        return self._operations.submit(caller, vm_id, work)

    def rename(self, caller: Caller, vm_id: str, new_name: str) -> Operation:
        """Give a VM that has no process another name."""
        with self.reporting(caller, vm_id):
            check_name(new_name)
        work = functools.partial(configure.rename, self._services, vm_id, new_name)
        return self._operations.submit(caller, vm_id, work)

    def set_access(
        self, caller: Caller, vm_id: str, uid: int | None, gid: int | None, mode: int | None
    ) -> Operation:
        """Change owner, group or permission bits; the kernel has checked that the caller may."""
        work = functools.partial(configure.delegate, self._services, vm_id, uid, gid, mode)
        return self._operations.submit(caller, vm_id, work)

    @contextmanager
    def reporting(self, caller: Caller, vm_id: str = "") -> Iterator[None]:
        """Record a refusal that passes through, for what never becomes an operation."""
        try:
            yield
        except CocoonError as error:
            _report(self._services, caller, vm_id, error)
            raise

    async def _run(self, vm_id: str, verb: str) -> None:
        match verb:
            case "start":
                await stop.begin_start(self._services, vm_id)
                await clone.start_or_clone(self._services, vm_id)
            case "stop":
                await stop.stop(self._services, vm_id)
            case "kill":
                await stop.kill(self._services, vm_id)
            case "pause":
                await pause.pause(self._services, vm_id)
            case "resume":
                await pause.resume(self._services, vm_id)
            case "restart":
                vm = self._services.vm(vm_id)
                if vm.state is not State.RUNNING:
                    raise Invalid(f"VM {vm.name} is {vm.state}: restart takes a running one")
                await stop.begin_start(self._services, vm_id)
                await stop.stop(self._services, vm_id)
                await clone.start_or_clone(self._services, vm_id)


def _check_verb(verb: object) -> None:
    if verb not in VERBS:
        raise Invalid(f"{str(verb)[:40]!r} is no verb: write one of {', '.join(VERBS)}")


def _check_source(source: object) -> None:
    if not isinstance(source, str):
        raise Invalid("from is not the name of a snapshot")


async def report(services: Services, caller: Caller, vm_id: str, error: CocoonError | None) -> None:
    """Put the outcome of an operation where people look for it, before its caller is told."""
    _report(services, caller, vm_id, error)
    await services.events.flush()


def _report(services: Services, caller: Caller, vm_id: str, error: CocoonError | None) -> None:
    vm = services.index.vms.get(vm_id)
    if error is not None:
        services.events.refused(caller, error, vm)
    if vm is not None:
        services.note_error(vm_id, str(error) if error else "")
