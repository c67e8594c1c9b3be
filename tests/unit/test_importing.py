"""Archives on their way in, when something comes between."""

import os
import threading
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import trio
import trio.testing
from archives import firecracker, pack

from agent.index.store import open_index
from agent.lifecycle.archives import Archives
from agent.lifecycle.importing import Imports
from agent.model.access import Caller
from agent.model.errors import NoSpace
from agent.model.size import MIB
from agent.storage.importer import ImportSink
from agent.storage.snapshots import SnapshotStore
from agent.storage.tree import Tree

pytestmark = pytest.mark.anyio
ARCHIVE = pack(firecracker())
CALLER = Caller(0, 0)


@pytest.fixture
async def services(tmp_path):
    """What imports use of an agent, its storage and index real."""
    tree = Tree(f"{tmp_path}/root", f"{tmp_path}/run")
    await tree.prepare()
    told = []
    async with open_index(tree.index) as index, trio.open_nursery() as nursery:
        yield SimpleNamespace(
            index=index,
            tree=tree,
            snapshots=SnapshotStore(tree),
            drivers={},
            background=nursery,
            events=SimpleNamespace(happened=lambda kind, record, **_: told.append(kind)),
            reserved=set(),
            layouts={},
            told=told,
        )


@asynccontextmanager
async def held_up(monkeypatch, method):
    """Hold up a call of ImportSink's in its thread while the body runs; lend what it waits in."""
    begun, may_end = trio.Event(), threading.Event()
    real = getattr(ImportSink, method)

    def slow(self, *arguments):
        trio.from_thread.run_sync(begun.set)
        assert may_end.wait(20)
        return real(self, *arguments)

    monkeypatch.setattr(ImportSink, method, slow)
    try:
        yield begun, may_end
    finally:
        may_end.set()


@pytest.mark.parametrize("method", ["feed", "finish"])
async def test_removing_one_waits_for_the_thread_that_works_on_it(services, monkeypatch, method):
    arriving = await Imports(services, Archives(services), 0).begin(CALLER, "x.tar")
    arriving.opened()
    if method == "finish":
        await arriving.write(0, ARCHIVE)
    removed = trio.Event()

    async def remove():
        await arriving.discard()
        removed.set()

    async with trio.open_nursery() as nursery, held_up(monkeypatch, method) as (begun, may_end):
        if method == "feed":
            nursery.start_soon(arriving.write, 0, ARCHIVE)
        else:
            nursery.start_soon(arriving.finish)
        await begun.wait()
        nursery.start_soon(remove)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not removed.is_set()
        may_end.set()
    # Either it is gone, or all of it is there.
    snapshot = services.index.snapshots.named("x")
    assert os.listdir(services.tree.snapshots) == ([snapshot.id] if snapshot else [])
    assert bool(snapshot) == (method == "finish")
    assert not services.reserved


@pytest.mark.parametrize("size", [MIB, 1], ids=["large pieces", "small pieces"])
async def test_who_brings_more_than_the_disk_takes_waits(services, monkeypatch, size):
    arriving = await Imports(services, Archives(services), 0).begin(CALLER, "x.tar")
    arriving.opened()
    await arriving.write(0, ARCHIVE)
    pieces = 0

    async def bring():
        nonlocal pieces
        while pieces < 3000:
            await arriving.write(arriving.size, bytes(size))  # as tar pads its records
            pieces += 1

    async with trio.open_nursery() as nursery, held_up(monkeypatch, "feed") as (begun, may_end):
        nursery.start_soon(bring)
        await begun.wait()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert 0 < pieces * size < 10 * MIB
        assert pieces < 3000
        nursery.cancel_scope.cancel()
        may_end.set()
    await arriving.finish()
    assert services.index.snapshots.named("x")


async def test_a_renamed_one_that_cannot_be_recorded_leaves_nothing(services, monkeypatch):
    imports = Imports(services, Archives(services), 0)
    arriving = await imports.begin(CALLER, ".x.tar.abc")
    arriving.opened()
    await arriving.write(0, ARCHIVE)
    await arriving.finish()
    await arriving.closed()
    assert imports.find(".x.tar.abc") is arriving

    async def full(record, **_):
        raise NoSpace("the disk is full")

    monkeypatch.setattr(services.index.snapshots, "save", full)
    with pytest.raises(NoSpace):
        await arriving.rename("x.tar")
    assert imports.all() == []
    assert not services.reserved
    assert os.listdir(services.tree.snapshots) == []
