"""The configuration file, against the API that Firecracker publishes for each version."""

import json

import pytest
from described_vmm import Description

from agent.model.access import Access
from agent.model.config import Boot, Disk, VmConfig
from agent.model.size import GIB, MIB
from agent.model.vm import Vm
from agent.vmm.driver import Version
from agent.vmm.firecracker import Firecracker

CONFIGS = {
    "the least": VmConfig(memory=16 * MIB, boot=Boot(kernel="k")),
    "the most": VmConfig(
        cpu=32,
        memory=64 * GIB,
        storage=GIB,
        boot=Boot(kernel="k", initrd="i", cmdline="console=ttyS0"),
        disks=(Disk(path="/dev/sdb", readonly=True), Disk(name="data", size=MIB)),
        track_dirty=True,
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("io_uring", [False, True])
@pytest.mark.parametrize(("name", "version"), [("1.12", "1.12.1"), ("1.16", "1.16.1")])
def test_the_configuration_file_is_one_that_the_version_describes(config, io_uring, name, version):
    numbers = tuple(map(int, version.split(".")))
    vm = Vm("a" * 26, "web", 70000, Access(0, 0), config)
    plan = Firecracker(io_uring=io_uring).plan(vm, Version("/firecracker", version, numbers))
    document = json.loads(plan.files["vm.json"])
    assert not Description(f"firecracker-{name}").flaw("FullVmConfiguration", document)
