"""What a lab consists of on the host, and its removal, be it by a run that comes later."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from cgroups import LabError, remove_group

LABS = Path("/var/tmp")
PREFIX = "cocoon-lab-"
TEARDOWN_SECONDS = 20.0
SWEEP_SECONDS = 0.5


def make_directory() -> tuple[Path, int]:
    """A directory of our own, and the lock that says it is in use."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=LABS))
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # A sweep may have come between, and taken it away.
        if directory.exists():
            return directory, lock
        os.close(lock)


def remove_lab(directory: Path, patience: float = TEARDOWN_SECONDS) -> None:
    """Remove what a lab is made of; its processes end if they have not.

    Raise LabError if its groups are not empty after `patience` seconds.
    """
    deadline = time.monotonic() + patience
    for group in groups_of(directory):
        remove_group(group, deadline)
    detach_loops(directory)
    shutil.rmtree(directory)


def sweep() -> None:
    """Remove what labs left whose runner and keeper were both killed.

    What cannot be removed yet (groups are busy until process 1 of the host has asked for the status
    of the dead in them) is left to the next sweep.
    """
    for directory in LABS.glob(PREFIX + "*"):
        with contextlib.suppress(OSError, LabError):
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_lab(directory, SWEEP_SECONDS)
            finally:
                os.close(lock)


def groups_of(directory: Path) -> list[Path]:
    try:
        return [Path(line) for line in (directory / "groups").read_text().splitlines()]
    except FileNotFoundError:
        return []


def remember_devices(directory: Path, init: int) -> None:
    """Note the lab's memory filesystems: what lies there is told by their numbers alone later."""
    devices = set()
    for writable in ("dev", "dev/shm", "etc", "run", "tmp", "var/lib", "var/log"):
        with tempfile.TemporaryFile(dir=f"/proc/{init}/root/{writable}") as file:
            devices.add(device_number(os.fstat(file.fileno())))
    (directory / "devices").write_text("\n".join(devices))


def detach_loops(directory: Path) -> None:
    """Detach the loop devices on files in the lab's directory or its memory filesystems."""
    if not any(Path("/sys/block").glob("loop*/loop")):
        return
    columns = ["NAME", "BACK-MAJ:MIN", "BACK-INO"]
    listing = subprocess.run(
        ["losetup", "--list", "--json", "--output", ",".join(columns)],
        check=True,
        capture_output=True,
    ).stdout
    devices = set()
    with contextlib.suppress(FileNotFoundError):
        devices = set((directory / "devices").read_text().split())
    ours = set()
    for parent, _, names in os.walk(directory):
        for name in names:
            status = os.lstat(os.path.join(parent, name))
            ours.add((device_number(status), str(status.st_ino)))
    for loop in json.loads(listing)["loopdevices"] if listing else []:
        name, device, inode = (str(loop[column.lower()]).strip() for column in columns)
        if device in devices or (device, inode) in ours:
            subprocess.run(["losetup", "--detach", name], check=True)


def device_number(status: os.stat_result) -> str:
    return f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
