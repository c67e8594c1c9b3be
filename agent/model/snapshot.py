"""The record of a snapshot, and `snapshot.json`, by which it is known in its archive.

The document has the shape that Cocoon 0.3.6 writes and reads (its types.SnapshotExport). What
others write beyond the fields known here is kept and written again.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from .access import Access
from .config import HYPERVISORS
from .errors import Damaged, Invalid, UnknownFormat
from .names import NAME_LENGTH, is_name
from .size import KIB

METADATA = "snapshot.json"
SIDECAR = "cocoon.json"
METADATA_LIMIT = 64 * KIB
DESCRIPTION_LIMIT = KIB
_LEAST_SIZE = 4096
_VERSION = 1
_BLOCK = 512

_DISK = re.compile(r"cow\.raw|overlay\.qcow2|cidata\.img|data-[A-Za-z0-9][A-Za-z0-9._-]{0,62}\.raw")


@dataclass(frozen=True, slots=True)
class StateFiles:
    """What a backend's VMM writes for a snapshot, by name."""

    state: str = "vmstate"
    memory: str = "mem"
    further: tuple[str, ...] = ()

    @property
    def small(self) -> tuple[str, ...]:
        """All but the memory."""
        return (self.state, *self.further)


CH_CONFIG = "config.json"
STATE_FILES: Mapping[str, StateFiles] = {
    "firecracker": StateFiles(),
    "qemu": StateFiles(),
    "cloud-hypervisor": StateFiles("state.json", "memory-ranges", (CH_CONFIG,)),
}
"""By backend; the names are those of the formats, which are Cocoon's."""

BOOT_FILES = ("kernel", "initrd", "firmware")
"""What was booted, by name; a `Snapshot` has their digests under the same names."""

_DATA_FILES = frozenset(
    name for files in STATE_FILES.values() for name in (files.memory, *files.small)
) | {SIDECAR, *BOOT_FILES}


