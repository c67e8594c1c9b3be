import dataclasses
import json
import os
import stat

import pytest
import trio

from agent.model import canonical
from agent.model.access import Access
from agent.model.config import VmConfig
from agent.model.errors import Damaged, Failed
from agent.model.size import MIB
from agent.model.snapshot import BoundFile, Snapshot, SnapshotFile
from agent.model.vm import Vm
from agent.storage.snapshots import SnapshotStore
from agent.storage.tree import Tree

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other uids")
UID = 70001
VM = Vm("a" * 26, "web", UID, Access(0, 0), VmConfig(memory=16 * MIB, storage=MIB))
VM = dataclasses.replace(VM, hypervisor="firecracker")
SNAPSHOT = Snapshot(
    id="b" * 26,
    name="nightly",
    access=Access(0, 0),
    hypervisor="firecracker",
    files=(
        SnapshotFile("cow.raw", MIB),
        SnapshotFile("mem", 16 * MIB),
        SnapshotFile("vmstate", 5),
    ),
)


@pytest.fixture
def tree(tmp_path):
    tree = Tree(f"{tmp_path}/root", f"{tmp_path}/run")
    trio.run(tree.prepare)
    return tree


@pytest.fixture
def store(tree):
    return SnapshotStore(tree)


@pytest.fixture
def vm_directory(tree):
    trio.run(tree.prepare_vm, VM, {}, b"")
    return tree.directory(VM.id)


@pytest.fixture
def snapshot(store, tree):
    """A published snapshot's directory."""
    directory = store.directory(SNAPSHOT.id)
    os.mkdir(directory, 0o700)
    for file in SNAPSHOT.files:
        with open(f"{directory}/{file.name}", "wb") as made:
            made.truncate(file.size)
            made.write(file.name[:5].encode())
            os.fchmod(made.fileno(), 0o444)
    return directory


def facts(path):
    status = os.lstat(path)
    return status.st_uid, stat.S_IMODE(status.st_mode)


def saved(directory, memory=b"M", size=16 * MIB):
    """Do what a VMM does that is told to save."""
    for name, content in (("vmstate", b"state"), ("mem", memory)):
        path = f"{directory}/save/{name}"
        with open(path, "wb") as file:
            file.write(content)
            if name == "mem":
                file.truncate(size)
        os.chown(path, UID, UID)


def test_what_a_vmm_wrote_is_taken_over_and_its_directory_goes(store, vm_directory):
    store.begin(SNAPSHOT.id, VM)
    assert facts(f"{vm_directory}/save") == (UID, 0o700)
    saved(vm_directory)
    inode = os.stat(f"{vm_directory}/save/mem").st_ino
    store.copy_disks(SNAPSHOT.id, VM)
    store.collect(SNAPSHOT.id, VM, None)
    assert not os.path.exists(f"{vm_directory}/save")
    files = store.seal(SNAPSHOT.id)
    assert [file.name for file in files] == ["cow.raw", "mem", "vmstate"]
    store.publish(SNAPSHOT.id)
    directory = store.directory(SNAPSHOT.id)
    for name in os.listdir(directory):
        assert facts(f"{directory}/{name}") == (0, 0o444)
    assert os.stat(f"{directory}/mem").st_ino == inode
    assert store.stagings() == []


def test_memory_that_somebody_holds_open_for_writing_is_copied(store, vm_directory):
    store.begin(SNAPSHOT.id, VM)
    saved(vm_directory)
    with open(f"{vm_directory}/save/mem", "r+b", buffering=0) as held:
        store.collect(SNAPSHOT.id, VM, None)
        held.write(b"changed afterwards")
        with open(f"{store.staging(SNAPSHOT.id)}/mem", "rb") as taken:
            assert taken.read(2) == b"M\0"


def test_a_link_in_the_place_of_memory_is_not_followed(store, vm_directory, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"of root")
    store.begin(SNAPSHOT.id, VM)
    saved(vm_directory)
    os.unlink(f"{vm_directory}/save/mem")
    os.symlink(secret, f"{vm_directory}/save/mem")
    with pytest.raises(Failed):
        store.collect(SNAPSHOT.id, VM, None)
    assert facts(secret)[0] == 0


def test_memory_of_another_size_is_damage(store, vm_directory):
    store.begin(SNAPSHOT.id, VM)
    saved(vm_directory, size=MIB)
    with pytest.raises(Damaged):
        store.collect(SNAPSHOT.id, VM, None)


