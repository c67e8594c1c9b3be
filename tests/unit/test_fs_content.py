"""What is written to files, and when it is acted on."""

import errno
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.fs.content import (
    DOCUMENT_LIMIT,
    VALUE_LIMIT,
    Content,
    Document,
    Scanner,
    Text,
    Value,
    json_of,
    object_of,
    text_of,
)
from agent.fs.node import Handle, Refused
from agent.model.errors import CocoonError, Damaged, Invalid

pytestmark = pytest.mark.anyio


class Target:
    """Where documents go, and refusals."""

    def __init__(self) -> None:
        self.stored: list[bytes] = []
        self.reported: list[CocoonError] = []
        self.refuse: CocoonError | None = None
        self.shown = 0

    async def show(self) -> bytes:
        self.shown += 1
        return b"shown %d" % self.shown

    async def store(self, data: bytes) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.stored.append(data)

    @contextmanager
    def reporting(self) -> Iterator[None]:
        try:
            yield
        except CocoonError as error:
            self.reported.append(error)
            raise

    def document(self) -> Document:
        return Document(self.show, self.store, self.reporting)


@pytest.fixture
def target() -> Target:
    return Target()


async def written(handle: Handle, data: bytes, size: int, offset: int = 0) -> None:
    for start in range(0, len(data), size):
        piece = data[start : start + size]
        assert await handle.write(offset + start, piece) == len(piece)


async def test_content_is_made_once_for_a_reading(target: Target) -> None:
    handle = Content(target.show)
    assert [await handle.read(offset, 1) for offset in range(4)] == [b"s", b"h", b"o", b"w"]
    assert target.shown == 1


async def test_content_is_made_anew_when_it_is_read_from_its_start(target: Target) -> None:
    handle = Content(target.show)
    assert await handle.read(0, 100) == b"shown 1"
    assert await handle.read(7, 100) == b""
    assert await handle.read(0, 100) == b"shown 2"


async def test_what_is_only_read_cannot_be_written(target: Target) -> None:
    with pytest.raises(Refused) as refused:
        await Content(target.show).write(0, b"x")
    assert refused.value.errno == errno.EBADF


async def test_each_write_to_a_value_counts_wherever_it_is(target: Target) -> None:
    handle = Value(target.show, target.store)
    await handle.write(0, b"start\n")
    await handle.write(6, b"stop\n")
    await handle.write(1 << 40, b"kill\n")
    assert target.stored == [b"start\n", b"stop\n", b"kill\n"]


async def test_a_text_written_line_by_line_is_one_value(target: Target) -> None:
    handle = Text(target.show, target.store)
    await written(handle, b"one\ntwo\nthree\n", 4)
    assert target.stored[-1] == b"one\ntwo\nthree\n"


async def test_appending_to_a_text_sets_it_too(target: Target) -> None:
    handle = Text(target.show, target.store)
    await handle.write(500, b"new")
    await handle.write(503, b"er\n")
    assert target.stored == [b"new", b"newer\n"]


async def test_writing_a_text_from_its_start_begins_again(target: Target) -> None:
    handle = Text(target.show, target.store)
    await handle.write(0, b"old\n")
    await handle.write(0, b"new\n")
    assert target.stored[-1] == b"new\n"


async def test_a_refused_piece_of_text_leaves_no_trace(target: Target) -> None:
    handle = Text(target.show, target.store)
    target.refuse = Invalid("no")
    with pytest.raises(Invalid):
        await handle.write(0, b"bad\n")
    target.refuse = None
    await handle.write(4, b"good\n")
    assert target.stored == [b"good\n"]


async def test_a_document_in_one_write_is_applied_in_it(target: Target) -> None:
    await target.document().write(0, b'{"cpu": 2}\n')
    assert target.stored == [b'{"cpu": 2}\n']


@pytest.mark.parametrize("size", [1, 2, 7, 4096])
async def test_a_document_in_pieces_is_applied_when_complete(target: Target, size: int) -> None:
    document = b'\n {"a": "}{\\"", "b": [{"c": "\\\\"}], "d": "\xc3\xa9"}\n\n'
    handle = target.document()
    await written(handle, document, size)
    await handle.flush()
    assert [json.loads(stored) for stored in target.stored] == [json.loads(document)]