class SnapshotState(StrEnum):
    """`pending` until it is complete and renamed into place, `deleting` until it is gone."""

    PENDING = "pending"
    READY = "ready"
    DELETING = "deleting"


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """A data file of a snapshot and its size in bytes, holes included."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class SnapshotDisk:
    """A disk that the VM had: where its VMM saw it, and what it was for.

    `role` is one of Cocoon's: cow, data, cidata, layer (a read-only base image), "" in what older
    versions wrote. `fstype` is set for data disks only.
    """

    path: str
    readonly: bool = False
    serial: str = ""
    role: str = ""
    fstype: str = ""


@dataclass(frozen=True, slots=True)
class SnapshotBoot:
    """How the VM was booted. The paths are those of the host it ran on and are never opened."""

    kernel_path: str = ""
    initrd_path: str = ""
    cmdline: str = ""
    firmware_path: str = ""


@dataclass(frozen=True, slots=True)
class BoundFile:
    """A file of the snapshot and the path, inside the jail, at which the VMM's state expects it."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One snapshot. Sizes are bytes, times seconds since the epoch; `mtime` is the archive's.

    `binds` are the disks that the VMM's state expects elsewhere than at the canonical path.
    `archive_size` is what the archive measures, 0 before it was laid out. `extra` holds the fields
    of `snapshot.json` that are not known here, in the place where they stood. `kernel`, `initrd`
    and `firmware` are the SHA-256 of the files of that name, "" for none. `host_disks` are the
    read-only disks of this host that the VM had, by their jail paths; `max_cpu` and `max_memory`
    are as in a configuration; none of these travels. `reason` says how it came into its state,
    `generation` counts committed transitions.
    """

    id: str
    name: str
    access: Access
    hypervisor: str
    hypervisor_version: str = ""
    state: SnapshotState = SnapshotState.PENDING
    description: str = ""
    cpu: int = 0
    memory: int = 0
    max_cpu: int = 0
    max_memory: int = 0
    storage: int = 0
    nics: int = 0
    image: str = ""
    image_digest: str = ""
    image_type: str = ""
    image_blobs: tuple[str, ...] = ()
    disks: tuple[SnapshotDisk, ...] = ()
    boot: SnapshotBoot = SnapshotBoot()
    binds: tuple[BoundFile, ...] = ()
    source_vm_id: str = ""
    files: tuple[SnapshotFile, ...] = ()
    archive_size: int = 0
    kernel: str = ""
    initrd: str = ""
    firmware: str = ""
    host_disks: Mapping[str, str] = field(default_factory=dict)
    pause_ms: float = 0
    reason: str = ""
    generation: int = 0
    created_at: float = 0
    updated_at: float = 0
    mtime: float = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def memory_is_live(self) -> bool:
        """Whether a VMM writes to the memory file while its guest runs.

        Then taking a snapshot is to copy that file, and each VM that goes on from it needs one of
        its own. Others leave it as it is, and share it.
        """
        return self.hypervisor == "qemu"

    @property
    def bound(self) -> tuple[BoundFile, ...]:
        """What must appear at paths of another host; CH_CONFIG is written anew instead."""
        return self.binds if self.hypervisor != "cloud-hypervisor" else ()

    @property
    def state_files(self) -> StateFiles:
        """The names of what its VMM wrote."""
        return STATE_FILES[self.hypervisor]

    def has_file(self, name: str) -> bool:
        return any(file.name == name for file in self.files)


def to_row(snapshot: Snapshot) -> dict[str, Any]:
    """Return the JSON object that the index keeps."""
    return dataclasses.asdict(snapshot)


def from_row(row: dict[str, Any]) -> Snapshot:
    """Return the record of an index row; raise TypeError, KeyError or ValueError on another shape.

    Keys that an older agent did not write take their defaults.
    """
    return Snapshot(
        **{
            **row,
            "access": Access(**row["access"]),
            "state": SnapshotState(row["state"]),
            "image_blobs": tuple(row.get("image_blobs", ())),
            "disks": tuple(SnapshotDisk(**disk) for disk in row.get("disks", ())),
            "boot": SnapshotBoot(**row.get("boot", {})),
            "binds": tuple(BoundFile(**bound) for bound in row.get("binds", ())),
            "files": tuple(SnapshotFile(**file) for file in row.get("files", ())),
        }
    )


def is_disk(name: str) -> bool:
    """Whether a data file of this name is a disk."""
    return _DISK.fullmatch(name) is not None


def is_data_file(name: str) -> bool:
    """Whether a snapshot may have a data file of this name."""
    return name in _DATA_FILES or is_disk(name)


def check_description(text: str) -> str:
    """Return `text`; raise Invalid when it is too long or not plain text."""
    if text != clean_description(text):
        raise Invalid(
            f"the description has more than {DESCRIPTION_LIMIT} bytes or control characters: "
            "shorten it to plain text"
        )
    return text


def clean_description(text: str) -> str:
    """Return what of `text`, the description of a foreign snapshot, can be kept."""
    # JSON escapes what is left with two bytes at most: metadata_size relies on it.
    plain = "".join(char if char >= " " or char in "\n\t" else " " for char in text)
    return plain.encode(errors="replace")[:DESCRIPTION_LIMIT].decode(errors="ignore")


def show_metadata(snapshot: Snapshot) -> bytes:
    """Return `snapshot.json`, padded with spaces to `metadata_size`."""
    return _document(snapshot).ljust(metadata_size(snapshot))


def metadata_size(snapshot: Snapshot) -> int:
    """Return the size of `snapshot.json`: 4096, or more when foreign fields ask for it.

    No rename and no new description changes it.
    """
    bare = len(_document(dataclasses.replace(snapshot, name="", description="")))
    most = bare + NAME_LENGTH + 2 * DESCRIPTION_LIMIT + len('"description": "", "name": "", ')
    return max(_LEAST_SIZE, -(-most // _BLOCK) * _BLOCK)


def parse_metadata(data: bytes) -> Snapshot:
    """Return what `snapshot.json` says, as a draft without id, access and files.

    The name is "" when it is none here. Raises UnknownFormat for another kind or version of
    document, Damaged for what is no JSON, Invalid for values that cannot be.
    """
    document = load_object(data, METADATA)
    version, config = document.pop("version", None), document.pop("config", None)
    if not isinstance(config, dict) or not isinstance(version, int):
        raise UnknownFormat(
            f"{METADATA} has no version and config: this is not a snapshot's archive"
        )
    if version != _VERSION or isinstance(version, bool):
        raise UnknownFormat(
            f"{METADATA} is of version {version}: this agent knows version {_VERSION}"
        )
    fields = Fields(config, METADATA)
    hypervisor = fields.text("hypervisor")
    if hypervisor not in HYPERVISORS:
        raise UnknownFormat(
            f"{METADATA} names the hypervisor {hypervisor[:40]!r}: "
            f"known are {', '.join(HYPERVISORS)}"
        )
    fields.text("id")
    name = fields.text("name")
    draft = Snapshot(
        id="",
        name=name if is_name(name) else "",
        access=Access(0, 0),
        hypervisor=hypervisor,
        hypervisor_version=fields.text("hypervisor_version"),
        description=clean_description(fields.text("description")),
        cpu=fields.whole("cpu"),
        memory=fields.whole("memory"),
        storage=fields.whole("storage"),
        nics=fields.whole("nics"),
        image=fields.text("image"),
        image_digest=fields.text("image_digest"),
        image_type=fields.text("image_type"),
        image_blobs=tuple(fields.mapping("image_blob_ids")),
        source_vm_id=fields.text("source_vm_id"),
        created_at=fields.whole("created_at", _LATEST),
    )
    extra = {**document, "config": fields.rest} if fields.rest else document
    snapshot = dataclasses.replace(draft, extra=extra)
    if metadata_size(snapshot) > METADATA_LIMIT:
        raise Invalid(f"{METADATA} is larger than {METADATA_LIMIT} bytes")
    return snapshot


def load_object(data: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object in `data`; raise Damaged when there is none in it."""
    try:
        value = json.loads(data)
        # Python reads lone surrogates and numbers beyond a double, which nobody could read again.
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise Damaged(f"{what} is not valid JSON") from None
    if not isinstance(value, dict):
        raise Damaged(f"{what} is not a JSON object")
    return value


