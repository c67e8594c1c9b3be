import io
import struct
import subprocess
import sys
import textwrap
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernels import INTERPRETER, PACKERS, REFUSED, make_bzimage, make_elf, make_payload

from agent.model.errors import CocoonError, Damaged, UnknownFormat
from agent.storage import codecs, kernel_image
from agent.storage.kernel_image import MAXIMUM_ELF, inspect_kernel, unpack_kernel

ELF = make_elf()


def reader(data):
    return lambda size, offset: data[offset : offset + size]


def inspect(data):
    return inspect_kernel(reader(data), len(data))


def unpack(data):
    return b"".join(unpack_kernel(reader(data), inspect(data)))


@pytest.fixture(scope="module")
def images():
    return {name: make_bzimage(make_payload(name, ELF)) for name in [*PACKERS, "none"]}


def test_an_elf_is_taken_as_it_is():
    assert inspect(ELF) is None


@pytest.mark.parametrize("packing", [*PACKERS, "none"])
def test_what_is_packed_in_a_bzimage_comes_out_as_it_was(packing, images):
    assert unpack(images[packing]) == ELF


@pytest.mark.parametrize("sectors", [0, 1, 4, 30])
def test_the_payload_is_found_behind_any_number_of_setup_sectors(sectors):
    assert unpack(make_bzimage(ELF, sectors=sectors)) == ELF


@pytest.mark.parametrize("packing", PACKERS)
def test_a_kernel_longer_than_any_buffer_comes_out_as_it_was(packing):
    elf = ELF + bytes(17 << 20)
    assert unpack(make_bzimage(make_payload(packing, elf))) == elf


@pytest.mark.parametrize("packing", REFUSED)
def test_packings_that_cannot_be_read_are_named(packing):
    with pytest.raises(UnknownFormat, match=f"packed with {packing}.*vmlinux"):
        unpack(make_bzimage(make_payload(packing, ELF)))


def test_an_unknown_packing_is_refused():
    with pytest.raises(UnknownFormat, match="way that is unknown"):
        unpack(make_bzimage(b"something else" * 10))


@pytest.mark.parametrize(
    "data",
    [b"", b"#!/bin/sh\n", bytes(100_000), b"MZ" + bytes(1000), b"\x1f\x8b" + bytes(1000)],
    ids=["empty", "script", "zeros", "program for DOS", "gzip"],
)
def test_what_is_no_kernel_is_refused(data):
    with pytest.raises(UnknownFormat, match="is no kernel"):
        inspect(data)


@pytest.mark.parametrize(
    "changes", [{"machine": 183}, {"wide": 1}, {"segment": INTERPRETER}], ids=str
)
def test_elf_files_that_are_no_kernels_for_this_machine_are_refused(changes):
    with pytest.raises(UnknownFormat):
        inspect(make_elf(**changes))


def test_a_bzimage_from_before_the_payload_was_told_is_refused():
    with pytest.raises(UnknownFormat, match="older than"):
        inspect(make_bzimage(ELF, protocol=0x207))


@pytest.mark.parametrize("length", [10, 63, 64, 119, 200_000])
def test_an_elf_that_is_cut_off_is_damaged(length):
    with pytest.raises(Damaged, match="cut off"):
        inspect(ELF[:length])


def test_an_elf_whose_program_headers_have_no_size_is_damaged():
    elf = bytearray(make_elf())
    elf[54:56] = bytes(2)  # e_phentsize
    with pytest.raises(Damaged, match="no program headers"):
        inspect(bytes(elf))


@pytest.mark.parametrize("length", [0x206, 0x24F, 0x250, 3000, 0.5, 0.99])
def test_a_bzimage_that_is_cut_off_is_damaged(length, images):
    data = images["gzip"]
    cut = data[: length if isinstance(length, int) else int(len(data) * length) - 0x300]
    with pytest.raises(Damaged, match="cut off"):
        inspect(cut)


@pytest.mark.parametrize("packing", ["gzip", "xz", "zstd"])  # LZ4's legacy frame has no checksum
@pytest.mark.parametrize("position", [0.1, 0.5, 0.9])
def test_a_payload_that_was_changed_is_damaged(packing, position, images):
    data = bytearray(images[packing])
    payload = inspect(bytes(data))
    start = payload.offset + int(payload.length * position)
    data[start : start + 64] = b"\xff" * 64
    with pytest.raises(Damaged):
        unpack(bytes(data))


