import dataclasses
import errno
import json
import os
import shutil
import stat
import subprocess

import pytest
from archives import qcow2

from agent.model.config import BaseImage
from agent.model.disks import DiskFile
from agent.model.errors import Damaged, Failed, Invalid
from agent.model.size import GIB, MIB
from agent.storage.disk import ensure_disk

UID = 70000
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other uids")


@pytest.fixture
def directory(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def ensure(directory, size, uid=None):
    ensure_disk(directory, DiskFile("cow.raw", size), os.geteuid() if uid is None else uid)


def test_a_new_disk_has_its_size_and_takes_no_room(directory, tmp_path):
    ensure(directory, 10 * GIB)
    facts = (tmp_path / "cow.raw").stat()
    assert facts.st_size == 10 * GIB
    assert facts.st_blocks == 0
    assert stat.S_IMODE(facts.st_mode) == 0o600


@as_root
def test_a_new_disk_is_the_vms(directory, tmp_path):
    ensure(directory, MIB, UID)
    facts = (tmp_path / "cow.raw").stat()
    assert (facts.st_uid, facts.st_gid) == (UID, UID)


@as_root
def test_one_that_was_not_yet_given_away_is_given_away_now(directory, tmp_path):
    (tmp_path / "cow.raw").touch()
    ensure(directory, MIB, UID)
    facts = (tmp_path / "cow.raw").stat()
    assert (facts.st_uid, facts.st_size) == (UID, MIB)


def test_a_disk_grows_and_keeps_what_is_on_it(directory, tmp_path):
    ensure(directory, MIB)
    with (tmp_path / "cow.raw").open("r+b") as disk:
        disk.write(b"data")
    ensure(directory, 2 * MIB)
    assert (tmp_path / "cow.raw").stat().st_size == 2 * MIB
    assert (tmp_path / "cow.raw").read_bytes()[:5] == b"data\0"


def test_a_disk_of_the_right_size_is_left_alone(directory, tmp_path):
    ensure(directory, MIB)
    before = (tmp_path / "cow.raw").stat()
    ensure(directory, MIB)
    assert (tmp_path / "cow.raw").stat() == before


def test_a_disk_never_shrinks(directory, tmp_path):
    ensure(directory, 2 * MIB)
    with pytest.raises(Invalid, match=r"disk cow\.raw has 2M, more than 1M"):
        ensure(directory, MIB)
    assert (tmp_path / "cow.raw").stat().st_size == 2 * MIB


@pytest.mark.parametrize("kind", ["link", "dangling link", "fifo", "directory"])
def test_what_is_no_file_is_refused_without_waiting(directory, tmp_path, kind):
    other = tmp_path / "other"
    path = tmp_path / "cow.raw"
    if "link" in kind:
        if kind == "link":
            other.write_text("precious")
        path.symlink_to(other)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(Failed, match=r"disk cow\.raw is not the VM's any more.*taken over"):
        ensure(directory, MIB)
    assert other.exists() == (kind == "link")
    assert kind != "link" or other.read_text() == "precious"


@as_root
def test_a_file_of_somebody_else_is_refused(directory, tmp_path):
    (tmp_path / "cow.raw").write_text("root's")
    with pytest.raises(Failed, match="another kind or owner"):
        ensure(directory, MIB, UID)
    assert (tmp_path / "cow.raw").stat().st_size == 6


@as_root
def test_a_hard_link_to_a_file_of_roots_is_refused(directory, tmp_path):
    (tmp_path / "other").touch()
    (tmp_path / "cow.raw").hardlink_to(tmp_path / "other")
    with pytest.raises(Failed, match="another kind or owner"):
        ensure(directory, MIB, UID)
    assert (tmp_path / "other").stat().st_uid == 0


def test_a_disk_that_cannot_be_made_leaves_nothing(directory, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "truncate", full)
    with pytest.raises(OSError, match="No space"):
        ensure(directory, MIB)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_cannot_grow_stays(directory, tmp_path, monkeypatch):
    ensure(directory, MIB)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "truncate", full)
    with pytest.raises(OSError, match="No space"):
        ensure(directory, 2 * MIB)
    assert (tmp_path / "cow.raw").stat().st_size == MIB


BASE = BaseImage("ab" * 32, "qcow2", 64 * MIB)
OVERLAY = DiskFile("overlay.qcow2", 64 * MIB, format="qcow2", base=BASE)
needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img")


def described(path):
    # With a lock it would open the base, which is not there.
    words = ["qemu-img", "info", "--output=json", "-U", path]
    return json.loads(subprocess.check_output(words))


