"""What the facts about a host mean for it: each check makes of its facts one finding."""

import time
from collections.abc import Mapping

from agent.model.errors import CocoonError, Missing
from agent.model.finding import Finding, Level
from agent.model.size import GIB, MIB, show_size
from agent.model.vm import FIRMWARE_FORMATS
from agent.storage.facts import StorageFacts
from agent.systemd.facts import Cgroups, SystemdAnswers, SystemdFiles
from agent.vmm import userfault
from agent.vmm.driver import Version

OLDEST_SYSTEMD = 252
"""Debian 12's; the units were tried with no older one."""

AS_ROOT = "run it as root"
_LEAST_FREE, _LITTLE_FREE = 256 * MIB, 2 * GIB
_CONTROLLERS = {"cpu": "CPUQuota", "memory": "MemoryMax", "pids": "TasksMax"}
"""Those that VMs are limited by, and the settings that have no effect without."""
_LEAST_YEAR = 2024
_SOURCES = {
    "cloud-hypervisor": "put https://github.com/cloud-hypervisor/cloud-hypervisor/releases on PATH",
    "firecracker": "put https://github.com/firecracker-microvm/firecracker/releases on PATH",
    "qemu": "apt-get install qemu-system-x86",
}


def check_kvm(obstacle: str, *, tried: bool) -> Finding:
    """Judge whether KVM really runs guests, by `kvm_obstacle`; `tried` is whether it was asked."""
    name = "kvm"
    if not obstacle:
        return Finding(Level.OK, name, "KVM runs 64-bit guests")
    if not tried:
        return Finding(Level.WARN, name, f"not tried, {obstacle}", AS_ROOT)
    if obstacle.startswith("there is no"):
        remedy = (
            "modprobe kvm_intel or kvm_amd, turn virtualization on in the firmware (or nested in "
            "the host of this VM), then restart the agent"
        )
    else:
        remedy = "QEMU translates guests instead, slowly; a host whose KVM works runs them fast"
    return Finding(Level.WARN, name, obstacle, remedy)


def check_backend(
    name: str, found: Version | CocoonError, obstacle: str, firmware: str = ""
) -> Finding:
    """Judge one VMM program: `found` is its version, or why it cannot be used.

    `firmware` is the format of what it boots of that kind, see FirmwareFormat.
    """
    if isinstance(found, Missing):
        detail, _, remedy = str(found).partition(": ")
        return Finding(Level.WARN, name, detail, _SOURCES.get(name, remedy))
    if isinstance(found, CocoonError):
        return Finding(Level.WARN, name, str(found))
    detail = f"version {found.text}, {found.binary}"
    if firmware:
        detail += f", boots firmware that is {FIRMWARE_FORMATS[firmware]}"
    if obstacle:
        return Finding(Level.WARN, name, f"{detail}; runs no ordinary guests here, {obstacle}")
    return Finding(Level.OK, name, detail)


def check_choice(chosen: str, obstacle: str, *, tried: bool) -> Finding:
    """Judge what `hypervisor: auto` takes for a VM that boots a kernel; "" is none.

    `tried` is whether KVM could be asked: what is taken depends on it.
    """
    name = "auto"
    if not tried:
        return Finding(
            Level.WARN, name, "what is taken depends on KVM, which was not tried", AS_ROOT
        )
    remedy = "apt-get install qemu-system-x86, which needs no KVM"
    if not chosen:
        return Finding(Level.FAIL, name, "no VMM of this host can boot a kernel", remedy)
    if obstacle:
        detail = f"takes {chosen}, on which most guests fail here"
        return Finding(Level.FAIL, name, detail, remedy)
    return Finding(Level.OK, name, f"hypervisor auto takes {chosen} to boot a kernel")


def check_fuse(*, device: bool, known: bool, fusermount: str) -> Finding:
    """Judge FUSE: its device, whether the kernel knows it, where `fusermount3` is."""
    name = "fuse"
    if not (device and known):
        what = "there is no /dev/fuse" if not device else "the kernel has no fuse loaded"
        return Finding(Level.FAIL, name, what, "modprobe fuse")
    if not fusermount:
        return Finding(Level.WARN, name, "there is no fusermount3", "apt-get install fuse3")
    return Finding(Level.OK, name, f"/dev/fuse and {fusermount} are there")


def check_systemd(files: SystemdFiles, answers: SystemdAnswers) -> Finding:
    """Judge that systemd is process 1, answers, and is new enough."""
    name = "systemd"
    if not files.booted:
        return Finding(
            Level.FAIL,
            name,
            "process 1 is not systemd, which VMs are units of",
            "boot this host with systemd; a container needs one that runs it",
        )
    if answers.trouble:
        remedy = "apt-get install dbus; systemctl start dbus.socket"
        return Finding(Level.FAIL, name, f"D-Bus does not answer ({answers.trouble})", remedy)
    digits = answers.version.partition(".")[0].partition(" ")[0].partition("~")[0]
    if digits.isdecimal() and int(digits) < OLDEST_SYSTEMD:
        return Finding(
            Level.FAIL,
            name,
            f"version {answers.version} is too old",
            f"upgrade to a release with systemd {OLDEST_SYSTEMD} or later, as Debian 12",
        )
    if not files.notify_socket:
        return Finding(
            Level.WARN,
            name,
            "there is no /run/systemd/notify, so consoles end with the agent",
            "systemctl daemon-reexec",
        )
    return Finding(Level.OK, name, f"version {answers.version} is process 1 and answers on D-Bus")


