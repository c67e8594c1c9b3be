"""Firecracker: its configuration file, its command line and its API."""

import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from agent.model import canonical
from agent.model.config import VmConfig
from agent.model.disks import Drive, drives, host_disk_binds
from agent.model.errors import Failed, Invalid, Unsupported
from agent.model.launch import LaunchPlan
from agent.model.size import MIB, show_size
from agent.model.vm import Vm
from agent.model.vmstate import check_vmstate

from .driver import Capabilities, Directory, Version, VmmState, last_line
from .http import HttpApi
from .kvm import kvm_obstacle
from .program import Program, has_thread

CONFIG_FILE = "vm.json"

DEFAULT_CMDLINE = "console=ttyS0 reboot=k panic=1 pci=off loglevel=3 i8042.noaux 8250.nr_uarts=1"
"""Cocoon's words for Firecracker: reboot through the keyboard controller, which ends the process,
and no looking for hardware that is not there. `panic=1` makes a panic a reboot."""

MINIMUM_VERSION = (1, 12)
"""The oldest that was tried: the first with PVH boot and with `network_overrides` on load."""

_OTHERS = "cloud-hypervisor and qemu can"
_MAXIMUM_CPUS = 32  # firecracker.yaml, MachineConfiguration
_BALLOON_FROM = 256 * MIB  # Cocoon's choice, as is the quarter
_BALLOON_SHARE = 4
# src/vmm/src/arch/x86_64/layout.rs: interrupts 5 to 23, one for each device.
_INTERRUPTS = 19
# CMDLINE_MAX_SIZE there, with the final NUL; for each device Firecracker appends what looks like
# ` virtio_mmio.device=4K@0xc0001000:5`.
_CMDLINE_ROOM = 2047
_CMDLINE_PER_DEVICE = 36
_VCPU_THREAD = b"fc_vcpu"
_STATES = {
    "Not started": VmmState.EMPTY,
    "Running": VmmState.RUNNING,
    "Paused": VmmState.PAUSED,
}


class Firecracker:
    """The driver; `path` names the program where it is not on root's PATH."""

    name = "firecracker"
    capabilities = Capabilities(
        snapshot=True, track_dirty=True, first_boot_seed=True, elf_kernel=True
    )

    def __init__(self, path: str = "", *, io_uring: bool | None = None) -> None:
        """`io_uring` says whether VMMs may use it; None asks the kernel."""
        self._program = Program(
            "firecracker",
            path,
            title="Firecracker",
            pattern=r"Firecracker v(\d+)\.(\d+)\.(\d+)",
            minimum=MINIMUM_VERSION,
            remedy="see https://github.com/firecracker-microvm/firecracker/releases",
        )
        self._io_uring = _io_uring_allowed() if io_uring is None else io_uring

    async def version(self) -> Version:
        """Return the program and its version; see Driver."""
        return await self._program.version()

    async def obstacle(self) -> str:
        """Return why KVM does not run guests here; see Driver."""
        return await kvm_obstacle()

    def plan(self, vm: Vm, version: Version, *, loads: bool = False, nics: int = 0) -> LaunchPlan:
        """Return what to launch for `vm`; see Driver."""
        config = vm.config
        files: dict[str, bytes] = {}
        boot_arguments: tuple[str, ...] = ()
        if config.boot is not None or not loads:
            document = self._document(vm, version)
            files = {CONFIG_FILE: json.dumps(document, indent=2).encode() + b"\n"}
            boot_arguments = ("--config-file", f"{canonical.VM}/{CONFIG_FILE}")
        return LaunchPlan(
            binary=version.binary,
            # Its log would go to stdout, which is the console. What ends it still reaches stderr.
            arguments=("--api-sock", canonical.API_SOCKET, "--id", vm.id, "--level", "Off"),
            boot_arguments=boot_arguments,
            files=files,
            memory=_process_memory(config.memory),
            binds=host_disk_binds(config),
            dynamic=version.dynamic,
        )

    def check_state(self, state: bytes) -> None:
        """Raise Damaged for a state that is not whole; see Driver."""
        check_vmstate(state)

    def answers(self, pid: int, *, loads: bool = False) -> bool:
        """Whether the process can be asked; see Driver.

        While Firecracker builds the guest its API takes requests already, and when the build then
        fails, one that waits makes it end by SIGSYS (status 148) instead of saying why on stderr:
        the thread that serves it panics. The threads of the vCPUs are the last that is built.
        """
        return loads or has_thread(pid, _VCPU_THREAD)

    def is_loading(self, pid: int) -> bool:
        """Never; see Driver."""
        return False

    def explain(self, lines: Sequence[str]) -> str:
        """Return the last line; see Driver."""
        return last_line(lines)

    @asynccontextmanager
    async def connect(self, socket: int, directory: Directory) -> AsyncIterator["FirecrackerVmm"]:
        """Talk to a running Firecracker; see Driver."""
        yield FirecrackerVmm(HttpApi(socket, "Firecracker"))

    def _document(self, vm: Vm, version: Version) -> dict[str, Any]:
        config = vm.config
        boot = config.boot
        if boot is None:
            raise Invalid('there is nothing to boot: write {"kernel": …} to boot')
        _check_possible(config)
        document: dict[str, Any] = {
            "boot-source": {
                "kernel_image_path": canonical.KERNEL,
                "boot_args": boot.cmdline or DEFAULT_CMDLINE,
            },
            "machine-config": {
                "vcpu_count": config.cpu,
                "mem_size_mib": config.memory // MIB,
                "track_dirty_pages": config.track_dirty,
            },
            "drives": [
                self._drive(index, drive)
                for index, drive in enumerate(drives(config, seed=bool(vm.seed)))
            ],
            "entropy": {},
        }
        if boot.initrd:
            document["boot-source"]["initrd_path"] = canonical.INITRD
        if config.memory >= _BALLOON_FROM:
            document["balloon"] = _balloon(config.memory, version)
        _check_room(document, version)
        return document

    def _drive(self, index: int, drive: Drive) -> dict[str, Any]:
        asynchronous = self._io_uring and not drive.readonly
        return {
            "drive_id": f"drive_{index}",
            "path_on_host": drive.path,
            "is_root_device": False,  # the command line says which is: this adds root= by itself
            "is_read_only": drive.readonly,
            "io_engine": "Async" if asynchronous else "Sync",
        }


