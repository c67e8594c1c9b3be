import dataclasses
import json

import pytest
from archives import OWN_DISK, vmstate
from hypothesis import given
from hypothesis import strategies as st

from agent.model import canonical
from agent.model.access import Access
from agent.model.errors import CocoonError, Damaged, Invalid
from agent.model.sidecar import (
    Sidecar,
    check_path,
    complete,
    parse_ch_config,
    parse_sidecar,
    show_sidecar,
    vmstate_paths,
)
from agent.model.snapshot import (
    BoundFile,
    Snapshot,
    SnapshotBoot,
    SnapshotDisk,
    SnapshotFile,
    SnapshotState,
    check_description,
    clean_description,
    from_row,
    is_data_file,
    metadata_size,
    parse_metadata,
    show_metadata,
    to_row,
)

SNAPSHOT = Snapshot(
    id="abcdefghijklmnopqrstuvwx22",
    name="nightly",
    access=Access(1000, 990, 0o660),
    hypervisor="firecracker",
    hypervisor_version="1.12.1",
    state=SnapshotState.READY,
    description="before the upgrade",
    cpu=2,
    memory=512 << 20,
    storage=10 << 30,
    image="debian",
    image_digest="sha256:ab",
    image_type="oci",
    image_blobs=("ab", "cd"),
    disks=(SnapshotDisk(OWN_DISK, serial="cocoon-cow", role="cow"),),
    boot=SnapshotBoot(cmdline="console=ttyS0"),
    binds=(BoundFile("cow.raw", "/var/lib/cocoon/x/cow.raw"),),
    source_vm_id="22xwvutsrqponmlkjihgfedcba",
    files=(SnapshotFile("cow.raw", 10 << 30), SnapshotFile("mem", 512 << 20)),
    archive_size=123456,
    pause_ms=12.5,
    generation=3,
    created_at=1_700_000_000,
    mtime=1_700_000_001.5,
    extra={"comment": 1, "config": {"queue_size": 256}},
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def near(keys):
    """JSON objects whose keys are among `keys`, as often as not."""
    return st.dictionaries(st.sampled_from(keys) | st.text(max_size=5), json_values, max_size=6)


def test_a_record_survives_the_index():
    row = json.loads(json.dumps(to_row(SNAPSHOT)))
    assert from_row(row) == SNAPSHOT


def test_a_record_of_an_older_agent_takes_defaults():
    row = to_row(SNAPSHOT)
    for key in ("image_blobs", "disks", "boot", "binds", "files", "extra", "archive_size"):
        del row[key]
    assert from_row(row).files == ()


def test_the_metadata_has_cocoons_shape():
    document = json.loads(show_metadata(SNAPSHOT))
    assert document["version"] == 1
    assert document["comment"] == 1
    assert document["config"] == {
        "id": "abcdefghijklmnopqrstuvwx22",
        "name": "nightly",
        "description": "before the upgrade",
        "hypervisor": "firecracker",
        "hypervisor_version": "1.12.1",
        "cpu": 2,
        "memory": 512 << 20,
        "storage": 10 << 30,
        "image": "debian",
        "image_digest": "sha256:ab",
        "image_type": "oci",
        "image_blob_ids": {"ab": {}, "cd": {}},
        "source_vm_id": "22xwvutsrqponmlkjihgfedcba",
        "created_at": 1_700_000_000,
        "queue_size": 256,
    }


def test_the_metadata_reads_back_as_a_draft():
    draft = parse_metadata(show_metadata(SNAPSHOT))
    assert draft == dataclasses.replace(
        SNAPSHOT,
        id="",
        access=Access(0, 0),
        state=SnapshotState.PENDING,
        disks=(),
        boot=SnapshotBoot(),
        binds=(),
        files=(),
        archive_size=0,
        pause_ms=0,
        generation=0,
        mtime=0,
    )


def test_the_metadata_measures_4096_bytes_as_a_rule():
    assert metadata_size(SNAPSHOT) == len(show_metadata(SNAPSHOT)) == 4096


@given(
    st.from_regex(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}", fullmatch=True),
    st.text(max_size=1100) | st.sampled_from(['"' * 1024, "\\" * 1024, "\n\t" * 512, "ß" * 512]),
    st.sampled_from([{}, {"x": "y" * 5000}]),
)
def test_no_name_and_no_description_changes_its_size(name, description, extra):
    plain = dataclasses.replace(SNAPSHOT, extra=extra)
    described = dataclasses.replace(plain, name=name, description=clean_description(description))
    assert len(show_metadata(described)) == metadata_size(plain)
    assert json.loads(show_metadata(described))["config"]["name"] == name


def test_metadata_with_more_than_fits_into_4096_bytes_grows_by_blocks():
    size = metadata_size(dataclasses.replace(SNAPSHOT, extra={"x": "y" * 5000}))
    assert size > 4096
    assert size % 512 == 0


def test_a_name_that_is_none_here_is_left_to_the_caller():
    document = show_metadata(dataclasses.replace(SNAPSHOT, name="Ours of May!"))
    assert parse_metadata(document).name == ""


def test_a_description_is_plain_text_of_at_most_1024_bytes():
    assert check_description("two\nlines, ünïcode") == "two\nlines, ünïcode"
    for text in ("x" * 1025, "ü" * 513, "a\x1b[31mb", "a\0b", "\ud800"):
        with pytest.raises(Invalid, match="description"):
            check_description(text)
        assert check_description(clean_description(text))


@pytest.mark.parametrize(
    "name",
    [
        "vmstate",
        "mem",
        "cow.raw",
        "overlay.qcow2",
        "cidata.img",
        "cocoon.json",
        "config.json",
        "state.json",
        "memory-ranges",
        "kernel",
        "initrd",
        "data-a.raw",
        "data-my.disk_1-x.raw",
    ],
)
def test_the_files_of_a_snapshot_are_known_by_name(name):
    assert is_data_file(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "snapshot.json", "mem ", "MEM", "data-.raw", "data-.x.raw", "data-a.img"),
        *("data-a/b.raw", "data-" + "x" * 64 + ".raw", "mem\n", "data-a.raw\n", "cowxraw"),
    ],
)
def test_other_names_are_not(name):
    assert not is_data_file(name)


