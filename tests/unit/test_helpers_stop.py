import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.helpers import stop

HELPER = Path(stop.__file__)
NO_CONTENT = b"HTTP/1.1 204 No Content\r\nServer: VMM\r\nConnection: keep-alive\r\n\r\n"


def refusal(text: str) -> bytes:
    body = json.dumps({"fault_message": text}).encode()
    return b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


class Vmm:
    """A process that ends when it is told, and an API socket with a script."""

    def __init__(self, run: Path, ignores_sigterm: bool = False) -> None:
        self.run = run
        ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " if ignores_sigterm else ""
        code = f"import signal; {ignore}print('up', flush=True); signal.pause()"
        self.process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.process.stdout.readline()
        self.heard: list[bytes] = []
        self.server: socket.socket | None = None

    def serve(self, answer: Callable[[socket.socket, "Vmm"], None]) -> None:
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(self.run / "sock/api"))
        self.server.listen()

        def loop(server: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection, contextlib.suppress(OSError):
                        answer(connection, self)

        threading.Thread(target=loop, args=(self.server,), daemon=True).start()

    def stop(
        self, backend: str, seconds: float, uid: int | None = None
    ) -> "subprocess.CompletedProcess[str]":
        owner = str(os.getuid() if uid is None else uid)
        return subprocess.run(
            [sys.executable, "-I", "-S", HELPER, backend, self.run, owner, str(seconds)],
            env={"MAINPID": str(self.process.pid)},
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def guest_ends(self) -> None:
        self.process.send_signal(signal.SIGUSR1)


@pytest.fixture
def make_vmm(tmp_path) -> Iterator[Callable[..., Vmm]]:
    (tmp_path / "sock").mkdir()
    made = []

    def make(**options: bool) -> Vmm:
        made.append(Vmm(tmp_path, **options))
        return made[-1]

    yield make
    for vmm in made:
        vmm.process.kill()
        vmm.process.wait()
        if vmm.server is not None:
            vmm.server.close()


def request(connection: socket.socket) -> bytes:
    """One HTTP request, as method, path and body."""
    with connection.makefile("rb", buffering=0) as stream:
        line = stream.readline().split()
        length = 0
        while (header := stream.readline()) not in (b"\r\n", b""):
            name, _, value = header.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return b" ".join([*line[:2], stream.read(length) if length else b""])


def every_request(connection: socket.socket, vmm: Vmm) -> None:
    """Grant every request; at the last one that a backend gets, the guest powers off."""
    while heard := request(connection).strip():
        vmm.heard.append(heard)
        connection.sendall(NO_CONTENT)
        if b"SendCtrlAltDel" in heard or b"power-button" in heard:
            vmm.guest_ends()


def test_without_a_main_process_there_is_nothing_to_do():
    subprocess.run(
        [sys.executable, "-I", "-S", HELPER, "firecracker", "/nowhere", "1", "30"],
        env={},
        check=True,
        timeout=60,
    )


def test_a_process_that_is_gone_is_nothing_to_do(make_vmm):
    vmm = make_vmm()
    vmm.process.kill()
    vmm.process.wait()
    vmm.stop("firecracker", 30)


def test_a_process_of_somebody_else_is_left_alone(make_vmm):
    vmm = make_vmm()
    vmm.stop("firecracker", 0, uid=os.getuid() + 1)
    assert vmm.process.poll() is None


def test_firecrackers_guest_is_resumed_and_asked(make_vmm):
    vmm = make_vmm()
    vmm.serve(every_request)
    vmm.stop("firecracker", 30)
    assert vmm.process.wait() == -signal.SIGUSR1
    assert vmm.heard == [
        b'PATCH /vm {"state": "Resumed"}',
        b'PUT /actions {"action_type": "SendCtrlAltDel"}',
    ]


def test_cloud_hypervisors_guest_is_resumed_and_asked(make_vmm):
    vmm = make_vmm()
    vmm.serve(every_request)
    vmm.stop("cloud-hypervisor", 30)
    assert vmm.process.wait() == -signal.SIGUSR1
    assert vmm.heard == [b"PUT /api/v1/vm.resume", b"PUT /api/v1/vm.power-button"]


def test_a_cloud_hypervisor_whose_guest_is_deaf_is_asked_to_end(make_vmm):
    vmm = make_vmm()

    def deaf(connection: socket.socket, vmm: Vmm) -> None:
        while heard := request(connection).strip():
            vmm.heard.append(heard)
            connection.sendall(NO_CONTENT)
            if b"vmm.shutdown" in heard:
                vmm.guest_ends()

    vmm.serve(deaf)
    vmm.stop("cloud-hypervisor", 0.2)
    assert vmm.process.wait() in (-signal.SIGUSR1, -signal.SIGTERM)
    assert vmm.heard[-1] == b"PUT /api/v1/vmm.shutdown"


def test_qemus_guest_is_resumed_and_asked(make_vmm):
    vmm = make_vmm()

    def answer(connection: socket.socket, vmm: Vmm) -> None:
        connection.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
        for line in connection.makefile("rb"):
            vmm.heard.append(json.loads(line)["execute"])
            connection.sendall(b'{"event": "RESUME"}\r\n{"return": {}}\r\n')
            if vmm.heard[-1] == "system_powerdown":
                vmm.guest_ends()

    vmm.serve(answer)
    vmm.stop("qemu", 30)
    assert vmm.process.wait() == -signal.SIGUSR1
    assert vmm.heard == ["qmp_capabilities", "cont", "system_powerdown"]


def test_a_guest_that_stays_gets_sigterm_when_the_time_is_up(make_vmm):
    vmm = make_vmm()

    def stay(connection: socket.socket, _vmm: Vmm) -> None:
        while request(connection).strip():
            connection.sendall(NO_CONTENT)

    vmm.serve(stay)
    vmm.stop("firecracker", 0.2)
    assert vmm.process.wait() == -signal.SIGTERM


def test_a_vmm_that_ignores_sigterm_is_killed(make_vmm):
    vmm = make_vmm(ignores_sigterm=True)
    vmm.stop("firecracker", 30)
    assert vmm.process.wait() == -signal.SIGKILL


def test_a_guest_that_cannot_be_asked_is_not_waited_for(make_vmm):
    vmm = make_vmm()

    def refuse(connection: socket.socket, _vmm: Vmm) -> None:
        while request(connection).strip():
            connection.sendall(refusal("no guest runs"))

    vmm.serve(refuse)
    done = vmm.stop("firecracker", 3600)
    assert vmm.process.wait() == -signal.SIGTERM
    assert "no guest runs" in done.stderr


def silence(connection: socket.socket, _vmm: Vmm) -> None:
    while connection.recv(4096):
        pass


def babble(connection: socket.socket, _vmm: Vmm) -> None:
    while True:
        connection.sendall(b"x" * 4096)


def nonsense(connection: socket.socket, _vmm: Vmm) -> None:
    connection.sendall(b"HTTP/1.1 204\r\nContent-Length: many\r\n\r\n")


def hang_up(connection: socket.socket, _vmm: Vmm) -> None:
    connection.recv(1)


@pytest.mark.parametrize("backend", ["firecracker", "cloud-hypervisor", "qemu"])
@pytest.mark.parametrize("answer", [silence, babble, nonsense, hang_up])
def test_whatever_a_vmm_answers_it_ends(make_vmm, answer, backend):
    vmm = make_vmm()
    vmm.serve(answer)
    vmm.stop(backend, 0.2)
    assert vmm.process.wait() == -signal.SIGTERM


@pytest.mark.parametrize("kind", ["link", "linked directory", "file", "fifo", "nothing"])
def test_nothing_but_a_socket_is_talked_to(make_vmm, tmp_path, kind):
    vmm = make_vmm()
    foreign = socket.socket(socket.AF_UNIX)
    (tmp_path / "elsewhere").mkdir()
    foreign.bind(str(tmp_path / "elsewhere/api"))
    foreign.listen()
    foreign.setblocking(False)
    match kind:
        case "link":
            (tmp_path / "sock/api").symlink_to(tmp_path / "elsewhere/api")
        case "linked directory":
            (tmp_path / "sock").rmdir()
            (tmp_path / "sock").symlink_to(tmp_path / "elsewhere")
        case "file":
            (tmp_path / "sock/api").touch()
        case "fifo":
            os.mkfifo(tmp_path / "sock/api")
    done = vmm.stop("firecracker", 3600)
    assert vmm.process.wait() == -signal.SIGTERM
    assert "cannot be asked" in done.stderr
    with pytest.raises(BlockingIOError):
        foreign.accept()


def test_a_socket_of_somebody_else_is_not_talked_to(tmp_path):
    (tmp_path / "sock").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "sock/api"))
        with pytest.raises(OSError, match="not a socket of the VM's"):
            stop.connect(str(tmp_path), os.getuid() + 1, 0)


@pytest.mark.parametrize("helper", ["stop.py", "stop_post.py"])
def test_a_helper_loads_little_so_that_it_is_quick(helper, tmp_path):
    arguments = ["firecracker", "/nowhere", "1", "30"] if helper == "stop.py" else [tmp_path]
    listing = subprocess.run(
        [sys.executable, "-I", "-S", "-X", "importtime", HELPER.with_name(helper), *arguments],
        env={},
        stderr=subprocess.PIPE,
        text=True,
    ).stderr
    loaded = {line.rpartition("|")[2].strip() for line in listing.splitlines() if "|" in line}
    assert "os" in loaded
    assert not {"asyncio", "json", "logging", "pathlib", "re", "subprocess", "typing"} & loaded
