"""The control groups of a lab, in every hierarchy the host has mounted."""

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path


class LabError(Exception):
    """The lab could not be had; the message says why in one line."""


@dataclass(frozen=True)
class Hierarchy:
    """A mounted cgroup hierarchy of the host, and the group in it that labs are made below."""

    kind: str
    options: str
    mount: str
    parent: Path


def hierarchies() -> list[Hierarchy]:
    own: dict[frozenset[str], str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own[frozenset(controllers.split(","))] = path
    found: dict[str, Hierarchy] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        root, mount = fields.split()[3:5]
        kind, _, superblock = rest.split(" ", 2)
        if not (mount + "/").startswith("/sys/fs/cgroup/"):
            continue
        if kind == "cgroup2":
            # In the root: only there, and in groups without processes, are controllers handed down.
            found[mount] = Hierarchy(kind, "rw", mount, Path(mount))
        elif kind == "cgroup":
            flags = set(superblock.split(","))
            for names, path in own.items():
                if names <= flags:
                    relative = os.path.relpath(path, root)
                    parent = Path(mount, relative).resolve()
                    if not parent.is_relative_to(mount):
                        parent = Path(mount)
                    options = ",".join(sorted(names))
                    named = "none," if options.startswith("name=") else ""
                    found[mount] = Hierarchy(kind, named + options, mount, parent)
    if not found:
        raise LabError("no cgroup hierarchy is mounted under /sys/fs/cgroup")
    if not any(each.kind == "cgroup2" or "name=systemd" in each.options for each in found.values()):
        raise LabError(
            "no cgroup hierarchy is free for systemd:"
            " mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd"
        )
    return list(found.values())


def make_group(hierarchy: Hierarchy, name: str) -> None:
    parent, group = hierarchy.parent, hierarchy.parent / name
    if hierarchy.kind == "cgroup2":
        have = (parent / "cgroup.subtree_control").read_text().split()
        offered = (parent / "cgroup.controllers").read_text().split()
        for controller in {"cpu", "io", "memory", "pids"} & set(offered) - set(have):
            # Refused in a container whose root group holds processes: its labs do without limits.
            # Left on afterwards: by then the host's systemd may count on it.
            with contextlib.suppress(OSError):
                (parent / "cgroup.subtree_control").write_text(f"+{controller}")
    group.mkdir()
    if (group / "cpuset.cpus").exists() and hierarchy.kind == "cgroup":
        for setting in ("cpuset.cpus", "cpuset.mems"):
            (group / setting).write_text((parent / setting).read_text())


def remove_group(group: Path, deadline: float) -> None:
    """Kill what runs in the group and below it, and remove it."""
    while group.exists():
        below = [Path(directory) for directory, _, _ in os.walk(group, topdown=False)]
        for each in below:
            with contextlib.suppress(OSError):
                for pid in (each / "cgroup.procs").read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
            with contextlib.suppress(OSError):
                each.rmdir()
        if group.exists():
            if time.monotonic() > deadline:
                raise LabError(f"{group} does not become empty")
            time.sleep(0.01)


def join(groups: list[Path]) -> None:
    for group in groups:
        (group / "cgroup.procs").write_text(str(os.getpid()))


def enterable(group: Path) -> Path:
    """The group itself, or on version 2, where only leaves hold processes, systemd's own leaf."""
    return group / "init.scope" if (group / "cgroup.controllers").exists() else group