SIDECAR = Sidecar(
    disks=(
        SnapshotDisk(OWN_DISK, serial="cocoon-cow", role="cow"),
        SnapshotDisk("/var/lib/cocoon/run/vm/data-a.raw", serial="a", role="data", fstype="ext4"),
        SnapshotDisk("/var/lib/cocoon/run/disk/1", readonly=True, serial="b", role="layer"),
    ),
    boot=SnapshotBoot(cmdline="console=ttyS0"),
    cpu=1,
    memory=512 << 20,
)


def test_a_sidecar_has_cocoons_shape():
    assert json.loads(show_sidecar(SIDECAR)) == {
        "storage_configs": [
            {"path": OWN_DISK, "ro": False, "serial": "cocoon-cow", "role": "cow"},
            {
                "path": "/var/lib/cocoon/run/vm/data-a.raw",
                "ro": False,
                "serial": "a",
                "role": "data",
                "fstype": "ext4",
            },
            {"path": "/var/lib/cocoon/run/disk/1", "ro": True, "serial": "b", "role": "layer"},
        ],
        "boot_config": {"kernel_path": "", "initrd_path": "", "cmdline": "console=ttyS0"},
        "cpu": 1,
        "memory": 512 << 20,
    }


def test_a_sidecar_reads_back():
    assert parse_sidecar(show_sidecar(SIDECAR)) == SIDECAR


def test_a_data_disk_of_the_vm_must_travel():
    document = show_sidecar(SIDECAR)
    names = {"vmstate": b"", "mem": b"", "cow.raw": b"", "cocoon.json": document}
    files = [SnapshotFile(name, len(content)) for name, content in names.items()]
    with pytest.raises(Damaged, match=r"no 'data-a\.raw', a disk that the VM had"):
        complete(SNAPSHOT, files, names.__getitem__)
    files.append(SnapshotFile("data-a.raw", 1))
    assert complete(SNAPSHOT, files, names.__getitem__).disks == SIDECAR.disks


