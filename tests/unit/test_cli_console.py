"""`cocoon-host console` on a terminal and in pipes, with a directory in the tree's place."""

import contextlib
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 30.0
VM_ID = "w" * 26
PROGRAM = [sys.executable, "-m", "agent.cli.main", "console"]


class Guest:
    """A VM in a directory that looks like the tree, whose console is this object."""

    def __init__(self, directory: Path) -> None:
        self.mount = directory / "cocoon"
        self.path = self.mount / "vms/web"
        self.path.mkdir(parents=True)
        (self.mount / "by-id").mkdir()
        (self.mount / "by-id" / VM_ID).symlink_to("../vms/web")
        (self.mount / "version").write_text("1\n")
        (self.path / "id").write_text(f"{VM_ID}\n")
        self.log = self.path / "console"
        self.log.write_bytes(b"".join(b"line %d\r\n" % number for number in range(50)) + b"# ")
        # As deep as it may be: a socket's path has 107 bytes.
        self.socket = directory / ("deep" * 30) / "web.sock"
        self.socket.parent.mkdir()
        (self.path / "console.sock").symlink_to(self.socket)
        self.listener: socket.socket | None = None
        self.clients: list[socket.socket] = []
        self.start()

    def start(self) -> None:
        self.become("running", "boot")
        self.listener = socket.socket(socket.AF_UNIX)
        folder = os.open(self.socket.parent, os.O_PATH)
        self.listener.bind(f"/proc/self/fd/{folder}/web.sock")
        os.close(folder)
        self.listener.settimeout(PATIENCE)
        self.listener.listen()

    def accept(self) -> socket.socket:
        assert self.listener is not None
        client, _ = self.listener.accept()
        client.settimeout(PATIENCE)
        self.clients.append(client)
        return client

    def hang_up(self) -> None:
        """Take the socket away, as the agent does when it leaves or the VM ends."""
        assert self.listener is not None
        self.socket.unlink()
        self.listener.close()
        for client in self.clients:
            client.close()
        self.clients.clear()

    def become(self, state: str, reason: str, error: str = "") -> None:
        record = {"state": state, "reason": reason, "error": error}
        fresh = self.path / "info.json.new"
        fresh.write_text(json.dumps(record))
        fresh.rename(self.path / "info.json")  # never half there, as in the tree

    def say(self, data: bytes) -> None:
        with self.log.open("ab") as log:
            log.write(data)
        for client in self.clients:
            client.sendall(data)


class User:
    """Someone at a terminal of 30 lines and 101 columns who runs the program."""

    def __init__(self, mount: Path, *arguments: str) -> None:
        self.keyboard, self.terminal = pty.openpty()
        ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("4H", 30, 101, 0, 0))
        self.before = termios.tcgetattr(self.terminal)
        self.seen = b""
        self.process = subprocess.Popen(
            [*PROGRAM, *arguments],
            stdin=self.terminal,
            stdout=self.terminal,
            stderr=self.terminal,
            env={**os.environ, "COCOON_MOUNT": str(mount)},
            start_new_session=True,
            preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0),
        )

    def type(self, data: bytes) -> None:
        os.write(self.keyboard, data)

    def sees(self, text: bytes) -> bytes:
        """Wait until `text` is on the terminal; return all that is there."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.seen:
            ready, _, _ = select.select([self.keyboard], [], [], deadline - time.monotonic())
            assert ready, f"{text!r} does not come after {self.seen!r}"
            self.seen += os.read(self.keyboard, 65536)
        return self.seen

    def is_raw(self) -> bool:
        return termios.tcgetattr(self.terminal)[3] & termios.ICANON == 0

    def status(self) -> int:
        """Wait for the end, at which the terminal is as it was, and return the status."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.keyboard], [], [], 0.05)[0]:
                self.seen += os.read(self.keyboard, 65536)
        status = self.process.wait(PATIENCE)
        assert termios.tcgetattr(self.terminal) == self.before
        while select.select([self.keyboard], [], [], 0)[0]:
            self.seen += os.read(self.keyboard, 65536)
        return status

    def leave(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.keyboard)
        os.close(self.terminal)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    guest = Guest(tmp_path)
    yield guest
    with contextlib.suppress(OSError):
        guest.hang_up()


