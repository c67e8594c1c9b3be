"""D-Bus messages as they are on the wire: cut out of a stream, read no further than needed.

Nothing here does input or output. Only `bus` uses this module. The numbers are those of
https://dbus.freedesktop.org/doc/dbus-specification.html.
"""

import io
import os
import struct
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.constants import MessageType
from dbus_next.signature import SignatureTree, SignatureType

MAX_MESSAGE: Final = 128 << 20
MAX_HEADER: Final = 64 << 20

_PREFIX = 16  # bytes that say how long the message is
_ORDERS = {ord("l"): "<", ord("B"): ">"}
_WORD = {mark: struct.Struct(order + "I") for mark, order in _ORDERS.items()}
_LENGTHS = {mark: struct.Struct(order + "III") for mark, order in _ORDERS.items()}
_KINDS = {kind.value: kind for kind in MessageType}
_FIELDS = (
    "",
    "path",
    "interface",
    "member",
    "error_name",
    "reply_serial",
    "destination",
    "sender",
    "signature",
    "fd_count",
)
_ALIGNMENT = {**dict.fromkeys("ygv", 1), **dict.fromkeys("nq", 2), **dict.fromkeys("biusoah", 4)}
_ALIGNMENT |= dict.fromkeys("xtd({", 8)

# The numbers that a variant may hold, by its signature as it is on the wire.
_NUMBERS = {
    mark: {
        b"\1%c\0" % letter: struct.Struct(order + code)
        for letter, code in zip(b"nqiuxtd", "hHiIqQd", strict=True)
    }
    for mark, order in _ORDERS.items()
}

# What readers raise when there are fewer or other bytes than expected.
_UNREADABLE = (EOFError, LookupError, ValueError, struct.error)


class Malformed(Exception):
    """What came over the socket is not D-Bus."""


@dataclass(slots=True)
class Received:
    """A message from the bus. Its body is decoded when somebody looks; `kind` None is unknown."""

    kind: MessageType | None
    flags: int
    serial: int
    path: str = ""
    interface: str = ""
    member: str = ""
    error_name: str = ""
    reply_serial: int = 0
    destination: str = ""
    sender: str = ""
    signature: str = ""
    fd_count: int = 0
    fds: tuple[int, ...] = ()
    raw: bytes = field(default=b"", repr=False)
    body_offset: int = field(default=0, repr=False)
    _body: list[Any] | None = field(default=None, init=False, repr=False)

    @property
    def body(self) -> list[Any]:
        """The values: structs are lists, dictionaries dicts, variants dbus-next's Variant.

        Raises Malformed; a bus lets no such message through.
        """
        if self._body is None:
            reader = _reader(self.raw, self.body_offset)
            try:
                types = SignatureTree._get(self.signature).types
                self._body = [reader.read_argument(kind) for kind in types]
            except _UNREADABLE as error:
                raise Malformed(f"the body of {self} cannot be read") from error
        return self._body


