"""The hardware of Cloud Hypervisor's guests: their disks, and what changes while they run.

Requests and answers are those of vmm/src/api/openapi/cloud-hypervisor.yaml. Memory is plugged the
ACPI way, in pieces that the guest sees as DIMMs; CPUs and disks come and go with ACPI's eject.
"""

import os
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from agent.model.ch_config import Nic, nics, show_affinity
from agent.model.config import VmConfig
from agent.model.cpus import show_cpus
from agent.model.disks import Drive
from agent.model.errors import Busy, Failed, Invalid, Unsupported, from_os_error
from agent.model.size import MIB, show_size
from agent.model.snapshot import CH_CONFIG

from .driver import Directory, Hardware
from .http import HttpApi
from .program import count_threads

API = "/api/v1"
VCPU_THREAD = b"vcpu"

_QUEUE_SIZE = 512  # Cocoon's choice
_IMAGE_TYPES = {"raw": "Raw", "qcow2": "Qcow2"}
_CONFIG_LIMIT = 2 * MIB  # bytes, more than of any that was imported
_MEMORY_STEP = 128 * MIB  # vmm/src/memory_manager.rs: what a DIMM measures
_FULL = "No ACPI slot available"
_OWED = "Too Many Requests"  # all that is said of a vCPU that the guest has not let go of


class GuestHardware:
    """What a running guest has; see LiveChanges."""

    def __init__(self, api: HttpApi, directory: Directory) -> None:
        """`directory` lends the VM's directory."""
        self._api = api
        self._directory = directory

    async def hardware(self, pid: int, drives: Iterable[Drive], timeout: float = 10) -> Hardware:
        """Return what the guest has; see LiveChanges.

        The configuration that Cloud Hypervisor describes has what was asked for. What has not gone
        yet is a thread, or a device in its tree.
        """
        found = await self._describe(timeout)
        cpu = count_threads(pid, VCPU_THREAD)
        if not cpu:
            raise Failed("the guest has no CPU any more: it has ended")
        present = {drive for drive in drives if found.id_of(drive) in found.devices}
        return Hardware(
            cpu=cpu,
            claimed_cpu=found.cpu,
            least_cpu=max(found.queues, default=1),
            memory=found.memory,
            disks=frozenset(present),
            leaving=frozenset(drive for drive in present if _disk_name(drive) not in found.disks),
        )

    def check(self, now: Hardware, config: VmConfig) -> None:
        """Raise Unsupported or Invalid for what the guest cannot come to; see LiveChanges."""
        if config.memory < now.memory:
            raise Unsupported(
                f"Cloud Hypervisor takes no memory from a guest that runs, which has "
                f"{show_size(now.memory)}: stop the VM first"
            )
        rest = (config.memory - now.memory) % _MEMORY_STEP
        if rest:
            sizes = (config.memory - rest, config.memory - rest + _MEMORY_STEP)
            possible = [
                show_size(size) for size in sizes if now.memory < size <= config.most_memory
            ]
            remedy = f"write {' or '.join(possible)}, or " if possible else ""
            raise Invalid(
                f"memory of a guest that runs, {show_size(now.memory)} now, grows by multiples of "
                f"{show_size(_MEMORY_STEP)}: {remedy}stop the VM first"
            )
        if config.cpu < min(now.cpu, now.least_cpu):
            # Cloud Hypervisor neither adds a disk to such a guest nor loads a snapshot of it.
            raise Unsupported(
                f"the guest has a disk with {now.least_cpu} queues, and keeps as many CPUs while "
                "it runs: stop the VM first"
            )

    async def set_cpus(self, cpu: int, timeout: float = 10) -> None:
        """Give the guest vCPUs, or ask it for them; see LiveChanges."""
        try:
            await self._put("vm.resize", {"desired_vcpus": cpu}, timeout)
        except Failed as error:
            if _OWED in str(error):
                raise Busy(
                    "the guest was asked for a CPU before and has not let go of it: its CPUs "
                    "change once it has, or once the VM was stopped"
                ) from error
            raise

    async def set_memory(self, memory: int, timeout: float = 10) -> None:
        """Give the guest memory; see LiveChanges."""
        try:
            await self._put("vm.resize", {"desired_ram": memory}, timeout)
        except Failed as error:
            if _FULL in str(error):
                raise Unsupported(
                    "the guest's memory has grown eight times, and no more can be plugged before "
                    "the next start: stop the VM first"
                ) from error
            raise

    async def add_disk(self, drive: Drive, config: VmConfig, timeout: float = 10) -> None:
        """Give the guest a disk; see LiveChanges."""
        body = {**_disk_options(drive, config), "image_type": _IMAGE_TYPES[drive.format]}
        if config.ties_queues:
            body["queue_affinity"] = show_affinity(config.queue_affinity)
        await self._put("vm.add-disk", body, timeout)

    async def remove_disk(self, drive: Drive, timeout: float = 10) -> None:
        """Ask the guest to let go of a disk; see LiveChanges."""
        found = await self._describe(timeout)
        await self._put("vm.remove-device", {"id": found.id_of(drive)}, timeout)

    async def remove_nics(self, timeout: float = 10) -> None:
        """Ask the guest to let go of what it was loaded with; see LiveChanges."""
        for nic in await self._nics():
            await self._put("vm.remove-device", {"id": nic.id}, timeout)

    async def leaving_nics(self, timeout: float = 10) -> tuple[str, ...]:
        """Return what the guest has not let go of; see LiveChanges."""
        loaded = await self._nics()
        if not loaded:
            return ()
        found = await self._describe(timeout)
        return tuple(nic.id for nic in loaded if nic.id in found.devices)

    async def _nics(self) -> tuple[Nic, ...]:
        return await trio.to_thread.run_sync(read_nics, self._directory)

    async def _describe(self, timeout: float) -> "_Description":
        return _parse(await self._api.call("GET", f"{API}/vm.info", timeout=timeout))

    async def _put(self, path: str, body: Mapping[str, Any], timeout: float) -> None:
        await self._api.call("PUT", f"{API}/{path}", body, timeout=timeout)


