"""What every node works with: the host, inode numbers, and how a change is asked for."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from agent.model.vm import Vm

from .interrupt import Interrupts
from .node import Objects
from .permissions import Opener

if TYPE_CHECKING:
    from agent.lifecycle.host import Host
    from agent.lifecycle.operation import Operation

K = TypeVar("K")
V = TypeVar("V")

WALK_AGE: Final = 10.0
"""Seconds for which a process that tried to unlink a VM's files may not remove the VM."""
SAMPLE_AGE: Final = 1.0
"""Seconds for which figures are not taken again: what `stat` measured is what is read."""


class Recent(Generic[K, V]):
    """A mapping that forgets what is older than `age` seconds."""

    def __init__(self, age: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._age = age
        self._clock = clock
        self._kept: dict[K, tuple[float, V]] = {}  # oldest first

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: K) -> V | None:
        """Return what was put for `key`, if not too long ago."""
        kept = self._kept.get(key)
        return kept[1] if kept is not None and self._clock() - kept[0] < self._age else None

    def put(self, key: K, value: V) -> None:
        """Keep `value` from now on."""
        now = self._clock()
        self._kept.pop(key, None)
        self._kept[key] = now, value
        while now - self._kept[oldest := next(iter(self._kept))][0] >= self._age:
            del self._kept[oldest]


@dataclass
class Context:
    """What every node works with. `since` is when the tree was made (seconds).

    `walks` has the processes, by VM, that tried to remove its files one by one. `rm -r` gives up
    when it may not, but `find -delete` and others go on and remove the directory, which would be
    the VM with its disks. Who wants that never touches the files. `samples` has the figures of VMs,
    `index_lengths` how much of `index.json` a record takes.
    """

    host: "Host"
    mount: str
    since: float
    objects: Objects
    interrupts: Interrupts
    walks: Recent[tuple[int, str], bool] = field(default_factory=lambda: Recent(WALK_AGE))
    samples: Recent[str, bytes] = field(default_factory=lambda: Recent(SAMPLE_AGE))
    index_lengths: dict[str, tuple[Vm, int]] = field(default_factory=dict)

    async def finish(self, opener: Opener, operation: "Operation") -> None:
        """Wait for an operation, unless the file was opened with O_NONBLOCK.

        Raises the operation's CocoonError, or Refused(EINTR) when a signal ended the wait; the
        operation then goes on.
        """
        if not opener.nonblock:
            with self.interrupts.ending(opener):
                await operation.wait()


def new_context(host: "Host", mount: str) -> Context:
    """Return the context of a tree that shows `host` at `mount`."""
    return Context(
        host=host,
        mount=mount,
        since=time.time(),
        objects=Objects(lambda object_id: _exists(host, object_id)),
        interrupts=Interrupts(),
    )


def _exists(host: "Host", object_id: str) -> bool:
    return (
        host.find_vm_by_id(object_id) is not None
        or host.snapshots.exists(object_id)
        or host.images.exists(object_id)
    )
