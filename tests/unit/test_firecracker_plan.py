import dataclasses
import json

import pytest

from agent.model import canonical
from agent.model.access import Access
from agent.model.config import BaseImage, Boot, Disk, VmConfig
from agent.model.errors import Invalid, Unsupported
from agent.model.launch import Bind
from agent.model.size import GIB, MIB
from agent.model.vm import Vm
from agent.vmm.driver import Version
from agent.vmm.firecracker import DEFAULT_CMDLINE, Firecracker

KERNEL = Boot(kernel="vmlinux")


def version(text="1.12.1"):
    return Version("/usr/bin/firecracker", text, tuple(map(int, text.split("."))))


def plan(text="1.12.1", *, io_uring=True, **config):
    config = VmConfig(**{"boot": KERNEL} | config)
    vm = Vm("abcdefghijklmnopqrstuvwxyz", "web", 70000, Access(0, 0), config)
    return Firecracker(io_uring=io_uring).plan(vm, version(text))


def document(text="1.12.1", **config):
    return json.loads(plan(text, **config).files["vm.json"])


def test_it_boots_from_its_configuration_file_and_serves_the_api_beside_it():
    launch = plan()
    assert launch.binary == "/usr/bin/firecracker"
    assert launch.arguments[:2] == ("--api-sock", canonical.API_SOCKET)
    assert launch.arguments[2:4] == ("--id", "abcdefghijklmnopqrstuvwxyz")
    assert launch.boot_arguments == ("--config-file", f"{canonical.VM}/vm.json")
    assert launch.devices == ("/dev/kvm",)


def test_kernel_and_initrd_are_at_their_canonical_paths():
    boot = Boot(kernel="vmlinux", initrd="initrd", cmdline="console=ttyS0 root=/dev/vda")
    assert document(boot=boot)["boot-source"] == {
        "kernel_image_path": canonical.KERNEL,
        "initrd_path": canonical.INITRD,
        "boot_args": "console=ttyS0 root=/dev/vda",
    }


def test_without_a_command_line_the_guest_talks_on_the_console_and_ends_the_vmm_on_reboot():
    source = document()["boot-source"]
    assert source == {"kernel_image_path": canonical.KERNEL, "boot_args": DEFAULT_CMDLINE}
    assert {"console=ttyS0", "reboot=k", "panic=1"} <= set(DEFAULT_CMDLINE.split())


def test_cpu_memory_and_dirty_tracking_are_the_configurations():
    assert document(cpu=4, memory=2 * GIB, track_dirty=True)["machine-config"] == {
        "vcpu_count": 4,
        "mem_size_mib": 2048,
        "track_dirty_pages": True,
    }


def test_the_own_disk_comes_first_then_the_others_in_order():
    disks = (
        Disk(path="/dev/sdb", readonly=True),
        Disk(name="scratch", size=MIB),
        Disk(path="/srv/data.raw"),
    )
    drives = document(storage=GIB, disks=disks)["drives"]
    assert [(drive["path_on_host"], drive["is_read_only"]) for drive in drives] == [
        (f"{canonical.VM}/cow.raw", False),
        (f"{canonical.DISKS}/0", True),
        (f"{canonical.VM}/data-scratch.raw", False),
        (f"{canonical.DISKS}/2", False),
    ]
    assert len({drive["drive_id"] for drive in drives}) == 4
    assert not any(drive["is_root_device"] for drive in drives)


def test_disks_of_the_host_are_bound_where_the_drives_look_for_them():
    disks = (
        Disk(path="/dev/sdb", readonly=True),
        Disk(name="scratch", size=MIB),
        Disk(path="/srv/data.raw"),
    )
    assert plan(disks=disks).binds == (
        Bind("/dev/sdb", f"{canonical.DISKS}/0", readonly=True),
        Bind("/srv/data.raw", f"{canonical.DISKS}/2", readonly=False),
    )


def test_an_image_is_a_copy_or_nothing():
    base = BaseImage("ab" * 32, "raw", GIB)
    with pytest.raises(Unsupported, match="raw disks only.*on the image debian.*-O raw"):
        document(image="debian", base=base)
    copied = document(image="debian", base=dataclasses.replace(base, copied=True))
    assert [drive["path_on_host"] for drive in copied["drives"]] == [f"{canonical.VM}/cow.raw"]