class Fields:
    """The fields of a foreign JSON object, taken out one by one; `rest` is what was not taken.

    An absent field and null are the type's zero, as Go writes and reads them. Raises Invalid for a
    value of another type or out of bounds.
    """

    def __init__(self, values: Mapping[str, Any], what: str) -> None:
        self.rest = dict(values)
        self._what = what

    def text(self, key: str) -> str:
        value = self._take(key, str, "")
        if "\0" in value:
            raise Invalid(f"{self._what}: {key} has a NUL character")
        return str(value)

    def whole(self, key: str, most: int = 1 << 62) -> int:
        value = self._take(key, int, 0)
        if not 0 <= value <= most:
            raise Invalid(f"{self._what}: {key} {str(value)[:40]} is out of bounds")
        return int(value)

    def truth(self, key: str) -> bool:
        return bool(self._take(key, bool, False))

    def mapping(self, key: str) -> dict[str, Any]:
        return dict(self._take(key, dict, {}))

    def objects(self, key: str, most: int) -> list[dict[str, Any]]:
        values: list[dict[str, Any]] = self._take(key, list, [])
        if len(values) > most or not all(isinstance(value, dict) for value in values):
            raise Invalid(f"{self._what}: {key} is not a list of at most {most} objects")
        return values

    def _take(self, key: str, kind: type, nothing: Any) -> Any:
        value = self.rest.pop(key, None)
        if value is None:
            return nothing
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise Invalid(f"{self._what}: {key} is not of the type {_JSON_TYPES[kind]}")
        return value


_JSON_TYPES: Mapping[type, str] = {
    str: "string",
    int: "whole number",
    bool: "true or false",
    dict: "object",
    list: "array",
}
_LATEST = 8**11 - 1  # seconds, the most that a tar header's mtime holds


def _document(snapshot: Snapshot) -> bytes:
    config = {
        "id": snapshot.id,
        "name": snapshot.name,
        "description": snapshot.description,
        "hypervisor": snapshot.hypervisor,
        "hypervisor_version": snapshot.hypervisor_version,
        "cpu": snapshot.cpu,
        "memory": snapshot.memory,
        "storage": snapshot.storage,
        "nics": snapshot.nics,
        "image": snapshot.image,
        "image_digest": snapshot.image_digest,
        "image_type": snapshot.image_type,
        "image_blob_ids": {blob: {} for blob in snapshot.image_blobs},
        "source_vm_id": snapshot.source_vm_id,
        "created_at": int(snapshot.created_at),
    }
    document = {
        **snapshot.extra,
        "version": _VERSION,
        # Zeros are left out, as Go does.
        "config": {
            **snapshot.extra.get("config", {}),
            **{key: value for key, value in config.items() if value},
        },
    }
    return json.dumps(document, ensure_ascii=False).encode() + b"\n"
