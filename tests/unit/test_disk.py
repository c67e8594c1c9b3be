import errno
import os
import stat

import pytest

from agent.model.errors import Failed, Invalid
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
    ensure_disk(directory, "cow.raw", size, os.geteuid() if uid is None else uid)


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
