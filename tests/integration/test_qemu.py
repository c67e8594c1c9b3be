"""QEMU through the product: a real Linux guest, translated where KVM does not work."""

import contextlib
import errno
import hashlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from snapshot_tools import archive, described, names, refused, settled

from agent.vmm import kvm

TREE = Path(__file__).parents[2]
BUILD = TREE / "tests/guest/build-linux"
SOURCES = (TREE / "packaging/hello-guest", TREE / "tests/guest/linux-main")
BOOT_SECONDS = 180  # on a busy machine; some 5 on an idle one


@pytest.fixture(scope="module")
def linux() -> dict[str, str]:
    """What to boot: Debian's kernel with an initrd that counts and runs what it reads."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    content = b"".join(source.read_bytes() for source in SOURCES)
    digest = hashlib.sha256(content).hexdigest()[:12]
    built = Path(os.environ["COCOON_TEST_GUESTS"]).parent / f"linux-{digest}"
    if not (built / "vmlinuz").exists():
        subprocess.run([BUILD, built], check=True, timeout=300)
    return {"kernel": str(built / "vmlinuz"), "initrd": str(built / "initrd")}


@pytest.fixture
def make_linux(linux: dict[str, str], make_vm: Callable[..., Any]) -> Callable[..., Any]:
    """`make_linux(**config)` makes a VM of QEMU's with a disk of 16 MiB."""

    def make(**config: Any) -> Any:
        wanted = {"hypervisor": "qemu", "memory": "256M", "storage": "16M", "boot": linux}
        return make_vm(**wanted | config)

    return make


@pytest.fixture
def name(vm_name: Callable[[], str], agent: Any) -> Iterator[str]:
    """The name of a snapshot, removed afterwards."""
    name = f"snap-{vm_name()}"
    yield name
    for found in names(agent):
        if found.startswith(name):
            archive(agent, found).unlink()


def wait_up(vm: Any, until: Callable[..., Any]) -> None:
    until(lambda: "guest is up" in vm.read("console"), BOOT_SECONDS, "Linux is up")


def refused_with(number: int, vm: Any, name: str) -> None:
    with refused(number):
        vm.write("snapshot", name)


def told(vm: Any, until: Callable[..., Any], command: str) -> str:
    """Return what the guest says to a command; the count may come between."""
    before = len(vm.read("console"))
    vm.write("console", f"echo '<<'; {command}; echo \">> $?\"")
    said = until(
        lambda: re.search(r"(?s)<<(.*)>> (\d+)\s", vm.read("console")[before:]),
        BOOT_SECONDS,
        f"the guest did {command}",
    )
    assert said[2] == "0", said[1]
    lines = said[1].splitlines()
    return "\n".join(line for line in lines if line and not line.startswith("count"))


def make_filesystem(vm: Any, until: Callable[..., Any]) -> None:
    told(vm, until, "mke2fs /dev/vda >/dev/null && mount -t ext4 /dev/vda /mnt")


def write_disk(vm: Any, until: Callable[..., Any], word: str) -> None:
    """Write a file on the guest's disk."""
    told(vm, until, f"echo {word} >/mnt/file && sync")


def disk_word(vm: Any, until: Callable[..., Any]) -> str:
    """Read the file, from the disk and not from the guest's memory."""
    return told(vm, until, "echo 3 >/proc/sys/vm/drop_caches; cat /mnt/file").strip()


@contextlib.contextmanager
def terminal(vm: Any) -> Iterator[int]:
    """A pseudo terminal whose other end a person's socat has joined to the console."""
    ours, theirs = pty.openpty()
    command = ["socat", "-,raw,echo=0", f"UNIX:{vm.path / 'console.sock'}"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs) as process:
        os.close(theirs)
        try:
            yield ours
        finally:
            process.kill()
            os.close(ours)


def typed(terminal: int, line: bytes, answer: bytes) -> None:
    """Type a line on the terminal, and wait for what answers it."""
    os.write(terminal, line + b"\r")
    shown = b""
    deadline = time.monotonic() + BOOT_SECONDS
    while answer not in shown:
        left = deadline - time.monotonic()
        assert select.select([terminal], [], [], max(0, left))[0], shown
        shown += os.read(terminal, 4096)