def test_changes_complete_the_memory_of_the_last_snapshot(store, vm_directory, snapshot):
    base = store.open_base(SNAPSHOT)
    new = "c" * 26
    store.begin(new, VM)
    saved(vm_directory, memory=b"")
    with open(f"{vm_directory}/save/mem", "r+b") as changes:
        changes.seek(8192)
        changes.write(b"x" * 4096)
        changes.seek(MIB)
        changes.write(bytes(4096))
    store.collect(new, VM, base)
    base.close()
    with open(f"{store.staging(new)}/mem", "rb") as whole:
        content = whole.read()
    assert len(content) == 16 * MIB
    assert content[:3] == b"mem"
    assert content[8192:12288] == b"x" * 4096
    assert facts(f"{store.staging(new)}/mem") == (0, 0o444)
    with open(f"{snapshot}/mem", "rb") as before:
        assert before.read(12288)[8192:] == bytes(4096)


def test_there_is_no_base_without_its_snapshot(store):
    assert store.open_base(dataclasses.replace(SNAPSHOT, id="d" * 26)) is None


def test_discarding_leaves_no_trace(store, vm_directory):
    store.begin(SNAPSHOT.id, VM)
    saved(vm_directory)
    store.discard(SNAPSHOT.id, VM)
    store.discard(SNAPSHOT.id, VM)
    assert os.listdir(vm_directory) == ["cow.raw"]
    assert store.stagings() == []


def test_a_clone_shares_memory_and_has_its_own_disk(store, tree, snapshot):
    store.fill(SNAPSHOT, VM)
    own = tree.directory(VM.id)
    assert facts(own) == (UID, 0o700)
    for name in ("mem", "vmstate"):
        assert os.path.samefile(f"{own}/{name}", f"{snapshot}/{name}")
        assert facts(f"{own}/{name}") == (0, 0o444)
    assert not os.path.samefile(f"{own}/cow.raw", f"{snapshot}/cow.raw")
    assert facts(f"{own}/cow.raw") == (UID, 0o600)
    with open(f"{own}/cow.raw", "rb") as disk:
        assert disk.read(5) == b"cow.r"


def test_a_clone_of_a_damaged_snapshot_leaves_nothing(store, tree, snapshot):
    os.truncate(f"{snapshot}/cow.raw", 1000)
    with pytest.raises(Damaged):
        store.fill(SNAPSHOT, VM)
    assert not os.path.exists(tree.directory(VM.id))


def test_a_disk_that_is_bound_elsewhere_is_linked_out_of_reach(store, tree, snapshot):
    bound = BoundFile("cow.raw", "/var/lib/cocoon/run/firecracker/X/cow.raw")
    store.fill(dataclasses.replace(SNAPSHOT, binds=(bound,)), VM)
    path = store.bound(VM, "cow.raw")
    assert os.path.samefile(path, f"{tree.directory(VM.id)}/cow.raw")
    assert facts(os.path.dirname(path)) == (0, 0o700)


def described(store, config):
    """A snapshot of Cloud Hypervisor's with that configuration."""
    data = json.dumps(config).encode()
    files = (SnapshotFile("config.json", len(data)), SnapshotFile("cow.raw", 0))
    taken = dataclasses.replace(SNAPSHOT, hypervisor="cloud-hypervisor", files=files)
    os.mkdir(store.directory(taken.id), 0o700)
    for file in files:
        with open(f"{store.directory(taken.id)}/{file.name}", "wb") as made:
            made.write(data[: file.size])
            os.fchmod(made.fileno(), 0o444)
    return taken


@pytest.mark.parametrize("socket", [canonical.CONSOLE_SOCKET, "/var/lib/cocoon/run/x/console.sock"])
def test_a_configuration_is_shared_unless_it_is_another_hosts(store, tree, socket):
    config = {"serial": {"mode": "Socket", "socket": socket}, "console": {"mode": "Off"}, "x": 1}
    taken = described(store, config)
    store.check_config(taken)
    store.fill(taken, VM)
    own = f"{tree.directory(VM.id)}/config.json"
    with open(own) as file:
        assert json.load(file) == config | {
            "serial": {"mode": "Socket", "socket": canonical.CONSOLE_SOCKET}
        }
    assert facts(own) == (0, 0o444)
    is_ours = socket == canonical.CONSOLE_SOCKET
    assert os.path.samefile(own, f"{store.directory(taken.id)}/config.json") == is_ours


