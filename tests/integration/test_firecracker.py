"""The driver with the real Firecracker: its files at their canonical paths, but no unit."""

import array
import fcntl
import json
import os
import re
import shutil
import subprocess
import termios
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass

import pytest
import trio

from agent.model import canonical
from agent.model.access import Access
from agent.model.config import Boot, Disk, VmConfig
from agent.model.errors import Failed, Unsupported
from agent.model.size import MIB
from agent.model.vm import Vm
from agent.vmm.driver import VmmState
from agent.vmm.firecracker import Firecracker, FirecrackerVmm

pytestmark = pytest.mark.anyio

BOOT = Boot(kernel="k")
STATE, MEMORY = f"{canonical.VM}/vmstate", f"{canonical.VM}/mem"
# What a unit's mounts do, in a mount namespace of the process's own.
_MOUNTS = f"""
mount -t tmpfs tmpfs /var/lib
mkdir -p {canonical.VM} {canonical.SOCKETS} {canonical.DISKS}
touch {canonical.KERNEL}
mount --bind "$1/vm" {canonical.VM}
mount --bind "$1/sock" {canonical.SOCKETS}
mount --bind "$2" {canonical.KERNEL}
shift 2
exec "$@"
"""
IN_PLACE = ("unshare", "--mount", "--propagation=private", "sh", "-ec", _MOUNTS, "sh")


@dataclass
class Running:
    """A Firecracker process with the driver's connection to it."""

    process: trio.Process
    vmm: FirecrackerVmm
    output: bytes = b""
    last: int = 0

    async def read_until(self, pattern):
        """Read the console until the pattern is in it, drop all up to there, return the match."""
        while not (match := re.search(pattern, self.output)):
            data = await self.process.stdout.receive_some(65536)
            assert data, f"the console ended before {pattern!r}: {self.output!r}"
            self.output += data
        self.output = self.output[match.end() :]
        return match

    async def count(self):
        """Wait for the next counter line and return its number."""
        self.last = int((await self.read_until(rb"(?m)^count (\d+)\r?\n"))[1])
        return self.last

    async def stand_still(self):
        """Pause the guest and return the last number that it counted.

        It may stand in the midst of a line: `output` then has that line's beginning.
        """
        await self.count()
        await self.vmm.pause()
        while self._waiting():
            self.output += await self.process.stdout.receive_some(65536)
        while b"\n" in self.output:
            await self.count()
        return self.last

    def _waiting(self):
        waiting = array.array("i", [0])
        fcntl.ioctl(self.process.stdout.fileno(), termios.FIONREAD, waiting)
        return waiting[0]

    async def ended(self):
        """Wait until the process has ended and return its status."""
        return await self.process.wait()


@pytest.fixture
def driver():
    return Firecracker()


@pytest.fixture
def directory(tmp_path):
    """Makes the directories of a VM, by name."""

    def make(name="a"):
        path = tmp_path / name
        for part in ("vm", "sock"):
            (path / part).mkdir(parents=True, exist_ok=True)
        return path

    return make


