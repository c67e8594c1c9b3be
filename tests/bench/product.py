"""The product as its users have it: the agent's service, and VMs through files below /cocoon."""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

MOUNT = "/cocoon"
VMS = f"{MOUNT}/vms"
UNIT = "cocoon-host.service"
MIB = 1 << 20
_TICK = os.sysconf("SC_CLK_TCK")
_CATCH_UP = 0.05


def agent_pid() -> int:
    """Return the agent's main process."""
    show = ["systemctl", "show", "--property=MainPID", "--value", UNIT]
    return int(subprocess.run(show, check=True, capture_output=True).stdout)


@contextmanager
def agent_frozen() -> Iterator[None]:
    """Stop the agent for a moment, so that the floor is measured without it.

    What it missed it takes in before this returns.
    """
    pid = agent_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
        settle(pid)


@contextmanager
def agent_stopped() -> Iterator[None]:
    """Have no agent for a while."""
    subprocess.run(["systemctl", "stop", UNIT], check=True)
    try:
        yield
    finally:
        subprocess.run(["systemctl", "start", UNIT], check=True)


def restart_agent() -> float:
    """Restart the agent; return the seconds until it is ready again."""
    began = time.perf_counter()
    subprocess.run(["systemctl", "restart", UNIT], check=True)
    return time.perf_counter() - began


def settle(pid: int = 0) -> None:
    """Wait until the agent has nothing to do."""
    pid = pid or agent_pid()
    used = -1.0
    while used != (used := cpu_seconds(pid)):
        time.sleep(_CATCH_UP)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and of its children that have ended."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICK


def lab_cpu_seconds() -> float:
    """Return the CPU time of all that runs in this lab but ourselves."""
    used = time.process_time()
    for group in ("", "/unified"):
        with contextlib.suppress(OSError), open(f"/sys/fs/cgroup{group}/cpu.stat") as file:
            counts = dict(line.split() for line in file)
            if "usage_usec" in counts:
                return int(counts["usage_usec"]) / 1e6 - used
    with open("/sys/fs/cgroup/cpuacct/cpuacct.usage") as file:
        return int(file.read()) / 1e9 - used


def resident_mib(pid: int) -> float:
    """Return a process's memory."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def write(path: str, text: str) -> None:
    """Do what the shell's `echo text > path` does."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        os.write(file, f"{text}\n".encode())
    finally:
        os.close(file)


def create(name: str, memory: int = 64 * MIB, guest: str = "halt.elf", **keys: object) -> None:
    """Create a VM; unless another is named, its guest idles in hlt."""
    document = {
        "name": name,
        "hypervisor": "firecracker",
        "memory": memory,
        "boot": {"kernel": f"{os.environ['COCOON_TEST_GUESTS']}/{guest}"},
        **keys,
    }
    write(f"{MOUNT}/create", json.dumps(document))


def clone(name: str, snapshot: str) -> None:
    """Create a VM whose first start clones the snapshot."""
    write(f"{MOUNT}/create", json.dumps({"name": name, "from": snapshot}))


def snapshot_directory(name: str) -> str:
    """Return where the files of a snapshot lie."""
    with open(f"{MOUNT}/snapshots/{name}.json") as file:
        return f"/var/lib/cocoon/snapshots/{json.load(file)['id']}"


def start(name: str) -> float:
    """Start a VM; return the seconds until the write returned."""
    began = time.perf_counter()
    try:
        write(f"{VMS}/{name}/state", "start")
    except OSError as error:
        with open(f"{VMS}/{name}/error") as file:
            raise RuntimeError(f"{name} did not start: {file.read()}") from error
    return time.perf_counter() - began


def start_all(names: Sequence[str], at_once: int = 0) -> tuple[float, list[float]]:
    """Start VMs from so many threads (one each); return the seconds for all, and for each."""
    with ThreadPoolExecutor(at_once or len(names)) as pool:
        ready = threading.Barrier((at_once or len(names)) + 1)
        for _ in range(at_once or len(names)):
            pool.submit(ready.wait)
        ready.wait()  # all threads are there now
        began = time.perf_counter()
        each = list(pool.map(start, names))
        return time.perf_counter() - began, each


def for_all(act: Callable[[str], object], names: Iterable[str], at_once: int = 16) -> None:
    """Do something to VMs, some at a time."""
    with ThreadPoolExecutor(at_once) as pool:
        for _ in pool.map(act, names):
            pass


def kill(name: str) -> None:
    """End a VM's process, if it has one."""
    with contextlib.suppress(OSError):
        write(f"{VMS}/{name}/state", "kill")


def remove(name: str) -> None:
    """Remove a VM, whatever it does."""
    kill(name)
    os.rmdir(f"{VMS}/{name}")


@contextmanager
def vms(
    names: Sequence[str], memory: int = 64 * MIB, hypervisor: str = "firecracker"
) -> Iterator[Sequence[str]]:
    """Have VMs with these names; they are removed in the end."""
    try:
        for_all(lambda name: create(name, memory, hypervisor=hypervisor), names)
        yield names
    finally:
        for_all(remove, [name for name in names if os.path.exists(f"{VMS}/{name}")])
