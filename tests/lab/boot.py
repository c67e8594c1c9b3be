"""The life of a lab: boot, entry, end.

Three processes hold it. The runner enters the lab with the command and returns its exit status. The
keeper, its child, boots the lab and takes it down when the runner is gone, however it went. Process
1 of the lab dies with the keeper. What even a SIGKILL to both leaves behind (empty cgroups, a
directory) is removed by the next run, which finds its lock free.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cgroups import LabError, enterable, hierarchies, join, make_group
from remains import groups_of, make_directory, remember_devices, remove_lab, sweep

INIT = Path(__file__).with_name("init")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Where the host's files do not show unless asked for.
OWN = ("/run", "/tmp", "/var/tmp")
BOOT_SECONDS = 60.0
# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def reap() -> dict[int, int]:
    """Wait for all children, inherited ones included; return their statuses."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.wait()
            ended[pid] = status
    return ended


def keep(directory: Path, arguments: list[str], lifeline: socket.socket) -> NoReturn:
    """Boot the lab, wait until its runner or its process 1 is gone, and take everything down."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    log = os.open(directory / "boot.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        boot(directory, arguments, lifeline)
        # What boot wrote is the runner's to read before it goes.
        lifeline.shutdown(socket.SHUT_WR)
        select.select([lifeline], [], [])
        remove_lab(directory)
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(status)


def boot(directory: Path, arguments: list[str], lifeline: socket.socket) -> None:
    """Run process 1 of the lab until it ends or the runner does."""
    keeper = os.getpid()
    found = hierarchies()
    groups = [hierarchy.parent / directory.name for hierarchy in found]
    (directory / "groups").write_text("".join(f"{group}\n" for group in groups))
    (directory / "hierarchies").write_text(
        "".join(f"{each.kind} {each.options} {each.mount}\n" for each in found)
    )
    for hierarchy in found:
        make_group(hierarchy, directory.name)

    def in_child() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(1)
        join(groups)

    command = [
        "unshare",
        "--fork",
        "--kill-child",
        "--pid",
        "--mount",
        "--uts",
        "--ipc",
        "--cgroup",
    ]
    process = subprocess.Popen(
        [*command, str(INIT), str(directory), *arguments],
        stdin=subprocess.DEVNULL,
        env={"PATH": SYSTEM_PATH, "NOTIFY_SOCKET": f"@{directory.name}"},
        cwd="/",
        preexec_fn=in_child,
    )
    try:
        select.select([lifeline.fileno(), os.pidfd_open(process.pid)], [], [])
    finally:
        process.kill()
        reap()


@dataclass(frozen=True)
class Lab:
    """A lab that is up: its process 1, and the groups that those who enter it join first."""

    name: str
    init: int
    groups: list[Path]

    def enter(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a command in the lab, in the runner's directory and with its standard streams."""
        namespaces = ["--root", "--mount", "--uts", "--ipc", "--pid", "--cgroup"]
        return subprocess.Popen(
            [
                *("nsenter", "--target", str(self.init), *namespaces, "--"),
                *("env", f"--chdir={os.getcwd()}", *command),
            ],
            preexec_fn=lambda: join(self.groups),
            **options,
        )


def wait_for_boot(ready: socket.socket, lifeline: socket.socket) -> int:
    """Wait for systemd's READY=1 and return its process id, as the kernel tells it."""
    deadline = time.monotonic() + BOOT_SECONDS
    while True:
        left = max(0.0, deadline - time.monotonic())
        readable, _, _ = select.select([ready, lifeline], [], [], left)
        if not readable:
            raise LabError(f"systemd was not up in {BOOT_SECONDS:.0f} s")
        if lifeline in readable:
            raise LabError("systemd ended")
        message, control, _, _ = ready.recvmsg(4096, 1024)
        if b"READY=1" in message.splitlines():
            for level, kind, data in control:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                    return int(struct.unpack("3i", data)[0])


def ready_socket(name: str) -> socket.socket:
    """Where the lab's systemd says that it is up."""
    ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    ready.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    ready.bind(f"\0{name}")
    return ready


@contextlib.contextmanager
def running(state: Path | None, visible: list[Path], files: dict[str, str]) -> Iterator[Lab]:
    """A lab that is up; gone when the block is left."""
    # Inherits process 1 if the keeper is killed.
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    sweep()
    directory, _lock = make_directory()
    lifeline, keepers_end = socket.socketpair()
    keeper = 0
    try:
        state = state or directory / "state"
        state.mkdir(exist_ok=True)
        for name, text in files.items():
            (directory / "systemd" / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / "systemd" / name).write_text(text)
        hidden = [path for path in visible if any(map(path.is_relative_to, OWN))]
        with ready_socket(directory.name) as ready:
            keeper = os.fork()
            if keeper == 0:
                lifeline.close()
                # Left open and unread it would stop systemd, once that has told of long jobs often.
                ready.close()
                keep(directory, [str(state), *map(str, hidden)], keepers_end)
            keepers_end.close()
            try:
                init = wait_for_boot(ready, lifeline)
            except LabError as error:
                log = (directory / "boot.log").read_text().strip().splitlines()[-5:]
                raise LabError(f"the lab did not come up: {error}: {' | '.join(log)}") from None
        remember_devices(directory, init)
        yield Lab(directory.name, init, [enterable(group) for group in groups_of(directory)])
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        lifeline.close()
        # Not the keeper alone: process 1 of the lab ends only when all in it are reaped, and the
        # command is the runner's to reap when nsenter was killed.
        if reap().get(keeper) != 0:
            remove_lab(directory)
