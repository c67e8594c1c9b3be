import hashlib
import os
import shutil
import subprocess

import pytest
from archives import noise, qcow2

from agent.model.errors import CocoonError, Damaged, Invalid, NoSpace, UnknownFormat
from agent.storage import sink as sink_module
from agent.storage.image_sink import FoundImage, ImageSink

MIB, GIB = 1 << 20, 1 << 30

needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img")


@pytest.fixture
def staging(tmp_path):
    (tmp_path / "staging").mkdir()
    return tmp_path / "staging"


@pytest.fixture
def sink(staging):
    descriptor = os.open(staging, os.O_RDONLY)
    sink = ImageSink(descriptor)
    yield sink
    sink.discard()
    os.close(descriptor)


def take_in(sink, content, piece=100_000):
    for start in range(0, len(content), piece):
        sink.feed(content[start : start + piece])
    return sink.finish()


def disk_with(*pieces, size=MIB):
    """A raw disk that has these bytes at these offsets."""
    disk = bytearray(size)
    for offset, data in pieces:
        disk[offset : offset + len(data)] = data
    return bytes(disk)


def partitioned(end, size=MIB):
    """A raw disk with one partition, in an MBR, up to the sector `end`."""
    entry = bytes(4) + b"\x83" + bytes(3) + (64).to_bytes(4, "little")
    entry += (end - 64).to_bytes(4, "little")
    return disk_with((446, entry), (510, b"\x55\xaa"), (65536, noise(8192)), size=size)


def gpt(last, size=MIB):
    header = b"EFI PART" + bytes(24) + last.to_bytes(8, "little")
    return disk_with((510, b"\x55\xaa"), (512, header), size=size)


@needs_qemu_img
@pytest.mark.parametrize("compressed", [False, True])
def test_a_qcow2_is_taken_in_as_it_is(sink, staging, tmp_path, compressed):
    raw = partitioned(2048)
    (tmp_path / "raw").write_bytes(raw)
    options = ["-c"] if compressed else []
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options]
    subprocess.run([*convert, tmp_path / "raw", tmp_path / "q"], check=True)
    content = (tmp_path / "q").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert take_in(sink, content) == FoundImage("qcow2", MIB, len(content), digest)
    assert (staging / "image").read_bytes() == content
    assert (staging / "image").stat().st_mode & 0o777 == 0o444


def test_a_raw_disk_keeps_its_holes_and_its_digest_counts_them(sink, staging):
    start = partitioned(64 << 11)
    sink.feed(start)
    sink.skip(63 * MIB)
    found = sink.finish()
    whole = start + bytes(63 * MIB)
    assert found == FoundImage("raw", 64 * MIB, 64 * MIB, hashlib.sha256(whole).hexdigest())
    assert (staging / "image").read_bytes() == whole
    assert (staging / "image").stat().st_blocks * 512 < MIB // 2


@pytest.mark.parametrize(
    "disk",
    [
        partitioned(2048),
        gpt(2047),
        disk_with((0x438, b"\x53\xef"), (0x404, (1024).to_bytes(4, "little"))),
        disk_with((0, b"XFSB" + (4096).to_bytes(4, "big") + (256).to_bytes(8, "big"))),
        disk_with((0x8001, b"CD001")),
        disk_with((0x10040, b"_BHRfS_M")),
        disk_with((510, b"\x55\xaa"), (446, b"boot code of a filesystem " * 2)),
    ],
    ids=["MBR", "GPT", "ext4", "XFS", "ISO 9660", "btrfs", "FAT"],
)
def test_raw_disks_are_known_by_what_is_on_them(sink, disk):
    assert take_in(sink, disk).format == "raw"


@pytest.mark.parametrize(
    "disk",
    [
        partitioned(2048)[: MIB // 2],
        gpt(2047)[: MIB - 512],
        disk_with((0x438, b"\x53\xef"), (0x404, (1025).to_bytes(4, "little"))),
        disk_with((0, b"XFSB" + (4096).to_bytes(4, "big") + (257).to_bytes(8, "big"))),
        partitioned(2048)[:-100],
        b"",
    ],
    ids=["MBR", "GPT", "ext4", "XFS", "within a sector", "nothing"],
)
def test_a_raw_disk_that_was_cut_off_is_incomplete_and_may_go_on(sink, staging, disk):
    sink.feed(disk)
    with pytest.raises(Damaged, match="incomplete|empty"):
        sink.finish()
    assert not sink.is_refused
    sink.discard()
    assert os.listdir(staging) == []


@needs_qemu_img
def test_what_was_incomplete_is_good_once_the_rest_has_come(sink):
    content = qcow2()
    sink.feed(content[:70000])
    with pytest.raises(Damaged, match="cut short"):
        sink.finish()
    sink.feed(content[70000:])
    assert sink.finish().format == "qcow2"


@needs_qemu_img
def test_a_qcow2_whose_tables_are_broken_is_refused(sink):
    content = bytearray(qcow2())
    content[3 << 16 : (3 << 16) + 8] = (1 << 63 | 7 << 30).to_bytes(8, "big")
    with pytest.raises(Damaged, match="the image has broken tables: qemu-img check says"):
        take_in(sink, bytes(content))


@pytest.mark.parametrize(
    ("content", "refusal", "words"),
    [
        (b"just a text\n" * 9000, UnknownFormat, "neither qcow2 nor a raw disk"),
        (bytes(MIB), UnknownFormat, "neither qcow2 nor a raw disk"),
        (b"\x1f\x8b" + noise(MIB), UnknownFormat, "packed with gzip.*zcat"),
        (b"KDMV" + noise(MIB), UnknownFormat, "VMDK.*qemu-img convert"),
        (qcow2(backing=b"/etc/shadow"), Damaged, "only what differs from another file"),
        (qcow2(features=4), Damaged, "keeps its data in another file"),
        (qcow2(encryption=2), UnknownFormat, "encrypted"),
        (qcow2(features=1), Damaged, "in use when it was copied"),
    ],
)
def test_what_is_no_image_is_refused_before_it_has_come_whole(
    sink, staging, content, refusal, words
):
    with pytest.raises(refusal, match=words):
        sink.feed(content[: 70 * 1024])
    assert os.listdir(staging) == []
    with pytest.raises(refusal, match=words):
        sink.finish()


def test_a_program_that_is_not_there_is_named(sink, monkeypatch):
    monkeypatch.setattr("agent.storage.tools._PATH", "/nowhere")
    with pytest.raises(CocoonError, match="there is no qemu-img on this host: install qemu-utils"):
        take_in(sink, qcow2())


def test_an_image_stops_where_the_space_does(sink, staging, monkeypatch):
    class LittleRoom:
        f_bavail, f_frsize = 25, 4096

    monkeypatch.setattr(sink_module.os, "fstatvfs", lambda fd: LittleRoom)
    with pytest.raises(NoSpace, match="the image does not fit"):
        sink.feed(partitioned(2048, MIB)[:65536] + noise(MIB))
    assert os.listdir(staging) == []


def test_an_endless_hole_is_refused_at_once(sink):
    sink.feed(partitioned(2048))
    with pytest.raises(Invalid, match=r"hole of 128G.*qemu-img convert"):
        sink.skip(128 << 30)
