"""Base images by the tools that people have, and VMs with disks made from them."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from snapshot_tools import MARKER, archive, described, dying_at, names, refused
from test_qemu import linux, told, wait_up  # noqa: F401

MIB = 1 << 20
pytestmark = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")


def run(command: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, **options
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk of 32 MiB: an ext4 with a file on it."""
    directory = tmp_path_factory.mktemp("image")
    (directory / "files").mkdir()
    (directory / "files/told").write_text("from the image\n")
    disk = directory / "raw"
    with disk.open("wb") as file:
        file.truncate(32 * MIB)
    words = ["mkfs.ext4", "-q", "-F", "-d", directory / "files", disk]
    subprocess.run(words, check=True, timeout=60)
    return disk


@pytest.fixture(scope="module")
def qcow2(raw: Path) -> Path:
    """The same as qcow2."""
    made = raw.with_name("qcow2")
    words = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, made]
    subprocess.run(words, check=True, timeout=60)
    return made


@pytest.fixture
def images(agent: Any) -> Iterator[Path]:
    """The directory, whose images are removed afterwards."""
    images = Path(agent.mount) / "images"
    yield images
    if not agent.is_active():
        agent.start()
    for left in images.iterdir():
        with contextlib.suppress(OSError):
            left.unlink()


def stored(agent: Any) -> list[str]:
    return os.listdir(Path(agent.root_dir) / "images")


def nothing_left(agent: Any, until: Callable[..., Any]) -> None:
    # The kernel tells of the last close after who closed has gone on.
    until(lambda: not stored(agent), what="nothing is left of an import")
    assert not list((Path(agent.mount) / "images").iterdir())


@pytest.mark.parametrize(
    "command",
    ["cp {0} {1}", "cat {0} > {1}", "rsync {0} {1}", "dd if={0} of={1} bs=64k status=none"],
    ids=["cp", "cat", "rsync", "dd"],
)
def test_what_is_copied_in_can_be_copied_out_again(agent, images, raw, command, tmp_path, until):
    image = images / "debian"
    done = run(command.format(raw, image))
    assert done.returncode == 0, done.stderr
    facts = image.stat()
    mode = 0o444 if "rsync" in command else 0o440  # it gives it the mode that the file had
    assert (facts.st_size, facts.st_mode & 0o777) == (32 * MIB, mode)
    assert sha256(image) == sha256(raw)
    shutil.copy(image, tmp_path / "out")
    assert sha256(tmp_path / "out") == sha256(raw)
    with refused(errno.EEXIST):
        shutil.copyfile(raw, image)
    file = next((Path(agent.root_dir) / "images").glob("*/image"))
    assert (file.stat().st_uid, file.stat().st_mode & 0o777) == (0, 0o444)
    assert file.stat().st_blocks * 512 < 8 * MIB
    os.rename(image, images / "trixie")
    assert [path.name for path in images.iterdir()] == ["trixie"]
    (images / "trixie").unlink()
    nothing_left(agent, until)
    events = [json.loads(line) for line in (agent.mount / "events").read_text().splitlines()]
    told = [event for event in events if event["kind"] == "image"]
    assert {event["type"] for event in told} >= {"ADDED", "MODIFIED", "REMOVED"}
    assert told[-1]["name"] == "trixie"


def test_moving_a_file_in_takes_it_away_where_it_was(images, raw, tmp_path):
    shutil.copy(raw, tmp_path / "mine")
    done = run(f"mv {tmp_path}/mine {images}/debian")
    assert (images / "debian").exists(), done.stderr
    assert not (tmp_path / "mine").exists()


