"""What a VMM that was taken over can see and do, from inside: tests/guest/inside.c in its place."""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from ch_api import preloaded
from jail_report import Identity, Report, identities_below, identity

from agent.helpers import stop, stop_post
from agent.model import canonical
from agent.model.access import Access
from agent.model.config import VmConfig
from agent.model.launch import LaunchPlan
from agent.model.vm import Vm
from agent.systemd.drop_in import DIRECTORY as DROP_IN
from agent.systemd.drop_in import FILE
from agent.systemd.users import USERDB
from agent.vmm.cloud_hypervisor import CloudHypervisor
from agent.vmm.driver import Version
from tests.integration.vm_units import MIB, VmUnit, VmUnits, replace_plan, systemctl

REFUSED = {"EPERM", "EACCES", "EAFNOSUPPORT", "SIGSYS"}


@dataclass
class Inside:
    """The program in the VMM's place, another VM beside it, and a process of the host's."""

    unit: VmUnit
    other: VmUnit
    victim: int
    abstract: str
    report: Report

    def order(self, line: str) -> str:
        """Have the program do something and return its answer."""
        self.unit.console.write(line + "\n")
        return self.unit.console.read_until(rb"^.+\n").decode().strip()


@pytest.fixture(scope="module", params=["firecracker", "cloud-hypervisor"])
def inside(request: pytest.FixtureRequest) -> Iterator[Inside]:
    """The unit is that of a VM of the backend which loads a snapshot, and has most."""
    firecracker = shutil.which("firecracker")
    assert firecracker is not None
    guests = Path(os.environ["COCOON_TEST_GUESTS"])
    units = VmUnits(sys.executable, firecracker, guests)
    other = units.firecracker_vm()
    victim = subprocess.Popen(["sleep", "infinity"])
    abstract = socket.socket(socket.AF_UNIX)
    # A name that the kernel chooses: labs that run side by side share the host's network.
    abstract.bind("")
    abstract.listen()
    abstract_name = "@" + abstract.getsockname()[1:].decode()
    try:
        assert other.start() == "done"
        other.console.read_until(rb"^count 3\r?\n")
        journald = int(
            systemctl("show", "--property=MainPID", "--value", "systemd-journald.service")
        )
        processes = [1, os.getpid(), victim.pid, journald, other.pid]
        sockets = [
            f"{other.paths.sockets}/api",
            f"{canonical.SOCKETS}/../../{other.vm.id}/sock/api",
            "/run/dbus/system_bus_socket",
            "/run/systemd/private",
            "/run/systemd/journal/socket",
            "/run/systemd/journal/stdout",
            "/dev/log",
            abstract_name,
        ]
        arguments = [word for pid in processes for word in ("-p", str(pid))]
        arguments += [word for name in sockets for word in ("-s", name)]
        program = str(guests / "inside")
        if request.param == "firecracker":
            unit = units.program(program, *arguments, restart="no")
        else:
            unit = units.make(_cloud_hypervisor(program, arguments), "cloud-hypervisor")
        # Something that a VM has: a disk, and a kernel that it shares with others.
        disk = Path(unit.paths.directory, canonical.COW)
        disk.write_bytes(b"disk")
        os.chown(disk, unit.vm.uid, unit.vm.uid)
        assert unit.start() == "done"
        report = Report.of(unit.console.read_until(rb"^end\n").decode().splitlines()[:-1])
        yield Inside(unit, other, victim.pid, abstract_name, report)
    finally:
        units.remove()
        victim.kill()
        victim.wait()
        abstract.close()


def _cloud_hypervisor(program: str, arguments: list[str]) -> LaunchPlan:
    """What the driver launches to load a clone, but with a program of ours for its binary."""
    driver = CloudHypervisor(device=True, unprivileged=False)
    vm = Vm(id="", name="", uid=0, access=Access(0, 0), config=VmConfig(memory=64 * MIB))
    plan = driver.plan(vm, Version(program, "53.0", (53, 0)), loads=True)
    assert set(plan.devices) == {"/dev/kvm", "/dev/urandom", "/dev/userfaultfd"}
    return replace(plan, arguments=tuple(arguments), load_arguments=())


def read_by_root(inside: Inside) -> set[Identity]:
    """All that root or systemd reads for this VM, and the directories on the way there."""
    paths = inside.unit.paths
    files = [
        paths.environment,
        *([] if inside.unit.plan.serial_socket else [paths.console_input, paths.console_output]),
        f"{DROP_IN}/{FILE}",
        f"/run/systemd/transient/{inside.unit.name}",
        f"{USERDB}/{inside.unit.vm.uid}.user",
        sys.executable,
        os.path.realpath(sys.executable),
        stop.__file__,
        stop_post.__file__,
    ]
    on_the_way = {path for file in files for path in (file, *map(str, Path(file).parents))}
    return {identity(path) for path in on_the_way} | identities_below(paths.jail)


