"""A host in memory, and a program that shows it through a real mount: `fs_host.py MOUNTPOINT`.

The program reads commands from its standard input, a JSON list each, and answers each with a line
of JSON. Operations on a VM wait while `hold` is in force for it. A VM named `faulty…` raises what
no handler foresees.
"""

import dataclasses
import json
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any

import trio

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from agent.console.fanout import ByteStream, Fanout
from agent.fs.mount import mounted
from agent.model.access import Access, Caller
from agent.model.config import VmConfig, parse_config
from agent.model.errors import Busy, CocoonError, Exists, Invalid, NotPermitted
from agent.model.finding import Finding, Level, show_findings
from agent.model.names import check_name, new_id
from agent.model.vm import State, Vm

VERBS = {
    "start": State.RUNNING,
    "stop": State.STOPPED,
    "kill": State.STOPPED,
    "pause": State.PAUSED,
    "resume": State.RUNNING,
    "restart": State.RUNNING,
}
GROUP = 4000
"""The gid of the group that may create VMs."""


class MemoryLog:
    """A log that is not on disk."""

    def __init__(self) -> None:
        self.data = b""

    @property
    def size(self) -> int:
        return len(self.data)

    async def pread(self, offset: int, size: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return self.data[offset : offset + size]


@dataclasses.dataclass
class Lines:
    log: MemoryLog = dataclasses.field(default_factory=MemoryLog)


class FakeEvents:
    def __init__(self) -> None:
        self.events = Lines()
        self.errors = Lines()
        self.fanout = Fanout()

    def live(self) -> ByteStream:
        return self.fanout.subscribe()

    def tell(self, line: bytes) -> None:
        self.events.log.data += line
        self.fanout.publish(line)


class FakeConsoles:
    def __init__(self) -> None:
        self.logs: dict[str, MemoryLog] = {}
        self.fanouts: dict[str, Fanout] = {}
        self.running: Callable[[str], bool] = lambda vm_id: False
        self.sent: list[str] = []

    def log(self, vm_id: str) -> MemoryLog:
        return self.logs.setdefault(vm_id, MemoryLog())

    @asynccontextmanager
    async def live(self, vm_id: str) -> AsyncIterator[ByteStream]:
        fanout = self.fanouts.setdefault(vm_id, Fanout())
        async with fanout.subscribe() as stream:
            yield stream

    async def write(self, vm_id: str, data: bytes) -> int:
        await trio.lowlevel.checkpoint()
        if not self.running(vm_id):
            raise Invalid("nothing reads the console: the VM has no process; start it first")
        self.sent.append(data.decode())
        return len(data)

    def socket_path(self, vm_id: str) -> str:
        return f"/run/cocoon/console/{vm_id}.sock"

    def say(self, vm_id: str, data: bytes) -> None:
        self.log(vm_id).data += data
        if vm_id in self.fanouts:
            self.fanouts[vm_id].publish(data)


class EmptyShelf:
    """No snapshots or images, and none on their way in."""

    def exists(self, object_id: str) -> bool:
        return False

    def get(self, object_id: str) -> None:
        return None

    def find(self, name: str) -> None:
        return None

    def find_import(self, name: str) -> None:
        return None

    def all(self) -> list[Any]:
        return []

    def imports(self) -> list[Any]:
        return []


class FakeDoctor:
    """Found nothing wrong."""

    findings = (Finding(Level.OK, "group", "is there"),)

    def read(self) -> str:
        return show_findings(self.findings)


class FakeOperation:
    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: CocoonError | None = None

    @property
    def finished(self) -> bool:
        return self.done.is_set()

    async def wait(self) -> None:
        await self.done.wait()
        if self.error is not None:
            raise self.error


class FakeHost:
    """What the filesystem asks of a host, with VMs that are records only."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.group = GROUP
        self.events = FakeEvents()
        self.snapshots = EmptyShelf()
        self.doctor = FakeDoctor()
        self.images = EmptyShelf()
        self.consoles = FakeConsoles()
        self.consoles.running = lambda vm_id: self.records[vm_id].has_process
        self.records: dict[str, Vm] = {}
        self.names: dict[str, str] = {}
        self.held: dict[str, trio.Event] = {}
        self.asked: list[dict[str, Any]] = []
        self.stats_taken = 0
        self._nursery = nursery

    def vms(self) -> list[Vm]:
        return list(self.records.values())

    def find_vm(self, name: str) -> Vm | None:
        return self.records.get(self.names.get(name, ""))

    def find_vm_by_id(self, vm_id: str) -> Vm | None:
        return self.records.get(vm_id)

    def info(self, vm: Vm) -> dict[str, Any]:
        if vm.name.startswith("faulty"):
            raise LookupError("a fault that a test made")
        return {"id": vm.id, "name": vm.name, "state": vm.state.value, "reason": vm.reason}

    async def stats(self, vm: Vm) -> str:
        await trio.lowlevel.checkpoint()
        self.stats_taken += 1
        return f"cpu_usec {'1' * (self.stats_taken % 60)}\n"

    def add(self, name: str, access: Access) -> Vm:
        now = 1_700_000_000.0
        vm = Vm(
            id=new_id(),
            name=name,
            uid=65536 + len(self.records),
            access=access,
            config=VmConfig(),
            state=State.CREATED,
            generation=1,
            created_at=now,
            updated_at=now,
        )
        self.records[vm.id] = vm
        self.names[name] = vm.id
        return vm

    def create(self, caller: Caller, name: str) -> FakeOperation:
        return self.create_document(caller, {"name": name})

    def create_document(self, caller: Caller, document: Mapping[str, Any]) -> FakeOperation:
        changes = dict(document)
        name, verb = str(changes.pop("name", "")), changes.pop("state", None)

        def work() -> None:
            check_name(name)
            if name in self.names:
                raise Exists(f"there is a VM {name} already")
            config = parse_config(VmConfig(), changes, 64)
            vm = self.add(name, Access(caller.uid, GROUP))
            self._change(vm.id, config=config, state=VERBS.get(verb, State.CREATED))

        return self._submit("create", caller, f"name:{name}", work)

    def configure(self, caller: Caller, vm_id: str, changes: Mapping[str, Any]) -> FakeOperation:
        def work() -> None:
            vm = self.records[vm_id]
            self._change(vm_id, config=parse_config(vm.config, changes, 64))

        return self._submit("configure", caller, vm_id, work)

    def command(self, caller: Caller, vm_id: str, verb: str) -> FakeOperation:
        if verb not in VERBS:
            with self.reporting(caller, vm_id):
                raise Invalid(f"{verb[:40]!r} is no verb: write one of {', '.join(VERBS)}")
        if self.records[vm_id].name.startswith("faulty"):
            raise LookupError("a fault that a test made")
        held = "kill" if verb == "kill" else vm_id
        work = lambda: self._change(vm_id, state=VERBS[verb], pid=7)  # noqa: E731
        return self._submit(verb, caller, vm_id, work, held)

    def remove(self, caller: Caller, vm_id: str) -> FakeOperation:
        def work() -> None:
            vm = self.records[vm_id]
            if not vm.access.owned_by(caller):
                raise NotPermitted(f"only its owner or root removes VM {vm.name}")
            if vm.has_process:
                raise Busy(f"VM {vm.name} is {vm.state}: stop it first")
            del self.names[vm.name], self.records[vm_id]

        return self._submit("remove", caller, vm_id, work)

    def rename(self, caller: Caller, vm_id: str, new_name: str) -> FakeOperation:
        def work() -> None:
            vm = self.records[vm_id]
            if vm.has_process:
                raise Busy(f"VM {vm.name} is {vm.state}: stop it first")
            if new_name in self.names:
                raise Exists(f"there is a VM {new_name} already")
            del self.names[vm.name]
            self.names[new_name] = vm_id
            self._change(vm_id, name=new_name)

        return self._submit("rename", caller, vm_id, work)

    def set_access(
        self, caller: Caller, vm_id: str, uid: int | None, gid: int | None, mode: int | None
    ) -> FakeOperation:
        def work() -> None:
            old = self.records[vm_id].access
            access = Access(
                old.uid if uid is None else uid,
                old.gid if gid is None else gid,
                old.mode if mode is None else mode,
            )
            self._change(vm_id, access=access)

        return self._submit("access", caller, vm_id, work)

    @contextmanager
    def reporting(self, caller: Caller, vm_id: str = "") -> Iterator[None]:
        try:
            yield
        except CocoonError as error:
            self._report(caller, vm_id, error)
            raise

    def _report(self, caller: Caller, vm_id: str, error: CocoonError | None) -> None:
        if error is not None:
            line = f"now {caller.uid} {caller.path} {error}\n"
            self.events.errors.log.data += line.encode()
        if vm_id in self.records:
            self._change(vm_id, error=str(error) if error else "")

    def _submit(
        self, what: str, caller: Caller, vm_id: str, work: Callable[[], None], held: str = ""
    ) -> FakeOperation:
        asked = {"what": what, "path": caller.path, "uid": caller.uid, "gid": caller.gid}
        self.asked.append(asked | {"groups": sorted(caller.groups), "pid": caller.pid})
        operation = FakeOperation()
        self._nursery.start_soon(self._run, operation, caller, vm_id, work, held or vm_id)
        return operation

    async def _run(
        self,
        operation: FakeOperation,
        caller: Caller,
        vm_id: str,
        work: Callable[[], None],
        held: str,
    ) -> None:
        await trio.lowlevel.checkpoint()
        while held in self.held:
            await self.held[held].wait()
        try:
            work()
        except CocoonError as error:
            operation.error = error
        self._report(caller, vm_id, operation.error)
        operation.done.set()

    def _change(self, vm_id: str, **changes: Any) -> None:
        vm = self.records[vm_id]
        self.records[vm_id] = dataclasses.replace(vm, **changes, generation=vm.generation + 1)


async def _commands(lines: trio.abc.ReceiveStream) -> AsyncIterator[list[Any]]:
    pending = b""
    async for data in lines:
        pending += data
        *whole, pending = pending.split(b"\n")
        for line in whole:
            yield json.loads(line)


async def _serve(mountpoint: str) -> None:
    async with trio.open_nursery() as nursery:
        host = FakeHost(nursery)
        shown: AbstractAsyncContextManager[Any] = mounted(host, mountpoint)  # type: ignore[arg-type]
        async with shown as operations:
            print(json.dumps("ready"), flush=True)
            async for command, *arguments in _commands(trio.lowlevel.FdStream(os.dup(0))):
                answer: Any = None
                match command, arguments:
                    case "add", [first, count]:
                        for number in range(count):
                            host.add(f"{first}{number}", Access(0, GROUP))
                    case "clear", []:
                        host.records.clear()
                        host.names.clear()
                    case "hold", [name]:
                        host.held[host.names.get(name, name)] = trio.Event()
                    case "let go", [name]:
                        host.held.pop(host.names.get(name, name)).set()
                    case "asked", []:
                        answer, host.asked = host.asked, []
                    case "say", [name, text]:
                        host.consoles.say(host.names[name], text.encode())
                    case "sent", []:
                        answer, host.consoles.sent = host.consoles.sent, []
                    case "event", [text]:
                        host.events.tell(text.encode())
                    case "end streams", []:
                        host.events.fanout.close()
                    case "counts", []:
                        answer = {
                            "open": operations.open_files,
                            "waiting": operations.waiting,
                            "streams": host.events.fanout.readers,
                        }
                    case "leave", []:
                        break
                print(json.dumps(answer), flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stderr)
    trio.run(_serve, sys.argv[1], strict_exception_groups=True)
