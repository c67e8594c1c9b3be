"""QEMU: its command line and its QMP commands; with KVM where that works, else it translates.

The guest's memory is the file `mem` in the VM's directory, shared with whoever opens it. So a
snapshot is that file, copied while the guest stands still, and a small stream with all else; and
what is loaded is a copy of the file. Everything of the machine that such a stream relies on is
written out here: type, CPU model, and each device's place on the bus.
"""

import functools
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import trio

from agent.model import canonical
from agent.model.config import VmConfig
from agent.model.disks import SEED_DRIVE, Drive, drives, host_disk_binds
from agent.model.errors import Failed, Invalid, Unsupported
from agent.model.launch import LaunchPlan
from agent.model.size import MIB, show_size
from agent.model.vm import FirmwareFormat, Vm

from .driver import Capabilities, Directory, Version, VmmState, last_line
from .kvm import kvm_obstacle
from .program import Program
from .qemu_state import check_room, check_state, create_state, open_state, seal_state
from .qmp import QmpConnection, open_qmp

T = TypeVar("T")

DEFAULT_CMDLINE = "console=ttyS0 panic=1 loglevel=3"
"""`panic=1` makes a panic a reboot, which ends the process."""

MINIMUM_VERSION = (7, 2)
"""The oldest that was tried: Debian 12's."""

MACHINE = "pc-q35-7.2"
"""The machine type of every VM: one that all versions from the oldest on have, so that a newer QEMU
loads what an older one saved."""

MEMORY = "mem"
"""Name of the file in the VM's directory that is the guest's memory."""

_OWN_MEMORY = 128 * MIB  # with 40 MiB on top of the guest's it was killed
_TRANSLATED = 32  # MiB of translated code, the default would be a gigabyte
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_DATA = ("/usr/share/qemu", "/usr/share/seabios")
_NOT_YET = "Migration is not finalized yet"
_MOMENT = 0.001  # seconds
_FIRST_DISK = 8  # slot on the bus; below are the other devices
_SEED = 30  # its slot: the last, so that the guest finds the disk last
_STREAM = "cocoon-state"
_BANDWIDTH = 1 << 40  # bytes a second: do not hold the stream back
_STATES = {
    "running": VmmState.RUNNING,
    "inmigrate": VmmState.EMPTY,
    "prelaunch": VmmState.PAUSED,
    "paused": VmmState.PAUSED,
    "postmigrate": VmmState.PAUSED,
    "finish-migrate": VmmState.PAUSED,
    "save-vm": VmmState.PAUSED,
    "restore-vm": VmmState.PAUSED,
    "suspended": VmmState.PAUSED,
}


