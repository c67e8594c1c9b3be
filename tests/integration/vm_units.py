"""VM units as the agent makes them, without the agent: for tests of what systemd makes of them."""

import dataclasses
import json
import os
import re
import select
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from agent.helpers import stop_post
from agent.model import canonical
from agent.model.access import Access
from agent.model.config import VmConfig
from agent.model.launch import Bind, LaunchPlan
from agent.model.names import new_id
from agent.model.vm import FIRST_UID, Vm
from agent.systemd.bus import open_bus
from agent.systemd.drop_in import drop_in, write_drop_in
from agent.systemd.exit_record import ExitRecord, read_exit_record
from agent.systemd.jail import make_jail
from agent.systemd.manager import Manager, open_manager
from agent.systemd.unit import Paths, environment_file, vm_unit
from agent.systemd.users import write_user

DIRECTORY = Path("/run/test-units")
PATIENCE = 30.0
MIB = 1 << 20


def systemctl(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["systemctl", *arguments], check=check, capture_output=True, text=True)
    return done.stdout.strip()


def with_manager(call: Callable[[Manager], Any]) -> Any:
    """Return what an asynchronous call of the manager returns."""

    async def connected() -> Any:
        async with open_bus() as bus, open_manager(bus) as manager:
            with trio.fail_after(PATIENCE):
                return await call(manager)

    return trio.run(connected, strict_exception_groups=True)


class Console:
    """A unit's console, as its agent holds it: both ends of FIFOs, or the client of a socket."""

    def __init__(self, paths: Paths, serial_socket: bool = False) -> None:
        self.seen = b""
        self.socket = f"{paths.sockets}/console" if serial_socket else ""
        if serial_socket:
            return
        for path in (paths.console_input, paths.console_output):
            if not os.path.exists(path):
                os.mkfifo(path, 0o600)
        self.input = os.open(paths.console_input, os.O_RDWR | os.O_NONBLOCK)
        self.output = os.open(paths.console_output, os.O_RDWR | os.O_NONBLOCK)

    def attach(self) -> None:
        """Connect to a socket, which is there some time after the start."""
        if not self.socket:
            return
        deadline = time.monotonic() + PATIENCE
        with socket.socket(socket.AF_UNIX) as client:
            while client.connect_ex(self.socket):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"nobody serves {self.socket}")
                time.sleep(0.01)
            self.input, self.output = os.dup(client.fileno()), client.detach()

    def read_until(self, pattern: bytes) -> bytes:
        """Return and forget the output up to the first match of the pattern."""
        deadline = time.monotonic() + PATIENCE
        while not (match := re.search(pattern, self.seen, re.MULTILINE)):
            left = deadline - time.monotonic()
            if not select.select([self.output], [], [], max(0.0, left))[0]:
                raise TimeoutError(f"no {pattern!r} in {self.seen[-1000:]!r}")
            self.seen += os.read(self.output, 65536)
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text

    def write(self, text: str) -> None:
        os.write(self.input, text.encode())

    def forget(self) -> None:
        """Throw away the output so far."""
        self.seen = b""
        while select.select([self.output], [], [], 0)[0]:
            os.read(self.output, 65536)

    def close(self) -> None:
        os.close(self.input)
        os.close(self.output)


