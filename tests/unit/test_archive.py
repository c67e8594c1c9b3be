import dataclasses
import io
import os
import shutil
import subprocess
import sys
import tarfile
from array import array
from pathlib import Path

import pytest
import trio
from archives import PAGE, data_in, file_with, firecracker, noise, write_sparse

from agent.model.access import Access
from agent.model.errors import Failed, Missing
from agent.model.snapshot import Snapshot, metadata_size, show_metadata
from agent.storage.archive import Member, lay_out, open_view, read_layout
from agent.storage.reader import MemberData, MemberEnd, MemberStart, TarReader
from agent.storage.sparse import Extents

pytestmark = pytest.mark.anyio

GIB = 1 << 30
MIB = 1 << 20
MTIME = 1_700_000_000
SNAPSHOT = Snapshot(
    id="abcdefghijklmnopqrstuvwx22",
    name="nightly",
    access=Access(0, 0),
    hypervisor="firecracker",
    cpu=1,
    memory=128 * MIB,
    description="before the upgrade",
    created_at=MTIME,
)
SPARSE = {
    "cow.raw": ([(MIB, PAGE), (90 * MIB, 3 * PAGE), (128 * MIB - PAGE, PAGE)], 128 * MIB),
    "mem": ([(page * 3 * PAGE, PAGE) for page in range(2000)], 64 * MIB),
    "data-empty.raw": ([], 16 * MIB),
}
EXTRACTORS = {
    "GNU tar": ["tar", "--extract", "--sparse", "--file"],
    "GNU tar, told of no sparse files": ["tar", "--extract", "--file"],
    "bsdtar": ["bsdtar", "-x", "-f"],
    "Python": [sys.executable, "-m", "tarfile", "-e"],
}


def fill(directory):
    for name, content in firecracker(snapshot_json=None, mem=None).items():
        (directory / name).write_bytes(content)
    for name, (ranges, size) in SPARSE.items():
        write_sparse(directory / name, ranges, size)


@pytest.fixture
def source(tmp_path):
    """The directory of a snapshot with plain and sparse files."""
    directory = tmp_path / "snapshot"
    directory.mkdir()
    fill(directory)
    return directory


@pytest.fixture
def limiter():
    return trio.CapacityLimiter(2)


@pytest.fixture
def view(limiter):
    """`await view(directory)` opens the archive of a snapshot."""
    opened = []

    async def open_one(directory, snapshot=SNAPSHOT):
        fd = os.open(directory, os.O_RDONLY)
        try:
            layout = read_layout(fd, os.listdir(directory), metadata_size(snapshot), MTIME)
            opened.append(await open_view(layout, fd, show_metadata(snapshot), limiter))
        finally:
            os.close(fd)
        return opened[-1]

    yield open_one
    for each in opened:
        each.close()


async def read(view, piece=MIB):
    content = bytearray()
    while data := await view.pread(len(content), piece):
        content += data
    return bytes(content)


def drop_from_cache(directory):
    for path in directory.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def take_apart(pieces):
    """The members of an archive that comes in `pieces`, as TarReader sees them: start and data."""
    members = []
    reader = TarReader()
    for piece in pieces:
        for event in reader.feed(piece):
            match event:
                case MemberStart():
                    members.append((event, []))
                case MemberData(offset, data):
                    members[-1][1].append((offset, bytes(data)))
                case MemberEnd():
                    pass
    assert reader.ended
    return members


