"""What the filesystem below the root directory offers: room, and directories that are safe."""

import contextlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.model.errors import CocoonError

from .tools import missing_programs
from .tree import check_path

_OWN = ("vms", "snapshots", "images", "log", "kernels", "boot")


@dataclass(frozen=True, slots=True)
class StorageFacts:
    """`free` and `total` are bytes for root's new files; `unsafe` says what is wrong with whom.

    `made` is whether the root directory is there already: until then its parent is described.
    `missing` are the programs that make disks and are not installed, with their packages.
    """

    made: bool
    free: int
    total: int
    unsafe: str = ""
    missing: Mapping[str, str] = field(default_factory=dict)


def storage_facts(root: str, run: str) -> StorageFacts:
    """Look at the directories of an agent, which need not have run yet; raises OSError."""
    made = os.path.isdir(root)
    facts = os.statvfs(_nearest(root))
    return StorageFacts(
        made=made,
        free=facts.f_bavail * facts.f_frsize,
        total=facts.f_blocks * facts.f_frsize,
        unsafe=_unsafe(root, run),
        missing=missing_programs(),
    )


def _nearest(path: str) -> str:
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def _unsafe(root: str, run: str) -> str:
    for path in (root, run):
        try:
            check_path(_nearest(path))
        except CocoonError as error:
            return str(error)
    for name in _OWN:
        path = f"{root}/{name}"
        with contextlib.suppress(FileNotFoundError):
            facts = os.lstat(path)
            if not stat.S_ISDIR(facts.st_mode):
                return f"{path} is not a directory: move it away"
            if facts.st_uid != os.stat(root).st_uid:
                return f"{path} belongs to uid {facts.st_uid}: chown root: {path}"
            if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return f"{path} can be changed by others than root: chmod go-w {path}"
    return ""
