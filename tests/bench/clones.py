"""Clones of a snapshot beside the floor's, one and many; and how long a snapshot pauses its VM."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import bursts
import product
from floor import open_floor
from product import MIB
from report import Row

MEMORY = 64 * MIB
STORAGE = 16 * MIB
PAUSED_MEMORY = 1024 * MIB
SNAPSHOT = "origin"
_MS = 1000
_PATIENCE = 60.0


def clone(long: bool) -> Iterator[Row]:
    """One clone: `echo start > state` beside the floor."""
    with _origin() as directory, open_floor() as floor:
        (unit,) = floor.prepare(["one"], MEMORY, snapshot=directory, storage=STORAGE)
        ours, theirs = [], []
        for number in range(150 if long else 40):
            with product.agent_frozen():
                took = _MS * floor.start([unit])
                floor.stop([unit])
            product.clone("one", SNAPSHOT)
            product.settle()
            ours.append(_MS * product.start("one"))
            theirs.append(took)
            product.settle()
            product.remove("one")
            product.settle()
            if number == 0:  # finds caches cold
                ours, theirs = [], []
    yield Row("clone until the guest runs", "ms", ours, theirs, most=1.3)


def clones(long: bool) -> Iterator[Row]:
    """64 clones of one snapshot at once, with none and with 128 others running."""
    names = [f"clone{number}" for number in range(bursts.BURST)]

    def renew(name: str) -> None:
        product.remove(name)
        product.clone(name, SNAPSHOT)

    with _origin() as directory, open_floor() as floor, _cloned(names):
        units = floor.prepare(names, MEMORY, snapshot=directory, storage=STORAGE)
        yield from bursts.compare(floor, units, names, 8 if long else 3, renew)


def pause(long: bool) -> Iterator[Row]:
    """How long the first snapshot of a guest, and one after it has changed 16 MiB, pause it."""
    first, second = [], []
    for number in range(9 if long else 3):
        name = f"paused{number}"
        product.create(name, PAUSED_MEMORY, guest="guest.elf", track_dirty=True)
        product.start(name)
        first.append(_taken(name, f"{name}-first"))
        product.write(f"{product.VMS}/{name}/console", "m")
        _wait_for(name, b"dirtied")
        second.append(_taken(name, f"{name}-second"))
        for snapshot in ("first", "second"):
            os.unlink(f"{product.MOUNT}/snapshots/{name}-{snapshot}.tar")
        product.remove(name)
    what = f"pause of {PAUSED_MEMORY // MIB} MiB with 16 MiB changed, beside the first"
    yield Row(what, "ms", second, first, most=0.1)


@contextmanager
def _origin() -> Iterator[str]:
    """Have a snapshot of a VM that is gone; return where its files lie."""
    product.create(SNAPSHOT, MEMORY, storage=STORAGE)
    product.start(SNAPSHOT)
    product.write(f"{product.VMS}/{SNAPSHOT}/snapshot", SNAPSHOT)
    product.remove(SNAPSHOT)
    try:
        yield product.snapshot_directory(SNAPSHOT)
    finally:
        os.unlink(f"{product.MOUNT}/snapshots/{SNAPSHOT}.tar")


@contextmanager
def _cloned(names: Sequence[str]) -> Iterator[None]:
    try:
        product.for_all(lambda name: product.clone(name, SNAPSHOT), names)
        yield
    finally:
        product.for_all(product.remove, names)


def _taken(name: str, snapshot: str) -> float:
    """Take a snapshot; return how many milliseconds the VM was paused."""
    product.write(f"{product.VMS}/{name}/snapshot", snapshot)
    with open(f"{product.MOUNT}/snapshots/{snapshot}.json") as file:
        return float(json.load(file)["pause_ms"])


def _wait_for(name: str, text: bytes) -> None:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        with open(f"{product.VMS}/{name}/console", "rb") as console:
            if text in console.read():
                return
        time.sleep(0.05)
    raise TimeoutError(f"the guest of {name} does not say {text!r}")
