"""Snapshots from one host to another, and from one boot of a host to the next, a lab each."""

import shutil
import subprocess
from pathlib import Path

import pytest

RUN = str(Path(__file__).with_name("run"))
BACKENDS = {
    "firecracker": "firecracker",  # which the lab fetches
    "qemu": "qemu-system-x86_64",
    "cloud-hypervisor": "cloud-hypervisor",
}

FIRST = """
mkdir /cocoon/vms/a
config='{"hypervisor": "%s", "memory": "64M", "storage": "8M", "stop_timeout": 1}'
echo "$config" > /cocoon/vms/a/config
cp "$COCOON_TEST_GUESTS/guest.elf" /var/lib/vmlinux
echo '{"kernel": "/var/lib/vmlinux"}' > /cocoon/vms/a/boot
echo start > /cocoon/vms/a/state
until grep -q '^count 20' /cocoon/vms/a/console; do sleep 0.1; done
echo nightly > /cocoon/vms/a/snapshot
cp /cocoon/snapshots/nightly.tar /var/lib/cocoon/export.tar
"""

SECOND = """
mkdir -p /run/systemd/system/cocoon-host.service.d
printf '[Service]\\nEnvironment=COCOON_ROOT_DIR=/var/lib/elsewhere/cocoon\\n' \
    > /run/systemd/system/cocoon-host.service.d/50-root.conf
systemctl daemon-reload
systemctl restart cocoon-host
test -d /var/lib/elsewhere/cocoon/snapshots
cp /var/lib/cocoon/export.tar /cocoon/snapshots/nightly.tar
echo '{"name": "b", "from": "nightly", "stop_timeout": 1, "state": "start"}' > /cocoon/create
until grep -q '^count' /cocoon/vms/b/console; do sleep 0.1; done
grep -m 1 '^count' /cocoon/vms/b/console
echo stop > /cocoon/vms/b/state
echo start > /cocoon/vms/b/state
until grep -q '^count 2\\b' /cocoon/vms/b/console; do sleep 0.1; done
cat /cocoon/vms/b/state
"""

HIBERNATE = """
echo '{"name": "a", "hypervisor": "firecracker", "memory": "64M", "storage": "8M",
    "boot": {"kernel": "'$COCOON_TEST_GUESTS'/guest.elf"}, "state": "start"}' > /cocoon/create
until grep -q '^count 20' /cocoon/vms/a/console; do sleep 0.1; done
echo asleep > /cocoon/vms/a/hibernate
cat /cocoon/vms/a/state
grep -c '^count' /cocoon/vms/a/console
"""

WAKE = """
cat /cocoon/vms/a/state
before=$(grep -c '^count' /cocoon/vms/a/console)
echo asleep > /cocoon/vms/a/restore
cat /cocoon/vms/a/state
until [ $(grep -c '^count' /cocoon/vms/a/console) -ge $((before + 10)) ]; do sleep 0.1; done
grep '^count' /cocoon/vms/a/console | tr -d '\\r'
"""


def on_a_host(script: str, state: Path) -> str:
    """Run the script on a host of its own, which keeps `state` in its /var/lib/cocoon."""
    command = [RUN, "--agent", "--state", str(state), "--", "bash", "-euc", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_snapshot_goes_on_on_another_host_and_boots_cold_there(
    tmp_path: Path, backend: str
) -> None:
    if backend != "firecracker" and shutil.which(BACKENDS[backend]) is None:
        pytest.skip(f"{BACKENDS[backend]} is not installed")
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    on_a_host(FIRST % backend, first)
    shutil.move(first / "export.tar", second / "export.tar")
    line, state = on_a_host(SECOND, second).splitlines()
    assert int(line.split()[1]) >= 20
    assert state == "running"


def test_a_hibernated_vm_wakes_after_the_host_has_booted_again(tmp_path: Path) -> None:
    state, count = on_a_host(HIBERNATE, tmp_path).splitlines()
    assert state == "stopped"
    before, after, *lines = on_a_host(WAKE, tmp_path).splitlines()
    assert (before, after) == ("stopped", "running")
    assert len(lines) >= int(count) + 10
    assert lines[:-1] == [f"count {number}" for number in range(1, len(lines))]
