"""What a snapshot's own files say: its disks, how it booted, and where its VMM expects each disk.

`cocoon.json` has the shape that Cocoon writes; `config.json` is Cloud Hypervisor's VM
configuration; Firecracker's `vmstate` is opaque but for the paths in it, which are plain bytes.
"""

import dataclasses
import json
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import canonical
from .errors import Damaged, Invalid
from .size import MIB
from .snapshot import (
    CH_CONFIG,
    SIDECAR,
    STATE_FILES,
    BoundFile,
    Fields,
    Snapshot,
    SnapshotBoot,
    SnapshotDisk,
    SnapshotFile,
    is_disk,
    load_object,
)

TRUSTED_ROOT = canonical.ROOT
"""Below this lies every path that a snapshot may want bound: Cocoon's default settings."""

VMSTATE = STATE_FILES["firecracker"].state
_READ_LIMITS: Mapping[str, int] = {SIDECAR: MIB, CH_CONFIG: MIB, VMSTATE: 16 * MIB}

_OWN_DISKS = ("cow.raw", "overlay.qcow2")
_MOST_DISKS = 256
_MOST_NICS = 256
_MOST_PATHS = 8
_PATH_LENGTH = 4095

# bincode: a string is its length, 8 bytes little-endian, and its bytes.
_STRING = re.compile(rb"(?s)(?=([\x02-\xff][\x00-\x0f]|\x00[\x01-\x0f])\x00{6}/)")


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What `cocoon.json` or `config.json` says; zeros for what it does not."""

    disks: tuple[SnapshotDisk, ...] = ()
    boot: SnapshotBoot = field(default_factory=SnapshotBoot)
    cpu: int = 0
    memory: int = 0
    nics: int = 0


def show_sidecar(sidecar: Sidecar) -> bytes:
    """Return `cocoon.json` as Cocoon reads it."""
    document = {
        "storage_configs": [_show_disk(disk) for disk in sidecar.disks],
        # Cocoon looks for both paths even when they are empty.
        "boot_config": {
            "kernel_path": sidecar.boot.kernel_path,
            "initrd_path": sidecar.boot.initrd_path,
            **{
                key: value
                for key, value in (
                    ("cmdline", sidecar.boot.cmdline),
                    ("firmware_path", sidecar.boot.firmware_path),
                )
                if value
            },
        },
        "cpu": sidecar.cpu,
        "memory": sidecar.memory,
    }
    return json.dumps(document, ensure_ascii=False).encode() + b"\n"


def parse_sidecar(data: bytes) -> Sidecar:
    """Return what `cocoon.json` says.

    Raises Damaged for what is no JSON, Invalid for values of other types and paths not to be bound.
    """
    fields = Fields(load_object(data, SIDECAR), SIDECAR)
    boot = Fields(fields.mapping("boot_config"), f"{SIDECAR}: boot_config")
    disks = []
    for raw in fields.objects("storage_configs", _MOST_DISKS):
        disk = Fields(raw, f"{SIDECAR}: storage_configs")
        disks.append(
            SnapshotDisk(
                path=check_path(disk.text("path"), SIDECAR),
                readonly=disk.truth("ro"),
                serial=disk.text("serial"),
                role=disk.text("role"),
                fstype=disk.text("fstype"),
            )
        )
    return Sidecar(
        disks=tuple(disks),
        boot=_checked_boot(boot, SIDECAR, "kernel_path", "initrd_path"),
        cpu=fields.whole("cpu"),
        memory=fields.whole("memory"),
    )


def parse_ch_config(data: bytes) -> Sidecar:
    """Return what Cloud Hypervisor's `config.json` (its API's VmConfig) says.

    Raises as `parse_sidecar` does.
    """
    fields = Fields(load_object(data, CH_CONFIG), CH_CONFIG)
    disks = []
    for raw in fields.objects("disks", _MOST_DISKS):
        disk = Fields(raw, f"{CH_CONFIG}: disks")
        path = disk.text("path")
        if path:  # a disk behind a vhost-user socket has none
            path = check_path(path, CH_CONFIG)
            disks.append(SnapshotDisk(path, disk.truth("readonly"), disk.text("serial")))
    payload = Fields(fields.mapping("payload"), f"{CH_CONFIG}: payload")
    cpus = Fields(fields.mapping("cpus"), f"{CH_CONFIG}: cpus")
    memory = Fields(fields.mapping("memory"), f"{CH_CONFIG}: memory")
    return Sidecar(
        disks=tuple(disks),
        boot=_checked_boot(payload, CH_CONFIG, "kernel", "initramfs", "firmware"),
        cpu=cpus.whole("boot_vcpus"),
        memory=memory.whole("size"),
        nics=len(fields.objects("net", _MOST_NICS)),
    )


def vmstate_paths(vmstate: bytes) -> tuple[str, ...]:
    """Return the absolute paths in Firecracker's `vmstate`, each once, in their order there."""
    paths: dict[str, None] = {}
    for match in _STRING.finditer(vmstate):
        start = match.start() + 8
        raw = vmstate[start : start + int.from_bytes(match[1], "little")]
        if len(raw) <= _PATH_LENGTH and raw.isascii() and raw.decode().isprintable():
            paths[raw.decode()] = None
    return tuple(paths)


