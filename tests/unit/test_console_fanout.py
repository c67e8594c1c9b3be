import sys
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from agent.console.fanout import ByteStream, Fanout

pytestmark = pytest.mark.anyio


class _Remembered:
    """A history in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.closed = False

    async def read(self, size: int) -> bytes:
        await trio.lowlevel.checkpoint()
        data, self.data = self.data[:size], self.data[size:]
        return data

    def close(self) -> None:
        self.closed = True


async def _blocked(function: Callable[..., Awaitable[object]], *arguments: object) -> bool:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(function, *arguments)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    return scope.cancelled_caught


async def test_every_reader_gets_everything_from_its_opening_on() -> None:
    fanout = Fanout()
    early = fanout.subscribe()
    fanout.publish(b"one ")
    late = fanout.subscribe()
    fanout.publish(b"two")
    assert await early.read(100) == b"one two"
    assert await late.read(2) == b"tw"
    assert await late.read(2) == b"o"


async def test_a_reader_waits_until_there_is_something() -> None:
    fanout = Fanout()
    async with fanout.subscribe() as stream:
        assert await _blocked(stream.read, 10)
        fanout.publish(b"x")
        assert await stream.read(10) == b"x"
        assert await _blocked(stream.read, 10)


async def test_the_history_comes_first_and_nothing_is_lost_between() -> None:
    fanout = Fanout()
    history = _Remembered(b"history ")
    stream = fanout.subscribe(history)
    fanout.publish(b"live")
    assert await stream.read(4) == b"hist"
    assert await stream.read(100) == b"ory "
    assert not history.closed
    assert await stream.read(100) == b"live"
    assert history.closed


async def test_a_cancelled_read_loses_nothing() -> None:
    fanout = Fanout()
    stream = fanout.subscribe(_Remembered(b"history"))
    fanout.publish(b"live")
    for expected in (b"history", b"live"):
        with trio.CancelScope() as scope:
            scope.cancel()
            await stream.read(100)
        assert scope.cancelled_caught
        assert await stream.read(100) == expected


async def test_a_slow_reader_loses_the_oldest_and_the_others_nothing() -> None:
    fanout = Fanout(limit=50_000)
    slow, quick = fanout.subscribe(), fanout.subscribe()
    sent = received = b""
    for number in range(200):
        data = b"%08d" % number * 125
        sent += data
        fanout.publish(data)
        received += await quick.read(1 << 20)
    assert received == sent
    kept = await slow.read(1 << 20)
    assert 50_000 <= len(kept) <= 50_000 + 16 * 1024
    assert sent.endswith(kept)


async def test_a_slow_reader_of_lines_is_told_once_and_goes_on_at_a_line() -> None:
    fanout = Fanout(limit=20_000, overflow=lambda lost: b"OVERFLOW %d\n" % lost)
    stream = fanout.subscribe()
    lines = [b"line %05d\n" % number for number in range(10_000)]
    for line in lines:
        fanout.publish(line)
    received = b""
    while len(received) < 10_000:
        received += await stream.read(1000)
    notice, *rest = received.splitlines(keepends=True)
    lost = lines.index(rest[0]) * len(lines[0])
    assert notice == b"OVERFLOW %d\n" % lost
    assert b"".join(lines)[lost:].startswith(b"".join(rest))


async def test_a_reader_inside_a_line_gets_the_notice_on_a_line_of_its_own() -> None:
    fanout = Fanout(limit=20_000, overflow=lambda lost: b"OVERFLOW %d\n" % lost)
    stream = fanout.subscribe()
    fanout.publish(b"line 00000\n")
    assert await stream.read(4) == b"line"
    for _ in range(10_000):
        fanout.publish(b"line 00000\n")
    assert (await stream.read(100)).startswith(b"\nOVERFLOW ")
    assert await stream.read(11) == b"line 00000\n"


async def test_five_hundred_waiting_readers_cost_little_and_all_wake() -> None:
    fanout = Fanout()
    streams = [fanout.subscribe() for _ in range(500)]
    assert sum(sys.getsizeof(stream) for stream in streams) < 100_000
    received: list[bytes] = []

    async def read(stream: ByteStream) -> None:
        received.append(await stream.read(100))

    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(read, stream)
        await trio.testing.wait_all_tasks_blocked()
        fanout.publish(b"all")
    assert received == [b"all"] * 500
    for stream in streams:
        stream.close()
    assert fanout.readers == 0


async def test_nothing_is_kept_when_all_have_read_it_or_nobody_listens() -> None:
    fanout = Fanout()
    fanout.publish(b"x" * 100_000)
    assert not fanout._buffer
    async with fanout.subscribe() as stream:
        for _ in range(100):
            fanout.publish(b"x" * 10_000)
            assert len(await stream.read(1 << 20)) == 10_000
            assert len(fanout._buffer) <= 16 * 1024
    assert not fanout._buffer


async def test_a_closed_source_ends_its_streams_after_what_is_there() -> None:
    fanout = Fanout()
    stream = fanout.subscribe()
    fanout.publish(b"last")
    fanout.close()
    fanout.publish(b"never")
    assert await stream.read(10) == b"last"
    assert await stream.read(10) == b""
    assert await fanout.subscribe().read(10) == b""


@pytest.mark.parametrize("leave", [ByteStream.end, ByteStream.close])
async def test_a_stream_that_is_ended_wakes_who_waits_in_it_and_nobody_else(
    leave: Callable[[ByteStream], None],
) -> None:
    fanout = Fanout()
    stream, other = fanout.subscribe(), fanout.subscribe()
    ended = []

    async def read(stream: ByteStream) -> None:
        ended.append(await stream.read(10))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, stream)
        nursery.start_soon(read, other)
        await trio.testing.wait_all_tasks_blocked()
        leave(stream)
        await trio.testing.wait_all_tasks_blocked()
        assert ended == [b""]
        fanout.publish(b"on")
    assert ended == [b"", b"on"]


async def test_an_ended_stream_gives_what_was_there_first() -> None:
    fanout = Fanout()
    stream = fanout.subscribe()
    fanout.publish(b"last")
    stream.end()
    assert await stream.read(10) == b"last"
    assert await stream.read(10) == b""