class Qemu:
    """The driver; `path` names the program where it is not on root's PATH."""

    name = "qemu"
    capabilities = Capabilities(
        snapshot=True,
        disk_serials=True,
        qcow2=True,
        first_boot_seed=True,
        disk_boot=True,
        firmware=FirmwareFormat.FLASH,
    )

    def __init__(self, path: str = "", *, accelerated: bool | None = None) -> None:
        """`accelerated` says whether guests run on KVM; None asks it, once."""
        self._program = Program(
            "qemu-system-x86_64",
            path,
            title="QEMU",
            pattern=r"QEMU emulator version (\d+)\.(\d+)\.(\d+)",
            minimum=MINIMUM_VERSION,
            remedy="install a newer one",
        )
        self._kvm = accelerated

    async def version(self) -> Version:
        """Return the program and its version; see Driver."""
        version = await self._program.version()
        if self._kvm is None:
            self._kvm = not await kvm_obstacle()
        return version

    async def obstacle(self) -> str:
        """Return "": without KVM it translates; see Driver."""
        return ""

    def plan(self, vm: Vm, version: Version, *, loads: bool = False, nics: int = 0) -> LaunchPlan:
        """Return what to launch for `vm`; see Driver."""
        config = vm.config
        if config.boot is None and not config.is_disk_boot and not loads:
            raise Invalid(
                'there is nothing to boot: write {"kernel": …} or {"firmware": …} to boot, or set '
                "image"
            )
        _check_possible(config)
        boot = _boot(config)
        accelerator = "/dev/kvm" if self._kvm else None
        return LaunchPlan(
            binary=version.binary,
            arguments=(*self._machine(vm), *_devices(vm)),
            boot_arguments=boot,
            # With a kernel here too: the option ROM that boots it is a part of the machine.
            load_arguments=(*boot, "-incoming", "defer"),
            files={},
            memory=config.memory + config.memory // 64 + _OWN_MEMORY,
            binds=host_disk_binds(config),
            devices=("/dev/null", *([accelerator] if accelerator else [])),
            dynamic=version.dynamic,
        )

    def check_state(self, state: bytes) -> None:
        """Raise Damaged or Unsupported for a state that cannot be loaded; see Driver."""
        check_state(state, kvm=self._kvm)

    def answers(self, pid: int, *, loads: bool = False) -> bool:
        """Whether the process can be asked; see Driver.

        QEMU greets only once its machine is complete, and when that fails it ends with a message.
        """
        return os.path.exists(f"/proc/{pid}")

    def is_loading(self, pid: int) -> bool:
        """Never; see Driver."""
        return False

    def explain(self, lines: Sequence[str]) -> str:
        """Return the last line; see Driver."""
        return last_line(lines)

    @asynccontextmanager
    async def connect(self, socket: int, directory: Directory) -> AsyncIterator["QemuVmm"]:
        """Talk to a running QEMU; see Driver."""
        async with open_qmp(socket, "QEMU") as qmp:
            yield QemuVmm(qmp, directory)

    def _machine(self, vm: Vm) -> list[str]:
        config = vm.config
        if self._kvm:
            accelerator = ["-accel", "kvm", "-cpu", "host,migratable=on"]
        else:
            # split-wx: the unit denies memory that is writable and executable.
            accelerator = ["-accel", f"tcg,tb-size={_TRANSLATED},split-wx=on", "-cpu", "Nehalem-v1"]
        memory = f"memory-backend-file,id=memory,size={config.memory},share=on"
        return [
            "-nodefaults",
            "-no-user-config",
            # A guest that reboots or panics ends the process, as with other VMMs.
            "-no-reboot",
            *("-display", "none"),
            *(word for directory in _DATA for word in ("-L", directory)),
            *("-sandbox", _SANDBOX),
            *accelerator,
            *("-object", f"{memory},mem-path={canonical.VM}/{MEMORY}"),
            *("-machine", f"{MACHINE},memory-backend=memory,usb=off,hpet=off"),
            *("-m", f"{config.memory // MIB}M"),
            *("-smp", f"{config.cpu},sockets=1,cores={config.cpu},threads=1"),
            *("-chardev", "stdio,id=console,signal=off"),
            *("-serial", "chardev:console"),
            *("-qmp", f"unix:{canonical.API_SOCKET},server=on,wait=off"),
        ]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What is known before a snapshot: whether the guest stands still since one, and on what."""

    is_saved: bool
    on_kvm: bool


class QemuVmm:
    """A running QEMU; see Vmm."""

    live = None

    def __init__(self, qmp: QmpConnection, directory: Directory) -> None:
        """`directory` lends the VM's directory."""
        self._qmp = qmp
        self._directory = directory
        self._prepared: _Prepared | None = None

    async def state(self, timeout: float = 10) -> VmmState:
        """Return what QEMU says of itself; see Vmm."""
        return _STATES[await self._status(timeout)]

    async def pause(self, timeout: float = 10) -> None:
        """Stop the vCPUs; see Vmm."""
        await self._qmp.execute("stop", timeout=timeout)

    async def resume(self, timeout: float = 10) -> None:
        """Let the vCPUs go on; see Vmm."""
        deadline = trio.current_time() + timeout
        while True:
            try:
                await self._qmp.execute("cont", timeout=timeout)
                return
            except Failed as error:
                # QEMU says that a state is saved some time before it has done with that.
                if _NOT_YET not in str(error) or trio.current_time() > deadline:
                    raise
            await trio.sleep(_MOMENT)

    async def power_off(self, timeout: float = 10) -> None:
        """Press the power button, which a guest with ACPI hears; see Vmm."""
        await self._qmp.execute("system_powerdown", timeout=timeout)

    async def stats(self, timeout: float = 10) -> Mapping[str, int]:
        """Return `vcpus`; see Vmm."""
        match await self._qmp.execute("query-cpus-fast", timeout=timeout):
            case [*cpus]:
                return {"vcpus": len(cpus)}
        raise Failed("QEMU described its CPUs in a way that is unknown")

    async def prepare_snapshot(self, timeout: float = 10) -> None:
        """Tell QEMU what to save; see Vmm."""
        self._prepared = await self._prepare_saving(timeout)

    async def snapshot(
        self, state: str, memory: str, *, diff: bool = False, timeout: float = 300
    ) -> None:
        """Write the paused VM's state to a file; see Vmm. Its memory is a file already."""
        prepared = self._prepared or await self._prepare_saving(timeout)
        self._prepared = None
        if prepared.is_saved:
            # QEMU saves a guest once each time that it has stopped.
            await self._qmp.execute("cont", timeout=timeout)
            await self._qmp.execute("stop", timeout=timeout)
        file = await _in_thread(create_state, self._directory, _below(state))
        try:
            await self._hand_over(file, timeout)
            await self._qmp.execute("migrate", {"uri": f"fd:{_STREAM}"}, timeout=timeout)
            try:
                await self._finish("saved", timeout)
            except Failed:
                # QEMU 7.2 does not say why it could not write.
                await _in_thread(check_room, file)
                raise
            await _in_thread(seal_state, file, kvm=prepared.on_kvm)
        finally:
            os.close(file)

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
        """Load a snapshot, whose memory this QEMU was started with; see Vmm."""
        kvm = await self._prepare(timeout)
        file = await _in_thread(open_state, self._directory, _below(state), kvm=kvm)
        try:
            await self._hand_over(file, timeout)
        finally:
            os.close(file)
        await self._qmp.execute("migrate-incoming", {"uri": f"fd:{_STREAM}"}, timeout=timeout)
        await self._finish("loaded", timeout)
        if resume:
            await self.resume(timeout)

    async def _prepare_saving(self, timeout: float) -> _Prepared:
        status = await self._status(timeout)
        return _Prepared(status == "postmigrate", await self._prepare(timeout))

    async def _status(self, timeout: float) -> str:
        """Return QEMU's word for the state of a guest that can go on."""
        match await self._qmp.execute("query-status", timeout=timeout):
            case {"status": str(status)} if status in _STATES:
                return status
            case {"status": str(status)}:
                raise Failed(f"QEMU's guest cannot go on: {status}")
        raise Failed("QEMU described its state in a way that is unknown")

    async def _prepare(self, timeout: float) -> bool:
        """Make ready to save or load the guest; return whether it runs on KVM."""
        # Memory in a file stays out of the stream; and tell when it is done.
        wanted = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]
        *_, found = await self._qmp.execute_all(
            ("migrate-set-capabilities", {"capabilities": wanted}),
            ("migrate-set-parameters", {"max-bandwidth": _BANDWIDTH}),
            ("query-kvm", {}),
            timeout=timeout,
        )
        match found:
            case {"enabled": bool(enabled)}:
                return enabled
        raise Failed("QEMU described what runs its guest in a way that is unknown")

    async def _hand_over(self, file: int, timeout: float) -> None:
        await self._qmp.execute("getfd", {"fdname": _STREAM}, descriptor=file, timeout=timeout)

    async def _finish(self, done: str, timeout: float) -> None:
        ends = ("completed", "failed", "cancelled")
        if await self._qmp.wait_for("MIGRATION", "status", ends, timeout) == "completed":
            return
        reason = ""
        match await self._qmp.execute("query-migrate", timeout=timeout):
            case {"error-desc": str(words)}:
                reason = f": {words}"
        raise Failed(f"QEMU could not have its state {done}{reason}")


