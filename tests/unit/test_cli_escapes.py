"""What is typed at a console: escape sequences, what was shown, what the terminal was told."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cli.escapes import Escape, EscapeParser, Event
from agent.cli.modes import ModeTracker
from agent.cli.transcript import Transcript, last_lines


def parse(*pieces: bytes, character: bytes | None = b"~") -> list[Event]:
    parser = EscapeParser(character)
    return [event for piece in pieces for event in parser.feed(piece)]


def joined(events: list[Event]) -> list[Event]:
    """The events with input that follows input in one piece, as it may come in any pieces."""
    result: list[Event] = []
    for event in events:
        if isinstance(event, bytes) and result and isinstance(result[-1], bytes):
            result[-1] += event
        else:
            result.append(event)
    return result


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (b"ls\r", [b"ls\r"]),
        (b"~.", [Escape.DETACH]),
        (b"ls\r~.", [b"ls\r", Escape.DETACH]),
        (b"ls\n~?~.", [b"ls\n", Escape.HELP, Escape.DETACH]),
        (b"~w~\x1a", [Escape.TYPE_WINDOW_SIZE, Escape.SUSPEND]),
        (b"ls ~.", [b"ls ~."]),
        (b"~~.", [b"~."]),
        (b"~~\r~~~.", [b"~\r~~."]),
        (b"~/bin", [b"~/bin"]),
        (b"~\r~.", [b"~\r", Escape.DETACH]),
        (b"ls\x1d", [b"ls", Escape.DETACH]),
        (b"~\x1d.", [b"\x1d."]),
        (b"~", []),
        (b"\x00\xff~.", [b"\x00\xff~."]),
    ],
)
def test_escape_sequences_are_those_of_ssh(typed: bytes, meant: list[Event]) -> None:
    assert parse(typed) == meant


def test_the_escape_character_can_be_another_or_none() -> None:
    assert parse(b"~.\r%.", character=b"%") == [b"~.\r", Escape.DETACH]
    assert parse(b"~.\x1d", character=None) == [b"~.\x1d"]


_TYPED = st.lists(
    st.sampled_from([b"~", b".", b"?", b"w", b"\r", b"\n", b"x", b"\x1d", b"\x1a", b"\xc3\xa9"])
).map(b"".join)


@given(_TYPED, st.lists(st.integers(0, 60)))
def test_how_input_arrives_makes_no_difference(typed: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(typed)]
    pieces = [typed[start:end] for start, end in itertools.pairwise(edges)]
    assert joined(parse(*pieces)) == parse(typed)


@given(st.binary())
def test_everything_can_be_said_to_the_guest(data: bytes) -> None:
    typed = data.replace(b"~", b"\x00~").replace(b"\x1d", b"\r~\x1d")
    meant = data.replace(b"~", b"\x00~").replace(b"\x1d", b"\r\x1d")
    assert b"".join(event for event in parse(typed) if isinstance(event, bytes)) == meant
    assert not [event for event in parse(typed) if isinstance(event, Escape)]


def test_the_log_and_the_socket_join_without_a_gap_or_a_repetition(rng: random.Random) -> None:
    said = b"".join(b"%08d\n" % number for number in range(3000))
    for _ in range(300):
        shown, read = sorted(rng.randrange(20, 20_000) for _ in range(2))
        # By less than a few bytes nobody could tell where they belong.
        connected = rng.choice([read, rng.randrange(max(0, read - 2000), read - 15)])
        arrived = rng.randrange(connected + 15, read + 2000)
        later = rng.randrange(arrived, arrived + 2000)
        transcript = Transcript(rng.randrange(20))
        first = transcript.show(said[:shown])
        again = transcript.join(said[max(0, read - 64 * 1024) : read], said[connected:arrived])
        rest = transcript.show(said[arrived:later]) + transcript.show(said[later:])
        assert first + again + rest == said


def test_of_a_log_that_was_not_seen_before_the_last_lines_are_shown() -> None:
    assert last_lines(b"a\nb\nc\n", 2) == b"b\nc\n"
    assert last_lines(b"a\nb\n# ", 2) == b"b\n# "
    assert last_lines(b"a\nb", 9) == b"a\nb"
    assert last_lines(b"a\nb\n", 0) == b""
    assert last_lines(b"", 3) == b""
    assert Transcript(1).join(b"boot\nweb login: ", b"b login: x") == b"web login: x"
    lost = Transcript(1)
    lost.show(b"what the log has not any more")
    assert lost.join(b"new\nlogin: ", b"") == b"login: "


@pytest.mark.parametrize(
    ("output", "undone"),
    [
        (b"plain \x1b[2J\x1b[31mred\x1b[0m", b""),
        (b"\x1b[1;31mred", b"\x1b[m"),
        (b"\x1b[?1049h\x1b[?25l\x1b[?1000;1006h", b"\x1b[?25h\x1b[?1000l\x1b[?1006l\x1b[?1049l"),
        (b"\x1b[?1049h\x1b[?1049l\x1b[?25l\x1b[?25h", b""),
        (b"\x1b[?1h\x1b=", b"\x1b[?1l\x1b>"),
        (b"\x1b[?2004h\x1bc", b""),
        (b"\x1b[?99999999h\x1b[?;h\x1b[?7l", b"\x1b[?7h"),
    ],
)
def test_modes_that_the_guest_left_on_are_switched_off(output: bytes, undone: bytes) -> None:
    for size in (1, 3, len(output)):
        tracker = ModeTracker()
        for start in range(0, len(output), size):
            tracker.feed(output[start : start + size])
        assert tracker.undo() == undone


def test_a_guest_cannot_fill_memory_with_a_sequence_that_does_not_end() -> None:
    tracker = ModeTracker()
    tracker.feed(b"\x1b[?")
    for _ in range(100):
        tracker.feed(b"1" * 10_000)
    assert len(tracker._rest) < 100
