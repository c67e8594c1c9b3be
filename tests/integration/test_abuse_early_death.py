"""An agent that dies before it has written down that it started a VM."""

import json
import os
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest

ACL = "system.posix_acl_access"


def change_record(agent, name, **values):
    """Change the VM's row, while there is no agent."""
    with sqlite3.connect(agent.root_dir / "index.db") as index:
        ((vm_id, text),) = index.execute("SELECT id, record FROM vms WHERE name = ?", (name,))
        record = json.loads(text) | values
        if values.get("state") == "created" and not record["from_snapshot"]:
            record["booted"] = {"kernel": "", "initrd": "", "source": None}
        index.execute("UPDATE vms SET record = ? WHERE id = ?", (json.dumps(record), vm_id))
    index.close()


def forget_start(agent, name):
    """Put the VM's row to what it was before its first start."""
    change_record(
        agent,
        name,
        state="created",
        hypervisor="",
        hypervisor_version="",
        pid=0,
        first_booted=False,
        started_at=0,
    )


@pytest.mark.parametrize("kind", ["boot", "clone"])
def test_a_vm_whose_start_was_not_written_down_goes_on(agent, make_vm, kind):
    vm = make_vm()
    snapshot = agent.mount / "snapshots" / f"early-{kind}.tar"
    if kind == "clone":
        vm.verb("start")
        vm.write("snapshot", snapshot.stem)
        vm = make_vm(hypervisor=None, memory=None, boot=None)
        vm.write("from", snapshot.stem)
    vm.verb("start")
    pid = vm.pid
    agent.stop()
    forget_start(agent, vm.name)
    agent.start()
    vm.wait_for_state("running")
    assert vm.pid == pid
    assert json.loads(vm.read("info.json"))["first_booted"]
    vm.wait_counting()
    vm.verb("pause")
    vm.verb("resume")
    vm.write("snapshot", f"late-{kind}")
    vm.verb("stop")
    vm.verb("start")
    vm.wait_counting()
    (agent.mount / "snapshots" / f"late-{kind}.tar").unlink()
    if kind == "clone":
        snapshot.unlink()


def test_a_vm_whose_first_start_was_not_written_down_has_been_started(agent, make_vm):
    source, vm = make_vm(), make_vm(storage="8M")
    snapshot = agent.mount / "snapshots" / "early-from.tar"
    source.verb("start")
    source.write("snapshot", snapshot.stem)
    vm.verb("start")
    agent.stop()
    forget_start(agent, vm.name)
    agent.start()
    info = json.loads(vm.read("info.json"))
    assert info["first_booted"]
    assert info["started_at"]
    vm.verb("stop")
    # Its disk would go.
    for key, value in (("from", snapshot.stem), ("storage", "4M")):
        with pytest.raises(OSError, match="Invalid argument"):
            vm.write(key, value)
    snapshot.unlink()


def test_a_later_start_that_had_not_come_to_the_unit_is_told_as_one(agent, make_vm):
    vm = make_vm()
    vm.verb("start")
    vm.verb("stop")
    agent.stop()
    change_record(agent, vm.name, state="starting", reason="boot", started_at=time.time())
    agent.start()
    assert vm.state == "stopped"
    assert json.loads(vm.read("info.json"))["reason"] == "agent-restart"
    assert "start it again" in vm.read("error")


def test_what_a_start_has_taken_is_given_back_after_a_death_in_its_midst(agent, make_vm):
    disk = Path("/run/lab-lent")
    disk.write_bytes(bytes(1 << 20))
    disk.chmod(0o600)
    vm = make_vm(disks=[{"path": str(disk), "readonly": True}])
    vm.verb("start")
    uid = json.loads(vm.read("info.json"))["uid"]
    agent.stop()
    forget_start(agent, vm.name)
    subprocess.run(["systemctl", "stop", vm.unit], check=True, timeout=60)
    assert Path(f"/run/userdb/{uid}.user").exists()
    assert uid.to_bytes(4, "little") in os.getxattr(disk, ACL)
    agent.start()
    assert vm.state == "created"
    assert not Path(f"/run/userdb/{uid}.user").exists()
    assert ACL not in os.listxattr(disk)
    disk.unlink()


@pytest.mark.parametrize("kind", ["boot", "clone", "restore"])
def test_a_start_that_takes_too_long_is_ended(request, agent, make_vm, kind):
    if not request.config.option.long:
        pytest.skip("waits for a minute: --long")
    vm = make_vm()
    snapshot = agent.mount / "snapshots" / f"late-{kind}.tar"
    if kind != "boot":
        vm.verb("start")
        vm.write("snapshot", snapshot.stem)
    if kind == "clone":
        vm = make_vm(hypervisor=None, memory=None, boot=None)
        vm.write("from", snapshot.stem)
    drop_in = Path(f"/run/systemd/system/{vm.unit}.d/50-slow.conf")
    drop_in.parent.mkdir()
    drop_in.write_text("[Service]\nExecStartPost=+/bin/sleep 300\nTimeoutStartSec=infinity\n")
    subprocess.run(["systemctl", "daemon-reload"], check=True, timeout=60)
    with pytest.raises(TimeoutError):
        vm.write("restore", snapshot.stem) if kind == "restore" else vm.verb("start")
    drop_in.unlink()
    subprocess.run(["systemctl", "daemon-reload"], check=True, timeout=60)
    assert vm.state == "error"
    assert "within" in vm.read("error")
    assert vm.pid == 0
    vm.verb("start")
    vm.wait_counting()
    if kind != "boot":
        snapshot.unlink()


@pytest.mark.parametrize("kind", ["snapshots", "images"])
def test_what_cannot_be_removed_keeps_no_agent_from_starting(agent, kind):
    agent.stop()
    left = agent.root_dir / kind / f"{'a' * 26}.staging"
    left.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", left], check=True, timeout=60)
    agent.start()
    assert any(f"{'a' * 26} is not removed yet" in line for line in agent.lines())
    subprocess.run(["umount", left], check=True, timeout=60)
    agent.restart()
    assert not left.exists()
