"""Two agents with directories of their own: their VMs would have the same units and users."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MOUNT = Path("/run/other/mount")


@pytest.fixture
def other_agent(agent):
    options = ["--root-dir", "/var/lib/other", "--run-dir", "/run/other/run", "--mount", str(MOUNT)]
    subprocess.run(
        [
            *("systemd-run", "--unit=other-agent", "--service-type=notify", "--quiet"),
            *(f"--setenv={name}={os.environ[name]}" for name in ("PYTHONPATH", "PATH")),
            *(sys.executable, "-m", "agent.cli.main", "run", *options),
        ],
        check=True,
        timeout=60,
    )
    yield MOUNT
    subprocess.run(["systemctl", "stop", "other-agent"], check=True, timeout=60)


def test_a_second_agent_starts_no_vm_and_touches_none(agent, make_vm, guests, other_agent):
    vm = make_vm("both")
    vm.verb("start")
    pid = vm.pid
    namesake = other_agent / "vms" / "both"
    namesake.mkdir()
    config = {"memory": "64M", "boot": {"kernel": str(guests.guest)}}
    (namesake / "config").write_text(json.dumps(config))
    descriptor = os.open(namesake / "state", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
            os.write(descriptor, b"start")
    finally:
        os.close(descriptor)
    assert str(agent.pid) in (namesake / "error").read_text()
    assert (namesake / "state").read_text() == "created\n"
    assert (vm.state, vm.pid) == ("running", pid)
    vm.wait_counting()
    namesake.rmdir()
