"""What everything shares that comes in as one long file: zeros stay holes, a refusal is final.

Synchronous, and knows no event loop: calls write files and wait for them, so callers run them in a
worker thread, one call at a time.
"""

import contextlib
import os
from collections.abc import Iterator

from agent.model.errors import CocoonError, NoSpace, from_os_error
from agent.model.size import KIB, MIB

from .reflink import start_writing_out

Buffer = bytes | bytearray | memoryview

FILE_MODE = 0o444
"""Of what comes in: VMs share it, so every VMM's uid may read it and none may write it."""

_PAGE = 4 * KIB
_ZERO_PAGE = bytes(_PAGE)
_ROOM_STEP = 64 * MIB
_WRITE_OUT_STEP = 16 * MIB


class Sink:
    """One file on its way in; `what` is the word for it.

    `staging` is a descriptor of an empty directory; the caller keeps it open until `finish` or
    `discard` has returned. A refusal is final: the files are removed, and further calls raise it
    again.
    """

    def __init__(self, staging: int, what: str) -> None:
        self._staging = staging
        self._what = what
        self._room = 0
        self._unsynced = 0
        self._refusal: CocoonError | None = None

    @property
    def is_refused(self) -> bool:
        """Whether it was refused for good."""
        return self._refusal is not None

    @property
    def is_finished(self) -> bool:
        """Whether it was whole and good."""
        raise NotImplementedError

    @property
    def part(self) -> str:
        """Return the name of the part that is under way, "" for none."""
        return ""

    def feed(self, data: Buffer) -> None:
        """Take the next bytes, in pieces of any size; nothing is left in staging when it raises."""
        raise NotImplementedError

    def skip(self, count: int) -> None:
        """Take `count` zero bytes, a hole of the file that comes in; raises as `feed` does."""
        raise NotImplementedError

    def discard(self) -> None:
        """Remove what was written; harmless when nothing was, and after it was finished."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        if self._refusal is not None:
            raise self._refusal
        try:
            yield
        except CocoonError as error:
            self._refusal = error
            self.discard()
            raise
        except OSError as error:
            self._refusal = from_os_error(error, f"writing the {self._what}'s files")
            self.discard()
            raise self._refusal from None
        except BaseException:
            self.discard()
            raise

    def _create(self, name: str) -> int:
        """Make a new file in staging, and return its descriptor."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(name, flags, 0o600, dir_fd=self._staging)
        os.fchmod(file, FILE_MODE)
        return file

    def _write(self, file: int, offset: int, data: memoryview) -> None:
        """Write `data` but for its pages of zeros, which stay holes."""
        position = 0
        for start, end in _zero_pages(offset, data):
            if start > position:
                self._write_all(file, offset + position, data[position:start])
            position = end
        self._write_all(file, offset + position, data[position:])

    def _write_all(self, file: int, offset: int, data: memoryview) -> None:
        self._room -= len(data)
        if self._room < 0:
            free = self._free()
            if free < len(data):
                raise NoSpace(f"the {self._what} does not fit: its filesystem is full")
            self._room = min(free, _ROOM_STEP) - len(data)
        while len(data):
            written = os.pwrite(file, data, offset)
            offset += written
            data = data[written:]
            self._unsynced += written
        if self._unsynced >= _WRITE_OUT_STEP:
            # So that what is left to sync in the end is little.
            self._unsynced = 0
            start_writing_out(file)

    def _free(self) -> int:
        status = os.fstatvfs(self._staging)
        return status.f_bavail * status.f_frsize


def _zero_pages(offset: int, data: memoryview) -> Iterator[tuple[int, int]]:
    """Yield where `data`, from `offset` of a file on, has a page of zeros, or zeros as its part."""
    first = _PAGE - offset % _PAGE
    # The first byte tells of most pages that they are none, and all of those are looked at at once.
    firsts = data[:1].tobytes() + data[first::_PAGE].tobytes()
    number = firsts.find(0)
    while number >= 0:
        end = first + number * _PAGE
        start = max(0, end - _PAGE)
        page = data[start:end].tobytes()
        if page == _ZERO_PAGE[: len(page)]:
            yield start, start + len(page)
        number = firsts.find(0, number + 1)