@pytest.mark.parametrize("packing", PACKERS)
def test_a_packed_stream_that_ends_early_is_damaged(packing):
    payload = make_payload(packing, ELF)
    short = payload[: len(payload) // 2] + struct.pack("<I", len(ELF))
    with pytest.raises(Damaged):
        unpack(make_bzimage(short))


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("difference", [-1, 1])
def test_a_length_that_does_not_fit_is_damaged(packing, difference):
    payload = make_payload(packing, ELF)
    payload = payload[:-4] + struct.pack("<I", len(ELF) + difference)
    with pytest.raises(Damaged):
        unpack(make_bzimage(payload))


def test_a_kernel_that_says_it_is_huge_is_refused_before_unpacking():
    payload = make_payload("xz", ELF, length=MAXIMUM_ELF + 1)
    with pytest.raises(Damaged, match="more than any kernel"):
        unpack(make_bzimage(payload))


@pytest.mark.parametrize("packing", PACKERS)
def test_a_bomb_is_stopped_where_its_length_ends(packing):
    bomb = ELF + bytes(20 << 20)
    payload = make_payload(packing, bomb)[:-4] + struct.pack("<I", len(ELF))
    image = make_bzimage(payload)
    pieces = []
    with pytest.raises(Damaged):
        pieces.extend(unpack_kernel(reader(image), inspect(image)))
    assert sum(map(len, pieces)) <= len(ELF)


def test_something_packed_that_is_no_elf_is_refused():
    with pytest.raises(UnknownFormat, match="no ELF"):
        unpack(make_bzimage(make_payload("gzip", b"MZ" + bytes(1000))))


@given(
    packing=st.sampled_from([*PACKERS, "none"]),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=5),
    end=st.floats(0, 1),
)
def test_whatever_is_changed_nothing_but_a_refusal_comes(images, packing, edits, end):
    data = bytearray(images[packing])
    for position, bytes_ in edits:
        start = int(position * position * len(data))
        data[start : start + len(bytes_)] = bytes_
    changed = bytes(data[: int((1 - end**4) * len(data))])
    with suppress(CocoonError):
        payload = inspect(changed)
        if payload is not None:
            for piece in unpack_kernel(reader(changed), payload):
                assert isinstance(piece, bytes)


@given(st.sampled_from(["gunzip", "unxz", "unzstd", "unlz4_legacy"]), st.binary(max_size=200))
def test_no_garbage_makes_a_decompressor_do_more_than_refuse(name, data):
    starts = {"gunzip": b"\x1f\x8b\x08", "unxz": b"\xfd7zXZ\x00", "unzstd": b"\x28\xb5\x2f\xfd"}
    unpack = getattr(codecs, name)
    for start in (b"", starts.get(name, b"\x02\x21\x4c\x18")):
        try:
            length = sum(map(len, unpack(iter([start + data]))))
        except Damaged:
            continue
        assert length < 1 << 30


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("size", [1, 7, 4096])
def test_the_size_of_the_pieces_does_not_matter(packing, size):
    packed = PACKERS[packing](ELF[:50_000])
    unpack = {
        "gzip": codecs.gunzip,
        "xz": codecs.unxz,
        "zstd": codecs.unzstd,
        "lz4": codecs.unlz4_legacy,
    }[packing]
    stream = io.BytesIO(packed)
    assert b"".join(unpack(iter(lambda: stream.read(size), b""))) == ELF[:50_000]


def test_a_library_that_is_missing_is_named_with_its_package():
    program = textwrap.dedent("""
        import ctypes
        ctypes.CDLL = lambda name: (_ for _ in ()).throw(OSError(name))
        from agent.model.errors import Unsupported
        from agent.storage import codecs
        for unpack in (codecs.unzstd, codecs.unlz4_legacy):
            try:
                list(unpack([b"x"]))
            except Unsupported as error:
                print(error)
    """)
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    assert "libzstd.so.1 is missing on this host: install libzstd1" in said
    assert "liblz4.so.1 is missing on this host: install liblz4-1" in said


def test_the_limit_on_what_unpacks_is_generous():
    assert kernel_image.MAXIMUM_ELF >= 512 << 20
