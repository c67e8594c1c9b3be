"""Whatever bytes come, in whatever pieces: an import ends well or with a plain refusal."""

import contextlib
import gzip
import os
import tarfile
import tempfile
from pathlib import Path

from archives import COCOON_GZIP, COCOON_TAR, cocoon_member, firecracker, gnu_member, member, pack
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from agent.model.errors import CocoonError
from agent.model.snapshot import is_data_file
from agent.storage import tar
from agent.storage.importer import ImportSink

SMALL = firecracker(mem=b"m" * 700, cow_raw=b"d" * 100)
END = bytes(1024)
WHOLE = [
    pack(SMALL),
    gzip.compress(pack(SMALL)),
    COCOON_TAR.read_bytes(),
    COCOON_GZIP.read_bytes(),
    pack(firecracker(cow_raw=None), end=b"")
    + gnu_member("cow.raw", [(0, 512), (4096, 512)], 8192)
    + cocoon_member("initrd", [(512, 600)], 5000)
    + END,
]

names = st.sampled_from(
    [*SMALL, "config.json", "data-1.raw", "../mem", "/etc/passwd", ".", "", "a/b", "x" * 120]
) | st.text(max_size=20)
numbers = st.integers(-1, 2000) | st.sampled_from([1 << 31, 1 << 62, 1 << 63, 10**30])
maps = st.lists(st.tuples(numbers, numbers), max_size=5)
kinds = st.sampled_from(
    [b"0", b"\0", b"1", b"2", b"5", b"x", b"g", b"L", b"K", b"S", b"7", b"\xff"]
)


@st.composite
def records(draw):
    listed = draw(maps)
    numbers_of_map = [str(number) for pair in listed for number in pair]
    entries = ",".join(f'{{"o":{start},"l":{length}}}' for start, length in listed)
    choices = {
        "COCOON.sparse.map": st.just(f"[{entries}]") | st.text(max_size=30),
        "COCOON.sparse.size": numbers.map(str),
        "GNU.sparse.major": st.sampled_from(["0", "1", "x"]),
        "GNU.sparse.minor": st.sampled_from(["0", "1"]),
        "GNU.sparse.realsize": numbers.map(str),
        "GNU.sparse.size": numbers.map(str),
        "GNU.sparse.map": st.just(",".join(numbers_of_map)),
        "GNU.sparse.name": names,
        "path": names,
        "comment": st.text(max_size=30),
    }
    keys = draw(st.lists(st.sampled_from(sorted(choices)), max_size=4))
    return {key.replace(".", "__"): draw(choices[key]) for key in keys}


@st.composite
def members(draw):
    """A member whose header is sound, whatever it says."""
    data = draw(st.binary(max_size=700) | st.sampled_from(list(SMALL.values())))
    name, kind = draw(names), draw(kinds)
    if draw(st.booleans()):
        with contextlib.suppress(ValueError, UnicodeError):
            return member(name, data, **draw(records()))
    size = draw(st.sampled_from([len(data), 0, len(data) + 512, 1 << 20, 1 << 33]))
    head = tar.show_header(name.encode(errors="replace")[:80].decode(errors="ignore"), size, 0)
    fields = head[:156] + kind + head[157:]
    # Old sparse headers have their map where others have a prefix.
    fields = fields[:386] + draw(st.binary(max_size=110)).ljust(126, b"\0")
    return with_checksum(fields) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def with_checksum(head):
    blank = head[:148] + b" " * 8 + head[156:]
    return head[:148] + b"%06o\0 " % sum(blank) + head[156:]


built = st.builds(
    lambda start, parts, end: start + b"".join(parts) + end,
    st.sampled_from([b"", pack(SMALL, end=b""), member("snapshot.json", SMALL["snapshot.json"])]),
    st.lists(members(), max_size=4),
    st.sampled_from([END, b"", bytes(512), END + b"x"]),
)


@st.composite
def mutated(draw):
    """A good archive with a few bytes changed, taken out, doubled or cut off."""
    archive = draw(st.sampled_from(WHOLE))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(archive)))
        length = draw(st.sampled_from([0, 1, 2, 8, 511, 512, 5000]))
        put = draw(
            st.sampled_from([b"", b"\0", b"7", b"\xff" * 8, archive[start : start + length]])
        )
        archive = archive[:start] + put + archive[start + length :]
        if draw(st.booleans()):
            # Sound headers around what was changed, so that it is looked at.
            block = start - start % 512
            head = archive[block : block + 512]
            if len(head) == 512:
                archive = archive[:block] + with_checksum(head) + archive[block + 512 :]
    return archive


archives = st.one_of(built, mutated(), built.map(gzip.compress), st.binary(max_size=2000))


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(archives, st.lists(st.integers(1, 3000), min_size=1, max_size=8), st.booleans())
def test_an_import_of_anything_stays_in_staging_and_leaves_nothing_behind(archive, sizes, holes):
    with tempfile.TemporaryDirectory() as parent:
        staging = Path(parent, "staging")
        staging.mkdir()
        Path(parent, "mem").write_bytes(b"somebody's")
        fd = os.open(staging, os.O_RDONLY)
        before = len(os.listdir("/proc/self/fd"))
        sink = ImportSink(fd)
        try:
            position = turn = 0
            while position < len(archive):
                piece = archive[position : position + sizes[turn % len(sizes)]]
                if holes and not any(piece):
                    sink.skip(len(piece))
                else:
                    sink.feed(piece)
                position, turn = position + len(piece), turn + 1
            snapshot = sink.finish()
            assert sorted(os.listdir(staging)) == [file.name for file in snapshot.files]
            for file in snapshot.files:
                assert is_data_file(file.name)
                assert (staging / file.name).stat().st_size == file.size
            event("taken in")
        except CocoonError as error:
            event(type(error).__name__)
            sink.discard()
            assert os.listdir(staging) == []
        finally:
            os.close(fd)
        assert len(os.listdir("/proc/self/fd")) == before - 1
        assert sorted(os.listdir(parent)) == ["mem", "staging"]
        assert Path(parent, "mem").read_bytes() == b"somebody's"