def test_it_tried(inside):
    """The tests below say what came of nothing if the program tried nothing."""
    report = inside.report
    assert len(report.seen) > 20
    assert len(report.calls) > 70
    assert len(report.processes) > 40
    assert report.made == {canonical.VM, canonical.SOCKETS}
    own = {seen.path: seen.access for seen in report.seen}
    assert own[f"{canonical.VM}/{canonical.COW}"] == "rw-"


def test_it_sees_no_file_but_its_own(inside):
    unit = inside.unit
    known = identities_below(unit.paths.jail)
    known |= identities_below(unit.paths.directory)
    known |= identities_below(unit.paths.sockets)
    known |= {identity(path) for path in (unit.plan.binary, *unit.plan.devices)}
    # What systemd puts into every root that it makes.
    known |= {identity("/run/systemd/notify"), identity(f"/run/systemd/propagate/{unit.name}")}
    known |= identities_below("/run/systemd/inaccessible")
    if library := preloaded():
        known.add(identity(library))
    # Directories on the way to what is bound, made for this unit alone.
    made = {(path, "d", "r-x") for path in (canonical.ROOT, canonical.RUN)}
    foreign = [
        seen
        for seen in inside.report.seen
        if seen.identity not in known and (seen.path, seen.kind, seen.access) not in made
    ]
    assert foreign == []


def test_the_skeleton_tells_nothing(inside):
    for path in Path(inside.unit.paths.jail).rglob("*"):
        status = path.lstat()
        assert stat.S_ISDIR(status.st_mode) or status.st_size == 0
        assert status.st_uid == 0


def test_it_sees_no_file_or_socket_of_another_vm(inside):
    other = identities_below(inside.other.paths.directory)
    other |= identities_below(inside.other.paths.run)
    assert len(other) > 5
    assert [seen for seen in inside.report.seen if seen.identity in other] == []
    text = "".join(seen.path for seen in inside.report.seen)
    text += "".join(f"{name}={value}" for name, value in inside.report.environment.items())
    for word in (inside.other.vm.id, str(inside.other.vm.uid)):
        assert word not in text.replace(inside.report.environment["ARGUMENTS"], "")


def test_it_has_no_device_but_its_own(inside):
    devices = [seen for seen in inside.report.seen if seen.kind in "cb"]
    own = {(path, "rw-") for path in inside.unit.plan.devices}
    assert {(seen.path, seen.access) for seen in devices} == own


def test_it_reaches_no_socket(inside):
    assert len(inside.report.sockets) == 8
    assert set(inside.report.sockets.values()) <= {"ENOENT", "ECONNREFUSED", "EACCES"}


def test_it_has_no_network(inside):
    assert inside.report.interfaces == ["lo"]
    families = {name: end for name, end in inside.report.calls.items() if "socket AF_" in name}
    assert len(families) == 14
    assert set(families.values()) == {"EAFNOSUPPORT"}


def test_it_has_no_capability_and_can_gain_none(inside):
    status = inside.report.status
    assert set(status["capabilities"].replace(" ", "")) == {"0"}
    assert status["bounding"] == "0"
    assert status["ambient"] == "0"
    assert status["no_new_privs"] == "1"
    assert status["seccomp"] == "2"


def test_it_is_nobody_but_itself(inside):
    uid = inside.unit.vm.uid
    assert inside.report.status["uids"] == f"{uid} {uid} {uid}"
    assert inside.report.status["gids"] == f"{uid} {uid} {uid}"
    kvm = os.stat("/dev/kvm").st_gid
    assert set(map(int, inside.report.status["groups"].split())) == {uid, kvm}


def test_it_leaves_nothing_for_others_to_read(inside):
    assert inside.report.status["core"] == "0"
    assert inside.report.status["umask"] == "77"


def test_its_root_is_read_only(inside):
    assert inside.report.status["root"] == "read-only"


def test_no_forbidden_call_succeeds(inside):
    assert {name: end for name, end in inside.report.calls.items() if end not in REFUSED} == {}
    assert inside.report.calls["another architecture"] == "SIGSYS"


def test_a_vmm_that_ties_threads_to_cpus_may_do_no_more_than_that():
    firecracker = shutil.which("firecracker")
    assert firecracker is not None
    guests = Path(os.environ["COCOON_TEST_GUESTS"])
    units = VmUnits(sys.executable, firecracker, guests)
    try:
        unit = units.program(str(guests / "inside"), restart="no")
        replace_plan(unit, sets_affinity=True)
        assert unit.start() == "done"
        report = Report.of(unit.console.read_until(rb"^end\n").decode().splitlines()[:-1])
    finally:
        units.remove()
    done = {name for name, end in report.calls.items() if end not in REFUSED}
    assert done == {"sched_setaffinity"}