def read_nics(directory: Directory) -> tuple[Nic, ...]:
    """Return the network interfaces of what a VM was loaded from; none where it was booted.

    Blocks on a file. Raises Failed and Damaged.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with directory() as own:
        try:
            file = os.open(CH_CONFIG, flags, dir_fd=own)
            try:
                return nics(os.read(file, _CONFIG_LIMIT))
            finally:
                os.close(file)
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise from_os_error(error, f"reading {CH_CONFIG}") from error


@dataclass(frozen=True, slots=True)
class _Description:
    """What `vm.info` says. `disks` are ids by what we call the disks, `devices` ids of all."""

    cpu: int
    memory: int
    disks: Mapping[str, str]
    queues: Sequence[int]
    devices: Container[str]

    def id_of(self, drive: Drive) -> str:
        """Return the disk's id: in a guest of a foreign snapshot it has another than ours."""
        return self.disks.get(_disk_name(drive), _disk_name(drive))


def _parse(info: Any) -> _Description:
    disks: dict[str, str] = {}
    queues: list[int] = []
    match info:
        case {
            "config": {
                "cpus": {"boot_vcpus": int(cpu)},
                "memory": {"size": int(memory)},
                **further,
            },
            "device_tree": dict(devices),
        }:
            found = further.get("disks")
            for disk in found if isinstance(found, list) else ():
                match disk:
                    case {"id": str(name), "path": str(path), "num_queues": int(number)}:
                        disks[_stem(path)] = name
                        queues.append(number)
            return _Description(cpu, memory, disks, queues, devices)
    raise Failed("Cloud Hypervisor described what its guest has in a way that is unknown")


def _stem(path: str) -> str:
    return os.path.basename(path).rpartition(".")[0]


def _disk_options(drive: Drive, config: VmConfig) -> dict[str, Any]:
    """Return the options of a disk, by the names that command line and API share.

    A queue for each vCPU, which has a thread of its own.
    """
    options: dict[str, Any] = {
        "path": drive.path,
        "id": _disk_name(drive),
        "readonly": drive.readonly,
        # The guest has a cache of its own; what many read is better in the host's.
        "direct": not drive.readonly,
        "num_queues": config.cpu,
        "queue_size": _QUEUE_SIZE,
        "backing_files": drive.backing is not None,
    }
    return {**options, "serial": drive.serial} if drive.serial else options


def disk_words(drive: Drive, config: VmConfig) -> str:
    """Return the option of the command line for a disk of a guest with that configuration."""
    shown = {True: "on", False: "off"}
    options = {**_disk_options(drive, config), "image_type": drive.format}
    if config.ties_queues:
        queues = [
            f"{tie['queue_index']}@[{show_cpus(tie['host_cpus'])}]"
            for tie in show_affinity(config.queue_affinity)
        ]
        options["queue_affinity"] = f"[{','.join(queues)}]"
    return ",".join(
        f"{name}={shown[value] if isinstance(value, bool) else value}"
        for name, value in options.items()
    )


def _disk_name(drive: Drive) -> str:
    """Return what the VMM calls the disk, whatever else comes and goes beside it."""
    if drive.role == "layer":
        return f"disk-{os.path.basename(drive.path)}"
    return _stem(drive.path)
