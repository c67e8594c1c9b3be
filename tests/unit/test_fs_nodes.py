"""Inode numbers, short memories, and the reading of /proc: what the tree is built on."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio

from agent.fs.context import Recent
from agent.fs.interrupt import Interrupts, is_interrupted
from agent.fs.node import Objects, Place, Refused, place_of
from agent.fs.permissions import Opener, file_of, opener_of, read_status, stream_of
from agent.model.access import Access, Caller


@pytest.mark.parametrize(
    "place", [Place(0, 1), Place(0, 255), Place(1, 1), Place(2**31 - 1, 255, 2**24 - 1)]
)
def test_an_inode_number_says_where_its_node_stands(place: Place) -> None:
    assert place_of(place.number) == place


def test_the_root_has_the_number_that_fuse_wants() -> None:
    assert Place(0, 1).number == 1


def test_inode_numbers_fit_what_user_space_can_hold() -> None:
    assert Place(2**31 - 1, 255, 2**24 - 1).number < 2**63


def test_an_object_keeps_its_number() -> None:
    objects = Objects(lambda _: True)
    assert [objects.number(name) for name in ("a", "b", "a")] == [1, 2, 1]
    assert objects.id(2) == "b"


def test_a_number_that_was_never_given_is_enoent() -> None:
    with pytest.raises(Refused) as refused:
        Objects(lambda _: True).id(7)
    assert refused.value.errno == errno.ENOENT


def test_objects_that_are_gone_take_no_room_and_their_numbers_do_not_return() -> None:
    alive: set[str] = {"stays"}
    objects = Objects(alive.__contains__)
    stays = objects.number("stays")
    objects.next_turn("stays")
    given = {objects.number(f"vm{number}") for number in range(100_000)}
    assert len(given) == 100_000
    assert len(objects) <= 1025
    assert objects.number("stays") == stays
    assert objects.turn("stays") == 1


def test_living_objects_are_swept_seldom() -> None:
    asked: list[str] = []

    def exists(name: str) -> bool:
        asked.append(name)
        return True

    objects = Objects(exists)
    for number in range(10_000):
        objects.number(f"vm{number}")
    assert len(objects) == 10_000
    assert len(asked) < 20_000


def test_a_turn_wraps_before_it_spills_into_the_object() -> None:
    objects = Objects(lambda _: True)
    for _ in range(3):
        objects.next_turn("a")
    assert objects.turn("a") == 3
    objects._turns["a"] = 2**24 - 1
    objects.next_turn("a")
    assert objects.turn("a") == 0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_is_recent_is_found_until_it_is_old() -> None:
    clock = Clock()
    recent: Recent[str, int] = Recent(10, clock)
    recent.put("a", 1)
    clock.now += 9
    assert recent.get("a") == 1
    clock.now += 1
    assert recent.get("a") is None


def test_what_is_old_takes_no_room() -> None:
    clock = Clock()
    recent: Recent[int, int] = Recent(10, clock)
    for number in range(1000):
        recent.put(number, number)
        clock.now += 1
    assert len(recent) <= 11


def test_putting_again_keeps_it_young() -> None:
    clock = Clock()
    recent: Recent[str, int] = Recent(10, clock)
    recent.put("a", 1)
    clock.now += 9
    recent.put("b", 2)
    recent.put("a", 3)
    clock.now += 9
    recent.put("c", 4)
    assert recent.get("a") == 3


@pytest.mark.parametrize(
    ("directory", "writable", "shown"),
    [
        (0o770, 0o660, 0o440),
        (0o755, 0o644, 0o444),
        (0o700, 0o600, 0o400),
        (0o777, 0o666, 0o444),
        (0o000, 0o000, 0o000),
    ],
)
def test_files_follow_the_mode_of_their_directory(
    directory: int, writable: int, shown: int
) -> None:
    access = Access(5, 6, directory)
    assert file_of(access, True, 0, 0).mode & 0o7777 == writable
    assert file_of(access, False, 0, 0).mode & 0o7777 == shown


@pytest.mark.parametrize(
    ("directory", "stream"), [(0o770, 0o440), (0o755, 0o444), (0o744, 0o400), (0o711, 0o400)]
)
def test_a_stream_is_for_who_may_pass_through_the_directory_too(
    directory: int, stream: int
) -> None:
    assert stream_of(Access(5, 6, directory), 0).mode & 0o7777 == stream


def test_an_opener_has_the_groups_of_its_process() -> None:
    opener = opener_of(os.getuid(), os.getgid(), os.getpid(), "vms/a/state")
    assert opener.caller.groups == frozenset(os.getgroups())
    assert opener.process == os.getpid()


def test_a_thread_belongs_to_its_process() -> None:
    found = []
    thread = threading.Thread(
        target=lambda: found.append(opener_of(0, 0, threading.get_native_id(), "").process)
    )
    thread.start()
    thread.join()
    assert found == [os.getpid()]


def test_an_opener_that_cannot_be_seen_has_no_groups() -> None:
    assert opener_of(1, 2, 0, "create").caller == Caller(1, 2, path="create")


@pytest.mark.skipif(os.getuid() != 0, reason="only root chooses groups")
def test_thousands_of_groups_do_not_hide_the_rest_of_the_status() -> None:
    code = "import os; os.setgroups(range(10**9, 10**9 + 5000)); print(flush=True); input()"
    with child(code) as process:
        status = read_status(process.pid)
        assert len(status[b"Groups"].split()) == 5000
        assert b"SigPnd" in status


@contextmanager
def child(code: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A Python program that has printed its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()  # type: ignore[union-attr]
        process.stdout.close()  # type: ignore[union-attr]


def opener_with(pid: int, process: int = 0) -> Opener:
    return Opener(Caller(0, 0, pid=pid), process or pid)


BLOCKING = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.{name}])
print(flush=True)
signal.sigwaitinfo([signal.SIGUSR2])
"""