class FirecrackerVmm:
    """A running Firecracker; see Vmm."""

    live = None

    def __init__(self, api: HttpApi) -> None:
        self._api = api

    async def state(self, timeout: float = 10) -> VmmState:
        """Return what Firecracker says of itself; see Vmm."""
        return (await self._describe(timeout))[0]

    async def pause(self, timeout: float = 10) -> None:
        """Stop the vCPUs; see Vmm."""
        await self._api.call("PATCH", "/vm", {"state": "Paused"}, timeout=timeout)

    async def resume(self, timeout: float = 10) -> None:
        """Let the vCPUs go on; see Vmm."""
        await self._api.call("PATCH", "/vm", {"state": "Resumed"}, timeout=timeout)

    async def power_off(self, timeout: float = 10) -> None:
        """Press Ctrl-Alt-Del, which a guest with a keyboard driver takes as a reboot; see Vmm."""
        action = {"action_type": "SendCtrlAltDel"}
        await self._api.call("PUT", "/actions", action, timeout=timeout)

    async def stats(self, timeout: float = 10) -> Mapping[str, int]:
        """Return `vcpus` and, where there is a balloon, `balloon_target`; see Vmm.

        How full the balloon is Firecracker tells only with its statistics on, and with those a
        guest can stall versions before 1.16.
        """
        match await self._api.call("GET", "/vm/config", timeout=timeout):
            case {
                "machine-config": {"vcpu_count": int(cpus)},
                "balloon": {"amount_mib": int(size)},
            }:
                return {"vcpus": cpus, "balloon_target": size * MIB}
            case {"machine-config": {"vcpu_count": int(cpus)}}:
                return {"vcpus": cpus}
        raise Failed("Firecracker described its configuration in a way that is unknown")

    async def prepare_snapshot(self, timeout: float = 10) -> None:
        """Begin the talk; see Vmm."""
        await self.state(timeout)

    async def snapshot(
        self, state: str, memory: str, *, diff: bool = False, timeout: float = 300
    ) -> None:
        """Write the paused VM's state and memory to files; see Vmm."""
        body = {
            "snapshot_type": "Diff" if diff else "Full",
            "snapshot_path": state,
            "mem_file_path": memory,
        }
        await self._api.call("PUT", "/snapshot/create", body, timeout=timeout)

    async def load(
        self,
        state: str,
        memory: str,
        *,
        track_dirty: bool = False,
        restore_mode: str = "",
        resume: bool = True,
        timeout: float = 60,
    ) -> None:
        """Load a snapshot into this fresh Firecracker; see Vmm."""
        body: dict[str, Any] = {
            "snapshot_path": state,
            "mem_backend": {"backend_type": "File", "backend_path": memory},
            "resume_vm": resume,
        }
        if track_dirty:
            _, numbers = await self._describe(timeout)
            body["track_dirty_pages" if numbers >= (1, 13) else "enable_diff_snapshots"] = True
        await self._api.call("PUT", "/snapshot/load", body, timeout=timeout)

    async def _describe(self, timeout: float) -> tuple[VmmState, tuple[int, ...]]:
        match await self._api.call("GET", "/", timeout=timeout):
            case {"state": str(state), "vmm_version": str(version)} if state in _STATES:
                numbers = re.findall(r"\d{1,9}", version)[:3]
                return _STATES[state], tuple(int(number) for number in numbers)
        raise Failed("Firecracker described itself in a way that is unknown")


