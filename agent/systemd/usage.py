"""What a unit uses, as systemd counts it on any cgroup version."""

import os
from collections.abc import Mapping
from typing import Any

import trio

from .bus import Bus
from .watch import unit_path

_UNKNOWN = 2**64 - 1  # what systemd says of a figure that is not counted
_PROPERTIES: Mapping[str, str] = {
    "CPUUsageNSec": "cpu_nsec",
    "MemoryCurrent": "memory_bytes",
    "IOReadBytes": "io_read_bytes",
    "IOWriteBytes": "io_write_bytes",
    "TasksCurrent": "tasks",
}
"""Properties of org.freedesktop.systemd1.Service(5), and what `stats` calls them."""


async def unit_usage(bus: Bus, unit: str, main_pid: int) -> dict[str, int]:
    """Return the figures that there are for a running service; raises BusFailure.

    What systemd does not count (I/O unless asked to, CPU time on some cgroup v1 hosts) is that
    of the main process.
    """
    found: dict[str, int] = {}

    async def get(name: str, key: str) -> None:
        reply = await bus.call(
            "org.freedesktop.systemd1",
            unit_path(unit),
            "org.freedesktop.DBus.Properties",
            "Get",
            "ss",
            ["org.freedesktop.systemd1.Service", name],
        )
        value: Any = reply.body[0].value
        if value != _UNKNOWN:
            found[key] = value

    async with trio.open_nursery() as nursery:
        for name, key in _PROPERTIES.items():
            nursery.start_soon(get, name, key)
    found = {**_process_usage(main_pid), **found}
    return {key: found[key] for key in _PROPERTIES.values() if key in found}


def _process_usage(pid: int) -> dict[str, int]:
    """Return CPU time and I/O of a process: proc(5), `stat` and `io`; {} when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        with open(f"/proc/{pid}/io", encoding="ascii") as file:
            counted = dict(line.split(": ") for line in file.read().splitlines())
    except OSError:
        return {}
    ticks = int(fields[11]) + int(fields[12])  # utime and stime
    return {
        "cpu_nsec": ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK"),
        "io_read_bytes": int(counted["read_bytes"]),
        "io_write_bytes": int(counted["write_bytes"]),
    }
