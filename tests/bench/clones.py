"""Clones of a snapshot beside the floor's, one and many."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import bursts
import product
from backends import Backend
from floor import open_floor
from product import MIB
from report import Row

MEMORY = 64 * MIB
STORAGE = 16 * MIB
SNAPSHOT = "origin"
_MS = 1000


def clone(backend: Backend, long: bool) -> Iterator[Row]:
    """One clone: `echo start > state` beside the floor."""
    with _origin(backend) as directory, open_floor(backend) as floor:
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


def clones(backend: Backend, long: bool) -> Iterator[Row]:
    """Many clones of one snapshot at once, with none and with others running."""
    names = [f"clone{number}" for number in range(backend.burst)]

    def renew(name: str) -> None:
        product.remove(name)
        product.clone(name, SNAPSHOT)

    with _origin(backend) as directory, open_floor(backend) as floor, _cloned(names):
        units = floor.prepare(names, MEMORY, snapshot=directory, storage=STORAGE)
        yield from bursts.compare(backend, floor, units, names, 8 if long else 3, renew)


@contextmanager
def _origin(backend: Backend) -> Iterator[str]:
    """Have a snapshot of a VM that is gone; return where its files lie."""
    product.create(SNAPSHOT, MEMORY, storage=STORAGE, hypervisor=backend.name)
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
