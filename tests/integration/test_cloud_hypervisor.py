"""The life of a VM on a real Cloud Hypervisor, where there is one on PATH."""

import contextlib
import errno
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from snapshot_tools import (
    archive,
    away,
    described,
    died,
    dying_at,
    extract,
    goes_on_from,
    last_count,
    pack,
    refused,
    restarted_by_systemd,
)

from agent.model import canonical

pytestmark = pytest.mark.skipif(
    shutil.which("cloud-hypervisor") is None, reason="cloud-hypervisor is not installed"
)


@pytest.fixture
def vm(make_vm: Callable[..., Any]) -> Any:
    """A VM that counts. Its guest hears no power button."""
    vm = make_vm(hypervisor="cloud-hypervisor", storage="8M", stop_timeout=1)
    vm.verb("start")
    vm.wait_counting()
    return vm


def test_it_starts_pauses_answers_and_stops(agent, vm, until):
    assert json.loads(vm.read("info.json"))["hypervisor_version"].startswith("53.")
    vm.verb("pause")
    assert vm.state == "paused"
    vm.verb("resume")
    vm.wait_counting()
    vm.write("console", "hello")
    until(lambda: "echo hello" in vm.read("console"))
    assert "vcpus 1" in vm.read("stats").splitlines()
    assert int(dict(line.split() for line in vm.read("stats").splitlines())["memory_bytes"]) > 0
    score = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", vm.unit],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    ).stdout
    assert float(re.search(r"exposure level.*?: ([0-9.]+)", score)[1]) <= 1.5
    vm.verb("pause")
    vm.verb("stop")
    assert (vm.state, vm.pid) == ("stopped", 0)
    lines = len(vm.counts)
    # Neither a socket nor its lock file of the first is in the way of the second.
    vm.verb("start")
    vm.wait_counting()
    assert vm.counts[lines] == 1


def test_its_disk_is_its_own_and_open_once(agent, vm):
    opened = {
        os.readlink(f"/proc/{vm.pid}/fd/{number}") for number in os.listdir(f"/proc/{vm.pid}/fd")
    }
    assert any(path.endswith("/cow.raw") for path in opened)
    devices = {path for path in opened if path.startswith("/dev/")}
    assert devices <= {"/dev/kvm", "/dev/urandom", "/dev/null"}


@pytest.mark.parametrize("away", ["kill", "restart", "stop"])
def test_its_console_goes_on_over_the_agents_absence(agent, vm, until, away):
    vm.write("console", "before")
    until(lambda: "echo before" in vm.read("console"))
    if away == "stop":
        agent.stop()
        agent.start()
    else:
        getattr(agent, away)()
    pid = vm.pid
    vm.wait_counting()
    vm.write("console", "after")
    until(lambda: "echo after" in vm.read("console").replace("\0", ""))
    vm.wait_counting()
    counts = vm.counts
    assert counts == list(range(1, len(counts) + 1))
    assert (vm.state, vm.pid) == ("running", pid)


def test_one_that_dies_is_in_error_or_comes_back_by_systemd_alone(agent, vm, make_vm, until):
    os.kill(vm.pid, signal.SIGKILL)
    vm.wait_for_state("error")
    assert "killed by signal KILL" in vm.read("error")
    vm.verb("start")
    vm.wait_counting()
    vm.verb("kill")
    vm.write("restart", "on-failure")
    vm.verb("start")
    restarted_by_systemd(agent, vm, until)
    vm.wait_for_state("running")
    lines = vm.counts.count(1)
    vm.wait_counting()
    assert lines >= 2
    vm.verb("kill")
    assert vm.state == "stopped"


def test_what_it_cannot_do_is_said_before_anything_starts(make_vm):
    vm = make_vm(hypervisor="cloud-hypervisor", track_dirty=True)
    with refused(errno.EOPNOTSUPP):
        vm.verb("start")
    assert "track_dirty" in vm.read("error")
    assert vm.state == "created"


def ask(api: Path, method: str, command: str, body: Any = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(api))
    connection.request(method, f"/api/v1/{command}", json.dumps(body) if body else None)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def info(vm: Any) -> Any:
    """What its VMM says of a VM."""
    _, content = ask(Path(f"/run/cocoon/{vm.read('id')}/sock/api"), "GET", "vm.info")
    return json.loads(content)


def ready(vm: Any, until: Any, count: int) -> None:
    """Let the guest make queues of its disks ready, which the VMM has a thread for from then on."""
    vm.wait_counting()
    vm.write("console", "d")
    until(lambda: f"{count} queues" in vm.read("console"))


def allowed(task: Path) -> str:
    """The CPUs that a thread or a process may run on."""
    status = (task / "status").read_text()
    return re.search(r"\nCpus_allowed_list:\s*(\S+)\n", status)[1]


