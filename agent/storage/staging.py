"""Directories that are made in staging: `<id>.staging` becomes `<id>` once it is whole, on disk.

Both are root's. All calls block on files: callers run them by `Tree.in_thread`.
"""

import os

from . import directory

_STAGING = ".staging"


class Staged:
    """What stands below `parent`."""

    def __init__(self, parent: str) -> None:
        self._parent = parent

    def directory(self, object_id: str) -> str:
        """Return where a published one lies."""
        return f"{self._parent}/{object_id}"

    def staging(self, object_id: str) -> str:
        """Return where one is made."""
        return f"{self._parent}/{object_id}{_STAGING}"

    def stage(self, object_id: str) -> None:
        """Make an empty one in staging."""
        os.mkdir(self.staging(object_id), 0o700)

    def publish(self, object_id: str) -> None:
        """Let one that is whole appear under its final name, lastingly."""
        os.rename(self.staging(object_id), self.directory(object_id))
        with directory.opened(self._parent) as parent:
            os.fsync(parent)

    def clear(self, object_id: str) -> None:
        """Remove what there is of one, staged or published."""
        directory.remove(self.staging(object_id))
        directory.remove(self.directory(object_id))

    def stagings(self) -> list[str]:
        """Return the ids of what stands in staging."""
        names = os.listdir(self._parent)
        return [name.removesuffix(_STAGING) for name in names if name.endswith(_STAGING)]