@pytest.mark.parametrize("extractor", EXTRACTORS)
async def test_the_archive_extracts_to_the_original_files_with_their_holes(
    view, source, tmp_path, extractor
):
    command = EXTRACTORS[extractor]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    archive, target = tmp_path / "x.tar", tmp_path / "extracted"
    archive.write_bytes(await read(await view(source)))
    target.mkdir()
    done = subprocess.run(
        [*command, archive], cwd=target, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert sorted(os.listdir(target)) == sorted([*os.listdir(source), "snapshot.json"])
    for path in source.iterdir():
        subprocess.run(["cmp", path, target / path.name], check=True)
    assert (target / "snapshot.json").read_bytes() == show_metadata(SNAPSHOT)
    assert data_in(target / "data-empty.raw") == 0
    assert data_in(target / "cow.raw") < MIB  # XFS adds up to 64 KiB to a range that is appended


async def test_members_are_in_name_order_behind_the_metadata_with_fixed_headers(view, source):
    content = await read(await view(source))
    assert content[512:4608] == show_metadata(SNAPSHOT)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [
        "snapshot.json",
        *sorted(os.listdir(source)),
    ]
    facts = {(m.mode, m.uid, m.gid, m.mtime, m.uname, m.gname) for m in members}
    assert facts == {(0o600, 0, 0, MTIME, "", "")}


async def test_the_size_is_exact_and_the_bytes_are_the_same_each_time(view, source):
    first, second = await view(source), await view(source)
    content = await read(first)
    assert len(content) == first.size
    assert content == await read(second, 100_001)
    os.utime(source / "cow.raw", (5, 5))
    (source / "cow.raw").chmod(0o400)
    assert content == await read(await view(source))


async def test_any_range_reads_as_in_the_whole(view, source, rng):
    archive = await view(source)
    content = await read(archive)
    for _ in range(300):
        offset = rng.randrange(archive.size)
        size = rng.choice([1, 512, rng.randrange(5000), rng.randrange(MIB)])
        assert await archive.pread(offset, size) == content[offset : offset + size]


async def test_reading_at_and_behind_the_end_gives_nothing(view, source):
    archive = await view(source)
    assert await archive.pread(archive.size, 10) == b""
    assert await archive.pread(archive.size + 5, 10) == b""
    assert await archive.pread(archive.size - 3, 10) == bytes(3)
    assert await archive.pread(0, 0) == b""


async def test_what_is_not_in_the_page_cache_is_read_all_the_same(view, source):
    archive = await view(source)
    content = await read(archive)
    drop_from_cache(source)
    assert await read(archive, 128 * 1024) == content


async def test_a_filesystem_that_cannot_read_at_once_does_too(view, source, limiter):
    if not os.path.ismount("/dev/shm"):
        pytest.skip("/dev/shm is no filesystem of its own")
    other = Path("/dev/shm") / f"cocoon-test-{os.getpid()}"
    other.mkdir()
    try:
        fill(other)
        assert await read(await view(other)) == await read(await view(source))
    finally:
        shutil.rmtree(other)


async def test_readers_side_by_side_do_not_disturb_each_other(view, source):
    archive = await view(source)
    content = await read(archive)
    results = []

    async def one(piece):
        results.append(await read(archive, piece))

    async with trio.open_nursery() as nursery:
        for piece in (4096, 70_000, MIB):
            nursery.start_soon(one, piece)
    assert results == [content] * 3


async def test_readers_side_by_side_do_not_share_memory(view, tmp_path):
    directory = tmp_path / "dense"
    directory.mkdir()
    (directory / "cow.raw").write_bytes(noise(3 * MIB))
    archive = await view(directory)
    content = await read(archive, 4 * MIB)

    async def one(piece):
        got = bytearray()
        while data := await archive.pread(len(got), piece):
            got += data
            await trio.lowlevel.checkpoint()
        assert got == content

    for _ in range(5):
        drop_from_cache(directory)  # so that several wait at a time
        async with trio.open_nursery() as nursery:
            for piece in (MIB // 4, MIB // 2, MIB // 2, MIB):
                nursery.start_soon(one, piece)


async def test_renaming_and_describing_change_the_metadata_alone(view, source):
    renamed = dataclasses.replace(
        SNAPSHOT, name="n" * 63, description='"' * 1024, mtime=MTIME + 99, generation=7
    )
    opened = await view(source)
    before = await read(opened)
    after = await read(await view(source, renamed))
    assert len(after) == len(before)
    assert after[512:4608] == show_metadata(renamed)
    assert after[:512] + after[4608:] == before[:512] + before[4608:]
    assert await read(opened) == before


async def test_a_snapshot_deleted_while_it_is_read_is_read_to_its_end(view, source):
    archive = await view(source)
    content = await read(archive)
    shutil.rmtree(source)
    assert await read(archive) == content


async def test_closing_a_view_closes_its_files(view, source):
    before = os.listdir("/proc/self/fd")
    archive = await view(source)
    assert len(os.listdir("/proc/self/fd")) == len(before) + len(os.listdir(source))
    archive.close()
    archive.close()
    assert os.listdir("/proc/self/fd") == before


async def test_opening_an_incomplete_snapshot_leaves_no_file_open(source, limiter):
    fd = os.open(source, os.O_RDONLY)
    layout = read_layout(fd, os.listdir(source), 4096, MTIME)
    (source / "vmstate").unlink()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(Missing, match="opening vmstate failed"):
        await open_view(layout, fd, bytes(4096), limiter)
    assert os.listdir("/proc/self/fd") == before
    os.close(fd)


async def test_a_link_in_the_place_of_a_file_is_not_followed(source):
    (source / "cocoon.json").unlink()
    (source / "cocoon.json").symlink_to("/etc/passwd")
    fd = os.open(source, os.O_RDONLY)
    with pytest.raises(Failed, match=r"opening cocoon\.json failed"):
        read_layout(fd, os.listdir(source), 4096, MTIME)
    os.close(fd)


async def test_a_file_that_was_cut_short_fails_the_read(view, source):
    archive = await view(source)
    os.truncate(source / "vmstate", 100)
    with pytest.raises(Failed, match="vmstate was cut short"):
        await read(archive)


async def test_a_file_whose_holes_do_not_pay_is_a_plain_member(view, tmp_path):
    directory = tmp_path / "snapshot"
    directory.mkdir()
    write_sparse(directory / "mem", [(0, 100 * PAGE)], 100 * PAGE + 512)
    content = await read(await view(directory))
    assert content[4608:4612] == b"mem\0"
    assert content[5120 : 5120 + 100 * PAGE + 512] == file_with([(0, 100 * PAGE)], 100 * PAGE + 512)


def pieces_of(layout, source_byte=b"\xaa"):
    """The bytes of a layout whose files consist of one byte, in pieces."""
    for piece, source in enumerate(layout.sources):
        start, end = layout.starts[piece], layout.starts[piece + 1]
        if source == -1:
            origin = layout.origins[piece]
            yield layout.literals[origin : origin + end - start]
        elif source == -2:
            yield bytes(end - start)
        else:
            block = source_byte * MIB
            for offset in range(0, end - start, MIB):
                yield block[: min(MIB, end - start - offset)]


@pytest.mark.parametrize("size", [8 * GIB - 1, 8 * GIB, 9 * GIB + 5])
def test_sizes_that_a_plain_header_cannot_hold_are_written(size):
    for members in (
        [Member("mem", size, Extents([(0, size)]))],
        [Member("mem", size + GIB, Extents([(GIB, size)]))],
    ):
        layout = lay_out(members, 4096, MTIME)
        head = b"".join(pieces_of(dataclasses.replace(layout, sources=layout.sources[:3])))
        reader = TarReader()
        starts = [event for event in reader.feed(head) if isinstance(event, MemberStart)]
        assert [(start.name, start.size) for start in starts][1:] == [("mem", members[0].size)]
        assert starts[1].stored == size
        if shutil.which("tar"):
            # All headers, and no data: what the listing says is read from them.
            listed = subprocess.run(
                ["tar", "tvf", "-"], input=head, capture_output=True, check=False
            )
            assert f" {members[0].size} ".encode() in listed.stdout.splitlines()[1]


def test_tens_of_thousands_of_extents_take_little_memory():
    ranges = Extents((start, PAGE) for start in range(0, 4 * GIB, 32 * PAGE))
    layout = lay_out([Member("mem", 4 * GIB, ranges)], 4096, MTIME)
    arrays = (layout.starts, layout.sources, layout.origins)
    assert all(isinstance(values, array) for values in arrays)
    assert sum(values.itemsize * len(values) for values in arrays) < 20 * len(ranges)
    members = take_apart(pieces_of(layout))
    assert [offset for offset, _ in members[1][1]] == list(ranges.starts)


def test_noise_has_no_zero_page():
    assert bytes(16) not in noise(MIB)
