"""The floor: what systemd and a VMM need by themselves to start a VM.

A plain script: all files are there and all messages are made before the clock starts; then one
blocking D-Bus socket, inotify for the VMMs' API sockets, and a question on each until it says that
the guest runs. Unit, jail and the VMM's configuration are the agent's own.
"""

import array
import contextlib
import ctypes
import dataclasses
import os
import re
import selectors
import shutil
import socket
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import trio
from backends import Backend, Step
from dbus_next.message import Message

from agent.model import canonical
from agent.model.access import Access
from agent.model.config import Boot, VmConfig
from agent.model.launch import Bind
from agent.model.names import new_id
from agent.model.vm import LAST_UID, Vm
from agent.storage.reflink import PRIVATE, copy_file
from agent.storage.tree import Tree
from agent.systemd import drop_in
from agent.systemd.jail import make_jail
from agent.systemd.unit import Paths, Property, environment_file, vm_unit
from agent.systemd.users import remove_user, write_user
from agent.systemd.wire import Framer, Received

PREFIX = "floor-"
"""Of the units' names: not the VMs' own, so that the agent does not take them for VMs."""
RUN = "/run/floor"
ROOT = "/var/lib/cocoon/floor"
PATIENCE = 20.0
_AGAIN = 0.001
_SYSTEMD = "org.freedesktop.systemd1"
_BUS = "org.freedesktop.DBus"
_IN_CREATE = 0x100  # inotify(7)
_libc = ctypes.CDLL(None, use_errno=True)


class Bus:
    """A blocking connection to the system bus."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect("/run/dbus/system_bus_socket")
        identity = str(os.geteuid()).encode().hex().encode()
        self.socket.sendall(b"\0AUTH EXTERNAL %s\r\nBEGIN\r\n" % identity)
        assert self.socket.recv(4096).startswith(b"OK ")
        self._framer = Framer()
        self._serial = 0
        self.call(_BUS, "/org/freedesktop/DBus", _BUS, "Hello")
        rule = f"type='signal',sender='{_SYSTEMD}',member='JobRemoved'"
        self.call(_BUS, "/org/freedesktop/DBus", _BUS, "AddMatch", "s", [rule])
        self.manager("Subscribe")

    def marshalled(
        self, destination: str, path: str, interface: str, member: str, signature: str, body: Any
    ) -> tuple[int, bytes]:
        """Return a call's serial and the call as it is on the wire."""
        self._serial += 1
        message = Message(destination, path, interface, member, signature=signature, body=body)
        message.serial = self._serial
        return self._serial, bytes(message._marshall())  # type: ignore[no-untyped-call]

    def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
    ) -> list[Any]:
        """Call a method and return what it answers."""
        serial, message = self.marshalled(
            destination, path, interface, member, signature, list(body)
        )
        self.socket.sendall(message)
        while True:
            for received in self.receive():
                if received.reply_serial == serial:
                    assert not received.error_name, f"{member}: {received.body}"
                    return received.body

    def manager(self, member: str, signature: str = "", body: Sequence[Any] = ()) -> list[Any]:
        """Call a method of systemd's manager."""
        path = "/org/freedesktop/systemd1"
        return self.call(_SYSTEMD, path, f"{_SYSTEMD}.Manager", member, signature, body)

    def receive(self) -> list[Received]:
        """Wait for messages."""
        return self._framer.feed(self.socket.recv(1 << 16))


@dataclass
class Unit:
    """A VM's unit, with all that its start needs in place."""

    name: str
    paths: Paths
    settings: list[Property]
    uid: int
    fifos: list[int]
    talk: Sequence[Step]
    files: "Files | None" = None
    message: bytes = b""
    serial: int = 0
    began: float = 0
    job_done: float = 0
    socket_seen: float = 0
    running: float = 0
    api: socket.socket = field(default_factory=lambda: socket.socket(socket.AF_UNIX))
    heard: bytes = b""
    said: int = 0
    ask_again: float = 0

    def say(self) -> None:
        """Take the next step of the talk."""
        step = self.talk[self.said]
        self.said += 1
        self.ask_again = 0
        self.heard = b""
        if step.file:
            file = os.open(f"{self.paths.directory}/{step.file}", os.O_RDONLY | os.O_CLOEXEC)
            os.lseek(file, step.offset, os.SEEK_SET)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))
            self.api.sendmsg([step.request], [rights])
            os.close(file)
        elif step.request:
            self.api.sendall(step.request)

    def hear(self) -> bool:
        """Take what the VMM says; whether that was the end of the talk."""
        data = self.api.recv(1 << 16)
        self.heard += data
        step = self.talk[self.said - 1]
        if step.answer in self.heard:
            if self.said == len(self.talk):
                return True
            self.say()
            return False
        if any(words in self.heard for words in step.not_yet):
            assert time.perf_counter() < self.began + PATIENCE, f"{self.name}: {self.heard!r}"
            self.said -= 1
            self.ask_again = time.perf_counter() + _AGAIN
            return False
        wrong = not self.heard.startswith(b"{") or b'"error"' in self.heard
        gone = not data or (wrong and not step.not_yet)
        assert not gone, f"{self.name}: {self.heard!r}"
        return False


