"""The record of a VM, and the row that the index keeps of it."""

import dataclasses
import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from .access import Access
from .config import BaseImage, Boot, Disk, VmConfig

UNIT_PREFIX = "cocoon-vm-"
FIRST_UID, LAST_UID = 65536, 99999
"""The range from which each VM's VMM gets a uid of its own."""


class State(StrEnum):
    """Where a VM is in its life; `creating` and `deleting` show only after a crash in between."""

    CREATING = "creating"
    CREATED = "created"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    SAVING = "saving"
    RESTORING = "restoring"
    STOPPING = "stopping"
    STOPPED = "stopped"
    ERROR = "error"
    DELETING = "deleting"


WITH_PROCESS = frozenset(
    {
        State.STARTING,
        State.RUNNING,
        State.PAUSED,
        State.SAVING,
        State.RESTORING,
        State.STOPPING,
    }
)
"""States in which a VMM process may exist."""


class FirmwareFormat(StrEnum):
    """What a firmware is packed in, which tells the VMMs that it is made for."""

    FLASH = "flash"
    """An image of a PC's flash memory, in which the CPU begins right below 4 GiB."""
    ELF = "elf"
    """A program that is loaded, and entered through its PVH note."""


FIRMWARE_FORMATS: Mapping[str, str] = {
    FirmwareFormat.FLASH: "an image of a PC's flash memory, as OVMF.fd",
    FirmwareFormat.ELF: "an ELF with a PVH note, as CLOUDHV.fd",
}
"""In words."""


@dataclass(frozen=True, slots=True)
class BootFiles:
    """What was booted last, by content: names in the kernel store (hex SHA-256), "" for none.

    `source` is the configuration that named the files, so that they can be booted again when the
    files are gone but the configuration is the same. `firmware_format` is known of what the agent
    has stored itself, "" where it only came with a snapshot.
    """

    kernel: str = ""
    initrd: str = ""
    source: Boot | None = None
    firmware: str = ""
    firmware_format: str = ""

    def digests(self) -> dict[str, str]:
        """The files that there are, by what they are."""
        digests = {"kernel": self.kernel, "initrd": self.initrd, "firmware": self.firmware}
        return {part: digest for part, digest in digests.items() if digest}


@dataclass(frozen=True, slots=True)
class DirtyBase:
    """What the VMM's record of changed memory counts from: a snapshot, in the process `pid`."""

    snapshot: str
    pid: int


@dataclass(frozen=True, slots=True)
class Vm:
    """One VM. Times are seconds since the epoch, 0 for never; `pid` is 0 when there is no process.

    `hypervisor` is the backend of the last start (`config.hypervisor` may say auto). `user_paused`
    tells a pause that the user asked for from one that a snapshot needed. `reason` says how it came
    into its state, `error` why the last operation or the VM failed. `generation` counts committed
    transitions. `from_snapshot` is the id of the snapshot that its first start clones, or cloned;
    `restoring` that of the snapshot it is being put back to; `snapshots` are those taken of it.
    `restored_by` is how the memory was loaded by a process that went on from a snapshot, where the
    VMM knows several ways. `seed` is the instance id in the seed that is, or was last, among its
    disks, "" for none; `seeded` the one with which a guest on its disks has booted. `changing` is
    what the configuration of a VM that runs was to become, until it is known what it became.
    `unwritten` tells of a clone whose disks may not be wholly on the host's disk yet.
    """

    id: str
    name: str
    uid: int
    access: Access
    config: VmConfig
    state: State = State.CREATING
    hypervisor: str = ""
    hypervisor_version: str = ""
    booted: BootFiles = BootFiles()
    pid: int = 0
    user_paused: bool = False
    reason: str = ""
    error: str = ""
    generation: int = 0
    from_snapshot: str = ""
    restoring: str = ""
    dirty_base: DirtyBase | None = None
    restored_by: str = ""
    first_booted: bool = False
    unwritten: bool = False
    seed: str = ""
    seeded: str = ""
    changing: VmConfig | None = None
    snapshots: tuple[str, ...] = ()
    created_at: float = 0
    updated_at: float = 0
    started_at: float = 0
    stopped_at: float = 0

    @property
    def unit(self) -> str:
        return f"{UNIT_PREFIX}{self.name}.service"

    @property
    def is_to_be_cloned(self) -> bool:
        """Whether its next start loads the snapshot that `from` names."""
        return bool(self.from_snapshot) and not self.first_booted

    @property
    def has_process(self) -> bool:
        return self.state in WITH_PROCESS


def to_row(vm: Vm) -> dict[str, Any]:
    """Return the JSON object that the index keeps."""
    return dataclasses.asdict(vm)


def from_row(row: dict[str, Any]) -> Vm:
    """Return the record of an index row; raise TypeError, KeyError or ValueError on another shape.

    Keys that an older agent did not write take their defaults; values are the agent's own and are
    not checked again (a host that lost CPUs must still read its records).
    """
    return Vm(
        **{
            **row,
            "access": Access(**row["access"]),
            "config": _config(row["config"]),
            "changing": _config(row["changing"]) if row.get("changing") else None,
            "state": State(row["state"]),
            "booted": _booted(row.get("booted", {})),
            "dirty_base": DirtyBase(**row["dirty_base"]) if row.get("dirty_base") else None,
            "snapshots": tuple(row.get("snapshots", ())),
        }
    )


def _config(row: dict[str, Any]) -> VmConfig:
    config = dict(row)
    config["boot"] = Boot(**config["boot"]) if config.get("boot") else None
    config["base"] = BaseImage(**config["base"]) if config.get("base") else None
    config["disks"] = tuple(Disk(**disk) for disk in config.get("disks", ()))
    config["ssh_keys"] = tuple(config.get("ssh_keys", ()))
    config["queue_affinity"] = tuple(map(tuple, config.get("queue_affinity", ())))
    return VmConfig(**config)


def _booted(row: dict[str, Any]) -> BootFiles:
    source = row.get("source")
    return BootFiles(**{**row, "source": Boot(**source) if source else None})


def timestamp(seconds: float) -> str | None:
    """Return RFC 3339 in UTC, as Go writes times; None for never."""
    if not seconds:
        return None
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
