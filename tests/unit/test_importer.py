import dataclasses
import errno
import gzip
import io
import json
import os
import resource
import shutil
import subprocess

import pytest
from archives import (
    COCOON_GZIP,
    COCOON_TAR,
    OWN_DISK,
    PAGE,
    cocoon_member,
    data_in,
    expand_cocoon,
    file_with,
    firecracker,
    gnu_member,
    member,
    metadata,
    pack,
    qcow2,
    sidecar,
    vmstate,
)

from agent.model.errors import Damaged, Invalid, NoSpace, UnknownFormat
from agent.model.snapshot import BoundFile, metadata_size, show_metadata
from agent.storage import importer
from agent.storage.archive import read_layout
from agent.storage.importer import ImportSink
from agent.storage.sparse import data_ranges

MIB, GIB = 1 << 20, 1 << 30
RANGES = [(PAGE, PAGE), (20 * PAGE, 3 * PAGE), (60 * PAGE, 4 * PAGE)]
SIZE = 64 * PAGE
DISK = file_with(RANGES, SIZE)
END = bytes(1024)


@pytest.fixture
def staging(tmp_path):
    directory = tmp_path / "staging"
    directory.mkdir()
    return directory


@pytest.fixture
def sink(staging):
    fd = os.open(staging, os.O_RDONLY)
    sink = ImportSink(fd)
    yield sink
    sink.discard()
    os.close(fd)


def feed(sink, archive, piece=128 * 1024):
    for start in range(0, len(archive), piece):
        sink.feed(archive[start : start + piece])


def take_in(sink, archive, piece=128 * 1024):
    feed(sink, archive, piece)
    return sink.finish()


def in_staging(staging):
    return {path.name: path.read_bytes() for path in staging.iterdir()}


def files(**changes):
    """What must be in staging after an import of `firecracker(**changes)`."""
    members = firecracker(**changes)
    del members["snapshot.json"]
    return members


def content_of(path):
    """Size, and where a file has which data, without its holes."""
    fd = os.open(path, os.O_RDONLY)
    size = os.fstat(fd).st_size
    data = [(start, os.pread(fd, length, start)) for start, length in data_ranges(fd, size)]
    os.close(fd)
    return size, data


def with_disk(disk):
    """A whole archive whose disk is the member `disk`."""
    return pack(firecracker(cow_raw=None), end=b"") + disk + END


def zstd(data):
    return subprocess.run(["zstd", "-c", "-q"], input=data, stdout=-1, check=True).stdout


def test_an_archive_of_plain_members_is_taken_in(sink, staging):
    snapshot = take_in(sink, pack(firecracker()))
    assert in_staging(staging) == files()
    assert (snapshot.name, snapshot.hypervisor, snapshot.cpu) == ("nightly", "firecracker", 1)
    assert snapshot.memory == 128 << 20
    assert {file.name: file.size for file in snapshot.files} == {
        name: len(content) for name, content in files().items()
    }


def test_files_are_read_only_and_zeros_become_holes(sink, staging):
    take_in(sink, pack(firecracker()))
    status = (staging / "cow.raw").stat()
    assert status.st_mode & 0o777 == 0o444
    assert status.st_size == 64 * PAGE
    assert data_in(staging / "cow.raw") == 4 * PAGE


@pytest.mark.parametrize("piece", [1, 7, 511, 513, 4096, 10_000_000])
def test_the_size_of_the_pieces_does_not_matter(sink, staging, piece):
    small = {"mem": b"m" * 700, "cow_raw": file_with([(600, 100)], 9000)}
    take_in(sink, pack(firecracker(**small)), piece)
    assert in_staging(staging) == files(mem=small["mem"], cow_raw=small["cow_raw"])