@pytest.mark.thorough(group="linux")
def test_linux_boots_answers_pauses_and_powers_off(agent, make_linux, until):
    data = [{"name": "data", "size": "8M", "serial": "blue-42", "readonly": True}]
    vm = make_linux(disks=data)
    vm.verb("start")
    assert vm.state == "running"
    wait_up(vm, until)
    assert "QEMU" in told(vm, until, "cat /sys/class/dmi/id/sys_vendor")
    disks = "cat /sys/block/vda/size /sys/block/vdb/size /sys/block/vdb/ro /sys/block/vdb/serial"
    assert told(vm, until, disks).split() == ["32768", "16384", "1", "blue-42"]
    vm.verb("pause")
    assert vm.state == "paused"
    time.sleep(0.5)  # what it said before is read now
    seen = len(vm.counts)
    time.sleep(1)  # five counts' time
    assert len(vm.counts) == seen
    vm.verb("resume")
    vm.wait_counting(BOOT_SECONDS)
    figures = dict(line.split() for line in vm.read("stats").splitlines())
    assert figures["vcpus"] == "1"
    assert int(figures["memory_bytes"]) < 400 << 20
    make_filesystem(vm, until)
    with terminal(vm) as typing:
        typed(
            typing,
            b"echo kept >/mnt/file; sync; echo $((6 * 7)) is the answer",
            b"42 is the answer",
        )
    began = time.monotonic()
    vm.verb("stop")
    assert vm.state == "stopped"
    assert time.monotonic() - began < 25  # below stop_timeout: the guest heard its button
    assert any("power button: going down" in line for line in agent.lines(vm.unit))
    assert any("Power down" in line for line in agent.lines(vm.unit))
    vm.verb("start")
    until(lambda: vm.read("console").count("guest is up") == 2, BOOT_SECONDS, "it is up again")
    told(vm, until, "mount -t ext4 /dev/vda /mnt")
    assert disk_word(vm, until) == "kept"
    vm.write("console", "poweroff -f")
    vm.wait_for_state("stopped", BOOT_SECONDS)


@pytest.mark.thorough(group="linux")
def test_the_vmm_sees_only_its_jail(agent, make_linux, until):
    vm = make_linux(stop_timeout=1)
    vm.verb("start")
    root = Path(f"/proc/{vm.pid}/root")
    assert not list((root / "proc").glob("*")) if (root / "proc").exists() else True
    assert {path.name for path in (root / "dev").iterdir() if path.stat().st_rdev} <= {
        "kvm",
        "null",
    }
    status = Path(f"/proc/{vm.pid}/status").read_text()
    assert re.search(r"CapEff:\s+0+\n", status)
    assert re.search(r"Seccomp:\s+2\n", status)
    assert re.search(r"Uid:\s+[6-9]\d{4}\s", status)
    memory = agent.root_dir / "vms" / vm.read("id") / "mem"
    assert memory.stat().st_mode & 0o777 == 0o600
    vm.verb("kill")
    assert vm.state == "stopped"


@pytest.mark.thorough(group="linux")
def test_a_vm_is_snapshotted_restored_cloned_and_hibernated(
    agent, make_linux, make_vm, name, until
):
    vm = make_linux()
    vm.verb("start")
    wait_up(vm, until)
    told(vm, until, "word=remembered")
    make_filesystem(vm, until)
    write_disk(vm, until, "first")
    vm.write("snapshot", name)
    assert vm.state == "running"
    shown = described(agent, name)
    assert 0 < shown["pause_ms"] < 30_000
    assert set(shown["files"]) == {"cocoon.json", "cow.raw", "initrd", "kernel", "mem", "vmstate"}
    count = vm.wait_counting(BOOT_SECONDS)
    assert vm.counts == list(range(1, len(vm.counts) + 1))
    write_disk(vm, until, "second")

    clone = make_vm(hypervisor=None, memory=None, boot=None)
    clone.write("from", name)
    clone.verb("start")
    assert clone.read("hypervisor") == "qemu"
    assert told(clone, until, "echo $word") == "remembered"
    assert disk_word(clone, until) == "first"
    assert clone.counts[0] <= count
    write_disk(clone, until, "cloned")
    assert disk_word(vm, until) == "second"

    vm.write("restore", name)
    assert vm.state == "running"
    assert told(vm, until, "echo $word") == "remembered"
    assert disk_word(vm, until) == "first"
    assert disk_word(clone, until) == "cloned"

    # A clone's snapshot is as good as the first.
    clone.write("snapshot", f"{name}-2")
    clone.verb("kill")
    carried = agent.root_dir / "carried.tar"
    shutil.copy(archive(agent, f"{name}-2"), carried)
    archive(agent, f"{name}-2").unlink()
    try:
        shutil.copy(carried, archive(agent, f"{name}-3"))
    finally:
        carried.unlink()
    third = make_vm(hypervisor=None, memory=None, boot=None)
    third.write("from", f"{name}-3")
    third.verb("start")
    assert told(third, until, "echo $word") == "remembered"
    assert disk_word(third, until) == "cloned"
    third.verb("stop")
    assert any("power button" in line for line in agent.lines(third.unit))
    # It boots cold from its own disk and its snapshot's kernel.
    third.verb("start")
    until(lambda: "guest is up" in third.read("console"), BOOT_SECONDS, "it boots cold")
    told(third, until, "mount -t ext4 /dev/vda /mnt")
    assert disk_word(third, until) == "cloned"
    third.verb("kill")

    # QEMU itself saves a guest only once each time that it stands still.
    vm.verb("pause")
    vm.write("snapshot", f"{name}-4")
    vm.write("snapshot", f"{name}-5")
    assert vm.state == "paused"
    vm.verb("resume")
    vm.write("hibernate", f"{name}-6")
    assert (vm.state, vm.pid) == ("stopped", 0)
    agent.restart()
    vm.write("restore", f"{name}-6")
    assert vm.state == "running"
    assert told(vm, until, "echo $word") == "remembered"
    assert disk_word(vm, until) == "first"
    vm.verb("kill")
    settled(agent)


