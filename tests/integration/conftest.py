"""What integration tests stand on: the lab they run in, its agent, and VMs that are cleaned up."""

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

MOUNT = Path("/cocoon")
ROOT_DIR = Path("/var/lib/cocoon")
AGENT_UNIT = "cocoon-host.service"
PATIENCE = 30.0
BACKENDS = {
    "firecracker": "firecracker",
    "qemu": "qemu-system-x86_64",
    "cloud-hypervisor": "cloud-hypervisor",
}
"""The program of each backend."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give tests marked `backends` the parameter `backend`: each that is named, or all.

    Firecracker's cases always run. Those of the others do if `core=True` is in the mark, else a
    sample of each module's.
    """
    mark = metafunc.definition.get_closest_marker("backends")
    if mark is None:
        return
    if "backend" not in metafunc.fixturenames:
        metafunc.fixturenames.append("backend")
    cases = []
    for name in mark.args or BACKENDS:
        sampled = name != "firecracker" and not mark.kwargs.get("core")
        group = pytest.mark.long(group=f"{metafunc.module.__name__} {name}")
        cases.append(pytest.param(name, marks=[group] if sampled else []))
    metafunc.parametrize("backend", cases, indirect=True)


def wait_until(predicate: Callable[[], Any], timeout: float = PATIENCE, what: str = "") -> Any:
    """Return the first true value of the predicate; fail after `timeout` seconds.

    For what has no event to wait for from outside; a test that can be told should be told.
    """
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout} s: {what or predicate}")
        time.sleep(0.01)
    return value


def run(*command: str, check: bool = True, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, check=check, capture_output=True, text=True, **options)


def write_once(path: Path, text: str) -> None:
    """One open, one write(2), one close, so that the errno is the operation's."""
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


@dataclass
class Journal:
    """The journal from a moment on."""

    cursor: str = ""

    def __post_init__(self) -> None:
        self.mark()

    def mark(self) -> None:
        """From now on show only what comes later."""
        last = run("journalctl", "--quiet", "--lines=1", "--output=json").stdout
        self.cursor = json.loads(last)["__CURSOR"] if last else ""

    def entries(self, unit: str = "") -> list[dict[str, Any]]:
        """What came since the mark, of one unit or all, as journald's own fields."""
        run("journalctl", "--sync")
        command = ["journalctl", "--quiet", "--output=json"]
        command += [f"--after-cursor={self.cursor}"] if self.cursor else []
        command += [f"--unit={unit}"] if unit else []
        return [json.loads(line) for line in run(*command).stdout.splitlines()]

    def lines(self, unit: str = "") -> list[str]:
        """The messages since the mark, of one unit or all."""
        return [str(entry.get("MESSAGE", "")) for entry in self.entries(unit)]


@dataclass
class Agent:
    """The agent's service in this lab."""

    mount: Path = MOUNT
    root_dir: Path = ROOT_DIR
    unit: str = AGENT_UNIT
    expects_tracebacks: bool = False
    """Set by a test that makes a handler fail: otherwise a traceback in the journal fails it."""

    journal: Journal = field(default_factory=Journal)

    @property
    def pid(self) -> int:
        return int(run("systemctl", "show", "--property=MainPID", "--value", self.unit).stdout)

    def is_active(self) -> bool:
        return run("systemctl", "is-active", "--quiet", self.unit, check=False).returncode == 0

    def start(self) -> None:
        """Start it and wait until it is ready."""
        run("systemctl", "reset-failed", self.unit, check=False)
        if run("systemctl", "start", self.unit, check=False).returncode != 0:
            raise RuntimeError("the agent did not start:\n" + "\n".join(self.lines()[-50:]))

    def stop(self) -> None:
        run("systemctl", "stop", self.unit)

    def restart(self) -> None:
        run("systemctl", "reset-failed", self.unit, check=False)
        run("systemctl", "restart", self.unit)

    def kill(self) -> None:
        """SIGKILL it, and wait until systemd has brought it back and it is ready."""
        before = self.pid
        run("systemctl", "reset-failed", self.unit, check=False)
        run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", self.unit)
        self.wait_ready(other_than=before)

    def wait_ready(self, other_than: int = 0) -> None:
        """Wait until it is active, with another main process than the given one."""
        wait_until(
            lambda: self.pid not in (0, other_than) and self.is_active(), what="the agent is ready"
        )

    def lines(self, unit: str = "") -> list[str]:
        """Journal messages since this test began, the agent's own unless another unit is named."""
        return self.journal.lines(unit or self.unit)


