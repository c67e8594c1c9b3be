"""The disks of a VM in the order in which its guest sees them: their files, their jail paths."""

from collections.abc import Iterator
from dataclasses import dataclass

from . import canonical
from .config import BaseImage, Disk, VmConfig
from .launch import Bind


@dataclass(frozen=True, slots=True)
class Backing:
    """The base image that a disk in qcow2 stands on, at its path in the jail."""

    path: str
    format: str


@dataclass(frozen=True, slots=True)
class Drive:
    """A disk at its path in the jail.

    `role` is one of Cocoon's (`SnapshotDisk`): the VM's own is cow, the host's are layer. One in
    `format` qcow2 has a `backing`, to be named to the VMM: what the file's header says of it was
    written by a VMM that may have been taken over.
    """

    path: str
    readonly: bool = False
    serial: str = ""
    role: str = "data"
    fstype: str = ""
    format: str = "raw"
    backing: Backing | None = None


@dataclass(frozen=True, slots=True)
class DiskFile:
    """A disk in the VM's directory, and what it is made as.

    `size` is what the guest sees, in bytes. A new one is empty, or with `fstype` a filesystem, or
    stands on `base`: in `format` qcow2 as an overlay, in raw as a copy.
    """

    name: str
    size: int
    fstype: str = ""
    format: str = "raw"
    base: BaseImage | None = None


SEED_DRIVE = Drive(f"{canonical.VM}/{canonical.SEED}", readonly=True, role="cidata")
"""The disk with the seed for the first boot."""


def drives(config: VmConfig, *, seed: bool = False) -> tuple[Drive, ...]:
    """Return the VM's own writable disk, if it has one, then `disks` as they are written.

    With `seed`, the seed's comes last: no name of another changes when it goes.
    """
    own = tuple(
        Drive(
            f"{canonical.VM}/{file.name}",
            role="cow",
            format=file.format,
            backing=_backing(file),
        )
        for file in _own(config)
    )
    further = (_drive(index, disk) for index, disk in enumerate(config.disks))
    return (*own, *further, *((SEED_DRIVE,) if seed else ()))


def own_disks(config: VmConfig) -> dict[str, Drive]:
    """Return those of `disks` that are the agent's own, by name."""
    return {disk.name: _drive(0, disk) for disk in config.disks if not disk.is_host_path}


def data_file(name: str) -> str:
    """Return the name of the file behind the agent's own disk `name`."""
    return f"data-{name}.raw"


def disk_files(config: VmConfig) -> Iterator[DiskFile]:
    """Return the disks that the VM's directory must hold."""
    yield from _own(config)
    for disk in config.disks:
        if not disk.is_host_path:
            yield DiskFile(data_file(disk.name), disk.size, disk.fstype)


def host_disk_binds(config: VmConfig) -> tuple[Bind, ...]:
    """Return where the host's disks among `disks` must appear in the jail."""
    return tuple(
        Bind(disk.path, _path(index, disk), disk.readonly)
        for index, disk in enumerate(config.disks)
        if disk.is_host_path
    )


def _own(config: VmConfig) -> Iterator[DiskFile]:
    base, size = config.base, config.own_size
    if base is not None and not base.copied:
        yield DiskFile(canonical.OVERLAY, size, format="qcow2", base=base)
    elif size:
        yield DiskFile(canonical.COW, size, fstype="" if base else "ext4", base=base)


def _backing(file: DiskFile) -> Backing | None:
    if file.format == "raw" or file.base is None:
        return None
    path = canonical.base_path(file.base.digest, file.base.format)
    return Backing(path, file.base.format)


def _drive(index: int, disk: Disk) -> Drive:
    return Drive(
        _path(index, disk),
        disk.readonly,
        disk.serial,
        role="layer" if disk.is_host_path else "data",
        fstype=disk.fstype,
    )


def _path(index: int, disk: Disk) -> str:
    if disk.is_host_path:
        return f"{canonical.DISKS}/{index}"
    return f"{canonical.VM}/{data_file(disk.name)}"
