import dataclasses

import pytest

from agent.model.access import Access
from agent.model.config import KEYS, BaseImage, Boot, Disk, VmConfig, parse_config, show_config
from agent.model.errors import Damaged, Missing
from agent.model.image import Image
from agent.model.pinned import PINNED, boot_files, pin
from agent.model.size import GIB, MIB
from agent.model.snapshot import Snapshot, SnapshotBoot, SnapshotDisk, SnapshotFile
from agent.model.vm import BootFiles

SNAPSHOT = Snapshot(
    id="abcdefghijklmnopqrstuvwxyz",
    name="nightly",
    access=Access(0, 0),
    hypervisor="firecracker",
    cpu=2,
    memory=512 * MIB,
    disks=(
        SnapshotDisk("/var/lib/cocoon/run/vm/cow.raw", role="cow"),
        SnapshotDisk("/var/lib/cocoon/run/vm/data-logs.raw", readonly=True, role="data"),
    ),
    boot=SnapshotBoot(cmdline="console=ttyS0"),
    files=(
        SnapshotFile("cow.raw", GIB),
        SnapshotFile("data-logs.raw", 4 * MIB),
        SnapshotFile("mem", 512 * MIB),
    ),
    kernel="aa" * 32,
)


def test_a_snapshot_fixes_what_its_vm_had():
    config = pin(VmConfig(max_cpu=4, max_memory=GIB, restart="always"), SNAPSHOT)
    assert (config.cpu, config.most_cpu) == (2, 2)
    assert (config.memory, config.most_memory) == (512 * MIB, 512 * MIB)
    roomy = dataclasses.replace(SNAPSHOT, max_cpu=8, max_memory=2 * GIB)
    config = pin(VmConfig(max_cpu=4, restart="always"), roomy)
    assert (config.cpu, config.most_cpu, config.most_memory) == (2, 8, 2 * GIB)
    assert config.storage == GIB
    assert config.disks == (Disk(name="logs", size=4 * MIB, readonly=True),)
    assert config.hypervisor == "firecracker"
    assert config.restart == "always"


def test_what_the_queues_are_tied_to_stays_the_vms_own():
    config = pin(VmConfig(cpu=4, queue_affinity=((0,), (1,), (2,), (3,))), SNAPSHOT)
    assert config.cpu == 2
    assert config.queue_affinity == ((0,), (1,), (2,), (3,))


def test_an_overlay_stands_on_the_image_that_is_here_under_its_name():
    disks = (
        SnapshotDisk("/var/lib/cocoon/run/vm/overlay.qcow2", role="cow"),
        SnapshotDisk("/var/lib/cocoon/run/vm/data-logs.raw", role="data", fstype="ext4"),
    )
    files = (SnapshotFile("data-logs.raw", MIB), SnapshotFile("overlay.qcow2", 200_000))
    snapshot = dataclasses.replace(SNAPSHOT, disks=disks, files=files, storage=4 * GIB)
    image = Image("x" * 26, "trixie", Access(0, 0), format="raw", size=GIB, digest="ab" * 32)
    config = pin(VmConfig(image="other", storage=MIB), snapshot, image)
    assert (config.image, config.storage) == ("trixie", 4 * GIB)
    assert config.base == BaseImage("ab" * 32, "raw", GIB)
    assert config.disks == (Disk(name="logs", size=MIB, fstype="ext4"),)


def test_what_is_fixed_are_keys():
    assert set(PINNED) < set(KEYS)


def test_the_kernel_is_named_by_its_content():
    config = pin(VmConfig(boot=Boot(kernel="vmlinux")), SNAPSHOT)
    assert config.boot == Boot(kernel="sha256:" + "aa" * 32, cmdline="console=ttyS0")
    assert boot_files(SNAPSHOT).source == config.boot


def test_so_is_a_firmware():
    snapshot = dataclasses.replace(SNAPSHOT, kernel="", firmware="bb" * 32)
    config = pin(VmConfig(boot=Boot(kernel="vmlinux")), snapshot)
    assert config.boot == Boot(firmware="sha256:" + "bb" * 32)
    assert boot_files(snapshot) == BootFiles(firmware="bb" * 32, source=config.boot)


@pytest.mark.parametrize("parts", [{}, {"kernel": "", "firmware": "bb" * 32}])
def test_a_pinned_configuration_can_be_written_back(parts):
    config = pin(VmConfig(), dataclasses.replace(SNAPSHOT, **parts))
    assert parse_config(config, show_config(config), host_cpus=8) == config


def test_a_snapshot_without_a_kernel_boots_nothing():
    config = pin(VmConfig(boot=Boot(kernel="v")), dataclasses.replace(SNAPSHOT, kernel=""))
    assert config.boot is None


def test_a_disk_of_this_host_is_named_again():
    disk = SnapshotDisk("/var/lib/cocoon/run/disk/0", readonly=True, role="layer")
    snapshot = dataclasses.replace(SNAPSHOT, disks=(disk,), host_disks={disk.path: "/dev/vg/base"})
    assert pin(VmConfig(), snapshot).disks == (Disk(path="/dev/vg/base", readonly=True),)


def test_a_disk_that_did_not_travel_is_missing():
    disk = SnapshotDisk("/var/lib/cocoon/layers/base.img", readonly=True, role="layer")
    with pytest.raises(Missing, match="base.img"):
        pin(VmConfig(), dataclasses.replace(SNAPSHOT, disks=(disk,)))


def test_odd_memory_is_damage():
    with pytest.raises(Damaged):
        pin(VmConfig(), dataclasses.replace(SNAPSHOT, memory=MIB + 1))