def test_it_can_neither_signal_nor_trace_a_foreign_process(inside):
    assert len({pid for pid, _ in inside.report.processes}) == 5
    assert set(inside.report.processes.values()) == {"EPERM"}


def test_it_sees_no_list_of_processes(inside):
    proc = [seen.path for seen in inside.report.seen if seen.path.startswith(("/proc", "/sys"))]
    assert sorted(proc) == ["/proc", "/sys"]


def test_it_can_write_nothing_that_root_or_systemd_reads(inside):
    writable = {seen.path: seen.identity for seen in inside.report.seen if "w" in seen.access}
    writable |= {
        seen.path: seen.identity for seen in inside.report.seen if seen.path in inside.report.made
    }
    inside_vm = [path for path in writable if path.startswith((canonical.VM, canonical.SOCKETS))]
    assert set(writable) == {*inside_vm, *inside.unit.plan.devices}
    assert inside.report.changed == []
    sensitive = read_by_root(inside)
    assert [path for path, file in writable.items() if file in sensitive] == []


def test_its_descriptors_are_the_console_and_the_journal(inside):
    paths = inside.unit.paths
    descriptors = inside.report.descriptors
    assert sorted(descriptors) == [0, 1, 2]
    if inside.unit.plan.serial_socket:
        assert descriptors[0][:2] == ("c", identity("/dev/null"))
        assert (descriptors[1][0], descriptors[2][0]) == ("s", "s")
        return
    kind, file, flags = descriptors[0]
    assert (kind, file) == ("p", identity(paths.console_input))
    assert flags & os.O_ACCMODE == os.O_RDONLY
    kind, file, flags = descriptors[1]
    assert (kind, file) == ("p", identity(paths.console_output))
    assert flags & os.O_ACCMODE == os.O_WRONLY
    assert descriptors[2][0] == "s"


def test_its_environment_tells_nothing_of_the_host(inside):
    unit = inside.unit
    assert set(inside.report.environment) <= {
        *("PATH", "LANG", "HOME", "LOGNAME", "USER", "SHELL"),
        *("NOTIFY_SOCKET", "INVOCATION_ID", "JOURNAL_STREAM", "SYSTEMD_EXEC_PID"),
        *("BACKEND", "ARGUMENTS", "BOOT_ARGUMENTS", "RUN_DIRECTORY", "VM_UID", "STOP_TIMEOUT"),
        *(["LD_PRELOAD"] if preloaded() else []),
    }
    assert inside.report.environment["RUN_DIRECTORY"] == unit.paths.run


def test_a_signal_to_all_that_it_may_reaches_nobody_else(inside):
    assert inside.order("kill") in ("done", "ESRCH")
    os.kill(inside.victim, 0)
    assert not Path(f"/proc/{inside.victim}/status").read_text().count("State:\tZ")
    inside.other.console.forget()
    inside.other.console.read_until(rb"^count \d+\r?\n")
    assert inside.other.show("NRestarts") == "0"


def test_systemd_does_not_take_its_word_for_another_process(inside, until):
    before = {unit.name: unit.pid for unit in (inside.unit, inside.other)}
    assert inside.order("usurp") == "done"
    until(lambda: inside.unit.show("StatusText") == "taken over", what="systemd heard it")
    assert {unit.name: unit.pid for unit in (inside.unit, inside.other)} == before


def test_what_it_shouts_is_no_emergency(inside, journal, until):
    assert inside.order("shout") == "done"
    entries = until(
        lambda: [
            entry
            for entry in journal.entries(inside.unit.name)
            if "shouted" in str(entry.get("MESSAGE", ""))
        ],
        what="the journal has it",
    )
    assert entries[0]["PRIORITY"] == "6"
    assert entries[0]["_UID"] == str(inside.unit.vm.uid)
    assert entries[0]["_SYSTEMD_UNIT"] == inside.unit.name


def test_what_it_leaves_behind_is_ended_and_leads_root_nowhere(inside, tmp_path):
    """The last test: it ends the program."""
    paths = inside.unit.paths
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "file").write_text("kept")
    links = {
        "api": str(treasure / "file"),
        "directory": str(treasure),
        "environment": paths.environment,
        "exit": paths.exit_record,
    }
    for name, target in links.items():
        assert inside.order(f"link {canonical.SOCKETS}/{name} {target}") == "done"
    assert inside.order("fork") == "done"
    pid = inside.unit.pid
    child = Path(f"/proc/{pid}/task/{pid}/children").read_text().strip()
    assert Path(f"/proc/{child}/stat").exists()
    before = Path(paths.environment).read_bytes()
    inside.unit.stop()
    assert not Path(f"/proc/{child}/stat").exists()
    assert os.listdir(paths.sockets) == []
    assert (treasure / "file").read_text() == "kept"
    assert Path(paths.environment).read_bytes() == before
    record = inside.unit.exit_record
    assert record is not None
    assert record.status == signal.Signals.SIGTERM.name.removeprefix("SIG")
