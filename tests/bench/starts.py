"""One start at a time: beside the floor, and the floor's own unit without this or that."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import product
from backends import Backend
from floor import Floor, Unit, open_floor, without_settings
from product import MIB
from report import Row

MEMORY = 64 * MIB
TOGETHER = 8
"""Units that start at once where parts of them are compared: what one costs is little."""
_MS = 1000

PARTS: Mapping[str, Sequence[str]] = {
    "all seccomp filters": (
        "SystemCallFilter",
        "SystemCallErrorNumber",
        "SystemCallArchitectures",
        "LockPersonality",
        "MemoryDenyWriteExecute",
        "ProtectClock",
        "ProtectKernelLogs",
        "RestrictAddressFamilies",
        "RestrictNamespaces",
        "RestrictRealtime",
        "RestrictSUIDSGID",
    ),
    "SystemCallFilter=": ("SystemCallFilter", "SystemCallErrorNumber"),
    "SystemCallArchitectures=": ("SystemCallArchitectures",),
    "MemoryDenyWriteExecute=": ("MemoryDenyWriteExecute",),
    "LockPersonality=": ("LockPersonality",),
    "ProtectClock=": ("ProtectClock",),
    "ProtectKernelLogs=": ("ProtectKernelLogs",),
    "RestrictAddressFamilies=": ("RestrictAddressFamilies",),
    "RestrictNamespaces=": ("RestrictNamespaces",),
    "RestrictRealtime=": ("RestrictRealtime",),
    "RestrictSUIDSGID=": ("RestrictSUIDSGID",),
    "PrivateNetwork=": ("PrivateNetwork",),
    "IPAddressDeny=": ("IPAddressDeny",),
    "ProtectSystem=, ProtectHome=": ("ProtectSystem", "ProtectHome"),
    "KeyringMode=": ("KeyringMode",),
    "DevicePolicy=, DeviceAllow=": ("DevicePolicy", "DeviceAllow"),
    "User=, SupplementaryGroups=": ("User", "SupplementaryGroups"),
    "capabilities": ("CapabilityBoundingSet", "AmbientCapabilities", "NoNewPrivileges"),
    "MemoryMax=, CPUWeight=, TasksMax=": ("MemoryMax", "CPUWeight", "TasksMax"),
    "fd store, NotifyAccess=": ("FileDescriptorStoreMax", "NotifyAccess"),
    "journal: StandardError=, identifiers": (
        "StandardError",
        "SyslogLevelPrefix",
        "SyslogIdentifier",
        "LogExtraFields",
    ),
    "ExecStop=, ExecStopPost=": ("ExecStop", "ExecStopPost"),
}
"""Parts of the unit that can be left out, the drop-in's settings and the unit's properties."""


def start(backend: Backend, long: bool) -> Iterator[Row]:
    """One VM: `echo start > state` beside the floor."""
    with (
        product.vms(["one"], MEMORY, backend.name) as (name,),
        open_floor(backend) as floor,
    ):
        (unit,) = floor.prepare(["one"], MEMORY)
        ours, theirs, waits = [], [], []
        for number in range(150 if long else 40):
            with product.agent_frozen():
                theirs.append(_MS * floor.start([unit]))
                waits.append([_MS * (moment - unit.began) for moment in _moments(unit)])
                floor.stop([unit])
            ours.append(_MS * product.start(name))
            product.settle()
            product.kill(name)
            product.settle()
            if number == 0:
                # The first finds caches cold: of systemd, of the agent, of the kernel.
                ours, theirs, waits = [], [], []
    yield Row("start until the guest runs", "ms", ours, theirs, most=1.25)
    for text, samples in zip(
        ("the job is done", "the API socket is there", "the guest runs"),
        zip(*waits, strict=True),
        strict=True,
    ):
        yield Row(f"of the floor: until {text}", "ms", samples)


def _moments(unit: Unit) -> tuple[float, float, float]:
    return unit.job_done, unit.socket_seen, unit.running


def unit(backend: Backend, long: bool) -> Iterator[Row]:
    """The floor's unit without each of its parts."""
    with product.agent_stopped(), open_floor(backend) as floor:
        whole = floor.prepare([f"whole{number}" for number in range(TOGETHER)], MEMORY)
        everything = [name for names in PARTS.values() for name in names]
        parts = {**PARTS, "all of these": everything}
        lesser = {
            what: _without(floor, number, names)
            for number, (what, names) in enumerate(parts.items())
        }
        whole_took: list[_Took] = []
        costs: dict[str, list[_Took]] = {what: [] for what in parts}
        for number in range(25 if long else 6):
            for what in random.sample(list(parts), len(parts)):
                # Side by side, again for each part: the machine is not the same for long.
                if random.random() < 0.5:
                    one, other = _start(floor, whole), _start(floor, lesser[what])
                else:
                    other, one = _start(floor, lesser[what]), _start(floor, whole)
                if number:  # the first of each finds caches cold
                    whole_took.append(one)
                    costs[what].append(_Took(one.time - other.time, one.cpu - other.cpu))
    for what, samples in {"the whole unit, until the guest runs": whole_took, **costs}.items():
        times, cpu = ([took.time for took in samples], [took.cpu for took in samples])
        yield Row(what, "ms", times, cpu, compared=False)


@dataclass(frozen=True)
class _Took:
    """What one of several starts took, in milliseconds."""

    time: float
    cpu: float


def _start(floor: Floor, units: Sequence[Unit]) -> _Took:
    before = product.lab_cpu_seconds()
    time = floor.start(units)
    cpu = product.lab_cpu_seconds() - before
    floor.stop(units)
    return _Took(_MS * time / len(units), _MS * cpu / len(units))


def _without(floor: Floor, number: int, names: Sequence[str]) -> list[Unit]:
    prefix = f"floor{number}-"
    floor.use(prefix, without_settings(floor.text, names))
    parts = [f"part{number}" for number in range(TOGETHER)]
    return floor.prepare(parts, MEMORY, prefix=prefix, left_out=names)