@pytest.mark.parametrize(
    "packing",
    [
        gzip.compress,
        lambda data: gzip.compress(data[:5000]) + gzip.compress(data[5000:]) + bytes(700),
        pytest.param(zstd, marks=pytest.mark.skipif(not shutil.which("zstd"), reason="needs zstd")),
        pytest.param(
            lambda data: zstd(data[:5000]) + zstd(data[5000:]),
            marks=pytest.mark.skipif(not shutil.which("zstd"), reason="needs zstd"),
        ),
    ],
    ids=["gzip", "gzip members and zeros", "zstd", "zstd frames"],
)
@pytest.mark.parametrize("piece", [13, 128 * 1024])
def test_a_compressed_archive_is_told_by_its_first_bytes(sink, staging, packing, piece):
    packed = packing(pack(firecracker(mem=bytes(5 * MIB))))
    take_in(sink, packed, piece)
    assert in_staging(staging) == files(mem=bytes(5 * MIB))


@pytest.mark.parametrize(
    "disk",
    [
        cocoon_member("cow.raw", RANGES, SIZE),
        gnu_member("cow.raw", RANGES, SIZE),
        gnu_member("cow.raw", [*RANGES, (SIZE, 0)], SIZE),
        member("cow.raw", DISK),
        member("x" * 200, DISK, path="cow.raw"),
    ],
    ids=["Cocoon's", "GNU 1.0", "GNU 1.0 with an end", "plain", "plain with a PAX name"],
)
@pytest.mark.parametrize("piece", [300, 128 * 1024])
def test_every_form_of_a_member_gives_the_same_file(sink, staging, disk, piece):
    take_in(sink, with_disk(disk), piece)
    assert (staging / "cow.raw").read_bytes() == DISK
    assert data_in(staging / "cow.raw") == 8 * PAGE


@pytest.mark.parametrize("disk", [cocoon_member, gnu_member])
def test_a_file_that_is_all_hole_is_taken_in(sink, staging, disk):
    take_in(sink, with_disk(disk("cow.raw", [], 100 * MIB)))
    assert (staging / "cow.raw").stat().st_size == 100 * MIB
    assert data_in(staging / "cow.raw") == 0


@pytest.mark.skipif(not shutil.which("tar"), reason="needs GNU tar")
@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=posix"],
        ["--format=posix", "--sparse-version=0.0"],
        ["--format=posix", "--sparse-version=0.1"],
    ],
    ids=" ".join,
)
def test_what_gnu_tar_packed_again_is_taken_in(sink, staging, tmp_path, options):
    source = tmp_path / "source"
    source.mkdir()
    ranges = [(page * 4 * PAGE, PAGE) for page in range(60)]  # old headers hold 4 ranges, then 21
    content = file_with(ranges, 300 * PAGE)
    members = firecracker(cow_raw=content)
    for name, data in members.items():
        (source / name).write_bytes(data)
        subprocess.run(["fallocate", "--dig-holes", source / name], check=True)
    command = ["tar", "--sparse", *options, "-cf", tmp_path / "x.tar", *members]
    subprocess.run(command, cwd=source, check=True)
    take_in(sink, (tmp_path / "x.tar").read_bytes(), 1000)
    assert in_staging(staging) == files(cow_raw=content)


@pytest.mark.parametrize("path", [COCOON_TAR, COCOON_GZIP])
def test_a_real_archive_of_cocoons_is_taken_in(sink, staging, path):
    snapshot = take_in(sink, path.read_bytes())
    expected = expand_cocoon(COCOON_TAR.read_bytes())
    del expected["snapshot.json"]
    assert sorted(os.listdir(staging)) == sorted(expected)
    for name, (size, ranges, data) in expected.items():
        assert (staging / name).stat().st_size == size
        with (staging / name).open("rb") as file:
            got = b"".join(os.pread(file.fileno(), length, start) for start, length in ranges)
        assert got == data
        assert data_in(staging / name) <= len(data) + PAGE
    assert snapshot.name == "sample"
    assert snapshot.description == "letters"
    assert (snapshot.cpu, snapshot.memory, snapshot.storage) == (1, 512 * MIB, 10 << 30)
    assert snapshot.image == "none"
    path = "/var/lib/cocoon/run/firecracker/K3ZQ7WMB5TNXE2LVAGHRDYC6PS/cow.raw"
    assert snapshot.binds == (BoundFile("cow.raw", path),)
    assert [(disk.path, disk.role, disk.readonly) for disk in snapshot.disks] == [
        (path, "cow", False)
    ]


