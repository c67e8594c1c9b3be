"""Takes a snapshot's archive in as its bytes arrive, straight into a staging directory.

The staging directory belongs to the caller; the files in it are made, and removed after a refusal,
here.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass

from agent.model import canonical
from agent.model.errors import CocoonError, Damaged, NoSpace, UnknownFormat
from agent.model.sidecar import complete
from agent.model.size import MIB, show_size
from agent.model.snapshot import (
    METADATA,
    METADATA_LIMIT,
    Snapshot,
    SnapshotFile,
    is_data_file,
    parse_metadata,
)

from .compression import MAGIC_LENGTH, Plain, Unpacker, choose
from .qcow2 import read_header
from .reader import Event, MemberData, MemberEnd, MemberStart, TarReader
from .sink import Buffer, Sink

_LARGEST_FILE = 16 << 40  # bytes: ext4's limit (ext4(5))
_MOST_MEMBERS = 64
_LARGEST_HOLE = 1 << 30


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an import is: bytes that arrived, and the members begun, the last under way."""

    bytes_in: int
    members: tuple[str, ...]


class ImportSink(Sink):
    """One archive on its way in; see Sink."""

    def __init__(self, staging: int) -> None:
        super().__init__(staging, "archive")
        self._reader = TarReader()
        self._unpacker: Unpacker | None = None
        self._magic = b""
        self._bytes_in = 0
        self._members: list[str] = []
        self._files: dict[str, tuple[int, int]] = {}  # descriptor and size
        self._fd = -1
        self._document = bytearray()
        self._draft: Snapshot | None = None
        self._result: Snapshot | None = None

    @property
    def progress(self) -> Progress:
        return Progress(self._bytes_in, tuple(self._members))

    @property
    def part(self) -> str:
        """Return the member that is under way."""
        return self._members[-1] if self._members else ""

    @property
    def is_finished(self) -> bool:
        """Whether the archive was whole and good."""
        return self._result is not None

    def feed(self, data: Buffer) -> None:
        """Take the next bytes of the archive, in pieces of any size.

        Raises UnknownFormat, Damaged, Invalid, Unsupported or NoSpace; nothing is left in staging
        then.
        """
        with self._refusing():
            self._feed(memoryview(data))

    def skip(self, count: int) -> None:
        """Take `count` zero bytes, a hole in the archive as a file; raises as `feed` does."""
        with self._refusing():
            if isinstance(self._unpacker, Plain):
                self._bytes_in += count
                self._handle(self._reader.feed_zeros(count))
                return
            if count > _LARGEST_HOLE:
                raise Damaged(f"the archive has a hole of {show_size(count)}")
            for start in range(0, count, MIB):
                self._feed(memoryview(bytes(min(MIB, count - start))))

    def finish(self) -> Snapshot:
        """Check that the archive is whole, sync its files, and return the snapshot it describes.

        The snapshot is a draft: id, access and times are for the caller to set, and its name is ""
        when it is none here. An archive that ends too early is Damaged too, but keeps what arrived,
        so that more may come; any other refusal is final.
        """
        if self._result is not None:
            return self._result
        if self._refusal is None and not self._is_whole():
            raise Damaged(
                f"the archive is incomplete: it ends after {self._bytes_in} bytes, "
                f"{self._reader.where()}"
            )
        with self._refusing():
            if self._draft is None:
                raise UnknownFormat(f"the archive has no {METADATA}: this is no snapshot")
            files = [SnapshotFile(name, size) for name, (_, size) in self._files.items()]
            result = complete(self._draft_with_size(), files, self._read)
            for fd, _ in self._files.values():
                os.fsync(fd)
            os.fsync(self._staging)
            self._close()
            self._result = result
        return result

    def discard(self) -> None:
        """Remove what was written; harmless when nothing was, and after `finish`."""
        if self._result is None:
            names = list(self._files)
            self._close()
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self._staging)

    def _feed(self, data: memoryview) -> None:
        self._bytes_in += len(data)
        if self._unpacker is None:
            head = self._magic + bytes(data)
            if len(head) < MAGIC_LENGTH:
                self._magic = head
                return
            self._unpacker = choose(head[:MAGIC_LENGTH])
            data = memoryview(head)
        for part in self._unpacker.feed(data):
            self._handle(self._reader.feed(part))

    def _handle(self, events: Iterator[Event]) -> None:
        for event in events:
            match event:
                case MemberData(offset, data):
                    if self._fd < 0:
                        self._document[offset : offset + len(data)] = data
                    else:
                        self._write(self._fd, offset, data)
                case MemberStart():
                    self._start(event)
                case MemberEnd():
                    if self._fd < 0:
                        self._draft = parse_metadata(bytes(self._document))

    def _start(self, member: MemberStart) -> None:
        name = member.name
        if "/" in name:
            raise UnknownFormat(
                f"the archive's member {name[:80]!r} has a directory in its name: "
                "a snapshot's files have none"
            )
        if name != METADATA and not is_data_file(name):
            raise UnknownFormat(
                f"the archive's member {name[:80]!r} is no file of a snapshot: this is none, or it "
                "was packed with other files"
            )
        if name in self._members:
            raise Damaged(f"the archive has {name} twice")
        if len(self._members) >= _MOST_MEMBERS:
            raise Damaged(f"the archive has more than {_MOST_MEMBERS} members")
        self._members.append(name)
        if name == METADATA:
            if member.size > METADATA_LIMIT:
                raise Damaged(f"{METADATA} of {member.size} bytes is too large to be one")
            self._fd = -1
            self._document = bytearray(member.size)
            return
        if member.size > _LARGEST_FILE:
            raise Damaged(f"{name} of {show_size(member.size)} is larger than a file can be")
        # A sparse member's size is that of real data; a plain one's may be zeros for the most part.
        if member.stored < member.size and member.stored > self._free():
            raise NoSpace(
                f"{name} needs {show_size(member.stored)}: the filesystem has "
                f"{show_size(self._free())} left"
            )
        self._fd = self._create(name)
        self._files[name] = (self._fd, member.size)
        os.ftruncate(self._fd, member.size)

    def _is_whole(self) -> bool:
        return self._unpacker is not None and self._unpacker.complete and self._reader.ended

    def _draft_with_size(self) -> Snapshot:
        """Return the draft, with the size of the disk that an overlay holds."""
        assert self._draft is not None
        if canonical.OVERLAY not in self._files:
            return self._draft
        try:
            size = read_header(self._files[canonical.OVERLAY][0]).size
        except CocoonError as error:
            raise type(error)(f"the archive's {canonical.OVERLAY} {error}") from None
        return dataclasses.replace(self._draft, storage=size)

    def _read(self, name: str) -> bytes:
        fd, size = self._files[name]
        return os.pread(fd, size, 0)

    def _close(self) -> None:
        for fd, _ in self._files.values():
            os.close(fd)
        self._files.clear()
