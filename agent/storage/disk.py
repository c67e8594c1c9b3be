"""The agent's own disks, in directories of VMs that may have been taken over.

No program reads with root's rights what a VMM has written: of an overlay root reads the header's
numbers, and what changes the file runs as the VM's uid (`tools`).
"""

import os
import stat

from agent.model import canonical
from agent.model.disks import DiskFile
from agent.model.errors import CocoonError, Damaged, Failed, Invalid
from agent.model.size import show_size

from .directory import discard
from .qcow2 import read_header
from .reflink import copy_file, open_owned
from .tools import grow_overlay, make_ext4, make_overlay

_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC


def ensure_disk(directory: int, file: DiskFile, uid: int, base: str = "") -> None:
    """Make the disk be there with its size: make it, sparse, or grow the one that is there.

    `directory` is a descriptor of the VM's directory, whose process, if there is one, does not use
    the disk; `base` is the path of the base image, for a disk that is a copy of it. Raises Invalid
    rather than shrink the disk, Damaged for an overlay that is none any more, and Failed when
    something else stands in its place. What was on a disk stays; the guest grows its filesystem.
    """
    try:
        disk = os.open(file.name, os.O_PATH | _FLAGS, dir_fd=directory)
    except FileNotFoundError:
        _make(directory, file, uid, base)
        return
    try:
        facts = os.fstat(disk)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid not in (uid, os.geteuid()):
            raise _foreign(file)
        if facts.st_uid == os.geteuid() and not facts.st_size and facts.st_nlink == 1:
            # Older agents could die before they had given a new one away.
            discard(directory, file.name)
            _make(directory, file, uid, base)
        elif facts.st_uid != uid:
            raise _foreign(file)
        elif file.format == "raw":
            _check_growth(file, facts.st_size)
            if facts.st_size < file.size:
                os.truncate(f"/proc/self/fd/{disk}", file.size)  # O_PATH takes no such call itself
        else:
            _ensure_overlay(directory, file, uid)
    finally:
        os.close(disk)


def _make(directory: int, file: DiskFile, uid: int, base: str) -> None:
    """Make a new disk; under its name it is whole from the first moment on."""
    fresh = f".{file.name}.new"
    discard(directory, fresh)
    is_copy = file.format == "raw" and file.base is not None
    flags = _FLAGS
    if is_copy:
        source = os.open(base, os.O_RDONLY | _FLAGS)
        try:
            # The guest will take for granted that it is on the disk.
            copy_file(source, directory, fresh)
        finally:
            os.close(source)
    else:
        flags |= os.O_CREAT | os.O_EXCL
    disk = os.open(fresh, os.O_RDWR | flags, 0o600, dir_fd=directory)
    try:
        if uid != os.geteuid():
            os.fchown(disk, uid, uid)
        if file.format == "raw":
            os.truncate(disk, file.size)
            if file.fstype:
                make_ext4(disk, uid)
        elif file.base is not None:
            path = canonical.base_path(file.base.digest, file.base.format)
            make_overlay(disk, uid, file.size, path, file.base.format)
        os.rename(fresh, file.name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException as error:
        discard(directory, fresh)
        if isinstance(error, CocoonError):
            raise type(error)(f"disk {file.name} cannot be made: {error}") from None
        raise
    finally:
        os.close(disk)


def _ensure_overlay(directory: int, file: DiskFile, uid: int) -> None:
    overlay = open_owned(directory, file.name, uid, os.O_RDWR)
    try:
        try:
            size = read_header(overlay).size
        except CocoonError as error:
            raise Damaged(
                f"disk {file.name} {error}: put the VM back to a snapshot of it, or remove it"
            ) from None
        _check_growth(file, size)
        if size < file.size:
            grow_overlay(overlay, uid, file.size)
    finally:
        os.close(overlay)


def _check_growth(file: DiskFile, size: int) -> None:
    if size > file.size:
        raise Invalid(
            f"disk {file.name} has {show_size(size)}, more than {show_size(file.size)}: "
            "disks grow and never shrink"
        )


def _foreign(file: DiskFile) -> Failed:
    return Failed(
        f"disk {file.name} is not the VM's any more: something of another kind or owner stands in "
        "its place, put there by a VMM that may have been taken over; remove it to go on"
    )