@pytest.mark.thorough(group="linux")
def test_the_first_boot_has_its_seed_and_a_clone_one_of_its_own(
    agent, make_linux, make_vm, name, until
):
    vm = make_linux(user="joe", password="a secret", ssh_keys=["ssh-ed25519 AAAA joe"])
    vm.verb("start")
    wait_up(vm, until)
    assert told(vm, until, "hostname") == vm.name
    seed = agent.root_dir / "vms" / vm.read("id") / "cidata.img"
    facts = seed.stat()
    uid = Path(f"/proc/{vm.pid}").stat().st_uid
    assert (facts.st_mode & 0o777, facts.st_uid) == (0o600, uid)
    content = seed.read_bytes()
    secret = json.loads(vm.read("config"))["password"]
    assert secret.encode() in content
    assert b"a secret" not in content
    for shown in ("index.json", "events", f"vms/{vm.name}/info.json"):
        assert secret not in (agent.mount / shown).read_text()

    vm.write("snapshot", name)
    assert "cidata.img" in described(agent, name)["files"]
    clone = make_vm(hypervisor=None, memory=None, boot=None)
    clone.write("from", name)
    clone.verb("start")
    mount = "mount -t iso9660 -o ro /dev/vdb /seed; cat /seed/meta-data; umount /seed"
    meta = json.loads(told(clone, until, mount))
    assert meta["local-hostname"] == clone.name
    assert meta["instance-id"].startswith(clone.read("id"))
    vm.write("restore", name)
    assert json.loads(told(vm, until, mount))["local-hostname"] == vm.name

    # A clone that was killed before it booted by itself is told at its first boot who it is.
    clone.verb("kill")
    clone.verb("start")
    until(lambda: "guest is up" in clone.read("console"), BOOT_SECONDS, "the clone boots")
    assert told(clone, until, "hostname") == clone.name
    clone.verb("kill")

    # It powered off when it was asked to: the seed has done its work, until a key changes.
    vm.verb("stop")
    vm.verb("start")
    until(lambda: vm.read("console").count("guest is up") == 2, BOOT_SECONDS, "it is up again")
    assert told(vm, until, "hostname; ls /sys/block").split() == ["(none)", "vda"]
    assert not seed.exists()
    vm.verb("stop")
    vm.write("hostname", "other")
    vm.verb("start")
    until(lambda: vm.read("console").count("guest is up") == 3, BOOT_SECONDS, "it is up again")
    assert told(vm, until, "hostname") == "other"
    vm.verb("kill")


def test_the_same_kernel_is_firecrackers_too_unpacked_once(agent, linux, make_vm):
    """How far Linux comes is up to this host's KVM; that it is handed over is the agent's part."""
    image = Path(linux["kernel"]).read_bytes()
    assert image[0x202:0x206] == b"HdrS"  # a bzImage
    kernels = agent.root_dir / "kernels"
    before = set(kernels.iterdir())
    unpacked = set()
    for _ in range(2):
        vm = make_vm(hypervisor="firecracker", memory="256M", boot=linux, stop_timeout=1)
        vm.verb("start")
        vm.verb("kill")
        elves = {path for path in kernels.iterdir() if path.read_bytes()[:4] == b"\x7fELF"}
        unpacked |= {(path, path.stat().st_ino, path.stat().st_mtime_ns) for path in elves - before}
    assert len(unpacked) == 1
    assert hashlib.sha256(image).hexdigest() in next(iter(unpacked))[0].name


