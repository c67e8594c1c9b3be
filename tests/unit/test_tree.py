import os
import socket
import stat
import subprocess
import threading
from pathlib import Path

import pytest
import trio

from agent.model.access import Access
from agent.model.config import Disk, VmConfig
from agent.model.errors import Failed, Invalid, Missing, NoSpace, NotPermitted
from agent.model.size import MIB
from agent.model.vm import Vm
from agent.storage.tree import Tree

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other uids"),
]
UID = 70000


@pytest.fixture
async def tree(tmp_path):
    tree = Tree(f"{tmp_path}/root", f"{tmp_path}/run")
    await tree.prepare()
    return tree


def make_vm(**config):
    return Vm("abcdefghijklmnopqrstuvwxyz", "web", UID, Access(0, 0), VmConfig(**config))


def facts(path):
    status = os.lstat(path)
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


async def test_what_belongs_to_the_agent_is_closed_to_others(tree):
    for path in (tree.vms, tree.snapshots, tree.images, tree.log, tree.kernels):
        assert facts(path) == (0, 0, 0o700)
    for path in (tree.root, tree.run, tree.boot, tree.consoles):
        assert facts(path) == (0, 0, 0o755)


async def test_preparing_again_changes_nothing(tree):
    Path(tree.boot, "vmlinux").write_text("x")
    await tree.prepare()
    assert Path(tree.boot, "vmlinux").read_text() == "x"


@pytest.mark.parametrize("mode", [0o777, 0o775])
async def test_a_root_directory_that_others_may_change_is_refused(tmp_path, mode):
    (tmp_path / "root").mkdir()
    (tmp_path / "root").chmod(mode)
    with pytest.raises(NotPermitted, match=r"root is not safe.*chmod go-w"):
        await Tree(f"{tmp_path}/root", f"{tmp_path}/run").prepare()


async def test_a_root_directory_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "root").mkdir()
    os.chown(tmp_path / "root", UID, UID)
    with pytest.raises(NotPermitted, match=f"uid {UID} owns it"):
        await Tree(f"{tmp_path}/root", f"{tmp_path}/run").prepare()


async def test_a_directory_above_that_others_may_change_is_refused(tmp_path):
    (tmp_path / "above").mkdir()
    (tmp_path / "above").chmod(0o777)
    with pytest.raises(NotPermitted, match="above is not safe"):
        await Tree(f"{tmp_path}/above/root", f"{tmp_path}/run").prepare()


async def test_a_sticky_directory_above_is_safe(tmp_path):
    (tmp_path / "above").mkdir()
    (tmp_path / "above").chmod(0o1777)
    await Tree(f"{tmp_path}/above/root", f"{tmp_path}/run").prepare()


async def test_the_way_to_the_root_directory_is_checked_behind_links(tmp_path):
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose").chmod(0o777)
    (tmp_path / "link").symlink_to("loose")
    with pytest.raises(NotPermitted, match="loose is not safe"):
        await Tree(f"{tmp_path}/link/root", f"{tmp_path}/run").prepare()


async def test_a_start_finds_its_files_and_disks(tree):
    vm = make_vm(storage=2 * MIB, disks=(Disk(name="data", size=MIB),))
    assert await tree.prepare_vm(vm, {"vm.json": b"{}"}, b"A=1\n") == ()
    own, run = tree.directory(vm.id), tree.run_directory(vm.id)
    assert facts(own) == facts(f"{run}/sock") == (UID, UID, 0o700)
    assert facts(run) == (0, 0, 0o700)
    assert sorted(os.listdir(own)) == ["cow.raw", "data-data.raw", "vm.json"]
    for name, size in (("cow.raw", 2 * MIB), ("data-data.raw", MIB), ("vm.json", 2)):
        assert facts(f"{own}/{name}") == (UID, UID, 0o600)
        assert os.path.getsize(f"{own}/{name}") == size
    assert Path(run, "environment").read_bytes() == b"A=1\n"
    assert facts(f"{run}/environment") == (0, 0, 0o600)


async def test_a_new_disk_gets_its_filesystem_and_an_old_one_keeps_what_is_on_it(tree):
    vm = make_vm(disks=(Disk(name="data", size=8 * MIB, fstype="ext4"),))
    await tree.prepare_vm(vm, {}, b"")
    disk = Path(tree.directory(vm.id), "data-data.raw")
    assert facts(disk) == (UID, UID, 0o600)
    assert b"clean" in subprocess.check_output(["dumpe2fs", "-h", disk], stderr=subprocess.DEVNULL)
    before = disk.read_bytes()
    await tree.prepare_vm(make_vm(disks=(Disk(name="data", size=9 * MIB, fstype="ext4"),)), {}, b"")
    assert disk.read_bytes() == before + bytes(MIB)