def _check_possible(config: VmConfig) -> None:
    """Raise Unsupported for what no Firecracker does."""
    assert config.boot is not None
    if config.cpu > _MAXIMUM_CPUS:
        raise Unsupported(
            f"Firecracker gives a VM at most {_MAXIMUM_CPUS} CPUs, not {config.cpu}: {_OTHERS}"
        )
    if config.most_cpu > config.cpu:
        raise Unsupported(
            f"Firecracker cannot add CPUs later (max_cpu {config.max_cpu}, cpu {config.cpu}): "
            "cloud-hypervisor can; or write the same to both"
        )
    if config.most_memory > config.memory:
        raise Unsupported(
            f"Firecracker cannot add memory later (max_memory {show_size(config.max_memory)}, "
            f"memory {show_size(config.memory)}): cloud-hypervisor can; or write the same to both"
        )
    if any(drive.format != "raw" for drive in drives(config)):
        raise Unsupported(
            f"Firecracker has raw disks only, and this VM's is an overlay in qcow2 on the image "
            f"{config.image}: {_OTHERS}; or make a new VM with an image in raw (qemu-img convert "
            "-O raw)"
        )
    for disk in config.disks:
        if disk.serial:
            raise Unsupported(
                f"Firecracker's disks have no serial numbers ({disk.serial}): {_OTHERS}; without "
                "them the guest sees /dev/vda, /dev/vdb … in order"
            )


def _check_room(document: Mapping[str, Any], version: Version) -> None:
    """Raise Unsupported when there are more devices than interrupts, or no room to name them."""
    own = 2 if version.numbers >= (1, 15) else 1  # VMGenID, and VMClock from 1.15
    others = sum(device in document for device in ("balloon", "entropy"))
    most = _INTERRUPTS - own - others
    count = len(document["drives"])
    if count > most:
        raise Unsupported(
            f"Firecracker {version.text} has room for {most} disks here, not {count}: {_OTHERS}"
        )
    cmdline = document["boot-source"]["boot_args"]
    room = _CMDLINE_ROOM - _CMDLINE_PER_DEVICE * (count + others)
    if len(cmdline) > room:
        raise Unsupported(
            f"boot.cmdline has {len(cmdline)} characters and Firecracker room for {room}, beside "
            f"those that name its {count + others} devices: {_OTHERS}"
        )


def _balloon(memory: int, version: Version) -> dict[str, Any]:
    balloon: dict[str, Any] = {
        "amount_mib": memory // _BALLOON_SHARE // MIB,
        "deflate_on_oom": True,
    }
    if version.numbers >= (1, 14):
        balloon["free_page_reporting"] = True
    return balloon


def _process_memory(memory: int) -> int:
    """Return what the process may use: the guest's, page tables (twice), and 32 MiB of its own.

    Firecracker itself takes under 5 MiB; the kernel counts socket and disk buffers to it too.
    """
    return memory + memory // 64 + 32 * MIB


def _io_uring_allowed() -> bool:
    """Whether processes without privileges may use io_uring (sysctl of Linux 6.6 and later)."""
    try:
        with open("/proc/sys/kernel/io_uring_disabled") as file:
            return file.read().strip() == "0"
    except OSError:
        return True