def test_a_process_that_goes_about_its_business_is_not_interrupted() -> None:
    assert not is_interrupted(opener_with(os.getpid()))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGCHLD"])
def test_a_blocked_signal_interrupts_nobody(name: str) -> None:
    with child(BLOCKING.format(name=name)) as process:
        process.send_signal(getattr(signal, name))
        assert not is_interrupted(opener_with(process.pid))


STATUS = {
    b"State": b"D (disk sleep)",
    b"SigPnd": b"0000000000000000",
    b"ShdPnd": b"0000000000000000",
    b"SigBlk": b"0000000000000000",
    b"SigIgn": b"0000000000000000",
}


def mask(number: int) -> bytes:
    return b"%016x" % (1 << (number - 1))


@pytest.mark.parametrize("field", [b"SigPnd", b"ShdPnd"])
@pytest.mark.parametrize(
    ("number", "interrupts"),
    [
        (signal.SIGKILL, True),
        (signal.SIGINT, True),
        (signal.SIGALRM, True),
        (signal.SIGRTMAX, True),
        (signal.SIGCHLD, False),
        (signal.SIGURG, False),
        (signal.SIGWINCH, False),
        (signal.SIGTSTP, False),
    ],
)
def test_a_pending_signal_interrupts_if_it_would_end_a_process(
    monkeypatch: pytest.MonkeyPatch, field: bytes, number: int, interrupts: bool
) -> None:
    status = STATUS | {field: mask(number)}
    monkeypatch.setattr("agent.fs.interrupt.read_status", lambda pid: status)
    assert is_interrupted(opener_with(1)) is interrupts


@pytest.mark.parametrize("field", [b"SigBlk", b"SigIgn"])
def test_a_pending_signal_that_is_held_back_interrupts_nobody(
    monkeypatch: pytest.MonkeyPatch, field: bytes
) -> None:
    status = STATUS | {b"ShdPnd": mask(signal.SIGTERM), field: mask(signal.SIGTERM)}
    monkeypatch.setattr("agent.fs.interrupt.read_status", lambda pid: status)
    assert not is_interrupted(opener_with(1))


def test_a_process_that_is_gone_counts_as_interrupted() -> None:
    with child("print(flush=True)") as process:
        process.wait()
        assert is_interrupted(opener_with(process.pid))


def test_a_zombie_counts_as_interrupted() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert is_interrupted(opener_with(pid))
    finally:
        os.waitpid(pid, 0)


def test_a_thread_that_ended_interrupts_nobody_while_its_process_lives() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(threading.get_native_id()))
    thread.start()
    thread.join()
    assert not is_interrupted(opener_with(found[0], os.getpid()))


@pytest.mark.anyio
async def test_a_wait_ends_with_eintr_when_its_process_is_gone() -> None:
    interrupts = Interrupts()
    with child("print(flush=True)") as process:
        process.wait()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(interrupts.run)
        with pytest.raises(Refused) as refused, interrupts.ending(opener_with(process.pid)):
            await trio.sleep_forever()
        assert refused.value.errno == errno.EINTR
        assert len(interrupts) == 0
        nursery.cancel_scope.cancel()


@pytest.mark.anyio
async def test_who_cannot_be_seen_is_waited_for() -> None:
    interrupts = Interrupts()
    with interrupts.ending(opener_with(0)):
        assert len(interrupts) == 0


@pytest.mark.anyio
async def test_a_wait_that_ends_by_itself_gives_its_result() -> None:
    interrupts = Interrupts()
    with interrupts.ending(opener_with(os.getpid())):
        await trio.lowlevel.checkpoint()
    assert len(interrupts) == 0


@pytest.mark.anyio
async def test_cancelling_from_outside_is_no_interrupt() -> None:
    interrupts = Interrupts()
    with trio.move_on_after(0) as scope:
        with interrupts.ending(opener_with(os.getpid())):
            await trio.sleep_forever()
    assert scope.cancelled_caught
