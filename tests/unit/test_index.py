import dataclasses
import sqlite3

import pytest
import trio

from agent.index.schema import VERSION
from agent.index.store import open_index
from agent.model.access import Access
from agent.model.config import BaseImage, Boot, Disk, VmConfig
from agent.model.errors import Exists, Failed, NoSpace
from agent.model.image import Image, ImageState
from agent.model.names import new_id
from agent.model.vm import FIRST_UID, BootFiles, State, Vm

pytestmark = pytest.mark.anyio


def make_vm(name: str, **values: object) -> Vm:
    vm = Vm(
        id=new_id(),
        name=name,
        uid=FIRST_UID,
        access=Access(1000, 1001, 0o750),
        config=VmConfig(
            cpu=2,
            boot=Boot(kernel="k", cmdline="a b"),
            disks=(Disk(name="d", size=1 << 20), Disk(path="/dev/x", readonly=True)),
            ssh_keys=("ssh-ed25519 A", "ssh-ed25519 B"),
            queue_affinity=((0, 2), ()),
        ),
        state=State.STOPPED,
        booted=BootFiles("aa", "", Boot(kernel="k")),
        snapshots=("s1",),
        created_at=12.5,
    )
    return dataclasses.replace(vm, **values)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "index.db")


async def test_what_was_saved_is_there_after_a_restart(path):
    vm = make_vm("a")
    async with open_index(path) as index:
        await index.vms.save(vm)
    async with open_index(path) as index:
        assert index.vms.get(vm.id) == vm
        assert index.vms.named("a") == vm
        assert index.vms.all() == [vm]


async def test_what_was_noted_is_there_after_a_clean_end(path):
    vm = make_vm("a")
    async with open_index(path) as index:
        index.vms.note(vm)
        index.vms.note(dataclasses.replace(vm, state=State.ERROR))
    async with open_index(path) as index:
        assert index.vms.named("a").state is State.ERROR


async def test_save_returns_only_when_another_connection_sees_the_row(path):
    vm = make_vm("a")
    async with open_index(path) as index:
        await index.vms.save(vm)
        with sqlite3.connect(path) as other:
            assert other.execute("SELECT id, name FROM vms").fetchall() == [(vm.id, "a")]


async def test_what_is_noted_is_written_without_anybody_waiting(path):
    async with open_index(path) as index:
        index.vms.note(make_vm("a"))
        with sqlite3.connect(path) as other, trio.fail_after(10):
            while not other.execute("SELECT * FROM vms").fetchall():
                await trio.sleep(0.01)


async def test_an_index_of_the_first_version_gets_the_tables_that_came_later(path):
    vm = dataclasses.replace(make_vm("a"), config=VmConfig(base=BaseImage("ab", "raw", 512)))
    async with open_index(path) as index:
        await index.vms.save(vm)
    with sqlite3.connect(path) as older:
        older.execute("DROP TABLE images")
        older.execute("PRAGMA user_version = 1")
    image = Image(new_id(), "debian", Access(0, 0), digest="ab", state=ImageState.READY)
    async with open_index(path) as index:
        assert index.vms.all() == [vm]
        await index.images.save(image)
    async with open_index(path) as index:
        assert index.images.all() == [image]


async def test_a_newer_schema_is_refused_and_left_alone(path):
    async with open_index(path) as index:
        await index.vms.save(make_vm("a"))
    with sqlite3.connect(path) as newer:
        newer.execute(f"PRAGMA user_version = {VERSION + 1}")
        newer.execute("DROP TABLE facts")
    with pytest.raises(Failed, match=f"version {VERSION + 1}.*newer cocoon-host"):
        async with open_index(path):
            pass
    with sqlite3.connect(path) as newer:
        assert newer.execute("PRAGMA user_version").fetchone() == (VERSION + 1,)
        assert len(newer.execute("SELECT * FROM vms").fetchall()) == 1


async def test_a_file_that_is_no_index_is_refused_by_name(path):
    with open(path, "wb") as file:
        file.write(b"no database at all" * 100)
    with pytest.raises(Failed, match="index.db cannot be used"):
        async with open_index(path):
            pass


async def test_a_record_that_cannot_be_read_is_named(path):
    vm = make_vm("a")
    async with open_index(path) as index:
        await index.vms.save(vm)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE vms SET record = '{}'")
    with pytest.raises(Failed, match=vm.id):
        async with open_index(path):
            pass


async def test_a_name_is_taken_once(path):
    async with open_index(path) as index:
        await index.vms.save(make_vm("a"))
        with pytest.raises(Exists):
            await index.vms.save(make_vm("a"))
        assert len(index.vms) == 1


async def test_two_vms_may_swap_names_in_one_commit(path):
    first, second = make_vm("a"), make_vm("b")
    async with open_index(path) as index:
        await index.vms.save(first)
        await index.vms.save(second)
        index.vms.note(dataclasses.replace(first, name="c"))
        index.vms.note(dataclasses.replace(second, name="a"))
        index.vms.note(dataclasses.replace(first, name="b"))
    async with open_index(path) as index:
        assert {vm.name: vm.id for vm in index.vms.all()} == {"a": second.id, "b": first.id}


async def test_a_save_that_fails_changes_nothing(path):
    vm = make_vm("a")
    async with open_index(path) as index:
        await index.vms.save(vm)
        with sqlite3.connect(path) as other:
            other.execute(
                "CREATE TRIGGER full BEFORE INSERT ON vms "
                "BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
            )
        with pytest.raises(NoSpace):
            await index.vms.save(dataclasses.replace(vm, name="other"))
        with pytest.raises(NoSpace):
            await index.vms.save(make_vm("b"))
        assert index.vms.all() == [vm]
        assert index.vms.names() == ["a"]
        with sqlite3.connect(path) as other:
            other.execute("DROP TRIGGER full")
        await index.sync()
    async with open_index(path) as index:
        assert index.vms.all() == [vm]


async def test_saves_that_arrive_together_share_a_commit(path, monkeypatch):
    async with open_index(path) as index:
        commits = []
        write_rows = index._writer._write_rows
        monkeypatch.setattr(
            index._writer, "_write_rows", lambda rows: (commits.append(len(rows)), write_rows(rows))
        )
        async with trio.open_nursery() as nursery:
            for number in range(64):
                nursery.start_soon(index.vms.save, make_vm(f"vm{number}"))
        assert sum(commits) == 64
        assert len(commits) <= 3


async def test_a_forgotten_vm_is_gone_for_good(path):
    vm = make_vm("a")
    async with open_index(path) as index:
        await index.vms.save(vm)
        index.vms.forget(vm)
        await index.sync()
        assert index.vms.named("a") is None
    async with open_index(path) as index:
        assert len(index.vms) == 0


async def test_uids_are_not_reused_while_taken_or_soon_after(path):
    async with open_index(path) as index:
        first, second = index.free_uid(), index.free_uid()
        assert first != second
        index.release_uid(first)
        assert index.free_uid() not in (first, second)
        await index.vms.save(make_vm("a", uid=second))
    async with open_index(path) as index:
        assert index.free_uid() != second


async def test_facts_last(path):
    async with open_index(path) as index:
        assert index.fact("run_id") == ""
        await index.save_fact("run_id", "x")
    async with open_index(path) as index:
        assert index.fact("run_id") == "x"


async def test_nobody_else_may_read_the_index(path, tmp_path):
    async with open_index(path) as index:
        await index.vms.save(make_vm("a"))
        modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    names = ["index.db", "index.db-wal", "index.db-shm", "index.db.spare"]
    assert modes == dict.fromkeys(names, 0o600)
