"""Snapshots as archives, beside what tar and cp do with the same bytes in plain files."""

import contextlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import product
from product import MIB
from report import Row

_PLACE = "/var/lib/cocoon/bench"  # on the same disk
_SPARSE_SIZE = 4096 * MIB
_SPARSE_DATA = 128 * MIB
_PIECES = 64


def archive(long: bool) -> Iterator[Row]:
    """Read, export and import archives of 256 MiB (1 GiB) of data, and one of a sparse file."""
    size = (1024 if long else 256) * MIB
    rounds = 7 if long else 5
    os.mkdir(_PLACE)
    try:
        with _snapshot("dense", size, size) as (tar, directory):
            yield from _dense(tar, directory, size, rounds)
        with (
            _snapshot("sparse", _SPARSE_SIZE, _SPARSE_DATA) as (sparse, _),
            _snapshot("full", _SPARSE_DATA, _SPARSE_DATA) as (full, _),
        ):
            ours, theirs = _in_turn(rounds, lambda: _read(sparse), lambda: _read(full))
            what = f"read {_SPARSE_DATA // MIB} MiB in {_SPARSE_SIZE // MIB}, beside nothing else"
            yield Row(what, "s", ours, theirs, most=1.2)
    finally:
        shutil.rmtree(_PLACE)


def _dense(tar: str, directory: str, size: int, rounds: int) -> Iterator[Row]:
    stored, target = f"{_PLACE}/stored.tar", f"{_PLACE}/target"
    _run("cp", tar, stored)
    packed = f"tar --create --file=- {directory} 2>/dev/null | cat >/dev/null"
    rates = _in_turn(rounds, lambda: _read(tar), lambda: _run("sh", "-c", packed))
    ours, theirs = _rates(rates, size)
    yield Row("read with dd, beside tar | cat", "MiB/s", ours, theirs, least=1)

    def copy(source: str) -> Callable[[], None]:
        return lambda: _run("cp", source, target)

    def remove() -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target)
        _warm(target, size)

    rates = _in_turn(rounds, copy(tar), copy(stored), remove)
    ours, theirs = _rates(rates, size)
    yield Row("export with cp, beside cp of a file", "MiB/s", ours, theirs, least=0.7)
    rates = _in_turn(rounds, _synced(copy(tar), target), _synced(copy(stored), target), remove)
    ours, theirs = _rates(rates, size)
    yield Row("the same until it is on the disk", "MiB/s", ours, theirs)
    # cp has the kernel copy between two files; what it reads through FUSE it has to write itself.
    by_hand = ("dd", f"if={stored}", f"of={target}", "bs=1M", "status=none")
    ours, theirs = _rates(_in_turn(rounds, copy(tar), lambda: _run(*by_hand), remove), size)
    yield Row("export with cp, beside reads and writes of a file", "MiB/s", ours, theirs)
    remove()

    imported = f"{product.MOUNT}/snapshots/imported.tar"

    def extract() -> None:
        os.mkdir(target)
        _run("tar", "--extract", f"--file={stored}", f"--directory={target}")

    def clear() -> None:
        shutil.rmtree(target, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(imported)
        _warm(target, size)

    def take_in() -> None:
        _run("cp", stored, imported)

    ours, theirs = _in_turn(rounds, take_in, extract, clear)
    yield Row("import with cp, beside tar xf", "s", ours, theirs, most=1.5)
    # An import is on the disk when cp returns.
    ours, theirs = _in_turn(rounds, take_in, _synced(extract, target), clear)
    yield Row("the same until it is on the disk", "s", ours, theirs)
    clear()


def _synced(act: Callable[[], None], target: str) -> Callable[[], None]:
    """Do `act`, and wait until what it wrote to the filesystem of `target` is on the disk."""

    def both() -> None:
        act()
        _run("sync", "--file-system", target)

    return both


@contextmanager
def _snapshot(name: str, size: int, data: int) -> Iterator[tuple[str, str]]:
    """Have a snapshot with a disk of `size` bytes, so many of them `data`, in pieces.

    Returns its archive, and where its files lie.
    """
    product.create(name, storage=size)
    product.start(name)
    with open(f"{product.VMS}/{name}/id") as file:
        disk = f"/var/lib/cocoon/vms/{file.read().strip()}/cow.raw"
    with open(disk, "r+b") as file:
        for piece in range(_PIECES):
            file.seek(piece * (size // _PIECES))
            file.write(random.randbytes(data // _PIECES))
    product.write(f"{product.VMS}/{name}/snapshot", name)
    product.remove(name)
    tar = f"{product.MOUNT}/snapshots/{name}.tar"
    try:
        yield tar, product.snapshot_directory(name)
    finally:
        os.unlink(tar)


_TAKEN_BACK = 2.5  # seconds; Linux's free page reporting waits for two


def _warm(path: str, size: int) -> None:
    """Write `size` bytes to a file that is removed again, with all else on the disk.

    The host of a VM may take memory back that is free for two seconds; to get it again takes
    longer than to copy, for whatever writes large blocks. It takes what was freed before in the
    meantime: else it would take that of the warm file.
    """
    os.sync()
    time.sleep(_TAKEN_BACK)
    piece = bytes(MIB)
    with open(path, "wb") as file:
        for _ in range(size // MIB):
            file.write(piece)
    os.unlink(path)


def _read(path: str) -> None:
    _run("dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none")


def _in_turn(
    rounds: int,
    ours: Callable[[], None],
    theirs: Callable[[], None],
    before: Callable[[], None] = lambda: None,
) -> tuple[list[float], list[float]]:
    """Return the seconds that both take, in turn; the first time finds caches cold.

    `before` each of them it removes what the last one wrote.
    """
    took: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for act, samples in zip((ours, theirs), took, strict=True):
            before()
            began = time.perf_counter()
            act()
            if number:
                samples.append(time.perf_counter() - began)
    return took


def _rates(times: tuple[list[float], list[float]], size: int) -> tuple[list[float], list[float]]:
    ours, theirs = times
    megabytes = size / MIB
    return [megabytes / seconds for seconds in ours], [megabytes / seconds for seconds in theirs]


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
