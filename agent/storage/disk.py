"""The agent's own raw disks, in directories of VMs that may have been taken over."""

import os
import stat

from agent.model.errors import Failed, Invalid
from agent.model.size import show_size


def ensure_disk(directory: int, name: str, size: int, uid: int) -> None:
    """Make the raw disk `name` be there with `size` bytes: create it sparse, or grow it.

    `directory` is a descriptor of the VM's directory, and the VM has no process. Raises Invalid
    rather than shrink the disk, and Failed when something else stands in its place.
    """
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        disk = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o600, dir_fd=directory)
        made = True
    except FileExistsError:
        disk = os.open(name, os.O_PATH | flags, dir_fd=directory)
        made = False
    try:
        _adjust(disk, name, size, uid)
    except BaseException:
        if made:
            os.unlink(name, dir_fd=directory)
        raise
    finally:
        os.close(disk)


def _adjust(disk: int, name: str, size: int, uid: int) -> None:
    facts = os.fstat(disk)
    # A new one, or one that the agent did not come to give away before it died.
    new = facts.st_uid == os.geteuid() and facts.st_size == 0 and facts.st_nlink == 1
    if not stat.S_ISREG(facts.st_mode) or not (facts.st_uid == uid or new):
        raise Failed(
            f"disk {name} is not the VM's any more: something of another kind or owner stands in "
            "its place, put there by a VMM that may have been taken over; remove it to go on"
        )
    if facts.st_size > size:
        raise Invalid(
            f"disk {name} has {show_size(facts.st_size)}, more than {show_size(size)}: "
            "disks grow and never shrink"
        )
    path = f"/proc/self/fd/{disk}"  # an O_PATH descriptor takes no such calls itself
    if facts.st_uid != uid:
        os.chown(path, uid, uid)
    if facts.st_size < size:
        os.truncate(path, size)