def served(vm: Any) -> dict[str, str]:
    """The same of the threads for queues of disks, by name."""
    found = {}
    for task in Path(f"/proc/{vm.pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            found[(task / "comm").read_text().strip()] = allowed(task)
    return {name: cpus for name, cpus in found.items() if "_q" in name}


def in_configuration(agent: Any, vm: Any) -> bool:
    """Whether queues are tied in what the VM's process was loaded from."""
    return "queue_affinity" in (agent.root_dir / "vms" / vm.read("id") / "config.json").read_text()


def test_queues_are_tied_to_the_cpus_that_their_vm_names(agent, make_vm, vm_name, tmp_path, until):
    vm = make_vm(
        hypervisor="cloud-hypervisor",
        cpu=2,
        storage="8M",
        queue_affinity=[[1], [0]],
        stop_timeout=1,
    )
    vm.verb("start")
    ready(vm, until, 2)
    until(lambda: served(vm) == {"cow_q0": "1", "cow_q1": "0"})
    with refused(errno.EBUSY):
        vm.write("queue_affinity", "[]")
    # The guest cannot reach a disk that comes later, but the VMM says how it will serve it.
    vm.write("disks", '[{"name": "later", "size": "1M"}]')
    tie = [{"queue_index": 0, "host_cpus": [1]}, {"queue_index": 1, "host_cpus": [0]}]
    disks = info(vm)["config"]["disks"]
    assert [(disk["id"], disk["queue_affinity"]) for disk in disks] == [
        ("cow", tie),
        ("data-later", tie),
    ]
    name = vm_name()
    vm.write("snapshot", name)
    taken = extract(archive(agent, name), tmp_path)["config.json"].read_text()
    assert "data-later" in taken
    assert "queue_affinity" not in taken
    bare = {"hypervisor": None, "memory": None, "boot": None, "stop_timeout": 1}
    free, tied = (make_vm(**bare) for _ in range(2))
    for clone in (free, tied):
        clone.write("from", name)
    tied.write("queue_affinity", "[[0], [1]]")
    for clone in (free, tied):
        clone.verb("start")
    until(lambda: served(tied) == {"cow_q0": "0", "cow_q1": "1"})
    anywhere = allowed(Path(f"/proc/{free.pid}"))
    until(lambda: served(free) == {"cow_q0": anywhere, "cow_q1": anywhere})
    assert [in_configuration(agent, clone) for clone in (free, tied)] == [False, True]
    vm.write("restore", name)
    until(lambda: served(vm) == {"cow_q0": "1", "cow_q1": "0"})
    # Booted from its own disks, the clone has its own tie too, and with a disk more.
    tied.verb("stop")
    tied.verb("start")
    ready(tied, until, 4)
    names = ["cow_q0", "cow_q1", "data-later_q0", "data-later_q1"]
    until(lambda: served(tied) == dict(zip(names, ["0", "1"] * 2, strict=True)))
    archive(agent, name).unlink()


def test_a_cpu_that_is_not_here_is_refused_before_anything_starts(agent, make_vm, vm_name):
    vm = make_vm(hypervisor="cloud-hypervisor", storage="8M", queue_affinity=[[1023]])
    with refused(errno.EINVAL):
        vm.verb("start")
    assert "CPU 1023, which this host does not have" in vm.read("error")
    assert vm.state == "created"
    vm.write("queue_affinity", "[[0]]")
    vm.verb("start")
    name = vm_name()
    vm.write("snapshot", name)
    vm.verb("kill")
    vm.write("queue_affinity", "[[1023]]")
    with refused(errno.EINVAL):
        vm.write("restore", name)
    assert vm.state == "stopped"
    clone = make_vm(hypervisor=None, memory=None, boot=None)
    clone.write("from", name)
    clone.write("queue_affinity", "[[1023]]")
    with refused(errno.EINVAL):
        clone.verb("start")
    clone.write("queue_affinity", "[]")
    clone.verb("start")
    clone.wait_counting()
    archive(agent, name).unlink()


def test_a_clone_can_be_snapshot_before_its_memory_is_loaded(agent, make_vm, vm_name):
    source = make_vm(hypervisor="cloud-hypervisor", memory="512M")
    source.verb("start")
    source.wait_counting()
    first, second = vm_name(), vm_name()
    source.write("snapshot", first)
    clone = make_vm(hypervisor=None, memory=None, boot=None)
    clone.write("from", first)
    clone.verb("start")
    clone.write("snapshot", second)
    clone.wait_counting()
    for name in (first, second):
        archive(agent, name).unlink()


ELSEWHERE = f"{canonical.RUN}/cloudhypervisor/ELSEWHERE"
"""Where the files of a VM are that another host ran."""
NESTED_STATE = Path("/etc/systemd/system/cocoon-vm-.service.d/50-nested-state.conf")
"""Of a lab on a KVM that wants a library preloaded."""
_MOUNTS = """
mount -t tmpfs tmpfs /var/lib/cocoon
mkdir -p "$2"
mount --bind "$1" "$2"
shift 2
exec "$@"
"""
PAUSE = ("vm.pause", None)
SAVE = ("vm.snapshot", {"destination_url": f"file://{ELSEWHERE}"})


def put(api: Path, command: str, body: Any) -> None:
    status, content = ask(api, "PUT", command, body)
    assert status == 204, content


@pytest.fixture
def foreign(guests: Any, tmp_path: Path, until: Any) -> Callable[..., tuple[dict[str, bytes], int]]:
    """`foreign(*options)` is a snapshot's files that a host without this agent made, and a count.

    It had its own paths, a network of its own, and a console of its own.
    """
    shutil.copy(guests.guest, tmp_path / "vmlinux")
    (tmp_path / "root.raw").write_bytes(bytes(1 << 20))
    environment = dict(os.environ)
    if NESTED_STATE.exists():
        environment["LD_PRELOAD"] = f"{os.environ['COCOON_TEST_GUESTS']}/nested_state.so"
    output, api = tmp_path / "output", tmp_path / "api"

    def take(*options: str, cpu: int = 1) -> tuple[dict[str, bytes], int]:
        with output.open("wb") as stdout:
            process = subprocess.Popen(
                [
                    *("unshare", "--net", "--mount", "--propagation=private"),
                    *("sh", "-ec", _MOUNTS, "sh"),
                    *(str(tmp_path), ELSEWHERE, "cloud-hypervisor"),
                    *("--api-socket", f"{ELSEWHERE}/api", "--kernel", f"{ELSEWHERE}/vmlinux"),
                    *("--memory", "size=64M", "--cpus", f"boot={cpu},max=4,affinity=[0@[0]]"),
                    *("--disk", f"path={ELSEWHERE}/root.raw,image_type=raw,queue_affinity=[0@[0]]"),
                    *options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        try:
            until(lambda: b"count 2" in output.read_bytes() or process.poll())
            put(api, *PAUSE)
            put(api, *SAVE)
        finally:
            process.kill()
            process.wait()
        files = {name: (tmp_path / name).read_bytes() for name in ("state.json", "memory-ranges")}
        config = json.loads((tmp_path / "config.json").read_text()) | {"later": [{"unknown": 1}]}
        config["disks"][0]["later"] = 2.5
        metadata = {"hypervisor": "cloud-hypervisor", "cpu": cpu, "memory": 64 << 20}
        document = json.dumps({"version": 1, "config": {"name": "foreign", **metadata}}).encode()
        files |= {"config.json": json.dumps(config).encode(), "cow.raw": bytes(1 << 20)}
        return {"snapshot.json": document, **files}, last_count(output.read_bytes())

    return take


@pytest.fixture
def taken_in(agent: Any, tmp_path: Path) -> Iterator[Callable[[dict[str, bytes]], str]]:
    """`taken_in(files)` is the name of the snapshot that was imported from an archive of them."""

    def take_in(files: dict[str, bytes]) -> str:
        shutil.copy(pack(files, tmp_path / "foreign.tar"), archive(agent, "foreign"))
        return "foreign"

    yield take_in
    for name in ("foreign", "again"):
        archive(agent, name).unlink(missing_ok=True)


OFF = ("--serial", "tty", "--console", "off")


@pytest.mark.parametrize(
    "consoles",
    [
        ("--serial", f"file={ELSEWHERE}/output", "--console", "off"),
        ("--serial", "tty", "--console", "null"),
    ],
    ids=["file", "terminal"],
)
def test_a_snapshot_of_another_host_goes_on_with_our_console(
    agent, foreign, taken_in, make_vm, tmp_path, until, consoles
):
    files, count = foreign(*consoles)
    name = taken_in(files)
    vm = make_vm(hypervisor=None, memory=None, boot=None)
    vm.write("from", name)
    vm.verb("start")
    goes_on_from(vm, count)
    vm.write("console", "hello")
    until(lambda: "echo hello" in vm.read("console"))
    own = agent.root_dir / "vms" / vm.read("id")
    config = json.loads((own / "config.json").read_text())
    assert ELSEWHERE not in json.dumps(config)
    assert config["disks"][0]["path"] == f"{canonical.VM}/cow.raw"
    assert (config["later"], config["disks"][0]["later"]) == ([{"unknown": 1}], 2.5)
    assert (
        extract(archive(agent, name), tmp_path / "out")["config.json"].read_bytes()
        == (files["config.json"])
    )
    # What is taken here is ours, and shared as it is.
    vm.write("snapshot", "again")
    again = make_vm(hypervisor=None, memory=None, boot=None)
    again.write("from", "again")
    again.verb("start")
    again.wait_counting()
    kept = agent.root_dir / "snapshots" / described(agent, "again")["id"] / "config.json"
    assert kept.samefile(agent.root_dir / "vms" / again.read("id") / "config.json")
    vm.write("restore", "again")
    vm.wait_counting()


def test_a_snapshot_with_what_vms_have_not_here_is_refused_before_it_is_cloned(
    agent, foreign, taken_in, make_vm
):
    files, _ = foreign(*OFF)
    config = json.loads(files["config.json"]) | {"vsock": {"cid": 3, "socket": "/x"}}
    name = taken_in(files | {"config.json": json.dumps(config).encode()})
    vm = make_vm(hypervisor=None, memory=None, boot=None)
    with refused(errno.EOPNOTSUPP):
        vm.write("from", name)
    assert "a vsock" in vm.read("error")
    assert vm.read("from") == ""


NICS = ("--net", "mac=52:54:00:00:00:01", "mac=52:54:00:00:00:02,num_queues=4,mtu=1400")


@pytest.fixture
def with_nics(foreign: Any, taken_in: Any, agent: Any, tmp_path: Path) -> tuple[str, int, set[str]]:
    """A snapshot with two network interfaces: its name, its count, and what they are called."""
    files, count = foreign(*OFF, *NICS, cpu=2)
    nics = {nic["id"] for nic in json.loads(files["config.json"])["net"]}
    assert len(nics) == 2
    name = taken_in(files)
    metadata = extract(archive(agent, name), tmp_path / "metadata")["snapshot.json"]
    assert json.loads(metadata.read_text())["config"]["nics"] == 2
    return name, count, nics


@pytest.fixture
def clone(make_vm: Any, guests: Any) -> Callable[..., Any]:
    """`clone(snapshot)` is a VM that is to be cloned from it, and to boot anew later."""

    def make(snapshot: str, **config: Any) -> Any:
        vm = make_vm(hypervisor=None, memory=None, boot=None, **config)
        vm.write("from", snapshot)
        vm.write("boot", json.dumps({"kernel": str(guests.guest)}))
        return vm

    return make


def interfaces() -> set[str]:
    """The network interfaces that the host sees."""
    return {name for _, name in socket.if_nameindex()}


@pytest.mark.parametrize("mode", ["copy", "ondemand"])
def test_network_interfaces_of_another_host_are_taken_out_before_the_guest_goes_on(
    agent, with_nics, clone, until, mode
):
    name, count, nics = with_nics
    before = interfaces()
    vm = clone(name, restore_mode=mode, restart="on-failure")
    vm.verb("start")
    goes_on_from(vm, count)
    assert json.loads(vm.read("info.json"))["restored_by"] == mode
    found = info(vm)
    assert (found["state"], found["config"]["net"]) == ("Running", [])
    assert interfaces() == before
    # A guest that does not know ACPI never lets go of what it was asked for.
    assert nics <= found["device_tree"].keys()
    with refused(errno.EBUSY):
        vm.write("snapshot", "again")
    assert all(nic in vm.read("error") for nic in nics)
    restarted_by_systemd(agent, vm, until)
    vm.wait_for_state("running")
    vm.wait_counting()
    assert not nics & info(vm)["device_tree"].keys()
    vm.write("snapshot", "again")
    again = clone("again")
    again.verb("start")
    again.wait_counting()
    lines = len(vm.counts)
    vm.write("restore", name)
    vm.wait_counting()
    assert vm.counts[lines] > count
    found = info(vm)
    assert (found["state"], found["config"]["net"]) == ("Running", [])
    assert nics <= found["device_tree"].keys()
    assert interfaces() == before


@pytest.mark.thorough
@pytest.mark.parametrize("step", ["paused", "unplugged"])
@pytest.mark.parametrize("restores", [False, True], ids=["clone", "restore"])
def test_an_agent_that_dies_while_they_are_taken_out_leaves_no_guest_that_has_them(
    agent, with_nics, clone, until, restores, step
):
    name, count, _ = with_nics
    with dying_at(agent, f"{'restore' if restores else 'clone'}:{step}"):
        vm = clone(name)
        if restores:
            vm.verb("start")
        lines = len(vm.counts)
        with away():
            vm.write("restore", name) if restores else vm.verb("start")
        died(agent, until)
        if restores:
            vm.wait_for_state("running")
        else:
            vm.wait_for_state("stopped")
            vm.verb("start")
        vm.wait_counting()
        assert vm.counts[lines] > count
        assert info(vm)["config"]["net"] == []
