"""Directories that somebody untrusted fills: opened, written to and removed without a surprise.

A VM's directory belongs to a VMM that may have been taken over. Root follows no link in it, opens
nothing that could make it wait, and relies on nothing but what it has checked on a descriptor.
"""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from agent.model.errors import Failed, NotPermitted

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def opened(path: str, *, parent: int | None = None) -> Iterator[int]:
    """Lend a descriptor of the directory at `path`, which must be one and not a link to one."""
    directory = os.open(path, _FLAGS, dir_fd=parent)
    try:
        yield directory
    finally:
        os.close(directory)


@contextmanager
def opened_as(path: str, uid: int) -> Iterator[int]:
    """The same, and raise Failed when the directory is not `uid`'s."""
    with opened(path) as directory:
        owner = os.fstat(directory).st_uid
        if owner != uid:
            raise Failed(f"{path} belongs to uid {owner} instead of {uid}: look who changed that")
        yield directory


def ensure(path: str, mode: int, uid: int) -> None:
    """Make the directory be there, `uid`'s and with `mode`.

    Its parent must be root's. Raises NotPermitted when it is another's or something else.
    """
    try:
        os.mkdir(path, 0o700)
        made = True
    except FileExistsError:
        made = False
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise NotPermitted(f"{path} is not a directory: move it away") from None
    with opened(path) as directory:
        facts = os.fstat(directory)
        if facts.st_uid != uid:
            # One that was made but not yet given away when the agent died is root's and empty.
            if not made and (facts.st_uid != os.geteuid() or os.listdir(directory)):
                raise NotPermitted(
                    f"{path} belongs to uid {facts.st_uid} instead of {uid}: "
                    f"run chown {uid}: {path}"
                )
            os.fchown(directory, uid, uid)  # each VM's uid has a group of the same number
        if stat.S_IMODE(facts.st_mode) != mode:
            os.fchmod(directory, mode)


def write_file(directory: int, name: str, content: bytes, uid: int) -> None:
    """Put a file of `uid`'s, mode 0600, at `name`, in place of whatever file is there, unopened."""
    fresh = f".{name}.{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(fresh, flags, 0o600, dir_fd=directory)
    try:
        with os.fdopen(file, "wb") as stream:
            stream.write(content)
            stream.flush()
            if uid != os.geteuid():
                os.fchown(file, uid, uid)
        os.rename(fresh, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        os.unlink(fresh, dir_fd=directory)
        raise


def discard(directory: int, name: str) -> None:
    """Remove the file `name` unopened, if there is one."""
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


def remove(path: str) -> None:
    """Remove a directory and all in it; one that is gone is no error.

    A tree of any depth needs three descriptors and no recursion, because what is below a
    subdirectory is moved up before that goes. No process may still write there.
    """
    parent, name = os.path.split(path)
    with opened(parent) as above:
        try:
            with opened(name, parent=above) as directory:
                empty(directory)
        except FileNotFoundError:
            return
        os.rmdir(name, dir_fd=above)


def empty(directory: int) -> None:
    """Remove all that is in the directory; see `remove`."""
    while names := os.listdir(directory):
        for name in names:
            _remove_entry(directory, name)


def _remove_entry(directory: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=directory)
        return
    except IsADirectoryError:
        pass
    with opened(name, parent=directory) as inner:
        for entry in os.listdir(inner):
            try:
                os.unlink(entry, dir_fd=inner)
            except IsADirectoryError:
                fresh = secrets.token_hex(16)
                os.rename(entry, fresh, src_dir_fd=inner, dst_dir_fd=directory)
    os.rmdir(name, dir_fd=directory)
