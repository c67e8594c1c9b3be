"""The top of the tree: the host's own files, and where everything else hangs."""

import errno
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from agent import __version__
from agent.model.finding import show_findings

from .arriving import ImportFile
from .content import Document, Log, object_of
from .context import Context
from .guide import guide
from .images import ImageFile, ImagesDirectory, image_node
from .node import Entry, Handle, Link, Node, Place, Refused, link_attributes, place_of
from .permissions import CREATE, FOR_GROUP, HIDDEN_DIRECTORY, Attributes, Opener
from .snapshots import SnapshotFile, SnapshotsDirectory, snapshot_node
from .stream import Stream
from .tree import TreeDirectory, TreeFile
from .vm_dir import ConsoleStream, VmDirectory, VmFile, console_stream, vm_node
from .vms import ByIdDirectory, IndexFile, VmsDirectory

_HIDDEN_NAME: Final = ".live"
_HIDDEN: Final = Place(0, 2)
_EVENTS_STREAM: Final = Place(0, 3)
_NAMES: Final[Mapping[str, Place]] = {
    "README": Place(0, 16),
    "version": Place(0, 17),
    "create": Place(0, 18),
    "errors": Place(0, 19),
    "events": Place(0, 20),
    "events.live": Place(0, 21),
    "index.json": Place(0, 22),
    "by-id": Place(0, 23),
    "vms": Place(0, 24),
    "snapshots": Place(0, 25),
    "doctor": Place(0, 26),
    "images": Place(0, 27),
}
"""What a listing of the root shows, in this order."""
_PATHS: Final[Mapping[Place, str]] = {place: name for name, place in _NAMES.items()}


class RootDirectory(TreeDirectory):
    """The mount itself. The kernel asks each time, so that `stat` tells when the agent is gone."""

    lasting = False

    def child(self, name: str) -> Node:
        """Return what is there of that name, the hidden directory too."""
        place = _HIDDEN if name == _HIDDEN_NAME else _NAMES.get(name)
        if place is None:
            raise Refused(errno.ENOENT)
        return _node(self.context, place)

    def entries(self) -> Iterator[Entry]:
        """Return all but the hidden directory."""
        for name, place in _NAMES.items():
            node = _node(self.context, place)
            shown = link_attributes(node.time) if isinstance(node, Link) else node.shown()
            yield Entry(name, place.number, shown)


class StreamsDirectory(TreeDirectory):
    """Where the `.live` links lead to: nothing that walks the tree comes here."""

    def shown(self) -> Attributes:
        """Return that all may pass through it."""
        return Attributes(stat.S_IFDIR | HIDDEN_DIRECTORY, time=self.context.since)

    def child(self, name: str) -> Node:
        """Return the stream of all events, or the console of the VM with that id."""
        if name == "events":
            return EventsStream(_EVENTS_STREAM, self.context)
        if self.context.host.find_vm_by_id(name) is None:
            raise Refused(errno.ENOENT)
        return console_stream(self.context, name)

    def entries(self) -> Iterator[Entry]:
        """Return nothing."""
        return iter(())


class ReadmeFile(TreeFile):
    """`README`."""

    async def show(self) -> bytes:
        """Return how to use the tree."""
        return guide(self.context.mount).encode()


class VersionFile(TreeFile):
    """`version`."""

    async def show(self) -> bytes:
        """Return the agent's version."""
        return f"{__version__}\n".encode()


class DoctorFile(TreeFile):
    """`doctor`: what the checks of the host found last."""

    async def size(self) -> int:
        """Return how long that is."""
        return len(show_findings(self.context.host.doctor.findings).encode())

    async def show(self) -> bytes:
        """Return a line for each check."""
        return self.context.host.doctor.read().encode()


