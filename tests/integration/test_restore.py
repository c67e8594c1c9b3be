"""VMs put back to a snapshot, with real VMMs."""

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from snapshot_tools import archive, described, last_count, names, refused, settled

from agent.model.snapshot import STATE_FILES

pytestmark = [pytest.mark.thorough(group="snapshots"), pytest.mark.backends]


@pytest.fixture
def taken(agent: Any, make_vm: Callable[..., Any]) -> Any:
    """A VM that counts, the name of a snapshot of it, and the last count before it."""
    vm = make_vm(storage="8M")
    vm.verb("start")
    vm.wait_counting()
    name = f"of-{vm.name}"
    before = last_count((vm.path / "console").read_bytes())
    vm.write("snapshot", name)
    yield vm, name, before
    for found in names(agent):
        archive(agent, found).unlink()


def counts_again(vm: Any, lines: int, before: int) -> None:
    """Fail unless the lines of the console beyond the first `lines` go on from `before`."""
    vm.wait_counting()
    vm.wait_counting()
    # What the guest still said before it went back comes first.
    steps = list(itertools.pairwise(vm.counts[lines - 1 :]))
    back = max((number for number, (old, new) in enumerate(steps) if new <= old), default=0)
    later = [new for _, new in steps[back:]]
    assert before < later[0] < before + 30
    assert later == list(range(later[0], later[0] + len(later)))


@pytest.mark.backends(core=True)
def test_a_running_vm_goes_back(agent, taken):
    vm, name, before = taken
    for _ in range(40):
        vm.wait_counting()
    lines = len(vm.counts)
    vm.write("restore", name)
    assert vm.state == "running"
    counts_again(vm, lines, before)
    settled(agent)


@pytest.mark.parametrize("verb", ["stop", "kill", "pause"])
def test_a_vm_goes_back_from_another_state(agent, taken, verb):
    vm, name, before = taken
    vm.wait_counting()
    vm.verb(verb)
    lines = len(vm.counts)
    vm.write("restore", name)
    assert vm.state == "running"
    counts_again(vm, lines, before)
    settled(agent)


def test_a_vm_in_error_goes_back(agent, taken):
    vm, name, before = taken
    os.kill(vm.pid, 9)
    vm.wait_for_state("error")
    lines = len(vm.counts)
    vm.write("restore", name)
    assert (vm.state, vm.read("error")) == ("running", "")
    counts_again(vm, lines, before)


@pytest.mark.backends(core=True)
def test_the_disk_goes_back_too(agent, taken):
    vm, name, _ = taken
    disk = agent.root_dir / "vms" / vm.read("id") / "cow.raw"
    with disk.open("r+b") as file:
        file.write(b"written later")
    vm.write("restore", name)
    assert disk.read_bytes()[:13] == bytes(13)
    assert disk.stat().st_uid == disk.parent.stat().st_uid != 0


def test_a_restored_vm_boots_cold(agent, taken):
    vm, name, _ = taken
    boot = vm.read("boot")
    vm.write("restore", name)
    assert vm.read("boot") == boot
    vm.verb("stop")
    lines = len(vm.counts)
    vm.verb("start")
    vm.wait_counting()
    assert vm.counts[lines] == 1


@pytest.mark.parametrize("damage", ["state", "memory", "cow.raw"])
@pytest.mark.parametrize("how", ["cut short", "gone", "changed"])
def test_a_damaged_snapshot_leaves_the_live_vm_running(agent, taken, damage, how, backend):
    vm, name, _ = taken
    if how == "changed" and (damage != "state" or backend == "cloud-hypervisor"):
        pytest.skip("nothing tells that a bit has changed")
    damage = getattr(STATE_FILES[backend], damage, damage)
    file = agent.root_dir / "snapshots" / described(agent, name)["id"] / damage
    match how:
        case "cut short":
            os.truncate(file, file.stat().st_size // 2)
        case "gone":
            file.unlink()
        case "changed":
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
    pid = vm.pid
    with refused(errno.EBADMSG):
        vm.write("restore", name)
    assert (vm.state, vm.pid) == ("running", pid)
    vm.wait_counting()
    settled(agent)


def test_a_snapshot_of_another_vm_leaves_the_live_vm_running(taken, make_vm):
    _, name, _ = taken
    vm = make_vm()
    vm.verb("start")
    pid = vm.pid
    with refused(errno.EINVAL):
        vm.write("restore", name)
    assert (vm.state, vm.pid) == ("running", pid)


def test_a_snapshot_that_is_not_there_is_enoent(taken):
    vm, _, _ = taken
    with refused(errno.ENOENT):
        vm.write("restore", "no-such")
    assert vm.state == "running"


def test_a_vm_that_never_ran_cannot_go_back(taken, make_vm):
    _, name, _ = taken
    vm = make_vm()
    with refused(errno.EINVAL):
        vm.write("restore", name)
    assert vm.state == "created"


def test_a_clone_goes_back_to_where_it_came_from(taken, make_vm):
    _, name, before = taken
    vm = make_vm(hypervisor=None, memory=None, boot=None)
    vm.write("from", name)
    vm.verb("start")
    vm.wait_counting()
    lines = len(vm.counts)
    vm.write("restore", name)
    counts_again(vm, lines, before)


def test_what_a_restore_left_behind_is_not_what_the_next_one_goes_back_to(agent, taken):
    vm, name, _ = taken
    directory = agent.root_dir / "vms" / vm.read("id")
    left = directory.with_name(f"{directory.name}.old")
    # As after a restore whose last step, removing what it has replaced, failed.
    shutil.copytree(directory, left)
    (left / "stale").touch()
    vm.write("restore", name)
    assert vm.state == "running"
    assert not left.exists()
    assert not (directory / "stale").exists()
    settled(agent)
