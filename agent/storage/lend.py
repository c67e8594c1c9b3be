"""Lends disks of the host, which root named, to a VM's uid while the VM runs: by an ACL.

ACLs are set as the extended attribute that the kernel keeps them in, so nothing has to be installed
for it.
"""

import os
import stat
import struct
import threading
from collections.abc import Mapping

from agent.model.errors import Invalid, Missing, Unsupported

# acl_ea_header and acl_ea_entry of linux/posix_acl_xattr.h: version, then tag, permissions, id.
_ACL = "system.posix_acl_access"
_ACL_VERSION = 2
_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")
_OWNER, _USER, _OWNING_GROUP, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NO_ID = 0xFFFFFFFF
_READ, _WRITE = 4, 2

Acl = dict[tuple[int, int], int]
"""Permissions (4 read, 2 write, 1 execute) by tag and id."""


class Lender:
    """Gives VMs access to disks of the host, and takes it back. Its calls block."""

    def __init__(self) -> None:
        # An ACL is changed by reading and writing it, and two VMs may share a read-only disk.
        self._changing = threading.Lock()

    def lend(self, path: str, uid: int, *, readonly: bool) -> bool:
        """Let `uid` read `path`, and write it unless `readonly`; return whether it is a device.

        Raises Missing, Invalid when `path` is neither block device nor regular file, and
        Unsupported when its filesystem has no ACLs.
        """
        try:
            return self._set(path, uid, _READ if readonly else _READ | _WRITE)
        except FileNotFoundError:
            raise Missing(f"there is no disk {path} on this host") from None

    def take_back(self, path: str, uid: int) -> None:
        """End what `lend` allowed; a disk that is gone, or was never lent, is no error."""
        try:
            self._set(path, uid, 0)
        except FileNotFoundError:
            return

    def _set(self, path: str, uid: int, permissions: int) -> bool:
        disk = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            mode = os.fstat(disk).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise Invalid(f"{path} is neither a block device nor a regular file")
            with self._changing:
                _change_acl(path, disk, uid, permissions)
            return stat.S_ISBLK(mode)
        finally:
            os.close(disk)


def _change_acl(path: str, disk: int, uid: int, permissions: int) -> None:
    by_descriptor = f"/proc/self/fd/{disk}"  # an O_PATH descriptor takes no attribute calls itself
    acl = _read_acl(by_descriptor, os.fstat(disk).st_mode)
    changed = with_user(acl, uid, permissions)
    if changed == acl:
        return
    try:
        os.setxattr(by_descriptor, _ACL, pack_acl(changed))
    except OSError as error:
        raise Unsupported(
            f"the filesystem of {path} takes no ACL, so the VM's uid cannot be given it "
            f"({error.strerror}): mount it with ACLs, or put the disk elsewhere"
        ) from None


def _read_acl(path: str, mode: int) -> Acl:
    try:
        return unpack_acl(os.getxattr(path, _ACL))
    except OSError:  # none: the permission bits say it all
        return {
            (_OWNER, _NO_ID): mode >> 6 & 7,
            (_OWNING_GROUP, _NO_ID): mode >> 3 & 7,
            (_OTHER, _NO_ID): mode & 7,
        }


def with_user(acl: Acl, uid: int, permissions: int) -> Acl:
    """Return `acl` with exactly `permissions` for `uid`, and nobody else's widened."""
    mask = acl.get((_MASK, _NO_ID), 7)
    limited = {
        (tag, number): allowed & mask if tag in (_USER, _OWNING_GROUP, _GROUP) else allowed
        for (tag, number), allowed in acl.items()
        if tag != _MASK and (tag, number) != (_USER, uid)
    }
    if permissions:
        limited[_USER, uid] = permissions
    if any(tag in (_USER, _GROUP) for tag, _ in limited):
        # The mask bounds all but owner and other: the least that cuts none of them off.
        bound = 0
        for (tag, _), allowed in limited.items():
            if tag in (_USER, _OWNING_GROUP, _GROUP):
                bound |= allowed
        limited[_MASK, _NO_ID] = bound
    return limited


def pack_acl(acl: Mapping[tuple[int, int], int]) -> bytes:
    """Return `acl` as the kernel takes it: entries by tag, then id."""
    entries = (_ENTRY.pack(tag, allowed, number) for (tag, number), allowed in sorted(acl.items()))
    return _HEADER.pack(_ACL_VERSION) + b"".join(entries)


def unpack_acl(value: bytes) -> Acl:
    """Return the ACL that the kernel gave; the reverse of pack_acl."""
    return {
        (tag, number): allowed for tag, allowed, number in _ENTRY.iter_unpack(value[_HEADER.size :])
    }
