"""The bus against a real dbus-daemon: calls, signals, descriptors, a bus that comes and goes."""

import contextlib
import functools
import logging
import os
import random
import signal as signals
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from dbus_next.signature import Variant

from agent.systemd.bus import (
    Bus,
    BusError,
    BusGone,
    BusTimeout,
    Gap,
    Match,
    Received,
    Signals,
    open_bus,
)

pytestmark = pytest.mark.anyio

PEER = "test.Peer"
PATIENCE = 60.0

# What a system bus allows applies here too: nothing in it sets a limit.
CONFIGURATION = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*"/>
    <allow receive_sender="*"/>
    <allow own="*"/>
    <allow user="*"/>
  </policy>
</busconfig>
"""


class Daemon:
    """A dbus-daemon of the test's own."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "bus"
        self.address = f"unix:path={self.socket}"
        self._configuration = directory / "bus.conf"
        self._configuration.write_text(CONFIGURATION.format(socket=self.socket))
        self._peers: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        self.process = subprocess.Popen(
            ["dbus-daemon", f"--config-file={self._configuration}", "--nofork", "--print-address"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith("unix:")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def start_peer(self, name: str = PEER) -> None:
        peer = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("bus_peer.py"), self.socket, name],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._peers.append(peer)
        assert peer.stdout is not None
        assert peer.stdout.readline() == "ready\n"

    def close(self) -> None:
        self.kill()
        for peer in self._peers:
            peer.kill()
            peer.communicate()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path)
    daemon.start()
    yield daemon
    daemon.close()


@pytest.fixture
async def bus(daemon: Daemon) -> AsyncIterator[Bus]:
    async with open_bus(daemon.address) as bus:
        yield bus


@pytest.fixture
def peer(daemon: Daemon) -> None:
    daemon.start_peer()


@pytest.fixture(autouse=True)
def no_descriptor_is_left_open() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before


async def call(bus: Bus, member: str, signature: str = "", *body: Any, **options: Any) -> Received:
    return await bus.call(PEER, "/peer", "test.Peer", member, signature, body, **options)


async def ask_the_bus(bus: Bus, member: str, signature: str = "", *body: Any) -> Any:
    name = "org.freedesktop.DBus"
    return (await bus.call(name, "/org/freedesktop/DBus", name, member, signature, body)).body[0]


async def next_of(received: Signals) -> Received | Gap:
    with trio.fail_after(PATIENCE):
        return await anext(received)


async def numbers(received: Signals, count: int) -> list[int]:
    """The numbers in the next signals."""
    signals = [await next_of(received) for _ in range(count)]
    return [signal.body[0] for signal in signals if isinstance(signal, Received)]


TICKS = Match(sender=PEER, interface="test.Peer", member="Tick")