@dataclass
class VmUnit:
    """One VM's unit and the files around it."""

    vm: Vm
    plan: LaunchPlan
    paths: Paths
    console: Console = field(init=False)

    def __post_init__(self) -> None:
        for path in (self.paths.directory, self.paths.run, self.paths.sockets):
            os.makedirs(path, mode=0o700)
        for name, content in self.plan.files.items():
            Path(self.paths.directory, name).write_bytes(content)
            os.chown(f"{self.paths.directory}/{name}", self.vm.uid, self.vm.uid)
        for path in (self.paths.directory, self.paths.sockets):
            os.chown(path, self.vm.uid, self.vm.uid)
        self.write_environment()
        write_user(self.vm.uid)
        self.console = Console(self.paths, self.plan.serial_socket)

    def write_environment(self, boot: bool = True) -> None:
        content = environment_file(self.vm, self.plan, self.paths, boot)
        Path(self.paths.environment).write_bytes(content)

    @property
    def name(self) -> str:
        return self.vm.unit

    @property
    def pid(self) -> int:
        return int(self.show("MainPID"))

    @property
    def exit_record(self) -> ExitRecord | None:
        return read_exit_record(self.paths.exit_record)

    def show(self, name: str) -> str:
        return systemctl("show", "--value", f"--property={name}", self.name)

    def start(self) -> str:
        """Start the unit and return its job's result."""
        properties = vm_unit(self.vm, self.plan, self.paths)
        result = with_manager(lambda manager: manager.start_transient(self.name, properties))
        self.console.attach()
        return str(result)

    def stop(self) -> None:
        systemctl("stop", self.name)

    def kill(self, signal: str = "KILL") -> None:
        systemctl("kill", "--kill-whom=main", f"--signal={signal}", self.name)

    def request(self, method: str, path: str, document: object) -> None:
        """Ask Firecracker's API for something."""
        body = json.dumps(document)
        with socket.socket(socket.AF_UNIX) as api:
            api.connect(f"{self.paths.sockets}/api")
            api.sendall(
                f"{method} {path} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            assert api.recv(4096).startswith(b"HTTP/1.1 204")

    def remove(self) -> None:
        systemctl("kill", "--signal=KILL", self.name, check=False)
        systemctl("stop", self.name, check=False)
        systemctl("reset-failed", self.name, check=False)
        self.console.close()


class VmUnits:
    """Makes VM units; `remove` ends what is left of them."""

    def __init__(self, python: str, firecracker: str, guests: Path) -> None:
        self.firecracker = firecracker
        self.guests = guests
        self.made: list[VmUnit] = []
        self.jail = str(DIRECTORY / "jail")
        make_jail(self.jail)
        if write_drop_in(drop_in(os.path.dirname(stop_post.__file__), python)):
            systemctl("daemon-reload")

    def firecracker_vm(
        self, guest: str = "guest.elf", memory: int = 128 * MIB, **config: Any
    ) -> VmUnit:
        """A real Firecracker with one of the tests' guests."""
        document = {
            "boot-source": {"kernel_image_path": canonical.KERNEL, "boot_args": "console=ttyS0"},
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
            "drives": [],
        }
        plan = LaunchPlan(
            binary=self.firecracker,
            arguments=("--api-sock", canonical.API_SOCKET, "--level", "Off"),
            boot_arguments=("--config-file", f"{canonical.VM}/vm.json"),
            files={"vm.json": json.dumps(document).encode()},
            memory=memory,
            binds=(Bind(str(self.guests / guest), canonical.KERNEL),),
        )
        return self.make(plan, **config)

    def program(self, path: str, *arguments: str, **config: Any) -> VmUnit:
        """Another program in the VMM's place."""
        plan = LaunchPlan(path, arguments, (), {}, 128 * MIB)
        return self.make(plan, **config)

    def make(self, plan: LaunchPlan, hypervisor: str = "firecracker", **config: Any) -> VmUnit:
        identity = new_id()
        vm = Vm(
            id=identity,
            name=f"unit-{identity[:8]}",
            uid=FIRST_UID + 30_000 + int.from_bytes(os.urandom(2)) % 4000,
            access=Access(0, 0),
            config=VmConfig(**config),
            hypervisor=hypervisor,
        )
        run, directory = (str(DIRECTORY / where / identity) for where in ("run", "vms"))
        self.made.append(VmUnit(vm, plan, Paths(run, directory, self.jail)))
        return self.made[-1]

    def remove(self) -> None:
        for unit in self.made:
            unit.remove()


def replace_plan(unit: VmUnit, **values: Any) -> None:
    unit.plan = dataclasses.replace(unit.plan, **values)