def check_cgroups(cgroups: Cgroups) -> Finding:
    """Judge which limits of VMs have an effect."""
    name = "cgroups"
    if not cgroups.layout:
        return Finding(Level.FAIL, name, "no control groups are mounted", "boot with systemd")
    missing = [each for each in _CONTROLLERS if each not in cgroups.controllers]
    layout = "v1 and v2 (hybrid)" if cgroups.layout == "hybrid" else cgroups.layout
    if missing:
        limits = ", ".join(_CONTROLLERS[each] for each in missing)
        return Finding(
            Level.WARN,
            name,
            f"{layout} without {', '.join(missing)}, so {limits} limits no VM",
            f"boot Linux with {' '.join(f'cgroup_enable={each}' for each in missing)}",
        )
    return Finding(Level.OK, name, f"{layout} with {', '.join(sorted(cgroups.controllers))}")


def check_users(files: SystemdFiles) -> Finding:
    """Judge that units can have a user each; without, they fail with status 217."""
    name = "users"
    if not files.nss_library:
        detail = "there is no libnss_systemd.so.2, so no VM starts (217/USER)"
        return Finding(Level.FAIL, name, detail, "apt-get install libnss-systemd")
    if not files.user_records:
        detail = "/etc/nsswitch.conf asks systemd for no users, so no VM starts (217/USER)"
        return Finding(Level.FAIL, name, detail, "add the word systemd to its line passwd:")
    return Finding(Level.OK, name, "systemd's user records are in use, each VM has a uid")


def check_machined(answers: SystemdAnswers) -> Finding:
    """Judge whether `machinectl` shows VMs."""
    if answers.trouble:
        return Finding(
            Level.WARN, "machined", "not asked for, D-Bus does not answer", "see systemd"
        )
    if not answers.machined:
        detail = "machinectl shows no VMs, there is no systemd-machined"
        return Finding(Level.WARN, "machined", detail, "apt-get install systemd-container")
    return Finding(Level.OK, "machined", "machinectl shows VMs")


def check_userfaultfd(*, device: bool, unprivileged: bool) -> Finding:
    """Judge whether a VMM can load memory as the guest touches it."""
    name = "userfaultfd"
    if device or unprivileged:
        what = userfault.DEVICE if device else "vm.unprivileged_userfaultfd"
        return Finding(Level.OK, name, f"memory can be loaded on demand, by {what}")
    return Finding(
        Level.WARN,
        name,
        "memory cannot be loaded on demand, so restores of Cloud Hypervisor copy it",
        userfault.REMEDY,
    )


def check_directories(storage: StorageFacts, root: str) -> Finding:
    """Judge whether somebody but root could change what the agent keeps."""
    if storage.unsafe:
        return Finding(Level.FAIL, "directories", storage.unsafe)
    if not storage.made:
        return Finding(Level.OK, "directories", f"{root} is made when the agent starts")
    return Finding(Level.OK, "directories", f"{root} and what is in it is safe")


def check_space(storage: StorageFacts, root: str) -> Finding:
    """Judge the room for disks and snapshots."""
    detail = f"{_rounded(storage.free)} of {_rounded(storage.total)} are free for {root}"
    if storage.free >= _LITTLE_FREE:
        return Finding(Level.OK, "space", detail)
    level = Level.WARN if storage.free >= _LEAST_FREE else Level.FAIL
    return Finding(level, "space", detail, "remove snapshots and VMs, or grow the filesystem")


def check_reflinks(shared: bool | None, root: str, *, made: bool, root_asks: bool) -> Finding:
    """Judge whether copies share blocks; only root tries."""
    name = "reflinks"
    if shared:
        return Finding(Level.OK, name, f"copies in {root} share their blocks")
    if shared is None and not root_asks:
        return Finding(Level.WARN, name, f"not tried, which writes to {root}", AS_ROOT)
    if shared is None and not made:
        return Finding(Level.WARN, name, f"not tried, {root} is not there", "start the agent")
    return Finding(
        Level.WARN,
        name,
        f"copies in {root} share no blocks, so disks of snapshots and clones are copied",
        "put it on XFS (mkfs.xfs -m reflink=1) or btrfs",
    )


def check_disk_tools(missing: Mapping[str, str]) -> Finding:
    """Judge whether the programs that make disks are there; `missing` are others, with packages."""
    name = "disk-tools"
    if not missing:
        return Finding(Level.OK, name, "qemu-img and mkfs.ext4 are there")
    detail = f"there is no {' and no '.join(missing)}, so some disks cannot be made"
    return Finding(Level.WARN, name, detail, f"apt-get install {' '.join(missing.values())}")


def check_group(name: str, *, exists: bool) -> Finding:
    """Judge whether anybody but root can create VMs."""
    if not exists:
        detail = f"there is no group {name}, so only root creates VMs"
        remedy = f"groupadd --system {name}, then restart the agent"
        return Finding(Level.FAIL, "group", detail, remedy)
    return Finding(Level.OK, "group", f"members of {name} create VMs")


def check_clock(now: float, synchronised: bool | None) -> Finding:
    """Judge the time (seconds since 1970), and whether somebody keeps it right; None: unknown."""
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    remedy = "timedatectl set-ntp true (apt-get install systemd-timesyncd)"
    if time.gmtime(now).tm_year < _LEAST_YEAR:
        return Finding(Level.FAIL, "clock", f"it is not {when}", remedy)
    if synchronised is False:
        return Finding(Level.WARN, "clock", f"{when}, not synchronised", remedy)
    return Finding(Level.OK, "clock", when if synchronised is None else f"{when}, synchronised")


def _rounded(size: int) -> str:
    """Return a size without the digits that nobody reads."""
    unit = GIB if size >= GIB else MIB
    return show_size(size // unit * unit)
