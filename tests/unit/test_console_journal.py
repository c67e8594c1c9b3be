import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from agent.console.journal import (
    LINE_BURST,
    LINE_LENGTH,
    LINES_PER_SECOND,
    QUEUE,
    Journal,
    LineCutter,
    vm_fields,
)
from agent.model.access import Access
from agent.model.config import VmConfig
from agent.model.vm import Vm

VM = Vm(id="a" * 26, name="web", uid=65536, access=Access(0, 0), config=VmConfig())


def test_lines_are_cut_wherever_the_reads_fall() -> None:
    cutter = LineCutter(0)
    data = "count 1\r\ncount 2\n\n  \nzwölf\n".encode()
    lines = [line for byte in data for line in cutter.feed(bytes([byte]), 0)]
    assert lines == ["count 1", "count 2", "zwölf"]
    assert LineCutter(0).feed(data, 0) == lines


def test_a_line_without_an_end_comes_when_the_console_closes() -> None:
    cutter = LineCutter(0)
    assert cutter.feed(b"done\nlogin: ", 0) == ["done"]
    assert cutter.finish(0) == ["login:"]
    assert cutter.finish(0) == []


@pytest.mark.parametrize("in_pieces", [False, True])
def test_a_long_line_goes_on_in_further_entries_and_no_character_is_torn(in_pieces: bool) -> None:
    text = "ä€" * 3000
    data = text.encode()
    step = 100 if in_pieces else len(data)
    cutter = LineCutter(0)
    lines = [
        line
        for start in range(0, len(data), step)
        for line in cutter.feed(data[start : start + step], 0)
    ]
    lines += cutter.feed(b"\n", 0)
    assert "".join(lines) == text
    assert all(LINE_LENGTH - 4 < len(line.encode()) <= LINE_LENGTH for line in lines[:-1])


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"\x1b[1;32mok\x1b[0m\x1b[K", "ok"),
        (b"\x1b]0;title\x07text", "text"),
        (b"\x1b]0;title\x1b\\text", "text"),
        (b"\x1b(B\x1b=text\x1bM", "text"),
        (b"tab\there", "tab\there"),
        (b"bell\x07 nul\x00 del\x7f", "bell␇ nul␀ del␡"),
        (b"50%\r100%\r", "50%␍100%"),
        (b"bad \xff utf", "bad � utf"),
        ("c1 \x9b".encode(), "c1 �"),
        (b"\x1b[unfinished", "nfinished"),
    ],
)
def test_what_no_terminal_may_get_is_left_out_or_shown(raw: bytes, shown: str) -> None:
    (line,) = LineCutter(0).feed(raw + b"\n", 0)
    assert line == shown
    assert all(character.isprintable() or character == "\t" for character in line)


def test_a_guest_that_floods_is_cut_down_and_what_is_left_out_is_told() -> None:
    cutter = LineCutter(0)
    flood = b"".join(b"%d\n" % number for number in range(LINE_BURST + 500))
    assert cutter.feed(flood, 0) == [str(number) for number in range(LINE_BURST)]
    assert cutter.feed(b"rest\n" * 7 + b"tail", 0) == []
    later = cutter.feed(b" end\nnext\n", 1)
    assert later == ["(507 lines left out here: see the VM's console file)", "tail end", "next"]
    assert len(cutter.feed(b"more\n" * 10_000, 1)) == LINES_PER_SECOND - 2


def test_a_flood_without_line_ends_is_cut_down_too() -> None:
    cutter = LineCutter(0)
    lines = [line for _ in range(200) for line in cutter.feed(b"x" * 65536, 0)]
    assert len(lines) == LINE_BURST
    assert "left out" in cutter.finish(0)[-1]


class _Journald:
    """What listens in journald's place."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.listen()

    def listen(self) -> None:
        if os.path.exists(self.path):
            os.unlink(self.path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.setblocking(False)

    def entries(self) -> list[bytes]:
        found = []
        while True:
            try:
                found.append(self.socket.recv(65536))
            except BlockingIOError:
                return found

    def messages(self) -> list[str]:
        return [
            entry.split(b"\n")[0].removeprefix(b"MESSAGE=").decode() for entry in self.entries()
        ]


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[_Journald]:
    made = _Journald(tmp_path / "socket")
    yield made
    made.socket.close()


@pytest.mark.anyio
async def test_an_entry_names_the_unit_the_vm_and_where_it_is_from(journald: _Journald) -> None:
    journal = Journal(journald.path)
    assert journal.submit(["count 1"], vm_fields(VM)) == 0
    (entry,) = journald.entries()
    assert entry.decode().splitlines() == [
        "MESSAGE=count 1",
        "PRIORITY=6",
        "SYSLOG_IDENTIFIER=console",
        "OBJECT_SYSTEMD_UNIT=cocoon-vm-web.service",
        "VM_NAME=web",
        f"VM_ID={'a' * 26}",
    ]
    journal.close()


@pytest.mark.anyio
async def test_lines_that_a_slow_journal_cannot_take_wait_in_order(journald: _Journald) -> None:
    journal = Journal(journald.path)
    lines = [str(number) for number in range(1000)]
    received: list[str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(journal.run)
        assert journal.submit(lines, b"") == 0
        while len(received) < 1000:
            await trio.lowlevel.wait_readable(journald.socket)
            received += journald.messages()
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert received == lines
    journal.close()


@pytest.mark.anyio
async def test_what_exceeds_the_queue_is_counted_not_kept(journald: _Journald) -> None:
    journal = Journal(journald.path)
    lines = [str(number) for number in range(3 * QUEUE)]
    left_out = journal.submit(lines, b"")
    taken = len(journald.entries())
    assert left_out == 3 * QUEUE - QUEUE - taken
    assert left_out > 0
    journal.close()


@pytest.mark.anyio
async def test_a_journal_that_was_replaced_is_found_again(journald: _Journald) -> None:
    journal = Journal(journald.path)
    journal.submit(["before"], b"")
    assert journald.messages() == ["before"]
    journald.socket.close()
    journald.listen()
    journal.submit(["after"], b"")
    assert journald.messages() == ["after"]
    journal.close()


@pytest.mark.anyio
async def test_a_journal_that_dies_with_lines_waiting_is_no_end(journald: _Journald) -> None:
    journal = Journal(journald.path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(journal.run)
        journal.submit([str(number) for number in range(1000)], b"")
        await trio.testing.wait_all_tasks_blocked()
        journald.socket.close()
        await trio.testing.wait_all_tasks_blocked()
        journald.listen()
        journal.submit(["after"], b"")
        while "after" not in journald.messages():
            await trio.lowlevel.wait_readable(journald.socket)
        nursery.cancel_scope.cancel()
    journal.close()


@pytest.mark.anyio
async def test_a_host_without_a_journal_costs_nothing_and_stops_nothing(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "nothing"))
    assert journal.submit(["line"] * 10_000, b"") == 0
    assert not journal._queue
    journal.close()
