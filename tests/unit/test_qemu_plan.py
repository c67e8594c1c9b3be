"""QEMU's command line: what of it a snapshot relies on, and what is refused."""

import dataclasses
import itertools

import pytest

from agent.model import canonical
from agent.model.access import Access
from agent.model.config import BaseImage, Boot, Disk, VmConfig
from agent.model.errors import Invalid, Unsupported
from agent.model.size import GIB, MIB
from agent.model.vm import Vm
from agent.vmm.driver import Version
from agent.vmm.qemu import DEFAULT_CMDLINE, MACHINE, Qemu

KERNEL = Boot(kernel="vmlinuz")
VERSION = Version("/usr/bin/qemu-system-x86_64", "7.2.22", (7, 2, 22), dynamic=True)


def plan(*, accelerated=False, loads=False, **config):
    vm = Vm("a" * 26, "web", 70000, Access(0, 0), VmConfig(**{"boot": KERNEL} | config))
    return Qemu(accelerated=accelerated).plan(vm, VERSION, loads=loads)


def values(words, option):
    """What follows each `option`."""
    return [value for word, value in itertools.pairwise(words) if word == option]


def devices(**config):
    return values(plan(**config).arguments, "-device")


def test_the_machine_is_pinned_and_its_memory_is_a_file_of_the_vms():
    launch = plan(memory=512 * MIB, cpu=2)
    (machine,) = values(launch.arguments, "-machine")
    assert machine.split(",")[:2] == [MACHINE, "memory-backend=memory"]
    assert (
        f"memory-backend-file,id=memory,size={512 * MIB},share=on,mem-path={canonical.VM}/mem"
        in values(launch.arguments, "-object")
    )
    assert values(launch.arguments, "-m") == ["512M"]
    assert values(launch.arguments, "-smp") == ["2,sockets=1,cores=2,threads=1"]


def test_it_translates_without_kvm_and_sees_no_kvm_then():
    launch = plan()
    assert values(launch.arguments, "-accel") == ["tcg,tb-size=32,split-wx=on"]
    assert launch.devices == ("/dev/null",)
    launch = plan(accelerated=True)
    assert values(launch.arguments, "-accel") == ["kvm"]
    assert launch.devices == ("/dev/null", "/dev/kvm")


def test_a_snapshot_is_loaded_by_the_machine_that_was_booted():
    booted, loading = plan(), plan(loads=True)
    assert booted.arguments == loading.arguments
    assert loading.load_arguments == (*booted.boot_arguments, "-incoming", "defer")
    assert booted.boot_arguments[:2] == ("-kernel", canonical.KERNEL)


def test_kernel_initrd_and_command_line():
    boot = Boot(kernel="k", initrd="i", cmdline="root=/dev/vda quiet")
    words = plan(boot=boot).boot_arguments
    assert values(words, "-append") == ["root=/dev/vda quiet"]
    assert values(words, "-initrd") == [canonical.INITRD]
    assert values(plan().boot_arguments, "-append") == [DEFAULT_CMDLINE]


def test_disks_have_their_places_serials_and_modes():
    disks = (
        Disk(name="data", size=MIB, serial="blue"),
        Disk(path="/srv/base.raw", readonly=True),
    )
    launch = plan(storage=GIB, disks=disks)
    assert values(launch.arguments, "-drive") == [
        f"file={canonical.VM}/cow.raw,format=raw,if=none,id=disk0,discard=unmap",
        f"file={canonical.VM}/data-data.raw,format=raw,if=none,id=disk1,discard=unmap",
        f"file={canonical.DISKS}/1,format=raw,if=none,id=disk2,readonly=on",
    ]
    found = [word for word in values(launch.arguments, "-device") if "blk" in word]
    assert found == [
        "virtio-blk-pci,drive=disk0,addr=8",
        "virtio-blk-pci,drive=disk1,addr=9,serial=blue",
        "virtio-blk-pci,drive=disk2,addr=a",
    ]
    assert [bind.source for bind in launch.binds] == ["/srv/base.raw"]


def test_an_overlay_is_opened_with_the_base_that_it_is_to_have():
    base = BaseImage("ab" * 32, "raw", GIB)
    launch = plan(image="debian", base=base)
    assert values(launch.arguments, "-drive") == [
        f"file={canonical.VM}/overlay.qcow2,format=qcow2,if=none,id=disk0,discard=unmap,"
        "backing.driver=raw,backing.file.driver=file,"
        f"backing.file.filename=/var/lib/cocoon/cloudimg/blobs/{base.digest}.raw"
    ]
    copied = plan(image="debian", base=dataclasses.replace(base, copied=True))
    assert "cow.raw,format=raw" in values(copied.arguments, "-drive")[0]


