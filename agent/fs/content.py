"""Open files: values, documents that may span writes, logs."""

import errno
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

from agent.model.errors import Damaged, Invalid

from .node import Handle, Refused, Show, Store

VALUE_LIMIT: Final = 128 * 1024
"""Longest value that can be written, in bytes."""
DOCUMENT_LIMIT: Final = 1 << 20
"""Longest document that can be written, in bytes."""

_OUTSIDE: Final = re.compile(rb'["{}\[\]]')
_IN_STRING: Final = re.compile(rb'["\\]')


class Content(Handle):
    """A file that is made up when it is read: at the start of each reading, and kept for it."""

    def __init__(self, show: Show) -> None:
        self._show = show
        self._content = b""

    async def read(self, offset: int, size: int) -> bytes:
        """Return a part of the content as it was when its first byte was read."""
        if offset == 0 or not self._content:
            self._content = await self._show()
        return self._content[offset : offset + size]


class Value(Content):
    """A file of one value: each write is one, wherever the file offset stands."""

    def __init__(self, show: Show, store: Store) -> None:
        super().__init__(show)
        self._store = store

    async def write(self, offset: int, data: bytes) -> int:
        """Set the value; what that means has happened on return."""
        await self._store(data)
        return len(data)


class Text(Content):
    """A value of several lines. Shells write it line by line: each write sets all so far."""

    def __init__(self, show: Show, store: Store) -> None:
        super().__init__(show)
        self._store = store
        self._written = b""
        self._end = 0

    async def write(self, offset: int, data: bytes) -> int:
        """Set the value to what was written in one go up to here."""
        written = self._written + data if offset == self._end else data
        await self._store(written)
        self._written, self._end = written, offset + len(data)
        return len(data)


class Document(Content):
    """A JSON document. It is applied by the write that completes it, most often the only one.

    A write that leaves it incomplete succeeds; a flush then is EBADMSG, and more may come. Shells
    write line by line and hear of errors from `write` only; `cp` writes 128 KiB at a time and hears
    of those from `close` too.
    """

    def __init__(
        self, show: Show, store: Store, reporting: Callable[[], AbstractContextManager[None]]
    ) -> None:
        super().__init__(show)
        self._store = store
        self._reporting = reporting
        self._pieces = bytearray()
        self._end = 0
        self._scanner = Scanner()

    async def write(self, offset: int, data: bytes) -> int:
        """Take a piece; raise Refused(ESPIPE) unless it follows the one before it."""
        if not self._pieces and not data.strip():
            return len(data)
        if self._pieces and offset != self._end:
            raise Refused(errno.ESPIPE)
        if len(self._pieces) + len(data) > DOCUMENT_LIMIT:
            self._forget()
            with self._reporting():
                raise Invalid(f"a document is at most {DOCUMENT_LIMIT} bytes long")
        self._pieces += data
        self._end = offset + len(data)
        if self._scanner.completed_by(data):
            document = bytes(self._pieces)
            self._forget()
            await self._store(document)
        return len(data)

    async def flush(self) -> None:
        """Raise Damaged when what was written is not the whole of a document."""
        if self._pieces:
            with self._reporting():
                raise Damaged(
                    f"the document written is incomplete after {len(self._pieces)} bytes: "
                    "is a closing brace or a quote missing?"
                )

    def _forget(self) -> None:
        self._pieces.clear()
        self._scanner = Scanner()


class Scanner:
    """Finds where a JSON document that comes in pieces is complete, by its brackets alone."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._begun = False

    def completed_by(self, data: bytes) -> bool:
        """Whether the document is complete with this piece; one without brackets always is."""
        if not self._begun and (start := data.lstrip()):
            if start[:1] not in b"{[":
                return True
            self._begun = True
        position = 0
        while position < len(data):
            if self._escaped:
                self._escaped = False
                position += 1
                continue
            match = (_IN_STRING if self._in_string else _OUTSIDE).search(data, position)
            if match is None:
                break
            position = match.end()
            match match[0]:
                case b'"':
                    self._in_string = not self._in_string
                case b"\\":
                    self._escaped = True
                case b"{" | b"[":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if self._depth <= 0:
                        return True
        return False


def text_of(data: bytes) -> str:
    """Return a written value as text; raise Invalid for what is none."""
    if len(data) > VALUE_LIMIT:
        raise Invalid(f"a value is at most {VALUE_LIMIT} bytes long, not {len(data)}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Invalid(f"a value is text in UTF-8, and byte {error.start} of this is not") from None


def json_of(data: bytes) -> Any:
    """Return what a written document says; raise Invalid, with the place, for what is no JSON."""
    try:
        document = json.loads(data.decode())
        # Half of a surrogate pair, as "\\ud800", would be a text that nothing can encode.
        json.dumps(document, ensure_ascii=False).encode()
    except RecursionError:
        raise Invalid("the document is nested too deeply") from None
    except ValueError as error:
        raise Invalid(f"what was written is not JSON: {error}") from None
    return document


def object_of(data: bytes) -> Mapping[str, Any]:
    """Return a written JSON object; raise Invalid for anything else."""
    document = json_of(data)
    if not isinstance(document, dict):
        raise Invalid("what was written is JSON but no object: write {...}")
    return document


class Readable(Protocol):
    """A growing log."""

    async def pread(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from `offset`, b"" past the end."""
        ...


class Log(Handle):
    """A growing log: what is there can be read, at any offset."""

    def __init__(self, find: Callable[[], Readable]) -> None:
        self._find = find

    async def read(self, offset: int, size: int) -> bytes:
        """Return what the log holds there."""
        return await self._find().pread(offset, size)


class Console(Log):
    """A console's log to read, and the way to the guest to write."""

    def __init__(
        self, find: Callable[[], Readable], send: Callable[[bytes], Awaitable[int]]
    ) -> None:
        super().__init__(find)
        self._send = send

    async def write(self, offset: int, data: bytes) -> int:
        """Send to the guest, and return how much it took."""
        return await self._send(data)
