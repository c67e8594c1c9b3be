import os
import stat
from pathlib import Path

import pytest

from agent.model.errors import Failed, NotPermitted
from agent.storage import directory

UID = 70000
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other uids")


@pytest.fixture
def top(tmp_path):
    path = tmp_path / "top"
    path.mkdir()
    return path


def test_a_directory_is_made_with_its_mode_whatever_the_umask(top):
    before = os.umask(0o077)
    try:
        directory.ensure(f"{top}/new", 0o755, os.geteuid())
    finally:
        os.umask(before)
    assert stat.S_IMODE((top / "new").stat().st_mode) == 0o755


def test_a_directory_that_is_there_keeps_what_is_in_it(top):
    (top / "old").mkdir(0o700)
    (top / "old" / "file").write_text("x")
    directory.ensure(f"{top}/old", 0o755, os.geteuid())
    assert (top / "old" / "file").read_text() == "x"
    assert stat.S_IMODE((top / "old").stat().st_mode) == 0o755


@as_root
def test_a_directory_is_given_to_its_owner_and_group(top):
    directory.ensure(f"{top}/vm", 0o700, UID)
    facts = (top / "vm").stat()
    assert (facts.st_uid, facts.st_gid) == (UID, UID)


@as_root
def test_one_that_was_not_yet_given_away_is_given_away_now(top):
    (top / "vm").mkdir()
    directory.ensure(f"{top}/vm", 0o700, UID)
    assert (top / "vm").stat().st_uid == UID


@as_root
def test_a_directory_of_somebody_else_is_refused(top):
    (top / "vm").mkdir()
    os.chown(top / "vm", UID + 1, UID + 1)
    with pytest.raises(NotPermitted, match=f"belongs to uid {UID + 1} instead of {UID}"):
        directory.ensure(f"{top}/vm", 0o700, UID)


@pytest.mark.parametrize("kind", ["link", "file", "dangling"])
def test_something_else_in_the_place_of_a_directory_is_refused(top, tmp_path, kind):
    path = top / "vm"
    if kind == "file":
        path.write_text("x")
    else:
        path.symlink_to(tmp_path if kind == "link" else tmp_path / "nowhere")
    with pytest.raises(NotPermitted, match="is not a directory"):
        directory.ensure(str(path), 0o700, os.geteuid())


@as_root
def test_a_directory_opened_for_a_uid_must_be_that_uids(top):
    with pytest.raises(Failed, match="belongs to uid 0"), directory.opened_as(str(top), UID):
        pass


def test_a_link_to_a_directory_is_not_opened(top, tmp_path):
    (tmp_path / "link").symlink_to(top)
    with pytest.raises(OSError, match="Not a directory"), directory.opened(f"{tmp_path}/link"):
        pass


def write(top, name="vm.json", content=b"{}", uid=None):
    with directory.opened(str(top)) as opened:
        directory.write_file(opened, name, content, os.geteuid() if uid is None else uid)


def test_a_file_is_written_for_its_owner_alone(top):
    write(top)
    assert (top / "vm.json").read_bytes() == b"{}"
    assert stat.S_IMODE((top / "vm.json").stat().st_mode) == 0o600


@as_root
def test_a_file_is_given_to_its_owner(top):
    write(top, uid=UID)
    facts = (top / "vm.json").stat()
    assert (facts.st_uid, facts.st_gid) == (UID, UID)


@pytest.mark.parametrize("kind", ["link", "hard link", "fifo", "file"])
def test_what_stands_in_a_files_place_is_replaced_unopened(top, tmp_path, kind):
    other = tmp_path / "other"
    other.write_text("precious")
    path = top / "vm.json"
    if kind == "link":
        path.symlink_to(other)
    elif kind == "hard link":
        path.hardlink_to(other)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.write_text("old")
    write(top)
    assert path.read_bytes() == b"{}"
    assert not path.is_symlink()
    assert other.read_text() == "precious"


def test_a_directory_in_a_files_place_is_a_failure_that_leaves_nothing(top):
    (top / "vm.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        write(top)
    assert os.listdir(top) == ["vm.json"]


def test_a_link_is_discarded_and_not_what_it_leads_to(top, tmp_path):
    target = tmp_path / "target"
    target.write_text("theirs")
    (top / "file").symlink_to(target)
    with directory.opened(str(top)) as opened:
        directory.discard(opened, "file")
        directory.discard(opened, "file")  # which is gone
    assert os.listdir(top) == []
    assert target.read_text() == "theirs"


def test_removing_what_is_gone_is_no_error(tmp_path):
    directory.remove(f"{tmp_path}/nowhere")


def test_all_that_is_in_a_directory_goes_with_it(top):
    (top / "a" / "b").mkdir(parents=True)
    (top / "a" / "b" / "file").write_text("x")
    (top / "cow.raw").write_text("x")
    os.mkfifo(top / "fifo")
    os.mkfifo(top / "a" / "fifo")
    directory.remove(str(top))
    assert not top.exists()


def test_removing_follows_no_link(top, tmp_path):
    other = tmp_path / "other"
    (other / "inner").mkdir(parents=True)
    (other / "file").write_text("precious")
    (top / "to-directory").symlink_to(other)
    (top / "to-file").symlink_to(other / "file")
    (top / "sub").mkdir()
    (top / "sub" / "to-directory").symlink_to(other)
    (top / "sub" / "up").symlink_to("..")
    directory.remove(str(top))
    assert not top.exists()
    assert (other / "file").read_text() == "precious"
    assert (other / "inner").is_dir()


def test_a_link_in_the_place_of_the_directory_is_not_followed(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_text("precious")
    (tmp_path / "vm").symlink_to(other)
    with pytest.raises(OSError, match="Not a directory"):
        directory.remove(f"{tmp_path}/vm")
    assert (other / "file").exists()


def test_a_tree_deeper_than_any_path_or_stack_goes_too(top):
    here = os.open(top, os.O_RDONLY)
    for _ in range(5000):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    directory.remove(str(top))
    assert not top.exists()


def test_a_wide_tree_goes_too(top):
    for outer in range(20):
        for inner in range(20):
            path = top / str(outer) / str(inner)
            path.mkdir(parents=True)
            (path / "file").touch()
    directory.remove(str(top))
    assert not top.exists()


def test_names_that_are_no_text_go_too(top):
    os.mkdir(bytes(top) + b"/\xff\xfe")
    Path(os.fsdecode(bytes(top) + b"/\xff\xfe/\n\xff")).touch()
    directory.remove(str(top))
    assert not top.exists()


def test_nothing_is_left_open(top):
    (top / "a" / "b").mkdir(parents=True)
    before = os.listdir("/proc/self/fd")
    directory.remove(str(top))
    assert os.listdir("/proc/self/fd") == before
