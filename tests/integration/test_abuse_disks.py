"""Disks of the host that are none, or become none, while VMs have them in their configuration."""

import errno
import json
import os
from pathlib import Path

import pytest


def test_a_vm_with_a_disk_that_is_none_can_be_removed(agent, make_vm):
    vm = make_vm(disks=[{"path": "/etc", "readonly": True}])
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        vm.verb("start")
    assert vm.state == "created"
    vm.path.rmdir()
    assert not vm.path.exists()


def test_a_vm_ends_and_goes_when_something_else_has_taken_its_disks_place(agent, make_vm):
    disk = Path("/run/lab-disk")
    disk.write_bytes(bytes(1 << 20))
    vm = make_vm(disks=[{"path": str(disk), "readonly": True}])
    vm.verb("start")
    disk.unlink()
    disk.mkdir()
    vm.verb("kill")
    assert vm.state == "stopped"
    vm.path.rmdir()
    assert str(vm.path.name) not in json.loads((agent.mount / "index.json").read_text())["names"]
    disk.rmdir()
