"""Writes down how a VM's process ended, and clears what it left: ExecStopPost of a VM's unit.

usage: stop_post.py RUN_DIRECTORY        with $SERVICE_RESULT, $EXIT_CODE, $EXIT_STATUS of systemd

The record is `RUN_DIRECTORY/exit`. A unit that ended cleanly vanishes with its exit status: this is
how an agent that was away learns it. Sockets of the dead process go, so that systemd's own restart
finds their paths free. Their directory belongs to the VMM, which may have been taken over: it is
entered by descriptor, and no link in it is followed.
"""

import contextlib
import itertools
import os
import sys
import time

MOST_ENTRIES = 100
"""Removed from one directory at most: a VMM that left more harms its own restart only."""


def main() -> None:
    run = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    write_record(run)
    sockets = os.open("sock", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=run)
    clear(sockets, depth=2)


def write_record(run: int) -> None:
    """Replace the record in the directory `run`, whole or not at all."""
    words = [os.environ.get(name, "") for name in ("SERVICE_RESULT", "EXIT_CODE", "EXIT_STATUS")]
    words += [f"{time.time():.6f}", os.environ.get("INVOCATION_ID", "")]
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    record = os.open("exit.new", flags, 0o600, dir_fd=run)
    os.write(record, " ".join(words).encode() + b"\n")
    os.close(record)
    os.rename("exit.new", "exit", src_dir_fd=run, dst_dir_fd=run)


def clear(directory: int, depth: int) -> None:
    """Remove what is in `directory`, and in directories below it down to `depth`."""
    with os.scandir(directory) as entries:
        for entry in itertools.islice(entries, MOST_ENTRIES):
            # A process that is still ending can be quicker.
            with contextlib.suppress(FileNotFoundError):
                try:
                    os.unlink(entry.name, dir_fd=directory)
                except IsADirectoryError:
                    clear_below(directory, entry.name, depth - 1)


def clear_below(directory: int, name: str, depth: int) -> None:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    with contextlib.suppress(OSError):
        if depth:
            below = os.open(name, flags, dir_fd=directory)
            clear(below, depth)
            os.close(below)
        os.rmdir(name, dir_fd=directory)


if __name__ == "__main__":
    main()