async def _in_thread(act: Callable[..., T], *args: object, **options: object) -> T:
    return await trio.to_thread.run_sync(functools.partial(act, *args, **options))


def _below(path: str) -> str:
    """Return a path of the jail relative to the VM's directory."""
    return os.path.relpath(path, canonical.VM)


def _boots_disks(config: VmConfig) -> bool:
    """Whether a firmware, QEMU's own or the one that is named, boots a disk."""
    return config.is_disk_boot or (config.boot is not None and bool(config.boot.firmware))


def _boot(config: VmConfig) -> tuple[str, ...]:
    """Return what boots the kernel, or else a disk; nothing where neither can be booted."""
    boot = config.boot
    if boot is None or boot.firmware:
        # As ROM: what the firmware would store in flash memory is gone when the process ends.
        firmware = ("-bios", canonical.FIRMWARE) if boot else ()
        # What is on the disks is looked through in their order, and nothing but them.
        return (*firmware, "-boot", "strict=on") if _boots_disks(config) else ()
    initrd = ("-initrd", canonical.INITRD) if boot.initrd else ()
    return ("-kernel", canonical.KERNEL, "-append", boot.cmdline or DEFAULT_CMDLINE, *initrd)


def _devices(vm: Vm) -> list[str]:
    """Return the devices; a snapshot relies on the place of each."""
    words = [
        *("-object", "rng-builtin,id=random"),
        *("-device", "virtio-rng-pci,rng=random,addr=2"),
        *("-device", "virtio-balloon-pci,addr=3,deflate-on-oom=on,free-page-reporting=on"),
        *("-device", "i6300esb,addr=4"),
        # A guest that was cloned or restored gets another one, and seeds its random numbers anew.
        *("-device", "vmgenid,guid=auto"),
    ]
    for index, drive in enumerate(drives(vm.config, seed=bool(vm.seed))):
        slot = _SEED if drive == SEED_DRIVE else _FIRST_DISK + index
        words += _disk(index, drive, slot, boots=_boots_disks(vm.config) and drive != SEED_DRIVE)
    return words


