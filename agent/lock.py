"""One agent a root directory, one agent a host that runs VMs: locks that end with their holder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from .model.errors import Busy

VMS_LOCK = "/run/cocoon-vms.lock"


@contextmanager
def only_agent(root_dir: str) -> Iterator[None]:
    """Hold the root directory's lock; raise Busy, naming the process that has it already."""
    descriptor = _lock(
        f"{root_dir}/lock",
        f"another agent has {root_dir}, process {{holder}}: stop it first "
        "(systemctl stop cocoon-host), or give this one another --root-dir",
    )
    try:
        yield
    finally:
        os.close(descriptor)


class VmsLock:
    """The right to run VMs on this host.

    VMs' units and users are named the same whatever an agent's directories are: two agents would
    take each other's.
    """

    def __init__(self, path: str = VMS_LOCK) -> None:
        self._path = path
        self._descriptor = -1

    def claim(self) -> None:
        """Have it from now on, to the agent's end; raise Busy, naming the process that has it."""
        if self._descriptor < 0:
            self._descriptor = _lock(
                self._path,
                "another agent runs VMs on this host, process {holder}: create them there, or stop "
                "that agent and its VMs first",
            )


def _lock(path: str, refusal: str) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise Busy(refusal.format(holder=holder)) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor
