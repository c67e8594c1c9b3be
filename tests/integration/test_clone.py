"""Clones: VMs whose first start goes on from a snapshot, with real VMMs."""

import concurrent.futures
import errno
import hashlib
import json
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jail_report import Report, identities_below
from snapshot_tools import (
    archive,
    described,
    environment,
    extract,
    last_count,
    names,
    pack,
    refused,
    restarted_by_systemd,
    write_once,
)

from agent.model import canonical
from agent.model.snapshot import STATE_FILES
from agent.model.vmstate import crc64

pytestmark = [pytest.mark.thorough(group="snapshots"), pytest.mark.backends]


@pytest.fixture
def taken(agent: Any, make_vm: Callable[..., Any]) -> Any:
    """A snapshot's name, the VM it was taken of, and the count at which it was about taken."""
    vm = make_vm(storage="8M")
    vm.verb("start")
    vm.wait_counting()
    name = f"of-{vm.name}"
    before = last_count((vm.path / "console").read_bytes())
    vm.write("snapshot", name)
    after = last_count((vm.path / "console").read_bytes())
    yield name, vm, (before, after + 1)
    for found in names(agent):
        archive(agent, found).unlink()


@pytest.fixture
def clone(make_vm: Callable[..., Any]) -> Callable[..., Any]:
    """`clone(snapshot)` makes a VM that was started from it."""

    def make(snapshot: str) -> Any:
        vm = make_vm(hypervisor=None, memory=None, boot=None)
        vm.write("from", snapshot)
        vm.verb("start")
        return vm

    return make


def own_disk(vm: Any) -> tuple[int, int]:
    """Device and inode of the disk that the VMM has open."""
    for link in Path(f"/proc/{vm.pid}/fd").iterdir():
        if os.readlink(link).endswith("/cow.raw"):
            facts = link.stat()
            return facts.st_dev, facts.st_ino
    raise AssertionError("no disk is open")


@pytest.mark.backends(core=True)
def test_a_clone_goes_on_from_exactly_there_on_its_own_disk(agent, taken, clone):
    name, source, (low, high) = taken
    vm = clone(name)
    vm.wait_counting()
    counts = vm.counts
    assert low < counts[0] <= high + 1
    assert counts == list(range(counts[0], counts[0] + len(counts)))
    source.wait_counting()
    disks = {own_disk(source), own_disk(vm)}
    assert len(disks) == 2
    for which, content in ((source, b"source"), (vm, b"clone!")):
        with (agent.root_dir / "vms" / which.read("id") / "cow.raw").open("r+b") as disk:
            disk.write(content)
    for which, content in ((source, b"source"), (vm, b"clone!")):
        with (agent.root_dir / "vms" / which.read("id") / "cow.raw").open("rb") as disk:
            assert disk.read(6) == content
    kept = agent.root_dir / "snapshots" / described(agent, name)["id"] / "cow.raw"
    assert kept.read_bytes()[:6] == bytes(6)


def test_from_pins_what_the_snapshot_fixes(taken, make_vm, backend):
    name, _, _ = taken
    vm = make_vm(hypervisor=None, memory=None, boot=None)
    vm.write("from", name)
    assert vm.read("from") == name
    assert vm.read("memory") == str(64 << 20)
    assert vm.read("storage") == str(8 << 20)
    assert vm.read("hypervisor") == backend
    vm.write("memory", "64M")
    with refused(errno.EOPNOTSUPP):
        vm.write("memory", "128M")
    assert "memory" in vm.read("error")
    assert vm.read("memory") == str(64 << 20)


def test_one_write_clones(agent, taken, vm_name):
    name, _, _ = taken
    vm = agent.mount / "vms" / vm_name()
    document = {"name": vm.name, "from": name, "state": "start"}
    write_once(agent.mount / "create", json.dumps(document))
    assert (vm / "state").read_text() == "running\n"
    write_once(vm / "state", "kill")
    vm.rmdir()


def test_a_snapshot_that_is_not_there_is_enoent(agent, make_vm, vm_name):
    vm = make_vm()
    with refused(errno.ENOENT):
        vm.write("from", "no-such")
    document = {"name": vm_name(), "from": "no-such", "state": "start"}
    with refused(errno.ENOENT):
        write_once(agent.mount / "create", json.dumps(document))
    assert not (agent.mount / "vms" / document["name"]).exists()


def test_only_who_may_read_a_snapshot_may_clone_it(agent, taken, make_vm):
    name, _, _ = taken
    vm = make_vm(hypervisor=None, memory=None, boot=None)
    os.chown(vm.path, 4242, -1)

    def as_owner() -> "subprocess.CompletedProcess[str]":
        command = f"echo {name} > {vm.path}/from"
        words = ["setpriv", "--reuid=4242", "--regid=4242", "--clear-groups", "bash", "-c", command]
        return subprocess.run(words, timeout=60, capture_output=True, text=True)

    assert "Permission denied" in as_owner().stderr
    assert vm.read("from") == ""
    archive(agent, name).chmod(0o644)
    assert as_owner().returncode == 0
    assert vm.read("from") == name


@pytest.mark.backends(core=True)
def test_many_at_once_while_the_source_runs(taken, make_vm):
    name, source, (low, high) = taken
    vms = [make_vm(hypervisor=None, memory=None, boot=None) for _ in range(8)]
    for vm in vms:
        vm.write("from", name)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda vm: vm.verb("start"), vms))
    for vm in vms:
        vm.wait_counting()
        assert low < vm.counts[0] <= high + 1
    assert len({own_disk(vm) for vm in vms}) == 8
    assert source.state == "running"


@pytest.mark.backends(core=True)
def test_a_clone_lives_on_without_source_and_snapshot(agent, taken, clone):
    name, source, _ = taken
    vm = clone(name)
    source.remove()
    archive(agent, name).unlink()
    vm.wait_counting()
    agent.restart()
    vm.wait_counting()
    vm.write("snapshot", f"{name}-again")
    again = clone(f"{name}-again")
    again.wait_counting()
    vm.verb("stop")
    vm.verb("start")
    vm.wait_counting()


def test_a_clone_whose_snapshot_went_away_before_is_enoent(agent, taken, make_vm):
    name, _, _ = taken
    vm = make_vm(hypervisor=None, memory=None, boot=None)
    vm.write("from", name)
    archive(agent, name).unlink()
    with refused(errno.ENOENT):
        vm.verb("start")
    assert not (agent.root_dir / "vms" / vm.read("id")).exists()


def test_a_clone_that_could_not_start_leaves_nothing_in_the_way(
    agent, taken, make_vm, until, guests, tmp_path
):
    name, _, _ = taken
    vm = make_vm(hypervisor=None, memory=None, boot=None)
    vm.write("from", name)
    kernel = tmp_path / "kernel"
    kernel.write_bytes(guests.guest.read_bytes())
    vm.write("boot", json.dumps({"kernel": str(kernel)}))
    kernel.unlink()
    for _ in range(2):
        with refused(errno.ENOENT):
            vm.verb("start")
    until(lambda: not [*(agent.root_dir / "vms").glob(f".removed-{vm.read('id')}*")])
    vm.write("boot", "null")
    vm.verb("start")
    vm.wait_counting()


@pytest.mark.backends(core=True)
def test_a_clone_that_was_taken_over_changes_no_snapshot_and_no_sibling(
    agent, taken, make_vm, clone, backend, until
):
    """tests/guest/inside.c is loaded in the VMM's place, by the agent, in the jail of a clone."""
    name, _, _ = taken
    sibling = clone(name)
    kept = agent.root_dir / "snapshots" / described(agent, name)["id"]
    of_sibling = agent.root_dir / "vms" / sibling.read("id")
    before = contents(kept)
    program = str(Path(os.environ["COCOON_TEST_GUESTS"], "inside"))
    programs = dict.fromkeys(
        ("COCOON_FIRECRACKER", "COCOON_QEMU", "COCOON_CLOUD_HYPERVISOR"), program
    )
    with environment(agent, **programs):
        vm = make_vm(hypervisor=None, memory=None, boot=None)
        vm.write("from", name)
        with concurrent.futures.ThreadPoolExecutor() as threads:
            start = threads.submit(vm.verb, "start")
            until(lambda: vm.read("console").endswith("\nend"), what="all was tried")
            report = Report.of(vm.read("console").splitlines()[:-1])
            own = agent.root_dir / "vms" / vm.read("id")
            shared = identities_below(kept) & identities_below(own)
            vm.verb("kill")
            with pytest.raises(OSError, match=r"Errno"):
                start.result()
    agent.restart()
    seen = {seen.path: seen for seen in report.seen}
    assert seen[f"{canonical.VM}/{canonical.COW}"].access == "rw-"
    # QEMU would need to write to the memory that it loads: each clone of its has a copy.
    files = STATE_FILES[backend]
    expected = {*files.small} | ({files.memory} if backend != "qemu" else set())
    in_jail = {Path(path).name for path, file in seen.items() if file.identity in shared}
    assert in_jail == expected
    foreign = identities_below(kept) | identities_below(of_sibling)
    assert [file for file in seen.values() if file.identity in foreign and "w" in file.access] == []
    assert seen[canonical.KERNEL].access == "r--"
    assert report.changed == []
    assert contents(kept) == before
    sibling.wait_counting()


def contents(directory: Path) -> dict[str, tuple[str, int, int]]:
    """Digest, mode and owner of each file."""
    found = {}
    for path in directory.iterdir():
        status = path.stat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found[path.name] = digest, status.st_mode, status.st_uid
    return found


@pytest.mark.backends(core=True)
def test_a_clone_boots_cold_from_its_own_disk_and_kernel(agent, taken, clone, backend):
    name, _, _ = taken
    vm = clone(name)
    vm.wait_counting()
    vm.verb("stop")
    lines = len(vm.counts)
    vm.verb("start")
    vm.wait_counting()
    assert vm.counts[lines] == 1
    directory = agent.root_dir / "vms" / vm.read("id")
    assert not (directory / STATE_FILES[backend].state).exists()
    # QEMU's memory is a file in any case, here a new one.
    assert (directory / "mem").exists() == (backend == "qemu")


def test_systemd_restarts_a_clone_from_its_own_disk_without_the_agent(agent, taken, make_vm, until):
    name, _, _ = taken
    vm = make_vm(hypervisor=None, memory=None, boot=None, restart="on-failure")
    vm.write("from", name)
    vm.verb("start")
    vm.wait_counting()
    restarted_by_systemd(agent, vm, until)
    assert vm.state == "running"
    lines = len(vm.counts)
    vm.wait_counting()
    assert vm.counts[lines - 1] < 1000
    assert 1 in vm.counts


def foreign(files: dict[str, bytes], path: str, told: str) -> dict[str, bytes]:
    """Make our snapshot one that another host took, where the disk was at `path`.

    `told` is where `cocoon.json` says that it was.
    """
    canonical = b"/var/lib/cocoon/run/vm/cow.raw"
    state = files["vmstate"][:-8]
    old = struct.pack("<Q", len(canonical)) + canonical
    assert state.count(old) == 1
    state = state.replace(old, struct.pack("<Q", len(path)) + path.encode())
    sidecar = json.loads(files["cocoon.json"])
    sidecar["storage_configs"][0]["path"] = told
    sidecar["boot_config"] = {"kernel_path": "", "initrd_path": ""}
    return {
        "snapshot.json": files["snapshot.json"],
        "vmstate": state + struct.pack("<Q", crc64(state)),
        "mem": files["mem"],
        "cow.raw": files["cow.raw"],
        "cocoon.json": json.dumps(sidecar).encode(),
    }


@pytest.fixture
def foreign_snapshot(agent: Any, taken: Any, tmp_path: Path) -> Callable[..., str]:
    """`foreign_snapshot(path)` is imported, of a VM whose disk was at `path` on its host."""

    def make(path: str, told: str = "", **changes: bytes) -> str:
        name, _, _ = taken
        files = extract(archive(agent, name), tmp_path / "files")
        contents = {name: file.read_bytes() for name, file in files.items()}
        packed = pack(foreign(contents, path, told or path) | changes, tmp_path / "foreign.tar")
        into = archive(agent, f"{name}-foreign")
        with packed.open("rb") as source, into.open("wb", buffering=0) as target:
            while piece := source.read(1 << 20):
                target.write(piece)
        return into.stem

    return make