@pytest.mark.usefixtures("peer")
class TestCalls:
    async def test_an_answer_has_what_the_callee_gave(self, bus: Bus) -> None:
        body = ["text", 2**63, [["a", True]], {"k": Variant("(is)", [-1, "x"])}, b"\0\1"]
        assert (await call(bus, "Echo", "sta(sb)a{sv}ay", *body)).body == body

    async def test_an_error_has_its_name_and_text(self, bus: Bus) -> None:
        with pytest.raises(BusError) as raised:
            await call(bus, "Fail", "ss", "test.Error.Odd", "is odd")
        assert (raised.value.name, raised.value.text) == ("test.Error.Odd", "is odd")
        assert str(raised.value) == "is odd (test.Error.Odd)"

    async def test_an_error_may_have_no_text(self, bus: Bus) -> None:
        with pytest.raises(BusError) as raised:
            await call(bus, "Fail", "s", "test.Error.Odd")
        assert (raised.value.name, raised.value.text) == ("test.Error.Odd", "")

    async def test_calling_nobody_is_an_error_of_the_bus(self, bus: Bus) -> None:
        with pytest.raises(BusError) as raised:
            await bus.call("test.Nobody", "/", "test.Nobody", "Do")
        assert raised.value.name == "org.freedesktop.DBus.Error.ServiceUnknown"

    async def test_a_callee_that_leaves_during_the_call_is_an_error_of_the_bus(
        self, bus: Bus
    ) -> None:
        with pytest.raises(BusError) as raised:
            await call(bus, "Leave")
        assert raised.value.name == "org.freedesktop.DBus.Error.NoReply"

    async def test_thousands_at_once_each_get_their_own_answer(self, bus: Bus) -> None:
        answers: dict[int, int] = {}

        async def ask(number: int) -> None:
            answers[number] = (await call(bus, "Echo", "u", number)).body[0]

        async with trio.open_nursery() as nursery:
            for number in range(5000):
                nursery.start_soon(ask, number)
        assert answers == {number: number for number in range(5000)}

    async def test_a_burst_that_fills_the_socket_arrives_whole(
        self, bus: Bus, daemon: Daemon, rng: random.Random
    ) -> None:
        bodies = [rng.randbytes(rng.randrange(100_000)) for _ in range(90)]
        answers: dict[int, bytes] = {}

        async def ask(number: int) -> None:
            answers[number] = (await call(bus, "Echo", "ay", bodies[number])).body[0]

        daemon.signal(signals.SIGSTOP)
        async with trio.open_nursery() as nursery:
            for number in range(len(bodies)):
                nursery.start_soon(ask, number)
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert not answers
            daemon.signal(signals.SIGCONT)
        assert answers == dict(enumerate(bodies))

    async def test_twenty_mebibytes_go_both_ways_while_small_calls_go_on(
        self, bus: Bus, rng: random.Random
    ) -> None:
        big = rng.randbytes(20 << 20)
        answer = None

        async def ask() -> None:
            nonlocal answer
            answer = (await call(bus, "Echo", "ay", big)).body[0]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            for number in range(50):
                assert (await call(bus, "Echo", "u", number)).body == [number]
        assert answer == big

    async def test_a_message_beyond_what_dbus_allows_is_refused_here(self, bus: Bus) -> None:
        with pytest.raises(ValueError, match="134"):
            await call(bus, "Echo", "ay", bytes(128 << 20))
        assert (await call(bus, "Echo", "u", 1)).body == [1]

    async def test_a_message_beyond_what_the_bus_allows_costs_the_connection_only(
        self, bus: Bus
    ) -> None:
        with pytest.raises(BusGone):
            await call(bus, "Echo", "ay", bytes(40 << 20))
        assert (await call(bus, "Echo", "u", 1)).body == [1]

    async def test_a_body_that_does_not_fit_its_signature_harms_nobody_else(self, bus: Bus) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(call, bus, "Echo", "s", "text"))
            with pytest.raises(ValueError, match="BYTE"):
                await call(bus, "Echo", "y", 256)
        assert (await call(bus, "Echo", "u", 1)).body == [1]

    async def test_who_calls_us_is_told_that_there_is_nothing(self, bus: Bus) -> None:
        assert (await call(bus, "CallBack")).body == ["org.freedesktop.DBus.Error.UnknownMethod"]


@pytest.mark.usefixtures("peer")
class TestAnswersThatDoNotCome:
    async def test_a_call_ends_with_its_time_and_others_go_on(self, bus: Bus) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(call, bus, "Echo", "u", 1))
            with pytest.raises(BusTimeout, match=r"test\.Peer did not answer Never within 0\.05 s"):
                await call(bus, "Never", timeout=0.05)
        assert (await call(bus, "Echo", "u", 2)).body == [2]

    async def test_a_cancelled_call_leaves_nothing_behind_when_its_answer_comes(
        self, bus: Bus
    ) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(call, bus, "Hold")
            await trio.testing.wait_all_tasks_blocked(0.1)
            nursery.cancel_scope.cancel()
        # Each late answer carries a descriptor: the fixture counts them.
        await call(bus, "Release")
        assert (await call(bus, "Echo", "u", 2)).body == [2]

    async def test_an_answer_after_the_time_out_is_dropped(self, bus: Bus) -> None:
        with pytest.raises(BusTimeout):
            await call(bus, "Hold", timeout=0.05)
        await call(bus, "Release")

    async def test_calls_beyond_what_the_bus_allows_wait_for_their_turn(self, bus: Bus) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(99):
                nursery.start_soon(call, bus, "Never")
            for number in range(100):
                assert (await call(bus, "Echo", "u", number)).body == [number]
            nursery.cancel_scope.cancel()


