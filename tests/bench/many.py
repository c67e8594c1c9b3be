"""Many created VMs: what listing, reading, creating and restarting cost then."""

import contextlib
import functools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import product
from report import Row

FEW = 10
_MS = 1000
_SMALL = "/var/lib/cocoon/small"  # on the same disk
_SMALL_UNIT = "small.service"


def many(long: bool) -> Iterator[Row]:
    """1,000 VMs, or 10,000."""
    count = 10_000 if long else 1_000
    names = [f"many{number}" for number in range(count)]
    with _small_agent() as small:
        began = time.perf_counter()
        product.for_all(lambda name: os.mkdir(f"{product.VMS}/{name}"), names)
        created = count / (time.perf_counter() - began)
        yield Row(f"mkdir, 16 at a time, of {count} VMs", "/s", [created])
        yield _listing(count)
        yield from _reading(names)
        yield _making(count, small)
    yield _restart(count)
    pid = product.agent_pid()
    yield Row(f"agent's memory, {count} created", "MiB", [product.resident_mib(pid)])
    product.for_all(product.remove, names)


def _listing(count: int) -> Row:
    samples = [_timed(lambda: _run("ls", product.VMS)) for _ in range(11)]
    return Row(f"ls /cocoon/vms, {count} VMs", "ms", samples, most=150)


def _reading(names: list[str]) -> Iterator[Row]:
    def read() -> None:
        # What cat does, without starting a program.
        file = os.open(f"{product.VMS}/{random.choice(names)}/state", os.O_RDONLY)
        os.fstat(file)
        while os.read(file, 1 << 17):
            pass
        os.close(file)

    yield Row(f"read state, {len(names)} VMs", "ms", [_timed(read) for _ in range(500)], most=1)
    with_program, elsewhere = [], []
    for _ in range(50):
        with_program.append(_timed(lambda: _run("cat", f"{product.VMS}/{names[0]}/state")))
        elsewhere.append(_timed(lambda: _run("cat", "/proc/version")))
    yield Row("cat state, beside cat /proc/version", "ms", with_program, elsewhere)


def _making(count: int, small: str) -> Row:
    """Compare mkdir here with mkdir in a second agent's tree, which has 10 VMs, in turn."""
    ours: list[float] = []
    theirs: list[float] = []
    for number in range(60):
        for samples, directory in ((theirs, small), (ours, product.VMS)):
            path = f"{directory}/made{number}"
            samples.append(_timed(functools.partial(os.mkdir, path)))
            os.rmdir(path)
    return Row(f"mkdir with {count} VMs, beside {FEW}", "ms", ours, theirs, most=1.2)


def _restart(count: int) -> Row:
    samples = [product.restart_agent() for _ in range(3)]
    return Row(f"agent's restart until ready, {count} VMs", "s", samples, most=3)


@contextmanager
def _small_agent() -> Iterator[str]:
    """Have a second agent, with few VMs; return the directory of its VMs."""
    mount = "/run/small"
    options = ["--root-dir", _SMALL, "--run-dir", "/run/small-run", "--mount", mount]
    _run(
        *("systemd-run", f"--unit={_SMALL_UNIT}", "--service-type=notify", "--quiet"),
        *(f"--setenv={name}={os.environ[name]}" for name in ("PYTHONPATH", "PATH")),
        *(sys.executable, "-m", "agent.cli.main", "run", *options),
    )
    try:
        for number in range(FEW):
            os.mkdir(f"{mount}/vms/few{number}")
        yield f"{mount}/vms"
    finally:
        with contextlib.suppress(OSError):
            product.for_all(lambda n: os.rmdir(f"{mount}/vms/{n}"), os.listdir(f"{mount}/vms"))
        _run("systemctl", "stop", _SMALL_UNIT)
        _run("rm", "-rf", _SMALL)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return _MS * (time.perf_counter() - began)
