"""A VM's directory: what its files show, and what writing to them does."""

import dataclasses
import errno
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from agent.model.access import Caller
from agent.model.config import KEYS, parse_line, show_config, show_line
from agent.model.vm import Vm

from .content import Console, Content, Document, Text, Value, object_of, text_of
from .context import Context
from .node import Directory, Entry, File, Handle, Link, Node, Place, Refused, Store, link_attributes
from .permissions import Attributes, Opener, directory_of, file_of, stream_of
from .snapshots import snapshot_link
from .stream import Stream

if TYPE_CHECKING:
    from agent.lifecycle.operation import Operation

DIRECTORY_SLOT: Final = 1
BY_ID_SLOT: Final = 2
STREAM_SLOT: Final = 3
_FIRST_FILE_SLOT: Final = 16
_READ_ONLY_DIRECTORY: Final = 0o555

_SHOWN: Final[Mapping[str, Callable[[Vm], str]]] = {
    "id": lambda vm: f"{vm.id}\n",
    "unit": lambda vm: f"{vm.unit}\n",
    "pid": lambda vm: f"{vm.pid}\n",
    "error": lambda vm: f"{vm.error}\n" if vm.error else "",
}
"""Files that show a part of the record, and are only read."""
_LINES: Final = ("ssh_keys", "user_data")
"""Keys with values of several lines."""
_JSON: Final = ("boot", "disks")
"""Keys whose values are JSON."""
_NAMING: Final = ("snapshot", "restore", "hibernate", "from")
"""Files that take a snapshot's name."""
_WRITABLE: Final = frozenset({"state", "config", "console", *KEYS, *_NAMING})
_LINKS: Final = frozenset({"console.live", "console.sock"})

NAMES: Final = (
    "state",
    "config",
    *KEYS,
    *_SHOWN,
    "info.json",
    "stats",
    "console",
    "console.live",
    "console.sock",
    "snapshot",
    "restore",
    "hibernate",
    "from",
    "snapshots",
)
"""All that is in a VM's directory."""
_SLOTS: Final[Mapping[str, int]] = {
    name: _FIRST_FILE_SLOT + number for number, name in enumerate(NAMES)
}


@dataclass(frozen=True, slots=True)
class _VmNode(Node):
    """Something of one VM; it is no more when the VM is gone."""

    context: Context
    vm_id: str

    @property
    def vm(self) -> Vm:
        """The record as it is now."""
        vm = self.context.host.find_vm_by_id(self.vm_id)
        if vm is None:
            raise Refused(errno.ENOENT)
        return vm


@dataclass(frozen=True, slots=True)
class VmDirectory(_VmNode, Directory):
    """`vms/<name>`."""

    async def attributes(self) -> Attributes:
        """Return the VM's own owner, group and mode."""
        vm = self.vm
        return directory_of(vm.access, vm.updated_at)

    def child(self, name: str) -> Node:
        """Return one of the VM's files."""
        vm = self.vm
        if name not in _SLOTS:
            raise Refused(errno.ENOENT)
        place = self._place(name)
        match name:
            case "console.live":
                return Link(place, f"../../.live/{self.vm_id}", vm.created_at)
            case "console.sock":
                target = self.context.host.consoles.socket_path(self.vm_id)
                return Link(place, target, vm.created_at)
            case "snapshots":
                return VmSnapshots(place, self.context, self.vm_id)
        return _KINDS.get(name, KeyFile)(place, self.context, self.vm_id, name)

    def entries(self) -> Iterator[Entry]:
        """Return all files, the same for every VM."""
        vm = self.vm
        written = file_of(vm.access, True, 0, vm.updated_at)
        shown = file_of(vm.access, False, 0, vm.updated_at)
        link = link_attributes(vm.created_at)
        for name in NAMES:
            attributes = link if name in _LINKS else written if name in _WRITABLE else shown
            if name == "snapshots":
                attributes = snapshots_of(vm)
            yield Entry(name, self._place(name).number, attributes)

    async def unlink(self, opener: Opener, name: str) -> None:
        """Refuse, and remember who tried: it must not go on to remove the VM."""
        self.context.walks.put((opener.caller.pid, self.vm_id), True)
        raise Refused(errno.EPERM)

    async def set_access(
        self, opener: Opener, uid: int | None, gid: int | None, mode: int | None
    ) -> None:
        """Delegate the VM."""
        host = self.context.host
        operation = host.set_access(opener.caller, self.vm_id, uid, gid, mode)
        await self.context.finish(opener, operation)

    def _place(self, name: str) -> Place:
        # A write that waits holds the kernel's lock of the inode: who comes later, to kill
        # perhaps, must find another one.
        turn = self.context.objects.turn(self.vm_id) if name == "state" else 0
        return Place(self.place.object, _SLOTS[name], turn)


