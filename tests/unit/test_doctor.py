"""The checks of the host: what facts mean, and that reading the outcome neither waits nor acts."""

import os
import re

import pytest
import trio
import trio.testing

from agent.lifecycle import checks
from agent.lifecycle.doctor import Doctor
from agent.lifecycle.start import plan_launch
from agent.model.access import Access
from agent.model.config import Boot, VmConfig
from agent.model.errors import Failed, Missing, Unsupported
from agent.model.finding import Finding, Level, show_findings
from agent.model.launch import LaunchPlan
from agent.model.size import GIB, MIB
from agent.model.vm import Vm
from agent.storage import reflink
from agent.storage.facts import StorageFacts, storage_facts
from agent.storage.reflink import shares_blocks
from agent.storage.tree import Tree
from agent.systemd.bus import BusGone
from agent.systemd.facts import (
    Cgroups,
    SystemdAnswers,
    SystemdFiles,
    asks_systemd_for_users,
    cgroups_of,
    systemd_answers,
)
from agent.vmm.driver import Capabilities, Version

OK, WARN, FAIL = Level.OK, Level.WARN, Level.FAIL
ALL = frozenset({"cpu", "memory", "pids", "io"})
GOOD_FILES = SystemdFiles(True, True, True, True, Cgroups("v2", ALL))
GOOD_ANSWERS = SystemdAnswers("252.39-1~deb12u2", machined=True)
VERSION = Version("/usr/bin/vmm", "1.16.1", (1, 16, 1))


def files(**changes):
    values = {name: getattr(GOOD_FILES, name) for name in GOOD_FILES.__slots__}
    return SystemdFiles(**values | changes)


