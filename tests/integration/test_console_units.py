"""Consoles and real units: what systemd keeps, and what it shows, without and with an agent."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.console.consoles import Consoles
from agent.console.fanout import ByteStream
from agent.console.source import INPUT, OUTPUT
from agent.model.access import Access
from agent.model.config import VmConfig
from agent.model.vm import Vm
from agent.systemd import drop_in

pytestmark = pytest.mark.anyio

VM = Vm(id="c" * 26, name="", uid=65536, access=Access(0, 0, 0o770), config=VmConfig())

ECHO = """
echo complaint >&2
echo started
while read -r line; do echo "heard $line"; done
"""
"""A guest that answers."""

HOLDER = """
import sys
import trio
from agent.console.consoles import Consoles
from tests.integration.test_console_units import vm_named

async def hold(run_dir, log_dir, name):
    consoles = Consoles(run_dir, log_dir)
    async with trio.open_nursery() as nursery:
        await nursery.start(consoles.run)
        await consoles.open(vm_named(name))
        print("open", flush=True)
        pid = int(await trio.to_thread.run_sync(sys.stdin.readline))
        await consoles.keep(vm_named(name), pid)
        print("kept", flush=True)

trio.run(hold, *sys.argv[1:], strict_exception_groups=True)
"""
"""An agent that the test can kill."""


@pytest.fixture(scope="module", autouse=True)
def plain_units() -> None:
    """Take away what an agent that ran before gave all VMs' units; it writes that at its start."""
    subprocess.run(["systemctl", "stop", "cocoon-host.service"], check=False)
    (Path(drop_in.DIRECTORY) / drop_in.FILE).unlink(missing_ok=True)
    systemctl("daemon-reload")


def vm_named(name: str) -> Vm:
    return replace(VM, name=name)


def systemctl(*arguments: str) -> str:
    command = ["systemctl", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@dataclass
class Unit:
    """A transient unit with its console as VMs' units have it."""

    vm: Vm
    run_dir: Path
    log_dir: Path
    until: Callable[..., Any]

    @property
    def pid(self) -> int:
        return int(self.show("MainPID"))

    @property
    def stored(self) -> int:
        return int(self.show("NFileDescriptorStore"))

    def show(self, name: str) -> str:
        return systemctl("show", "--value", f"--property={name}", self.vm.unit)

    def start(self, *command: str, **properties: str) -> None:
        directory = self.run_dir / self.vm.id
        wanted = {
            "Type": "exec",
            "StandardInput": f"file:{directory / INPUT}",
            "StandardOutput": f"file:{directory / OUTPUT}",
            "StandardError": "journal",
            "FileDescriptorStoreMax": "2",
            "NotifyAccess": "main",
        } | properties
        options = [f"--property={name}={value}" for name, value in wanted.items()]
        subprocess.run(
            ["systemd-run", "--quiet", f"--unit={self.vm.unit}", *options, *command],
            check=True,
            timeout=30,
        )

    def journal(self) -> list[dict[str, str]]:
        """What `journalctl -u` shows."""
        subprocess.run(["journalctl", "--sync"], check=True)
        command = ["journalctl", "--quiet", "--output=json", f"--unit={self.vm.unit}"]
        output = subprocess.run(command, check=True, capture_output=True).stdout
        return [json.loads(line) for line in output.splitlines()]

    def say(self, data: bytes) -> None:
        """Give the guest input without any agent."""
        with (self.run_dir / self.vm.id / INPUT).open("wb") as fifo:
            fifo.write(data)

    def wait_stored(self) -> None:
        self.until(lambda: self.stored == 2, what="systemd has both descriptors")

    @asynccontextmanager
    async def agent(self) -> AsyncIterator[Consoles]:
        """An agent in this process; leaving the block ends it."""
        consoles = Consoles(str(self.run_dir), str(self.log_dir))
        async with trio.open_nursery() as nursery:
            await nursery.start(consoles.run)
            yield consoles
            nursery.cancel_scope.cancel()

    def start_with_an_agent_that_is_killed(self, *command: str, **properties: str) -> None:
        with subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(self.run_dir), str(self.log_dir), self.vm.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        ) as holder:
            assert holder.stdin is not None
            assert holder.stdout is not None
            assert holder.stdout.readline() == "open\n"
            self.start(*command, **properties)
            holder.stdin.write(f"{self.pid}\n")
            holder.stdin.flush()
            assert holder.stdout.readline() == "kept\n"
            holder.kill()
        self.wait_stored()