@dataclass(frozen=True)
class Vm:
    """A VM of the test, through the files under /cocoon/vms."""

    name: str
    path: Path

    @property
    def unit(self) -> str:
        return f"cocoon-vm-{self.name}.service"

    @property
    def state(self) -> str:
        return self.read("state")

    @property
    def pid(self) -> int:
        return int(self.read("pid"))

    @property
    def counts(self) -> list[int]:
        """The counts that the console's log holds whole.

        One may stand behind half a line of a guest that was killed in the middle of it.
        """
        log = (self.path / "console").read_bytes()
        return [int(count) for count in re.findall(rb"count (\d+)\r?\n", log)]

    def read(self, name: str) -> str:
        return (self.path / name).read_text().removesuffix("\n")

    def write(self, name: str, text: str) -> None:
        write_once(self.path / name, f"{text}\n")

    def verb(self, verb: str) -> None:
        self.write("state", verb)

    def wait_for_state(self, state: str, timeout: float = PATIENCE) -> None:
        wait_until(lambda: self.state == state, timeout, f"{self.name} is {state}")

    def wait_counting(self, timeout: float = PATIENCE) -> int:
        """Wait for a counter line beyond those there are, and return its number."""
        seen = len(self.counts)
        return int(wait_until(lambda: self.counts[seen:], timeout, f"{self.name} counts")[-1])

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self.verb("kill")
        with contextlib.suppress(FileNotFoundError):
            self.path.rmdir()


@dataclass(frozen=True)
class Guests:
    """The test kernels: one that counts and answers, one that halts for ever."""

    guest: Path
    halt: Path


@pytest.fixture(scope="session", autouse=True)
def inside_a_lab() -> None:
    if not Path("/run/lab").is_dir():
        pytest.fail("runs in a lab only: tests/run, or tests/lab/run -- COMMAND", pytrace=False)


@pytest.fixture(scope="session")
def guests() -> Guests:
    directory = Path(os.environ["COCOON_TEST_GUESTS"])
    return Guests(directory / "guest.elf", directory / "halt.elf")


@pytest.fixture
def until() -> Callable[..., Any]:
    """`until(predicate, timeout)` waits for a condition that announces itself by no event."""
    return wait_until


@pytest.fixture
def journal() -> Journal:
    """The journal from the test's beginning on."""
    return Journal()


@pytest.fixture
def agent() -> Iterator[Agent]:
    """A running agent; one that logged a traceback fails the test."""
    agent = Agent()
    if not agent.is_active():
        agent.start()
    yield agent
    if not agent.is_active():
        agent.start()
    lines = agent.lines()
    if not agent.expects_tracebacks and any("Traceback" in line for line in lines):
        pytest.fail("the agent logged a traceback:\n" + "\n".join(lines[-100:]))


_numbers = itertools.count(1)


@pytest.fixture
def vm_name() -> Callable[[], str]:
    """`vm_name()` is a name that no other test uses."""
    return lambda: f"vm{next(_numbers)}"


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """What runs the test's VMs: Firecracker, or each backend in turn in tests so marked."""
    name = str(getattr(request, "param", "firecracker"))
    if shutil.which(BACKENDS[name]) is None:
        pytest.skip(f"{BACKENDS[name]} is not installed")
    return name


@pytest.fixture
def make_vm(
    agent: Agent, guests: Guests, vm_name: Callable[[], str], backend: str
) -> Iterator[Callable[..., Vm]]:
    """`make_vm(name, **config)` creates a VM with mkdir; it is removed when the test ends.

    Without more it has the counting guest as kernel, 64M, and the test's backend; a key given as
    None is left out. That guest hears Ctrl-Alt-Del, and so Firecracker, alone: the others wait a
    second for it.
    """
    made: list[Vm] = []

    def make(name: str | None = None, **config: Any) -> Vm:
        name = name or vm_name()
        vm = Vm(name, agent.mount / "vms" / name)
        vm.path.mkdir()
        made.append(vm)
        wanted = {
            "hypervisor": backend,
            "memory": "64M",
            "boot": {"kernel": str(guests.guest)},
            "stop_timeout": 30 if backend == "firecracker" else 1,
        } | config
        given = {key: value for key, value in wanted.items() if value is not None}
        write_once(vm.path / "config", json.dumps(given))
        return vm

    yield make
    if not agent.is_active():
        agent.start()
    for vm in made:
        vm.remove()
