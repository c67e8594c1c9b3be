"""Files on their way in: from the first byte until they are snapshots or images, or thrown away.

Nothing is recorded before one is whole: what stands in staging when an agent starts has been left
by one that died, and goes.
"""

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import trio

from agent.model.access import Access, Caller
from agent.model.errors import CocoonError, Damaged, Exists, Invalid
from agent.model.image import Image
from agent.model.names import new_id
from agent.model.size import MIB
from agent.model.snapshot import Snapshot
from agent.storage.sink import Sink
from agent.storage.staging import Staged

from .library import changed_access
from .services import Services
from .steps import step

T = TypeVar("T")
R = TypeVar("R", Snapshot, Image)

_GATHER = 4 * MIB  # what a thread is called for, and no more pieces than these
_MOST_PIECES = 1024
_EVENTS_APART = 1.0  # seconds


class Kind(Protocol[R]):
    """What comes in: how it is named, taken in, and published.

    `noun` is the word for the file, `steps` what names of steps begin with. `reserved` has the
    names of those on their way in. With `ends_unmarked` only who writes a file knows that it is
    whole.
    """

    noun: str
    steps: str
    ends_unmarked: bool
    reserved: set[str]

    @property
    def store(self) -> Staged:
        """Where it is staged."""
        ...

    def name_of(self, file_name: str) -> str:
        """Return the object's name, "" for rsync's temporary file; raise Invalid for another."""
        ...

    def check_free(self, name: str) -> None:
        """Raise Exists when there is one of that name, or one on its way in."""
        ...

    def sink(self, staging: int) -> Sink:
        """Return what takes the bytes."""
        ...

    def finish(self, object_id: str, sink: Sink) -> R:
        """Return the draft of the record of a file that is whole; in a thread."""
        ...

    async def publish(self, draft: R, name: str, access: Access, size: int) -> None:
        """Record it, let it appear, tell of it; on failure nothing of it is left."""
        ...

    def provisional(self, object_id: str, name: str, access: Access, reason: str) -> R:
        """Return a record to tell of the import by."""
        ...


class Imports(Generic[R]):
    """All files of a kind on their way in, by their names."""

    def __init__(self, services: Services, kind: Kind[R], group: int) -> None:
        self._services = services
        self._kind: Kind[R] = kind
        self._group = group
        self._arriving: dict[str, Import[R]] = {}

    def all(self) -> list["Import[R]"]:
        """Return all, in no order."""
        return list(self._arriving.values())

    def find(self, file_name: str) -> "Import[R] | None":
        """Return the one whose file has that name."""
        return self._arriving.get(file_name)

    async def begin(self, caller: Caller, file_name: str) -> "Import[R]":
        """Begin an import; raise Exists for a name taken, Invalid for one that is none."""
        name = self._kind.name_of(file_name)
        if file_name in self._arriving:
            raise Exists(f"{file_name} is on its way in already")
        if name:
            self._kind.check_free(name)
        access = Access(caller.uid, self._group)
        arriving = Import(self._services, self._kind, self._arriving, access, file_name)
        self._arriving[file_name] = arriving
        if name:
            self._kind.reserved.add(name)
        try:
            await arriving.begin()
        except BaseException:
            await arriving.discard()
            raise
        return arriving


