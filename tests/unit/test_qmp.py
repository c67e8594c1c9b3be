"""QMP as bytes: what is understood, and what is refused."""

import contextlib
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.vmm.qmp import (
    MAXIMUM_LINE,
    Event,
    Greeting,
    QmpReader,
    Refusal,
    Reply,
    parse_message,
    show_command,
)

CONVERSATION = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": []}}\r\n'
    b'{"return": {}, "id": 1}\r\n'
    b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}\r\n'
    b'{"timestamp": {}, "event": "MIGRATION", "data": {"status": "completed"}}\r\n'
    b'{"id": 2, "error": {"class": "GenericError", "desc": "no such\\nthing"}}\r\n'
    b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\r\n'
    b'{"return": [1, 2], "id": 3}\r\n'
)
MESSAGES = [
    Greeting(),
    Reply(1, {}),
    Event("STOP"),
    Event("MIGRATION", {"status": "completed"}),
    Refusal(2, "no such thing"),
    Refusal(None, "JSON parse error"),
    Reply(3, [1, 2]),
]


@given(st.lists(st.integers(0, len(CONVERSATION)), max_size=20))
def test_messages_come_out_whole_however_the_bytes_are_cut(cuts):
    reader = QmpReader()
    ends = [0, *sorted(cuts), len(CONVERSATION)]
    found = []
    for start, end in itertools.pairwise(ends):
        found += reader.feed(CONVERSATION[start:end])
    assert found == MESSAGES


def test_a_message_without_its_end_is_not_there_yet():
    reader = QmpReader()
    assert reader.feed(b'{"return": {}, "id": 1}') == []
    assert reader.feed(b"\n") == [Reply(1, {})]


@pytest.mark.parametrize(
    "line",
    [b"nothing", b"[]", b"{}", b'{"return": {}}', b'{"error": "x"}', b"\xff\xfe", b"[" * 100_000],
)
def test_what_is_no_message_is_refused(line):
    with pytest.raises(ValueError, match=r"no JSON|unknown kind"):
        parse_message(line)


@given(st.binary(max_size=200))
def test_any_bytes_are_messages_or_a_value_error(data):
    reader = QmpReader()
    with contextlib.suppress(ValueError):
        assert isinstance(reader.feed(data + b"\n"), list)


def test_a_line_without_end_is_cut_off():
    reader = QmpReader()
    assert reader.feed(b"x" * MAXIMUM_LINE) == []
    with pytest.raises(ValueError, match="more than"):
        reader.feed(b"x")


def test_what_the_vmm_says_is_one_printable_line_of_bounded_length():
    line = json.dumps({"error": {"desc": "a\n\x1b[31mb" + "c" * 5000}, "id": 1}).encode()
    refusal = parse_message(line)
    assert isinstance(refusal, Refusal)
    assert refusal.message.isprintable()
    assert refusal.message.startswith("a ?[31mb")
    assert len(refusal.message) <= 501


def test_a_command_has_its_number_and_arguments():
    assert json.loads(show_command(7, "getfd", {"fdname": "x"})) == {
        "execute": "getfd",
        "id": 7,
        "arguments": {"fdname": "x"},
    }
    assert "arguments" not in json.loads(show_command(8, "stop", {}))