async def test_disks_that_a_vm_has_no_more_are_removed_and_nothing_else(tree):
    vm = make_vm(storage=MIB, disks=(Disk(name="a", size=MIB), Disk(name="b", size=MIB)))
    await tree.prepare_vm(vm, {"vm.json": b"{}"}, b"")
    own = Path(tree.directory(vm.id))
    (own / "data-link.raw").symlink_to("vm.json")
    await tree.remove_stale_disks(make_vm(storage=MIB, disks=(Disk(name="b", size=MIB),)))
    assert sorted(os.listdir(own)) == ["cow.raw", "data-b.raw", "vm.json"]
    assert (own / "vm.json").read_bytes() == b"{}"


async def test_a_vm_that_runs_gets_disks_and_loses_them_by_name_alone(tree, tmp_path):
    vm = make_vm(storage=MIB, disks=(Disk(name="a", size=MIB),))
    await tree.prepare_vm(vm, {}, b"")
    own = Path(tree.directory(vm.id))
    precious = tmp_path / "precious"
    precious.write_bytes(b"x")
    # Put there by a VMM that was taken over.
    (own / ".data-b.raw.new").symlink_to(precious)
    (own / "data-c.raw").symlink_to(precious)
    wanted = VmConfig(storage=MIB, disks=tuple(Disk(name=name, size=MIB) for name in "abc"))
    await tree.make_disks(vm, wanted, ["b"])
    assert facts(own / "data-b.raw") == (UID, UID, 0o600)
    with pytest.raises(Failed, match="not the VM's any more"):
        await tree.make_disks(vm, wanted, ["c"])
    await tree.remove_disks(vm, ["b", "c", "d"])
    assert sorted(os.listdir(own)) == ["cow.raw", "data-a.raw"]
    assert precious.read_bytes() == b"x"


async def test_the_next_start_keeps_the_disk_and_renews_the_rest(tree):
    vm = make_vm(storage=MIB)
    await tree.prepare_vm(vm, {"vm.json": b"old"}, b"old")
    with Path(tree.directory(vm.id), "cow.raw").open("r+b") as disk:
        disk.write(b"data")
    Path(tree.run_directory(vm.id), "console.in").touch()
    vm = make_vm(storage=2 * MIB)
    await tree.prepare_vm(vm, {"vm.json": b"new"}, b"new")
    content = Path(tree.directory(vm.id), "cow.raw").read_bytes()
    assert content[:4] == b"data"
    assert len(content) == 2 * MIB
    assert Path(tree.directory(vm.id), "vm.json").read_bytes() == b"new"
    assert Path(tree.run_directory(vm.id), "environment").read_bytes() == b"new"
    assert Path(tree.run_directory(vm.id), "console.in").exists()


async def test_sockets_of_an_earlier_process_are_removed(tree):
    vm = make_vm()
    await tree.prepare_vm(vm, {}, b"")
    sockets = Path(tree.run_directory(vm.id), "sock")
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(f"{sockets}/api")
    (sockets / "api.lock").touch()
    assert tree.has_socket(vm)
    await tree.prepare_vm(vm, {}, b"")
    assert os.listdir(sockets) == []
    assert not tree.has_socket(vm)


async def test_a_disk_swapped_for_a_link_fails_the_start_and_is_not_followed(tree, tmp_path):
    vm = make_vm(storage=MIB)
    await tree.prepare_vm(vm, {}, b"")
    secret = tmp_path / "secret"
    secret.write_text("precious")
    disk = Path(tree.directory(vm.id), "cow.raw")
    disk.unlink()
    disk.symlink_to(secret)
    with pytest.raises(Failed, match="taken over"):
        await tree.prepare_vm(make_vm(storage=2 * MIB), {}, b"")
    assert secret.read_text() == "precious"


async def test_disks_of_the_host_are_lent_and_released(tree, tmp_path):
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(512))
    disk.chmod(0o600)
    vm = make_vm(disks=(Disk(path=str(disk), readonly=True),))
    assert await tree.prepare_vm(vm, {}, b"") == ()
    lent = os.getxattr(disk, "system.posix_acl_access")
    assert UID.to_bytes(4, "little") in lent
    await tree.release_disks(vm)
    with pytest.raises(OSError, match="No data"):
        os.getxattr(disk, "system.posix_acl_access")


