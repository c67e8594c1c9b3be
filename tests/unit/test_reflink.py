import errno
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from archives import PAGE, data_in, file_with, noise, write_sparse

from agent.model.errors import Exists, Failed, Missing, NoSpace, TimedOut
from agent.storage import reflink
from agent.storage.reflink import (
    copy_file,
    dig_holes,
    is_open_for_writing,
    link_file,
    open_owned,
    take_over,
)

MIB = 1 << 20
RANGES = [(PAGE, PAGE), (5 * MIB, 3 * PAGE), (40 * MIB, 2 * MIB)]
SIZE = 64 * MIB
OWN = os.geteuid()


@pytest.fixture
def directory(tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def source(tmp_path):
    write_sparse(tmp_path / "source", RANGES, SIZE)
    fd = os.open(tmp_path / "source", os.O_RDONLY)
    yield fd
    os.close(fd)


def test_a_copy_has_the_same_data_and_holes(source, directory, tmp_path):
    copy_file(source, directory, "copy", mode=0o444)
    assert (tmp_path / "copy").read_bytes() == file_with(RANGES, SIZE)
    assert data_in(tmp_path / "copy") == data_in(tmp_path / "source")
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o444


@pytest.mark.parametrize("ranges", [[], [(0, 3 * MIB)]], ids=["all hole", "no hole"])
def test_a_copy_of_a_file_without_holes_or_data_is_exact(directory, tmp_path, ranges):
    write_sparse(tmp_path / "a", ranges, 3 * MIB)
    with (tmp_path / "a").open("rb") as file:
        copy_file(file.fileno(), directory, "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert data_in(tmp_path / "b") == data_in(tmp_path / "a")


def test_a_copy_works_where_the_kernel_cannot_copy(source, directory, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(reflink.os, "copy_file_range", refuse)
    monkeypatch.setattr(reflink.fcntl, "ioctl", refuse)
    assert copy_file(source, directory, "copy") is False
    assert (tmp_path / "copy").read_bytes() == file_with(RANGES, SIZE)


def test_a_copy_never_replaces_or_follows_what_has_its_name(source, directory, tmp_path):
    (tmp_path / "copy").symlink_to("elsewhere")
    with pytest.raises(Exists, match="creating copy failed"):
        copy_file(source, directory, "copy")
    assert not (tmp_path / "elsewhere").exists()
    assert (tmp_path / "copy").is_symlink()


def test_a_copy_that_finds_no_room_leaves_nothing(source, directory, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reflink.fcntl, "ioctl", full)
    with pytest.raises(NoSpace, match="copying copy failed: No space left"):
        copy_file(source, directory, "copy")
    assert os.listdir(tmp_path) == ["source"]


def test_progress_is_told_and_can_end_a_copy(source, directory, tmp_path, monkeypatch):
    monkeypatch.setattr(reflink, "_reflink", lambda source, target: False)
    told = []
    copy_file(source, directory, "copy", progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 4 * PAGE + 2 * MIB

    def stop(copied):
        raise TimedOut("enough")

    with pytest.raises(TimedOut, match="enough"):
        copy_file(source, directory, "other", progress=stop)
    assert sorted(os.listdir(tmp_path)) == ["copy", "source"]


def test_a_regular_file_of_the_owner_is_opened(directory, tmp_path):
    (tmp_path / "mem").write_bytes(b"memory")
    fd = open_owned(directory, "mem", OWN)
    assert os.read(fd, 10) == b"memory"
    os.close(fd)


def test_one_that_is_not_there_is_missing(directory):
    with pytest.raises(Missing, match="opening mem failed"):
        open_owned(directory, "mem", OWN)


@pytest.mark.parametrize("kind", ["link", "dangling link", "FIFO", "directory", "socket"])
def test_what_a_vmm_puts_in_a_files_place_is_not_opened(directory, tmp_path, kind):
    match kind:
        case "link":
            (tmp_path / "other").write_bytes(b"secret")
            (tmp_path / "mem").symlink_to("other")
        case "dangling link":
            (tmp_path / "mem").symlink_to("nowhere")
        case "FIFO":
            os.mkfifo(tmp_path / "mem")
        case "directory":
            (tmp_path / "mem").mkdir()
        case "socket":
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(f"/proc/self/fd/{directory}/mem")
            listener.close()
    for flags in (os.O_RDONLY, os.O_RDWR):
        before = os.listdir("/proc/self/fd")
        with pytest.raises(Failed, match="mem is no regular file|opening mem failed"):
            open_owned(directory, "mem", OWN, flags)
        assert os.listdir("/proc/self/fd") == before


@pytest.mark.skipif(OWN != 0, reason="needs root to own files by others")
def test_a_file_of_somebody_else_is_not_opened(directory, tmp_path):
    (tmp_path / "mem").write_bytes(b"x")
    os.chown(tmp_path / "mem", 70001, 70001)
    with pytest.raises(Failed, match="no regular file of uid 70000"):
        open_owned(directory, "mem", 70000)
    os.close(open_owned(directory, "mem", 70001))


def test_a_file_open_for_writing_is_seen_to_be(tmp_path):
    path = tmp_path / "mem"
    path.write_bytes(bytes(PAGE))
    reader = os.open(path, os.O_RDONLY)
    other = os.open(path, os.O_RDONLY)
    assert not is_open_for_writing(reader)
    writer = os.open(path, os.O_RDWR)
    assert is_open_for_writing(reader)
    mapping = mmap.mmap(writer, PAGE)
    os.close(writer)
    assert is_open_for_writing(reader)
    mapping.close()
    assert not is_open_for_writing(reader)
    os.close(other)
    os.close(reader)


def test_the_check_does_not_end_the_agent_when_it_is_raced(tmp_path):
    path = tmp_path / "mem"
    path.write_bytes(b"x")
    reader = os.open(path, os.O_RDONLY)
    opener = subprocess.Popen(
        [sys.executable, "-c", f"for _ in range(3000): open({str(path)!r}, 'r+').close()"]
    )
    try:
        while opener.poll() is None:
            is_open_for_writing(reader)
    finally:
        opener.kill()
        opener.wait()
    assert not is_open_for_writing(reader)
    assert signal.getsignal(signal.SIGIO) == signal.SIG_DFL
    os.close(reader)


def test_a_file_that_nobody_writes_is_taken_over_without_a_copy(directory, tmp_path):
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm" / "mem").write_bytes(b"memory")
    source = os.open(tmp_path / "vm" / "mem", os.O_RDONLY)
    assert take_over(source, directory, "mem")
    os.close(source)
    status = (tmp_path / "mem").stat()
    assert status.st_ino == (tmp_path / "vm" / "mem").stat().st_ino
    assert (status.st_uid, status.st_mode & 0o777) == (OWN, 0o444)


def test_one_that_somebody_can_still_write_is_left_to_be_copied(directory, tmp_path):
    (tmp_path / "vm").mkdir()
    with (tmp_path / "vm" / "mem").open("wb"):
        source = os.open(tmp_path / "vm" / "mem", os.O_RDONLY)
        assert not take_over(source, directory, "mem")
        os.close(source)
    assert not (tmp_path / "mem").exists()


def test_what_is_taken_over_is_the_file_that_was_checked(directory, tmp_path):
    (tmp_path / "vm").mkdir()
    mem = tmp_path / "vm" / "mem"
    mem.write_bytes(b"memory")
    source = os.open(mem, os.O_RDONLY)
    mem.rename(tmp_path / "vm" / "moved")
    mem.write_bytes(b"swapped")
    assert take_over(source, directory, "mem")
    assert (tmp_path / "mem").read_bytes() == b"memory"
    os.close(source)


def test_a_file_without_a_name_left_is_copied(directory, tmp_path):
    (tmp_path / "gone").write_bytes(b"memory")
    source = os.open(tmp_path / "gone", os.O_RDONLY)
    (tmp_path / "gone").unlink()
    assert not take_over(source, directory, "mem")
    os.close(source)


def test_a_shared_file_is_linked(source, directory, tmp_path):
    link_file(source, directory, "link")
    assert (tmp_path / "link").stat().st_ino == (tmp_path / "source").stat().st_ino
    with pytest.raises(Exists, match="linking link failed"):
        link_file(source, directory, "link")


def dig(path):
    fd = os.open(path, os.O_RDWR)
    try:
        return dig_holes(fd)
    finally:
        os.close(fd)


def test_zeros_become_holes_and_the_content_stays(tmp_path):
    content = file_with(RANGES, SIZE)
    (tmp_path / "mem").write_bytes(content)
    # The page of zeros at the beginning is too small a run.
    assert dig(tmp_path / "mem") == SIZE - 5 * PAGE - 2 * MIB
    assert (tmp_path / "mem").read_bytes() == content
    assert data_in(tmp_path / "mem") == 5 * PAGE + 2 * MIB
    assert dig(tmp_path / "mem") == 0


@pytest.mark.parametrize("pages", [3, 4])
def test_only_runs_that_are_worth_it_become_holes(tmp_path, pages):
    content = noise(5 * PAGE) + bytes(pages * PAGE) + noise(PAGE)
    (tmp_path / "mem").write_bytes(content)
    assert dig(tmp_path / "mem") == (pages * PAGE if pages >= 4 else 0)
    assert (tmp_path / "mem").read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"x" * 100, bytes(100), noise(MIB + 5)])
def test_a_file_without_whole_pages_of_zeros_stays_as_it_is(tmp_path, content):
    (tmp_path / "mem").write_bytes(content)
    assert dig(tmp_path / "mem") == 0
    assert (tmp_path / "mem").read_bytes() == content


def test_digging_does_what_fallocate_does(tmp_path, rng):
    if shutil.which("fallocate") is None:
        pytest.skip("fallocate is not installed")
    content = b"".join(
        rng.choice([bytes, noise])(PAGE * 4 * rng.randrange(1, 100)) for _ in range(40)
    )
    (tmp_path / "ours").write_bytes(content)
    (tmp_path / "theirs").write_bytes(content)
    dig(tmp_path / "ours")
    subprocess.run(["fallocate", "--dig-holes", tmp_path / "theirs"], check=True)
    assert (tmp_path / "ours").read_bytes() == content
    assert data_in(tmp_path / "ours") == data_in(tmp_path / "theirs")