async def test_an_incomplete_document_is_told_at_flush_and_may_go_on(target: Target) -> None:
    handle = target.document()
    await handle.write(0, b'{"cpu": ')
    with pytest.raises(Damaged):
        await handle.flush()
    assert [type(error) for error in target.reported] == [Damaged]
    await handle.write(8, b"2}")
    await handle.flush()
    assert target.stored == [b'{"cpu": 2}']


async def test_a_flush_before_any_write_is_nothing(target: Target) -> None:
    await target.document().flush()
    assert target.reported == []


async def test_blank_lines_around_a_document_are_nothing(target: Target) -> None:
    handle = target.document()
    await handle.write(0, b"\n")
    await handle.write(1, b"{}")
    await handle.write(3, b"\n\n")
    await handle.flush()
    assert target.stored == [b"{}"]


@pytest.mark.parametrize("offset", [0, 3, 5])
async def test_a_piece_that_does_not_follow_is_espipe(target: Target, offset: int) -> None:
    handle = target.document()
    await handle.write(0, b'{"a"')
    with pytest.raises(Refused) as refused:
        await handle.write(offset, b": 1}")
    assert refused.value.errno == errno.ESPIPE
    assert target.stored == []


async def test_a_document_may_begin_at_any_offset_as_appending_does(target: Target) -> None:
    handle = target.document()
    await written(handle, b'{"a": 1}', 3, offset=352)
    assert target.stored == [b'{"a": 1}']


async def test_a_refused_document_may_be_written_again(target: Target) -> None:
    handle = target.document()
    target.refuse = Invalid("no")
    for _ in range(2):
        with pytest.raises(Invalid):
            await handle.write(0, b"{}")
    target.refuse = None
    await handle.write(0, b'{"a": 1}')
    await handle.flush()
    assert target.stored == [b'{"a": 1}']


async def test_two_documents_through_one_descriptor_are_two(target: Target) -> None:
    handle = target.document()
    await handle.write(0, b"{}\n")
    await handle.write(3, b"[]\n")
    assert target.stored == [b"{}\n", b"[]\n"]


@pytest.mark.parametrize("text", [b"null\n", b"hello", b"17", b"}", b'"{"'])
async def test_what_has_no_brackets_is_judged_at_once(target: Target, text: bytes) -> None:
    await target.document().write(0, text)
    assert target.stored == [text]


async def test_a_document_without_end_is_refused_and_forgotten(target: Target) -> None:
    handle = target.document()
    piece = b"[" * 65536
    await written(handle, piece * (DOCUMENT_LIMIT // len(piece)), len(piece))
    with pytest.raises(Invalid):
        await handle.write(DOCUMENT_LIMIT, b"[")
    assert [type(error) for error in target.reported] == [Invalid]
    await handle.flush()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.text(), json_values) | st.lists(json_values),
    st.lists(st.integers(0, 400)),
    st.booleans(),
)
def test_a_document_is_complete_with_its_last_bracket_only(
    value: Any, cuts: list[int], ascii_only: bool
) -> None:
    data = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    scanner = Scanner()
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    assert [scanner.completed_by(piece) for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize(
    "data",
    [
        b"{bad}",
        b'{"a": 1} {"b": 2}',
        b"[" * 100_000 + b"]" * 100_000,
        b'{"cpu": ' + b"1" * 10_000 + b"}",
        b'{"password": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"name": "\xff"}',
        b"",
    ],
)
def test_what_is_no_json_is_invalid(data: bytes) -> None:
    with pytest.raises(Invalid):
        json_of(data)


@pytest.mark.parametrize("data", [b"[]", b"1", b"null", b'"x"'])
def test_what_is_no_object_is_invalid(data: bytes) -> None:
    with pytest.raises(Invalid):
        object_of(data)


def test_a_value_is_text() -> None:
    assert text_of("größer\n".encode()) == "größer\n"


@pytest.mark.parametrize("data", [b"\xff\xfe", b"x" * (VALUE_LIMIT + 1)])
def test_what_is_no_text_is_invalid(data: bytes) -> None:
    with pytest.raises(Invalid):
        text_of(data)