@pytest.mark.thorough(group="linux")
def test_an_image_boots_by_itself_where_no_kernel_is_named(
    agent, make_vm, name, vm_name, tmp_path, until
):
    source = Path(__file__).parents[1] / "guest/bootsector.S"
    raw, image = tmp_path / "raw", agent.mount / "images" / vm_name()
    words = ["gcc", "-nostdlib", "-static", "-m32", "-Wl,-Ttext=0x7c00,--oformat=binary"]
    subprocess.run([*words, "-Wl,--build-id=none", source, "-o", raw], check=True, timeout=60)
    os.truncate(raw, 1 << 20)
    words = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, tmp_path / "qcow2"]
    subprocess.run(words, check=True, timeout=60)
    shutil.copyfile(tmp_path / "qcow2", image)
    vms = [make_vm(hypervisor="auto", boot=None, image=image.name, restart="on-failure")]
    vms[0].verb("start")
    assert json.loads(vms[0].read("info.json"))["hypervisor"] == "qemu"
    vms[0].wait_counting()
    vms[0].write("snapshot", name)
    assert described(agent, name)["boots_cold"]
    vms.append(make_vm(hypervisor=None, memory=None, boot=None, stop_timeout=1))
    vms[1].write("from", name)
    vms[1].verb("start")
    vms[1].wait_counting()
    assert 1 < vms[1].counts[0] <= vms[0].counts[-1] + 1
    vms[1].verb("stop")
    vms[1].verb("start")
    until(lambda: 1 in vms[1].counts, what="it boots from its disk")
    vms[0].write("restore", name)
    vms[0].wait_counting()
    pid = vms[0].pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: vms[0].counts.count(1) == 2, what="systemd has it boot again")
    # No other backend does it.
    vms.append(make_vm(hypervisor="firecracker", boot=None, image=image.name))
    with refused(errno.EINVAL):
        vms[2].verb("start")
    for vm in vms:
        vm.remove()
    archive(agent, name).unlink()
    image.unlink()


def test_a_vmm_that_dies_is_started_again_and_boots(agent, make_vm, until):
    vm = make_vm(hypervisor="qemu", restart="on-failure")
    vm.verb("start")
    vm.wait_counting()
    pid = vm.pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: vm.pid not in (0, pid) and vm.state == "running", what="systemd restarts it")
    until(lambda: vm.counts.count(1) == 2, what="it counts from the beginning")
    agent.kill()
    assert vm.state == "running"
    vm.wait_counting()


def test_a_vmm_that_dies_while_it_saves_leaves_no_snapshot(agent, make_vm, name, until):
    vm = make_vm(hypervisor="qemu", storage="8M")
    vm.verb("start")
    vm.wait_counting()
    pid = vm.pid
    os.kill(pid, signal.SIGSTOP)
    taking = threading.Thread(target=lambda: refused_with(errno.EIO, vm, name))
    taking.start()
    until(lambda: vm.state == "saving", what="it is being saved")
    os.kill(pid, signal.SIGKILL)
    taking.join()
    vm.wait_for_state("error")
    assert name not in names(agent)
    settled(agent)
    vm.verb("start")
    vm.wait_counting()


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"track_dirty": True}, "track_dirty"),
        ({"max_memory": "512M"}, "max_memory"),
        ({"queue_affinity": [[0]]}, "cloud-hypervisor does"),
        ({"boot": {"firmware": "/bin/true"}}, "cloud-hypervisor can"),
    ],
)
def test_what_it_cannot_do_is_said_before_anything_starts(make_linux, config, word):
    vm = make_linux(**config)
    with refused(errno.EOPNOTSUPP):
        vm.verb("start")
    assert word in vm.read("error")
    assert vm.state == "created"


@pytest.mark.parametrize(
    ("where", "words"), [(0, "not a state"), (1000, "its checksum is another")]
)
def test_a_snapshot_with_a_damaged_state_is_refused(agent, make_linux, make_vm, name, where, words):
    vm = make_linux()
    vm.verb("start")
    vm.write("snapshot", name)
    vm.verb("kill")
    state = agent.root_dir / "snapshots" / described(agent, name)["id"] / "vmstate"
    content = bytearray(state.read_bytes())
    content[where : where + 64] = bytes(64)
    state.chmod(0o600)
    state.write_bytes(content)
    clone = make_vm(hypervisor=None, memory=None, boot=None)
    clone.write("from", name)
    with refused(errno.EIO):
        clone.verb("start")
    assert re.search(f"qemu did not start.*({words})", clone.read("error"))
    assert clone.state == "error"


def test_auto_takes_it_where_kvm_runs_no_guests(make_linux):
    vm = make_linux(hypervisor="auto")
    vm.verb("start")
    expected = "qemu" if kvm.refusal() else "firecracker"
    assert json.loads(vm.read("info.json"))["hypervisor"] == expected
    vm.verb("kill")
