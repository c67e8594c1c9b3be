"""Snapshots that another host took of Cloud Hypervisor's guests, with all that it had there."""

import errno
import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ch_api import ask, environment, info
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


ELSEWHERE = f"{canonical.RUN}/cloudhypervisor/ELSEWHERE"
"""Where the files of a VM are that another host ran."""
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
                env=environment(),
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