@as_root
@needs_qemu_img
def test_an_overlay_is_empty_and_stands_on_its_base_by_digest(directory, tmp_path):
    ensure_disk(directory, OVERLAY, UID)
    path = tmp_path / "overlay.qcow2"
    found = described(path)
    assert found["virtual-size"] == 64 * MIB
    assert found["backing-filename"] == f"/var/lib/cocoon/cloudimg/blobs/{BASE.digest}.qcow2"
    assert found["backing-filename-format"] == "qcow2"
    facts = path.stat()
    assert (facts.st_uid, stat.S_IMODE(facts.st_mode)) == (UID, 0o600)
    assert os.listdir(tmp_path) == ["overlay.qcow2"]


@as_root
@needs_qemu_img
def test_an_overlay_grows_keeps_what_is_on_it_and_never_shrinks(directory, tmp_path):
    ensure_disk(directory, OVERLAY, UID)
    path = tmp_path / "overlay.qcow2"
    inner = {"driver": "file", "filename": str(path)}
    alone = "json:" + json.dumps({"driver": "qcow2", "backing": None, "file": inner})
    write = ["qemu-io", "-c", "write -P 7 0 65536", alone]
    subprocess.run(write, check=True, stdout=subprocess.DEVNULL)
    # Beyond what one cluster of its first table stands for, so that it has to be moved.
    large = dataclasses.replace(OVERLAY, size=5 << 40)
    ensure_disk(directory, large, UID)
    assert described(path)["virtual-size"] == 5 << 40
    read = ["qemu-io", "-r", "-c", "read -P 7 0 65536", alone]
    assert b"verification failed" not in subprocess.check_output(read)
    before = path.stat()
    ensure_disk(directory, large, UID)
    assert path.stat() == before
    with pytest.raises(Invalid, match=r"overlay\.qcow2 has 5120G, more than 64M"):
        ensure_disk(directory, OVERLAY, UID)


@as_root
@pytest.mark.parametrize("content", [b"", b"guest's", qcow2(features=4), qcow2()[:99999]])
def test_an_overlay_that_is_none_any_more_is_not_given_to_any_program(
    directory, tmp_path, monkeypatch, content
):
    monkeypatch.setattr("agent.storage.disk.grow_overlay", None)
    path = tmp_path / "overlay.qcow2"
    path.write_bytes(content)
    os.chown(path, UID, UID)
    with pytest.raises(Damaged, match=r"disk overlay\.qcow2 .*put the VM back to a snapshot"):
        ensure_disk(directory, OVERLAY, UID)
    assert path.read_bytes() == content


@as_root
@needs_qemu_img
def test_growing_an_overlay_opens_nothing_that_its_header_names(directory, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(qcow2())
    (tmp_path / "overlay.qcow2").write_bytes(qcow2(MIB, backing=os.fsencode(secret)))
    os.chown(tmp_path / "overlay.qcow2", UID, UID)
    before = secret.stat()
    os.utime(secret, ns=(0, before.st_mtime_ns))
    ensure_disk(directory, OVERLAY, UID)
    assert secret.stat().st_atime_ns == 0
    assert described(tmp_path / "overlay.qcow2")["virtual-size"] == 64 * MIB


@as_root
def test_a_copy_of_a_raw_image_has_the_size_that_is_wanted(directory, tmp_path):
    (tmp_path / "base").write_bytes(b"raw" + bytes(MIB))
    copy = DiskFile("cow.raw", 3 * MIB, base=BaseImage("cd" * 32, "raw", MIB, copied=True))
    ensure_disk(directory, copy, UID, str(tmp_path / "base"))
    content = (tmp_path / "cow.raw").read_bytes()
    assert content == b"raw" + bytes(3 * MIB - 3)
    assert stat.S_IMODE((tmp_path / "cow.raw").stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == ["base", "cow.raw"]


@as_root
def test_a_large_filesystem_takes_little_room_and_what_cannot_be_made_leaves_nothing(
    directory, tmp_path, monkeypatch
):
    ensure_disk(directory, DiskFile("cow.raw", 10 * GIB, fstype="ext4"), UID)
    facts = (tmp_path / "cow.raw").stat()
    assert facts.st_size == 10 * GIB
    assert facts.st_blocks * 512 < 16 * MIB
    with pytest.raises(Failed, match=r"disk data-a\.raw cannot be made: mkfs\.ext4 failed"):
        ensure_disk(directory, DiskFile("data-a.raw", 512, fstype="ext4"), UID)
    assert os.listdir(tmp_path) == ["cow.raw"]
