"""What tests of snapshots share: names, archives, VMs that go on, an agent that dies at a step."""

import contextlib
import errno
import io
import json
import os
import re
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

DROP_IN = Path("/run/systemd/system/cocoon-host.service.d/50-test.conf")
CRASH_AT = Path("/run/crash-at")
"""Where the lab's agent looks for the step at which it is to die; see agent.lifecycle.steps."""
MARKER = Path("/run/crash-at.done")
PATIENCE = 20.0
AWAY = (errno.ECONNABORTED, errno.ENOTCONN, errno.ENOENT)


def write_once(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(descriptor, f"{text}\n".encode())
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def refused(*numbers: int) -> Iterator[None]:
    """Fail unless the body fails with one of these errnos."""
    with pytest.raises(OSError, match=r"Errno") as refusal:
        yield
    assert refusal.value.errno in numbers, refusal.value


def archive(agent: Any, name: str) -> Path:
    return Path(agent.mount) / "snapshots" / f"{name}.tar"


def described(agent: Any, name: str) -> dict[str, Any]:
    text = (Path(agent.mount) / "snapshots" / f"{name}.json").read_text()
    document: dict[str, Any] = json.loads(text)
    return document


def names(agent: Any) -> set[str]:
    """The snapshots that are shown."""
    return {path.stem for path in (Path(agent.mount) / "snapshots").glob("*.tar")}


def directories(agent: Any) -> set[str]:
    """What stands in the directory of snapshots."""
    return set(os.listdir(Path(agent.root_dir) / "snapshots"))


def settled(agent: Any) -> None:
    """Fail unless every directory of a snapshot belongs to one that is shown, and none else is.

    What an agent that died has left beside a VM's directory goes soon after the next one is there.
    """
    deadline = time.monotonic() + PATIENCE
    while (left := _left(agent)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


def _left(agent: Any) -> set[str]:
    shown = {str(described(agent, name)["id"]) for name in names(agent)}
    vms = {path.name for path in (Path(agent.mount) / "by-id").iterdir()}
    beside = set(os.listdir(Path(agent.root_dir) / "vms")) - vms
    saves = (Path(agent.root_dir) / "vms").glob("*/save")
    return {
        *(directories(agent) ^ shown),
        *(name for name in beside if not name.endswith(".bound")),
        *map(str, saves),
    }


def extract(path: Path, into: Path) -> dict[str, Path]:
    """Unpack an archive with GNU tar; return its files by name."""
    into.mkdir(exist_ok=True)
    subprocess.run(
        ["tar", "--extract", "--sparse", f"--file={path}", f"--directory={into}"],
        check=True,
        timeout=60,
    )
    return {file.name: file for file in into.iterdir()}


def pack(files: dict[str, bytes], path: Path) -> Path:
    """Make a plain archive of `files`, in their order."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def goes_on_from(vm: Any, count: int) -> None:
    """Fail unless the console of `vm` starts with the count after `count`, and goes on from it.

    A snapshot may hold half a line: then the console starts with the other half.
    """
    vm.wait_counting()
    vm.wait_counting()
    counts = vm.counts
    first = counts[0]
    assert first in (count + 1, count + 2), (first, count)
    assert counts == list(range(first, first + len(counts)))


def last_count(console: bytes) -> int:
    """The last count that is whole in `console`."""
    return int(re.findall(rb"count (\d+)\r?\n", console)[-1])


@contextlib.contextmanager
def environment(agent: Any, **variables: str) -> Iterator[None]:
    """Restart the agent with these variables; from its next restart on it has them no more."""
    DROP_IN.parent.mkdir(parents=True, exist_ok=True)
    words = " ".join(f"{name}={value}" for name, value in variables.items())
    DROP_IN.write_text(f"[Service]\nEnvironment={words}\n")
    subprocess.run(["systemctl", "daemon-reload"], check=True, timeout=60)
    agent.restart()
    try:
        yield
    finally:
        DROP_IN.unlink()
        subprocess.run(["systemctl", "daemon-reload"], check=True, timeout=60)


@contextlib.contextmanager
def dying_at(agent: Any, step: str, by: str = "SIGKILL") -> Iterator[None]:
    """Have the agent send itself the signal `by` when it comes to `step`, once."""
    MARKER.unlink(missing_ok=True)
    subprocess.run(["systemctl", "reset-failed", agent.unit], check=True, timeout=60)
    written = CRASH_AT.with_suffix(".new")
    written.write_text(f"{step} {by}\n")
    written.rename(CRASH_AT)
    try:
        yield
    finally:
        CRASH_AT.unlink(missing_ok=True)


@contextlib.contextmanager
def away() -> Iterator[None]:
    """Run the body, in which the agent dies."""
    with contextlib.suppress(ConnectionAbortedError):
        try:
            yield
        except OSError as error:
            if error.errno not in AWAY:
                raise


def died(agent: Any, until: Callable[..., Any]) -> None:
    """Wait until the agent has died at its step, and is back."""
    until(MARKER.exists, what="the agent died at the step")
    until(lambda: agent.is_active() and os.path.ismount(agent.mount), what="the agent is back")


def restarted_by_systemd(agent: Any, vm: Any, until: Callable[..., Any]) -> None:
    """Kill the VMM while there is no agent, and have one again once systemd has restarted it."""
    pid = vm.pid
    agent.stop()
    os.kill(pid, signal.SIGKILL)
    show = ["systemctl", "show", "--property=MainPID", "--value", vm.unit]
    until(
        lambda: (
            subprocess.run(show, capture_output=True, text=True, check=True).stdout.strip()
            not in ("0", str(pid))
        )
    )
    agent.start()
