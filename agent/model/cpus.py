"""Lists of the host's CPUs as Linux writes them: `0-3,8` (cpuset(7), list format)."""

from collections.abc import Iterable


def parse_cpus(text: str) -> frozenset[int]:
    """Return the CPUs of a list; raise ValueError for what is none."""
    cpus: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def show_cpus(cpus: Iterable[int]) -> str:
    """Return the list of `cpus`, as short as it can be."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(f"{low}-{high}" if low < high else f"{low}" for low, high in ranges)