@pytest.fixture
def unit(tmp_path: Path, vm_name: Callable[[], str], until: Callable[..., Any]) -> Iterator[Unit]:
    made = Unit(vm_named(f"console-{vm_name()}"), tmp_path / "run", tmp_path / "log", until)
    made.run_dir.mkdir()
    made.log_dir.mkdir()
    yield made
    subprocess.run(["systemctl", "kill", "--signal=KILL", made.vm.unit], capture_output=True)
    subprocess.run(["systemctl", "stop", made.vm.unit], capture_output=True)
    subprocess.run(["systemctl", "reset-failed", made.vm.unit], capture_output=True)


async def read_until(stream: ByteStream, end: bytes) -> bytes:
    data = b""
    with trio.fail_after(30):
        while not data.endswith(end):
            piece = await stream.read(65536)
            assert piece, f"the stream ended after {data[-100:]!r}"
            data += piece
    return data


async def test_output_and_input_pass_while_the_agent_is_there(unit: Unit) -> None:
    async with unit.agent() as consoles:
        await consoles.open(unit.vm)
        unit.start("sh", "-c", ECHO)
        async with consoles.live(unit.vm.id) as stream:
            await read_until(stream, b"started\n")
            await consoles.write(unit.vm.id, b"hello\n")
            await read_until(stream, b"heard hello\n")


async def test_a_console_survives_a_killed_agent(unit: Unit) -> None:
    unit.start_with_an_agent_that_is_killed("sh", "-c", ECHO)
    pid = unit.pid
    unit.say(b"anyone\n")
    async with unit.agent() as consoles:
        await consoles.adopt(unit.vm, unit.pid)
        async with consoles.live(unit.vm.id) as stream:
            await read_until(stream, b"heard anyone\n")
            await consoles.write(unit.vm.id, b"again\n")
            await read_until(stream, b"heard again\n")
        assert await consoles.log(unit.vm.id).pread(0, 1000) == (
            b"started\nheard anyone\nheard again\n"
        )
    assert unit.pid == pid


async def test_a_console_survives_the_vmms_restart_by_systemd_without_an_agent(
    unit: Unit,
) -> None:
    unit.start_with_an_agent_that_is_killed("sh", "-c", ECHO, Restart="on-failure", RestartSec="0")
    before = unit.pid
    systemctl("kill", "--kill-whom=main", "--signal=KILL", unit.vm.unit)
    unit.until(lambda: unit.pid not in (0, before), what="systemd restarted it")
    assert unit.stored == 2
    async with unit.agent() as consoles:
        await consoles.adopt(unit.vm, unit.pid)
        async with consoles.live(unit.vm.id) as stream:
            await read_until(stream, b"started\nstarted\n")
            await consoles.write(unit.vm.id, b"second life\n")
            await read_until(stream, b"heard second life\n")


async def test_a_console_survives_the_vmms_restart_while_the_agent_reads(unit: Unit) -> None:
    async with unit.agent() as consoles:
        await consoles.open(unit.vm)
        unit.start("sh", "-c", ECHO, Restart="on-failure", RestartSec="0")
        await consoles.keep(unit.vm, unit.pid)
        unit.wait_stored()
        async with consoles.live(unit.vm.id) as stream:
            await read_until(stream, b"started\n")
            systemctl("kill", "--kill-whom=main", "--signal=KILL", unit.vm.unit)
            await read_until(stream, b"started\n")
            await consoles.write(unit.vm.id, b"on\n")
            await read_until(stream, b"heard on\n")


async def test_a_console_survives_daemon_reexec_without_an_agent(unit: Unit) -> None:
    unit.start_with_an_agent_that_is_killed("sh", "-c", ECHO)
    systemctl("daemon-reexec")
    unit.wait_stored()
    async with unit.agent() as consoles:
        await consoles.adopt(unit.vm, unit.pid)
        async with consoles.live(unit.vm.id) as stream:
            await read_until(stream, b"started\n")
            await consoles.write(unit.vm.id, b"on\n")
            await read_until(stream, b"heard on\n")


async def test_the_store_takes_each_fifo_once_however_often_it_is_given(unit: Unit) -> None:
    unit.start_with_an_agent_that_is_killed("sh", "-c", ECHO)
    for _ in range(3):
        async with unit.agent() as consoles:
            await consoles.adopt(unit.vm, unit.pid)
            await consoles.keep(unit.vm, unit.pid)
    unit.wait_stored()
    messages = [entry["MESSAGE"] for entry in unit.journal()]
    assert not [message for message in messages if "FileDescriptorStoreMax" in message]
    async with unit.agent() as consoles:
        await consoles.adopt(unit.vm)
        await consoles.write(unit.vm.id, b"still\n")
        async with consoles.live(unit.vm.id) as stream:
            await read_until(stream, b"heard still\n")