@dataclass(frozen=True, slots=True)
class VmFile(_VmNode, File):
    """A file in a VM's directory."""

    name: str

    async def show(self) -> bytes:
        """Return the content as it is now."""
        raise NotImplementedError

    async def size(self) -> int:
        """Return how long the content is now, in bytes."""
        return len(await self.show())

    async def attributes(self) -> Attributes:
        """Return owner and group of the VM, a mode that follows from its, and the exact size."""
        size = await self.size()
        vm = self.vm
        return file_of(vm.access, self.name in _WRITABLE, size, vm.updated_at)

    async def open(self, opener: Opener) -> Handle:
        """Return a handle that reads."""
        return Content(self.show)

    def reporting(self, opener: Opener) -> AbstractContextManager[None]:
        """Record in the VM's `error`, and elsewhere, what is refused in the body."""
        return self.context.host.reporting(opener.caller, self.vm_id)

    def configures(self, opener: Opener, parse: Callable[[bytes], Mapping[str, Any]]) -> Store:
        """Return what makes a change of the configuration from what was written."""

        async def store(data: bytes) -> None:
            with self.reporting(opener):
                changes = parse(data)
            operation = self.context.host.configure(opener.caller, self.vm_id, changes)
            await self.context.finish(opener, operation)

        return store


class StateFile(VmFile):
    """`state`: shows it, and takes a verb."""

    async def show(self) -> bytes:
        """Return the state."""
        return f"{self.vm.state.value}\n".encode()

    async def open(self, opener: Opener) -> Handle:
        """Return a handle; when it may write, the next look-up finds another inode."""
        if opener.writes:
            self.context.objects.next_turn(self.vm_id)

        async def store(data: bytes) -> None:
            with self.reporting(opener):
                verb = text_of(data).strip()
            operation = self.context.host.command(opener.caller, self.vm_id, verb)
            await self.context.finish(opener, operation)

        return Value(self.show, store)


class ConfigFile(VmFile):
    """`config`: the whole configuration as JSON."""

    async def show(self) -> bytes:
        """Return every key."""
        return _json_text(show_config(self.vm.config))

    async def open(self, opener: Opener) -> Handle:
        """Return a handle that merges what is written."""
        store = self.configures(opener, object_of)
        return Document(self.show, store, functools.partial(self.reporting, opener))


class KeyFile(VmFile):
    """One key of the configuration."""

    async def show(self) -> bytes:
        """Return its value and a newline."""
        return f"{show_line(self.name, self.vm.config)}\n".encode()

    async def open(self, opener: Opener) -> Handle:
        """Return a handle that sets the value."""
        store = self.configures(opener, self._parse)
        if self.name in _JSON:
            return Document(self.show, store, functools.partial(self.reporting, opener))
        return (Text if self.name in _LINES else Value)(self.show, store)

    def _parse(self, data: bytes) -> Mapping[str, Any]:
        # The newline that reading adds must not grow the value when it is written back.
        text = text_of(data).removesuffix("\n")
        return {self.name: parse_line(self.name, text)}


class RecordFile(VmFile):
    """A part of the record."""

    async def show(self) -> bytes:
        """Return its value and a newline."""
        return _SHOWN[self.name](self.vm).encode()


class InfoFile(VmFile):
    """`info.json`."""

    async def show(self) -> bytes:
        """Return the full record."""
        return _json_text(self.context.host.info(self.vm))


class StatsFile(VmFile):
    """`stats`."""

    async def show(self) -> bytes:
        """Return the figures of a moment ago, or of now."""
        text = self.context.samples.get(self.vm_id)
        if text is None:
            text = (await self.context.host.stats(self.vm)).encode()
            self.context.samples.put(self.vm_id, text)
        return text


class ConsoleFile(VmFile):
    """`console`: the log of the guest's output; what is written goes to the guest."""

    async def size(self) -> int:
        """Return how much of the log there is."""
        return self.context.host.consoles.log(self.vm_id).size

    async def open(self, opener: Opener) -> Handle:
        """Return a handle on both."""
        consoles = self.context.host.consoles

        async def send(data: bytes) -> int:
            with self.reporting(opener), self.context.interrupts.ending(opener):
                return await consoles.write(self.vm_id, data)

        return Console(lambda: consoles.log(self.vm_id), send)


