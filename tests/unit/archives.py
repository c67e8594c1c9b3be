"""Archives made for tests, by Python's tarfile and by hand: good ones, and ones to refuse."""

import io
import json
import random
import struct
import tarfile
from pathlib import Path

from agent.model import canonical
from agent.model.size import MIB
from agent.storage.sparse import data_ranges

COCOON = Path(__file__).parent.parent / "data" / "cocoon"
COCOON_TAR = COCOON / "cocoon-0.3.6-firecracker.tar"
COCOON_GZIP = COCOON / "cocoon-0.3.6-firecracker.tar.gz"

PAGE = 4096
OWN_DISK = f"{canonical.VM}/cow.raw"


def noise(size, seed=0):
    """Bytes of which no page is zero, the same each time."""
    return random.Random(seed).randbytes(size)


def file_with(ranges, size):
    """A file's content: zeros but for noise in `ranges`, pairs of offset and length."""
    content = bytearray(size)
    for seed, (start, length) in enumerate(ranges):
        content[start : start + length] = noise(length, seed)
    return bytes(content)


def write_sparse(path, ranges, size):
    """Write the same to a file, with holes."""
    with path.open("wb") as file:
        file.truncate(size)
        for seed, (start, length) in enumerate(ranges):
            file.seek(start)
            file.write(noise(length, seed))


def data_in(path):
    """How many bytes of the file are no holes."""
    with path.open("rb") as file:
        return sum(length for _, length in data_ranges(file.fileno(), path.stat().st_size))


def metadata(version=1, **config):
    values = {
        "name": "nightly",
        "hypervisor": "firecracker",
        "cpu": 1,
        "memory": 128 << 20,
    }
    return json.dumps({"version": version, "config": {**values, **config}}).encode()


def sidecar(*paths, **fields):
    disks = [{"path": path, "ro": False, "serial": "s", "role": "cow"} for path in paths]
    return json.dumps({"storage_configs": disks, "boot_config": {}, **fields}).encode()


def vmstate(*paths):
    """What Firecracker's state looks like around the paths in it."""
    state = noise(500, 1)
    for path in paths:
        state += b"cow\0\0\0" + len(path).to_bytes(8, "little") + path.encode() + b"\x02" + bytes(7)
    return state + noise(500, 2)


def firecracker(**changes):
    """The members of a small snapshot; a keyword with _ for . changes one, None leaves it out."""
    members = {
        "snapshot.json": metadata(),
        "cocoon.json": sidecar(OWN_DISK),
        "cow.raw": file_with([(PAGE, PAGE), (20 * PAGE, 3 * PAGE)], 64 * PAGE),
        "mem": file_with([(0, 2 * PAGE), (50 * PAGE, 777)], 50 * PAGE + 777),
        "vmstate": vmstate(OWN_DISK),
    }
    for name, content in changes.items():
        members[name.replace("_", ".")] = content
    return {name: content for name, content in members.items() if content is not None}


def qcow2(size=MIB, *, version=3, backing=b"", features=0, encryption=0, extensions=b"", **numbers):
    """An empty qcow2 with clusters of 64 KiB, of whose header anything can be changed."""
    cluster = 1 << 16
    values = {
        "bits": 16,
        "entries": max(1, -(-size // (512 * MIB))),
        "table": 3 * cluster,
        "counts": cluster,
        "tables": 1,
        **numbers,
    }
    more = extensions + bytes(8)
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQIIQ",
        *(b"QFI\xfb", version, (112 + len(more)) * bool(backing), len(backing)),
        *(values["bits"], size, encryption, values["entries"], values["table"]),
        *(values["counts"], values["tables"], 0, 0, features, 0, 0, 4, 112, 0),
    )
    file = bytearray(4 * cluster)
    head = header + more + backing
    file[: len(head)] = head
    file[cluster : cluster + 8] = (2 * cluster).to_bytes(8, "big")  # the one table of counts
    file[2 * cluster : 2 * cluster + 8] = b"\0\1" * 4
    return bytes(file)


def member(name, content=b"", size=None, kind=tarfile.REGTYPE, **pax):
    """One member as bytes; `size` may lie, keywords are PAX records with __ for dots."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(content) if size is None else size
    info.pax_headers = {key.replace("__", "."): value for key, value in pax.items()}
    head = info.tobuf(tarfile.PAX_FORMAT)
    return head + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def pack(members, end=bytes(1024)):
    """An archive of plain members."""
    return b"".join(member(name, content) for name, content in members.items()) + end


def cocoon_member(name, ranges, size):
    """A member in Cocoon's own sparse form."""
    data = b"".join(noise(length, seed) for seed, (_, length) in enumerate(ranges))
    sparse_map = json.dumps([{"o": start, "l": length} for start, length in ranges])
    return member(name, data, COCOON__sparse__map=sparse_map, COCOON__sparse__size=str(size))


def gnu_member(name, ranges, size, listed=None):
    """A member in GNU sparse 1.0 form; `listed` is the map that it claims."""
    data = b"".join(noise(length, seed) for seed, (_, length) in enumerate(ranges))
    text = listed
    if text is None:
        text = f"{len(ranges)}\n" + "".join(f"{start}\n{length}\n" for start, length in ranges)
    sparse_map = text.encode()
    sparse_map += bytes(-len(sparse_map) % tarfile.BLOCKSIZE)
    return member(
        f"GNUSparseFile.0/{name}",
        sparse_map + data,
        GNU__sparse__major="1",
        GNU__sparse__minor="0",
        GNU__sparse__name=name,
        GNU__sparse__realsize=str(size),
    )


def expand_cocoon(archive):
    """The files of a real archive of Cocoon's, as (size, ranges of data, data), by tarfile."""
    files = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for info in tar:
            data = tar.extractfile(info).read()
            listed = info.pax_headers.get("COCOON.sparse.map")
            ranges = [(0, info.size)]
            size = info.size
            if listed is not None:
                ranges = [(entry["o"], entry["l"]) for entry in json.loads(listed)]
                size = int(info.pax_headers["COCOON.sparse.size"])
            files[info.name] = (size, ranges, data)
    return files
