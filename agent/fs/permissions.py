"""Who owns what in the tree, with which bits, and who it was that opened a file.

The kernel decides by these (`default_permissions`); the lifecycle checks again what is more than
reading and writing files.
"""

import os
import stat
from dataclasses import dataclass
from typing import Final

from agent.model.access import READ, SEARCH, Access, Caller

PLAIN_DIRECTORY: Final = 0o755
MEMBERS_DIRECTORY: Final = 0o1775
"""`vms`: members of the group create, and only the owner or root removes."""
HIDDEN_DIRECTORY: Final = 0o711
LINK: Final = 0o777
PUBLIC: Final = 0o444
FOR_GROUP: Final = 0o440
CREATE: Final = 0o660

_WRITABLE: Final = 0o666
_READ_ONLY: Final = 0o444
_PIECE: Final = 8192
_EXITING: Final = 0x4  # linux/sched.h, PF_EXITING


@dataclass(frozen=True, slots=True)
class Attributes:
    """What `stat` shows of a node; `mode` holds the type too, times are seconds."""

    mode: int
    uid: int = 0
    gid: int = 0
    size: int = 0
    time: float = 0
    block: int = 4096
    """Bytes that it is best read and written by: `cp` takes them for its buffer."""


@dataclass(frozen=True, slots=True)
class Opener:
    """Who opened a file, and how; `write` is told neither.

    The thread that opened is `caller.pid`, the process it belongs to is `process`.
    """

    caller: Caller
    process: int
    writes: bool = False
    nonblock: bool = False


def directory_of(access: Access, time: float) -> Attributes:
    """Return the attributes of a VM's directory."""
    return Attributes(stat.S_IFDIR | access.mode, access.uid, access.gid, time=time)


def file_of(access: Access, writable: bool, size: int, time: float) -> Attributes:
    """Return the attributes of a file in a VM's directory: 0660 or 0440 in one of 0770."""
    mode = access.mode & (_WRITABLE if writable else _READ_ONLY)
    return Attributes(stat.S_IFREG | mode, access.uid, access.gid, size, time)


def stream_of(access: Access, time: float) -> Attributes:
    """Return the attributes of a VM's stream, which lies outside the VM's directory.

    Who may not pass through the directory must not reach its stream either.
    """
    mode = 0
    for shift in (6, 3, 0):
        if access.mode >> shift & (READ | SEARCH) == READ | SEARCH:
            mode |= READ << shift
    return Attributes(stat.S_IFREG | mode, access.uid, access.gid, time=time)


def opener_of(uid: int, gid: int, pid: int, path: str) -> Opener:
    """Return who process or thread `pid` is, its further groups included.

    A process that cannot be seen (another PID namespace, or gone) has no further groups.
    """
    status = read_status(pid)
    groups = frozenset(int(gid) for gid in status.get(b"Groups", b"").split())
    caller = Caller(uid=uid, gid=gid, groups=groups, pid=pid, path=path)
    return Opener(caller, int(status.get(b"Tgid", b"0")) or pid)


def ended_badly(pid: int) -> bool:
    """Whether the process ends, or has ended, without success: by a signal, or with a status.

    False for one that runs on, and for one that is gone: nobody knows how.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            # What comes first may hold anything: the name of the program, in parentheses.
            fields = file.read(_PIECE).rpartition(b")")[2].split()
        # proc_pid_stat(5): fields 9 and 52, of which the third is the first here.
        return bool(int(fields[6]) & _EXITING) and int(fields[49]) != 0
    except (OSError, IndexError, ValueError):
        return False


def read_status(pid: int) -> dict[bytes, bytes]:
    """Return the fields of `/proc/<pid>/status` (proc_pid_status(5)); {} when there is none.

    The kernel makes them up without waiting for anything, so this may run in the event loop.
    """
    if pid <= 0:
        return {}
    try:
        fd = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return {}
    text = b""
    try:
        # More than a piece where someone is in a thousand groups.
        while piece := os.read(fd, _PIECE):
            text += piece
            if len(piece) < _PIECE:
                break
    except OSError:
        return {}
    finally:
        os.close(fd)
    fields = (line.partition(b":") for line in text.splitlines())
    return {name: value.strip() for name, _, value in fields}
