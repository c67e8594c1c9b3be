"""A VM and the index in the shapes of Cocoon's `VMRecord` and `VMIndex`, keys of ours on top."""

from collections.abc import Iterable
from typing import Any

from agent.model import canonical
from agent.model.config import show_config
from agent.model.disks import drives
from agent.model.image import DIGEST
from agent.model.vm import Vm, timestamp


def describe_vm(vm: Vm) -> dict[str, Any]:
    """Return the whole record, as `info.json` shows it.

    Paths are those that the VMM sees, which are the same for every VM.
    """
    config = vm.config
    boot, base = config.boot, config.base
    return {
        "id": vm.id,
        "hypervisor": vm.hypervisor or config.hypervisor,
        "state": vm.state.value,
        "config": {
            "name": vm.name,
            "cpu": config.cpu,
            "memory": config.memory,
            "storage": config.storage,
            "queue_size": 0,
            "disk_queue_size": 0,
            "image": config.image,
            "image_digest": f"{DIGEST}{base.digest}" if base else "",
            "image_type": "cloudimg" if base else "",
            "network": "",
            "no_direct_io": False,
            "windows": False,
        },
        "pid": vm.pid,
        "socket_path": canonical.API_SOCKET,
        "network_configs": [],
        "storage_configs": [
            {"path": drive.path, "ro": drive.readonly, "serial": drive.serial}
            for drive in drives(config, seed=bool(vm.seed))
        ],
        "boot_config": {
            "kernel_path": boot.kernel if boot else "",
            "initrd_path": boot.initrd if boot else "",
            "cmdline": boot.cmdline if boot else "",
            "firmware_path": boot.firmware if boot else "",
        },
        "image_blob_ids": {base.digest: {}} if base else {},
        "first_booted": vm.first_booted,
        "snapshot_ids": {snapshot: {} for snapshot in vm.snapshots},
        "run_dir": canonical.RUN,
        "log_dir": "",
        "created_at": timestamp(vm.created_at),
        "updated_at": timestamp(vm.updated_at),
        "started_at": timestamp(vm.started_at),
        "stopped_at": timestamp(vm.stopped_at),
        "name": vm.name,
        "unit": vm.unit,
        "uid": vm.uid,
        "owner": {"uid": vm.access.uid, "gid": vm.access.gid, "mode": f"{vm.access.mode:04o}"},
        "generation": vm.generation,
        "reason": vm.reason,
        "error": vm.error,
        "user_paused": vm.user_paused,
        "restored_by": vm.restored_by,
        "hypervisor_version": vm.hypervisor_version,
        "booted": {
            "kernel": vm.booted.kernel,
            "initrd": vm.booted.initrd,
            "firmware": vm.booted.firmware,
        },
        # Not for everyone who may look at the index: a hash, and what may hold any secret.
        "settings": {
            key: value
            for key, value in show_config(config).items()
            if key not in ("password", "user_data")
        },
    }


def describe_index(vms: Iterable[Vm]) -> dict[str, Any]:
    """Return the whole index, as `index.json` shows it."""
    ordered = sorted(vms, key=lambda vm: vm.name)
    return {
        "vms": {vm.id: describe_vm(vm) for vm in ordered},
        "names": {vm.name: vm.id for vm in ordered},
    }