def test_without_storage_there_is_no_disk():
    assert document()["drives"] == []


@pytest.mark.parametrize(("io_uring", "engine"), [(True, "Async"), (False, "Sync")])
def test_writable_disks_use_io_uring_where_the_host_allows_it(io_uring, engine):
    disks = (Disk(path="/dev/sdb", readonly=True),)
    drives = document(io_uring=io_uring, storage=GIB, disks=disks)["drives"]
    assert [drive["io_engine"] for drive in drives] == [engine, "Sync"]


def test_a_balloon_takes_a_quarter_of_the_memory_from_256_mib_on():
    assert "balloon" not in document(memory=255 * MIB)
    assert document(memory=256 * MIB)["balloon"] == {"amount_mib": 64, "deflate_on_oom": True}
    assert document(memory=1022 * MIB)["balloon"]["amount_mib"] == 255


def test_the_balloon_gives_back_free_pages_where_the_version_can():
    assert "free_page_reporting" not in document("1.13.2")["balloon"]
    assert document("1.14.0")["balloon"]["free_page_reporting"] is True


def test_every_guest_has_an_entropy_device():
    assert document()["entropy"] == {}


def test_the_process_may_use_more_than_the_guests_memory():
    for memory in (64 * MIB, GIB, 64 * GIB):
        extra = plan(memory=memory).memory - memory
        assert 16 * MIB < extra < 64 * MIB + memory // 32


@pytest.mark.parametrize(
    ("config", "word", "remedy"),
    [
        ({"cpu": 33}, "32 CPUs", "cloud-hypervisor and qemu"),
        ({"cpu": 2, "max_cpu": 4}, "max_cpu", "write the same to both"),
        ({"memory": GIB, "max_memory": 2 * GIB}, "max_memory", "write the same to both"),
        ({"disks": (Disk(name="a", size=MIB, serial="A1"),)}, "A1", "cloud-hypervisor and qemu"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_remedy(config, word, remedy):
    with pytest.raises(Unsupported) as caught:
        plan(**config)
    assert word in str(caught.value)
    assert remedy in str(caught.value)


def test_the_seed_is_the_last_drive_and_says_nothing_of_what_is_in_it():
    config = VmConfig(boot=KERNEL, storage=GIB, user="ann", password="$6$secret")
    vm = Vm("a" * 26, "web", 70000, Access(0, 0), config, seed="x")
    written = Firecracker(io_uring=True).plan(vm, version()).files["vm.json"]
    own, seed = json.loads(written)["drives"]
    assert not own["is_read_only"]
    assert (seed["path_on_host"], seed["is_read_only"]) == (f"{canonical.VM}/cidata.img", True)
    assert b"secret" not in written


def test_a_vm_without_anything_to_boot_is_refused():
    with pytest.raises(Invalid, match="nothing to boot"):
        plan(boot=None)


def many(count):
    return tuple(Disk(path=f"/dev/disk{index}", readonly=True) for index in range(count))


@pytest.mark.parametrize(
    ("text", "memory", "most"),
    [("1.12.1", 64, 17), ("1.12.1", 512, 16), ("1.14.4", 512, 16), ("1.16.1", 512, 15)],
)
def test_there_are_as_many_disks_as_interrupts_left(text, memory, most):
    assert len(document(text, memory=memory * MIB, disks=many(most))["drives"]) == most
    with pytest.raises(Unsupported, match=f"room for {most} disks here, not {most + 1}"):
        plan(text, memory=memory * MIB, disks=many(most + 1))


def test_the_own_disk_counts_among_the_disks():
    with pytest.raises(Unsupported, match="not 17"):
        plan(storage=GIB, disks=many(16))


def test_a_command_line_that_leaves_no_room_for_the_devices_is_refused():
    boot = dataclasses.replace(KERNEL, cmdline="x" * 2000)
    assert plan(memory=64 * MIB, boot=boot)
    with pytest.raises(Unsupported, match=r"boot\.cmdline has 2000 characters"):
        plan(memory=64 * MIB, boot=boot, disks=many(2))
