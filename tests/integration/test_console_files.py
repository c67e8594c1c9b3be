"""A VM's console through its files: the log, the stream, the socket, the journal."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def vm(make_vm):
    vm = make_vm(restart="on-failure")
    vm.verb("start")
    vm.wait_counting()
    return vm


def read_for(command: list[str], seconds: float) -> bytes:
    """What a command that never ends printed in some seconds."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    return output


def hears(vm: Any, text: str) -> Any:
    """A predicate: the guest has echoed `text`."""
    return lambda: f"echo {text}\n" in vm.read("console")


def restart(agent, vm):
    agent.restart()


def kill(agent, vm):
    agent.kill()


def stop_and_start(agent, vm):
    agent.stop()
    agent.start()


def let_systemd_restart_the_vmm(agent, vm):
    before = vm.read("pid")
    os.kill(int(before), signal.SIGKILL)
    deadline = time.monotonic() + 30
    while vm.read("pid") in ("0", before):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("event", [restart, kill, stop_and_start, let_systemd_restart_the_vmm])
def test_all_ways_to_the_console_go_on(agent, vm, until, event):
    event(agent, vm)
    vm.wait_counting()
    vm.write("console", "one")
    until(hears(vm, "one"), what="input by writing the file")
    path = os.readlink(vm.path / "console.sock")
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(path)
        client.sendall(b"two\n")
        heard = b""
        while b"echo two" not in heard:
            heard += client.recv(4096)
    until(hears(vm, "two"), what="the log has what the socket's client said")
    live = read_for(["cat", str(vm.path / "console.live")], 1.0)
    assert b"echo two\n" in live  # the history
    assert live.count(b"count ") > 10


def test_tail_follows_the_log(vm):
    output = read_for(["tail", "-n", "0", "-f", str(vm.path / "console")], 2.5)
    assert output.count(b"count ") >= 10


def test_grep_finds_what_the_guest_said(vm):
    found = subprocess.run(
        ["grep", "-c", "^count ", str(vm.path / "console")], capture_output=True, check=True
    )
    assert int(found.stdout) >= 1


def test_the_stream_goes_on_over_a_stop_and_start(vm):
    with subprocess.Popen(["cat", str(vm.path / "console.live")], stdout=subprocess.PIPE) as cat:
        assert cat.stdout is not None
        vm.verb("kill")
        vm.verb("start")
        seen = b""
        while seen.count(b"count 1\n") < 2:
            piece = os.read(cat.stdout.fileno(), 4096)
            assert piece
            seen += piece
        cat.kill()


def test_two_clients_of_the_socket_hear_the_same(vm):
    path = os.readlink(vm.path / "console.sock")
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as other:
        for client in (one, other):
            client.settimeout(20)
            client.connect(path)
        one.sendall(b"hello\n")
        for client in (one, other):
            heard = b""
            while b"echo hello" not in heard:
                heard += client.recv(4096)


def test_the_serial_console_and_the_vmms_own_words_are_in_the_units_journal(
    agent, make_vm, guests, until
):
    vm = make_vm()
    vm.verb("start")
    vm.wait_counting()
    until(
        lambda: any(line.startswith("count ") for line in agent.journal.lines(vm.unit)),
        what="serial lines in journalctl -u",
    )
    assert not any(line.startswith("count ") for line in agent.lines()), "they are not the agent's"
    vm.verb("kill")
    # A kernel that Firecracker cannot load: a segment far beyond the guest's memory.
    kernel = bytearray(guests.guest.read_bytes())
    kernel[64 + 24 : 64 + 32] = (1 << 40).to_bytes(8, "little")
    broken = Path("/run/lab-far.elf")
    broken.write_bytes(kernel)
    vm.write("boot", f'{{"kernel": "{broken}"}}')
    with pytest.raises(OSError, match=os.strerror(5)):
        vm.verb("start")
    words = [
        entry["MESSAGE"]
        for entry in agent.journal.entries(vm.unit)
        if entry.get("_TRANSPORT") == "stdout"
    ]
    assert any("ernel" in line for line in words), words
    assert words[-1][:40] in vm.read("error")


def test_input_to_a_vm_without_a_process_is_refused(make_vm):
    vm = make_vm()
    with pytest.raises(OSError, match=os.strerror(22)):
        vm.write("console", "x")
    assert "start it first" in vm.read("error")
