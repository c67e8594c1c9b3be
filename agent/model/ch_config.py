"""What of Cloud Hypervisor's `config.json` belongs to the host that wrote it, and what it is here.

The document is its API's VmConfig (vmm/src/vm_config.rs). In a snapshot that was taken here all
paths are canonical already. The guest must not notice the change: devices stay what they are.
"""

import json
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from . import canonical
from .config import QueueAffinity
from .errors import Damaged, Missing, Unsupported
from .snapshot import CH_CONFIG, Snapshot, is_disk, load_object

_ABSENT = {
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
_HOST_SIDE = ("tap", "ip", "mask", "host_mac", "mtu")
"""What a network interface says of the TAP behind it; the guest's side is in the VMM's state."""
_MOST_QUEUE_PAIRS = 253  # SCM_MAX_FD, include/net/scm.h: descriptors that one message carries


@dataclass(frozen=True, slots=True)
class Nic:
    """A network interface: what Cloud Hypervisor calls it, and how many pairs of queues it has."""

    id: str
    queue_pairs: int


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
    _localise_nics(config, snapshot)
    payload = _object(config, "payload")
    if payload.get("igvm"):
        raise _unsupported(snapshot, "an IGVM file", "payload")
    payload.update({key: path for key, path in _PAYLOAD.items() if payload.get(key)})
    _localise_consoles(config)
    _localise_resources(config, snapshot)
    after = json.dumps(config)
    return data if after == before else after.encode()


def nics(data: bytes) -> tuple[Nic, ...]:
    """Return the network interfaces in `data`, the content of a `config.json`, or raise Damaged."""
    return _nics(_objects(load_object(data, CH_CONFIG), "net"))


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


def _localise_nics(config: dict[str, Any], snapshot: Snapshot) -> None:
    """Have the network interfaces wait for descriptors of TAPs, a pair of queues for each."""
    entries = _objects(config, "net")
    if len(entries) != snapshot.nics:
        raise Damaged(
            f"snapshot {snapshot.name} is recorded with {snapshot.nics} network interfaces and has "
            f"{len(entries)}: import it again"
        )
    for entry, nic in zip(entries, _nics(entries), strict=True):
        if entry.get("vhost_user") or entry.get("vhost_socket"):
            raise _unsupported(snapshot, "a network interface of another process", "net")
        for key in _HOST_SIDE:
            entry.pop(key, None)
        entry["fds"] = [-1] * nic.queue_pairs


def _nics(entries: Iterable[dict[str, Any]]) -> tuple[Nic, ...]:
    found = tuple(_nic(entry) for entry in entries)
    if len({nic.id for nic in found}) < len(found):
        raise Damaged(f"{CH_CONFIG}: two network interfaces have the same id")
    if sum(nic.queue_pairs for nic in found) > _MOST_QUEUE_PAIRS:
        raise Damaged(
            f"{CH_CONFIG}: network interfaces have more than {_MOST_QUEUE_PAIRS} pairs of queues"
        )
    return found


def _nic(entry: dict[str, Any]) -> Nic:
    match entry:
        case {"id": str(name), "num_queues": int(queues)} if name and queues >= 2:
            return Nic(name, queues // 2)
    raise Damaged(f"{CH_CONFIG}: a network interface has no id or no queues")


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
