"""VMs that boot a firmware: one from a disk by UEFI, one that is no more than an ELF."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from snapshot_tools import archive, described, names

OVMF = Path("/usr/share/ovmf/OVMF.fd")
"""Debian's: code and variables in one, as `-bios` takes it."""
PROGRAM = Path(__file__).parents[1] / "guest/efi.S"


@pytest.fixture(scope="module")
def uefi_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk as qcow2 with a FAT on it, where UEFI finds a program that counts."""
    if not OVMF.exists():
        pytest.skip("ovmf is not installed")
    directory = tmp_path_factory.mktemp("uefi")
    words = ["gcc", "-nostdlib", "-static", "-Wl,-Ttext=0,--oformat=binary,--build-id=none"]
    for command in (
        [*words, PROGRAM, "-o", "program"],
        ["mkfs.fat", "-C", "fat", "1440"],
        ["mmd", "-i", "fat", "::EFI", "::EFI/BOOT"],
        ["mcopy", "-i", "fat", "program", "::EFI/BOOT/BOOTX64.EFI"],
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "fat", "qcow2"],
    ):
        subprocess.run(command, check=True, timeout=60, cwd=directory, stdout=subprocess.DEVNULL)
    return directory / "qcow2"


@pytest.fixture
def image(agent: Any, backend: str, request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """What to configure for a disk that the backend's firmware boots."""
    if backend == "cloud-hypervisor":
        yield {"storage": "8M"}
        return
    image = agent.mount / "images/uefi"
    shutil.copyfile(request.getfixturevalue("uefi_disk"), image)
    yield {"image": "uefi"}
    image.unlink()


@pytest.fixture
def name(image: Any, vm_name: Callable[[], str], agent: Any) -> Iterator[str]:
    """The name of a snapshot, removed afterwards."""
    name = f"snap-{vm_name()}"
    yield name
    for found in names(agent):
        if found.startswith(name):
            archive(agent, found).unlink()


@pytest.fixture
def firmware(agent: Any, guests: Any, backend: str) -> Iterator[Path]:
    """A firmware for the backend, where root offers it to users."""
    file = agent.root_dir / "boot/test.fd"
    shutil.copyfile(guests.guest if backend == "cloud-hypervisor" else OVMF, file)
    yield file
    file.unlink(missing_ok=True)


@pytest.mark.backends("qemu", "cloud-hypervisor", core=True)
@pytest.mark.thorough(group="linux")
def test_a_firmware_boots_and_travels(
    agent, image, firmware, make_vm, name, backend, tmp_path, until
):
    digest = hashlib.sha256(firmware.read_bytes()).hexdigest()
    boot = {"firmware": firmware.name}
    vm = make_vm(hypervisor="auto", boot=boot, stop_timeout=1, **image)
    vm.verb("start")
    vm.wait_counting()
    shown = json.loads(vm.read("info.json"))
    assert shown["hypervisor"] == backend
    assert shown["boot_config"]["firmware_path"] == firmware.name
    assert shown["booted"] == {"kernel": "", "initrd": "", "firmware": digest}
    assert json.loads(vm.read("boot"))["firmware"] == firmware.name
    vm.write("snapshot", name)
    assert "firmware" in described(agent, name)["files"]
    assert described(agent, name)["boots_cold"]

    # It was stored when it was booted.
    firmware.unlink()
    vm.verb("kill")
    vm.verb("start")
    until(lambda: vm.counts.count(1) == 2, what="it boots again")
    vm.write("restore", name)
    vm.wait_counting()
    assert vm.counts.count(1) == 2

    # Another host has neither the VM nor the firmware.
    shutil.copy(archive(agent, name), tmp_path / "away.tar")
    vm.verb("kill")
    vm.path.rmdir()
    archive(agent, name).unlink()
    (agent.root_dir / "kernels" / digest).unlink()
    shutil.copy(tmp_path / "away.tar", archive(agent, name))
    clone = make_vm(hypervisor=None, memory=None, boot=None, stop_timeout=1)
    clone.write("from", name)
    clone.verb("start")
    clone.wait_counting()
    assert clone.counts[0] > 1
    assert json.loads(clone.read("boot"))["firmware"] == f"sha256:{digest}"
    clone.verb("stop")
    clone.verb("start")
    until(lambda: 1 in clone.counts, what="it boots from its own disk")
    clone.verb("kill")