JUDGED = [
    (checks.check_kvm("", tried=True), OK, ""),
    (checks.check_kvm("there is no /dev/kvm", tried=True), WARN, "modprobe kvm_intel"),
    (checks.check_kvm("/dev/kvm does not run 64-bit guests", tried=True), WARN, "QEMU translates"),
    (checks.check_kvm("/dev/kvm cannot be opened", tried=False), WARN, "run it as root"),
    (checks.check_backend("qemu", VERSION, ""), OK, "version 1.16.1, /usr/bin/vmm"),
    (checks.check_backend("qemu", VERSION, "", "flash"), OK, "boots firmware that is an image"),
    (checks.check_backend("qemu", Missing("none: get it"), ""), WARN, "install qemu-system-x86"),
    (checks.check_backend("new", Missing("none: get it"), ""), WARN, "none: get it"),
    (checks.check_backend("qemu", Failed("it cannot be run"), ""), WARN, "cannot be run"),
    (checks.check_backend("firecracker", VERSION, "no KVM"), WARN, "no ordinary guests here, no K"),
    (checks.check_choice("qemu", "", tried=True), OK, "takes qemu"),
    (checks.check_choice("firecracker", "no KVM", tried=True), FAIL, "install qemu-system-x86"),
    (checks.check_choice("", "", tried=True), FAIL, "install qemu-system-x86"),
    (checks.check_choice("qemu", "", tried=False), WARN, "run it as root"),
    (checks.check_fuse(device=True, known=True, fusermount="/bin/fusermount3"), OK, ""),
    (checks.check_fuse(device=False, known=True, fusermount="/x"), FAIL, "modprobe fuse"),
    (checks.check_fuse(device=True, known=False, fusermount="/x"), FAIL, "modprobe fuse"),
    (checks.check_fuse(device=True, known=True, fusermount=""), WARN, "install fuse3"),
    (checks.check_systemd(GOOD_FILES, GOOD_ANSWERS), OK, "252.39"),
    (checks.check_systemd(GOOD_FILES, SystemdAnswers("257~rc1")), OK, "257"),
    (checks.check_systemd(GOOD_FILES, SystemdAnswers("v258-stable")), OK, "258"),
    (checks.check_systemd(GOOD_FILES, SystemdAnswers("251.4")), FAIL, "252 or later"),
    (checks.check_systemd(GOOD_FILES, SystemdAnswers("249 (v249)")), FAIL, "252 or later"),
    (checks.check_systemd(files(booted=False), GOOD_ANSWERS), FAIL, "boot this host with systemd"),
    (checks.check_systemd(GOOD_FILES, SystemdAnswers(trouble="gone")), FAIL, "start dbus.socket"),
    (checks.check_systemd(files(notify_socket=False), GOOD_ANSWERS), WARN, "daemon-reexec"),
    (checks.check_cgroups(Cgroups("v2", ALL)), OK, "v2 with cpu, io, memory, pids"),
    (checks.check_cgroups(Cgroups("hybrid", ALL)), OK, "v1 and v2"),
    (checks.check_cgroups(Cgroups("v2", ALL - {"memory"})), WARN, "cgroup_enable=memory"),
    (checks.check_cgroups(Cgroups("", frozenset())), FAIL, "systemd"),
    (checks.check_users(GOOD_FILES), OK, ""),
    (checks.check_users(files(user_records=False)), FAIL, "line passwd:"),
    (checks.check_users(files(nss_library=False)), FAIL, "install libnss-systemd"),
    (checks.check_machined(GOOD_ANSWERS), OK, ""),
    (checks.check_machined(SystemdAnswers("252")), WARN, "install systemd-container"),
    (checks.check_machined(SystemdAnswers(trouble="gone")), WARN, "D-Bus"),
    (checks.check_userfaultfd(device=True, unprivileged=False), OK, "/dev/userfaultfd"),
    (checks.check_userfaultfd(device=False, unprivileged=True), OK, "unprivileged"),
    (checks.check_userfaultfd(device=False, unprivileged=False), WARN, "the group kvm, mode 0660"),
    (checks.check_directories(StorageFacts(True, GIB, GIB), "/r"), OK, "/r"),
    (checks.check_directories(StorageFacts(False, GIB, GIB), "/r"), OK, "when the agent starts"),
    (checks.check_directories(StorageFacts(True, 1, 1, "run: chown x"), "/r"), FAIL, "chown x"),
    (checks.check_space(StorageFacts(True, 9 * GIB + 7, 20 * GIB), "/r"), OK, "9G of 20G"),
    (checks.check_space(StorageFacts(True, 1900 * MIB, 20 * GIB), "/r"), WARN, "grow the file"),
    (checks.check_space(StorageFacts(True, 255 * MIB, 20 * GIB), "/r"), FAIL, "255M of 20G"),
    (checks.check_reflinks(True, "/r", made=True, root_asks=True), OK, "/r"),
    (checks.check_disk_tools({}), OK, "qemu-img and mkfs.ext4"),
    (checks.check_disk_tools({"qemu-img": "qemu-utils"}), WARN, "apt-get install qemu-utils"),
    (checks.check_reflinks(False, "/r", made=True, root_asks=True), WARN, "mkfs.xfs -m reflink=1"),
    (checks.check_reflinks(None, "/r", made=True, root_asks=True), WARN, "mkfs.xfs"),
    (checks.check_reflinks(None, "/r", made=True, root_asks=False), WARN, "run it as root"),
    (checks.check_reflinks(None, "/r", made=False, root_asks=True), WARN, "start the agent"),
    (checks.check_group("cocoon", exists=True), OK, ""),
    (checks.check_group("vmusers", exists=False), FAIL, "groupadd --system vmusers"),
    (checks.check_clock(1_800_000_000, True), OK, "synchronised"),
    (checks.check_clock(1_800_000_000, None), OK, "2027-01-15 08:00:00 UTC"),
    (checks.check_clock(1_800_000_000, False), WARN, "timedatectl set-ntp true"),
    (checks.check_clock(0, True), FAIL, "timedatectl set-ntp true"),
]


@pytest.mark.parametrize(("finding", "level", "said"), JUDGED)
def test_what_facts_mean(finding, level, said):
    assert finding.level is level
    assert said in finding.sentence
    assert "\n" not in finding.sentence


