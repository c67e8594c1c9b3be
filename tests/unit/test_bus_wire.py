"""Messages on the wire: cut out of the stream, read lazily, refused when malformed."""

import os
import random
import struct
from typing import Any

import pytest
from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from agent.systemd.wire import Framer, Malformed, Received, properties


def signal(signature: str = "", body: list[Any] | None = None, **fields: Any) -> bytes:
    fields = {"path": "/a/b", "interface": "test.Interface", "member": "Happened"} | fields
    message = Message(message_type=MessageType.SIGNAL, signature=signature, **fields)
    message.body = body or []
    message.serial = 7
    marshal: Any = message._marshall
    return bytes(marshal(negotiate_unix_fd=True))


def one(data: bytes) -> Received:
    (message,) = Framer().feed(data)
    return message


def big_endian(kind: int, body: bytes) -> bytes:
    """A message of signature `us` as a machine of the other byte order sends it."""
    fields = b"\x05\x01u\0" + struct.pack(">I", 9) + b"\x08\x01g\0\x02us\0"
    header = struct.pack(">cBBBIII", b"B", kind, 0, 1, len(body), 3, len(fields)) + fields
    return header + bytes(-len(header) % 8) + body


VALUES = [
    ("y", 255),
    ("b", True),
    ("b", False),
    ("n", -2),
    ("q", 65535),
    ("i", -3),
    ("u", 4_000_000_000),
    ("x", -5),
    ("t", 2**64 - 1),
    ("d", 0.5),
    ("s", "ünï"),
    ("s", ""),
    ("o", "/a"),
    ("g", "a{sv}"),
    ("ay", b"bytes"),
    ("as", ["one", "two"]),
    ("at", [1, 2]),
    ("at", []),
    ("(uo)", [28, "/job/28"]),
    ("a(ss)", [["a", "b"]]),
    ("a(sasbttttuii)", [["p", ["p", "q"], True, 1, 2, 3, 4, 5, 6, 7]]),
    ("a{sv}", {"k": Variant("(yt)", [1, 2])}),
    ("v", Variant("v", Variant("as", ["deep"]))),
]


def test_a_header_is_read_whole() -> None:
    message = one(signal("s", ["text"], destination=":1.6"))
    assert message.kind is MessageType.SIGNAL
    assert message.serial == 7
    assert (message.path, message.interface, message.member) == (
        "/a/b",
        "test.Interface",
        "Happened",
    )
    assert (message.sender, message.destination, message.signature) == ("", ":1.6", "s")
    assert message.body == ["text"]


@pytest.mark.parametrize(("signature", "value"), VALUES)
def test_bodies_hold_what_was_sent(signature: str, value: Any) -> None:
    assert one(signal("y" + signature, [1, value])).body == [1, value]


def test_messages_come_out_whole_however_the_stream_is_cut(rng: random.Random) -> None:
    sent = [signal(f"{kind}", [value], member=f"M{n}") for n, (kind, value) in enumerate(VALUES)]
    stream = b"".join(sent)
    for step in (1, 2, 15, 16, 17, len(stream)):
        framer = Framer()
        cut = [stream[start : start + step] for start in range(0, len(stream), step)]
        got = [message.raw for piece in cut for message in framer.feed(piece)]
        assert got == sent
    for _ in range(100):
        framer = Framer()
        points = sorted(rng.choices(range(len(stream) + 1), k=rng.randrange(40)))
        cut = [stream[a:b] for a, b in zip([0, *points], [*points, len(stream)], strict=True)]
        assert [message.raw for piece in cut for message in framer.feed(piece)] == sent


def test_the_other_byte_order_is_read_too() -> None:
    body = struct.pack(">II", 258, 2) + b"hi\0"
    first, second = Framer().feed(big_endian(2, body) + big_endian(2, body))
    assert first.kind is MessageType.METHOD_RETURN
    assert (first.serial, first.reply_serial, first.body) == (3, 9, [258, "hi"])
    assert second.raw == first.raw


def test_properties_of_the_other_byte_order_are_read_too() -> None:
    entry = b"\0\0\0\4PID4\0" + b"\1u\0" + struct.pack(">I", 77)
    body = struct.pack(">II", len(entry), 0) + entry
    message = one(big_endian(2, body))
    message.signature = "a{sv}"
    assert properties(message, {"PID4"}) == {"PID4": 77}


