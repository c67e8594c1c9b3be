"""The file with the state of a QEMU guest: one line of the agent's, then what QEMU wrote.

QEMU's stream has neither a checksum nor a word about what ran the guest, on which all hangs. The
line has both, and is written when the stream is complete. Calls block on files: callers run them
in a thread.
"""

import errno
import hashlib
import os
import re

from agent.model.errors import Damaged, Failed, NoSpace, Unsupported

from .driver import Directory

_HEAD = re.compile(rb"cocoon-host: QEMU, (KVM|TCG), SHA-256 ([0-9a-f]{64})\n")
_NAMES = {b"KVM": "KVM", b"TCG": "QEMU's translator"}
HEAD_SIZE = len(b"cocoon-host: QEMU, KVM, SHA-256 \n") + 64
MAXIMUM_SIZE = 64 << 20  # bytes: they have some 100 KiB, and a little more with each CPU and disk
_MORE = 1 << 20  # bytes that must find room where QEMU says nothing of why it could not write
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def create_state(directory: Directory, path: str) -> int:
    """Make the file, the VM's as all in its directory; return it where QEMU is to write on."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    parent = _parent(directory, path)
    try:
        file = os.open(os.path.basename(path), flags, 0o600, dir_fd=parent)
        owner = os.fstat(parent)
        os.fchown(file, owner.st_uid, owner.st_gid)
        os.lseek(file, HEAD_SIZE, os.SEEK_SET)
        return file
    except OSError as error:
        raise _failed(f"{path} cannot be made", error) from error
    finally:
        os.close(parent)


def seal_state(file: int, *, kvm: bool) -> None:
    """Write the head of a file that QEMU has completed; raise Failed or NoSpace."""
    try:
        stream = _read(file)[HEAD_SIZE:]
        os.pwrite(file, _show_head(stream, kvm), 0)
    except OSError as error:
        raise _failed("the state of a VM cannot be completed", error) from error


def check_room(file: int) -> None:
    """Raise NoSpace when a file that could not be completed has no room to grow."""
    try:
        os.posix_fallocate(file, os.fstat(file).st_size, _MORE)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise NoSpace("no room for the state of a VM") from error


def check_state(data: bytes, *, kvm: bool | None) -> None:
    """Raise Damaged when `data` is no whole state, Unsupported when the guest ran another way.

    `kvm` says what guests run on here; None leaves that open.
    """
    found = _HEAD.match(data)
    if found is None:
        raise Damaged("vmstate is not a state that QEMU wrote for this agent")
    if hashlib.sha256(data[HEAD_SIZE:]).hexdigest().encode() != found[2]:
        raise Damaged("vmstate is damaged: its checksum is another")
    here = found[1] if kvm is None else b"KVM" if kvm else b"TCG"
    if found[1] != here:
        theirs, ours = _NAMES[found[1]], _NAMES[here]
        raise Unsupported(f"the guest ran on {theirs} when it was saved, here it is {ours}")


def open_state(directory: Directory, path: str, *, kvm: bool) -> int:
    """Open a file and check it as `check_state` does; return it where QEMU is to read on."""
    parent = _parent(directory, path)
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(os.path.basename(path), flags, dir_fd=parent)
    except OSError as error:
        raise _failed(f"{path} cannot be opened", error) from error
    finally:
        os.close(parent)
    try:
        check_state(_read(file), kvm=kvm)
        os.lseek(file, HEAD_SIZE, os.SEEK_SET)
    except BaseException:
        os.close(file)
        raise
    return file


def _show_head(stream: bytes, kvm: bool) -> bytes:
    runs_on = "KVM" if kvm else "TCG"
    digest = hashlib.sha256(stream).hexdigest()
    return f"cocoon-host: QEMU, {runs_on}, SHA-256 {digest}\n".encode()


def _read(file: int) -> bytes:
    size = os.fstat(file).st_size
    if size > MAXIMUM_SIZE:
        raise Damaged(f"vmstate of {size} bytes is too large to be one")
    pieces = []
    offset = 0
    while piece := os.pread(file, size - offset, offset):
        pieces.append(piece)
        offset += len(piece)
    return b"".join(pieces)


def _parent(directory: Directory, path: str) -> int:
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with directory() as own:
            return os.open(os.path.dirname(path) or ".", flags, dir_fd=own)
    except OSError as error:
        raise Failed(f"the directory of {path} is not there: {error.strerror}") from error


def _failed(what: str, error: OSError) -> Failed | NoSpace:
    kind = NoSpace if error.errno in _NO_ROOM else Failed
    return kind(f"{what}: {error.strerror}")
