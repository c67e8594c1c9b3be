"""Asks a VM's guest to power off, and sees to it that the VMM ends: ExecStop of a VM's unit.

usage: stop.py BACKEND RUN_DIRECTORY UID SECONDS        with $MAINPID of systemd

It works without the agent: `systemctl stop`, the shutdown of the host and the agent's own stop take
this one way. A guest that has not powered off after SECONDS, or cannot be asked, gets its VMM
ended: by SIGTERM, and by SIGKILL two seconds later.

The VMM may have been taken over: its socket is reached by descriptor, never through a link, and
what it answers is bounded in size and time.
"""

import os
import select
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable

TERM_SECONDS = 2.0
SHUTDOWN_SECONDS = 1.0
MOST_ANSWER = 65536


def main() -> None:
    backend, run, uid, seconds = sys.argv[1:]
    # It also runs after a guest ended by itself.
    pid = os.environ.get("MAINPID", "")
    if not pid:
        return
    process = open_process(int(pid), int(uid))
    if process is None:
        return
    deadline = time.monotonic() + float(seconds)
    try:
        power_off(backend, run, int(uid), deadline)
    except (OSError, ValueError) as error:
        print(f"the guest cannot be asked to power off: {error}", file=sys.stderr)
        deadline = time.monotonic()
    if not wait(process, deadline):
        end(process, backend, run, int(uid))


def open_process(pid: int, uid: int) -> int | None:
    """Return a descriptor of the process; None when it is gone or is none of the VM's."""
    try:
        process = os.pidfd_open(pid)
        owner = os.stat(f"/proc/{pid}").st_uid
    except (ProcessLookupError, FileNotFoundError):
        return None
    return process if owner == uid else None


def wait(process: int, deadline: float) -> bool:
    """Whether the process ended before `deadline`."""
    ended, _, _ = select.select([process], [], [], max(0.0, deadline - time.monotonic()))
    return bool(ended)


def end(process: int, backend: str, run: str, uid: int) -> None:
    """End a VMM whose guest did not."""
    if backend == "cloud-hypervisor":
        # Its disks are closed in order then.
        try:
            with connect(run, uid, time.monotonic() + SHUTDOWN_SECONDS) as api:
                api.request("PUT", "/api/v1/vmm.shutdown")
        except (OSError, ValueError) as error:
            print(f"the VMM cannot be asked to end: {error}", file=sys.stderr)
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            signal.pidfd_send_signal(process, number)
        except ProcessLookupError:
            return
        if wait(process, time.monotonic() + TERM_SECONDS):
            return


def power_off(backend: str, run: str, uid: int, deadline: float) -> None:
    """Ask the guest to power off; raises OSError or ValueError when it cannot be asked."""
    with connect(run, uid, deadline) as api:
        if backend == "firecracker":
            # A paused guest hears nothing; to resume one that runs changes nothing.
            api.request("PATCH", "/vm", '{"state": "Resumed"}')
            refusal = api.request("PUT", "/actions", '{"action_type": "SendCtrlAltDel"}')
        elif backend == "cloud-hypervisor":
            api.request("PUT", "/api/v1/vm.resume")
            refusal = api.request("PUT", "/api/v1/vm.power-button")
        else:
            for command in ("qmp_capabilities", "cont", "system_powerdown"):
                refusal = api.execute(command)
    if refusal:
        raise OSError(refusal)


def connect(run: str, uid: int, deadline: float) -> "Api":
    """Connect to the VMM's API socket, which must be a socket and the VM's own."""
    sockets = os.open(f"{run}/sock", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
    entry = os.open("api", os.O_PATH | os.O_NOFOLLOW, dir_fd=sockets)
    status = os.fstat(entry)
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid != uid:
        raise OSError("its API socket is not a socket of the VM's")
    api = Api(deadline)
    api.settimeout(api.left())
    api.connect(f"/proc/self/fd/{entry}")
    return api


class Api(socket.socket):
    """A connection to a VMM's API, of which every answer must come before `deadline`."""

    def __init__(self, deadline: float) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self.deadline = deadline

    def left(self) -> float:
        # Never 0, which would mean not to wait at all, and to fail otherwise.
        return max(0.001, self.deadline - time.monotonic())

    def request(self, method: str, path: str, body: str = "") -> str:
        """Send an HTTP request; return "" when it succeeded, else what the VMM answered."""
        self.sendall(
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        answer = self.receive(http_complete)
        if answer.split(b" ", 2)[1][:1] == b"2":
            return ""
        return answer.rpartition(b"\r\n\r\n")[2].decode(errors="replace") or "no reason given"

    def execute(self, command: str) -> str:
        """Send a QMP command; return "" when it succeeded, else QEMU's answer.

        Its greeting, and events, may come before the answer.
        """
        self.sendall(f'{{"execute": "{command}"}}\r\n'.encode())
        answer = self.receive(qmp_complete)
        return answer.decode(errors="replace") if b'"error"' in answer else ""

    def receive(self, complete: Callable[[bytes], bool]) -> bytes:
        """Return what the VMM answers; raises OSError when it is too slow or too long."""
        answer = b""
        while not complete(answer):
            self.settimeout(self.left())
            piece = self.recv(4096)
            if not piece or len(answer) > MOST_ANSWER:
                raise OSError("the VMM's answer is not whole")
            answer += piece
        return answer


def http_complete(answer: bytes) -> bool:
    head, separator, body = answer.partition(b"\r\n\r\n")
    if not separator:
        return False
    for line in head.lower().split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name == b"content-length":
            return len(body) >= int(value)
    return True


def qmp_complete(answer: bytes) -> bool:
    return b'"return"' in answer or b'"error"' in answer


if __name__ == "__main__":
    main()
