"""`cocoon-host list` and `inspect` on a directory that looks like the tree."""

import json
import os
import pty
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ
from typing import Any

import pytest

from agent.cli.listing import vm_row
from agent.cli.main import main

TITLES = ["NAME", "STATE", "HYPERVISOR", "CPU", "MEMORY", "IMAGE", "PID", "UPTIME", "NOTE"]
HOSTILE = "kernel \x1b]0;owned\x07 panics\nname\u202eevil\x9b2J " + "long " * 50


def record(name: str, **more: Any) -> dict[str, Any]:
    return {
        "id": (name + "a" * 26)[:26],
        "name": name,
        "hypervisor": "qemu",
        "state": "running",
        "config": {"cpu": 2, "memory": 1 << 30, "image": "debian"},
        "pid": 4711,
        "started_at": "2026-11-25T05:00:00.123456Z",
        "reason": "boot",
        "error": "",
    } | more


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    mount = tmp_path / "cocoon"
    for directory in ("vms", "by-id", "snapshots"):
        (mount / directory).mkdir(parents=True)
    (mount / "version").write_text("1\n")
    monkeypatch.setenv("COCOON_MOUNT", str(mount))
    return mount


@pytest.fixture
def add(tree: Path) -> Callable[[dict[str, Any]], None]:
    """Adds a VM of that record to the tree."""

    def add_one(vm: dict[str, Any]) -> None:
        directory = tree / "vms" / vm["name"]
        directory.mkdir()
        (directory / "info.json").write_text(json.dumps(vm))
        (directory / "stats").write_text("cpu_nsec 12\nvcpus 1\n")
        (tree / "by-id" / vm["id"]).symlink_to(f"../vms/{vm['name']}")
        index = tree / "index.json"
        vms = json.loads(index.read_text())["vms"] if index.exists() else {}
        vms[vm["id"]] = vm
        index.write_text(json.dumps({"vms": vms, "names": {}}))

    return add_one


def on_a_terminal(columns: int, *arguments: str) -> list[str]:
    """The lines that the program prints on a terminal of that width."""
    user, terminal = pty.openpty()
    ioctl(terminal, TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    command = [sys.executable, "-m", "agent.cli.main", *arguments]
    with subprocess.Popen(command, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        try:
            while piece := os.read(user, 4096):
                shown += piece
        except OSError:
            pass  # the last one has closed the terminal
        os.close(user)
    assert process.returncode == 0, shown
    return shown.decode().splitlines()


def test_a_pipe_gets_all_of_each_row_with_tabs(add: Any, capsys: Any) -> None:
    add(record("web", state="error", error=HOSTILE, pid=0))
    add(record("db", started_at=None))
    assert main(["list"]) == 0
    titles, *rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert titles == [
        "NAME",
        "STATE",
        "HYPERVISOR",
        "CPU",
        "MEMORY",
        "IMAGE",
        "PID",
        "UPTIME",
        "NOTE",
    ]
    assert rows[0] == ["db", "running", "qemu", "2", "1G", "debian", "4711", "-", "boot"]
    assert rows[1][:8] == ["web", "error", "qemu", "2", "1G", "debian", "-", "-"]
    assert rows[1][8] == (r"kernel \x1b]0;owned\x07 panics\nname\u202eevil\x9b2J " + "long " * 50)


def test_a_terminal_gets_aligned_rows_that_fit_it_and_nothing_that_steers_it(add: Any) -> None:
    add(record("web", state="error", error=HOSTILE, pid=0))
    add(record("a-longer-name", error="日本語の" * 40))
    lines = on_a_terminal(90, "list")
    assert lines[0].split() == [
        "NAME",
        "STATE",
        "HYPERVISOR",
        "CPU",
        "MEMORY",
        "IMAGE",
        "PID",
        "UPTIME",
        "NOTE",
    ]
    assert [line.index("qemu") for line in lines[1:]] == [lines[0].index("HYPERVISOR")] * 2
    assert all(line.endswith("…") for line in lines[1:])
    assert len(lines[2]) == 90
    assert 60 < len(lines[1]) < 90  # of double width
    assert all(line.isprintable() for line in lines)


def test_json_is_the_records_by_name(add: Any, capsys: Any) -> None:
    vms = [record(name, error=HOSTILE) for name in ("b", "a", "c")]
    for vm in vms:
        add(vm)
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == sorted(vms, key=lambda vm: vm["name"])


def test_without_the_index_there_is_what_may_be_read(
    add: Any, tree: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(record("mine"))
    add(record("other"))
    real = open

    def refuse(path: Any, *arguments: Any, **named: Any) -> Any:
        if str(path).endswith(("index.json", "other/info.json")):
            raise PermissionError(13, os.strerror(13), path)
        return real(path, *arguments, **named)

    monkeypatch.setattr("builtins.open", refuse)
    assert main(["list"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows[1:]] == [["mine", "running"], ["other", "-"]]
    assert rows[2][-1] == "not yours to read"
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1] == {"name": "other"}
    assert main(["inspect", "other"]) == 1
    assert "is not yours to use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (59, "59s"), (60, "1m0s"), (3725, "1h2m"), (90_000, "1d1h"), (-5, "0s")],
)
def test_the_time_a_vm_is_up(seconds: int, shown: str) -> None:
    began = 1_700_000_000
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began))
    assert vm_row(record("x", started_at=moment), began + seconds)[7] == shown
    assert vm_row(record("x", started_at=moment, state="stopped"), began + seconds)[7] == ""


