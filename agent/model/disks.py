"""The disks of a VM in the order in which its guest sees them: their files, their jail paths."""

from collections.abc import Iterator
from dataclasses import dataclass

from . import canonical
from .config import Disk, VmConfig
from .launch import Bind


@dataclass(frozen=True, slots=True)
class Drive:
    """A raw disk at its path in the jail."""

    path: str
    readonly: bool = False
    serial: str = ""


def drives(config: VmConfig) -> tuple[Drive, ...]:
    """Return the VM's own writable disk, if it has one, then `disks` as they are written."""
    own = (Drive(f"{canonical.VM}/{canonical.COW}"),) if config.storage else ()
    further = (
        Drive(_path(index, disk), disk.readonly, disk.serial)
        for index, disk in enumerate(config.disks)
    )
    return (*own, *further)


def disk_files(config: VmConfig) -> Iterator[tuple[str, int]]:
    """Return name and size in bytes of the raw files that the VM's directory must hold."""
    if config.storage:
        yield canonical.COW, config.storage
    for disk in config.disks:
        if not disk.is_host_path:
            yield _file(disk), disk.size


def host_disk_binds(config: VmConfig) -> tuple[Bind, ...]:
    """Return where the host's disks among `disks` must appear in the jail."""
    return tuple(
        Bind(disk.path, _path(index, disk), disk.readonly)
        for index, disk in enumerate(config.disks)
        if disk.is_host_path
    )


def _path(index: int, disk: Disk) -> str:
    if disk.is_host_path:
        return f"{canonical.DISKS}/{index}"
    return f"{canonical.VM}/{_file(disk)}"


def _file(disk: Disk) -> str:
    return f"data-{disk.name}.raw"