@pytest.fixture
def launch(driver, guests, directory):
    """`async with launch(name, boot=…, **config)` runs a Firecracker as the driver's plan says."""

    @asynccontextmanager
    async def start(name="a", *, cold=True, kernel=guests.guest, boot=BOOT, **config):
        path = directory(name)
        vm = Vm("a" * 26, "web", 0, Access(0, 0), VmConfig(boot=boot, **config))
        plan = driver.plan(vm, await driver.version())
        for file, content in plan.files.items():
            (path / "vm" / file).write_bytes(content)
        for drive in json.loads(plan.files["vm.json"])["drives"]:
            disk = path / "vm" / os.path.basename(drive["path_on_host"])
            with disk.open("ab") as file:
                file.truncate(MIB)
        (path / "sock" / "api").unlink(missing_ok=True)
        arguments = [*plan.arguments, *(plan.boot_arguments if cold else ())]
        process = await trio.lowlevel.open_process(
            [*IN_PLACE, str(path), str(kernel), plan.binary, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            await _until((path / "sock" / "api").exists, process)
            if cold:
                await _until(lambda: driver.answers(process.pid), process)
            socket = os.open(path / "sock" / "api", os.O_PATH | os.O_NOFOLLOW)
            try:
                async with driver.connect(socket, nullcontext) as vmm:
                    yield Running(process, vmm)
            finally:
                os.close(socket)
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()

    return start


async def _until(predicate, process):
    """Wait until the predicate is true or the process has ended."""
    while not predicate() and process.poll() is None:
        await trio.sleep(0.002)


@pytest.fixture(autouse=True)
async def deadline():
    """No test waits for ever for a console."""
    with trio.fail_after(60):
        yield


async def test_the_program_is_one_that_works(driver):
    version = await driver.version()
    assert version.binary == os.path.realpath(shutil.which("firecracker"))
    assert version.numbers >= (1, 12)
    assert not version.dynamic


async def test_a_planned_vm_boots_and_says_so(launch):
    async with launch(memory=64 * MIB) as running:
        assert await running.vmm.state() is VmmState.RUNNING
        assert await running.count() >= 1
        assert await running.vmm.stats() == {"vcpus": 1}


async def test_nothing_but_the_guest_is_on_the_console(launch):
    async with launch(memory=64 * MIB) as running:
        await running.vmm.state()
        first = await running.read_until(rb"\A.*\n")
        assert re.fullmatch(rb"count 1\r?\n", first[0])


async def test_disks_balloon_and_cpus_are_as_planned(launch):
    further = (Disk(name="data", size=MIB), Disk(name="more", size=MIB, readonly=True))
    async with launch(cpu=2, memory=256 * MIB, storage=MIB, disks=further) as running:
        assert await running.vmm.state() is VmmState.RUNNING
        assert await running.vmm.stats() == {"vcpus": 2, "balloon_target": 64 * MIB}
        assert await running.count() >= 1


async def is_planned(driver, **config):
    vm = Vm("a" * 26, "web", 0, Access(0, 0), VmConfig(**config))
    try:
        driver.plan(vm, await driver.version())
    except Unsupported:
        return False
    return True


def disks(count):
    return tuple(Disk(name=f"d{index}", size=MIB) for index in range(count))


@pytest.mark.parametrize("memory", [64, 256])
async def test_as_many_disks_as_the_plan_allows_boot(launch, driver, memory):
    most = 0
    while await is_planned(driver, memory=memory * MIB, boot=BOOT, disks=disks(most + 1)):
        most += 1
    assert most >= 15
    async with launch(memory=memory * MIB, disks=disks(most)) as running:
        assert await running.vmm.state() is VmmState.RUNNING


async def test_a_command_line_as_long_as_the_plan_allows_boots(launch, driver):
    def boot(length):
        return Boot("k", cmdline="x" * length)

    longest = 0
    while await is_planned(driver, memory=64 * MIB, boot=boot(longest + 1), disks=disks(16)):
        longest += 1
    assert longest > 1300
    async with launch(memory=64 * MIB, boot=boot(longest), disks=disks(16)) as running:
        assert await running.vmm.state() is VmmState.RUNNING


async def test_a_paused_guest_stands_still_and_goes_on_when_resumed(launch):
    async with launch(memory=64 * MIB) as running:
        last = await running.stand_still()
        assert await running.vmm.state() is VmmState.PAUSED
        await running.vmm.pause()
        await running.vmm.resume()
        await running.vmm.resume()
        assert await running.vmm.state() is VmmState.RUNNING
        assert await running.count() == last + 1


async def test_powering_off_ends_the_process_cleanly(launch):
    async with launch(memory=64 * MIB) as running:
        await running.count()
        await running.vmm.power_off()
        assert await running.ended() == 0
        with pytest.raises(Failed, match="does not answer on its API socket"):
            await running.vmm.state()


async def test_a_guest_that_cannot_be_built_is_told_on_stderr_and_not_on_the_console(
    launch, tmp_path
):
    (tmp_path / "notes").write_text("no kernel")
    async with launch(kernel=tmp_path / "notes", memory=64 * MIB) as running:
        assert await running.ended() == 1
        assert await running.process.stdout.receive_some() == b""
        assert b"Error" in await running.process.stderr.receive_some()


async def test_a_process_that_is_gone_does_not_answer(launch, driver):
    async with launch(memory=64 * MIB) as running:
        assert driver.answers(running.process.pid)
        await running.vmm.power_off()
        await running.ended()
        assert not driver.answers(running.process.pid)


async def test_without_a_guest_the_vmm_is_empty(launch, driver):
    async with launch(cold=False) as running:
        assert not driver.answers(running.process.pid)
        assert await running.vmm.state() is VmmState.EMPTY


async def test_a_running_guest_is_not_snapshot(launch):
    async with launch(memory=64 * MIB) as running:
        await running.count()
        with pytest.raises(Failed, match="refused PUT /snapshot/create: .*while running"):
            await running.vmm.snapshot(STATE, MEMORY)


async def snapshot_and_carry_over(running, directory):
    """Snapshot the VM, give the files to another, and return the last number counted."""
    last = await running.stand_still()
    await running.vmm.snapshot(STATE, MEMORY)
    clone = directory("b")
    for name in ("vmstate", "mem"):
        os.link(directory() / "vm" / name, clone / "vm" / name)
    shutil.copy(directory() / "vm" / "cow.raw", clone / "vm")
    return last


@pytest.mark.parametrize("track_dirty", [False, True])
async def test_a_loaded_snapshot_goes_on_from_where_it_was_taken(launch, directory, track_dirty):
    config = {"memory": 64 * MIB, "storage": MIB, "track_dirty": track_dirty}
    async with launch(**config) as running:
        last = await snapshot_and_carry_over(running, directory)
        async with launch("b", cold=False, **config) as clone:
            clone.output = running.output
            await clone.vmm.load(STATE, MEMORY, track_dirty=track_dirty)
            assert await clone.vmm.state() is VmmState.RUNNING
            assert await clone.count() == last + 1
        await running.vmm.resume()
        assert await running.count() == last + 1


async def test_a_snapshot_can_be_loaded_without_running_it(launch, directory):
    config = {"memory": 64 * MIB, "storage": MIB}
    async with launch(**config) as running:
        last = await snapshot_and_carry_over(running, directory)
    async with launch("b", cold=False, **config) as clone:
        clone.output = running.output
        await clone.vmm.load(STATE, MEMORY, resume=False)
        assert await clone.vmm.state() is VmmState.PAUSED
        await clone.vmm.resume()
        assert await clone.count() == last + 1


async def test_a_diff_holds_only_what_changed(launch, directory):
    async with launch(memory=64 * MIB, storage=MIB, track_dirty=True) as running:
        await running.count()
        await running.vmm.pause()
        await running.vmm.snapshot(STATE, MEMORY)
        await running.vmm.resume()
        await running.process.stdin.send_all(b"m\n")
        dirtied = int((await running.read_until(rb"dirtied (\d+) KiB"))[1]) * 1024
        await running.vmm.pause()
        await running.vmm.snapshot(f"{STATE}.2", f"{MEMORY}.2", diff=True)
        diff = os.stat(directory() / "vm" / "mem.2")
        assert diff.st_size == 64 * MIB
        assert dirtied <= diff.st_blocks * 512 < dirtied + 4 * MIB


async def test_a_snapshot_that_is_damaged_is_refused_with_firecrackers_own_words(launch, directory):
    async with launch(memory=64 * MIB, storage=MIB) as running:
        await snapshot_and_carry_over(running, directory)
    state = directory("b") / "vm" / "vmstate"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 0xFF
    state.unlink()
    state.write_bytes(content)
    async with launch("b", cold=False) as clone:
        with pytest.raises(Failed, match="refused PUT /snapshot/load: .*napshot"):
            await clone.vmm.load(STATE, MEMORY)


async def test_a_hundred_calls_leave_no_descriptor_open(launch):
    async with launch(memory=64 * MIB) as running:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(100):
            await running.vmm.state()
        assert len(os.listdir("/proc/self/fd")) == before
