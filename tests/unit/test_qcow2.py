import os

import pytest
from archives import qcow2

from agent.model.errors import Damaged, UnknownFormat
from agent.storage.qcow2 import Header, read_header

MIB, GIB = 1 << 20, 1 << 30
DATA_FILE = b"DATA" + (5).to_bytes(4, "big") + b"/etc\0" + bytes(3)
LUKS = (0x0537BE77).to_bytes(4, "big") + (16).to_bytes(4, "big") + bytes(16)


@pytest.fixture
def read(tmp_path):
    def read(content, **options):
        path = tmp_path / "disk"
        path.write_bytes(content)
        file = os.open(path, os.O_RDONLY)
        try:
            return read_header(file, **options)
        finally:
            os.close(file)

    return read


def test_the_header_tells_the_size_of_the_disk_and_what_the_file_needs(read):
    assert read(qcow2(10 * GIB)) == Header(10 * GIB, False, False)
    assert read(qcow2(backing=b"base")) == Header(MIB, True, False)
    assert read(qcow2(features=1)) == Header(MIB, False, True)


def test_the_header_is_good_before_the_rest_has_come(read):
    head = qcow2(10 * GIB)[:65536]
    assert read(head, whole=False).size == 10 * GIB
    with pytest.raises(Damaged, match="cut short"):
        read(head)


@pytest.mark.parametrize(
    ("content", "refusal", "words"),
    [
        (b"", UnknownFormat, "no qcow2"),
        (b"QFI\xfb", Damaged, "ends within its qcow2 header"),
        (qcow2()[:90], Damaged, "ends within its qcow2 header"),
        (qcow2(version=1), UnknownFormat, "version 1"),
        (qcow2(version=9), UnknownFormat, "version 9"),
        (qcow2(features=1 << 9), UnknownFormat, "features"),
        (qcow2(features=2), Damaged, "marked as corrupt.*qemu-img check -r all"),
        (qcow2(features=4), Damaged, "keeps its data in another file"),
        (qcow2(extensions=DATA_FILE), Damaged, "keeps its data in another file"),
        (qcow2(encryption=2), UnknownFormat, "encrypted"),
        (qcow2(extensions=LUKS), UnknownFormat, "encrypted"),
        (qcow2(bits=30), Damaged, "clusters"),
        (qcow2(0), Damaged, "holds a disk of"),
        (qcow2(1 << 60, entries=1), Damaged, "holds a disk of"),
        (qcow2(MIB + 1), Damaged, "holds a disk of"),
        (qcow2(10 * GIB, entries=1), Damaged, "its tables lie outside"),
        (qcow2(table=0), Damaged, "its tables lie outside"),
        (qcow2(table=1 << 40), Damaged, "its tables lie outside"),
        (qcow2(counts=1 << 62), Damaged, "its tables lie outside"),
        (qcow2(tables=1 << 31), Damaged, "its tables lie outside"),
        (qcow2(backing=b"x" * 2000), Damaged, "broken name of a backing file"),
    ],
)
def test_what_is_broken_or_wants_another_file_is_refused(read, content, refusal, words):
    with pytest.raises(refusal, match=words):
        read(content)
