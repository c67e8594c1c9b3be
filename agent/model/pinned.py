"""What a snapshot fixes in the configuration of the VM that it becomes."""

import dataclasses
import posixpath
import re

from . import canonical
from .config import FILESYSTEMS, Boot, Disk, VmConfig, is_serial
from .errors import Damaged, Missing
from .image import Image
from .size import MIB
from .snapshot import Snapshot, SnapshotDisk
from .vm import BootFiles

BY_CONTENT = "sha256:"
"""How `boot` names a file that came with a snapshot: by this and its digest."""

PINNED = (
    "cpu",
    "max_cpu",
    "memory",
    "max_memory",
    "storage",
    "image",
    "hypervisor",
    "disks",
)
"""Keys that a VM has from its snapshot, until it boots cold."""

_DATA_DISK = re.compile(r"data-(.+)\.raw")


def pin(config: VmConfig, snapshot: Snapshot, image: Image | None = None) -> VmConfig:
    """Return `config` with what the snapshot fixes; `image` is the one that it stands on, if any.

    Raises Missing when it needs a disk that did not travel, Damaged for sizes that cannot be.
    """
    if snapshot.memory % MIB:
        raise Damaged(
            f"snapshot {snapshot.name} has no whole MiB of memory: {snapshot.memory} bytes"
        )
    sizes = {file.name: file.size for file in snapshot.files}
    boot = boot_of(snapshot)
    return dataclasses.replace(
        config,
        cpu=snapshot.cpu,
        max_cpu=snapshot.max_cpu,
        memory=snapshot.memory,
        max_memory=snapshot.max_memory,
        hypervisor=snapshot.hypervisor,
        storage=snapshot.storage if image else sizes.get(canonical.COW, 0),
        image=image.name if image else "",
        base=image.base if image else None,
        disks=tuple(_disks(snapshot, sizes)),
        boot=boot,
    )


def boot_of(snapshot: Snapshot) -> Boot | None:
    """Return how the VM boots cold with what travelled, None when nothing did."""
    if snapshot.firmware:
        return Boot(firmware=BY_CONTENT + snapshot.firmware)
    if not snapshot.kernel:
        return None
    return Boot(
        kernel=BY_CONTENT + snapshot.kernel,
        initrd=BY_CONTENT + snapshot.initrd if snapshot.initrd else "",
        cmdline=snapshot.boot.cmdline,
    )


def boot_files(snapshot: Snapshot) -> BootFiles:
    """Return the boot files that came with the snapshot."""
    return BootFiles(
        kernel=snapshot.kernel,
        initrd=snapshot.initrd,
        firmware=snapshot.firmware,
        source=boot_of(snapshot),
    )


def _disks(snapshot: Snapshot, sizes: dict[str, int]) -> list[Disk]:
    disks = []
    for disk in snapshot.disks:
        name = posixpath.basename(disk.path)
        data = _DATA_DISK.fullmatch(name)
        if name in sizes and data:
            disks.append(
                Disk(
                    name=data[1],
                    size=sizes[name],
                    fstype=disk.fstype if disk.fstype in FILESYSTEMS else "",
                    readonly=disk.readonly,
                    serial=_serial(snapshot, disk),
                )
            )
        elif disk.path in snapshot.host_disks:
            path, serial = snapshot.host_disks[disk.path], _serial(snapshot, disk)
            disks.append(Disk(path=path, readonly=True, serial=serial))
        elif name not in sizes and disk.role not in ("cow", ""):
            raise Missing(
                f"snapshot {snapshot.name} needs the disk {disk.path[:120]}, which did not travel "
                "with it: take it again of a VM whose disks are its own"
            )
    return disks


def _serial(snapshot: Snapshot, disk: SnapshotDisk) -> str:
    """Return the serial number that the disk had; Cocoon notes some that Firecracker has not."""
    shown = snapshot.hypervisor != "firecracker" and is_serial(disk.serial)
    return disk.serial if shown else ""