def test_every_device_has_a_place_of_its_own_on_the_bus():
    disks = tuple(Disk(name=f"d{number}", size=MIB) for number in range(16))
    words = devices(storage=GIB, disks=disks)
    places = [word.partition("addr=")[2].partition(",")[0] for word in words if "addr=" in word]
    assert len(places) == len(set(places)) == 20
    # pcie.0 has 32 slots; the first is the host bridge, the last the chipset's.
    assert all(0 < int(place, 16) < 31 for place in places)
    assert all("addr=" in word for word in words if "pci" in word)


def test_it_may_use_the_guests_memory_and_128_mib():
    launch = plan(memory=GIB)
    assert GIB + 128 * MIB <= launch.memory <= GIB + 160 * MIB
    assert launch.dynamic


def test_the_seed_is_the_last_disk_and_moves_no_other():
    config = VmConfig(boot=KERNEL, storage=GIB, disks=(Disk(name="data", size=MIB),), user="joe")
    vm = Vm("a" * 26, "web", 70000, Access(0, 0), config)
    driver = Qemu(accelerated=False)
    without = driver.plan(vm, VERSION).arguments
    with_seed = driver.plan(dataclasses.replace(vm, seed="x"), VERSION).arguments
    assert with_seed[: len(without)] == without
    drive, device = with_seed[len(without) + 1 :: 2]
    assert drive.split(",")[0] == f"file={canonical.VM}/cidata.img"
    assert "readonly=on" in drive.split(",")
    assert "addr=1e" in device.split(",")


def test_no_word_would_need_quoting_in_qemus_option_lists():
    launch = plan(storage=GIB, disks=(Disk(path="/srv/a,b", readonly=True),))
    assert not any("/srv" in word for word in launch.arguments)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"cpu": 1, "max_cpu": 2}, "max_cpu 2"),
        ({"memory": GIB, "max_memory": 2 * GIB}, "max_memory 2G"),
        ({"track_dirty": True}, "track_dirty"),
    ],
)
def test_what_it_does_not_do_is_refused_by_name(config, words):
    with pytest.raises(Unsupported, match=words):
        plan(**config)


@pytest.mark.parametrize("disks", [(), (Disk(name="data", size=MIB),)])
def test_without_a_kernel_a_disk_that_the_agent_made_is_not_booted(disks):
    with pytest.raises(Invalid, match="nothing to boot"):
        plan(boot=None, storage=GIB, disks=disks)


@pytest.mark.parametrize(
    "config",
    [
        {"base": BaseImage("c" * 64, "qcow2", GIB), "image": "debian"},
        {"disks": (Disk(path="/srv/disk"),)},
    ],
)
def test_without_a_kernel_the_bios_boots_an_image_or_a_disk_of_the_host(config):
    booted, loading = plan(boot=None, **config), plan(boot=None, loads=True, **config)
    assert booted.boot_arguments == ("-boot", "strict=on")
    assert loading.load_arguments == ("-boot", "strict=on", "-incoming", "defer")
    assert booted.arguments == loading.arguments
    (disk,) = [word for word in values(booted.arguments, "-device") if "blk" in word]
    assert disk == "virtio-blk-pci,drive=disk0,addr=8,bootindex=1"
    assert not any("bootindex" in word for word in plan(**config).arguments)


def test_a_firmware_boots_any_disk_but_the_seed():
    config = VmConfig(boot=Boot(firmware="OVMF.fd"), storage=GIB)
    vm = Vm("a" * 26, "web", 70000, Access(0, 0), config, seed="x")
    launch = Qemu(accelerated=False).plan(vm, VERSION)
    assert launch.boot_arguments == ("-bios", canonical.FIRMWARE, "-boot", "strict=on")
    disks = [word for word in values(launch.arguments, "-device") if "blk" in word]
    assert ["bootindex=1" in disk.split(",") for disk in disks] == [True, False]
    assert not any("bootindex" in word for word in disks[1:])


def test_a_snapshot_without_a_kernel_is_loaded_and_has_nothing_to_boot_with():
    launch = plan(boot=None, loads=True, storage=GIB)
    assert (launch.boot_arguments, launch.load_arguments) == ((), ("-incoming", "defer"))


@pytest.mark.anyio
async def test_an_old_qemu_is_refused_with_what_works(tmp_path):
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\necho QEMU emulator version 6.2.0\n")
    program.chmod(0o755)
    with pytest.raises(Unsupported, match=r"QEMU 6\.2\.0: versions from 7\.2"):
        await Qemu(str(program), accelerated=False).version()