@pytest.mark.usefixtures("peer")
class TestDescriptors:
    async def test_one_that_is_sent_reaches_the_callee_and_stays_ours(self, bus: Bus) -> None:
        reading, writing = os.pipe()
        await call(bus, "Write", "hs", 0, "hello", fds=[writing])
        os.close(writing)
        assert os.read(reading, 100) == b"hello"
        assert os.read(reading, 100) == b""
        os.close(reading)

    async def test_one_closed_after_the_call_was_cancelled_is_sent_all_the_same(
        self, bus: Bus, daemon: Daemon
    ) -> None:
        reading, writing = os.pipe()
        daemon.signal(signals.SIGSTOP)
        async with trio.open_nursery() as nursery:
            # What comes first fills the socket, so that the descriptor has to wait.
            nursery.start_soon(call, bus, "Echo", "ay", bytes(1 << 20))
            await trio.testing.wait_all_tasks_blocked(0.1)
            with trio.move_on_after(0.05):
                await call(bus, "Write", "hs", 0, "hello", fds=[writing])
            os.close(writing)
            daemon.signal(signals.SIGCONT)
        assert await trio.to_thread.run_sync(os.read, reading, 100) == b"hello"
        os.close(reading)

    async def test_one_is_sent_once_with_a_message_that_takes_several_writes(
        self, bus: Bus, daemon: Daemon
    ) -> None:
        reading, writing = os.pipe()
        daemon.signal(signals.SIGSTOP)
        async with trio.open_nursery() as nursery:
            body = [0, "hello", bytes(2 << 20)]
            nursery.start_soon(functools.partial(call, bus, "Write", "hsay", *body, fds=[writing]))
            await trio.testing.wait_all_tasks_blocked(0.1)
            daemon.signal(signals.SIGCONT)
        os.close(writing)
        assert await trio.to_thread.run_sync(os.read, reading, 100) == b"hello"
        assert await trio.to_thread.run_sync(os.read, reading, 100) == b""
        os.close(reading)

    async def test_many_that_come_belong_to_their_answers(self, bus: Bus) -> None:
        async def ask(number: int) -> None:
            texts = [f"{number}/{index}" for index in range(number % 17)]
            answer = await call(bus, "Open", "as", texts)
            assert answer.body == [list(range(len(texts)))]
            for fd, text in zip(answer.fds, texts, strict=True):
                assert not os.get_inheritable(fd)
                assert os.read(fd, 100) == text.encode()
                os.close(fd)

        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(ask, number)

    async def test_those_of_an_error_are_nobodys(self, bus: Bus) -> None:
        with open("/dev/null") as file, pytest.raises(BusError):
            await call(bus, "Fail", "sh", "test.Error.Odd", 0, fds=[file.fileno()])


