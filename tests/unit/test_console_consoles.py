import fcntl
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio
import trio.testing

from agent.console import consoles as module
from agent.console.consoles import HISTORY, Consoles
from agent.console.fanout import ByteStream
from agent.console.source import INPUT, OUTPUT, Fifos
from agent.model.access import Access
from agent.model.config import VmConfig
from agent.model.errors import CocoonError, Invalid, TimedOut
from agent.model.vm import Vm

pytestmark = pytest.mark.anyio

VM = Vm(
    id="a" * 26,
    name="web",
    uid=65536,
    access=Access(os.geteuid(), os.getegid(), 0o770),
    config=VmConfig(),
)
OTHER = replace(VM, id="b" * 26, name="db")


class Guest:
    """The process behind the FIFOs, with its ends opened as systemd does it."""

    def __init__(self, directory: Path) -> None:
        self.stdin = os.open(directory / INPUT, os.O_RDONLY | os.O_NOCTTY)
        self.stdout = os.open(directory / OUTPUT, os.O_WRONLY | os.O_NOCTTY)

    def say(self, data: bytes) -> None:
        assert os.write(self.stdout, data) == len(data)

    async def hear(self) -> bytes:
        await trio.lowlevel.wait_readable(self.stdin)
        return os.read(self.stdin, 65536)

    def exit(self) -> None:
        os.close(self.stdin)
        os.close(self.stdout)