class CreateFile(TreeFile):
    """`create`: a JSON object written to it is a new VM."""

    def shown(self, size: int = 0) -> Attributes:
        """Return that members of the group may write to it."""
        return self.for_group(CREATE, size)

    async def show(self) -> bytes:
        """Return nothing."""
        return b""

    async def open(self, opener: Opener) -> Handle:
        """Return a handle that creates."""
        host, caller = self.context.host, opener.caller

        async def store(data: bytes) -> None:
            with host.reporting(caller):
                document = object_of(data)
            await self.context.finish(opener, host.create_document(caller, document))

        return Document(self.show, store, lambda: host.reporting(caller))


class ErrorsFile(TreeFile):
    """`errors`: what was refused and what failed."""

    def shown(self, size: int = 0) -> Attributes:
        """Return that members of the group may read it."""
        return self.for_group(FOR_GROUP, size)

    async def size(self) -> int:
        """Return how much of the log there is."""
        return self.context.host.events.errors.log.size

    async def open(self, opener: Opener) -> Handle:
        """Return a handle on the log."""
        return Log(lambda: self.context.host.events.errors.log)


class EventsFile(ErrorsFile):
    """`events`: what happened."""

    async def size(self) -> int:
        """Return how much of the log there is."""
        return self.context.host.events.events.log.size

    async def open(self, opener: Opener) -> Handle:
        """Return a handle on the log."""
        return Log(lambda: self.context.host.events.events.log)


class EventsStream(TreeFile):
    """What `events.live` leads to."""

    waits = True

    def shown(self, size: int = 0) -> Attributes:
        """Return that members of the group may read it."""
        return self.for_group(FOR_GROUP)

    async def size(self) -> int:
        """Return 0: nothing is there before it happens."""
        return 0

    async def open(self, opener: Opener) -> Handle:
        """Return a reader of what happens from now on."""

        handle = Stream(self.context.host.events.live(), opener, self.context.interrupts)
        await handle.begin()
        return handle


def find_node(context: Context, number: int) -> Node:
    """Return the node with that inode number; raise Refused(ENOENT) when it is no more."""
    place = place_of(number)
    if place.object:
        object_id = context.objects.id(place.object)
        if context.host.find_vm_by_id(object_id) is None:
            image = image_node(context, object_id, place)
            return image or snapshot_node(context, object_id, place)
        return vm_node(context, object_id, place)
    return _node(context, place)


def path_of(node: Node) -> str:
    """Return where the node is, relative to the mount; "" for what only links lead to."""
    match node:
        case VmDirectory():
            return f"vms/{node.vm.name}"
        case VmFile():
            return f"vms/{node.vm.name}/{node.name}"
        case SnapshotFile():
            return f"snapshots/{node.file_name}"
        case ImportFile() | ImageFile():
            return node.path
        case ConsoleStream():
            return f"vms/{node.vm.name}/console.live"
        case EventsStream():
            return "events.live"
    return _PATHS.get(node.place, "")


def _node(context: Context, place: Place) -> TreeDirectory | TreeFile | Link:
    kind = _KINDS.get(place)
    if kind is None:
        raise Refused(errno.ENOENT)
    return kind(place, context)


def _events_link(place: Place, context: Context) -> Link:
    return Link(place, f"{_HIDDEN_NAME}/events", context.since)


_KINDS: Final[Mapping[Place, Callable[[Place, Context], TreeDirectory | TreeFile | Link]]] = {
    Place(0, 1): RootDirectory,
    _HIDDEN: StreamsDirectory,
    _EVENTS_STREAM: EventsStream,
    _NAMES["README"]: ReadmeFile,
    _NAMES["version"]: VersionFile,
    _NAMES["create"]: CreateFile,
    _NAMES["errors"]: ErrorsFile,
    _NAMES["events"]: EventsFile,
    _NAMES["events.live"]: _events_link,
    _NAMES["index.json"]: IndexFile,
    _NAMES["by-id"]: ByIdDirectory,
    _NAMES["vms"]: VmsDirectory,
    _NAMES["snapshots"]: SnapshotsDirectory,
    _NAMES["doctor"]: DoctorFile,
    _NAMES["images"]: ImagesDirectory,
}
