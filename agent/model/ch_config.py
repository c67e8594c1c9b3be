"""What of Cloud Hypervisor's `config.json` belongs to the host that wrote it, and what it is here.

The document is its API's VmConfig (vmm/src/vm_config.rs). In a snapshot that was taken here all
paths are canonical already. The guest must not notice the change: devices stay what they are.
"""

import json
import posixpath
from typing import Any

from . import canonical
from .config import QueueAffinity
from .errors import Damaged, Missing, Unsupported
from .snapshot import CH_CONFIG, Snapshot, is_disk, load_object

_ABSENT = {
    "net": "network interfaces",
    "fs": "shared directories",
    "pmem": "persistent memory",
    "vsock": "a vsock",
    "vdpa": "vDPA devices",
    "devices": "devices of the host",
    "user_devices": "devices of another process",
    "generic-vhost-user": "devices of another process",
    "generic_vhost_user": "devices of another process",
    "ivshmem": "memory shared with others",
    "tpm": "a TPM",
}
"""By their keys, what VMs do not have here."""

_PAYLOAD = {
    "kernel": canonical.KERNEL,
    "initramfs": canonical.INITRD,
    "firmware": canonical.FIRMWARE,
}
_RANDOM = "/dev/urandom"


def localised(data: bytes, snapshot: Snapshot, affinity: QueueAffinity = ()) -> bytes:
    """Return `data`, the content of the snapshot's `config.json`, as a VM here is to load it.

    Its disks are tied to CPUs as the VM's `affinity` says. The same bytes when nothing is to
    change; fields that are not known here stay. Raises Damaged for what is no VmConfig, Unsupported
    for what VMs do not have here, Missing for a disk that did not travel.
    """
    config = load_object(data, CH_CONFIG)
    before = json.dumps(config)
    for key, what in _ABSENT.items():
        if config.get(key):
            raise _unsupported(snapshot, what, key)
    for disk in _objects(config, "disks"):
        _localise_disk(disk, snapshot)
        _tie(disk, affinity)
    payload = _object(config, "payload")
    if payload.get("igvm"):
        raise _unsupported(snapshot, "an IGVM file", "payload")
    payload.update({key: path for key, path in _PAYLOAD.items() if payload.get(key)})
    _localise_consoles(config)
    _localise_resources(config, snapshot)
    after = json.dumps(config)
    return data if after == before else after.encode()


def untied(data: bytes) -> bytes:
    """Return a `config.json` that ties no disk to CPUs; raise Damaged for what is none."""
    config = load_object(data, CH_CONFIG)
    for disk in _objects(config, "disks"):
        _tie(disk, ())
    return json.dumps(config).encode()


def show_affinity(affinity: QueueAffinity) -> list[dict[str, Any]]:
    """Return what ties a disk to CPUs, in the words of Cloud Hypervisor's API (DiskConfig).

    Of a queue that the disk has not, it takes no notice.
    """
    return [
        {"queue_index": queue, "host_cpus": list(cpus)}
        for queue, cpus in enumerate(affinity)
        if cpus
    ]


def _tie(disk: dict[str, Any], affinity: QueueAffinity) -> None:
    disk.pop("queue_affinity", None)
    if any(affinity):
        disk["queue_affinity"] = show_affinity(affinity)


def _localise_disk(disk: dict[str, Any], snapshot: Snapshot) -> None:
    path = disk.get("path")
    if not isinstance(path, str) or disk.get("vhost_user") or disk.get("vhost_socket"):
        raise _unsupported(snapshot, "a disk of another process", "disks")
    here = {f"{canonical.VM}/{file.name}" for file in snapshot.files if is_disk(file.name)}
    moved = {bound.path: f"{canonical.VM}/{bound.name}" for bound in snapshot.binds}
    normal = posixpath.normpath(path)
    disk["path"] = moved.get(normal, normal)
    if disk["path"] not in here and disk["path"] not in snapshot.host_disks:
        raise Missing(
            f"snapshot {snapshot.name} needs the disk {path[:120]!r}, which did not travel with "
            "it: take it again of a VM whose disks are its own"
        )


def _localise_consoles(config: dict[str, Any]) -> None:
    """Connect the serial port to the agent; what the guest has besides it stays, unconnected."""
    serial, console = _object(config, "serial"), _object(config, "console")
    debug = _object(config, "debug_console")
    serial.pop("file", None)
    serial.update(mode="Socket", socket=canonical.CONSOLE_SOCKET)
    if console.get("mode") != "Off":
        # Absent, it is a virtio device as well, on the terminal.
        _disconnect(console, "Null")
        config["console"] = console
    if debug.get("mode", "Off") != "Off":
        _disconnect(debug, "Off")
    config["serial"] = serial


def _disconnect(console: dict[str, Any], mode: str) -> None:
    for key in ("file", "socket"):
        console.pop(key, None)
    console["mode"] = mode


def _localise_resources(config: dict[str, Any], snapshot: Snapshot) -> None:
    """Leave it to the unit and its jail where memory and CPU time come from."""
    cpus, memory = _object(config, "cpus"), _object(config, "memory")
    if memory.get("zones"):
        raise _unsupported(snapshot, "memory in zones", "memory")
    if memory.get("hugepages"):
        memory["hugepages"] = False
        memory.pop("hugepage_size", None)
    cpus.pop("affinity", None)
    rng = _object(config, "rng")
    if "src" in rng:
        rng["src"] = _RANDOM
    if config.get("landlock_enable"):
        config["landlock_enable"] = False
        config.pop("landlock_rules", None)


def _object(config: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the object at `key`, a new one where there is none."""
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Damaged(f"{CH_CONFIG}: {key} is not an object")
    return value


def _objects(config: dict[str, Any], key: str) -> list[dict[str, Any]]:
    values = config.get(key) or []
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise Damaged(f"{CH_CONFIG}: {key} is not a list of objects")
    return values


def _unsupported(snapshot: Snapshot, what: str, key: str) -> Unsupported:
    return Unsupported(
        f"snapshot {snapshot.name} has {what} ({key} in {CH_CONFIG}), which VMs do not have here: "
        "take it again of a VM without"
    )
