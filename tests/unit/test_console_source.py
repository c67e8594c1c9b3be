import contextlib
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from agent.console import source
from agent.console.source import INPUT, OUTPUT, Fifos, remove_fifos
from agent.model.errors import CocoonError, Failed, TimedOut

pytestmark = pytest.mark.anyio


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "vm"


@pytest.fixture
def fifos(directory: Path) -> Iterator[Fifos]:
    made = Fifos(str(directory))
    yield made
    if made._input >= 0:
        os.close(made._input)
        os.close(made._output)


def _vmm(directory: Path) -> tuple[int, int]:
    """Open both ends as systemd does for StandardInputFile and StandardOutputFile."""
    return (
        os.open(directory / INPUT, os.O_RDONLY | os.O_NOCTTY),
        os.open(directory / OUTPUT, os.O_WRONLY | os.O_NOCTTY),
    )


async def test_the_fifos_and_their_directory_are_roots_alone(directory: Path, fifos: Fifos) -> None:
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for name in (INPUT, OUTPUT):
        found = (directory / name).stat()
        assert stat.S_ISFIFO(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o600


async def test_nothing_is_read_once_they_are_closed(directory: Path) -> None:
    fifos = Fifos(str(directory))
    _, stdout = _vmm(directory)
    os.write(stdout, b"output")
    fifos.close()
    assert fifos.read(100) == b""


async def test_a_start_finds_both_ends_open_and_data_passes_both_ways(
    directory: Path, fifos: Fifos
) -> None:
    stdin, stdout = _vmm(directory)
    os.write(stdout, b"output")
    await fifos.wait()
    assert fifos.read(100) == b"output"
    assert fifos.read(100) == b""
    assert await fifos.write(b"input", 1) == 5
    assert os.read(stdin, 100) == b"input"
    os.close(stdin)
    os.close(stdout)


async def test_a_vmm_that_ended_leaves_its_output_and_another_may_follow(
    directory: Path, fifos: Fifos
) -> None:
    for text in (b"first", b"second"):
        stdin, stdout = _vmm(directory)
        os.write(stdout, text)
        os.close(stdin)
        os.close(stdout)
        assert fifos.read(100) == text
        with trio.move_on_after(0) as scope:
            await fifos.wait()
        assert scope.cancelled_caught


async def test_unread_output_stays_for_whoever_opens_the_fifos_next(directory: Path) -> None:
    first = Fifos(str(directory))
    stdin, stdout = _vmm(directory)
    kept = os.open(directory / OUTPUT, os.O_RDWR)
    first.close()
    os.write(stdout, b"meanwhile")
    second = Fifos(str(directory))
    assert second.read(100) == b"meanwhile"
    second.close()
    os.close(kept)
    os.close(stdin)
    os.close(stdout)


async def test_a_fifo_keeps_a_mebibyte_where_the_host_allows(directory: Path, fifos: Fifos) -> None:
    allowed = int(Path("/proc/sys/fs/pipe-max-size").read_text())
    if os.geteuid() != 0 or allowed < 1 << 20:
        pytest.skip("needs root and fs.pipe-max-size of 1 MiB")
    assert fcntl.fcntl(fifos._output, fcntl.F_GETPIPE_SZ) == 1 << 20


@pytest.mark.parametrize("name", [INPUT, OUTPUT])
async def test_what_is_no_fifo_is_replaced_and_a_link_not_followed(
    directory: Path, name: str
) -> None:
    directory.mkdir()
    other = directory.parent / "other"
    other.write_bytes(b"untouched")
    for make in (Path.touch, lambda path: path.symlink_to(other)):
        (directory / name).unlink(missing_ok=True)
        make(directory / name)
        Fifos(str(directory)).close()
        assert stat.S_ISFIFO((directory / name).lstat().st_mode)
    assert other.read_bytes() == b"untouched"


async def test_a_link_in_the_directorys_place_is_refused(directory: Path) -> None:
    target = directory.parent / "elsewhere"
    target.mkdir()
    directory.symlink_to(target)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CocoonError, match=str(directory)):
        Fifos(str(directory))
    assert os.listdir(target) == []
    assert len(os.listdir("/proc/self/fd")) == before


async def test_input_to_a_guest_that_does_not_read_ends_in_time(fifos: Fifos) -> None:
    capacity = fcntl.fcntl(fifos._input, fcntl.F_GETPIPE_SZ)
    assert await fifos.write(b"x" * (capacity + 10_000), 0.01) == capacity
    assert await fifos.write(b"x", 0.01) == 0


async def test_input_goes_on_when_the_guest_reads_again(directory: Path, fifos: Fifos) -> None:
    stdin, stdout = _vmm(directory)
    data = os.urandom(200_000)
    received = b""

    async def read() -> None:
        nonlocal received
        while len(received) < len(data):
            await trio.lowlevel.wait_readable(stdin)
            received += os.read(stdin, 10_000)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        assert await fifos.write(data, 60) == len(data)
    assert received == data
    os.close(stdin)
    os.close(stdout)


