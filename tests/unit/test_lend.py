import os
import shutil
import stat
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.model.errors import Invalid, Missing, Unsupported
from agent.storage.lend import Lender, pack_acl, unpack_acl, with_user

UID = 70000
NO_ID = 0xFFFFFFFF
OWNER, USER, OWNING_GROUP, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(b"data")
    path.chmod(0o640)
    try:
        os.setxattr(path, "system.posix_acl_access", pack_acl(with_user(minimal(0o640), 1, 4)))
        os.removexattr(path, "system.posix_acl_access")
    except OSError:
        pytest.skip("no ACLs on the filesystem of the tests' directory")
    path.chmod(0o640)
    return path


def minimal(mode):
    return {
        (OWNER, NO_ID): mode >> 6 & 7,
        (OWNING_GROUP, NO_ID): mode >> 3 & 7,
        (OTHER, NO_ID): mode & 7,
    }


def shown(path):
    """The ACL as getfacl shows it, without comments."""
    if shutil.which("getfacl") is None:
        pytest.skip("needs getfacl")
    command = ["getfacl", "--absolute-names", "--numeric", "--omit-header", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_a_lent_disk_can_be_written_by_the_vm_and_nobody_else(disk):
    assert Lender().lend(str(disk), UID, readonly=False) is False
    assert shown(disk) == ["user::rw-", f"user:{UID}:rw-", "group::r--", "mask::rw-", "other::---"]


def test_a_disk_lent_for_reading_can_only_be_read(disk):
    Lender().lend(str(disk), UID, readonly=True)
    assert shown(disk) == ["user::rw-", f"user:{UID}:r--", "group::r--", "mask::r--", "other::---"]


def test_taking_it_back_leaves_the_disk_as_it_was(disk):
    lender = Lender()
    lender.lend(str(disk), UID, readonly=False)
    lender.take_back(str(disk), UID)
    assert shown(disk) == ["user::rw-", "group::r--", "other::---"]
    assert stat.S_IMODE(disk.stat().st_mode) == 0o640


def test_a_disk_lent_to_two_is_taken_from_each_alone(disk):
    lender = Lender()
    lender.lend(str(disk), UID, readonly=True)
    lender.lend(str(disk), UID + 1, readonly=True)
    lender.take_back(str(disk), UID)
    assert f"user:{UID + 1}:r--" in shown(disk)
    assert not any(f"user:{UID}:" in line for line in shown(disk))


def test_lending_again_changes_what_is_allowed(disk):
    lender = Lender()
    lender.lend(str(disk), UID, readonly=False)
    lender.lend(str(disk), UID, readonly=True)
    assert f"user:{UID}:r--" in shown(disk)


def test_what_the_administrator_masked_is_not_widened(disk):
    subprocess.run(
        ["setfacl", "--no-mask", "--modify", "user:1234:rw-,mask::r--", str(disk)], check=True
    )
    lender = Lender()
    lender.lend(str(disk), UID, readonly=False)
    assert "user:1234:r--" in shown(disk)
    lender.take_back(str(disk), UID)
    assert "user:1234:r--" in shown(disk)
    assert "mask::r--" in shown(disk)


def test_taking_back_what_was_never_lent_or_is_gone_is_no_error(disk, tmp_path):
    Lender().take_back(str(disk), UID)
    Lender().take_back(f"{tmp_path}/nowhere", UID)
    assert shown(disk) == ["user::rw-", "group::r--", "other::---"]


def test_a_link_is_followed_to_the_disk(disk, tmp_path):
    (tmp_path / "link").symlink_to(disk)
    Lender().lend(f"{tmp_path}/link", UID, readonly=True)
    assert f"user:{UID}:r--" in shown(disk)


def test_a_disk_that_is_missing_is_named(tmp_path):
    with pytest.raises(Missing, match=f"no disk {tmp_path}/nowhere"):
        Lender().lend(f"{tmp_path}/nowhere", UID, readonly=True)


@pytest.mark.parametrize("kind", ["directory", "fifo", "device"])
def test_what_is_no_disk_is_refused(tmp_path, kind):
    path = f"{tmp_path}/disk"
    if kind == "directory":
        os.mkdir(path)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = "/dev/null"
    with pytest.raises(Invalid, match="neither a block device nor a regular file"):
        Lender().lend(path, UID, readonly=True)


def test_a_filesystem_without_acls_is_told(disk, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", refuse)
    with pytest.raises(Unsupported, match="takes no ACL"):
        Lender().lend(str(disk), UID, readonly=True)


permissions = st.integers(0, 7)
acls = st.builds(
    lambda mode, users, groups, mask: {
        **minimal(mode),
        **{(USER, uid): allowed for uid, allowed in users.items()},
        **{(GROUP, gid): allowed for gid, allowed in groups.items()},
        **({(MASK, NO_ID): mask} if users or groups else {}),
    },
    st.integers(0, 0o777),
    st.dictionaries(st.integers(0, 99999), permissions, max_size=4),
    st.dictionaries(st.integers(0, 99999), permissions, max_size=4),
    permissions,
)


def effective(acl, entry):
    allowed = acl.get(entry, 0)
    if entry[0] in (USER, OWNING_GROUP, GROUP):
        allowed &= acl.get((MASK, NO_ID), 7)
    return allowed


@given(acls, st.integers(0, 99999), st.sampled_from([0, 4, 6]))
def test_one_user_changes_and_nobody_elses_permissions_do(acl, uid, wanted):
    changed = with_user(acl, uid, wanted)
    assert effective(changed, (USER, uid)) == wanted
    for entry in acl.keys() - {(USER, uid), (MASK, NO_ID)}:
        assert effective(changed, entry) == effective(acl, entry)
    assert ((MASK, NO_ID) in changed) == any(tag in (USER, GROUP) for tag, _ in changed)


@given(acls)
def test_an_acl_survives_packing(acl):
    assert unpack_acl(pack_acl(acl)) == acl