def _disk(index: int, drive: Drive, slot: int, *, boots: bool) -> list[str]:
    options = f"file={drive.path},format={drive.format},if=none,id=disk{index}"
    options += ",readonly=on" if drive.readonly else ",discard=unmap"
    if drive.backing is not None:
        # In place of what the header of a file says that a VMM has written to.
        options += f",backing.driver={drive.backing.format},backing.file.driver=file"
        options += f",backing.file.filename={drive.backing.path}"
    device = f"virtio-blk-pci,drive=disk{index},addr={slot:x}"
    device += f",serial={drive.serial}" if drive.serial else ""
    device += f",bootindex={index + 1}" if boots else ""
    return ["-drive", options, "-device", device]


def _check_possible(config: VmConfig) -> None:
    """Raise Unsupported for what this backend does not do."""
    if config.most_cpu > config.cpu:
        raise Unsupported(
            f"QEMU VMs get no CPUs later (max_cpu {config.max_cpu}, cpu {config.cpu}): "
            "cloud-hypervisor can; or write the same to both"
        )
    if config.most_memory > config.memory:
        raise Unsupported(
            f"QEMU VMs get no memory later (max_memory {show_size(config.max_memory)}, "
            f"memory {show_size(config.memory)}): cloud-hypervisor can; or write the same to both"
        )
    if config.track_dirty:
        raise Unsupported(
            "QEMU keeps no record of changed memory, and its snapshots need none: "
            "set track_dirty to no"
        )
