"""Nodes: what the tree is made of, in plain classes that know nothing of FUSE.

A node is made when a request names it and forgotten with the answer: all it holds is where it
stands in the tree. What it shows, it asks the host for. Only open files last: they are handles.
"""

import errno
import stat
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from .permissions import LINK, Attributes, Opener

_OBJECT_SHIFT: Final = 32
_TURN_SHIFT: Final = 8
_TURN_MASK: Final = (1 << 24) - 1
_SLOT_MASK: Final = (1 << 8) - 1
_FIRST_SWEEP: Final = 1024


class Refused(Exception):
    """Refused as any filesystem would, with an errno that needs no sentence."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode.get(number, str(number)))
        self.errno = number


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node stands: in which object, as which of its files, and for the how-manieth time.

    An inode number is nothing but this, so there is no table of nodes: the kernel may forget them
    without a word to anyone, and 10,000 VMs of 30 files each take no memory. The tree itself is
    object 0 and its root slot 1: together the 1 that FUSE wants.
    """

    object: int
    slot: int
    turn: int = 0

    @property
    def number(self) -> int:
        """The inode number."""
        return self.object << _OBJECT_SHIFT | self.turn << _TURN_SHIFT | self.slot


def place_of(number: int) -> Place:
    """Return the place that an inode number stands for."""
    return Place(
        object=number >> _OBJECT_SHIFT,
        slot=number & _SLOT_MASK,
        turn=number >> _TURN_SHIFT & _TURN_MASK,
    )


class Objects:
    """Numbers for the objects that have inodes, by their ids; none is given twice.

    `exists` tells whether an id is still one: those that are not are dropped now and then.
    """

    def __init__(self, exists: Callable[[str], bool]) -> None:
        self._exists = exists
        self._numbers: dict[str, int] = {}
        self._ids: dict[int, str] = {}
        self._turns: dict[str, int] = {}
        self._last = 0
        self._sweep_at = _FIRST_SWEEP

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, object_id: str) -> int:
        """Return the object's number."""
        number = self._numbers.get(object_id)
        if number is None:
            if len(self._numbers) >= self._sweep_at:
                self._sweep()
            self._last = number = self._last + 1
            self._numbers[object_id] = number
            self._ids[number] = object_id
        return number

    def id(self, number: int) -> str:
        """Return the id of the object with that number; raise Refused(ENOENT) for none."""
        try:
            return self._ids[number]
        except KeyError:
            raise Refused(errno.ENOENT) from None

    def turn(self, object_id: str) -> int:
        """Return which inode of the object's `state` is handed out now."""
        return self._turns.get(object_id, 0)

    def next_turn(self, object_id: str) -> None:
        """Hand out another inode from now on: a write is about to hold the present one's lock."""
        self._turns[object_id] = self.turn(object_id) + 1 & _TURN_MASK

    def _sweep(self) -> None:
        gone = [object_id for object_id in self._numbers if not self._exists(object_id)]
        for object_id in gone:
            del self._ids[self._numbers.pop(object_id)]
            self._turns.pop(object_id, None)
        self._sweep_at = max(_FIRST_SWEEP, 2 * len(self._numbers))


@dataclass(frozen=True, slots=True)
class Node:
    """One entry of the tree: a Directory, a File or a Link."""

    lasting: ClassVar[bool] = False
    """Whether the kernel may take it for there, and unchanged, as long as the mount."""
    place: Place

    async def attributes(self) -> Attributes:
        """Return what `stat` shows; raise Refused(ENOENT) when the node is no more."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a listing; the attributes are right but for the size, which may be 0."""

    name: str
    number: int
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class Directory(Node):
    """A directory that can be looked at. What a subclass does not offer is EPERM."""

    def child(self, name: str) -> Node:
        """Return the node of that name; raise Refused(ENOENT) for none."""
        raise NotImplementedError

    def entries(self) -> Iterator[Entry]:
        """Return what a listing shows."""
        raise NotImplementedError

    async def make_directory(self, opener: Opener, name: str, mode: int | None) -> Node:
        """Create an object; `mode` is None where the caller did not ask for one."""
        raise Refused(errno.EPERM)

    async def remove_directory(self, opener: Opener, name: str) -> None:
        """Destroy an object."""
        raise Refused(errno.EPERM)

    async def rename(self, opener: Opener, old: str, new: str) -> None:
        """Rename an object within this directory."""
        raise Refused(errno.EPERM)

    async def unlink(self, opener: Opener, name: str) -> None:
        """Remove a file."""
        raise Refused(errno.EPERM)

    async def create(self, opener: Opener, name: str) -> "tuple[File, Handle]":
        """Make a file that is to be written, and open it."""
        raise Refused(errno.EACCES)

    async def set_access(
        self, opener: Opener, uid: int | None, gid: int | None, mode: int | None
    ) -> None:
        """Change owner, group, permission bits; None leaves one as it is."""
        raise Refused(errno.EPERM)


class Handle:
    """An open file. What a subclass does not offer is EBADF, as for a descriptor of the other way.

    `streaming` files have no offsets: `lseek` and `pread` are ESPIPE.
    """

    streaming = False

    async def read(self, offset: int, size: int) -> bytes | memoryview:
        """Return up to `size` bytes; b"" at the end."""
        raise Refused(errno.EBADF)

    async def write(self, offset: int, data: bytes) -> int:
        """Take `data`, and return how many bytes of it."""
        raise Refused(errno.EBADF)

    async def flush(self) -> None:
        """Act on what was written: a descriptor of the file is being closed."""

    async def release(self) -> None:
        """Let go of everything: nobody has the file open any more."""


@dataclass(frozen=True, slots=True)
class File(Node):
    """A node that can be opened."""

    waits: ClassVar[bool] = False
    """Whether reading it waits, so that signals to the reader must be looked for."""

    async def open(self, opener: Opener) -> Handle:
        """Return a handle; the kernel has checked that the opener may read or write.

        Of an opener who only reads what does not wait, neither groups nor path are known.
        """
        raise NotImplementedError

    async def set_access(
        self, opener: Opener, uid: int | None, gid: int | None, mode: int | None
    ) -> None:
        """Change owner, group, permission bits; None leaves one as it is."""
        raise Refused(errno.EPERM)

    async def set_size(self, size: int) -> None:
        """Do nothing, as a file of a value that a write sets has nothing to cut off."""


@dataclass(frozen=True, slots=True)
class Link(Node):
    """A symbolic link."""

    target: str
    time: float = 0

    async def attributes(self) -> Attributes:
        """Return what `lstat` shows."""
        return link_attributes(self.time, len(self.target.encode()))


def link_attributes(time: float, size: int = 0) -> Attributes:
    """Return the attributes of a link whose target has `size` bytes."""
    return Attributes(stat.S_IFLNK | LINK, size=size, time=time)


Show = Callable[[], Awaitable[bytes]]
"""Returns a file's content as it is now."""

Store = Callable[[bytes], Awaitable[None]]
"""Acts on what was written to a file; raises CocoonError, reported already."""
