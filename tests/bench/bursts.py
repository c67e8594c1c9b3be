"""Many starts at once, beside the floor's; and what the agent costs while many VMs idle."""

import time
from collections.abc import Callable, Iterator, Sequence

import product
from backends import Backend
from floor import Floor, Unit, open_floor
from product import MIB
from report import Row

DENSITY = 200
AT_ONCE = 16
MEMORY = 64 * MIB
DENSE_MEMORY = 32 * MIB
_MS = 1000


def burst(backend: Backend, long: bool) -> Iterator[Row]:
    """Many at once, with none and with others running."""
    names = [f"burst{number}" for number in range(backend.burst)]
    with open_floor(backend) as floor, product.vms(names, MEMORY, backend.name):
        units = floor.prepare(names, MEMORY)
        yield from compare(backend, floor, units, names, 8 if long else 3)


def compare(
    backend: Backend,
    floor: Floor,
    units: Sequence[Unit],
    names: Sequence[str],
    rounds: int,
    renew: Callable[[str], object] = lambda _: None,
) -> Iterator[Row]:
    """Start `units` and the VMs `names`, in turn, with none and with others running.

    `renew` makes a VM that was killed one that can be started in the same way.
    """
    yield from _compare(floor, units, names, rounds, renew, "none running")
    if not backend.others:
        return
    others = [f"other{number}" for number in range(backend.others)]
    with product.vms(others, MEMORY, backend.name):
        product.start_all(others, AT_ONCE)
        yield from _compare(floor, units, names, rounds, renew, f"{len(others)} running")


def _compare(
    floor: Floor,
    units: Sequence[Unit],
    names: Sequence[str],
    rounds: int,
    renew: Callable[[str], object],
    beside: str,
) -> Iterator[Row]:
    rates: list[float] = []
    floor_rates: list[float] = []
    waits: list[float] = []
    floor_waits: list[float] = []
    cpu: list[float] = []
    floor_cpu: list[float] = []
    agent_cpu: list[float] = []
    pid = product.agent_pid()
    many = len(names)
    for number in range(rounds + 1):
        with product.agent_frozen():
            before = product.lab_cpu_seconds()
            floor_rate = many / floor.start(units)
            floor_used = product.lab_cpu_seconds() - before
            floor.stop(units)
        before, agent_before = product.lab_cpu_seconds(), product.cpu_seconds(pid)
        took, each = product.start_all(names)
        product.settle()
        used = product.lab_cpu_seconds() - before
        agent_used = product.cpu_seconds(pid) - agent_before
        product.for_all(product.kill, names)
        product.for_all(renew, names)
        product.settle()
        if number:  # the first finds caches cold
            floor_rates.append(floor_rate)
            floor_waits += [_MS * (unit.running - unit.began) for unit in units]
            rates.append(many / took)
            waits += [_MS * wait for wait in each]
            cpu.append(_MS * used / many)
            floor_cpu.append(_MS * floor_used / many)
            agent_cpu.append(_MS * agent_used / many)
    yield Row(f"{many} at once, {beside}", "/s", rates, floor_rates, least=0.7)
    yield Row(f"one of {many} at once, {beside}", "ms", waits, floor_waits)
    yield Row(f"CPU time a start, {beside}", "ms", cpu, floor_cpu)
    yield Row(f"of it the agent's, {beside}", "ms", agent_cpu)


def density(backend: Backend, long: bool) -> Iterator[Row]:
    """200 VMs of 32 MiB, started 16 at a time; then nobody does anything."""
    names = [f"dense{number}" for number in range(DENSITY)]
    rates: list[float] = []
    floor_rates: list[float] = []
    with open_floor(backend) as floor, product.vms(names, DENSE_MEMORY, backend.name):
        units = floor.prepare(names, DENSE_MEMORY)
        for number in range(4 if long else 2):
            if number:
                product.for_all(product.kill, names)
                product.settle()
            with product.agent_frozen():
                floor_rates.append(DENSITY / floor.start(units, AT_ONCE))
                floor.stop(units)
            rates.append(DENSITY / product.start_all(names, AT_ONCE)[0])
            product.settle()
        pid = product.agent_pid()
        idle = [_share_of_a_core(pid, 10.0) for _ in range(6 if long else 3)]
        memory = product.resident_mib(pid)
        restarts = [product.restart_agent() for _ in range(3)]
    yield Row(f"{DENSITY} VMs, {AT_ONCE} at a time", "/s", rates, floor_rates, least=0.7)
    yield Row(f"agent's memory, {DENSITY} running", "MiB", [memory], most=100)
    yield Row(f"agent's CPU, {DENSITY} idle", "% of a core", idle, most=1)
    yield Row(f"agent's restart until ready, {DENSITY} running", "s", restarts)


def _share_of_a_core(pid: int, seconds: float) -> float:
    began, before = time.monotonic(), product.cpu_seconds(pid)
    time.sleep(seconds)
    return 100 * (product.cpu_seconds(pid) - before) / (time.monotonic() - began)