@dataclass
class Files:
    """What a clone has from a snapshot's directory: links, and a disk of its own."""

    backend: Backend
    source: str
    target: str
    uid: int

    def fill(self) -> None:
        """Put them into the VM's directory, by hand."""
        for name in self.backend.linked:
            os.link(f"{self.source}/{name}", f"{self.target}/{name}")
        directory = os.open(self.target, os.O_RDONLY)
        for name in self.backend.copied:
            file = os.open(f"{self.source}/{name}", os.O_RDONLY)
            copy_file(file, directory, name, mode=PRIVATE, sync=False)
            os.chown(f"{self.target}/{name}", self.uid, self.uid)
            os.close(file)
        os.close(directory)

    def clear(self) -> None:
        """Remove them."""
        for name in (*self.backend.linked, *self.backend.copied):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.target}/{name}")


class Floor:
    """Starts units; `open_floor` makes one."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._bus = Bus()
        self._tree = Tree(ROOT, RUN)
        self._units: list[Unit] = []
        self._texts: dict[str, str] = {}
        self._kernel = f"{ROOT}/kernel"
        trio.run(self._tree.prepare)
        make_jail(f"{RUN}/jail")
        shutil.copy(os.environ["COCOON_TEST_GUESTS"] + "/halt.elf", self._kernel)
        self.text = installed_drop_in()
        self.use(PREFIX, self.text)

    def use(self, prefix: str, text: str) -> None:
        """Let units whose names start with `prefix` have this drop-in."""
        directory = f"/run/systemd/system/{prefix}.service.d"
        os.makedirs(directory, exist_ok=True)
        with open(f"{directory}/10-floor.conf", "w") as file:
            file.write(text)
        self._texts[prefix] = directory
        self._bus.manager("Reload")

    def prepare(
        self,
        names: Iterable[str],
        memory: int,
        *,
        prefix: str = PREFIX,
        left_out: Collection[str] = (),
        snapshot: str = "",
        storage: int = 0,
    ) -> list[Unit]:
        """Make all that starts of such VMs need.

        `left_out` are properties that they do without; `snapshot` is the directory of what they are
        cloned from, with a disk of `storage` bytes.
        """
        boot = Boot(kernel=self._kernel)
        hypervisor = self._backend.name
        config = VmConfig(memory=memory, boot=boot, storage=storage, hypervisor=hypervisor)
        units = []
        for name in names:
            units.append(self._unit(f"{prefix}{name}", config, left_out, snapshot))
            self._units.append(units[-1])
        return units

    def _unit(self, name: str, config: VmConfig, left_out: Collection[str], snapshot: str) -> Unit:
        uid = 0 if "User" in left_out else LAST_UID - len(self._units)
        vm = Vm(new_id(), name, uid, Access(0, 0), config, hypervisor=config.hypervisor)

        async def files() -> tuple[Paths, list[Property]]:
            driver = self._backend.driver()
            plan = driver.plan(vm, await driver.version(), loads=bool(snapshot))
            plan = dataclasses.replace(
                plan, binds=(*plan.binds, Bind(self._kernel, canonical.KERNEL))
            )
            paths = Paths(
                self._tree.run_directory(vm.id), self._tree.directory(vm.id), f"{RUN}/jail"
            )
            environment = environment_file(vm, plan, paths, boot=not snapshot)
            await self._tree.prepare_vm(vm, plan.files, environment)
            return paths, vm_unit(vm, plan, paths)

        paths, settings = trio.run(files)
        if uid:
            write_user(uid)
        fifos = [_open_fifo(path) for path in (paths.console_input, paths.console_output)]
        settings = [setting for setting in settings if setting[0] not in left_out]
        talk = self._backend.load if snapshot else self._backend.ask
        unit = Unit(f"{name}.service", paths, settings, uid, fifos, talk)
        if snapshot:
            unit.files = Files(self._backend, snapshot, paths.directory, uid)
            unit.files.clear()
        return unit

    def start(self, units: Sequence[Unit], at_once: int = 1000) -> float:
        """Start the units, so many at a time; return the seconds until all guests run."""
        for unit in units:
            body = [unit.name, "fail", [list(setting) for setting in unit.settings], []]
            unit.serial, unit.message = self._bus.marshalled(
                *(_SYSTEMD, "/org/freedesktop/systemd1", f"{_SYSTEMD}.Manager"),
                *("StartTransientUnit", "ssa(sv)a(sa(sv))", body),
            )
            unit.job_done = unit.socket_seen = unit.running = 0
            unit.said = unit.ask_again = 0
            unit.api = socket.socket(socket.AF_UNIX)
        with _Starting(self._bus, units) as starting:
            return starting.run(at_once)

    def stop(self, units: Sequence[Unit]) -> None:
        """End the units at once, and wait until nothing is left of them."""
        names = [unit.name for unit in units]
        for command in (["kill", "--signal=KILL", "--kill-whom=all"], ["stop"], ["reset-failed"]):
            subprocess.run(["systemctl", *command, *names], check=False, capture_output=True)
        for unit in units:
            if unit.files:
                unit.files.clear()
            with contextlib.suppress(FileNotFoundError):  # a unit without ExecStopPost leaves it
                os.unlink(f"{unit.paths.sockets}/api")

    def close(self) -> None:
        """End and remove everything."""
        self.stop(self._units)
        for unit in self._units:
            for fifo in unit.fifos:
                os.close(fifo)
            if unit.uid:
                remove_user(unit.uid)
        for directory in (*self._texts.values(), ROOT, RUN):
            shutil.rmtree(directory)


class _Starting:
    """A number of starts under way."""

    def __init__(self, bus: Bus, units: Sequence[Unit]) -> None:
        self._bus = bus
        self._waiting = list(reversed(units))
        self._by_name = {unit.name: unit for unit in units}
        self._by_serial = {unit.serial: unit for unit in units}
        self._by_job: dict[str, Unit] = {}
        self._by_watch: dict[int, Unit] = {}
        self._open = 0
        self._selector = selectors.DefaultSelector()
        self._inotify = _libc.inotify_init1(os.O_CLOEXEC)
        for unit in units:
            watch = _libc.inotify_add_watch(self._inotify, unit.paths.sockets.encode(), _IN_CREATE)
            assert watch >= 0, unit.paths.sockets
            self._by_watch[watch] = unit

    def __enter__(self) -> "_Starting":
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        os.close(self._inotify)
        for unit in self._by_name.values():
            unit.api.close()

    def run(self, at_once: int) -> float:
        self._selector.register(self._bus.socket, selectors.EVENT_READ)
        self._selector.register(self._inotify, selectors.EVENT_READ)
        began = time.perf_counter()
        while self._waiting or self._open:
            while self._waiting and self._open < at_once:
                self._begin(self._waiting.pop())
            asking = [unit for unit in self._by_name.values() if unit.ask_again]
            events = self._selector.select(_AGAIN if asking else PATIENCE)
            for unit in asking:
                if unit.ask_again <= time.perf_counter():
                    unit.say()
            if not events and not asking:
                stuck = [unit.name for unit in self._by_name.values() if not unit.running]
                raise TimeoutError(f"{', '.join(stuck)} did not start: see its journal")
            for key, _ in events:
                if key.fileobj is self._bus.socket:
                    self._hear()
                elif key.data is None:
                    self._see()
                else:
                    self._take_answer(key.data)
        return time.perf_counter() - began

    def _begin(self, unit: Unit) -> None:
        self._open += 1
        unit.began = time.perf_counter()
        if unit.files:
            unit.files.fill()
        self._bus.socket.sendall(unit.message)

    def _hear(self) -> None:
        for message in self._bus.receive():
            if unit := self._by_serial.get(message.reply_serial):
                assert not message.error_name, f"{unit.name}: {message.error_name} {message.body}"
                self._by_job[message.body[0]] = unit
            elif message.member == "JobRemoved":
                # Some are the ends of what ran before.
                _, job, name, result = message.body
                if unit := self._by_job.get(job):
                    assert result == "done", f"{name}: {result}"
                    unit.job_done = time.perf_counter()
                    self._count(unit)

    def _see(self) -> None:
        data = os.read(self._inotify, 1 << 16)
        offset = 0
        while offset < len(data):
            watch = int.from_bytes(data[offset : offset + 4], "little", signed=True)
            name_at = offset + 16
            offset = name_at + int.from_bytes(data[offset + 12 : name_at], "little")
            unit = self._by_watch[watch]
            if unit.socket_seen or data[name_at:offset].rstrip(b"\0") != b"api":
                continue
            unit.socket_seen = time.perf_counter()
            while True:
                with contextlib.suppress(ConnectionRefusedError):  # bound, and not listening yet
                    unit.api.connect(f"{unit.paths.sockets}/api")
                    break
            unit.say()
            self._selector.register(unit.api, selectors.EVENT_READ, unit)

    def _take_answer(self, unit: Unit) -> None:
        if not unit.hear():
            return
        self._selector.unregister(unit.api)
        unit.running = time.perf_counter()
        self._count(unit)

    def _count(self, unit: Unit) -> None:
        if unit.job_done and unit.running:
            self._open -= 1


@contextmanager
def open_floor(backend: Backend) -> Iterator[Floor]:
    """Make what all units share; remove it, and what was prepared, in the end."""
    floor = Floor(backend)
    try:
        yield floor
    finally:
        floor.close()


def _open_fifo(path: str) -> int:
    os.mkfifo(path, 0o600)
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def installed_drop_in() -> str:
    """Return the drop-in that the agent wrote."""
    with open(f"{drop_in.DIRECTORY}/{drop_in.FILE}", encoding="utf-8") as file:
        return file.read()


def without_settings(text: str, names: Iterable[str]) -> str:
    """Return a drop-in without its lines of these settings."""
    pattern = "|".join(map(re.escape, names))
    return re.sub(rf"(?m)^(?:{pattern})=.*\n", "", text)