def test_a_vm_is_found_by_name_id_and_the_beginning_of_its_id(add: Any, capsys: Any) -> None:
    add(record("web", id="abcd" + "2" * 22))
    add(record("db", id="abce" + "2" * 22))
    add(record("abce", id="zzzz" + "2" * 22))
    for text, name in [("web", "web"), ("abcd", "web"), ("abce2", "db"), ("abce", "abce")]:
        assert main(["inspect", text]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert (shown["name"], shown["stats"]) == (name, {"cpu_nsec": 12, "vcpus": 1})
    for text, sentence in [
        ("abc", "begins the ids of 2 VMs (db, web)"),
        ("zz", "there is no VM 'zz'"),
        ("../vms/web", "there is no VM"),
        ("", "there is no VM ''"),
    ]:
        assert main(["inspect", text]) == 1
        assert sentence in capsys.readouterr().err


def test_snapshots_are_listed_and_inspected(add: Any, tree: Path, capsys: Any) -> None:
    add(record("web", id="w" * 26))
    facts = {"name": "nightly", "source_vm_id": "w" * 26, "memory": 1 << 29, "archive_size": 2048}
    (tree / "snapshots/nightly.json").write_text(json.dumps(facts | {"description": "a\tb"}))
    (tree / "snapshots/nightly.tar").write_bytes(b"")
    assert main(["list", "--snapshots"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[1] == ["nightly", "web", "-", "-", "512M", "2K", "-", r"a\tb"]
    assert main(["inspect", "--snapshot", "nightly"]) == 0
    assert json.loads(capsys.readouterr().out)["archive_size"] == 2048
    assert main(["inspect", "--snapshot", "../vms/web/info"]) == 1
    assert "there is no snapshot" in capsys.readouterr().err


def test_ten_thousand_vms_are_listed_at_once(tree: Path, capsys: Any) -> None:
    vms = {f"{number:026}": record(f"vm{number}") for number in range(10_000)}
    (tree / "index.json").write_text(json.dumps({"vms": vms, "names": {}}))
    began = time.monotonic()
    assert main(["list"]) == 0
    assert time.monotonic() - began < 10
    assert len(capsys.readouterr().out.splitlines()) == 10_001


def test_without_a_tree_it_says_so(tmp_path: Path, capsys: Any) -> None:
    assert main(["list", "--mount", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"cocoon-host: nothing is mounted at {tmp_path}: ")
    assert message.count("\n") == 1


def test_a_reader_that_leaves_early_is_no_error(add: Any, tree: Path) -> None:
    vms = {f"{number:026}": record(f"vm{number}") for number in range(2_000)}
    (tree / "index.json").write_text(json.dumps({"vms": vms, "names": {}}))
    done = subprocess.run(
        f"{sys.executable} -m agent.cli.main list --json | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("[\n", "")