class Import(Generic[R]):
    """One file on its way in. Calls wait for each other; `size` is how much has arrived."""

    def __init__(
        self,
        services: Services,
        kind: Kind[R],
        among: dict[str, "Import[R]"],
        access: Access,
        file_name: str,
    ) -> None:
        self.id = new_id()
        self.file_name = file_name
        self.access = access
        self.began = time.time()
        self.size = 0
        self.refusal: CocoonError | None = None
        self.ends_unmarked = kind.ends_unmarked
        self._services = services
        self._kind: Kind[R] = kind
        self._among: dict[str, Import[R]] = among
        self._handles = 0
        self._staging = -1
        self._sink: Sink | None = None
        self._pending: list[bytes] = []
        self._gathered = 0
        self._turn = trio.Lock()
        self._fed = trio.Event()
        self._fed.set()
        self._draft: R | None = None
        self._is_over = False
        self._told = 0.0
        self._part = ""

    @property
    def name(self) -> str:
        """The name that the object will have, "" while the file is rsync's temporary one."""
        return self._kind.name_of(self.file_name)

    async def begin(self) -> None:
        """Make the staging directory."""
        store = self._kind.store

        def make() -> int:
            store.stage(self.id)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(store.staging(self.id), flags)

        self._staging = await self._services.tree.in_thread("beginning an import", make)
        self._sink = self._kind.sink(self._staging)
        self._step("begun")

    def opened(self) -> None:
        """Note that one more has the file open."""
        self._handles += 1

    async def closed(self) -> None:
        """Note that one has closed it; what nobody will complete is thrown away."""
        self._handles -= 1
        if not self._handles and self._draft is None:
            await self.discard()

    def set_access(self, uid: int | None, gid: int | None, mode: int | None) -> None:
        """Change whose it will be."""
        self.access = changed_access(self.access, uid, gid, mode)

    async def write(self, offset: int, data: bytes) -> None:
        """Take the next bytes; what lies between them and the last ones is zeros."""
        async with self._turn:
            await self._skip_to(offset)
            self._check_open()
            self._pending.append(data)
            self._gathered += len(data)
            self.size += len(data)
            if self.size == len(data):
                # The first bytes at once: they tell what it is.
                await self._feed()
            elif self._gathered >= _GATHER or len(self._pending) >= _MOST_PIECES:
                await self._fed.wait()
                self._check_open()
                self._fed = trio.Event()
                self._services.background.start_soon(self._feed_meanwhile, self._take())

    async def set_size(self, size: int) -> None:
        """Take zeros up to `size` bytes; raise Invalid when more has arrived."""
        async with self._turn:
            if size < self.size:
                raise Invalid(f"{self.file_name} cannot be cut off: its start is unpacked already")
            await self._skip_to(size)

    async def finish(self) -> None:
        """Let what is whole be a snapshot or image; raise Damaged for what is not whole yet."""
        async with self._turn:
            if self._is_over or self._draft is not None:
                return
            self._check_open()
            await self._feed()
            sink = self._sink
            assert sink is not None
            self._draft = await self._in_thread(
                "finishing an import", self._kind.finish, self.id, sink
            )
            self._step("whole")
            if self.name:
                await self._publish()

    async def rename(self, file_name: str) -> None:
        """Give the file another name; publish it when it is whole and the name a lasting one."""
        async with self._turn:
            name = self._kind.name_of(file_name)
            if name and name != self.name:
                self._kind.check_free(name)
            self.forget()
            self.file_name = file_name
            self._among[file_name] = self
            if name:
                self._kind.reserved.add(name)
            if self._draft is not None and name:
                try:
                    await self._publish()
                except CocoonError:
                    if not self._handles:  # nobody will close it
                        await self._throw_away()
                    raise

    async def discard(self) -> None:
        """Throw away what has arrived; harmless when it is published already."""
        with trio.CancelScope(shield=True):
            async with self._turn:
                await self._throw_away()

    async def _throw_away(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        self.forget()
        with trio.CancelScope(shield=True):
            await self._fed.wait()
            await self._services.tree.in_thread("ending an import", self._remove)
        if self._told:
            self._services.events.happened("REMOVED", self._provisional("import-failed"))

    def abandon(self) -> None:
        """Note that who brought it has died: it will never be whole."""
        if self._draft is None and not self._is_over:
            self.refusal = Damaged(f"{self.file_name} is incomplete: who wrote it ended early")
            raise self.refusal

    def forget(self) -> None:
        """Give the name free."""
        self._among.pop(self.file_name, None)
        self._kind.reserved.discard(self.name)

    async def _skip_to(self, offset: int) -> None:
        if offset <= self.size:
            return
        self._check_open()
        await self._feed()
        sink = self._sink
        assert sink is not None
        await self._in_thread("importing", sink.skip, offset - self.size)
        self.size = offset

    def _check_open(self) -> None:
        if self.refusal is not None:
            raise self.refusal
        if self._is_over or self._draft is not None:
            raise Invalid(
                f"the {self._kind.noun} {self.file_name} was complete: nothing may follow it"
            )

    async def _feed(self) -> None:
        """Unpack all that has arrived."""
        await self._fed.wait()
        self._check_open()
        if self._pending:
            await self._unpack(self._take())

    def _take(self) -> list[bytes]:
        pieces, self._pending, self._gathered = self._pending, [], 0
        return pieces

    async def _feed_meanwhile(self, pieces: list[bytes]) -> None:
        """Unpack `pieces` while the next bytes arrive; a refusal is for whoever brings those."""
        try:
            with contextlib.suppress(CocoonError):
                await self._unpack(pieces)
        finally:
            self._fed.set()

    async def _unpack(self, pieces: list[bytes]) -> None:
        sink = self._sink
        assert sink is not None
        await self._in_thread("importing", _feed_all, sink, pieces)
        self._tell(sink)

    async def _in_thread(self, doing: str, act: Callable[..., T], *args: Any) -> T:
        try:
            return await self._services.tree.in_thread(doing, act, *args)
        except CocoonError as error:
            if self._sink is None or self._sink.is_refused or self._sink.is_finished:
                self.refusal = error
            raise

    async def _publish(self) -> None:
        assert self._draft is not None
        try:
            await self._kind.publish(self._draft, self.name, self.access, self.size)
        except CocoonError as error:
            self.refusal, self._draft = error, None
            raise
        self._is_over = True
        self.forget()
        os.close(self._staging)
        self._step("ready")

    def _step(self, name: str) -> None:
        step(f"{self._kind.steps}:{name}")

    def _remove(self) -> None:
        if self._sink is not None:
            self._sink.discard()
        if self._staging >= 0:
            with contextlib.suppress(OSError):
                os.close(self._staging)
        self._kind.store.clear(self.id)

    def _tell(self, sink: Sink) -> None:
        now = time.monotonic()
        if sink.part == self._part and now - self._told < _EVENTS_APART:
            return
        self._told, self._part = now, sink.part
        record, part = self._provisional("import"), {"member": sink.part} if sink.part else {}
        self._services.events.happened("MODIFIED", record, bytes=self.size, **part)

    def _provisional(self, reason: str) -> R:
        name = self.name or self.file_name
        return self._kind.provisional(self.id, name, self.access, reason)


def _feed_all(sink: Sink, pieces: list[bytes]) -> None:
    for piece in pieces:
        sink.feed(piece)
