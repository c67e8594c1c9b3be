"""What a guest finds on its seed, whatever is in the keys, and when it gets one."""

import dataclasses
import email
import io
import os
import subprocess
from typing import Any

import pycdlib
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from agent.model.access import Access
from agent.model.config import BaseImage, VmConfig, parse_config
from agent.model.errors import Failed, Unsupported
from agent.model.seed import instance_id, seed_files, seed_for_boot
from agent.model.size import MIB
from agent.model.vm import Vm
from agent.storage.seed import SIZE, seed_image, write_seed

HASH = "$6$salt$hash"
characters = st.characters(blacklist_categories=["Cs"], blacklist_characters="\0")
text = st.text(characters, max_size=200)
lines = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\n\r"), min_size=1
)


def make(name: str = "web", vm_id: str = "a" * 26, **config: Any) -> Vm:
    vm = Vm(vm_id, name, 70000, Access(0, 0), parse_config(VmConfig(), config, 8))
    return dataclasses.replace(vm, seed=seed_for_boot(vm))


def read(image: bytes) -> dict[str, bytes]:
    """The files of an ISO 9660 image by the names that Linux shows."""
    iso = pycdlib.PyCdlib()
    iso.open_fp(io.BytesIO(image))
    files = {}
    for entry in iso.list_children(rr_path="/"):
        if entry.is_file():
            name, content = entry.rock_ridge.name().decode(), io.BytesIO()
            iso.get_file_from_iso_fp(content, rr_path=f"/{name}")
            files[name] = content.getvalue()
            joliet = io.BytesIO()
            iso.get_file_from_iso_fp(joliet, joliet_path=f"/{name}")
            assert joliet.getvalue() == files[name]
    return files


def parts(user_data: bytes) -> list[bytes]:
    """The parts of user data as cloud-init takes them apart."""
    if not user_data.startswith(b"Content-Type: multipart/"):
        return [user_data]
    leaves = list(email.message_from_bytes(user_data).walk())
    return [part.get_payload(decode=True) for part in leaves if not part.is_multipart()]


def cloud_config(part: bytes) -> Any:
    assert part.startswith(b"#cloud-config\n")
    return yaml.safe_load(part.decode())


