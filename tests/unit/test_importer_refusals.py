import gzip
import json
import os
import tarfile

import pytest
from archives import (
    PAGE,
    file_with,
    firecracker,
    gnu_member,
    member,
    metadata,
    pack,
    sidecar,
    vmstate,
)

from agent.model.errors import Damaged, Invalid, UnknownFormat
from agent.storage.importer import ImportSink

MIB = 1 << 20
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


def take_in(sink, archive, piece):
    for start in range(0, len(archive), piece):
        sink.feed(archive[start : start + piece])
    return sink.finish()


def with_disk(disk):
    """A whole archive whose disk is the member `disk`."""
    return pack(firecracker(cow_raw=None), end=b"") + disk + END


def sparse_lie(listed, size=SIZE, disk=DISK[:PAGE]):
    sparse_map = json.dumps(listed)
    records = {"COCOON__sparse__map": sparse_map, "COCOON__sparse__size": str(size)}
    return with_disk(member("cow.raw", disk, **records))


FULL_BLOCK = "".join(f"{start:05}\n1\n" for start in range(63))


def broken(archive, offset, data):
    return archive[:offset] + data + archive[offset + len(data) :]


GOOD = pack(firecracker())
FOREIGN = "/var/lib/cocoon/../../../etc/shadow"
REFUSED = {
    "nothing but zeros": (bytes(4096), UnknownFormat, "begins with zeros"),
    "some other file": (b"\x7fELF" + bytes(2000), UnknownFormat, "neither a tar archive"),
    "a text": (b"hello world\n" * 100, UnknownFormat, "neither a tar archive"),
    "a tar of something else": (
        pack({"README": b"hello"}),
        UnknownFormat,
        "'README' is no file of a snapshot",
    ),
    "no metadata": (
        pack(firecracker(snapshot_json=None)),
        UnknownFormat,
        r"no snapshot\.json",
    ),
    "metadata that is no JSON": (
        pack(firecracker(snapshot_json=b"{")),
        Damaged,
        r"snapshot\.json is not valid JSON",
    ),
    "metadata that is a list": (
        pack(firecracker(snapshot_json=b"[]")),
        Damaged,
        r"snapshot\.json is not a JSON object",
    ),
    "metadata nested too deep": (
        pack(firecracker(snapshot_json=b'{"a":' * 9000 + b"1" + b"}" * 9000)),
        Damaged,
        r"snapshot\.json",
    ),
    "metadata with half a character": (
        pack(firecracker(snapshot_json=metadata(image="\ud800"))),
        Damaged,
        r"snapshot\.json is not valid JSON",
    ),
    "metadata of another program": (
        pack(firecracker(snapshot_json=b'{"a": 1}')),
        UnknownFormat,
        "no version and config",
    ),
    "metadata of a later version": (
        pack(firecracker(snapshot_json=metadata(version=2))),
        UnknownFormat,
        "version 2: this agent knows version 1",
    ),
    "an unknown hypervisor": (
        pack(firecracker(snapshot_json=metadata(hypervisor="xen"))),
        UnknownFormat,
        "hypervisor 'xen': known are",
    ),
    "CPUs that are text": (
        pack(firecracker(snapshot_json=metadata(cpu="1"))),
        Invalid,
        "cpu is not of the type whole number",
    ),
    "less than no memory": (
        pack(firecracker(snapshot_json=metadata(memory=-5))),
        Invalid,
        "memory -5 is out of bounds",
    ),
    "no memory at all": (
        pack(firecracker(snapshot_json=metadata(memory=0))),
        Damaged,
        "how much memory",
    ),
    "metadata too large": (
        pack(firecracker(snapshot_json=metadata(comment="x" * 70_000))),
        Damaged,
        r"snapshot\.json of \d+ bytes is too large",
    ),
    "a missing memory file": (
        pack(firecracker(mem=None)),
        Damaged,
        "no mem, which a firecracker snapshot needs",
    ),
    "a missing disk": (
        pack(firecracker(cow_raw=None)),
        Damaged,
        r"no 'cow\.raw', a disk that the VM had",
    ),
    "a missing state of another hypervisor": (
        pack(firecracker(snapshot_json=metadata(hypervisor="cloud-hypervisor"))),
        Damaged,
        r"no state\.json, which a cloud-hypervisor snapshot needs",
    ),
    "a member twice": (
        pack(firecracker(), end=b"") + member("mem", b"x") + END,
        Damaged,
        "mem twice",
    ),
    "the metadata twice": (
        pack(firecracker(), end=b"") + member("snapshot.json", metadata()) + END,
        Damaged,
        r"snapshot\.json twice",
    ),
    "a directory": (
        member("mem", kind=tarfile.DIRTYPE) + GOOD,
        UnknownFormat,
        "'mem/' is a directory",
    ),
    "a symbolic link": (
        member("mem", kind=tarfile.SYMTYPE) + GOOD,
        UnknownFormat,
        "'mem' is a symbolic link",
    ),
    "a hard link": (member("mem", kind=tarfile.LNKTYPE) + GOOD, UnknownFormat, "a hard link"),
    "a FIFO": (member("mem", kind=tarfile.FIFOTYPE) + GOOD, UnknownFormat, "a FIFO"),
    "a device": (member("mem", kind=tarfile.CHRTYPE) + GOOD, UnknownFormat, "a device"),
    "a name with a directory": (
        pack({"./mem": b"x"}),
        UnknownFormat,
        "directory in its name",
    ),
    "a name that leads out": (pack({"../mem": b"x"}), UnknownFormat, "directory in its name"),
    "an absolute name": (pack({"/etc/passwd": b"x"}), UnknownFormat, "directory in its name"),
    "a PAX name that leads out": (
        member("mem", b"x", path="../mem") + END,
        UnknownFormat,
        "directory in its name",
    ),
    "a sparse name that leads out": (
        gnu_member("../mem", RANGES, SIZE) + END,
        UnknownFormat,
        "directory in its name",
    ),
    "a name that is only dots": (pack({"..": b"x"}), UnknownFormat, "no file of a snapshot"),
    "too many members": (
        pack({f"data-{number}.raw": b"x" for number in range(100)}),
        Damaged,
        "more than 64 members",
    ),
    "a map out of order": (
        sparse_lie([{"o": PAGE, "l": 10}, {"o": 0, "l": PAGE - 10}]),
        Damaged,
        "out of order or overlaps",
    ),
    "a map that overlaps": (
        sparse_lie([{"o": 0, "l": 100}, {"o": 50, "l": PAGE - 100}]),
        Damaged,
        "out of order or overlaps",
    ),
    "a map past the end": (
        sparse_lie([{"o": SIZE - 10, "l": PAGE}]),
        Damaged,
        "reaches past the end",
    ),
    "a map of more than there is": (
        sparse_lie([{"o": 0, "l": PAGE + 1}]),
        Damaged,
        "4096 bytes in the archive where its map tells of 4097",
    ),
    "a map of less than there is": (
        sparse_lie([{"o": 0, "l": 5}]),
        Damaged,
        "4096 bytes in the archive where its map tells of 5",
    ),
    "a map that is no map": (sparse_lie("x"), Damaged, "sparse map"),
    "a map without a size": (
        with_disk(member("cow.raw", DISK[:PAGE], COCOON__sparse__map='[{"o":0,"l":4096}]')),
        Damaged,
        r"None as COCOON\.sparse\.size",
    ),
    "a GNU map out of order": (
        with_disk(gnu_member("cow.raw", RANGES, SIZE, "2\n4096\n4096\n0\n4096\n")),
        Damaged,
        "out of order or overlaps",
    ),
    "a GNU map past the end": (
        with_disk(gnu_member("cow.raw", [(0, PAGE)], SIZE, f"1\n{SIZE}\n4096\n")),
        Damaged,
        "reaches past the end",
    ),
    "a GNU map longer than its member": (
        with_disk(
            gnu_member(
                "cow.raw", [], SIZE, "0100000\n" + "".join(f"{n:05}\n1\n" for n in range(63))
            )
        ),
        Damaged,
        "longer than its member",
    ),
    "a GNU map of a billion entries": (
        with_disk(gnu_member("cow.raw", [], SIZE, "1000000000\n")),
        Damaged,
        "1000000000 entries",
    ),
    "a GNU map of an unknown version": (
        member("mem", b"x", GNU__sparse__major="2", GNU__sparse__minor="0") + END,
        UnknownFormat,
        "version 2.0",
    ),
    "a file larger than any": (
        gnu_member("mem", [], 1 << 50) + END,
        Damaged,
        "larger than a file can be",
    ),
    "an extended header of a gigabyte": (
        member("x", size=1 << 30, kind=tarfile.XHDTYPE),
        Damaged,
        "extended header of 1073741824 bytes",
    ),
    "a name of a gigabyte": (
        member("x", size=1 << 30, kind=tarfile.GNUTYPE_LONGNAME),
        Damaged,
        "extended header of 1073741824 bytes",
    ),
    "an extended header that is none": (
        member("x", b"5 a=b\n", kind=tarfile.XHDTYPE),
        Damaged,
        "no list of records",
    ),
    "a size that is no number": (
        member("x", b"11 size=-1\n", kind=tarfile.XHDTYPE) + member("mem", b"x") + END,
        Damaged,
        "'-1' as size",
    ),
    "a header with a wrong checksum": (
        broken(GOOD, 1024 + 100, b"9"),
        Damaged,
        "wrong checksum",
    ),
    "data behind the end": (GOOD + b"x" + bytes(600), Damaged, "behind its end mark"),
    "an archive behind the end": (GOOD + GOOD, Damaged, "behind its end mark"),
    "a member behind a block of zeros": (
        pack(firecracker(), end=bytes(512)) + member("initrd", b"x") + END,
        Damaged,
        "behind a block of zeros",
    ),
    "damaged gzip data": (
        broken(gzip.compress(GOOD), 2, b"\x09"),
        Damaged,
        "gzip stream is damaged",
    ),
    "gzip data with a wrong sum": (
        broken(gzip.compress(GOOD), -8, b"xxxx")[: len(gzip.compress(GOOD))],
        Damaged,
        "gzip stream is damaged",
    ),
    "something behind gzip data": (
        gzip.compress(GOOD) + b"\0x",
        Damaged,
        "behind the end of its gzip stream",
    ),
    "damaged zstd data": (
        b"\x28\xb5\x2f\xfd" + b"\xff" * 100,
        Damaged,
        "zstd stream is damaged",
    ),
    "a sidecar that is no JSON": (
        pack(firecracker(cocoon_json=b"null and void")),
        Damaged,
        r"cocoon\.json is not valid JSON",
    ),
    "a sidecar too large": (
        pack(firecracker(cocoon_json=bytes(MIB + 1))),
        Damaged,
        r"cocoon\.json of 1048577 bytes is too large",
    ),
    "a disk elsewhere on the host": (
        pack(firecracker(cocoon_json=sidecar("/etc/shadow"))),
        Invalid,
        r"cocoon\.json names the path '/etc/shadow', which is not below /var/lib/cocoon",
    ),
    "a disk that leads out": (
        pack(firecracker(cocoon_json=sidecar(FOREIGN))),
        Invalid,
        "not below /var/lib/cocoon",
    ),
    "a disk beside": (
        pack(firecracker(cocoon_json=sidecar("/var/lib/cocoon-2/cow.raw"))),
        Invalid,
        "not below /var/lib/cocoon",
    ),
    "a disk that is everything": (
        pack(firecracker(cocoon_json=sidecar("/var/lib/cocoon"))),
        Invalid,
        "not below /var/lib/cocoon",
    ),
    "a relative disk": (
        pack(firecracker(cocoon_json=sidecar("cow.raw"))),
        Invalid,
        "not below /var/lib/cocoon",
    ),
    "a state that expects its disk elsewhere": (
        pack(firecracker(vmstate=vmstate("/home/x/cow.raw"))),
        Invalid,
        "vmstate names the path '/home/x/cow.raw'",
    ),
    "a kernel elsewhere on the host": (
        pack(firecracker(cocoon_json=b'{"boot_config": {"kernel_path": "/etc/shadow"}}')),
        Invalid,
        "'/etc/shadow', which is not below",
    ),
}


@pytest.mark.parametrize("piece", [512, 128 * 1024])
@pytest.mark.parametrize("case", REFUSED)
def test_an_archive_is_refused_with_the_reason_and_leaves_nothing(sink, staging, case, piece):
    archive, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence) as refusal:
        take_in(sink, archive, piece)
    assert "incomplete" not in str(refusal.value)
    assert os.listdir(staging) == []
    # Neither more data nor a second close makes it any better.
    with pytest.raises(error, match=sentence):
        sink.feed(b"x")
    with pytest.raises(error, match=sentence):
        sink.finish()
    assert os.listdir(staging) == []