class Framer:
    """Bytes and descriptors in, messages out."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._needed = _PREFIX
        self._fds: deque[int] = deque()

    def feed(self, data: bytes, fds: Iterable[int] = ()) -> list[Received]:
        """Take what one read gave; return the messages that are complete. Raises Malformed."""
        self._buffer += data
        self._fds.extend(fds)
        messages = []
        start = 0
        while len(self._buffer) - start >= self._needed:
            if self._needed == _PREFIX:
                self._needed = _message_length(self._buffer, start)
                continue
            message = _parse(bytes(self._buffer[start : start + self._needed]))
            # The kernel hands descriptors out no later than the bytes they were sent with.
            if message.fd_count > len(self._fds):
                raise Malformed("descriptors are missing")
            message.fds = tuple(self._fds.popleft() for _ in range(message.fd_count))
            messages.append(message)
            start += self._needed
            self._needed = _PREFIX
        del self._buffer[:start]
        return messages

    def close(self) -> None:
        """Close the descriptors of messages that did not arrive whole."""
        close_all(self._fds)
        self._fds.clear()


def properties(message: Received, wanted: Collection[str]) -> dict[str, Any]:
    """Return the wanted values in a PropertiesChanged signal or in what GetAll returned.

    The same as looking into `body`, at a fraction of its cost: systemd tells of two dozen
    properties, or four hundred, where a few are of interest. Raises Malformed for other messages.
    """
    raw = message.raw
    word = _WORD[raw[0]]
    offset = message.body_offset
    if message.signature == "sa{sv}as":
        offset = _skip(_STRING, raw, offset, word)
    elif message.signature != "a{sv}":
        raise Malformed(f"no properties in a message of signature {message.signature!r}")
    offset = _align(offset, 4)
    start = _align(offset + 4, 8)
    end = start + word.unpack_from(raw, offset)[0]
    offset = start
    found = {}
    while offset < end:
        offset = _align(offset, 8)
        after_name = offset + 5 + word.unpack_from(raw, offset)[0]
        name = raw[offset + 4 : after_name - 1].decode()
        value, offset = _variant(raw, after_name, word, wanted=name in wanted)
        if name in wanted:
            found[name] = value
    return found


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        os.close(fd)


def _message_length(buffer: bytearray, start: int) -> int:
    lengths = _LENGTHS.get(buffer[start])
    if lengths is None or buffer[start + 1] == 0 or buffer[start + 3] != 1:
        raise Malformed(f"a message starts with {bytes(buffer[start : start + 4])!r}")
    body, _, header = lengths.unpack_from(buffer, start + 4)
    length: int = _align(_PREFIX + header, 8) + body
    if not 0 < header <= MAX_HEADER or length > MAX_MESSAGE:
        raise Malformed(f"a message claims to have {length} bytes, {header} of header fields")
    return length


def _parse(raw: bytes) -> Received:
    """Read the header of a whole message."""
    word = _WORD[raw[0]]
    _, serial, header = _LENGTHS[raw[0]].unpack_from(raw, 4)
    message = Received(_KINDS.get(raw[1]), raw[2], serial, raw=raw)
    end = _PREFIX + header
    message.body_offset = _align(end, 8)
    offset = _PREFIX
    try:
        while offset < end:
            offset = _align(offset, 8)
            code = raw[offset]
            if code >= len(_FIELDS):
                offset = _skip(_VARIANT, raw, offset + 1, word)
                continue
            kind = raw[offset + 1 : offset + 4]
            value: str | int
            if kind in (b"\1s\0", b"\1o\0"):
                offset = _align(offset + 4, 4)
                (length,) = word.unpack_from(raw, offset)
                value = raw[offset + 4 : offset + 4 + length].decode()
                offset += 5 + length
            elif kind == b"\1g\0":
                length = raw[offset + 4]
                value = raw[offset + 5 : offset + 5 + length].decode()
                offset += 6 + length
            elif kind == b"\1u\0":
                offset = _align(offset + 4, 4)
                (value,) = word.unpack_from(raw, offset)
                offset += 4
            else:
                raise Malformed(f"header field {code} has type {kind!r}")
            setattr(message, _FIELDS[code], value)
        if offset > end:
            raise Malformed("a message's header goes beyond its end")
    except _UNREADABLE as error:
        raise Malformed(f"a message's header cannot be read: {error}") from error
    return message


def _reader(raw: bytes, offset: int) -> Any:
    """Return dbus-next's reader, placed inside a message that is there as a whole."""
    reader: Any = Unmarshaller(io.BytesIO())  # type: ignore[no-untyped-call]
    reader.buf = raw
    reader.offset = offset
    reader.endian = raw[0]
    return reader


def _variant(raw: bytes, offset: int, word: struct.Struct, *, wanted: bool) -> tuple[Any, int]:
    """Return the variant's value, None unless it is wanted, and where it ends."""
    kind = raw[offset : offset + 3]
    if number := _NUMBERS[raw[0]].get(kind):
        start = _align(offset + 3, number.size)
        value = number.unpack_from(raw, start)[0] if wanted else None
        return value, start + number.size
    if kind == b"\1s\0":
        start = _align(offset + 3, 4) + 4
        end = start + word.unpack_from(raw, start - 4)[0]
        return (raw[start:end].decode() if wanted else None), end + 1
    if wanted:
        reader = _reader(raw, offset)
        return reader.read_variant().value, reader.offset
    return None, _skip(_VARIANT, raw, offset, word)


def _align(offset: int, boundary: int) -> int:
    return -(-offset // boundary) * boundary


def _skip(kind: SignatureType, raw: bytes, offset: int, word: struct.Struct) -> int:
    """Return where the value of type `kind` that starts at `offset` ends."""
    letter: str = kind.token
    if letter == "v":
        after = offset + raw[offset] + 2
        inner = SignatureTree._get(raw[offset + 1 : after - 1].decode())
        return _skip(inner.types[0], raw, after, word)
    offset = _align(offset, _ALIGNMENT[letter])
    if letter in "so":
        return offset + 5 + int(word.unpack_from(raw, offset)[0])
    if letter == "g":
        return offset + 2 + raw[offset]
    if letter == "a":
        start = _align(offset + 4, _ALIGNMENT[kind.children[0].token])
        return start + int(word.unpack_from(raw, offset)[0])
    if letter in "({":
        for child in kind.children:
            offset = _skip(child, raw, offset, word)
        return offset
    return offset + _ALIGNMENT[letter]


_STRING = SignatureTree._get("s").types[0]
_VARIANT = SignatureTree._get("v").types[0]