@dataclass
class Place:
    """Where the agents of one test keep their things."""

    path: Path

    def __post_init__(self) -> None:
        self.run = self.path / "run"
        for name in ("run", "log"):
            (self.path / name).mkdir()
        self.journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.journal.bind(str(self.path / "journal"))
        self.journal.setblocking(False)

    @asynccontextmanager
    async def agent(self, log_limit: int = 1 << 20) -> AsyncIterator[Consoles]:
        """A running agent; leaving the block ends it as SIGTERM would."""
        consoles = Consoles(
            str(self.run),
            str(self.path / "log"),
            log_limit=log_limit,
            journal_socket=str(self.path / "journal"),
            notify_socket=str(self.path / "notify"),
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(consoles.run)
            yield consoles
            nursery.cancel_scope.cancel()

    def guest(self, vm: Vm = VM) -> Guest:
        return Guest(self.path / "run" / vm.id)

    async def logged(self, last: str) -> list[str]:
        """The messages in the journal up to one that is `last`, as they come."""
        found: list[str] = []
        while last not in found[-1:]:
            await trio.lowlevel.wait_readable(self.journal)
            entry = self.journal.recv(65536)
            found.append(entry.split(b"\n")[0].removeprefix(b"MESSAGE=").decode())
        return found


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def read_until(stream: ByteStream, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        piece = await stream.read(65536)
        assert piece, f"the stream ended after {data[-100:]!r}"
        data += piece
    return data


async def whole_log(consoles: Consoles, vm: Vm = VM) -> bytes:
    return await consoles.log(vm.id).pread(0, 1 << 30)


async def connect(consoles: Consoles, vm: Vm = VM) -> trio.SocketStream:
    return await trio.open_unix_socket(consoles.socket_path(vm.id))


async def receive_until(client: trio.SocketStream, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        piece = await client.receive_some(65536)
        assert piece, f"the socket ended after {data[-100:]!r}"
        data += piece
    return data


async def test_output_reaches_the_log_the_stream_the_socket_and_the_journal(place: Place) -> None:
    async with place.agent() as consoles:
        await consoles.open(VM)
        consoles.speak_for(VM, os.getpid())
        guest = place.guest()
        async with consoles.live(VM.id) as stream, await connect(consoles) as client:
            await trio.testing.wait_all_tasks_blocked()
            guest.say(b"count 1\n")
            assert await read_until(stream, b"\n") == b"count 1\n"
            assert await receive_until(client, b"\n") == b"count 1\n"
        assert await whole_log(consoles) == b"count 1\n"
        assert consoles.log(VM.id).size == 8
        assert await place.logged("count 1") == ["count 1"]
        guest.exit()


async def test_what_is_written_reaches_the_guest(place: Place) -> None:
    async with place.agent() as consoles:
        await consoles.open(VM)
        guest = place.guest()
        assert await consoles.write(VM.id, b"hello\n") == 6
        assert await guest.hear() == b"hello\n"
        async with await connect(consoles) as client:
            await client.send_all(b"from the socket\n")
            assert await guest.hear() == b"from the socket\n"
        guest.exit()


async def test_input_is_refused_when_no_process_can_read_it(place: Place) -> None:
    async with place.agent() as consoles:
        with pytest.raises(Invalid, match="no process"):
            await consoles.write(VM.id, b"x")
        await consoles.open(VM)
        await consoles.close(VM)
        with pytest.raises(Invalid, match="no process"):
            await consoles.write(VM.id, b"x")


async def test_input_that_waits_when_the_vm_stops_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with place.agent() as consoles:
        await consoles.open(VM)
        monkeypatch.setattr(module, "WRITE_TIMEOUT", 60.0)
        input_fifo = os.open(place.path / "run" / VM.id / INPUT, os.O_RDWR | os.O_NONBLOCK)
        os.write(input_fifo, b"x" * fcntl.fcntl(input_fifo, fcntl.F_GETPIPE_SZ))

        async def refused() -> None:
            with pytest.raises(Invalid, match="stopped"):
                await consoles.write(VM.id, b"x")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(refused)
            await trio.testing.wait_all_tasks_blocked()
            await consoles.close(VM)
        os.close(input_fifo)


async def test_a_guest_that_does_not_read_times_out_and_holds_nobody(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WRITE_TIMEOUT", 0.01)
    async with place.agent() as consoles:
        await consoles.open(VM)
        guest = place.guest()
        taken = await consoles.write(VM.id, b"x" * (1 << 21))
        assert 0 < taken < 1 << 21
        with pytest.raises(TimedOut):
            await consoles.write(VM.id, b"x")
        async with await connect(consoles) as client:
            await client.send_all(b"lost")
            guest.say(b"still here\n")
            assert await receive_until(client, b"\n") == b"still here\n"
        guest.exit()


async def test_a_stream_begins_with_the_last_64_kib_and_misses_nothing(place: Place) -> None:
    async with place.agent() as consoles:
        await consoles.open(VM)
        guest = place.guest()
        sent = b"".join(b"line %06d\n" % number for number in range(20_000))
        done = trio.Event()
        collected: list[bytes] = []

        async def read(delay: int) -> None:
            for _ in range(delay):
                await trio.sleep(0.002)
            async with consoles.live(VM.id) as stream:
                collected.append(await read_until(stream, b"line 019999\n"))
            if len(collected) == 20:
                done.set()

        async with trio.open_nursery() as nursery:
            for delay in range(20):
                nursery.start_soon(read, delay)
            for start in range(0, len(sent), 4000):
                guest.say(sent[start : start + 4000])
                await trio.sleep(0.001)
            await done.wait()
        for data in collected:
            assert sent.endswith(data)
            assert len(data) >= HISTORY
        guest.exit()


async def test_stream_and_log_go_on_over_a_stop_and_a_start(place: Place) -> None:
    async with place.agent() as consoles:
        async with consoles.live(VM.id) as stream:
            for text in (b"first boot\n", b"second boot\n"):
                await consoles.open(VM)
                guest = place.guest()
                guest.say(text)
                assert await read_until(stream, b"\n") == text
                guest.exit()
                await consoles.close(VM)
        assert await whole_log(consoles) == b"first boot\nsecond boot\n"


async def test_the_last_words_of_a_vmm_are_read_at_the_close(place: Place) -> None:
    async with place.agent() as consoles:
        await consoles.open(VM)
        guest = place.guest()
        words = b"x" * 200_000 + b"\npanic"
        async with await connect(consoles) as client:
            await trio.testing.wait_all_tasks_blocked()
            guest.say(words)
            guest.exit()
            await consoles.close(VM)
            assert await receive_until(client, b"panic") == words
            assert await client.receive_some(1) == b""
        assert await whole_log(consoles) == words
        await place.logged("panic")
        assert not os.path.lexists(consoles.socket_path(VM.id))


@pytest.mark.parametrize("how", ["stopped", "killed"])
async def test_an_agent_that_comes_back_reads_what_was_said_meanwhile(
    place: Place, how: str
) -> None:
    kept = []
    guest = None

    async def first_agent(consoles: Consoles) -> None:
        nonlocal guest
        await consoles.open(VM)
        guest = place.guest()
        # What systemd's fd store holds
        kept.append(os.open(place.path / "run" / VM.id / OUTPUT, os.O_RDWR))
        kept.append(os.open(place.path / "run" / VM.id / INPUT, os.O_RDWR))
        guest.say(b"before\n")
        async with consoles.live(VM.id) as stream:
            await read_until(stream, b"before\n")

    async with place.agent() as consoles:
        await first_agent(consoles)
        path = consoles.socket_path(VM.id)
        os.link(path, place.path / "socket")
    if how == "killed":  # then the socket's name is still there
        os.rename(place.path / "socket", path)
    assert guest is not None
    guest.say(b"meanwhile\n")
    async with place.agent() as consoles:
        assert not os.path.lexists(consoles.socket_path(VM.id))
        await consoles.adopt(VM)
        async with consoles.live(VM.id) as stream:
            await read_until(stream, b"meanwhile\n")
            guest.say(b"after\n")
            await read_until(stream, b"after\n")
        await consoles.write(VM.id, b"input\n")
        assert await guest.hear() == b"input\n"
        (await connect(consoles)).socket.close()
        assert await whole_log(consoles) == b"before\nmeanwhile\nafter\n"
    guest.exit()
    for fd in kept:
        os.close(fd)


async def test_a_console_that_is_open_stays_as_it_is(place: Place) -> None:
    async with place.agent() as consoles:
        await consoles.open(VM)
        guest = place.guest()
        async with await connect(consoles) as client:
            await consoles.open(VM)
            await consoles.adopt(VM)
            guest.say(b"once\n")
            assert await receive_until(client, b"\n") == b"once\n"
        guest.exit()


async def test_a_console_that_cannot_be_made_leaves_nothing(place: Place) -> None:
    (place.path / "run" / VM.id).touch()
    async with place.agent() as consoles:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(CocoonError, match=VM.id):
            await consoles.open(VM)
        assert len(os.listdir("/proc/self/fd")) == before
        (place.path / "run" / VM.id).unlink()
        await consoles.open(VM)


async def test_a_removed_vm_leaves_nothing_and_its_streams_end(place: Place) -> None:
    async with place.agent() as consoles:
        await consoles.open(VM)
        guest = place.guest()
        guest.say(b"bye")
        guest.exit()
        async with consoles.live(VM.id) as stream:
            await consoles.forget(VM)
            assert await read_until(stream, b"bye") == b"bye"
            assert await stream.read(1) == b""
        await consoles.forget(VM)
        assert os.listdir(place.path / "log") == []
        assert os.listdir(place.path / "run" / VM.id) == []
        assert os.listdir(place.path / "run" / "console") == []
        assert not consoles._consoles


async def test_the_streams_end_when_the_agent_leaves(place: Place) -> None:
    ended = []

    async def read(consoles: Consoles, started: Callable[[], None]) -> None:
        async with consoles.live(VM.id) as stream:
            started()
            ended.append(await stream.read(1))

    async with trio.open_nursery() as nursery, place.agent() as consoles:
        await consoles.open(VM)
        waiting = trio.Event()
        nursery.start_soon(read, consoles, waiting.set)
        await waiting.wait()
    assert ended == [b""]
    assert os.listdir(place.path / "run" / "console") == []


async def test_a_stream_that_is_left_while_the_vm_starts_takes_nothing_with_it(
    place: Place,
) -> None:
    async with place.agent() as consoles, trio.open_nursery() as nursery:
        async with consoles.live(VM.id):
            nursery.start_soon(consoles.open, VM)
            await trio.sleep(0)
        await trio.testing.wait_all_tasks_blocked(0.05)
        guest = place.guest()
        async with consoles.live(VM.id) as stream:
            guest.say(b"here\n")
            assert await read_until(stream, b"\n") == b"here\n"
        guest.exit()


async def test_nothing_is_held_for_vms_that_do_not_run(place: Place) -> None:
    async with place.agent() as consoles:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            await consoles.open(VM)
            place.guest().exit()
            await consoles.close(VM)
        for number in range(100):
            vm_id = f"{number:026}"
            assert consoles.log(vm_id).size == 0
            async with consoles.live(vm_id):
                pass
        await trio.testing.wait_all_tasks_blocked()
        assert len(os.listdir("/proc/self/fd")) == before
        assert not consoles._consoles


async def test_an_idle_console_wakes_nobody(place: Place) -> None:
    class Steps(trio.abc.Instrument):
        count = 0

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            self.count += 1

    async with place.agent() as consoles:
        for number in range(20):
            vm = replace(VM, id=f"{number:026}")
            await consoles.open(vm)
        await trio.testing.wait_all_tasks_blocked()
        steps = Steps()
        trio.lowlevel.add_instrument(steps)
        await trio.sleep(0.3)
        trio.lowlevel.remove_instrument(steps)
        assert steps.count <= 3  # this test's own


async def test_a_guest_that_floods_holds_neither_the_loop_nor_another_console(
    place: Place,
) -> None:
    stop = threading.Event()

    def flood(fd: int) -> None:
        while not stop.is_set():
            try:
                os.write(fd, b"flood, flood, flood\n" * 200)
            except BlockingIOError:
                stop.wait(0.001)

    async with place.agent(log_limit=1 << 18) as consoles:
        for vm in (VM, OTHER):
            await consoles.open(vm)
            consoles.speak_for(vm, os.getpid())
        noisy, quiet = place.guest(), place.guest(OTHER)
        os.set_blocking(noisy.stdout, False)
        async with trio.open_nursery() as nursery, consoles.live(OTHER.id) as stream:
            nursery.start_soon(trio.to_thread.run_sync, flood, noisy.stdout)
            nursery.start_soon(place.logged, "quiet 29")
            try:
                for number in range(30):
                    text = b"quiet %d\n" % number
                    quiet.say(text)
                    assert await read_until(stream, b"\n") == text
                    assert consoles.log(VM.id).size <= 1 << 18
            finally:
                stop.set()
        for guest in (noisy, quiet):
            guest.exit()


async def test_a_full_disk_costs_the_log_and_no_more(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with place.agent() as consoles:
        await consoles.open(VM)
        guest = place.guest()
        log = consoles.log(VM.id)
        real = type(log).append_from

        async def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        async with consoles.live(VM.id) as stream:
            with monkeypatch.context() as patch:
                patch.setattr(type(log), "append_from", full)
                for text in (b"one\n", b"two\n"):
                    guest.say(text)
                    assert await read_until(stream, b"\n") == text
            assert type(log).append_from is real
            guest.say(b"three\n")
            assert await read_until(stream, b"\n") == b"three\n"
        assert await whole_log(consoles) == b"three\n"
        assert [record.getMessage() for record in caplog.records] == [
            f"console log of {VM.id}: output is lost: [Errno 28] No space left on device"
        ]
        guest.exit()


async def test_any_number_of_clients_sees_the_same_and_a_slow_one_holds_nobody(
    place: Place,
) -> None:
    async with place.agent() as consoles:
        await consoles.open(VM)
        guest = place.guest()
        slow = await connect(consoles)
        clients = [await connect(consoles) for _ in range(20)]
        await trio.testing.wait_all_tasks_blocked()
        line = b"x" * 999 + b"\n"

        async def check(client: trio.SocketStream) -> None:
            data = await receive_until(client, b"end\n")
            assert data == line * 2000 + b"end\n"

        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(check, client)
            for _ in range(200):
                guest.say(line * 10)
                await trio.sleep(0.005)
            guest.say(b"end\n")
        for client in clients:
            await client.aclose()
        slow.socket.close()
        guest.exit()


async def test_more_clients_than_there_may_be_are_turned_away(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.console.sockets.MOST_CLIENTS", 2)
    async with place.agent() as consoles:
        await consoles.open(VM)
        guest = place.guest()
        clients = []
        for _ in range(2):
            clients.append(await connect(consoles))
            await trio.testing.wait_all_tasks_blocked()
        async with await connect(consoles) as third:
            assert await third.receive_some(1) == b""
        guest.say(b"on\n")
        for client in clients:
            assert await receive_until(client, b"\n") == b"on\n"
            await client.aclose()
        guest.exit()


async def test_a_client_that_shuts_down_its_input_still_gets_the_answer(place: Place) -> None:
    async with place.agent() as consoles:
        await consoles.open(VM)
        guest = place.guest()
        async with await connect(consoles) as client:
            await client.send_all(b"question\n")
            await client.send_eof()
            assert await guest.hear() == b"question\n"
            await trio.testing.wait_all_tasks_blocked()
            guest.say(b"answer\n")
            assert await receive_until(client, b"\n") == b"answer\n"
        guest.exit()


async def test_a_client_that_hangs_up_is_forgotten_though_the_guest_is_quiet(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.console.sockets._HANG_UP_CHECK", 0.01)
    async with place.agent() as consoles:
        await consoles.open(VM)
        before = len(os.listdir("/proc/self/fd"))
        whole = await connect(consoles)
        half = await connect(consoles)
        await half.send_eof()
        await trio.testing.wait_all_tasks_blocked(0.005)
        await whole.aclose()
        await half.aclose()
        with trio.fail_after(10):
            while len(os.listdir("/proc/self/fd")) > before:
                await trio.sleep(0.01)


async def test_the_socket_follows_the_vms_owner_group_and_mode(place: Place) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")

    def found(consoles: Consoles) -> tuple[int, int, int]:
        status = os.stat(consoles.socket_path(VM.id))
        return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)

    async with place.agent() as consoles:
        vm = replace(VM, access=Access(1001, 1002, 0o770))
        await consoles.set_access(vm)
        await consoles.open(vm)
        assert found(consoles) == (1001, 1002, 0o660)
        await consoles.set_access(replace(VM, access=Access(1003, 1004, 0o750)))
        assert found(consoles) == (1003, 1004, 0o640)
        directory = os.stat(os.path.dirname(consoles.socket_path(VM.id)))
        assert stat.S_IMODE(directory.st_mode) == 0o755


async def test_a_run_directory_deeper_than_a_socket_path_is_no_obstacle(place: Place) -> None:
    place.run = place.path / ("d" * 100)
    place.run.mkdir()
    async with place.agent() as consoles:
        await consoles.open(VM)
        assert stat.S_ISSOCK(os.stat(consoles.socket_path(VM.id)).st_mode)


async def test_a_console_may_be_opened_again_before_its_pump_has_begun(place: Place) -> None:
    async with place.agent() as consoles:
        with consoles._using(VM.id) as console:
            await console.log.open()
            run = str(place.run / VM.id)
            there = run, consoles.socket_path(VM.id), consoles._nursery
            console.open(VM, Fifos(run), *there)
            console.release()
            console.open(VM, Fifos(run), *there)
        consoles.speak_for(VM, os.getpid())
        guest = place.guest()
        async with consoles.live(VM.id) as stream:
            guest.say(b"once\n")
            assert await read_until(stream, b"\n") == b"once\n"
        guest.exit()
