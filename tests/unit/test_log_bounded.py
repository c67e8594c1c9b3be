import itertools
import os
from pathlib import Path

import pytest
import trio

from agent.console.log import SMALL_APPEND, BoundedLog

pytestmark = pytest.mark.anyio


async def _content(log: BoundedLog) -> bytes:
    return await log.pread(0, 1 << 30)


def _lines(first: int, count: int) -> bytes:
    return b"".join(b"line %06d\n" % number for number in range(first, first + count))


async def test_a_log_without_a_file_is_empty(tmp_path: Path) -> None:
    log = BoundedLog(str(tmp_path / "log"))
    assert log.size == 0
    assert await log.pread(0, 10) == b""
    assert await log.excerpt(10).read(10) == b""


@pytest.mark.parametrize("size", [1, SMALL_APPEND, SMALL_APPEND + 1, 100_000])
async def test_what_is_appended_is_read_back_at_any_offset(tmp_path: Path, size: int) -> None:
    log = BoundedLog(str(tmp_path / "log"))
    data = os.urandom(size)
    await log.append(b"before\n")
    await log.append(data)
    assert log.size == size + 7
    assert await _content(log) == b"before\n" + data
    assert await log.pread(7 + size // 2, 3) == data[size // 2 :][:3]
    assert await log.pread(log.size, 1) == b""
    assert await log.pread(log.size + 100, 1) == b""
    await log.close()


async def test_a_closed_log_is_read_by_path_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    log = BoundedLog(path)
    await log.append(b"first\n")
    await log.close()
    descriptors = len(os.listdir("/proc/self/fd"))
    assert log.size == 6
    assert await _content(log) == b"first\n"
    assert await log.pread(6, 100) == b""
    assert len(os.listdir("/proc/self/fd")) == descriptors
    again = BoundedLog(path)
    await again.append(b"second\n")
    assert await _content(again) == b"first\nsecond\n"
    assert await _content(log) == b"first\nsecond\n"
    await again.close()


async def test_at_its_limit_a_log_drops_its_older_half_at_a_line(tmp_path: Path) -> None:
    log = BoundedLog(str(tmp_path / "log"), limit=12 * 100)
    await log.append(_lines(0, 100))
    assert log.size == 1200
    await log.append(_lines(100, 1))
    assert await _content(log) == _lines(51, 50)
    assert log.size == 600
    assert os.listdir(tmp_path) == ["log"]
    await log.append(_lines(101, 1))
    assert await _content(log) == _lines(51, 51)
    await log.close()


@pytest.mark.parametrize(
    ("more", "kept"),
    [
        (b"\n", b"second\n" + b"z" * 42 + b"\n"),
        (b"!\n", b"z" * 42 + b"!\n"),
    ],
)
async def test_a_line_that_starts_at_the_cut_is_kept_and_a_torn_one_is_not(
    tmp_path: Path, more: bytes, kept: bytes
) -> None:
    log = BoundedLog(str(tmp_path / "log"), limit=100)
    await log.append(b"x" * 50 + b"\n" + b"second\n" + b"z" * 42)
    await log.append(more)
    assert await _content(log) == kept
    await log.close()


async def test_output_without_line_ends_is_cut_anywhere(tmp_path: Path) -> None:
    log = BoundedLog(str(tmp_path / "log"), limit=1000)
    await log.append(b"a" * 900)
    await log.append(b"b" * 200)
    assert await _content(log) == b"a" * 300 + b"b" * 200
    await log.close()


async def test_an_append_larger_than_the_limit_leaves_its_end(tmp_path: Path) -> None:
    log = BoundedLog(str(tmp_path / "log"), limit=1200)
    await log.append(b"old\n")
    await log.append(_lines(0, 1000))
    assert await _content(log) == _lines(950, 50)
    await log.close()


async def test_no_sequence_of_appends_exceeds_the_limit_or_tears_a_line(tmp_path: Path) -> None:
    log = BoundedLog(str(tmp_path / "log"), limit=2000)
    number = 0
    for count in itertools.islice(itertools.cycle([1, 5, 30, 200, 2]), 100):
        await log.append(_lines(number, count))
        number += count
        content = await _content(log)
        assert len(content) == log.size <= 2000
        assert content == _lines(number - len(content) // 12, len(content) // 12)
    await log.close()


async def test_an_excerpt_stays_as_it_was_while_the_log_grows_and_is_halved(tmp_path: Path) -> None:
    log = BoundedLog(str(tmp_path / "log"), limit=1200)
    await log.append(_lines(0, 90))
    excerpt = log.excerpt(240)
    await log.append(_lines(90, 5))
    first = await excerpt.read(100)
    await log.append(_lines(95, 50))
    await log.close()
    await log.remove()
    assert first + await excerpt.read(1000) == _lines(70, 20)
    assert await excerpt.read(1) == b""
    excerpt.close()


async def test_an_excerpt_of_a_log_nobody_writes_is_its_end(tmp_path: Path) -> None:
    log = BoundedLog(str(tmp_path / "log"))
    await log.append(_lines(0, 90))
    await log.close()
    excerpt = log.excerpt(24)
    assert await excerpt.read(1000) == _lines(88, 2)
    excerpt.close()


async def test_readers_beside_a_writer_see_whole_lines_in_order(tmp_path: Path) -> None:
    log = BoundedLog(str(tmp_path / "log"), limit=24_000)
    await log.append(_lines(0, 1))
    done = False

    async def read() -> None:
        while not done:
            content = await log.pread(0, 12 * 1000)
            numbers = [int(line.split()[1]) for line in content.splitlines()]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(read)
        for number in range(1, 20_000, 500):
            await log.append(_lines(number, 500))
            await trio.sleep(0)
        done = True
    await log.close()


async def test_writers_of_one_log_take_turns(tmp_path: Path) -> None:
    log = BoundedLog(str(tmp_path / "log"))
    pieces = [bytes([65 + number]) * 10_000 + b"\n" for number in range(10)]
    async with trio.open_nursery() as nursery:
        for piece in pieces:
            nursery.start_soon(log.append, piece)
    assert sorted((await _content(log)).splitlines(keepends=True)) == pieces
    await log.close()


async def test_a_crash_before_the_rename_leaves_the_old_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crash(BaseException):
        pass

    def crash(*_: object) -> None:
        raise Crash

    path = str(tmp_path / "log")
    log = BoundedLog(path, limit=1200)
    await log.append(_lines(0, 100))
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", crash)
        with pytest.raises(Crash):
            await log.append(_lines(100, 1))
    assert sorted(os.listdir(tmp_path)) == ["log", "log.new"]
    after = BoundedLog(path, limit=1200)
    assert await _content(after) == _lines(0, 100)
    await after.append(_lines(100, 1))
    assert await _content(after) == _lines(51, 50)
    assert os.listdir(tmp_path) == ["log"]
    await after.close()
    await log.close()


async def test_a_full_disk_is_told_and_what_is_there_stays(tmp_path: Path) -> None:
    class Full(OSError):
        pass

    def refuse(*_: object) -> int:
        raise Full

    log = BoundedLog(str(tmp_path / "log"), limit=1200)
    await log.append(_lines(0, 99))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", refuse)
        for data in (_lines(99, 1), _lines(99, 2)):
            with pytest.raises(Full):
                await log.append(data)
    assert os.listdir(tmp_path) == ["log"]
    assert await _content(log) == _lines(0, 99)
    await log.append(_lines(99, 1))
    assert await _content(log) == _lines(0, 100)
    await log.close()


async def test_a_link_in_the_logs_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"secret")
    (tmp_path / "log").symlink_to(tmp_path / "other")
    log = BoundedLog(str(tmp_path / "log"))
    with pytest.raises(OSError, match="symbolic link"):
        await log.append(b"x")
    with pytest.raises(OSError, match="symbolic link"):
        await log.pread(0, 10)
    with pytest.raises(OSError, match="symbolic link"):
        log.excerpt(10)


async def test_a_removed_log_is_gone_and_may_begin_again(tmp_path: Path) -> None:
    log = BoundedLog(str(tmp_path / "log"))
    await log.append(b"x")
    await log.remove()
    await log.remove()
    assert os.listdir(tmp_path) == []
    assert log.size == 0
    await log.append(b"new")
    assert await _content(log) == b"new"
    await log.close()