async def test_writers_take_turns(directory: Path, fifos: Fifos) -> None:
    stdin, stdout = _vmm(directory)
    pieces = [bytes([65 + number]) * 30_000 for number in range(5)]
    received = b""

    async def write(piece: bytes) -> None:
        assert await fifos.write(piece, 60) == len(piece)

    async with trio.open_nursery() as nursery:
        for piece in pieces:
            nursery.start_soon(write, piece)
        while len(received) < 150_000:
            await trio.lowlevel.wait_readable(stdin)
            received += os.read(stdin, 10_000)
    assert sorted(received[start : start + 30_000] for start in range(0, 150_000, 30_000)) == pieces
    os.close(stdin)
    os.close(stdout)


async def test_closing_wakes_who_waits(fifos: Fifos) -> None:
    capacity = fcntl.fcntl(fifos._input, fcntl.F_GETPIPE_SZ)
    await fifos.write(b"x" * capacity, 1)
    closed = 0

    async def expect_closed(waiting: object) -> None:
        nonlocal closed
        with pytest.raises(trio.ClosedResourceError):
            await waiting  # type: ignore[misc]
        closed += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_closed, fifos.wait())
        nursery.start_soon(expect_closed, fifos.write(b"x", 60))
        await trio.testing.wait_all_tasks_blocked()
        fifos.close()
        fifos.close()
    assert closed == 2
    await expect_closed(fifos.wait())
    await expect_closed(fifos.write(b"x", 60))


async def test_the_fifos_are_removed_by_name(directory: Path, fifos: Fifos) -> None:
    (directory / "other").touch()
    remove_fifos(str(directory))
    remove_fifos(str(directory))
    assert os.listdir(directory) == ["other"]


class _Notify:
    """What listens in systemd's place."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.socket.setblocking(False)

    def receive(self) -> tuple[list[str], int, list[int]]:
        """The assignments of the next message, the sender's process, the descriptors."""
        message, ancillary, _, _ = self.socket.recvmsg(4096, 1024)
        pid = 0
        descriptors: list[int] = []
        for _, kind, data in ancillary:
            if kind == socket.SCM_CREDENTIALS:
                pid, _, _ = struct.unpack("3i", data)
            elif kind == socket.SCM_RIGHTS:
                descriptors += struct.unpack(f"{len(data) // 4}i", data)
        return message.decode().split("\n"), pid, descriptors


@pytest.fixture
def notify(tmp_path: Path) -> Iterator[_Notify]:
    made = _Notify(tmp_path / "notify")
    yield made
    made.socket.close()


async def test_both_fifos_are_stored_once_each_in_the_name_of_the_process(
    directory: Path, fifos: Fifos, notify: _Notify
) -> None:
    await fifos.keep(os.getpid(), notify.path)
    assert notify.receive() == (["FDSTOREREMOVE=1", "FDNAME=console"], os.getpid(), [])
    assignments, pid, descriptors = notify.receive()
    assert assignments == ["FDSTORE=1", "FDNAME=console"]
    assert pid == os.getpid()
    for fd, path in zip(descriptors, (INPUT, OUTPUT), strict=True):
        assert os.fstat(fd).st_ino == (directory / path).stat().st_ino
        assert os.get_blocking(fd) is False
        os.close(fd)
    with pytest.raises(BlockingIOError):
        notify.receive()


async def test_what_is_stored_shares_no_flags_with_what_the_agent_reads(
    fifos: Fifos, notify: _Notify
) -> None:
    await fifos.keep(os.getpid(), notify.path)
    notify.receive()  # that what an earlier agent stored goes
    for fd in notify.receive()[2]:
        os.set_blocking(fd, True)
        os.close(fd)
    assert fifos.read(1) == b""  # would hang


async def test_another_process_may_be_named_by_root(fifos: Fifos, notify: _Notify) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    await fifos.keep(1, notify.path)
    assert notify.receive()[1] == 1


async def test_a_process_that_has_ended_needs_no_store(fifos: Fifos, notify: _Notify) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    gone = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(gone, 0)
    await fifos.keep(gone, notify.path)


async def test_a_systemd_that_does_not_listen_is_told_as_such(
    fifos: Fifos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "KEEP_TIMEOUT", 0.01)
    with pytest.raises(Failed, match="No such file"):
        await fifos.keep(os.getpid(), str(tmp_path / "nothing"))
    full = _Notify(tmp_path / "full")
    with contextlib.ExitStack() as senders, contextlib.suppress(BlockingIOError):
        while True:
            sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            senders.enter_context(sender).setblocking(False)
            for _ in range(100):  # few enough for the sender's own buffer
                sender.sendto(b"x", full.path)
    with pytest.raises(TimedOut):
        await fifos.keep(os.getpid(), full.path)
    full.socket.close()
