"""The index's tables, and the one place where they come into being."""

import sqlite3

VERSION = 2
"""Of the tables and the records in them; kept in SQLite's `user_version`."""

_CREATE = """
-- One row a VM. `record` is the whole record as JSON; the other columns repeat what people look for
-- with the sqlite3 shell. Names are kept unique by the agent, which holds all records in memory.
CREATE TABLE vms (id TEXT PRIMARY KEY, name TEXT NOT NULL, record TEXT NOT NULL) WITHOUT ROWID;
-- The same for snapshots.
CREATE TABLE snapshots (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, record TEXT NOT NULL
) WITHOUT ROWID;
-- `run_id`: content of the run directory's marker; another one there: the host has booted since.
CREATE TABLE facts (id TEXT PRIMARY KEY, name TEXT NOT NULL, record TEXT NOT NULL) WITHOUT ROWID;
"""

_SINCE = {
    2: """
-- As `vms`, for base images.
CREATE TABLE images (id TEXT PRIMARY KEY, name TEXT NOT NULL, record TEXT NOT NULL) WITHOUT ROWID;
"""
}
"""What came later, by version."""


class NewerSchema(Exception):
    """The index was written by a newer agent."""


def prepare(connection: sqlite3.Connection) -> None:
    """Make the tables in a new file; raise NewerSchema, touching nothing, on a newer one."""
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    if found > VERSION:
        raise NewerSchema(
            f"its schema is version {found}, this agent knows up to {VERSION}: "
            "install the newer cocoon-host again"
        )
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    if found < VERSION:
        statements = [] if found else [_CREATE]
        statements += [text for version, text in sorted(_SINCE.items()) if version > found]
        script = "".join(statements)
        connection.executescript(f"BEGIN; {script} PRAGMA user_version = {VERSION}; COMMIT;")
