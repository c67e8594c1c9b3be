"""The CPUs of this host, and those of them that VMs may run on."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from agent.model.cpus import parse_cpus

from .drop_in import SLICE

_CGROUPS = "sys/fs/cgroup"


@dataclass(frozen=True, slots=True)
class HostCpus:
    """By number, the CPUs that there are, that run, and that the VMs' control group may use."""

    present: frozenset[int]
    online: frozenset[int]
    allowed: frozenset[int]

    @property
    def usable(self) -> frozenset[int]:
        return self.online & self.allowed


def host_cpus(root: str = "/") -> HostCpus:
    """Look at the host whose filesystems are below `root`; does not wait, raises OSError.

    What a process asks for by sched_setaffinity(2) is cut down to its cpuset without a word. The
    affinity of the agent or of process 1 tells nothing of that: CPUs that the kernel's `isolcpus`
    or systemd's `CPUAffinity` keep from others are the ones that VMs are given.
    """
    devices = os.path.join(root, "sys/devices/system/cpu")
    present, online = (_cpus(f"{devices}/{name}") for name in ("present", "online"))
    for path in _cpusets(root):
        with contextlib.suppress(FileNotFoundError):
            return HostCpus(present, online, _cpus(path))
    return HostCpus(present, online, online)


def _cpus(path: str) -> frozenset[int]:
    with open(path, encoding="ascii") as file:
        return parse_cpus(file.read())


def _cpusets(root: str) -> Iterator[str]:
    """Yield where the cpuset that counts may be described (cgroups(7)), the nearest first."""
    with open(os.path.join(root, "proc/1/cgroup"), encoding="utf-8") as file:
        groups = {
            controllers: path
            for _, controllers, path in (line.rstrip("\n").split(":", 2) for line in file)
        }
    mount = os.path.join(root, _CGROUPS)
    if "cpuset" in groups:
        # Version 1: systemd leaves that hierarchy alone, and so units are where process 1 is.
        yield f"{mount}/cpuset{groups['cpuset']}/cpuset.effective_cpus"
    # Version 2: a control group without a cpuset of its own has the next one above it.
    top = groups.get("", "/").removesuffix("/init.scope").rstrip("/")
    path = f"{top}/{SLICE.partition('-')[0]}.slice/{SLICE}"
    while path:
        yield f"{mount}{path}/cpuset.cpus.effective"
        path = path.rpartition("/")[0]
    yield f"{mount}/cpuset.cpus.effective"
