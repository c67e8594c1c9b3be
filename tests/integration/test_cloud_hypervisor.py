"""The life of a VM on a real Cloud Hypervisor, where there is one on PATH."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ch_api import info
from snapshot_tools import archive, extract, refused, restarted_by_systemd

pytestmark = pytest.mark.skipif(
    shutil.which("cloud-hypervisor") is None, reason="cloud-hypervisor is not installed"
)


@pytest.fixture
def vm(make_vm: Callable[..., Any]) -> Any:
    """A VM that counts. Its guest hears no power button."""
    vm = make_vm(hypervisor="cloud-hypervisor", storage="8M", stop_timeout=1)
    vm.verb("start")
    vm.wait_counting()
    return vm


def test_it_starts_pauses_answers_and_stops(agent, vm, until):
    assert json.loads(vm.read("info.json"))["hypervisor_version"].startswith("53.")
    vm.verb("pause")
    assert vm.state == "paused"
    vm.verb("resume")
    vm.wait_counting()
    vm.write("console", "hello")
    until(lambda: "echo hello" in vm.read("console"))
    assert "vcpus 1" in vm.read("stats").splitlines()
    assert int(dict(line.split() for line in vm.read("stats").splitlines())["memory_bytes"]) > 0
    score = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", vm.unit],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    ).stdout
    assert float(re.search(r"exposure level.*?: ([0-9.]+)", score)[1]) <= 1.5
    vm.verb("pause")
    vm.verb("stop")
    assert (vm.state, vm.pid) == ("stopped", 0)
    lines = len(vm.counts)
    # Neither a socket nor its lock file of the first is in the way of the second.
    vm.verb("start")
    vm.wait_counting()
    assert vm.counts[lines] == 1


def test_its_disk_is_its_own_and_open_once(agent, vm):
    opened = {
        os.readlink(f"/proc/{vm.pid}/fd/{number}") for number in os.listdir(f"/proc/{vm.pid}/fd")
    }
    assert any(path.endswith("/cow.raw") for path in opened)
    devices = {path for path in opened if path.startswith("/dev/")}
    assert devices <= {"/dev/kvm", "/dev/urandom", "/dev/null"}


@pytest.mark.parametrize("away", ["kill", "restart", "stop"])
def test_its_console_goes_on_over_the_agents_absence(agent, vm, until, away):
    vm.write("console", "before")
    until(lambda: "echo before" in vm.read("console"))
    if away == "stop":
        agent.stop()
        agent.start()
    else:
        getattr(agent, away)()
    pid = vm.pid
    vm.wait_counting()
    vm.write("console", "after")
    until(lambda: "echo after" in vm.read("console").replace("\0", ""))
    vm.wait_counting()
    counts = vm.counts
    assert counts == list(range(1, len(counts) + 1))
    assert (vm.state, vm.pid) == ("running", pid)


def test_one_that_dies_is_in_error_or_comes_back_by_systemd_alone(agent, vm, make_vm, until):
    os.kill(vm.pid, signal.SIGKILL)
    vm.wait_for_state("error")
    assert "killed by signal KILL" in vm.read("error")
    vm.verb("start")
    vm.wait_counting()
    vm.verb("kill")
    vm.write("restart", "on-failure")
    vm.verb("start")
    restarted_by_systemd(agent, vm, until)
    vm.wait_for_state("running")
    lines = vm.counts.count(1)
    vm.wait_counting()
    assert lines >= 2
    vm.verb("kill")
    assert vm.state == "stopped"


def test_what_it_cannot_do_is_said_before_anything_starts(make_vm):
    vm = make_vm(hypervisor="cloud-hypervisor", track_dirty=True)
    with refused(errno.EOPNOTSUPP):
        vm.verb("start")
    assert "track_dirty" in vm.read("error")
    assert vm.state == "created"


def ready(vm: Any, until: Any, count: int) -> None:
    """Let the guest make queues of its disks ready, which the VMM has a thread for from then on."""
    vm.wait_counting()
    vm.write("console", "d")
    until(lambda: f"{count} queues" in vm.read("console"))


def allowed(task: Path) -> str:
    """The CPUs that a thread or a process may run on."""
    status = (task / "status").read_text()
    return re.search(r"\nCpus_allowed_list:\s*(\S+)\n", status)[1]


def served(vm: Any) -> dict[str, str]:
    """The same of the threads for queues of disks, by name."""
    found = {}
    for task in Path(f"/proc/{vm.pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            found[(task / "comm").read_text().strip()] = allowed(task)
    return {name: cpus for name, cpus in found.items() if "_q" in name}


def in_configuration(agent: Any, vm: Any) -> bool:
    """Whether queues are tied in what the VM's process was loaded from."""
    return "queue_affinity" in (agent.root_dir / "vms" / vm.read("id") / "config.json").read_text()