async def test_readers_get_the_end_of_file_when_the_unit_stops(unit: Unit) -> None:
    unit.start_with_an_agent_that_is_killed("sh", "-c", ECHO)
    unit.say(b"anyone\n")
    command = ["timeout", "60", "cat", str(unit.run_dir / unit.vm.id / OUTPUT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        while reader.stdout.readline() != b"heard anyone\n":
            assert reader.poll() is None
        systemctl("stop", unit.vm.unit)
        assert reader.wait(timeout=30) == 0


async def test_what_a_vmm_said_last_is_in_the_log_after_its_end(unit: Unit) -> None:
    async with unit.agent() as consoles:
        await consoles.open(unit.vm)
        unit.start("sh", "-c", "seq 20000; echo last words")
        unit.until(lambda: unit.show("ActiveState") == "inactive", what="the unit ended")
        await consoles.close(unit.vm)
        log = consoles.log(unit.vm.id)
        assert await log.pread(0, 1 << 20) == (
            b"".join(b"%d\n" % number for number in range(1, 20001)) + b"last words\n"
        )


async def test_a_failed_unit_that_systemctl_starts_again_has_its_console(unit: Unit) -> None:
    async with unit.agent() as consoles:
        await consoles.open(unit.vm)
        unit.start("sh", "-c", "echo dying; sleep 0.1; exit 3")
        unit.until(lambda: unit.show("ActiveState") == "failed", what="the unit failed")
        async with consoles.live(unit.vm.id) as stream:
            await read_until(stream, b"dying\n")
            systemctl("start", unit.vm.unit)
            await read_until(stream, b"dying\n")


async def test_the_units_journal_has_serial_lines_and_stderr(unit: Unit) -> None:
    async with unit.agent() as consoles:
        await consoles.open(unit.vm)
        unit.start("sh", "-c", ECHO)
        await consoles.keep(unit.vm, unit.pid)
        async with consoles.live(unit.vm.id) as stream:
            await read_until(stream, b"started\n")
            await consoles.write(unit.vm.id, b"\x1b[31mred\x1b[0m\n")
            await read_until(stream, b"\n")
        unit.until(
            lambda: (
                {"started", "heard red", "complaint"}
                <= {entry["MESSAGE"] for entry in unit.journal()}
            ),
            what="all of it is in the journal",
        )
        (entry,) = (e for e in unit.journal() if e["MESSAGE"] == "started")
        assert entry["SYSLOG_IDENTIFIER"] == "console"
        assert (entry["VM_NAME"], entry["VM_ID"]) == (unit.vm.name, unit.vm.id)


async def test_a_real_guest_counts_and_answers_over_a_killed_agent(
    unit: Unit, guests: Any, tmp_path: Path
) -> None:
    if not os.path.exists("/dev/kvm"):
        pytest.skip("needs /dev/kvm")
    config = tmp_path / "vm.json"
    boot = {"kernel_image_path": str(guests.guest)}
    machine = {"vcpu_count": 1, "mem_size_mib": 64}
    config.write_text(json.dumps({"boot-source": boot, "drives": [], "machine-config": machine}))
    command = ["firecracker", "--no-api", "--level", "Off", "--config-file", str(config)]
    unit.start_with_an_agent_that_is_killed(*command)
    for number in range(2):
        async with unit.agent() as consoles:
            await consoles.adopt(unit.vm, unit.pid)
            async with consoles.live(unit.vm.id) as stream:
                before = consoles.log(unit.vm.id).size
                with trio.fail_after(30):
                    while consoles.log(unit.vm.id).size < before + 40:
                        await stream.read(65536)
                await consoles.write(unit.vm.id, b"hello %d\n" % number)
                answer = b""
                with trio.fail_after(30):
                    while b"echo hello %d\n" % number not in answer:
                        answer += await stream.read(65536)
    async with unit.agent() as consoles:
        await consoles.adopt(unit.vm, unit.pid)
        data = await _whole_log(consoles, unit.vm)
        counts = [int(line.split()[1]) for line in data.splitlines() if line.startswith(b"count ")]
        assert counts == list(range(counts[0], counts[0] + len(counts)))
        await consoles.write(unit.vm.id, b"q\n")
        unit.until(lambda: unit.show("ActiveState") == "inactive", what="the guest ended it")
        await consoles.close(unit.vm)


async def _whole_log(consoles: Consoles, vm: Vm) -> bytes:
    return await consoles.log(vm.id).pread(0, 1 << 20)
