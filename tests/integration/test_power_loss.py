"""What was acknowledged is there after the host has lost its power.

The agent keeps everything on a disk that is a file, which is copied while it is in use. What the
filesystem has not handed to that disk yet is lost with the copy, as it would be with the host.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from snapshot_tools import archive, settled
from test_abuse_early_death import change_record

pytestmark = pytest.mark.thorough

MIB = 1 << 20
SIZE = 768 * MIB
COMMANDS = {"ext4": ["mkfs.ext4", "-q"], "xfs": ["mkfs.xfs", "-q"]}


def run(*command: Any, check: bool = True) -> None:
    subprocess.run(command, check=check, timeout=60, capture_output=True)


@dataclass
class Host:
    """One whose agent has a disk of its own."""

    agent: Any
    disk: Path

    def mount(self, before: Callable[[], None] = lambda: None) -> None:
        self.agent.stop()
        self.agent.root_dir.mkdir(exist_ok=True)
        run("mount", "-o", "loop", self.disk, self.agent.root_dir)
        before()
        self.agent.start()

    def lose_power(self, before: Callable[[], None] = lambda: None) -> None:
        """Go on with what is on the disk at this moment, as after a boot.

        `before` the agent starts it may change what is there.
        """
        os.kill(self.agent.pid, signal.SIGSTOP)
        left = self.disk.with_suffix(".left")
        run("cp", "--sparse=always", self.disk, left)
        os.kill(self.agent.pid, signal.SIGCONT)
        self.end()
        self.disk = left
        self.mount(before)

    def end(self) -> None:
        """Let nothing run any more, and nothing be left of what ends at a boot."""
        self.agent.stop()
        run("systemctl", "kill", "--signal=KILL", "cocoon-vm-*.service", check=False)
        run("systemctl", "stop", "cocoon-vm-*.service", check=False)
        run("umount", self.agent.root_dir)
        for left in Path("/run/cocoon").iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()


@pytest.fixture(params=["ext4", pytest.param("xfs", marks=pytest.mark.long(group="power on xfs"))])
def host(agent: Any, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    if shutil.which(COMMANDS[request.param][0]) is None:
        pytest.skip(f"{COMMANDS[request.param][0]} is not installed")
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(SIZE)
    run(*COMMANDS[request.param], disk)
    host = Host(agent, disk)
    host.mount()
    yield host
    host.end()
    agent.start()


def record(agent: Any, vm: Any) -> dict[str, Any]:
    """The VM's row in the index."""
    with contextlib.closing(sqlite3.connect(agent.root_dir / "index.db")) as index:
        ((text,),) = index.execute("SELECT record FROM vms WHERE name = ?", (vm.name,))
    found: dict[str, Any] = json.loads(text)
    return found


def shown(agent: Any) -> dict[str, str]:
    """All that the tree shows of what lasts."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    lasting = [*(agent.mount / "snapshots").iterdir(), *(agent.mount / "images").iterdir()]
    lasting += [vm / "config" for vm in (agent.mount / "vms").iterdir()]
    return {str(path): digest(path) for path in lasting}


def take(agent: Any, vm: Any, tmp_path: Path) -> None:
    vm.write("snapshot", "second")


def hibernate(agent: Any, vm: Any, tmp_path: Path) -> None:
    vm.write("hibernate", "second")


def bring_in(agent: Any, vm: Any, tmp_path: Path) -> None:
    shutil.copyfile(archive(agent, "first"), tmp_path / "copy")
    shutil.copyfile(tmp_path / "copy", archive(agent, "second"))


def bring_an_image(agent: Any, vm: Any, tmp_path: Path) -> None:
    with (tmp_path / "image").open("wb") as file:
        file.truncate(4 * MIB)
    run("mkfs.ext4", "-q", "-F", tmp_path / "image")
    shutil.copyfile(tmp_path / "image", agent.mount / "images" / "image")


def rename(agent: Any, vm: Any, tmp_path: Path) -> None:
    archive(agent, "first").rename(archive(agent, "second"))


def describe(agent: Any, vm: Any, tmp_path: Path) -> None:
    archive(agent, "first").with_suffix(".json").write_text('{"description": "told"}')


def remove(agent: Any, vm: Any, tmp_path: Path) -> None:
    archive(agent, "first").unlink()


def restore(agent: Any, vm: Any, tmp_path: Path) -> None:
    vm.write("restore", "first")


def create(agent: Any, vm: Any, tmp_path: Path) -> None:
    (agent.mount / "vms" / "another").mkdir()


def configure(agent: Any, vm: Any, tmp_path: Path) -> None:
    vm.verb("stop")
    vm.write("stop_timeout", "7")


ACTS = [
    *(take, hibernate, bring_in, bring_an_image, rename, describe, remove, restore),
    *(create, configure),
]


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_what_was_acknowledged_is_there(
    host: Host, agent: Any, make_vm: Callable[..., Any], tmp_path: Path, act: Callable[..., None]
) -> None:
    vm = make_vm(storage="8M")
    vm.verb("start")
    vm.write("snapshot", "first")
    act(agent, vm, tmp_path)
    before = shown(agent)
    host.lose_power()
    assert shown(agent) == before
    settled(agent)
    if act is hibernate:
        vm.write("restore", "second")
    else:
        vm.verb("start")
    vm.wait_counting()


@pytest.mark.parametrize("kind", ["empty", "image", "clone"])
def test_the_disk_of_a_vm_that_ran_is_whole(
    host: Host,
    agent: Any,
    make_vm: Callable[..., Any],
    until: Callable[..., Any],
    tmp_path: Path,
    kind: str,
) -> None:
    if kind == "image":
        bring_an_image(agent, None, tmp_path)
    vm = make_vm(storage="8M", **({"image": "image"} if kind == "image" else {}))
    vm.verb("start")
    if kind == "clone":
        with (agent.root_dir / "vms" / vm.read("id") / "cow.raw").open("r+b") as disk:
            disk.write(os.urandom(MIB))
        vm.write("snapshot", "first")
        vm = make_vm(hypervisor=None, memory=None, boot=None)
        vm.write("from", "first")
        vm.verb("start")
        until(lambda: not record(agent, vm)["unwritten"], what="its disk is written out")
    vm.verb("kill")
    disk = agent.root_dir / "vms" / vm.read("id") / "cow.raw"
    before = hashlib.sha256(disk.read_bytes()).hexdigest()
    host.lose_power()
    assert json.loads(vm.read("info.json"))["first_booted"]
    assert hashlib.sha256(disk.read_bytes()).hexdigest() == before


def test_a_clone_whose_disk_was_not_written_out_says_so_and_keeps_it(
    host: Host, agent: Any, make_vm: Callable[..., Any]
) -> None:
    vm = make_vm(storage="8M")
    vm.verb("start")
    vm.write("snapshot", "first")
    vm = make_vm(hypervisor=None, memory=None, boot=None)
    vm.write("from", "first")
    vm.verb("start")
    disk = agent.root_dir / "vms" / vm.read("id") / "cow.raw"
    vm.verb("kill")
    written = os.urandom(MIB)
    with disk.open("r+b") as file:
        file.write(written)
        os.fsync(file.fileno())
    host.lose_power(before=lambda: change_record(agent, vm.name, unwritten=True))
    vm.wait_for_state("stopped")
    assert "they may have holes" in vm.read("error")
    vm.verb("start")
    assert disk.read_bytes()[:MIB] == written
    assert not record(agent, vm)["unwritten"]