def test_a_real_archive_of_cocoons_survives_the_way_out_and_in_again(sink, staging, tmp_path):
    snapshot = dataclasses.replace(take_in(sink, COCOON_TAR.read_bytes()), id="a" * 26)
    again = tmp_path / "again"
    again.mkdir()
    source, target = os.open(staging, os.O_RDONLY), os.open(again, os.O_RDONLY)
    layout = read_layout(source, os.listdir(staging), metadata_size(snapshot), 0)
    second = ImportSink(target)
    fds = [os.open(staging / name, os.O_RDONLY) for name in layout.names]
    for piece, number in enumerate(layout.sources):
        size = layout.starts[piece + 1] - layout.starts[piece]
        origin = layout.origins[piece]
        match number:
            case -1:
                second.feed(layout.literals[origin : origin + size])
            case -2:
                second.feed(show_metadata(snapshot))
            case _:
                second.feed(os.pread(fds[number], size, origin))
    assert dataclasses.replace(second.finish(), id="a" * 26) == snapshot
    for name in os.listdir(staging):
        one, two = staging / name, again / name
        assert content_of(one) == content_of(two)
    for fd in (*fds, source, target):
        os.close(fd)


def test_members_may_come_in_any_order(sink, staging):
    members = firecracker()
    take_in(sink, pack({name: members[name] for name in sorted(members, reverse=True)}))
    assert in_staging(staging) == files()


def test_fields_of_the_metadata_that_are_not_known_are_kept(sink):
    config = json.loads(metadata(queue_size=256, windows=True, image_blob_ids={"ab": {}}))
    config["comment"] = {"by": "somebody"}
    snapshot = take_in(sink, pack(firecracker(snapshot_json=json.dumps(config).encode())))
    shown = json.loads(show_metadata(dataclasses.replace(snapshot, id="i")))
    assert shown["comment"] == {"by": "somebody"}
    assert shown["config"] == {**config["config"], "id": "i"}


def test_progress_tells_bytes_and_members(sink):
    archive = pack(firecracker())
    sink.feed(archive[:9000])
    assert sink.progress.bytes_in == 9000
    assert sink.progress.members == ("snapshot.json", "cocoon.json", "cow.raw")


def test_holes_in_the_archive_itself_are_skipped(sink, staging):
    archive = with_disk(member("cow.raw", DISK))
    start = archive.index(DISK)
    zeros = start + 10 * PAGE  # in the middle of the disk's first hole
    sink.feed(archive[:zeros])
    sink.skip(5 * PAGE)
    sink.feed(archive[zeros + 5 * PAGE : -1200])
    tail = archive[-1200:]
    sink.feed(tail.rstrip(b"\0"))
    sink.skip(len(tail) - len(tail.rstrip(b"\0")))
    sink.finish()
    assert (staging / "cow.raw").read_bytes() == DISK


def test_a_hole_of_any_size_behind_the_end_costs_nothing(sink):
    feed(sink, pack(firecracker()))
    sink.skip(1 << 60)
    assert sink.finish().name == "nightly"


