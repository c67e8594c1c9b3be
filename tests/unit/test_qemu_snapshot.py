"""Snapshots whose memory is the file that the guest runs in: copied on the way in, and out."""

import dataclasses
import os
import stat

import pytest
import trio

from agent.model.access import Access
from agent.model.config import Disk, VmConfig
from agent.model.errors import Damaged, Failed
from agent.model.pinned import pin
from agent.model.size import MIB
from agent.model.snapshot import Snapshot, SnapshotDisk, SnapshotFile
from agent.model.vm import Vm
from agent.storage.snapshots import SnapshotStore
from agent.storage.tree import Tree

VM = Vm("a" * 26, "web", 70001, Access(0, 0), VmConfig(memory=16 * MIB, storage=MIB))
VM = dataclasses.replace(VM, hypervisor="qemu")
SNAPSHOT = Snapshot(
    id="b" * 26,
    name="nightly",
    access=Access(0, 0),
    hypervisor="qemu",
    cpu=1,
    memory=16 * MIB,
    files=(SnapshotFile("cow.raw", MIB), SnapshotFile("mem", 16 * MIB), SnapshotFile("vmstate", 5)),
)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other uids")


@pytest.fixture
def tree(tmp_path):
    tree = Tree(f"{tmp_path}/root", f"{tmp_path}/run")
    trio.run(tree.prepare)
    return tree


@pytest.fixture
def store(tree):
    return SnapshotStore(tree)


@pytest.fixture
def running(tree):
    """The directory of a VM whose memory is in use."""
    trio.run(tree.prepare_vm, VM, {}, b"")
    directory = tree.directory(VM.id)
    with open(f"{directory}/mem", "wb") as memory:
        memory.write(b"live")
        memory.truncate(16 * MIB)
    os.chown(f"{directory}/mem", VM.uid, VM.uid)
    return directory


def save(directory):
    """Do what QEMU does that is told to save."""
    with open(f"{directory}/save/vmstate", "wb") as state:
        state.write(b"state")
    os.chown(f"{directory}/save/vmstate", VM.uid, VM.uid)


@as_root
def test_memory_is_copied_with_the_disks_and_later_changes_stay_out(store, running):
    store.begin(SNAPSHOT.id, VM)
    save(running)
    store.copy_disks(SNAPSHOT.id, VM, True)
    with open(f"{running}/mem", "r+b") as memory:
        memory.write(b"LATE")
    store.collect(SNAPSHOT.id, VM, None, False)
    staging = store.staging(SNAPSHOT.id)
    assert sorted(os.listdir(staging)) == ["cow.raw", "mem", "vmstate"]
    with open(f"{staging}/mem", "rb") as memory:
        assert memory.read(4) == b"live"
    status = os.stat(f"{staging}/mem")
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (0, 0o444)
    assert status.st_blocks * 512 < MIB  # holes stay holes
    assert not os.path.exists(f"{running}/save")


@as_root
def test_memory_of_another_size_is_no_memory(store, running):
    os.truncate(f"{running}/mem", MIB)
    store.begin(SNAPSHOT.id, VM)
    with pytest.raises(Damaged, match="1048576 bytes of memory"):
        store.copy_disks(SNAPSHOT.id, VM, True)


@as_root
def test_a_link_in_the_place_of_memory_is_not_followed(store, running, tmp_path):
    os.unlink(f"{running}/mem")
    (tmp_path / "secret").write_bytes(bytes(16))
    os.symlink(tmp_path / "secret", f"{running}/mem")
    store.begin(SNAPSHOT.id, VM)
    with pytest.raises(Failed):
        store.copy_disks(SNAPSHOT.id, VM, True)


@as_root
def test_each_vm_gets_memory_of_its_own_to_write(store, tree):
    directory = store.directory(SNAPSHOT.id)
    os.mkdir(directory, 0o700)
    for file in SNAPSHOT.files:
        with open(f"{directory}/{file.name}", "wb") as made:
            made.truncate(file.size)
            os.fchmod(made.fileno(), 0o444)
    store.fill(SNAPSHOT, VM)
    own = tree.directory(VM.id)
    status = os.stat(f"{own}/mem")
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (VM.uid, 0o600)
    assert status.st_ino != os.stat(f"{directory}/mem").st_ino
    assert os.stat(f"{own}/vmstate").st_ino == os.stat(f"{directory}/vmstate").st_ino


def with_disk(hypervisor, serial):
    path = "/var/lib/cocoon/run/vm/data-logs.raw"
    return dataclasses.replace(
        SNAPSHOT,
        hypervisor=hypervisor,
        disks=(SnapshotDisk(path, serial=serial, role="data"),),
        files=(*SNAPSHOT.files, SnapshotFile("data-logs.raw", MIB)),
    )


@pytest.mark.parametrize(
    ("hypervisor", "serial", "kept"),
    [
        ("qemu", "blue-42", "blue-42"),
        ("qemu", "a,drive=x", ""),
        ("qemu", "", ""),
        ("firecracker", "blue-42", ""),
    ],
)
def test_serial_numbers_come_along_where_they_are_some(hypervisor, serial, kept):
    config = pin(VmConfig(), with_disk(hypervisor, serial))
    assert config.disks == (Disk(name="logs", size=MIB, serial=kept),)
