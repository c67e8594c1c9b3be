"""Refusals and failures: one class an errno, one sentence an instance.

The sentence names the object, the reason and the remedy; it is what `error`, `/cocoon/errors` and
the journal show. The errno is what the caller's `write(2)` returns.
"""

import errno as _errno
from typing import ClassVar


class CocoonError(Exception):
    """An operation was refused or failed; `str()` is the sentence shown to people."""

    errno: ClassVar[int] = _errno.EIO


class Invalid(CocoonError):
    """Unknown verb or key, bad value, or a verb that makes no sense in this state."""

    errno = _errno.EINVAL


class Busy(CocoonError):
    """It needs the VM stopped, or something still uses the object."""

    errno = _errno.EBUSY


class Exists(CocoonError):
    """The name is taken."""

    errno = _errno.EEXIST


class Missing(CocoonError):
    """Nothing of that name."""

    errno = _errno.ENOENT


class Denied(CocoonError):
    """The caller lacks permission on the object."""

    errno = _errno.EACCES


class NotPermitted(CocoonError):
    """Nobody may do this here, or only root or the owner."""

    errno = _errno.EPERM


class NoSpace(CocoonError):
    """No room; nothing half-made stays."""

    errno = _errno.ENOSPC


class Unsupported(CocoonError):
    """This backend, VMM version or host cannot do it."""

    errno = _errno.EOPNOTSUPP


class TimedOut(CocoonError):
    """The guest, the VMM or systemd did not answer in time."""

    errno = _errno.ETIMEDOUT


class Aborted(CocoonError):
    """The agent went away during the operation."""

    errno = _errno.ECONNABORTED


class Failed(CocoonError):
    """The VMM, systemd or the host failed; the sentence carries their own message."""

    errno = _errno.EIO


class UnknownFormat(CocoonError):
    """A file of a format that the agent does not know."""

    errno = _errno.ENOEXEC


class Damaged(CocoonError):
    """A file of a known format that is damaged or incomplete."""

    errno = _errno.EBADMSG


def from_os_error(error: OSError, doing: str) -> CocoonError:
    """Return the error whose errno matches `error`, with `doing` (a gerund phrase) as context."""
    kind = _BY_ERRNO.get(error.errno or 0, Failed)
    reason = error.strerror or str(error)
    where = f" ({error.filename})" if error.filename is not None else ""
    return kind(f"{doing} failed: {reason}{where}")


_BY_ERRNO: dict[int, type[CocoonError]] = {
    _errno.ENOENT: Missing,
    _errno.EEXIST: Exists,
    _errno.ENOSPC: NoSpace,
    _errno.EDQUOT: NoSpace,
    _errno.ETIMEDOUT: TimedOut,
}
