"""What there is of systemd on this host: facts to judge it by; asking changes none of them."""

import contextlib
import glob
import os
import stat
from dataclasses import dataclass

from .bus import Bus, BusFailure

_BOOTED = "/run/systemd/system"  # there exactly where systemd is process 1: sd_booted(3)
_ANSWER_WITHIN = 5.0  # seconds
_NOTIFY_SOCKET = "/run/systemd/notify"
_CGROUPS = "/sys/fs/cgroup"
_CONTROLLERS = frozenset({"cpu", "memory", "pids", "io", "blkio"})
_LIBRARIES = (
    "/lib/*/libnss_systemd.so.2",
    "/lib64/libnss_systemd.so.2",
    "/lib/libnss_systemd.so.2",
)


@dataclass(frozen=True, slots=True)
class Cgroups:
    """How control groups are mounted: `v1`, `v2`, `hybrid` (both) or "", with which controllers."""

    layout: str
    controllers: frozenset[str]


@dataclass(frozen=True, slots=True)
class SystemdFiles:
    """What files tell: whether systemd is process 1, and what it needs for VMs' units.

    `user_records` is whether /etc/nsswitch.conf asks systemd for users, `nss_library` whether what
    answers there is installed.
    """

    booted: bool
    notify_socket: bool
    user_records: bool
    nss_library: bool
    cgroups: Cgroups


@dataclass(frozen=True, slots=True)
class SystemdAnswers:
    """What D-Bus tells: systemd's version, whether machined is there, or the `trouble` with it."""

    version: str = ""
    machined: bool = False
    trouble: str = ""


def systemd_files() -> SystemdFiles:
    """Look at the files; does not fail, and waits for local filesystems only."""
    return SystemdFiles(
        booted=os.path.isdir(_BOOTED),
        notify_socket=_is_socket(_NOTIFY_SOCKET),
        user_records=asks_systemd_for_users(_read("/etc/nsswitch.conf")),
        nss_library=any(glob.glob(pattern) for pattern in _LIBRARIES),
        cgroups=cgroups_of(_read("/proc/mounts"), _read(f"{_CGROUPS}/cgroup.controllers")),
    )


async def systemd_answers(bus: Bus) -> SystemdAnswers:
    """Ask systemd and the bus, which have 5 s each; does not fail."""
    try:
        version = await bus.call(
            "org.freedesktop.systemd1",
            "/org/freedesktop/systemd1",
            "org.freedesktop.DBus.Properties",
            "Get",
            "ss",
            ["org.freedesktop.systemd1.Manager", "Version"],
            timeout=_ANSWER_WITHIN,
        )
        names = await bus.call(
            "org.freedesktop.DBus",
            "/org/freedesktop/DBus",
            "org.freedesktop.DBus",
            "ListActivatableNames",
            timeout=_ANSWER_WITHIN,
        )
    except BusFailure as error:
        return SystemdAnswers(trouble=str(error))
    return SystemdAnswers(version.body[0].value, "org.freedesktop.machine1" in names.body[0])


def asks_systemd_for_users(nsswitch: str) -> bool:
    """Whether a text as of nsswitch.conf(5) has `systemd` among the sources of `passwd`."""
    for line in nsswitch.splitlines():
        database, colon, sources = line.partition("#")[0].partition(":")
        if colon and database.strip() == "passwd":
            return "systemd" in sources.split()
    return False


def cgroups_of(mounts: str, unified_controllers: str) -> Cgroups:
    """Read /proc/mounts, and cgroup.controllers of the root as version 2 has it."""
    layout, controllers = "", set()
    for line in mounts.splitlines():
        _, point, kind, options = line.split()[:4]
        if kind == "cgroup2" and point == _CGROUPS:
            controllers.update(unified_controllers.split())
            layout = "v2"
        elif kind == "cgroup2":
            layout = "hybrid"
        elif kind == "cgroup":
            controllers.update(options.split(","))
            layout = layout or "v1"
    return Cgroups(layout, _CONTROLLERS & controllers)


def _read(path: str) -> str:
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
    return ""


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False