def test_a_vm_with_cpus_of_its_own_has_a_configuration_of_its_own(store, tree):
    serial = {"mode": "Socket", "socket": canonical.CONSOLE_SOCKET}
    disk = {"id": "cow", "path": f"{canonical.VM}/cow.raw"}
    config = {"serial": serial, "console": {"mode": "Off"}, "disks": [disk]}
    taken = described(store, config)
    kept = f"{store.directory(taken.id)}/config.json"
    tied = dataclasses.replace(VM.config, queue_affinity=((1,),))
    for vm in (dataclasses.replace(VM, config=tied), VM):
        store.fill(taken, vm)
        own = f"{tree.directory(VM.id)}/config.json"
        with open(own) as file:
            (loaded,) = json.load(file)["disks"]
        assert facts(own) == (0, 0o444)
        if vm is VM:
            assert os.path.samefile(own, kept)
        else:
            assert loaded == disk | {"queue_affinity": [{"queue_index": 0, "host_cpus": [1]}]}
        store.stage_restore(taken, vm)
        with open(f"{tree.directory(VM.id)}.new/config.json") as file:
            assert json.load(file)["disks"] == [loaded]
    with open(kept) as file:
        assert json.load(file) == config


def test_what_a_snapshot_is_published_with_ties_nobody(store, tree):
    store.begin(SNAPSHOT.id)
    disk = {"id": "cow", "later": 2.5}
    tied = disk | {"queue_affinity": [{"queue_index": 0, "host_cpus": [1]}]}
    store.write(SNAPSHOT.id, "config.json", json.dumps({"x": [1], "disks": [tied]}).encode())
    store.untie(SNAPSHOT.id)
    written = store.read_staged(SNAPSHOT.id, "config.json")
    assert json.loads(written) == {"x": [1], "disks": [disk]}
    assert facts(f"{store.staging(SNAPSHOT.id)}/config.json") == (0, 0o444)


@pytest.mark.parametrize("data", [b"{", b'{"x": "' + b"x" * MIB + b'"}'], ids=["half", "huge"])
def test_what_is_no_configuration_makes_no_snapshot(store, tree, data):
    store.begin(SNAPSHOT.id)
    store.write(SNAPSHOT.id, "config.json", data)
    with pytest.raises(Damaged):
        store.untie(SNAPSHOT.id)


def test_an_exchange_can_be_repeated_and_undone(store, vm_directory, snapshot):
    with open(f"{vm_directory}/cow.raw", "r+b") as disk:
        disk.write(b"before")
    store.stage_restore(SNAPSHOT, VM)
    assert not store.is_exchanged(VM)
    for _ in range(2):
        store.exchange(SNAPSHOT, VM)
        assert store.is_exchanged(VM)
        with open(f"{vm_directory}/cow.raw", "rb") as disk:
            assert disk.read(5) == b"cow.r"
    for _ in range(2):
        store.exchange_back(VM)
        assert not store.is_exchanged(VM)
        with open(f"{vm_directory}/cow.raw", "rb") as disk:
            assert disk.read(6) == b"before"
    assert store.leftovers() == []


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_an_exchange_that_broke_off_goes_on(store, vm_directory, snapshot, renames):
    store.stage_restore(SNAPSHOT, VM)
    if renames > 0:
        os.rename(vm_directory, f"{vm_directory}.old")
    if renames > 1:
        os.rename(f"{vm_directory}.new", vm_directory)
    store.exchange(SNAPSHOT, VM)
    store.forget_old(VM)
    with open(f"{vm_directory}/cow.raw", "rb") as disk:
        assert disk.read(5) == b"cow.r"
    assert store.leftovers() == []


def test_restaging_replaces_what_a_guest_has_written(store, vm_directory, snapshot):
    store.stage_restore(SNAPSHOT, VM)
    store.exchange(SNAPSHOT, VM)
    with open(f"{vm_directory}/cow.raw", "r+b") as disk:
        disk.write(b"later")
    store.restage(SNAPSHOT, VM)
    store.exchange(SNAPSHOT, VM)
    with open(f"{vm_directory}/cow.raw", "rb") as disk:
        assert disk.read(5) == b"cow.r"


@pytest.mark.parametrize("part", ["kernel", "initrd", "firmware"])
def test_what_was_booted_comes_into_the_store_once(store, tree, snapshot, part):
    with open(f"{snapshot}/{part}", "wb") as file:
        file.write(b"ELF")
    of = dataclasses.replace(SNAPSHOT, **{part: "ab" * 32})
    store.store_boot(of)
    store.store_boot(of)
    assert os.path.samefile(f"{tree.kernels}/{'ab' * 32}", f"{snapshot}/{part}")
