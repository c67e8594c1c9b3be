"""Cloud Hypervisor's command line, against the API description that it publishes."""

from itertools import pairwise

import pytest
from described_vmm import Description

from agent.model import canonical
from agent.model.access import Access
from agent.model.config import BaseImage, Boot, Disk, VmConfig
from agent.model.errors import Damaged, Invalid, Unsupported
from agent.model.size import MIB
from agent.model.vm import Vm
from agent.vmm import tap
from agent.vmm.cloud_hypervisor import CloudHypervisor
from agent.vmm.driver import Version

pytestmark = pytest.mark.anyio
SCHEMAS = Description("cloud-hypervisor-53").schemas
VERSION = Version("/usr/bin/cloud-hypervisor", "53.0", (53, 0))


def plan(seed="", **config):
    given = VmConfig(**{"boot": Boot(kernel="vmlinuz"), "memory": 64 * MIB} | config)
    vm = Vm("a" * 26, "web", 70000, Access(0, 0), given, seed=seed)
    return CloudHypervisor().plan(vm, VERSION)


def values(launch, option):
    """What follows each `option`, up to the next one."""
    words = launch.boot_arguments
    start = words.index(option) + 1 if option in words else len(words)
    rest = words[start:]
    return rest[: next((at for at, word in enumerate(rest) if word[:2] == "--"), len(rest))]


def settings(text):
    return dict(part.split("=", 1) for part in text.split(","))


def test_the_guest_is_built_from_the_command_line_alone():
    launch = plan(cpu=2, boot=Boot(kernel="k", initrd="i", cmdline='a="b c" d'))
    assert launch.arguments == ("--api-socket", canonical.API_SOCKET)
    assert values(launch, "--kernel") == (canonical.KERNEL,)
    assert values(launch, "--initramfs") == (canonical.INITRD,)
    assert values(launch, "--cmdline") == ('a="b c" d',)
    assert settings(values(launch, "--cpus")[0]) == {"boot": "2", "max": "2"}
    assert values(launch, "--serial") == (f"socket={canonical.CONSOLE_SOCKET}",)
    assert ("--console", "off") in pairwise(launch.boot_arguments)
    assert launch.memory > 64 * MIB


@pytest.mark.parametrize(
    ("option", "schema"),
    [("--memory", "MemoryConfig"), ("--balloon", "BalloonConfig"), ("--rng", "RngConfig")],
)
def test_every_word_is_in_the_published_description(option, schema):
    (text,) = values(plan(memory=512 * MIB), option)
    assert settings(text).keys() <= SCHEMAS[schema]["properties"].keys()


def test_a_guest_that_may_grow_has_the_room():
    launch = plan(cpu=2, max_cpu=4, max_memory=512 * MIB)
    assert settings(values(launch, "--cpus")[0]) == {"boot": "2", "max": "4"}
    (memory,) = values(launch, "--memory")
    assert settings(memory) == {"size": str(64 * MIB), "hotplug_size": str(448 * MIB)}
    assert settings(memory).keys() <= SCHEMAS["MemoryConfig"]["properties"].keys()
    # What comes later is none of its limits yet.
    assert launch.memory == plan(cpu=2).memory


def test_disks_are_what_they_are_said_to_be():
    disks = (Disk(name="d", size=MIB, serial="blue-42", readonly=True), Disk(path="/dev/sdb"))
    base = BaseImage("ab" * 32, "qcow2", MIB)
    launch = plan(cpu=2, disks=disks, image="debian", base=base, storage=2 * MIB, seed="x")
    overlay, data, host, seed = map(settings, values(launch, "--disk"))
    for disk in (overlay, data, host, seed):
        assert disk.keys() <= SCHEMAS["DiskConfig"]["properties"].keys()
        assert disk["num_queues"] == "2"
    assert overlay["image_type"] == "qcow2"
    assert overlay["backing_files"] == "on"
    assert (data["image_type"], data["readonly"], data["serial"]) == ("raw", "on", "blue-42")
    # Nothing but an overlay of the agent's own may lead to another file.
    assert {disk["backing_files"] for disk in (data, host, seed)} == {"off"}
    assert host["path"] == f"{canonical.DISKS}/1"
    assert (seed["path"], seed["readonly"]) == (f"{canonical.VM}/{canonical.SEED}", "on")


def test_queues_are_tied_as_the_command_line_has_it():
    """The words of vmm/src/config.rs: a queue, and a list of CPUs in brackets of its own."""
    disks = (Disk(name="d", size=MIB), Disk(path="/dev/sdb"))
    queues = ((3,), (), (0, 2, 1, 7, 9, 8))
    launch = plan(cpu=3, disks=disks, storage=MIB, seed="x", queue_affinity=queues)
    assert launch.sets_affinity
    words = values(launch, "--disk")
    assert len(words) == 4
    assert {word.partition("queue_affinity=")[2] for word in words} == {"[0@[3],2@[0-2,7-9]]"}


@pytest.mark.parametrize("queues", [(), ((),)])
def test_a_vm_that_ties_no_queue_says_nothing_of_it(queues):
    launch = plan(storage=MIB, queue_affinity=queues)
    assert not launch.sets_affinity
    assert "queue_affinity" not in values(launch, "--disk")[0]