@pytest.mark.parametrize(
    ("mounts", "unified", "expected"),
    [
        ("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0", "cpuset cpu io memory pids", ("v2", ALL)),
        ("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0", "cpu hugetlb", ("v2", {"cpu"})),
        (
            "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n"
            "cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,nosuid,cpu,cpuacct 0 0\n"
            "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n"
            "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n",
            "",
            ("hybrid", {"cpu", "memory"}),
        ),
        (
            "cgroup /sys/fs/cgroup/systemd cgroup rw,name=systemd 0 0\n"
            "cgroup /sys/fs/cgroup/pids cgroup rw,pids 0 0\n",
            "",
            ("v1", {"pids"}),
        ),
        ("/dev/vda / ext4 rw 0 0", "", ("", set())),
    ],
    ids=["v2", "v2 with little", "hybrid", "v1", "none"],
)
def test_how_control_groups_are_mounted(mounts, unified, expected):
    found = cgroups_of(mounts, unified)
    assert (found.layout, set(found.controllers)) == (expected[0], set(expected[1]))


@pytest.mark.parametrize(
    ("text", "asks"),
    [
        ("passwd:         files systemd\ngroup: files\n", True),
        ("  passwd: files [NOTFOUND=continue] systemd # last\n", True),
        ("passwd: files\ngroup: files systemd\n", False),
        ("#passwd: files systemd\npasswd: files # systemd\n", False),
        ("", False),
    ],
)
def test_whom_the_host_asks_for_users(text, asks):
    assert asks_systemd_for_users(text) is asks


def test_lines_are_aligned_and_fold_only_for_a_terminal():
    found = [
        Finding(OK, "kvm", "works"),
        Finding(FAIL, "group", "there is none of that name, so nobody can", "groupadd --system x"),
    ]
    assert show_findings(found).splitlines() == [
        "ok    kvm    works",
        "fail  group  there is none of that name, so nobody can: groupadd --system x",
    ]
    folded = show_findings(found, 40).splitlines()
    assert folded[:2] == ["ok    kvm    works", "fail  group  there is none of that name,"]
    assert all(len(line) <= 40 for line in folded)
    assert all(line.startswith(" " * 13) for line in folded[2:])
    assert show_findings([]) == ""


def test_looking_for_shared_blocks_leaves_no_trace(tmp_path):
    before = os.stat(tmp_path)
    shared = shares_blocks(str(tmp_path))
    after = os.stat(tmp_path)
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
    assert os.listdir(tmp_path) == []
    # As copies there really go.
    (tmp_path / "a").write_bytes(bytes(65536))
    with (tmp_path / "a").open("rb") as source:
        directory = os.open(tmp_path, os.O_RDONLY)
        assert reflink.copy_file(source.fileno(), directory, "b") is bool(shared)
        os.close(directory)


def test_shared_blocks_cannot_be_looked_for_where_nothing_is(tmp_path):
    assert shares_blocks(str(tmp_path / "none")) is None


def test_directories_that_others_can_change_are_named(tmp_path):
    root = tmp_path / "deep" / "root"
    assert not storage_facts(str(root), str(tmp_path)).made
    (root / "vms").mkdir(parents=True)
    root.chmod(0o755)
    facts = storage_facts(str(root), str(root))
    assert facts.made
    assert 0 < facts.free <= facts.total
    (root / "vms").chmod(0o777)
    assert str(root / "vms") in storage_facts(str(root), str(root)).unsafe
    root.chmod(0o777)
    assert f"chmod go-w {root}" in storage_facts(str(root), str(root)).unsafe


class Backend:
    """A backend that is there, is missing, or does not say."""

    capabilities = Capabilities()

    def __init__(self, name, obstacle="", answer=None):
        self.name = name
        self._obstacle, self._answer = obstacle, answer

    async def obstacle(self):
        return self._obstacle

    async def version(self):
        if self._answer is not None:
            await self._answer()
        return Version(f"/usr/bin/{self.name}", "1.0", (1, 0))

    def plan(self, vm, version, *, loads=False, nics=0):
        return LaunchPlan(version.binary, (), (), {}, 1)


async def missing():
    raise Missing("there is no program: install it")


async def too_old():
    raise Unsupported("it is too old")


class NoBus:
    async def call(self, *arguments, **options):
        raise BusGone("the bus is away")


