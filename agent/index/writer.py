"""The one writer of the index: commits together, and synced, all changes that arrive together."""

import json
import logging
import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from agent.model.errors import CocoonError, Failed, NoSpace

_SPARE = 1 << 20  # bytes
_GATHER = 0.05  # seconds that changes nobody waits for may gather before they are committed
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """A row to write; `record` makes its JSON value, on the writer's thread."""

    name: str
    record: Callable[[], Any]


@dataclass(slots=True)
class _Batch:
    rows: dict[tuple[str, str], Row | None] = field(default_factory=dict)
    committed: trio.Event = field(default_factory=trio.Event)
    error: CocoonError | None = None
    frees: bool = False


class Writer:
    """Gathers changes and commits them, one transaction at a time, on a thread of its own.

    Some room is kept beside the index for commits that free room: else nothing could be removed
    from a full disk.
    """

    def __init__(self, connection: sqlite3.Connection, path: str) -> None:
        self._connection = connection
        self._path = path
        self._batch = _Batch()
        self._something = trio.Event()
        self._urgent = trio.Event()
        self._thread = trio.CapacityLimiter(1)
        self._spare = os.open(f"{path}.spare", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._keep_room()

    def put(self, table: str, row_id: str, row: Row | None) -> None:
        """Write `row` soon, or delete it when None; the last put before a commit counts."""
        self._batch.rows[table, row_id] = row
        self._something.set()

    async def commit(self, *, frees: bool = False) -> None:
        """Wait until all that was put so far is on disk; raise NoSpace or Failed if it cannot be.

        `frees` says that it leads to the removal of something: then the room that is kept for this
        may be used. What was put is written even when the caller is cancelled meanwhile.
        """
        batch = self._batch
        batch.frees |= frees
        self._something.set()
        self._urgent.set()
        await batch.committed.wait()
        if batch.error is not None:
            raise batch.error

    async def run(self) -> None:
        """Commit batch after batch, until cancelled."""
        while True:
            await self._something.wait()
            with trio.move_on_after(_GATHER):
                await self._urgent.wait()
            with trio.CancelScope(shield=True):
                await self._write()

    async def close(self) -> None:
        """Commit what is left and close the file."""
        await self._write()
        await trio.to_thread.run_sync(self._connection.close, limiter=self._thread)
        os.close(self._spare)

    async def _write(self) -> None:
        batch, self._batch = self._batch, _Batch()
        self._something, self._urgent = trio.Event(), trio.Event()
        try:
            await trio.to_thread.run_sync(self._write_batch, batch, limiter=self._thread)
        except sqlite3.Error as error:
            kind = NoSpace if "full" in str(error) else Failed
            batch.error = kind(f"the index {self._path} cannot be written: {error}")
            _log.error("%s", batch.error)
            # Not lost: it goes with the next commit, unless something newer replaces it.
            self._batch.rows = {**batch.rows, **self._batch.rows}
        batch.committed.set()

    def _write_batch(self, batch: _Batch) -> None:
        try:
            self._write_rows(batch.rows)
        except sqlite3.Error as error:
            if not batch.frees or "full" not in str(error):
                raise
            os.ftruncate(self._spare, 0)
            self._has_room = False
            self._write_rows(batch.rows)
        if not self._has_room:
            self._keep_room()

    def _keep_room(self) -> None:
        try:
            # XFS has no room for what it has already, either.
            if os.fstat(self._spare).st_blocks * 512 < _SPARE:
                os.posix_fallocate(self._spare, 0, _SPARE)
            self._has_room = True
        except OSError:
            # Without room there is none to keep: again after the next commit.
            os.ftruncate(self._spare, 0)
            self._has_room = False

    def _write_rows(self, rows: dict[tuple[str, str], Row | None]) -> None:
        with self._connection as transaction:
            for (table, row_id), row in rows.items():
                if row is None:
                    transaction.execute(f"DELETE FROM {table} WHERE id = ?", (row_id,))  # noqa: S608
                else:
                    transaction.execute(
                        f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)",  # noqa: S608
                        (row_id, row.name, json.dumps(row.record())),
                    )