@pytest.fixture
def attach(guest: Guest) -> Iterator[Any]:
    """`attach(arguments)` is a user at the console, and the guest's end of the connection."""
    users = []

    def attach_one(*arguments: str) -> tuple[User, socket.socket]:
        user = User(guest.mount, *(arguments or ("web",)))
        users.append(user)
        client = guest.accept()
        user.sees(b"# ")
        return user, client

    yield attach_one
    for user in users:
        user.leave()


def read_exactly(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (piece := client.recv(size - len(data))):
        data += piece
    return data


def test_a_user_attaches_types_and_detaches(guest: Guest, attach: Any) -> None:
    user, client = attach("www")
    assert user.is_raw()
    assert user.seen.startswith(b"\r\n[web: connected; ~. after Enter or Ctrl-] detaches")
    assert user.seen.count(b"line ") == 9  # and the prompt
    user.type(b"ls\x03\x11\xc3\xa9\r")
    assert read_exactly(client, 7) == b"ls\x03\x11\xc3\xa9\r"
    guest.say(b"\x1b[31mfile\x1b[0m\n\x00# ")
    assert b"\x1b[31mfile\x1b[0m\n\x00# " in user.sees(b"\x00# ")
    user.type(b"~?")
    user.sees(b"detach (Ctrl-] too")
    user.type(b"~w")
    assert read_exactly(client, 22) == b"stty rows 30 cols 101\r"
    user.type(b"~.")
    assert user.status() == 0
    assert user.seen.endswith(b"\r\n[web: detached]\r\n")
    assert client.recv(100) == b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT])
def test_a_signal_ends_it_and_the_terminal_is_as_it_was(attach: Any, number: int) -> None:
    user, _ = attach()
    assert user.is_raw()
    user.process.send_signal(number)
    assert user.status() == 128 + number


def test_modes_that_the_guest_left_on_are_switched_off(guest: Guest, attach: Any) -> None:
    user, _ = attach()
    guest.say(b"\x1b[?1049h\x1b[?25l editor")
    user.sees(b"editor")
    user.type(b"\x1d")
    assert user.status() == 0
    assert user.seen.endswith(b"\x1b[?25h\x1b[?1049l\r\n[web: detached]\r\n")


@pytest.mark.parametrize(
    ("state", "error", "status", "sentence"),
    [
        ("stopped", "", 0, b"[web: has ended (guest-exit)]"),
        ("error", "qemu died\x1b[2J\n", 1, b"[web: has failed: qemu died\\x1b[2J\\n]"),
    ],
)
def test_the_end_of_the_vm_is_told_after_its_last_words(
    guest: Guest, attach: Any, state: str, error: str, status: int, sentence: bytes
) -> None:
    user, _ = attach()
    guest.say(b"x" * 300_000 + b"reboot: Power down\r\n")
    guest.become(state, "guest-exit", error)
    guest.hang_up()
    assert user.status() == status
    assert user.seen.count(b"x") >= 300_000
    assert user.seen.endswith(b"reboot: Power down\r\n\r\n" + sentence + b"\r\n")


def test_the_session_goes_on_over_a_restart_of_the_agent_and_misses_nothing(
    guest: Guest, attach: Any
) -> None:
    user, _ = attach()
    guest.say(b"before\r\n")
    user.sees(b"before")
    guest.mount.rename(guest.mount.with_name("away"))
    guest.hang_up()
    user.sees(b"[web: the agent is away, and the VM runs on without it; waiting]")
    user.type(b"lost")
    user.sees(b"\a")
    guest.mount.with_name("away").rename(guest.mount)
    guest.say(b"meanwhile\r\n")
    guest.start()
    client = guest.accept()
    shown = user.sees(b"meanwhile\r\n")
    guest.say(b"afterwards\r\n")
    shown = user.sees(b"afterwards\r\n")
    assert b"[web: connected again]\r\nmeanwhile\r\nafterwards\r\n" in shown
    assert shown.count(b"before") == shown.count(b"meanwhile") == 1
    user.type(b"x\r~.")
    assert read_exactly(client, 2) == b"x\r"
    assert user.status() == 0


def test_a_vm_that_is_stopped_and_started_keeps_its_user(guest: Guest, attach: Any) -> None:
    user, _ = attach()
    guest.become("stopping", "user-stop")
    guest.hang_up()
    guest.become("starting", "boot")
    guest.start()
    client = guest.accept()
    user.sees(b"connected again")
    user.type(b"x")
    assert read_exactly(client, 1) == b"x"


