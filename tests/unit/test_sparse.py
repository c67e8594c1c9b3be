import os

import pytest
from archives import PAGE, write_sparse
from hypothesis import given
from hypothesis import strategies as st

from agent.model.errors import Damaged
from agent.storage import sparse
from agent.storage.sparse import Extents, MapReader, encode_map, parse_cocoon, parse_pairs, scan

MIB = 1 << 20
LARGE = 1 << 40


@st.composite
def extents(draw):
    """Some ranges, and a file size that they fit in."""
    ranges, end = [], 0
    for gap, length in draw(
        st.lists(st.tuples(st.integers(1, LARGE), st.integers(1, LARGE)), max_size=200)
    ):
        ranges.append((end + gap, length))
        end += gap + length
    return Extents(ranges), end + draw(st.integers(0, LARGE))


def read_map(data):
    reader = MapReader()
    for start in range(0, len(data), 512):
        assert not reader.done
        reader.feed(data[start : start + 512])
    assert reader.size == len(data)
    return reader


def scan_file(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        return scan(fd, path.stat().st_size)
    finally:
        os.close(fd)


def test_a_scan_finds_data_between_holes(tmp_path):
    ranges = [(PAGE, PAGE), (300 * PAGE, 5 * PAGE), (4000 * PAGE, 100)]
    write_sparse(tmp_path / "f", ranges, 4000 * PAGE + 100)
    assert list(scan_file(tmp_path / "f")) == ranges


def test_a_scan_of_a_file_that_ends_in_a_hole_ends_with_its_data(tmp_path):
    write_sparse(tmp_path / "f", [(0, PAGE)], 10 * MIB)
    assert list(scan_file(tmp_path / "f")) == [(0, PAGE)]


@pytest.mark.parametrize("size", [0, 5 * MIB])
def test_a_file_without_data_has_no_ranges(tmp_path, size):
    write_sparse(tmp_path / "f", [], size)
    assert list(scan_file(tmp_path / "f")) == []


def test_a_map_that_would_be_too_long_for_readers_has_its_smallest_holes_filled(
    tmp_path, monkeypatch
):
    holes = [1, 9, 3, 8, 2, 7]
    ranges, page = [], 0
    for hole in holes:
        ranges.append((page * PAGE, PAGE))
        page += 1 + hole
    write_sparse(tmp_path / "f", ranges, page * PAGE)
    monkeypatch.setattr(sparse, "_MAP_LIMIT", 4 * 2 * len(f"{page * PAGE}\n"))
    # The last hole reaches to the end of the file; of the others 1 and 2 are the smallest.
    pages = [(start // PAGE, length // PAGE) for start, length in scan_file(tmp_path / "f")]
    assert pages == [(0, 3), (12, 1), (16, 1), (25, 4)]


@given(extents())
def test_a_gnu_map_reads_back_as_it_was_written(case):
    ranges, size = case
    reader = read_map(encode_map(ranges, size))
    read = list(reader.extents)
    if ranges.end < size:
        assert read.pop() == (size, 0)
    assert read == list(ranges)


@given(extents())
def test_the_maps_in_pax_records_read_back(case):
    ranges, _ = case
    numbers = [str(number) for pair in ranges for number in pair]
    assert parse_pairs(numbers) == ranges
    entries = ",".join(f'{{"o":{start},"l":{length}}}' for start, length in ranges)
    assert parse_cocoon(f"[{entries}]") == ranges
    spaced = " , ".join(f'{{ "l": {length}, "o": {start} }}' for start, length in ranges)
    assert parse_cocoon(f" [ {spaced} ] ") == ranges


def test_cocoons_map_of_a_file_without_data_is_null():
    assert list(parse_cocoon("null")) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "{}",
        "[{}]",
        '[{"o":0}]',
        '[{"o":-1,"l":1}]',
        '[{"o":"0","l":1}]',
        '[{"o":0.5,"l":1}]',
        '[{"o":0,"l":1},]',
        '[{"o":0,"l":1}{"o":5,"l":1}]',
        '[{"o":5,"l":1},{"o":0,"l":1}]',
        '[{"o":0,"l":6},{"o":5,"l":1}]',
        f'[{{"o":{1 << 62},"l":1}}]',
        "[" * 100_000 + "]" * 100_000,
    ],
)
def test_a_map_of_cocoons_that_is_none_is_damaged(text):
    with pytest.raises(Damaged, match="sparse map"):
        parse_cocoon(text)


@pytest.mark.parametrize(
    "text",
    [
        "x\n",
        "-1\n",
        "1\n0\n1e3\n",
        "2\n5\n1\n0\n1\n",
        "2\n0\n6\n5\n1\n",
        "1\n" + "9" * 25 + "\n1\n",
        "1" * 500,
        f"1\n{1 << 62}\n1\n",
    ],
)
def test_a_gnu_map_that_is_none_is_damaged(text):
    with pytest.raises(Damaged, match="sparse map"):
        MapReader().feed(text.encode().ljust(512, b"\0"))


def test_a_map_of_a_billion_entries_is_refused_by_its_first_line():
    with pytest.raises(Damaged, match="1000000000 entries"):
        MapReader().feed(b"1000000000\n".ljust(512, b"0"))


def test_a_map_takes_no_more_entries_than_memory_allows(monkeypatch):
    monkeypatch.setattr(sparse, "MOST_EXTENTS", 10)
    with pytest.raises(Damaged, match="more than 10 entries"):
        parse_pairs(text for start in range(0, 220, 20) for text in (str(start), "1"))


def test_an_offset_without_a_length_is_damaged():
    with pytest.raises(Damaged, match="without a length"):
        parse_pairs(["0", "5", "10"])