def check_path(path: str, what: str) -> str:
    """Return `path` normalised; raise Invalid when nothing may be bound there."""
    normal = posixpath.normpath(path)
    if _is_in_reach(normal):
        raise Invalid(
            f"{what} names the path {path[:120]!r}, on the way to which a VM may put links"
        )
    if (
        not normal.startswith(TRUSTED_ROOT + "/")
        or len(path.encode()) > _PATH_LENGTH
        or not path.isprintable()
    ):
        raise Invalid(
            f"{what} names the path {path[:120]!r}, which is not below {TRUSTED_ROOT}: "
            "only a snapshot whose paths are can be cloned safely"
        )
    return normal


def complete(
    draft: Snapshot, files: Iterable[SnapshotFile], read: Callable[[str], bytes]
) -> Snapshot:
    """Return `draft` with what its data files add; `read` gives the content of one, when needed.

    Raises Damaged when a file or a fact is missing, Invalid for paths that may not be bound.
    """
    by_name = {file.name: file for file in files}
    # Cocoon 0.3.6 writes no sidecar for Cloud Hypervisor: the disks are in config.json.
    needs_sidecar = draft.hypervisor != "cloud-hypervisor"
    written = draft.state_files
    for name in (*written.small, written.memory, *([SIDECAR] if needs_sidecar else [])):
        if name not in by_name:
            raise Damaged(f"the archive has no {name}, which a {draft.hypervisor} snapshot needs")

    def document(name: str) -> bytes:
        if by_name[name].size > _READ_LIMITS[name]:
            raise Damaged(f"{name} of {by_name[name].size} bytes is too large to be one")
        return read(name)

    sidecar = parse_sidecar(document(SIDECAR)) if SIDECAR in by_name else Sidecar()
    state_paths: tuple[str, ...] = ()
    nics = draft.nics
    if draft.hypervisor == "firecracker":
        state_paths = vmstate_paths(document(VMSTATE))
    elif draft.hypervisor == "cloud-hypervisor":
        config = parse_ch_config(document(CH_CONFIG))
        state_paths = tuple(disk.path for disk in config.disks)
        nics = config.nics
        sidecar = sidecar if SIDECAR in by_name else config
    snapshot = dataclasses.replace(
        draft,
        cpu=draft.cpu or sidecar.cpu,
        memory=draft.memory or sidecar.memory,
        nics=nics,
        disks=sidecar.disks,
        boot=sidecar.boot,
        binds=_binds(sidecar.disks, state_paths, by_name),
        files=tuple(by_name[name] for name in sorted(by_name)),
    )
    if not snapshot.cpu or not snapshot.memory:
        raise Damaged("the archive does not say how many CPUs and how much memory the VM had")
    return snapshot


def _binds(
    disks: tuple[SnapshotDisk, ...], state_paths: tuple[str, ...], names: Iterable[str]
) -> tuple[BoundFile, ...]:
    """Where the VMM looks for each disk, when not at the canonical path.

    Its own state counts before the sidecar: Cocoon's snapshot of a clone names the clone's disk in
    the sidecar, but the state still names that of the VM it came from.
    """
    present = {name for name in names if is_disk(name)}
    found: dict[str, list[str]] = {}
    for path in state_paths:
        if posixpath.basename(path) in present:
            found.setdefault(posixpath.basename(path), []).append(path)
    for disk in disks:
        name = _file_of(disk, present)
        if name is not None and name not in found:
            found[name] = [disk.path]
    binds: list[BoundFile] = []
    for name, paths in sorted(found.items()):
        # A guest can plant bytes in its state that look like a path, so all that may be bound are.
        trusted = [path for path in paths if _is_trusted(path)] or [check_path(paths[0], VMSTATE)]
        targets = dict.fromkeys(posixpath.normpath(path) for path in trusted)
        if len(targets) > _MOST_PATHS:
            raise Damaged(f"{VMSTATE} names {name} at {len(targets)} different paths")
        binds += [BoundFile(name, path) for path in targets if path != f"{canonical.VM}/{name}"]
    return tuple(binds)


def _file_of(disk: SnapshotDisk, present: set[str]) -> str | None:
    """The data file that holds `disk`; None for what does not travel (base images, a seed disk)."""
    name = posixpath.basename(disk.path)
    if name in present:
        return name
    own = disk.role == "cow" or (disk.role == "" and not disk.readonly)
    if own:
        for candidate in _OWN_DISKS:
            if candidate in present:
                return candidate
    if own or disk.role == "data":
        raise Damaged(f"the archive has no {name[:80]!r}, a disk that the VM had")
    return None


def _is_trusted(path: str) -> bool:
    normal = posixpath.normpath(path)
    return normal.startswith(TRUSTED_ROOT + "/") and not _is_in_reach(normal)


def _is_in_reach(normal: str) -> bool:
    """Whether the way to what is bound there leads through what a VMM writes to.

    systemd follows links on that way as root.
    """
    below = normal.startswith((f"{canonical.VM}/", f"{canonical.SOCKETS}/"))
    return below and posixpath.dirname(normal) != canonical.VM


def _show_disk(disk: SnapshotDisk) -> dict[str, Any]:
    shown = {"path": disk.path, "ro": disk.readonly, "serial": disk.serial, "role": disk.role}
    return {**shown, "fstype": disk.fstype} if disk.fstype else shown


def _checked_boot(
    fields: Fields, what: str, kernel: str, initrd: str, firmware: str = "firmware_path"
) -> SnapshotBoot:
    paths = [fields.text(key) for key in (kernel, initrd, firmware)]
    kernel_path, initrd_path, firmware_path = (path and check_path(path, what) for path in paths)
    return SnapshotBoot(kernel_path, initrd_path, fields.text("cmdline"), firmware_path)