def test_queues_are_tied_to_the_cpus_that_their_vm_names(agent, make_vm, vm_name, tmp_path, until):
    vm = make_vm(
        hypervisor="cloud-hypervisor",
        cpu=2,
        storage="8M",
        queue_affinity=[[1], [0]],
        stop_timeout=1,
    )
    vm.verb("start")
    ready(vm, until, 2)
    until(lambda: served(vm) == {"cow_q0": "1", "cow_q1": "0"})
    with refused(errno.EBUSY):
        vm.write("queue_affinity", "[]")
    # The guest cannot reach a disk that comes later, but the VMM says how it will serve it.
    vm.write("disks", '[{"name": "later", "size": "1M"}]')
    tie = [{"queue_index": 0, "host_cpus": [1]}, {"queue_index": 1, "host_cpus": [0]}]
    disks = info(vm)["config"]["disks"]
    assert [(disk["id"], disk["queue_affinity"]) for disk in disks] == [
        ("cow", tie),
        ("data-later", tie),
    ]
    name = vm_name()
    vm.write("snapshot", name)
    taken = extract(archive(agent, name), tmp_path)["config.json"].read_text()
    assert "data-later" in taken
    assert "queue_affinity" not in taken
    bare = {"hypervisor": None, "memory": None, "boot": None, "stop_timeout": 1}
    free, tied = (make_vm(**bare) for _ in range(2))
    for clone in (free, tied):
        clone.write("from", name)
    tied.write("queue_affinity", "[[0], [1]]")
    for clone in (free, tied):
        clone.verb("start")
    until(lambda: served(tied) == {"cow_q0": "0", "cow_q1": "1"})
    anywhere = allowed(Path(f"/proc/{free.pid}"))
    until(lambda: served(free) == {"cow_q0": anywhere, "cow_q1": anywhere})
    assert [in_configuration(agent, clone) for clone in (free, tied)] == [False, True]
    vm.write("restore", name)
    until(lambda: served(vm) == {"cow_q0": "1", "cow_q1": "0"})
    # Booted from its own disks, the clone has its own tie too, and with a disk more.
    tied.verb("stop")
    tied.verb("start")
    ready(tied, until, 4)
    names = ["cow_q0", "cow_q1", "data-later_q0", "data-later_q1"]
    until(lambda: served(tied) == dict(zip(names, ["0", "1"] * 2, strict=True)))
    archive(agent, name).unlink()


def test_a_cpu_that_is_not_here_is_refused_before_anything_starts(agent, make_vm, vm_name):
    vm = make_vm(hypervisor="cloud-hypervisor", storage="8M", queue_affinity=[[1023]])
    with refused(errno.EINVAL):
        vm.verb("start")
    assert "CPU 1023, which this host does not have" in vm.read("error")
    assert vm.state == "created"
    vm.write("queue_affinity", "[[0]]")
    vm.verb("start")
    name = vm_name()
    vm.write("snapshot", name)
    vm.verb("kill")
    vm.write("queue_affinity", "[[1023]]")
    with refused(errno.EINVAL):
        vm.write("restore", name)
    assert vm.state == "stopped"
    clone = make_vm(hypervisor=None, memory=None, boot=None)
    clone.write("from", name)
    clone.write("queue_affinity", "[[1023]]")
    with refused(errno.EINVAL):
        clone.verb("start")
    clone.write("queue_affinity", "[]")
    clone.verb("start")
    clone.wait_counting()
    archive(agent, name).unlink()


def test_a_clone_can_be_snapshot_before_its_memory_is_loaded(agent, make_vm, vm_name):
    source = make_vm(hypervisor="cloud-hypervisor", memory="512M")
    source.verb("start")
    source.wait_counting()
    first, second = vm_name(), vm_name()
    source.write("snapshot", first)
    clone = make_vm(hypervisor=None, memory=None, boot=None)
    clone.write("from", first)
    clone.verb("start")
    clone.write("snapshot", second)
    clone.wait_counting()
    for name in (first, second):
        archive(agent, name).unlink()