def test_cpu_and_memory_come_from_the_sidecar_where_the_metadata_is_silent():
    names = {"vmstate": b"", "mem": b"", "cow.raw": b"", "data-a.raw": b""}
    names["cocoon.json"] = show_sidecar(SIDECAR)
    files = [SnapshotFile(name, len(content)) for name, content in names.items()]
    silent = dataclasses.replace(SNAPSHOT, cpu=0, memory=0)
    found = complete(silent, files, names.__getitem__)
    assert (found.cpu, found.memory) == (1, 512 << 20)


def test_paths_in_a_vmstate_are_found_by_their_length():
    paths = ("/var/lib/cocoon/run/vm/cow.raw", "/" + "x" * 300, "/a")
    assert vmstate_paths(vmstate(*paths)) == paths
    assert vmstate_paths(vmstate("/a/b", "/a/b")) == ("/a/b",)
    assert vmstate_paths(b"/var/lib/cocoon/run/vm/cow.raw") == ()
    assert vmstate_paths(vmstate("/a\nb", "/ü")) == ()


@given(st.binary(max_size=200))
def test_a_vmstate_may_hold_anything(data):
    vmstate_paths(data + b"\x04\0\0\0\0\0\0\0/" + data)


def test_more_paths_for_one_disk_than_a_vm_can_have_are_refused():
    many = vmstate(*(f"/var/lib/cocoon/{number}/cow.raw" for number in range(9)))
    names = {"vmstate": many, "mem": b"", "cow.raw": b"", "data-a.raw": b""}
    names["cocoon.json"] = show_sidecar(SIDECAR)
    files = [SnapshotFile(name, len(content)) for name, content in names.items()]
    with pytest.raises(Damaged, match=r"names cow\.raw at 9 different paths"):
        complete(SNAPSHOT, files, names.__getitem__)


@pytest.mark.parametrize(
    ("path", "normal"),
    [
        ("/var/lib/cocoon/a", "/var/lib/cocoon/a"),
        ("/var/lib/cocoon//a/./b/../c/", "/var/lib/cocoon/a/c"),
        ("/var/lib/../lib/cocoon/a", "/var/lib/cocoon/a"),
    ],
)
def test_a_path_below_the_trusted_root_is_normalised(path, normal):
    assert check_path(path, "x") == normal


@pytest.mark.parametrize("path", [f"{canonical.VM}/a/cow.raw", f"{canonical.SOCKETS}/cow.raw"])
def test_a_path_through_what_a_vm_writes_to_is_not_bound(path):
    with pytest.raises(Invalid, match="a VM may put links"):
        check_path(path, "x")
    # A guest may have planted it beside the one that counts.
    own = f"{canonical.ROOT}/a/cow.raw"
    names = {"vmstate": vmstate(path, own), "mem": b"", "cow.raw": b"", "data-a.raw": b""}
    names["cocoon.json"] = show_sidecar(SIDECAR)
    files = [SnapshotFile(name, len(content)) for name, content in names.items()]
    assert [bound.path for bound in complete(SNAPSHOT, files, names.__getitem__).bound] == [own]


@pytest.mark.parametrize(
    "path",
    [
        *("", "/", "a", "/var/lib/cocoon", "/var/lib/cocoon/", "/var/lib/cocoon/.."),
        *("/var/lib/cocoonx", "/var/lib/cocoon/a\nb", "//var/lib/cocoon/a"),
        "/var/lib/cocoon/" + "x" * 4096,
    ],
)
def test_other_paths_are_not_bound(path):
    with pytest.raises(Invalid, match="not below /var/lib/cocoon"):
        check_path(path, "x")


@given(json_values | near(["version", "config", "x"]), near(["hypervisor", "cpu", "name", "id"]))
def test_any_metadata_is_read_or_refused(document, config):
    sound = {"version": 1, "config": {"hypervisor": "qemu", "cpu": 1, "memory": 1, **config}}
    for value in (document, sound):
        try:
            draft = parse_metadata(json.dumps(value).encode())
        except CocoonError:
            continue
        again = parse_metadata(show_metadata(draft))
        assert again == draft


@given(near(["storage_configs", "boot_config", "cpu", "disks", "payload", "cpus", "memory"]))
def test_any_sidecar_is_read_or_refused(document):
    for parse in (parse_sidecar, parse_ch_config):
        try:
            found = parse(json.dumps(document).encode())
        except CocoonError:
            continue
        assert all(disk.path.startswith("/var/lib/cocoon/") for disk in found.disks)