@pytest.mark.backends("firecracker")
def test_a_snapshot_with_paths_of_another_host_clones(agent, foreign_snapshot, clone):
    path = "/var/lib/cocoon/run/firecracker/K3ZQ7WMB5TNXE2LVAGHRDYC6PS/cow.raw"
    name = foreign_snapshot(path)
    vm = clone(name)
    vm.wait_counting()
    first = vm.counts[0]
    assert first > 1
    disk = agent.root_dir / "vms" / vm.read("id") / "cow.raw"
    assert own_disk(vm) == (disk.stat().st_dev, disk.stat().st_ino)
    # Its own snapshot clones too: the path stays in the VMM's state.
    vm.write("snapshot", f"{name}-own")
    again = clone(f"{name}-own")
    again.wait_counting()
    assert again.counts[0] > first
    disk = agent.root_dir / "vms" / again.read("id") / "cow.raw"
    assert own_disk(again) == (disk.stat().st_dev, disk.stat().st_ino)


@pytest.mark.backends("firecracker")
def test_the_paths_of_a_snapshot_are_made_for_its_clone_alone(agent, foreign_snapshot, clone):
    """Else an archive could put a directory where other VMs need a file, or litter the host."""

    def shared() -> set[Path]:
        return {*Path("/run/cocoon/jail").rglob("*"), *agent.root_dir.glob("*")}

    name = foreign_snapshot(f"{canonical.FIRMWARE}/cow.raw")
    before = shared()
    vm = clone(name)
    vm.wait_counting()
    vm.verb("stop")
    assert shared() == before
    assert not Path(canonical.RUN).exists()


@pytest.mark.backends("firecracker")
def test_the_vmms_state_counts_where_the_sidecar_says_otherwise(agent, foreign_snapshot, clone):
    """So it is in a snapshot that Cocoon took of a clone."""
    run = "/var/lib/cocoon/run/firecracker"
    vm = clone(foreign_snapshot(f"{run}/SOURCE/cow.raw", f"{run}/CLONE/cow.raw"))
    vm.wait_counting()
    assert vm.counts[0] > 1
    disk = agent.root_dir / "vms" / vm.read("id") / "cow.raw"
    assert own_disk(vm) == (disk.stat().st_dev, disk.stat().st_ino)


@pytest.mark.backends("firecracker")
def test_a_clone_without_a_kernel_cannot_boot_cold_until_it_is_given_one(
    agent, foreign_snapshot, make_vm, guests
):
    name = foreign_snapshot("/var/lib/cocoon/run/x/cow.raw")
    vm = make_vm(hypervisor=None, memory=None, boot=None, restart="on-failure")
    vm.write("from", name)
    vm.verb("start")
    vm.wait_counting()
    command = ["systemctl", "show", "-P", "Restart", vm.unit]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "no\n"
    vm.verb("stop")
    with refused(errno.ENOENT):
        vm.verb("start")
    assert "boot" in vm.read("error")
    vm.write("boot", json.dumps({"kernel": str(guests.guest)}))
    vm.verb("start")
    assert vm.state == "running"
    vm.wait_counting()


@pytest.mark.backends("firecracker")
def test_a_path_outside_cocoons_directories_is_refused(agent, foreign_snapshot):
    with refused(errno.EINVAL):
        foreign_snapshot("/etc/cow.raw")
    assert not [name for name in names(agent) if name.endswith("-foreign")]


@pytest.mark.backends("firecracker")
def test_a_state_with_a_bit_turned_is_refused(agent, foreign_snapshot):
    with refused(errno.EBADMSG):
        foreign_snapshot("/var/lib/cocoon/run/x/cow.raw", vmstate=b"nothing that a VMM wrote" * 99)
    assert not [name for name in names(agent) if name.endswith("-foreign")]
