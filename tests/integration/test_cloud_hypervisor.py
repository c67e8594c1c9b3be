"""The life of a VM on a real Cloud Hypervisor, where there is one on PATH."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from snapshot_tools import refused

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
    pid = vm.pid
    agent.stop()
    os.kill(pid, signal.SIGKILL)
    show = ["systemctl", "show", "--property=MainPID", "--value", vm.unit]
    until(
        lambda: (
            subprocess.run(show, capture_output=True, text=True, check=True).stdout.strip()
            not in ("0", str(pid))
        )
    )
    agent.start()
    vm.wait_for_state("running")
    lines = vm.counts.count(1)
    vm.wait_counting()
    assert lines >= 2
    vm.verb("kill")
    assert vm.state == "stopped"


@pytest.mark.parametrize(
    ("config", "word"),
    [({"track_dirty": True}, "track_dirty"), ({"max_memory": "128M"}, "max_memory")],
)
def test_what_it_cannot_do_is_said_before_anything_starts(make_vm, config, word):
    vm = make_vm(hypervisor="cloud-hypervisor", **config)
    with refused(errno.EOPNOTSUPP):
        vm.verb("start")
    assert word in vm.read("error")
    assert vm.state == "created"