@pytest.mark.usefixtures("peer")
class TestSignals:
    async def test_ten_thousand_come_in_order_to_a_slow_consumer(self, bus: Bus) -> None:
        async with bus.subscribe(TICKS) as received:
            await call(bus, "Tick", "uus", 0, 10_000, "/peer")
            assert await numbers(received, 10_000) == list(range(10_000))

    async def test_each_subscriber_gets_what_it_asked_for_once(self, bus: Bus) -> None:
        below = Match(sender=PEER, path_namespace="/peer/one")
        async with (
            bus.subscribe(TICKS, below, Match(path="/peer/one/x")) as everything,
            bus.subscribe(below) as some,
        ):
            await call(bus, "Tick", "uus", 0, 2, "/peer/one/x")
            await call(bus, "Tick", "uus", 2, 4, "/peer/one")
            await call(bus, "Tick", "uus", 4, 6, "/peer/onerous")
            await call(bus, "Tick", "uus", 6, 7, "/peer/one/y")
            assert await numbers(everything, 7) == [0, 1, 2, 3, 4, 5, 6]
            assert await numbers(some, 5) == [0, 1, 2, 3, 6]

    async def test_who_stops_listening_leaves_others_their_rules(self, bus: Bus) -> None:
        async with bus.subscribe(TICKS) as lasting:
            async with bus.subscribe(TICKS) as passing:
                await call(bus, "Tick", "uus", 0, 1, "/peer")
                assert await numbers(passing, 1) == [0]
            await call(bus, "Tick", "uus", 1, 2, "/peer")
            assert await numbers(lasting, 2) == [0, 1]

    async def test_rules_are_taken_back(self, bus: Bus) -> None:
        async def rules() -> int:
            stats = await ask_the_bus_for_stats(bus)
            return int(stats["MatchRules"].value)

        before = await rules()
        async with bus.subscribe(TICKS), bus.subscribe(TICKS, Match(member="Other")):
            assert await rules() > before
        assert await rules() == before

    async def test_a_rule_that_the_bus_refuses_is_an_error(self, bus: Bus) -> None:
        with pytest.raises(BusError) as raised:
            async with bus.subscribe(Match(path="no path")):
                pass
        assert raised.value.name == "org.freedesktop.DBus.Error.MatchRuleInvalid"
        assert (await call(bus, "Echo", "u", 1)).body == [1]

    async def test_one_sent_by_a_stranger_is_not_believed(self, bus: Bus, daemon: Daemon) -> None:
        daemon.start_peer("test.Stranger")
        async with bus.subscribe(TICKS) as received, bus.subscribe(Match(member="Tick")) as any_:
            await bus.call("test.Stranger", "/peer", "test.Peer", "Whisper", "u", [666])
            await call(bus, "Whisper", "u", 1)
            assert await numbers(received, 1) == [1]
            assert await numbers(any_, 2) == [666, 1]

    async def test_arguments_are_matched(self, bus: Bus, daemon: Daemon) -> None:
        owners = Match("org.freedesktop.DBus", member="NameOwnerChanged", arg0="test.Other")
        async with bus.subscribe(owners) as received:
            daemon.start_peer("test.Unwanted")
            daemon.start_peer("test.Other")
            signal = await next_of(received)
            assert isinstance(signal, Received)
            assert signal.body[:2] == ["test.Other", ""]