class NamingFile(VmFile):
    """`snapshot`, `restore`, `hibernate`, `from`: each takes a snapshot's name."""

    async def show(self) -> bytes:
        """Return the name of the snapshot that is to be cloned, nothing for an operation."""
        if self.name != "from":
            return b""
        snapshot = self.context.host.snapshots.get(self.vm.from_snapshot)
        return f"{snapshot.name}\n".encode() if snapshot else b""

    async def open(self, opener: Opener) -> Handle:
        """Return a handle that acts."""

        async def store(data: bytes) -> None:
            with self.reporting(opener):
                name = text_of(data).strip()
            await self.context.finish(opener, self._submit(opener.caller, name))

        return Value(self.show, store)

    def _submit(self, caller: Caller, name: str) -> "Operation":
        host = self.context.host
        match self.name:
            case "restore":
                return host.restore(caller, self.vm_id, name)
            case "from":
                return host.configure(caller, self.vm_id, {"from": name})
        return host.take(caller, self.vm_id, name, hibernate=self.name == "hibernate")


@dataclass(frozen=True, slots=True)
class VmSnapshots(_VmNode, Directory):
    """`snapshots`: a link for each snapshot that was taken of the VM."""

    async def attributes(self) -> Attributes:
        """Return that nobody writes to it."""
        return snapshots_of(self.vm)

    def child(self, name: str) -> Node:
        """Return the link of the snapshot of that name."""
        snapshot = self.context.host.snapshots.find(name)
        if snapshot is None or snapshot.id not in self.vm.snapshots:
            raise Refused(errno.ENOENT)
        return snapshot_link(self.context, snapshot)

    def entries(self) -> Iterator[Entry]:
        """Return all links."""
        for snapshot_id in self.vm.snapshots:
            snapshot = self.context.host.snapshots.get(snapshot_id)
            if snapshot is not None:
                link = snapshot_link(self.context, snapshot)
                yield Entry(snapshot.name, link.place.number, link_attributes(link.time))


def snapshots_of(vm: Vm) -> Attributes:
    """Return the attributes of a VM's `snapshots`: as its directory, but not to be written."""
    access = dataclasses.replace(vm.access, mode=vm.access.mode & _READ_ONLY_DIRECTORY)
    return directory_of(access, vm.updated_at)


@dataclass(frozen=True, slots=True)
class ConsoleStream(_VmNode, File):
    """What `console.live` leads to."""

    waits = True

    async def attributes(self) -> Attributes:
        """Return that it may be read by who may read the VM's files."""
        vm = self.vm
        return stream_of(vm.access, vm.updated_at)

    async def open(self, opener: Opener) -> Handle:
        """Return a reader: the last 64 KiB, then what comes."""
        source = self.context.host.consoles.live(self.vm_id)
        stream = Stream(source, opener, self.context.interrupts)
        await stream.begin()
        return stream


_KINDS: Final[Mapping[str, type[VmFile]]] = {
    "state": StateFile,
    "config": ConfigFile,
    "info.json": InfoFile,
    "stats": StatsFile,
    "console": ConsoleFile,
    **dict.fromkeys(_SHOWN, RecordFile),
    **dict.fromkeys(_NAMING, NamingFile),
}
"""What a file is that is no key."""


def vm_directory(context: Context, vm_id: str) -> VmDirectory:
    """Return `vms/<name>` of a VM."""
    return VmDirectory(Place(context.objects.number(vm_id), DIRECTORY_SLOT), context, vm_id)


def by_id_link(context: Context, vm: Vm) -> Link:
    """Return `by-id/<id>` of a VM."""
    place = Place(context.objects.number(vm.id), BY_ID_SLOT)
    return Link(place, f"../vms/{vm.name}", vm.created_at)


def console_stream(context: Context, vm_id: str) -> ConsoleStream:
    """Return what a VM's `console.live` leads to."""
    return ConsoleStream(Place(context.objects.number(vm_id), STREAM_SLOT), context, vm_id)


def vm_node(context: Context, vm_id: str, place: Place) -> Node:
    """Return the node of a VM that stands at `place`; raise Refused(ENOENT) when it is gone."""
    directory = vm_directory(context, vm_id)
    if place.slot == DIRECTORY_SLOT:
        return directory
    if place.slot == BY_ID_SLOT:
        return by_id_link(context, directory.vm)
    if place.slot == STREAM_SLOT:
        return console_stream(context, vm_id)
    number = place.slot - _FIRST_FILE_SLOT
    if not 0 <= number < len(NAMES):
        raise Refused(errno.ENOENT)
    # Of `state` there may be a newer one, but this one was asked for.
    return dataclasses.replace(directory.child(NAMES[number]), place=place)


def _json_text(document: Any) -> bytes:
    return f"{json.dumps(document, indent=2)}\n".encode()
