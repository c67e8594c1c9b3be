"""The records, in memory for readers and in SQLite for the next start.

Memory is the truth while the agent runs. `save` returns once the change is on disk; `note` leaves
that to the next commit, for what can be found out again after a crash.
"""

import functools
import json
import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Generic, Protocol, TypeVar

import trio

from agent.model import image as image_record
from agent.model import snapshot as snapshot_record
from agent.model import vm as vm_record
from agent.model.errors import CocoonError, Exists, Failed, NoSpace
from agent.model.image import Image
from agent.model.snapshot import Snapshot
from agent.model.vm import FIRST_UID, LAST_UID, Vm

from . import schema
from .writer import Row, Writer


class Record(Protocol):
    """What a table holds: frozen records with a lasting id and a name that may change."""

    @property
    def id(self) -> str: ...

    @property
    def name(self) -> str: ...


R = TypeVar("R", bound=Record)


class Table(Generic[R]):
    """All records of one kind. Reading never waits."""

    def __init__(
        self, name: str, writer: Writer, to_row: Callable[[R], Any], from_row: Callable[[Any], R]
    ) -> None:
        self._name = name
        self._writer = writer
        self._to_row = to_row
        self._from_row = from_row
        self._records: dict[str, R] = {}
        self._ids: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._records)

    def all(self) -> list[R]:
        """Return all records, in no order."""
        return list(self._records.values())

    def names(self) -> list[str]:
        """Return all names, in no order."""
        return list(self._ids)

    def get(self, record_id: str) -> R | None:
        """Return the record of that id."""
        return self._records.get(record_id)

    def named(self, name: str) -> R | None:
        """Return the record of that name."""
        record_id = self._ids.get(name)
        return None if record_id is None else self._records[record_id]

    def note(self, record: R) -> None:
        """Put `record`; it will be on disk soon."""
        holder = self._ids.get(record.name)
        if holder not in (None, record.id):
            raise Exists(f"the name {record.name} is taken: choose another one")
        before = self._records.get(record.id)
        if before is not None and before.name != record.name:
            del self._ids[before.name]
        self._records[record.id] = record
        self._ids[record.name] = record.id
        self._writer.put(
            self._name, record.id, Row(record.name, functools.partial(self._to_row, record))
        )

    async def save(self, record: R, *, frees: bool = False) -> None:
        """Put `record` and wait until it is on disk; on failure all is as before.

        With `frees` it is written to a full disk too: something will be removed then.

        Raises Exists when another record has its name, NoSpace or Failed when the index cannot be
        written.
        """
        before = self._records.get(record.id)
        self.note(record)
        try:
            await self._writer.commit(frees=frees)
        except CocoonError:
            if self._records.get(record.id) is record:
                if before is None:
                    self.forget(record)
                else:
                    self.note(before)
            raise

    def forget(self, record: R) -> None:
        """Remove `record`; its row goes soon."""
        current = self._records.pop(record.id)
        del self._ids[current.name]
        self._writer.put(self._name, record.id, None)

    def load(self, connection: sqlite3.Connection) -> None:
        """Read all rows; raise Failed, naming the row, when one cannot be read."""
        query = f"SELECT id, record FROM {self._name}"  # noqa: S608
        for row_id, text in connection.execute(query):
            try:
                record = self._from_row(json.loads(text))
            except (TypeError, KeyError, ValueError) as error:
                raise Failed(
                    f"row {row_id} of table {self._name} cannot be read ({error!r}): "
                    "restore the index from a backup, or delete that row"
                ) from error
            self._records[record.id] = record
            self._ids[record.name] = record.id


class Index:
    """The tables, and facts about the host."""

    def __init__(self, connection: sqlite3.Connection, path: str) -> None:
        self._writer = Writer(connection, path)
        self.vms = Table[Vm]("vms", self._writer, vm_record.to_row, vm_record.from_row)
        self.vms.load(connection)
        self.snapshots = Table[Snapshot](
            "snapshots", self._writer, snapshot_record.to_row, snapshot_record.from_row
        )
        self.snapshots.load(connection)
        self.images = Table[Image](
            "images", self._writer, image_record.to_row, image_record.from_row
        )
        self.images.load(connection)
        self._facts: dict[str, str] = {
            name: json.loads(text)
            for name, text in connection.execute("SELECT id, record FROM facts")
        }
        self._uids = {vm.uid for vm in self.vms.all()}
        self._last_uid = max(self._uids, default=LAST_UID)

    def free_uid(self) -> int:
        """Take a uid that no VM has, the longest unused first; raise NoSpace if all are taken."""
        span = LAST_UID - FIRST_UID + 1
        for step in range(1, span + 1):
            uid = FIRST_UID + (self._last_uid - FIRST_UID + step) % span
            if uid not in self._uids:
                self._last_uid = uid
                self._uids.add(uid)
                return uid
        raise NoSpace(f"all {span} uids for VMs are taken: remove VMs that are no longer needed")

    def release_uid(self, uid: int) -> None:
        """Give back a uid that no VM has any more."""
        self._uids.discard(uid)

    def fact(self, name: str) -> str:
        """Return a fact about the host, "" if it was never set."""
        return self._facts.get(name, "")

    async def save_fact(self, name: str, value: str) -> None:
        """Set a fact and wait until it is on disk."""
        self._facts[name] = value
        self._writer.put("facts", name, Row(name, lambda: value))
        await self._writer.commit()

    async def sync(self, *, frees: bool = False) -> None:
        """Wait until all that was put so far is on disk; `frees` as in `Table.save`."""
        await self._writer.commit(frees=frees)


@asynccontextmanager
async def open_index(path: str) -> AsyncIterator[Index]:
    """Open the index, making it if there is none; raise Failed with what to do when it cannot be.

    Records are written while the context is open; what was noted before it closes is kept.
    """

    def load() -> Index:
        # SQLite gives its other files the permissions of this one: hashes of passwords are in them.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        os.chmod(path, 0o600)
        connection = sqlite3.connect(path, check_same_thread=False)
        try:
            schema.prepare(connection)
            return Index(connection, path)
        except BaseException:
            connection.close()
            raise

    try:
        index = await trio.to_thread.run_sync(load)
    except (schema.NewerSchema, sqlite3.Error, OSError, Failed) as error:
        raise Failed(f"the index {path} cannot be used: {error}") from error
    writer = index._writer
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            yield index
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await writer.close()
