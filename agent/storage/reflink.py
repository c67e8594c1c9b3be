"""One file copied, shared or thinned out: reflinks where there are any, holes kept everywhere.

Synchronous: callers run these in a worker thread. Sources may lie in a VM's directory, whose VMM
may have been taken over, so they are opened here, with the checks that this takes.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import stat
from collections.abc import Callable, Iterator

from agent.model.errors import Failed, from_os_error
from agent.model.size import KIB, MIB

from .sparse import data_ranges

PRIVATE, SHARED = 0o600, 0o444
"""Modes: of what belongs to one VM, and of what VMs share and nobody may write."""

_FICLONE = 0x40049409  # ioctl_ficlone(2): _IOW(0x94, 9, int)
_PUNCH_HOLE = 0x01 | 0x02  # linux/falloc.h: FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_NO_REFLINK = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS}
_STEP = 16 * MIB
_CHUNK = MIB
_ZERO_CHUNK = bytes(_CHUNK)
_PAGE = 4 * KIB
_ZERO_PAGE = bytes(_PAGE)
_LEAST_HOLE = 16 * KIB

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def open_owned(directory: int, name: str, owner: int, flags: int = os.O_RDONLY) -> int:
    """Open a regular file of the uid `owner` or of root in a directory that a VMM can write to.

    Raises Failed when it is something else, else the error of `from_os_error`.
    """
    try:
        # O_NONBLOCK: a FIFO put in the file's place would hold root in open(2).
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(name, flags, dir_fd=directory)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise _foreign(name, owner) from None
        raise from_os_error(error, f"opening {name}") from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid not in (owner, 0):
        os.close(fd)
        raise _foreign(name, owner)
    return fd


def copy_file(
    source: int,
    directory: int,
    name: str,
    *,
    mode: int = PRIVATE,
    sync: bool = True,
    progress: Callable[[int], None] | None = None,
) -> bool:
    """Copy the file open as `source` to `name`, new in `directory`; whether blocks are shared.

    `progress` is told the bytes of data copied so far, every 16 MiB; what it raises ends the copy.
    Raises NoSpace, Exists or another error of `from_os_error`; then no copy is left.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        target = os.open(name, flags, PRIVATE, dir_fd=directory)
    except OSError as error:
        raise from_os_error(error, f"creating {name}") from None
    try:
        shared = _reflink(source, target)
        if not shared:
            _copy_data(source, target, progress)
        os.fchmod(target, mode)
        if sync:
            os.fsync(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=directory)
        if isinstance(error, OSError):
            raise from_os_error(error, f"copying {name}") from None
        raise
    finally:
        os.close(target)
    return shared


def take_over(source: int, directory: int, name: str) -> bool:
    """Make the file open as `source` root's, read-only, and link it to `name` in `directory`.

    False when it must be copied instead: somebody holds it open for writing, so could change it
    later, or it cannot be linked from there. It is root's and read-only then too: nobody can open
    it for writing any more. Raises the error of `from_os_error` for anything else.
    """
    try:
        # Before the check: afterwards nobody but root can open it for writing.
        os.fchown(source, os.geteuid(), os.getegid())
        os.fchmod(source, SHARED)
        if is_open_for_writing(source):
            return False
        _link(source, directory, name)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EXDEV, errno.EMLINK):
            return False
        raise from_os_error(error, f"taking over {name}") from None
    return True


def is_open_for_writing(fd: int) -> bool:
    """Whether anybody has the file, open read-only as `fd`, open or mapped for writing.

    Also true where that cannot be told (a filesystem without leases, a file of another owner
    without CAP_LEASE). See fcntl(2), F_SETLEASE.
    """
    try:
        # If it is opened while we hold the lease we get a signal, which by default ends us.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return True
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def link_file(source: int, directory: int, name: str) -> None:
    """Link the file open as `source`, one that VMs share, to `name` in `directory`.

    Raises the error of `from_os_error`.
    """
    try:
        _link(source, directory, name)
    except OSError as error:
        raise from_os_error(error, f"linking {name}") from None


def dig_holes(fd: int) -> int:
    """Turn the zeros in the file, open for reading and writing, into holes; return their bytes.

    Runs below 16 KiB stay: punching one costs as much as reading 16 KiB a hundred times over.
    Raises the error of `from_os_error`; a filesystem without holes keeps the file as it is.
    """
    dug = 0
    try:
        for start, length in list(data_ranges(fd, os.fstat(fd).st_size)):
            for hole, size in _zero_runs(fd, start, start + length):
                if size >= _LEAST_HOLE:
                    _punch(fd, hole, size)
                    dug += size
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return dug
        raise from_os_error(error, "punching holes") from None
    return dug


def start_writing_out(fd: int) -> None:
    """Let the kernel begin to write out what was written to the file, and do not wait for it."""
    _libc.sync_file_range(fd, 0, 0, _SYNC_FILE_RANGE_WRITE)  # a hint: it may fail


def _foreign(name: str, owner: int) -> Failed:
    return Failed(f"{name} is no regular file of uid {owner}: its VMM put something else there")


def _link(source: int, directory: int, name: str) -> None:
    # By descriptor, for the name may stand for another file by now.
    os.link(f"/proc/self/fd/{source}", name, dst_dir_fd=directory, follow_symlinks=True)


def shares_blocks(directory: str) -> bool | None:
    """Whether files in `directory` can share blocks; None when that cannot be tried there.

    It is tried on two files without a name, which nobody sees and which are gone at the end.
    """
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        source, target = (stack.enter_context(_nameless(directory)) for _ in range(2))
        os.write(source, bytes(os.statvfs(directory).f_bsize))
        return _reflink(source, target)
    return None


@contextlib.contextmanager
def _nameless(directory: str) -> Iterator[int]:
    fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _reflink(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in _NO_REFLINK:
            return False
        raise
    return True


def _copy_data(source: int, target: int, progress: Callable[[int], None] | None) -> None:
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    copied = 0
    for start, length in data_ranges(source, size):
        end = start + length
        while start < end:
            count = _copy_range(source, target, start, min(end - start, _STEP))
            if not count:
                raise Failed("the file was cut short while it was copied")
            start += count
            copied += count
            if progress is not None:
                progress(copied)


def _copy_range(source: int, target: int, offset: int, count: int) -> int:
    try:
        return os.copy_file_range(source, target, count, offset, offset)
    except OSError as error:
        if error.errno not in _NO_REFLINK:
            raise
    return os.pwrite(target, os.pread(source, min(count, _CHUNK), offset), offset)


def _zero_runs(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield offset and length of the runs of whole zero pages between `start` and `end`."""
    buffer = bytearray(_CHUNK)
    position = -(-start // _PAGE) * _PAGE
    run = -1
    while position < end:
        got = os.preadv(fd, [memoryview(buffer)[: end - position]], position)
        whole = got - got % _PAGE
        if whole == _CHUNK and buffer == _ZERO_CHUNK:
            run = position if run < 0 else run
        else:
            for page in range(0, whole, _PAGE):
                if buffer.startswith(_ZERO_PAGE, page):
                    run = position + page if run < 0 else run
                elif run >= 0:
                    yield run, position + page - run
                    run = -1
        position += whole
        if whole < _CHUNK:
            break
    if run >= 0:
        yield run, position - run


def _punch(fd: int, offset: int, length: int) -> None:
    if _libc.fallocate(fd, _PUNCH_HOLE, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