class TestABusThatGoesAway:
    async def test_pending_calls_fail(self, bus: Bus, daemon: Daemon, peer: None) -> None:
        async def fail() -> None:
            with pytest.raises(BusGone):
                await call(bus, "Never")

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(fail)
            await trio.testing.wait_all_tasks_blocked(0.1)
            daemon.kill()

    async def test_calls_wait_for_its_return(self, bus: Bus, daemon: Daemon) -> None:
        daemon.kill()
        identity = None

        async def ask() -> None:
            nonlocal identity
            with contextlib.suppress(BusGone):  # it went before the bus noticed
                await ask_the_bus(bus, "GetId")
            identity = await ask_the_bus(bus, "GetId")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked(0.2)
            assert identity is None
            daemon.start()
        assert identity

    async def test_a_call_that_waited_in_vain_fails(self, bus: Bus, daemon: Daemon) -> None:
        async with bus.subscribe(Match(member="Tick")) as received:
            daemon.kill()
            daemon.start()
            assert isinstance(await next_of(received), Gap)
            daemon.kill()
            await trio.testing.wait_all_tasks_blocked(0.1)
            with pytest.raises(BusGone, match=r"could not be reached within 0\.2 s"):
                await bus.call("test.Nobody", "/", "test.Nobody", "Do", timeout=0.2)

    async def test_subscribers_are_told_and_get_signals_again(
        self, bus: Bus, daemon: Daemon, peer: None, rounds: Callable[[int, int], int]
    ) -> None:
        async with bus.subscribe(TICKS) as received, bus.subscribe(Match(member="Tick")) as any_:
            for start in range(0, 10 * rounds(4, 50), 10):
                await call(bus, "Tick", "uus", start, start + 10, "/peer")
                assert await numbers(received, 10) == list(range(start, start + 10))
                assert await numbers(any_, 10) == list(range(start, start + 10))
                daemon.kill()
                daemon.start()
                assert isinstance(await next_of(any_), Gap)
                daemon.start_peer()
                assert isinstance(await next_of(received), Gap)

    async def test_subscribers_are_told_when_a_sender_comes_back(
        self, bus: Bus, daemon: Daemon, peer: None
    ) -> None:
        async with bus.subscribe(TICKS) as received, bus.subscribe(Match(member="Tick")) as any_:
            with pytest.raises(BusError):
                await call(bus, "Leave")
            async with trio.open_nursery() as nursery:
                # The name has no owner: this call waits for one.
                nursery.start_soon(call, bus, "Tick", "uus", 1, 2, "/peer")
                await trio.testing.wait_all_tasks_blocked(0.1)
                await trio.to_thread.run_sync(daemon.start_peer)
            assert isinstance(await next_of(received), Gap)
            assert await numbers(received, 1) == [1]
            assert await numbers(any_, 1) == [1]

    async def test_load_goes_on_whenever_it_returns(
        self, bus: Bus, daemon: Daemon, peer: None, rounds: Callable[[int, int], int]
    ) -> None:
        answered = [0] * 50

        async def keep_asking(number: int) -> None:
            while True:
                with contextlib.suppress(BusGone, BusError):
                    answer = await call(bus, "Echo", "ay", bytes(number * 1000))
                    assert answer.body == [bytes(number * 1000)]
                    answered[number] += 1

        async with bus.subscribe(TICKS), trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(keep_asking, number)
            for _ in range(rounds(3, 30)):
                daemon.kill()
                daemon.start()
                await trio.to_thread.run_sync(daemon.start_peer)
                seen = list(answered)
                while any(now <= before for now, before in zip(answered, seen, strict=True)):
                    await trio.sleep(0.001)
            nursery.cancel_scope.cancel()

    async def test_where_none_is_opening_fails(self, tmp_path: Path) -> None:
        with pytest.raises(BusGone, match="no such file|No such file"):
            async with open_bus(f"unix:path={tmp_path}/none"):
                pass

    async def test_of_several_addresses_the_one_that_answers_is_taken(
        self, daemon: Daemon, tmp_path: Path
    ) -> None:
        address = f"tcp:host=localhost,port=1;unix:path={tmp_path}/none;{daemon.address}"
        async with open_bus(address) as bus:
            assert await ask_the_bus(bus, "GetId")


class FakeBus:
    """A listener that says what a test tells it to."""

    def __init__(self, path: Path) -> None:
        self.address = f"unix:path={path}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()

    def answer_one(self, *answers: bytes) -> None:
        """Take a connection, answer whatever it sends with these, and close it."""
        connection, _ = self._listener.accept()
        with connection:
            for answer in answers:
                assert connection.recv(4096)
                connection.sendall(answer)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeBus]:
    fake = FakeBus(tmp_path / "fake")
    yield fake
    fake.close()


@pytest.mark.parametrize(
    "answers",
    [
        [b"REJECTED EXTERNAL\r\nERROR\r\n"],
        [b"OK 123\r\nERROR no descriptors here\r\n"],
        [b"OK 123\r\nAGREE_UNIX_FD\r\n", b"HTTP/1.1 400 Bad Request\r\n"],
        [b""],
    ],
)
async def test_what_is_no_bus_is_not_taken_for_one(fake: FakeBus, answers: list[bytes]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, functools.partial(fake.answer_one, *answers))
        with pytest.raises(BusGone):
            async with open_bus(fake.address):
                pass


async def test_losing_the_bus_is_logged_and_so_is_its_return(
    bus: Bus, daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with bus.subscribe(Match(member="Tick")) as received:
        daemon.kill()
        daemon.start()
        assert isinstance(await next_of(received), Gap)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


async def ask_the_bus_for_stats(bus: Bus) -> Any:
    """What the daemon counts for our connection."""
    name = "org.freedesktop.DBus"
    statistics = f"{name}.Debug.Stats"
    reply = await bus.call(name, "/org/freedesktop/DBus", statistics, "GetStats")
    return reply.body[0]
