"""Snapshots on a small filesystem of its own, with reflinks and without, until it is full."""

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from snapshot_tools import archive, described, names, refused, settled

pytestmark = [pytest.mark.thorough(group="snapshots"), pytest.mark.backends]

KIB, MIB = 1 << 10, 1 << 20
SIZE = 512 * MIB
DISK = 48 * MIB


@pytest.fixture(params=["reflink", "no-reflink"])
def small(agent: Any, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[bool]:
    """Let the agent keep everything on a small XFS; whether that has reflinks."""
    if shutil.which("mkfs.xfs") is None:
        pytest.skip("xfsprogs is not installed")
    has_reflinks = request.param == "reflink"
    image = tmp_path / "xfs"
    with image.open("wb") as file:
        file.truncate(SIZE)
    option = f"reflink={int(has_reflinks)}"
    subprocess.run(["mkfs.xfs", "-q", "-m", option, image], check=True, timeout=60)
    agent.stop()
    agent.root_dir.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, agent.root_dir], check=True, timeout=60)
    agent.start()
    yield has_reflinks
    for found in names(agent):
        archive(agent, found).unlink()
    for vm in (agent.mount / "vms").iterdir():
        if (vm / "pid").read_text() != "0\n":
            (vm / "state").write_text("kill\n")
        vm.rmdir()
    agent.stop()
    subprocess.run(["umount", agent.root_dir], check=True, timeout=60)
    agent.start()


def leave(agent: Any, room: int) -> Path:
    """Fill the filesystem but for `room` bytes."""
    filler = Path(agent.root_dir) / "filler"
    free = shutil.disk_usage(agent.root_dir).free
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - room))
    return filler


def free(filler: Path) -> None:
    """Make room again; XFS takes its time to free the blocks of what was unlinked."""
    os.truncate(filler, 0)
    filler.unlink()


@pytest.fixture
def vm(small: bool, make_vm: Callable[..., Any], agent: Any) -> Any:
    """A VM whose disk has data."""
    vm = make_vm(storage="48M")
    vm.verb("start")
    vm.wait_counting()
    disk = Path(agent.root_dir) / "vms" / vm.read("id") / "cow.raw"
    with disk.open("r+b") as file:
        file.write(random.Random(3).randbytes(DISK))
        os.fsync(file.fileno())
    return vm


@pytest.mark.parametrize("how", ["snapshot", "hibernate"])
def test_a_full_disk_while_taking(agent, vm, small, backend, how):
    # QEMU's memory is shared with its snapshot like a disk: all that needs room is its state.
    room = 16 * KIB if small and backend == "qemu" else 16 * MIB
    filler = leave(agent, room)
    with refused(errno.ENOSPC):
        vm.write(how, "full")
    assert vm.state == "running"
    vm.wait_counting()
    assert "full" not in names(agent)
    settled(agent)
    free(filler)
    vm.write("snapshot", "full")
    assert "full" in names(agent)


def test_a_full_disk_while_importing(agent, vm, tmp_path):
    vm.write("snapshot", "one")
    copy = tmp_path / "copy.tar"
    shutil.copyfile(archive(agent, "one"), copy)
    filler = leave(agent, 16 * MIB)
    with refused(errno.ENOSPC):
        shutil.copyfile(copy, archive(agent, "two"))
    assert names(agent) == {"one"}
    settled(agent)
    free(filler)
    shutil.copyfile(copy, archive(agent, "two"))
    assert described(agent, "two")["files"] == described(agent, "one")["files"]


def test_a_full_disk_while_cloning(agent, vm, small, make_vm):
    vm.write("snapshot", "one")
    clone = make_vm(hypervisor=None, memory=None, boot=None)
    clone.write("from", "one")
    filler = leave(agent, 16 * MIB)
    if small:
        # Nothing is copied: there is room for as many as you like.
        clone.verb("start")
    else:
        with refused(errno.ENOSPC):
            clone.verb("start")
        assert not (Path(agent.root_dir) / "vms" / clone.read("id")).exists()
        free(filler)
        clone.verb("start")
    clone.wait_counting()
    assert vm.state == "running"
    settled(agent)


def test_a_full_disk_while_restoring(agent, vm, small):
    vm.write("snapshot", "one")
    pid = vm.pid
    filler = leave(agent, 16 * MIB)
    if not small:
        with refused(errno.ENOSPC):
            vm.write("restore", "one")
        assert (vm.state, vm.pid) == ("running", pid)
        vm.wait_counting()
        settled(agent)
        free(filler)
    vm.write("restore", "one")
    assert vm.state == "running"
    assert vm.pid != pid
    vm.wait_counting()
    settled(agent)