def test_descriptors_belong_to_the_message_that_announces_them() -> None:
    none, two, one_ = signal(), signal(unix_fds=[0, 0]), signal(unix_fds=[0])
    framer = Framer()
    assert [m.fds for m in framer.feed(none + two[:20], [41, 42])] == [()]
    assert [m.fds for m in framer.feed(two[20:])] == [(41, 42)]
    assert [m.fds for m in framer.feed(one_ + none, [43])] == [(43,), ()]


def test_a_message_without_its_descriptors_is_refused() -> None:
    with pytest.raises(Malformed, match="descriptors"):
        Framer().feed(signal(unix_fds=[0, 0]), [41])


def test_descriptors_of_messages_that_never_came_whole_are_closed() -> None:
    reading, writing = os.pipe()
    framer = Framer()
    framer.feed(signal(unix_fds=[0])[:-1], [writing])
    framer.close()
    assert os.read(reading, 1) == b""
    os.close(reading)


@pytest.mark.parametrize(
    "start",
    [
        b"x\x04\0\1" + bytes(12),  # byte order
        b"l\x00\0\1" + bytes(12),  # kind
        b"l\x04\0\2" + bytes(12),  # version
        b"l\x04\0\1" + struct.pack("<III", 0, 1, 0),  # no fields
        b"l\x04\0\1" + struct.pack("<III", 0, 1, (64 << 20) + 1),  # long header
        b"l\x04\0\1" + struct.pack("<III", 128 << 20, 1, 8),  # long body
        b"HTTP/1.1 400 Bad",
    ],
)
def test_what_is_not_dbus_is_refused_at_its_first_bytes(start: bytes) -> None:
    with pytest.raises(Malformed):
        Framer().feed(start)


@pytest.mark.parametrize(
    "fields",
    [
        b"\x01\x01o\0\xff\xff\xff\x7f/a\0\0",  # a string beyond the message
        b"\x01\x01o\0\x02\0\0\0\xff\xfe\0\0",  # no UTF-8
        b"\x01\x01d\0" + bytes(12),  # a path that is a number
        b"\x63\x05abc",  # an unknown field that ends early
        b"\x63\x01!\0",  # an unknown field of no type
    ],
)
def test_a_header_that_cannot_be_read_is_refused(fields: bytes) -> None:
    header = b"l\x04\0\1" + struct.pack("<III", 0, 1, len(fields)) + fields
    with pytest.raises(Malformed):
        Framer().feed(header + bytes(-len(header) % 8))


def test_unknown_header_fields_and_kinds_are_stepped_over() -> None:
    unknown = b"\x63\x05(sat)\0" + b"\x02\0\0\0hi\0" + b"\0" + struct.pack("<I", 8) + bytes(8)
    unknown += bytes(-len(unknown) % 8)
    fields = unknown + b"\x03\x01s\0\x04\0\0\0Name\0"
    header = b"l\x09\0\1" + struct.pack("<III", 0, 1, len(fields)) + fields
    message = one(header + bytes(-len(header) % 8))
    assert message.kind is None
    assert message.member == "Name"


def test_a_body_is_not_looked_at_before_somebody_asks() -> None:
    data = signal("s", ["text"])
    message = one(data[:-9] + b"\xff" * 9)
    assert message.member == "Happened"
    with pytest.raises(Malformed):
        message.body  # noqa: B018


@pytest.mark.parametrize("signature", ["sa{sv}as", "a{sv}"])
def test_properties_are_what_the_body_says(signature: str, rng: random.Random) -> None:
    for _ in range(50):
        chosen = rng.sample(VALUES, rng.randrange(len(VALUES)))
        values = {f"P{n}": Variant(kind, value) for n, (kind, value) in enumerate(chosen)}
        body: list[Any] = ["test.Interface", values, ["Other"]]
        message = one(signal(signature, body if signature[0] == "s" else [values]))
        wanted = set(rng.sample(sorted(values), rng.randrange(len(values) + 1)))
        found = properties(message, wanted | {"Absent"})
        assert found == {name: values[name].value for name in wanted}
        assert [type(found[name]) for name in wanted] == [type(values[n].value) for n in wanted]


def test_properties_of_another_message_are_refused() -> None:
    with pytest.raises(Malformed, match="'as'"):
        properties(one(signal("as", [["a"]])), {"a"})