async def test_when_one_disk_is_missing_none_stays_lent(tree, tmp_path):
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(512))
    vm = make_vm(disks=(Disk(path=str(disk)), Disk(path="/dev/nowhere")))
    with pytest.raises(Missing, match="no disk /dev/nowhere"):
        await tree.prepare_vm(vm, {}, b"")
    with pytest.raises(OSError, match="No data"):
        os.getxattr(disk, "system.posix_acl_access")


async def test_removing_a_vm_leaves_nothing_of_it(tree, tmp_path):
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(512))
    vm = make_vm(storage=MIB, disks=(Disk(path=str(disk)),))
    await tree.prepare_vm(vm, {"vm.json": b"{}"}, b"")
    assert os.listdir(tree.vms) == [vm.id]
    await tree.remove_vm(vm)
    await tree.remove_vm(vm)
    assert not os.path.exists(tree.directory(vm.id))
    await tree.empty_trash()
    assert os.listdir(tree.vms) == []
    assert not os.path.exists(tree.run_directory(vm.id))
    with pytest.raises(OSError, match="No data"):
        os.getxattr(disk, "system.posix_acl_access")


async def test_a_vm_is_removed_beside_what_was_removed_of_it_before(tree):
    vm = make_vm(storage=MIB)
    for _ in range(2):
        await tree.prepare_vm(vm, {"vm.json": b"{}"}, b"")
        await tree.remove_vm(vm)
        assert not os.path.exists(tree.directory(vm.id))
    await tree.empty_trash()
    assert os.listdir(tree.vms) == []


@pytest.fixture
async def listening(tree):
    """A VM whose VMM has made its socket."""
    vm = make_vm()
    await tree.prepare_vm(vm, {}, b"")
    path = f"{tree.run_directory(vm.id)}/sock/api"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        os.chown(path, UID, UID)
        yield vm, Path(path)


async def test_the_socket_is_lent_by_descriptor(tree, listening):
    vm, path = listening
    with tree.open_socket(vm) as descriptor:
        assert os.fstat(descriptor).st_ino == path.stat().st_ino
        path.unlink()
        assert stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)


@pytest.mark.parametrize("kind", ["link", "file", "fifo", "other owner"])
async def test_something_else_in_the_sockets_place_is_refused(tree, listening, tmp_path, kind):
    vm, path = listening
    if kind == "other owner":
        os.chown(path, 0, 0)
    else:
        moved = tmp_path / "api"
        path.rename(moved)
        if kind == "link":
            path.symlink_to(moved)
        elif kind == "file":
            path.touch()
        else:
            os.mkfifo(path)
        os.chown(path, UID, UID, follow_symlinks=False)
    with pytest.raises(Failed, match="not the socket of web's VMM"), tree.open_socket(vm):
        pass


async def test_a_socket_that_is_missing_is_named(tree):
    vm = make_vm()
    assert not tree.has_socket(vm)
    with pytest.raises(Missing, match="no API socket"), tree.open_socket(vm):
        pass
    await tree.prepare_vm(vm, {}, b"")
    with pytest.raises(Missing, match="no API socket"), tree.open_socket(vm):
        pass


async def test_an_error_within_the_loan_of_a_socket_is_its_own(tree, listening):
    vm, _ = listening
    with pytest.raises(FileNotFoundError), tree.open_socket(vm):
        raise FileNotFoundError


async def test_system_errors_become_the_agents_own(tree):
    def full():
        raise OSError(28, "No space left on device")

    def refuse():
        raise Invalid("no")

    with pytest.raises(NoSpace, match="doing something failed: No space"):
        await tree.in_thread("doing something", full)
    with pytest.raises(Invalid, match="^no$"):
        await tree.in_thread("doing something", refuse)


async def test_a_cancelled_operation_is_finished_first(tree):
    begun, go_on, done = trio.Event(), threading.Event(), []

    def act():
        trio.from_thread.run_sync(begun.set)
        go_on.wait(10)
        done.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tree.in_thread, "doing something", act)
        await begun.wait()
        nursery.cancel_scope.cancel()
        go_on.set()
    assert done == [True]


async def test_the_free_space_is_what_may_still_be_written(tree):
    status = os.statvfs(tree.root)
    free = await tree.free_space()
    assert 0 < free <= status.f_blocks * status.f_frsize