def test_a_user_may_leave_while_the_agent_is_away_or_the_vm_was_removed(
    guest: Guest, attach: Any
) -> None:
    user, _ = attach()
    other, _ = attach()
    (guest.mount / "version").rename(guest.mount / "hidden")
    (guest.mount / "by-id" / VM_ID).unlink()
    guest.hang_up()
    user.sees(b"away")
    user.type(b"~.")
    assert user.status() == 0
    (guest.mount / "hidden").rename(guest.mount / "version")
    assert other.status() == 0
    assert b"[web: was removed]" in other.seen


def test_a_terminal_that_takes_no_more_holds_neither_input_nor_the_way_out(
    guest: Guest, attach: Any
) -> None:
    user, client = attach()
    client.setblocking(False)
    deadline = time.monotonic() + PATIENCE
    sent = 0
    # Nobody reads the terminal: at some point nothing fits any more on all the way.
    while time.monotonic() < deadline:
        try:
            sent += client.send(b"y\r\n" * 10_000)
        except BlockingIOError:
            if not select.select([], [client], [], 0.5)[1]:
                break
    assert sent > 100_000
    user.type(b"alive\r")
    client.settimeout(PATIENCE)
    assert read_exactly(client, 6) == b"alive\r"
    user.type(b"~.")
    user.process.wait(PATIENCE)
    assert user.status() == 0


def piped(guest: Guest, *arguments: str, **more: Any) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "COCOON_MOUNT": str(guest.mount)}
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | more
    return subprocess.Popen([*PROGRAM, "web", *arguments], env=environment, **pipes)


def test_in_a_pipe_all_is_sent_and_what_the_guest_answers_is_printed(
    guest: Guest, tmp_path: Path
) -> None:
    typed = b"~.\r\n~?\x1d" + bytes(range(256)) * 4000
    (tmp_path / "typed").write_bytes(typed)
    with (tmp_path / "typed").open() as file, piped(guest, "--linger=inf", stdin=file) as process:
        client = guest.accept()
        assert read_exactly(client, len(typed)) == typed
        assert client.recv(1) == b""  # the end of the input is the guest's to know
        guest.say(b"answer\r\n")
        guest.become("stopped", "guest-exit")
        guest.hang_up()
        output, errors = process.communicate(timeout=PATIENCE)
    assert (output, errors) == (b"answer\r\n", b"[web: has ended (guest-exit)]\n")
    assert process.returncode == 0


def test_in_a_pipe_it_ends_some_time_after_the_input(guest: Guest) -> None:
    with piped(guest, "-n", "2", "--linger", "0.3") as process:
        guest.accept()
        began = time.monotonic()
        output, errors = process.communicate(b"ls\n", timeout=PATIENCE)
    assert time.monotonic() - began >= 0.3
    assert (process.returncode, output, errors) == (0, b"line 49\r\n# ", b"")


def test_a_reader_that_leaves_ends_it_quietly(guest: Guest) -> None:
    with piped(guest) as process:
        guest.accept()
        assert process.stdout is not None
        process.stdout.close()
        with contextlib.suppress(OSError):
            for _ in range(1000):
                guest.say(b"y\n" * 1000)
        assert process.wait(PATIENCE) == 128 + signal.SIGPIPE
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_output_goes_on_at_the_end_of_a_file(guest: Guest, tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_bytes(b"kept\n")
    with file.open("ab") as log, piped(guest, "-n1", "--linger=0", stdout=log) as process:
        guest.accept()
        process.communicate(b"", timeout=PATIENCE)
    assert file.read_bytes() == b"kept\n# "


def test_what_has_no_console_is_told_in_a_sentence(guest: Guest) -> None:
    guest.hang_up()
    for state, sentence in [
        ("stopped", b"VM web has no process, its state is stopped; start it with: echo start > "),
        ("starting", b"VM web is starting: try again in a moment"),
    ]:
        guest.become(state, "x")
        with piped(guest) as process:
            _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        assert errors.startswith(b"cocoon-host: " + sentence)
        assert errors.count(b"\n") == 1


@pytest.mark.parametrize(
    "wrong", [["-n", "-1"], ["-n", "x"], ["--linger", "nan"], ["-e", "ab"], ["-e", "\x1b"], ["b"]]
)
def test_wrong_usage_is_told(guest: Guest, wrong: list[str]) -> None:
    with piped(guest, *wrong) as process:
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert b"usage: cocoon-host" in errors
