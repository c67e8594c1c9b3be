"""Who asks, and who may: callers, owners and permission bits."""

from dataclasses import dataclass

READ, WRITE, SEARCH = 4, 2, 1


@dataclass(frozen=True, slots=True)
class Caller:
    """The process behind an operation, as noted when it opened the file.

    `path` is what it acted on, relative to the mount (`vms/web/state`), for the error log.
    """

    uid: int
    gid: int
    groups: frozenset[int] = frozenset()
    pid: int = 0
    path: str = ""

    @property
    def is_root(self) -> bool:
        return self.uid == 0


AGENT = Caller(uid=0, gid=0, path="(agent)")
"""The caller of what the agent does by itself: autostart, reconciliation."""


@dataclass(frozen=True, slots=True)
class Access:
    """Owner, group and permission bits of an object; a directory's bits (0770, say)."""

    uid: int
    gid: int
    mode: int = 0o770

    def allows(self, caller: Caller, wanted: int) -> bool:
        """Whether `caller` has all of `wanted` (READ | WRITE | SEARCH), as the kernel decides."""
        if caller.is_root:
            return True
        if caller.uid == self.uid:
            granted = self.mode >> 6
        elif self.gid == caller.gid or self.gid in caller.groups:
            granted = self.mode >> 3
        else:
            granted = self.mode
        return granted & wanted == wanted

    def owned_by(self, caller: Caller) -> bool:
        """Whether `caller` may remove, rename or delegate the object: its owner or root."""
        return caller.is_root or caller.uid == self.uid