def test_the_disk_is_found_by_its_label_and_has_the_files_of_a_nocloud_seed(tmp_path):
    files = seed_files(make(user="joe", ssh_keys=["ssh-ed25519 AAAA joe"]))
    image = seed_image(files)
    assert read(image) == files
    assert set(files) == {"meta-data", "user-data", "network-config"}
    (tmp_path / "image").write_bytes(image)
    blkid = ["blkid", "--probe", "--output", "value", "-s", "LABEL", "-s", "TYPE"]
    shown = subprocess.run([*blkid, tmp_path / "image"], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["CIDATA", "iso9660"]


def test_the_image_of_the_longest_keys_has_room(tmp_path):
    longest = make(ssh_keys=["\x7f" * 16384] * 100, user_data="\U0001f600" * 65536)
    assert len(seed_image(seed_files(longest))) < SIZE


@given(st.lists(lines, max_size=3), lines, text)
@example([], "\x7f\x85\u2028\ufeff\ufffe\U0001f600", "#cloud-config\na: {}\n")
@example(['"}\n'[:2], "- ${x} #", "'"], "password: {", "\n--==\nContent-Type: text/x-shellscript\n")
@example(["k"], "p", "MIME-Version: 1.0\nContent-Type: text/x-\xff\n\n\xff")
def test_no_value_of_a_key_can_be_anything_but_that_value(keys, password, user_data):
    vm = make(hostname="web", user="joe", ssh_keys=keys, user_data=user_data)
    # As a hash it would have to look like one; that it does not matter is the point.
    vm = dataclasses.replace(vm, config=dataclasses.replace(vm.config, password=password))
    files = seed_files(vm)
    meta = yaml.safe_load(files["meta-data"].decode())
    assert meta == {"instance-id": vm.seed, "local-hostname": "web"}
    found = parts(files["user-data"])
    user = {"name": "joe", "hashed_passwd": password, "lock_passwd": False}
    user |= {"ssh_authorized_keys": keys} if keys else {}
    assert cloud_config(found[0]) == {"user": user}
    if user_data and "mime-version:" not in user_data.lower():
        assert found[1:] == [user_data.encode()]


@given(text.filter(bool))
def test_user_data_alone_stays_as_it_was_written(user_data):
    assert seed_files(make(hostname="web", user_data=user_data))["user-data"] == user_data.encode()


def test_user_data_in_parts_keeps_them_after_the_agents():
    theirs = (
        'Content-Type: multipart/mixed; boundary="X"\nMIME-Version: 1.0\n\n'
        "--X\nContent-Type: text/x-shellscript\n\n#!/bin/sh\necho \N{CHECK MARK}\n"
        "--X\nContent-Type: text/cloud-config\n\n#cloud-config\nruncmd: [ls]\n--X--\n"
    )
    found = parts(seed_files(make(user="joe", user_data=theirs))["user-data"])
    assert cloud_config(found[0]) == {"user": {"name": "joe"}}
    assert found[1] == "#!/bin/sh\necho \N{CHECK MARK}".encode()
    assert cloud_config(found[2]) == {"runcmd": ["ls"]}


def test_keys_without_a_user_are_for_the_images_own():
    files = seed_files(make(ssh_keys=["k"]))
    assert cloud_config(files["user-data"]) == {"user": {"ssh_authorized_keys": ["k"]}}


def test_root_may_log_in_where_root_is_the_user():
    files = seed_files(make(user="root", ssh_keys=["k"]))
    assert cloud_config(files["user-data"])["disable_root"] is False


@pytest.mark.parametrize(
    ("name", "expected"), [("web", "web"), ("web_1.example", "web-1-example"), ("a_", "a")]
)
def test_the_host_name_is_the_vms_name_where_none_is_set(name, expected):
    meta = yaml.safe_load(seed_files(make(name, user="joe"))["meta-data"])
    assert meta["local-hostname"] == expected


def test_another_vm_or_another_key_is_another_instance():
    one = make(hostname="web", user="joe", password=HASH, ssh_keys=["k"], user_data="#!/bin/sh")
    changes = [
        {"hostname": "db"},
        {"user": "ann"},
        {"password": HASH + "x"},
        {"ssh_keys": ("k", "l")},
        {"user_data": ""},
    ]
    others = [
        dataclasses.replace(one, config=dataclasses.replace(one.config, **change))
        for change in changes
    ]
    others.append(dataclasses.replace(one, id="b" * 26))
    ids = [one.seed, *map(instance_id, others)]
    assert len(set(ids)) == len(ids)
    assert all(len(each) <= 64 for each in ids)
    memory = dataclasses.replace(one, config=dataclasses.replace(one.config, memory=MIB))
    assert instance_id(memory) == one.seed


def test_the_seed_is_there_until_a_boot_with_it_was_a_success():
    assert make().seed == ""
    vm = make(user="joe")
    assert vm.seed
    assert seed_for_boot(vm) == vm.seed
    booted = dataclasses.replace(vm, seeded=vm.seed)
    assert seed_for_boot(booted) == ""
    changed = dataclasses.replace(booted, config=dataclasses.replace(vm.config, user="ann"))
    assert seed_for_boot(changed) not in ("", vm.seed)
    # A guest from an image looks for one whatever its keys are.
    image = BaseImage("0" * 64, "qcow2", MIB)
    assert seed_for_boot(dataclasses.replace(make(), config=VmConfig(base=image)))
    # One that came from a snapshot with a seed is an instance of its own without any key.
    clone = dataclasses.replace(make("clone"), seed="as it was loaded")
    assert seed_for_boot(clone) == instance_id(clone)


@pytest.fixture
def directory(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def test_the_disk_has_one_size_and_is_the_vms_alone(directory, tmp_path):
    (tmp_path / "cidata.img").symlink_to("/etc/passwd")
    for image in (b"long" * 1000, b"short"):
        write_seed(directory, image, os.geteuid(), loads=False)
        facts = (tmp_path / "cidata.img").lstat()
        assert (facts.st_size, facts.st_mode & 0o777, facts.st_uid) == (SIZE, 0o600, os.geteuid())
        assert (tmp_path / "cidata.img").read_bytes().rstrip(b"\0") == image


def test_what_a_snapshot_brought_is_written_over_where_it_is(directory, tmp_path):
    (tmp_path / "cidata.img").write_bytes(b"x" * MIB)
    os.link(tmp_path / "cidata.img", tmp_path / "bound")
    write_seed(directory, b"new", os.geteuid(), loads=True)
    assert (tmp_path / "bound").read_bytes() == b"new".ljust(MIB, b"\0")
    with pytest.raises(Unsupported, match="the snapshot has 1M for it"):
        write_seed(directory, bytes(MIB + 1), os.geteuid(), loads=True)
    (tmp_path / "cidata.img").unlink()
    (tmp_path / "cidata.img").symlink_to("bound")
    with pytest.raises(Failed):
        write_seed(directory, b"new", os.geteuid(), loads=True)
