"""The commands for people: list, inspect and console, at real VMs, in pipes and in tmux."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PYTHON = os.environ.get("COCOON_TEST_PYTHON", "/usr/bin/python3")
PROGRAM = [PYTHON, "-m", "agent.cli.main"]


def program(*arguments: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    options = {"capture_output": True, "text": True, "timeout": 60} | more
    return subprocess.run([*PROGRAM, *arguments], **options)


class Tmux:
    """A shell with job control in a terminal of its own."""

    def __init__(self, directory: Path, until: Callable[..., Any]) -> None:
        self._command = ["tmux", "-S", str(directory / "tmux"), "-f", "/dev/null"]
        self._until = until
        shell = ["env", "PS1=ready$ ", "bash", "--norc", "--noprofile", "-i"]
        self._tmux("new-session", "-d", "-x", "100", "-y", "50", *shell)
        self.sees("ready$")

    def _tmux(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self._command, *arguments], check=True, capture_output=True, text=True, timeout=60
        )
        return done.stdout

    def type(self, *keys: str) -> None:
        """Press keys by tmux's names for them; other words are typed as they are."""
        self._tmux("send-keys", *keys)

    def shown(self) -> str:
        return self._tmux("capture-pane", "-p", "-J", "-S", "-1000")

    def sees(self, text: str, times: int = 1) -> str:
        """Wait until `text` is there that often; return all that is there."""
        self._until(lambda: self.shown().count(text) >= times, what=f"{text!r} is on the terminal")
        return self.shown()

    def runs(self, command: str, number: int) -> str:
        """Run a command in the shell; return what it printed."""
        self.type(f"clear; {command}; echo 'done' {number}", "Enter")
        shown = self.sees(f"\ndone {number}\n")
        return shown.partition(f"done {number}")[0].strip()

    def close(self) -> None:
        self._tmux("kill-server")


@pytest.fixture
def tmux(tmp_path: Path, until: Callable[..., Any]) -> Iterator[Tmux]:
    tmux = Tmux(tmp_path, until)
    yield tmux
    tmux.close()


@pytest.fixture
def vm(make_vm: Any) -> Any:
    vm = make_vm()
    vm.verb("start")
    vm.wait_counting()
    return vm


def test_a_user_attaches_in_tmux_and_gets_the_terminal_back(
    agent: Any, vm: Any, tmux: Tmux, until: Callable[..., Any]
) -> None:
    before = tmux.runs("stty -g", 1)
    tmux.type(f"{' '.join(PROGRAM)} console {vm.name}", "Enter")
    tmux.sees(f"[{vm.name}: connected; ~. after Enter or Ctrl-] detaches")
    tmux.sees("count ")
    tmux.type("hello", "C-j")
    tmux.sees("echo hello")
    agent.kill()
    tmux.sees(f"[{vm.name}: connected again]")
    tmux.type("again", "C-j")
    shown = tmux.sees("echo again")
    counts = [int(line.split()[1]) for line in shown.splitlines() if line.strip()[:6] == "count "]
    # The guest ends its lines with a line feed alone, so that they go on down and to the right.
    assert counts == list(range(counts[0], counts[0] + len(counts))), "a gap or a repetition"
    tmux.type("~", "C-z")
    tmux.sees("Stopped")
    assert tmux.runs("stty -g", 2) == before
    tmux.type("fg", "Enter")
    tmux.type("back", "C-j")
    tmux.sees("echo back")
    tmux.type("~.")
    tmux.sees(f"[{vm.name}: detached]")
    assert tmux.runs("stty -g", 3) == before
    assert vm.state == "running"
    until(lambda: "echo back\n" in vm.read("console"))


def test_a_session_follows_a_restart_of_its_vm_and_ends_with_it(vm: Any) -> None:
    command = [*PROGRAM, "console", vm.read("id"), "--linger=inf"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as session:
        assert session.stdin is not None
        assert session.stdout is not None
        assert session.stderr is not None
        session.stdin.write("hello\n")
        session.stdin.close()
        session.stdin = None
        while session.stdout.readline() != "echo hello\n":
            pass
        vm.verb("restart")
        while session.stdout.readline() != "count 1\n":
            pass
        assert session.stderr.readline() == f"[{vm.name}: connected again]\n"
        vm.verb("kill")
        output, errors = session.communicate(timeout=60)
    assert output[-1:] in ("", "\n")
    assert errors == f"[{vm.name}: has ended (user-kill)]\n"
    assert session.returncode == 0
    done = program("console", vm.name)
    assert done.returncode == 1
    assert f"VM {vm.name} has no process" in done.stderr


def test_everyone_lists_and_who_may_inspects_and_attaches(agent: Any, vm: Any) -> None:
    listed = program("list").stdout.splitlines()
    row = next(line for line in listed if line.startswith(f"{vm.name}\t"))
    assert row.split("\t")[1:7] == ["running", "firecracker", "1", "64M", "-", vm.read("pid")]
    assert json.loads(program("inspect", vm.name).stdout)["stats"]["vcpus"] == 1
    stranger: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []}
    listed = program("list", **stranger).stdout.splitlines()
    assert any(line.startswith(f"{vm.name}\t-") for line in listed)
    for command in ("inspect", "console"):
        done = program(command, vm.name, **stranger)
        assert done.returncode == 1
        assert "is not yours to use" in done.stderr
    os.chown(vm.path, 65534, 65534)
    assert program("inspect", vm.name, **stranger).returncode == 0
    done = program("console", vm.name, input="mine\n", **stranger)
    assert (done.returncode, done.stderr) == (0, "")
    assert "echo mine\n" in done.stdout


def test_without_an_agent_each_says_so(agent: Any, vm: Any) -> None:
    agent.stop()
    for command in (["list"], ["inspect", vm.name], ["console", vm.name]):
        done = program(*command)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("cocoon-host: nothing is mounted at /cocoon: the agent does")