def test_more_queues_and_cpus_than_a_command_line_holds_are_refused():
    everywhere, scattered = tuple(range(1024)), tuple(range(0, 1024, 2))
    many = {"storage": MIB, "disks": tuple(Disk(name=f"d{n}", size=MIB) for n in range(16))}
    words = values(plan(cpu=256, queue_affinity=(everywhere,) * 256, **many), "--disk")
    assert len(words) == 17
    with pytest.raises(Invalid, match="queue_affinity of VM web is too long .* 17 disks"):
        plan(cpu=256, queue_affinity=(scattered,) * 256, **many)


def test_a_clone_may_tie_its_threads_too():
    config = VmConfig(queue_affinity=((0,),))
    vm = Vm("a" * 26, "web", 70000, Access(0, 0), config)
    assert (
        CloudHypervisor(device=False, unprivileged=False)
        .plan(vm, VERSION, loads=True)
        .sets_affinity
    )


def test_what_it_cannot_do_is_refused_by_name():
    with pytest.raises(Unsupported, match="track_dirty"):
        plan(track_dirty=True)


def test_a_firmware_takes_the_place_of_kernel_and_command_line():
    launch = plan(boot=Boot(firmware="CLOUDHV.fd"))
    assert values(launch, "--firmware") == (canonical.FIRMWARE,)
    assert not {"--kernel", "--cmdline", "--initramfs"} & set(launch.boot_arguments)


def test_nothing_to_boot_is_said():
    with pytest.raises(Invalid, match="nothing to boot"):
        plan(boot=None)


async def test_an_old_version_is_refused_with_the_remedy(tmp_path):
    program = tmp_path / "cloud-hypervisor"
    program.write_text("#!/bin/sh\necho cloud-hypervisor v52.1\n")
    program.chmod(0o755)
    with pytest.raises(Unsupported, match=r"52\.1.*from 53\.0 work"):
        await CloudHypervisor(str(program)).version()
    program.write_text("#!/bin/sh\necho cloud-hypervisor v53.0-dirty\n")
    assert (await CloudHypervisor(str(program)).version()).numbers == (53, 0)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff" * 10])
def test_a_state_that_is_no_json_object_is_damaged(damage):
    with pytest.raises(Damaged):
        CloudHypervisor().check_state(damage)


@pytest.mark.parametrize(
    ("mode", "device", "unprivileged", "expected"),
    [
        ("auto", True, False, "ondemand"),
        ("auto", False, True, "ondemand"),
        ("auto", False, False, "copy"),
        ("copy", True, True, "copy"),
        ("ondemand", True, False, "ondemand"),
    ],
)
def test_memory_is_loaded_as_the_host_and_the_vm_allow(mode, device, unprivileged, expected):
    driver = CloudHypervisor(device=device, unprivileged=unprivileged)
    config = VmConfig(boot=Boot(kernel="k"), restore_mode=mode)
    vm = Vm("a" * 26, "web", 70000, Access(0, 0), config)
    launch = driver.plan(vm, VERSION, loads=True)
    assert launch.restore_mode == expected
    option, text = launch.load_arguments
    assert option == "--restore"
    given = settings(text)
    assert given.keys() <= SCHEMAS["RestoreConfig"]["properties"].keys()
    assert given["memory_restore_mode"] == expected
    assert ("/dev/userfaultfd" in launch.devices) == (expected == "ondemand" and device)


def test_a_guest_with_network_interfaces_is_loaded_over_the_api(monkeypatch, tmp_path):
    config = VmConfig(boot=Boot(kernel="k"), restore_mode="copy")
    vm = Vm("a" * 26, "web", 70000, Access(0, 0), config)
    monkeypatch.setattr(tap, "DEVICE", str(tmp_path / "tun"))
    with pytest.raises(Unsupported, match="network interfaces"):
        CloudHypervisor().plan(vm, VERSION, loads=True, nics=1)
    (tmp_path / "tun").touch()
    launch = CloudHypervisor().plan(vm, VERSION, loads=True, nics=1)
    assert (launch.load_arguments, launch.restore_mode) == ((), "copy")
    assert tap.DEVICE not in launch.devices
    assert CloudHypervisor().answers(0, loads=True)


def test_a_way_to_load_memory_that_is_not_there_says_which_to_use():
    driver = CloudHypervisor(device=False, unprivileged=False)
    config = VmConfig(boot=Boot(kernel="k"), restore_mode="ondemand")
    vm = Vm("a" * 26, "web", 70000, Access(0, 0), config)
    with pytest.raises(Unsupported, match="restore_mode to copy"):
        driver.plan(vm, VERSION, loads=True)


def test_the_causes_of_its_end_are_told_in_one_line():
    lines = ["x> WARN: y", "Error: exited with the following chain of errors:", "  0: a", "  1: b"]
    assert CloudHypervisor().explain(lines) == "a: b"
    assert CloudHypervisor().explain(["it broke", "x> WARN: y"]) == "it broke"