def doctor_of(tmp_path, *backends):
    tree = Tree(str(tmp_path / "root"), str(tmp_path / "run"))
    return Doctor({backend.name: backend for backend in backends}, tree, "no-such-group")


HOSTS = [
    [Backend("firecracker"), Backend("qemu")],
    [Backend("firecracker", "no KVM"), Backend("qemu")],
    [Backend("firecracker", "no KVM"), Backend("qemu", "", too_old)],
    [Backend("firecracker", "", missing), Backend("qemu")],
    [Backend("cloud-hypervisor"), Backend("firecracker")],
    [Backend("firecracker", "", missing), Backend("qemu", "", too_old)],
    [],
]


@pytest.mark.anyio
@pytest.mark.parametrize("backends", HOSTS, ids=range(len(HOSTS)))
async def test_auto_is_told_to_take_what_a_start_takes(tmp_path, backends):
    found = await doctor_of(tmp_path, *backends).examine(GOOD_ANSWERS)
    by_name = {finding.name: finding for finding in found}
    assert len(by_name) == len(found)
    assert {backend.name for backend in backends} <= set(by_name)
    vm = Vm("a" * 26, "web", 70000, Access(0, 0), VmConfig(boot=Boot(kernel="vmlinux")))
    try:
        vm, _ = await plan_launch({backend.name: backend for backend in backends}, vm)
    except Unsupported:
        assert by_name["auto"].level is FAIL
    else:
        assert re.search(rf"\btakes {vm.hypervisor}\b", by_name["auto"].detail)


@pytest.mark.anyio
async def test_a_missing_group_and_program_are_told_with_their_remedies(tmp_path):
    doctor = doctor_of(tmp_path, Backend("qemu", "", missing))
    found = {finding.name: finding for finding in await doctor.examine(GOOD_ANSWERS)}
    assert found["group"].level is FAIL
    assert found["group"].remedy.startswith("groupadd --system no-such-group")
    assert found["qemu"].remedy == "apt-get install qemu-system-x86"
    assert not (tmp_path / "root").exists()


class Watched(Doctor):
    """Looks as it is told; `looks` are the times at which it did."""

    def __init__(self, look):
        super().__init__({}, Tree("/none", "/none"), "")
        self.looks, self._look = [], look

    async def examine(self, answers):
        self.looks.append(trio.current_time())
        await self._look(len(self.looks))
        return [Finding(OK, "look", str(len(self.looks)))]


def in_no_time(play):
    trio.run(play, clock=trio.testing.MockClock(autojump_threshold=0))


def test_reading_neither_waits_for_a_look_nor_ends_with_one():
    """The first look hangs, the second fails, the third is fine; who reads is never held up."""

    async def play():
        hanging = trio.Event()

        async def look(number):
            if number == 1:
                await hanging.wait()
            if number == 2:
                raise LookupError("a fault")

        doctor = Watched(look)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(doctor.run, NoBus())
            await trio.sleep(100)
            assert doctor.read().startswith("warn  doctor  the first look is not done")
            hanging.set()
            await trio.sleep(1)
            assert doctor.read() == "ok    look  1\n"
            await trio.sleep(2)
            assert "LookupError" in doctor.read()
            await trio.sleep(2)
            assert doctor.read() == "ok    look  3\n"
            nursery.cancel_scope.cancel()

    in_no_time(play)


def test_a_host_that_nobody_asks_about_is_looked_at_once_a_minute():
    async def play():
        doctor = Watched(lambda number: trio.sleep(0))
        with trio.move_on_after(299):
            await doctor.run(NoBus())
        assert len(doctor.looks) == 5

    in_no_time(play)


def test_who_reads_all_the_time_causes_a_look_each_two_seconds():
    async def play():
        doctor = Watched(lambda number: trio.sleep(0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(doctor.run, NoBus())
            for _ in range(1000):
                await trio.sleep(0.01)
                doctor.read()
            nursery.cancel_scope.cancel()
        assert 5 <= len(doctor.looks) <= 6

    in_no_time(play)


@pytest.mark.anyio
async def test_a_bus_that_is_away_is_a_finding():
    answers = await systemd_answers(NoBus())
    assert answers == SystemdAnswers(trouble="the bus is away")