def test_what_is_no_good_image_is_refused_at_close_and_leaves_nothing(
    agent, images, raw, qcow2, tmp_path, until
):
    overlay, short, broken = (tmp_path / name for name in ("overlay", "short", "broken"))
    words = f"qemu-img create -q -f qcow2 -b /etc/shadow -F raw {overlay} 32M"
    assert run(words).returncode == 0
    short.write_bytes(qcow2.read_bytes()[:-200_000])
    content = bytearray(qcow2.read_bytes())
    content[24:32] = (1 << 50).to_bytes(8, "big")
    broken.write_bytes(content)
    refusals = {
        Path("/etc/services"): ("Exec format error", "neither qcow2 nor a raw disk"),
        overlay: ("Bad message", "only what differs from another file"),
        short: ("Bad message", "broken tables"),
        broken: ("Bad message", "holds a disk of"),
    }
    for file, (words, sentence) in refusals.items():
        done = run(f"cp {file} {images}/bad")
        assert done.returncode != 0
        assert words in done.stderr
        assert sentence in (agent.mount / "errors").read_text().splitlines()[-1]
        nothing_left(agent, until)
    short.write_bytes(raw.read_bytes()[: 20 * MIB])
    assert "Bad message" in run(f"cp {short} {images}/bad").stderr
    nothing_left(agent, until)
    assert "Invalid argument" in run(f"cp {raw} {images}/.bad").stderr


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "exit 3"])
def test_what_was_not_written_to_its_end_leaves_nothing(agent, images, until, tmp_path, how):
    # Of an unpartitioned disk nothing tells how large it is: only its writer knew.
    end = "time.sleep(60)" if how.startswith("SIG") else "os._exit(3)"
    script = f"""
import os, time
file = os.open("{images}/half", os.O_WRONLY | os.O_CREAT)
head = bytearray(1 << 20)
head[0x8001:0x8006] = b"CD001"
os.write(file, head)
print("written", flush=True)
{end}
"""
    command = ["python3", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        if how.startswith("SIG"):
            writer.send_signal(signal.Signals[how])
    nothing_left(agent, until)


def test_a_second_writer_is_refused_and_spoils_nothing(images, raw):
    data, middle = raw.read_bytes(), MIB
    first = os.open(images / "one", os.O_WRONLY | os.O_CREAT)
    os.write(first, data[:middle])
    second = os.open(images / "one", os.O_WRONLY)
    with refused(errno.ESPIPE):
        os.write(second, data[:middle])
    os.close(second)
    for offset in range(middle, len(data), middle):
        os.write(first, data[offset : offset + middle])
    os.close(first)
    assert sha256(images / "one") == sha256(raw)


@pytest.mark.parametrize("step", ["begun", "whole", "recorded", "published", "ready"])
@pytest.mark.thorough
def test_an_agent_that_dies_in_an_import_leaves_all_of_it_or_nothing(
    agent, images, qcow2, until, step
):
    with dying_at(agent, f"image-import:{step}"):
        run(f"cp {qcow2} {images}/debian")
        until(MARKER.exists, what="the agent died at the step")
        until(lambda: agent.is_active() and os.path.ismount(agent.mount), what="the agent is back")
        found = [path.name for path in images.iterdir()]
        assert found == (["debian"] if step == "ready" else [])
        assert len(stored(agent)) == len(found)
        if not found:
            shutil.copy(qcow2, images / "debian")
        assert sha256(images / "debian") == sha256(qcow2)


@pytest.mark.parametrize("step", ["recorded", "removed"])
@pytest.mark.thorough
def test_an_agent_that_dies_in_a_removal_has_removed(agent, images, qcow2, until, step):
    shutil.copy(qcow2, images / "debian")
    with dying_at(agent, f"image-delete:{step}"):
        with contextlib.suppress(OSError):
            (images / "debian").unlink()
        until(MARKER.exists, what="the agent died at the step")
        until(lambda: agent.is_active() and os.path.ismount(agent.mount), what="the agent is back")
        nothing_left(agent, until)


def test_an_image_is_its_owners_until_it_is_given_away(agent, images, qcow2, make_vm):
    def as_user(uid: int, command: str, *groups: int) -> "subprocess.CompletedProcess[str]":
        return run(command, user=uid, group=uid, extra_groups=groups, cwd="/")

    group = images.stat().st_gid
    shutil.copy(qcow2, "/tmp/qcow2")
    assert "Permission denied" in as_user(4003, f"cp /tmp/qcow2 {images}/x").stderr
    assert as_user(4001, f"cp /tmp/qcow2 {images}/x", group).returncode == 0
    facts = (images / "x").stat()
    assert (facts.st_uid, facts.st_gid) == (4001, group)
    assert "Permission denied" in as_user(4003, f"cat {images}/x").stderr
    assert "not permitted" in as_user(4002, f"rm -f {images}/x", group).stderr
    os.chmod(images / "x", 0o400)
    vm = make_vm()
    os.chown(vm.path, 4002, group)
    naming = f"echo x > {vm.path}/image"
    assert "Permission denied" in as_user(4002, naming, group).stderr
    assert "not yours to read" in vm.read("error")
    os.chown(images / "x", 4002, -1)
    assert as_user(4002, naming, group).returncode == 0
    assert vm.read("image") == "x"
    assert as_user(4002, f"echo > {vm.path}/image; rm {images}/x", group).returncode == 0


def test_a_raw_image_is_copied_where_disks_are_raw(agent, images, raw, qcow2, make_vm):
    shutil.copy(raw, images / "raw")
    vm = make_vm(image="raw", storage="40M")
    own = Path(agent.root_dir) / "vms" / vm.read("id")
    with refused(errno.EBUSY):
        (images / "raw").unlink()
    assert f"needed by VM {vm.name}" in (agent.mount / "errors").read_text().splitlines()[-1]
    vm.verb("start")
    vm.wait_counting()
    content = (own / "cow.raw").read_bytes()
    assert len(content) == 40 * MIB
    assert hashlib.sha256(content[: 32 * MIB]).hexdigest() == sha256(raw)
    (images / "raw").unlink()  # the copy stands alone
    vm.verb("stop")
    vm.verb("start")
    vm.verb("kill")
    shutil.copy(qcow2, images / "qcow2")
    with refused(errno.EINVAL):
        vm.write("image", "qcow2")
    other = make_vm(image="qcow2")
    with refused(errno.EOPNOTSUPP):
        other.verb("start")
    assert "raw disks only" in other.read("error")
    with refused(errno.EINVAL):
        other.write("storage", "16M")
    assert "less than the 32M of the image qcow2" in other.read("error")


@pytest.fixture
def name(vm_name: Callable[[], str], agent: Any) -> Iterator[str]:
    """The name of a snapshot, removed afterwards."""
    name = f"snap-{vm_name()}"
    yield name
    for found in names(agent):
        if found.startswith(name):
            archive(agent, found).unlink()


@pytest.mark.thorough(group="linux")
def test_linux_lives_on_an_overlay_of_an_image(
    agent,
    images,
    qcow2,
    make_vm,
    linux,  # noqa: F811
    name,
    until,
    tmp_path,
):
    shutil.copy(qcow2, images / "debian")
    before = sha256(images / "debian")
    disks = [{"name": "data", "size": "64M", "fstype": "ext4", "serial": "data"}]
    config = {"hypervisor": "qemu", "memory": "256M", "boot": linux}
    vm = make_vm(image="debian", disks=disks, **config)
    vm.verb("start")
    wait_up(vm, until)
    own = Path(agent.root_dir) / "vms" / vm.read("id")
    assert told(vm, until, "cat /sys/block/vda/size /sys/block/vdb/size") == "65536\n131072"
    mount = "mkdir /data; mount /dev/vda /mnt && mount /dev/vdb /data && cat /mnt/told"
    assert told(vm, until, mount) == "from the image"
    told(vm, until, "echo first >/mnt/mine; echo data >/data/mine; sync; echo")
    bound = Path(f"/proc/{vm.pid}/root/var/lib/cocoon/cloudimg/blobs/{sha256(qcow2)}.qcow2")
    assert os.statvfs(bound).f_flag & os.ST_RDONLY

    vm.write("snapshot", name)
    shown = described(agent, name)
    assert set(shown["files"]) >= {"overlay.qcow2", "data-data.raw"}
    assert shown["image_digest"] == f"sha256:{sha256(qcow2)}"
    with refused(errno.EBUSY):
        (images / "debian").unlink()
    os.rename(images / "debian", images / "renamed")
    assert vm.read("image") == "renamed"

    told(vm, until, "echo second >/mnt/mine; sync; echo")
    clone = make_vm(hypervisor=None, memory=None, boot=None, stop_timeout=1)
    clone.write("from", name)
    clone.verb("start")
    assert told(clone, until, "cat /mnt/mine /data/mine /mnt/told").splitlines() == [
        "first",
        "data",
        "from the image",
    ]
    assert told(vm, until, "cat /mnt/mine") == "second"
    assert clone.read("image") == "renamed"
    assert clone.read("storage") == str(32 * MIB)
    vm.write("restore", name)
    assert told(vm, until, "cat /mnt/mine; sync") == "first"
    vm.verb("stop")

    # Grown without anybody's rights, and no more is taken out of it than what it was.
    vm.write("storage", "48M")
    vm.write("disks", "[]")
    vm.verb("start")
    until(lambda: not (own / "data-data.raw").exists(), what="the disk taken out is gone")
    until(lambda: "guest is up" in vm.read("console").split("Power down")[-1], 180, "it is up")
    assert told(vm, until, "cat /sys/block/vda/size; ls /sys/block | grep -c vdb || true") == (
        "98304\n0"
    )
    assert told(vm, until, "mount /dev/vda /mnt && cat /mnt/mine") == "first"
    vm.verb("kill")

    # What the VMM wrote into its overlay can only be refused, before anything starts.
    good = (own / "overlay.qcow2").read_bytes()
    (own / "overlay.qcow2").write_bytes(b"QFI\xfb" + bytes(4096))
    with refused(errno.EBADMSG, errno.ENOEXEC):
        vm.verb("start")
    assert "disk overlay.qcow2" in vm.read("error")
    (own / "overlay.qcow2").write_bytes(good)

    # Another host has the archive but not the image.
    shutil.copy(archive(agent, name), tmp_path / "away.tar")
    clone.verb("kill")
    clone.path.rmdir()
    vm.path.rmdir()
    archive(agent, name).unlink()
    shutil.copy(images / "renamed", tmp_path / "image")
    assert sha256(tmp_path / "image") == before
    (images / "renamed").unlink()
    shutil.copy(tmp_path / "away.tar", archive(agent, name))
    events = (agent.mount / "events").read_text().splitlines()
    added = [line for line in events if '"ADDED"' in line and name in line][-1]
    assert json.loads(added)["missing_image"] == f"debian sha256:{before}"
    guest = make_vm(hypervisor=None, memory=None, boot=None, stop_timeout=1)
    with refused(errno.ENOENT):
        guest.write("from", name)
    assert f"copy debian (whose sha256sum is {before}) to images/" in guest.read("error")
    shutil.copy(tmp_path / "image", images / "other")
    guest.write("from", name)
    guest.verb("start")
    assert told(guest, until, "cat /mnt/mine /data/mine") == "first\ndata"
    assert guest.read("image") == "other"

    # Gone behind the agent's back: named before anything starts.
    guest.verb("kill")
    file = next((Path(agent.root_dir) / "images").glob("*/image"))
    shutil.move(file, tmp_path / "image")
    with refused(errno.ENOENT):
        guest.verb("start")
    assert "the file of image other is gone" in guest.read("error")
    shutil.move(tmp_path / "image", file)


def test_a_disk_that_is_full_leaves_nothing(agent, images, raw, qcow2, make_vm, until, tmp_path):
    backing = tmp_path / "fs"
    with backing.open("wb") as file:
        file.truncate(64 * MIB)
    agent.stop()
    subprocess.run(["mkfs.ext4", "-q", "-F", backing], check=True, timeout=60)
    subprocess.run(["mount", "-o", "loop", backing, agent.root_dir], check=True, timeout=60)
    agent.start()
    try:
        shutil.copy(qcow2, images / "small")
        large = tmp_path / "large"
        with large.open("wb") as file:
            file.write(raw.read_bytes())
            file.write(os.urandom(64 * MIB))
        assert "No space left" in run(f"cp {large} {images}/large").stderr
        until(lambda: len(stored(agent)) == 1, what="the import is gone")
        vm = make_vm(hypervisor="qemu", image="small", disks=[{"name": "d", "size": "1M"}])
        filler = Path(agent.root_dir) / "filler"
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
                file.flush()
        with refused(errno.ENOSPC):
            vm.verb("start")
        own = Path(agent.root_dir) / "vms" / vm.read("id")
        assert not own.exists() or not list(own.glob("*overlay*"))
        filler.unlink()
        vm.path.rmdir()
        (images / "small").unlink()
    finally:
        agent.stop()
        subprocess.run(["umount", agent.root_dir], check=True, timeout=60)
        agent.start()
