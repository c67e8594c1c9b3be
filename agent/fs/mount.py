"""Mounting the tree, and leaving: also over what an agent that died has left."""

import ctypes
import errno
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import pyfuse3
import trio

from agent.model.errors import Failed, from_os_error

from .context import new_context
from .operations import TreeOperations

if TYPE_CHECKING:
    from agent.lifecycle.host import Host

NAME: Final = "cocoon"
MOST_REQUESTS: Final = 100_000
"""Handlers at a time: each blocked reader of a stream is one. pyfuse3 allows 99 unless told."""
_IDLE_TASKS: Final = 8
_MNT_DETACH: Final = 2  # umount(2)
_UMOUNT_NOFOLLOW: Final = 8

_libc = ctypes.CDLL(None, use_errno=True)


@asynccontextmanager
async def mounted(host: "Host", path: str) -> AsyncIterator[TreeOperations]:
    """Show `host` at `path` while the body runs, which begins once the kernel talks to us.

    Requests that still wait at the end get ECONNABORTED. Raises Failed when it cannot be mounted;
    when somebody else unmounts it, the body is cancelled and Failed raised. pyfuse3 allows one
    mount in the life of a process.
    """
    prepare(path)
    context = new_context(host, path)
    operations = TreeOperations(context)
    options = {"default_permissions", "allow_other"}
    try:
        pyfuse3.init(operations, path, options | {f"fsname={NAME}", f"subtype={NAME}"})
    except RuntimeError as error:
        reason = f"mounting {path} failed ({error})"
        raise Failed(f"{reason}: is the fuse module loaded, and /dev/fuse there?") from error
    unmounted = False

    async def serve() -> None:
        nonlocal unmounted
        await pyfuse3.main(_IDLE_TASKS, MOST_REQUESTS)
        unmounted = True
        nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(context.interrupts.run)
            nursery.start_soon(serve)
            await operations.begun.wait()
            yield operations
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close()
    if unmounted:
        raise Failed(f"{path} was unmounted by somebody else: the agent is of no use without it")


def prepare(path: str) -> None:
    """Make `path` a directory to mount on; a dead mount of an earlier agent goes.

    Raises CocoonError. Nothing may look at `path` before: on a dead mount everything fails.
    """
    try:
        while _is_ours(path):
            _detach(path)
        os.makedirs(path, 0o755, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, f"preparing {path} as a mount point") from error


def _is_ours(path: str) -> bool:
    """Whether what is mounted at `path`, topmost, is such a tree (proc_pid_mountinfo(5))."""
    found = False
    with open("/proc/self/mountinfo", "rb") as mounts:
        for line in mounts:
            fields, _, kind = line.partition(b" - ")
            if _unescaped(fields.split()[4]) == os.fsencode(path):
                found = kind.split()[0] == f"fuse.{NAME}".encode()
    return found


def _unescaped(text: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), text)


def _detach(path: str) -> None:
    if _libc.umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
        number = ctypes.get_errno()
        if number != errno.EINVAL:
            raise OSError(number, os.strerror(number), path)