@pytest.mark.parametrize("packing", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_broken_off_archive_is_incomplete_until_the_rest_comes(staging, packing, rng):
    archive = packing(pack(firecracker()))
    for cut in [0, 1, 100, *sorted(rng.sample(range(2, len(archive) - 512), 20))]:
        fd = os.open(staging, os.O_RDONLY)
        sink = ImportSink(fd)
        sink.feed(archive[:cut])
        with pytest.raises(Damaged, match=f"incomplete: it ends after {cut} bytes"):
            sink.finish()
        sink.feed(archive[cut:])
        assert sink.finish().name == "nightly"
        assert in_staging(staging) == files()
        assert sink.finish() is sink.finish()
        for name in os.listdir(staging):
            (staging / name).unlink()
        os.close(fd)


def test_an_import_that_is_given_up_leaves_nothing(sink, staging):
    sink.feed(pack(firecracker())[:-2000])
    assert os.listdir(staging)
    before = len(os.listdir("/proc/self/fd"))
    sink.discard()
    assert os.listdir(staging) == []
    assert len(os.listdir("/proc/self/fd")) < before


def test_discarding_a_finished_import_removes_nothing(sink, staging):
    take_in(sink, pack(firecracker()))
    sink.discard()
    assert in_staging(staging) == files()


def test_the_path_in_the_state_counts_before_that_in_the_sidecar(sink):
    source, clone = (f"/var/lib/cocoon/run/firecracker/{name}/cow.raw" for name in ("A", "B"))
    archive = firecracker(cocoon_json=sidecar(clone), vmstate=vmstate("/boot/vmlinux", source))
    assert take_in(sink, pack(archive)).binds == (BoundFile("cow.raw", source),)


def test_a_disk_under_another_name_is_bound_where_the_sidecar_has_it(sink):
    path = "/var/lib/cocoon/vms/../disks/one.img"
    snapshot = take_in(sink, pack(firecracker(cocoon_json=sidecar(path), vmstate=vmstate())))
    assert snapshot.binds == (BoundFile("cow.raw", "/var/lib/cocoon/disks/one.img"),)


def test_nothing_is_bound_for_a_snapshot_with_canonical_paths(sink):
    assert take_in(sink, pack(firecracker())).binds == ()


def test_a_guest_that_plants_a_path_in_its_state_does_not_spoil_the_snapshot(sink):
    state = vmstate("/etc/cow.raw", OWN_DISK)
    assert take_in(sink, pack(firecracker(vmstate=state))).binds == ()


def test_base_images_and_seed_disks_need_not_travel(sink):
    disks = [
        {"path": "/var/lib/cocoon/oci/blobs/ab.erofs", "ro": True, "serial": "l", "role": "layer"},
        {"path": "/var/lib/cocoon/vms/x/cidata.img", "ro": True, "serial": "", "role": "cidata"},
        {"path": OWN_DISK, "ro": False, "serial": "cocoon-cow", "role": "cow"},
    ]
    document = json.dumps({"storage_configs": disks}).encode()
    snapshot = take_in(sink, pack(firecracker(cocoon_json=document)))
    assert [disk.role for disk in snapshot.disks] == ["layer", "cidata", "cow"]


def cloud_hypervisor(**changes):
    config = {
        "cpus": {"boot_vcpus": 2, "max_vcpus": 4},
        "memory": {"size": 256 * MIB},
        "disks": [
            {"path": "/var/lib/cocoon/run/cloudhypervisor/X/overlay.qcow2", "readonly": False},
            {"path": None},
        ],
        "payload": {"firmware": "/var/lib/cocoon/firmware/CLOUDHV.fd"},
    }
    return {
        "snapshot.json": metadata(hypervisor="cloud-hypervisor"),
        "config.json": json.dumps({**config, **changes}).encode(),
        "memory-ranges": b"m" * PAGE,
        "overlay.qcow2": qcow2(10 * GIB, backing=b"/var/lib/cocoon/base.qcow2"),
        "state.json": b"{}",
    }


def test_network_interfaces_are_counted_where_cloud_hypervisor_has_them(sink):
    members = cloud_hypervisor(net=[{"id": "_net0"}, {"id": "_net1"}])
    members["snapshot.json"] = metadata(hypervisor="cloud-hypervisor", nics=1)
    assert take_in(sink, pack(members)).nics == 2


def test_a_cloud_hypervisor_snapshot_of_cocoons_needs_no_sidecar(sink):
    snapshot = take_in(sink, pack(cloud_hypervisor()))
    assert snapshot.binds == (
        BoundFile("overlay.qcow2", "/var/lib/cocoon/run/cloudhypervisor/X/overlay.qcow2"),
    )
    assert snapshot.boot.firmware_path == "/var/lib/cocoon/firmware/CLOUDHV.fd"
    assert snapshot.storage == 10 * GIB


@pytest.mark.parametrize(
    ("overlay", "refusal", "words"),
    [
        (b"q" * 100, UnknownFormat, "overlay.qcow2 is no qcow2 file"),
        (qcow2(features=4), Damaged, "overlay.qcow2 keeps its data in another file"),
        (qcow2()[: MIB // 8], Damaged, "overlay.qcow2 is cut short"),
    ],
)
def test_an_overlay_that_is_none_or_wants_another_file_is_refused(
    sink, staging, overlay, refusal, words
):
    members = cloud_hypervisor()
    members["overlay.qcow2"] = overlay
    with pytest.raises(refusal, match=words):
        take_in(sink, pack(members))
    assert os.listdir(staging) == []


def test_a_cloud_hypervisor_disk_elsewhere_on_the_host_is_refused(sink):
    with pytest.raises(Invalid, match=r"config\.json names the path '/dev/sda'"):
        take_in(sink, pack(cloud_hypervisor(disks=[{"path": "/dev/sda"}])))


def test_a_full_disk_is_said_to_be_one(sink, staging, monkeypatch):
    def pwrite(fd, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(importer.os, "pwrite", pwrite)
    with pytest.raises(NoSpace, match="No space left on device"):
        feed(sink, pack(firecracker()))
    assert os.listdir(staging) == []


class LittleRoom:
    """What statvfs says of a filesystem with 100 KiB left."""

    f_bavail = 25
    f_frsize = 4096


def test_more_data_than_the_space_left_is_refused_before_it_is_written(sink, staging, monkeypatch):
    monkeypatch.setattr(importer.os, "fstatvfs", lambda fd: LittleRoom)
    large = gnu_member("mem", [(0, 200 * PAGE)], 300 * PAGE)
    with pytest.raises(NoSpace, match=r"mem needs 800K: the filesystem has 100K left"):
        sink.feed(large[:4096])
    assert os.listdir(staging) == []


def test_a_plain_member_may_be_larger_than_the_space_left_if_it_is_zeros(sink, monkeypatch):
    monkeypatch.setattr(importer.os, "fstatvfs", lambda fd: LittleRoom)
    archive = pack(firecracker(mem=bytes(10 * MIB)))
    assert take_in(sink, archive).name == "nightly"


def test_a_plain_member_stops_where_the_space_does(sink, staging, monkeypatch):
    monkeypatch.setattr(importer.os, "fstatvfs", lambda fd: LittleRoom)
    with pytest.raises(NoSpace, match="does not fit"):
        take_in(sink, pack(firecracker(mem=b"x" * MIB)))
    assert os.listdir(staging) == []


def test_a_bomb_takes_time_but_no_memory(sink):
    def zeros():
        block = bytes(MIB)
        yield member("mem", size=MIB << 9)
        for _ in range(1 << 9):
            yield block

    packer = io.BytesIO()
    with gzip.GzipFile(fileobj=packer, mode="wb", compresslevel=1) as stream:
        for block in zeros():
            stream.write(block)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sink.feed(packer.getvalue())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_host_paths_in_an_archive_are_never_opened(sink, monkeypatch, tmp_path):
    opened = []
    really = os.open

    def note(path, *args, **kwargs):
        opened.append(path)
        return really(path, *args, **kwargs)

    monkeypatch.setattr(importer.os, "open", note)
    boot = {"kernel_path": "/var/lib/cocoon/k", "initrd_path": "/var/lib/cocoon/i"}
    document = json.loads(sidecar("/var/lib/cocoon/d/cow.raw"))
    document["boot_config"] = boot
    take_in(sink, pack(firecracker(cocoon_json=json.dumps(document).encode())))
    assert sorted(opened) == sorted(files())
