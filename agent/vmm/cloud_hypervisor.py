"""Cloud Hypervisor: its command line and its API.

One command boots a guest, another one loads it; the API is for what comes afterwards, and loads a
guest with network interfaces, whose TAPs are handed over. Bodies and answers are those of
vmm/src/api/openapi/cloud-hypervisor.yaml, options those of vmm/src/config.rs.
"""

import json
import os
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from agent.model import canonical
from agent.model.ch_config import Nic
from agent.model.config import VmConfig
from agent.model.disks import drives, host_disk_binds
from agent.model.errors import Damaged, Failed, Invalid, Unsupported
from agent.model.launch import LaunchPlan
from agent.model.size import MIB
from agent.model.vm import FirmwareFormat, Vm

from . import tap, userfault
from .cloud_hypervisor_hardware import API, VCPU_THREAD, GuestHardware, disk_words, read_nics
from .driver import Capabilities, Directory, Version, VmmState, last_line
from .http import HttpApi
from .kvm import kvm_obstacle
from .program import Program, has_thread

DEFAULT_CMDLINE = "console=ttyS0 panic=1 loglevel=3"
"""`panic=1` makes a panic a reboot, which happens inside the process."""

MINIMUM_VERSION = (53, 0)
"""The oldest that was tried: the first that keeps what a serial socket says for who comes late."""

_BALLOON_FROM = 256 * MIB  # Cocoon's choice, as is the quarter
_BALLOON_SHARE = 4
_RANDOM = "/dev/urandom"
_OWN_MEMORY = 64 * MIB
_MOST_DISK_WORDS = 96 * 1024
"""Characters; all arguments are one variable of the environment, at most 128 KiB: execve(2)."""
_LOADING_THREAD = b"uffd-handler"
_CHAIN = "exited with the following chain of errors"
_LINK = re.compile(r"\s*\d+: (.+)")
_CHATTER = re.compile(r"> (WARN|INFO|DEBUG):")
_RESTORE_MODES = {"copy": "Copy", "ondemand": "OnDemand"}
_STATES = {
    "Created": VmmState.EMPTY,
    "Running": VmmState.RUNNING,
    "Shutdown": VmmState.EMPTY,
    "Paused": VmmState.PAUSED,
}


class CloudHypervisor:
    """The driver; `path` names the program where it is not on root's PATH."""

    name = "cloud-hypervisor"
    capabilities = Capabilities(
        snapshot=True,
        disk_serials=True,
        qcow2=True,
        first_boot_seed=True,
        serial_socket=True,
        firmware=FirmwareFormat.ELF,
        live_changes=True,
        queue_affinity=True,
    )

    def __init__(
        self, path: str = "", *, device: bool | None = None, unprivileged: bool | None = None
    ) -> None:
        """`device` and `unprivileged` are the ways to userfaultfd; None looks at the host."""
        self._program = Program(
            "cloud-hypervisor",
            path,
            title="Cloud Hypervisor",
            pattern=r"cloud-hypervisor v(\d+)\.(\d+)",
            minimum=MINIMUM_VERSION,
            remedy="see https://github.com/cloud-hypervisor/cloud-hypervisor/releases",
        )
        self._device = device
        self._unprivileged = unprivileged

    async def version(self) -> Version:
        """Return the program and its version; see Driver."""
        return await self._program.version()

    async def obstacle(self) -> str:
        """Return why KVM does not run guests here; see Driver."""
        return await kvm_obstacle()

    def plan(self, vm: Vm, version: Version, *, loads: bool = False, nics: int = 0) -> LaunchPlan:
        """Return what to launch for `vm`; see Driver."""
        config = vm.config
        devices = ["/dev/kvm", _RANDOM]
        mode = ""
        load_arguments: tuple[str, ...] = ()
        if loads:
            mode = self._restore_mode(config)
            if mode == "ondemand" and self._has_device():
                devices.append(userfault.DEVICE)
            source = f"source_url=file://{canonical.VM}"
            if nics:
                tap.check()
            else:
                load_arguments = ("--restore", f"{source},memory_restore_mode={mode},resume=true")
        boot_arguments: tuple[str, ...] = ()
        if config.boot is not None or not loads:
            boot_arguments = tuple(_boot_arguments(vm))
        return LaunchPlan(
            binary=version.binary,
            arguments=("--api-socket", canonical.API_SOCKET),
            boot_arguments=boot_arguments,
            load_arguments=load_arguments,
            files={},
            memory=config.memory + config.memory // 64 + _OWN_MEMORY,
            binds=host_disk_binds(config),
            devices=tuple(devices),
            dynamic=version.dynamic,
            serial_socket=True,
            restore_mode=mode,
            sets_affinity=config.ties_queues,
        )

    def check_state(self, state: bytes) -> None:
        """Raise Damaged for a state that is not whole; see Driver."""
        try:
            whole = isinstance(json.loads(state), dict)
        except (ValueError, RecursionError):
            whole = False
        if not whole:
            raise Damaged("state.json is damaged: it is not a JSON object")

    def answers(self, pid: int, *, loads: bool = False) -> bool:
        """Whether the process can be asked; see Driver.

        Its API is there before the guest is: the threads of the vCPUs are the last that is built.
        """
        return loads or has_thread(pid, VCPU_THREAD)

    def is_loading(self, pid: int) -> bool:
        """Whether memory is still loaded on demand; see Driver.

        A thread loads all that the guest has not asked for, and then ends.
        """
        return has_thread(pid, _LOADING_THREAD)

    def explain(self, lines: Sequence[str]) -> str:
        """Return the chain of causes, which follows one line each; see Driver."""
        for number, line in reversed(list(enumerate(lines))):
            if _CHAIN in line:
                links = [_LINK.fullmatch(after) for after in lines[number + 1 :]]
                causes = [link[1] for link in links if link]
                if causes:
                    return ": ".join(causes)
        return last_line([line for line in lines if not _CHATTER.search(line)])

    @asynccontextmanager
    async def connect(
        self, socket: int, directory: Directory
    ) -> AsyncIterator["CloudHypervisorVmm"]:
        """Talk to a running Cloud Hypervisor; see Driver."""
        yield CloudHypervisorVmm(HttpApi(socket, "Cloud Hypervisor"), directory)

    def _has_device(self) -> bool:
        return userfault.device_opens() if self._device is None else self._device

    def _restore_mode(self, config: VmConfig) -> str:
        """Return how memory is loaded; raise Unsupported for a way that is named and not there."""
        if config.restore_mode == "copy":
            return "copy"
        unprivileged = self._unprivileged
        if unprivileged is None:
            unprivileged = userfault.is_unprivileged()
        if unprivileged or self._has_device():
            return "ondemand"
        if config.restore_mode == "ondemand":
            raise Unsupported(
                f"memory cannot be loaded on demand on this host: {userfault.REMEDY}; or set "
                "restore_mode to copy, or to auto, which copies here"
            )
        return "copy"


class CloudHypervisorVmm:
    """A running Cloud Hypervisor; see Vmm."""

    def __init__(self, api: HttpApi, directory: Directory) -> None:
        """`directory` lends the VM's directory."""
        self._api = api
        self._directory = directory

    @property
    def live(self) -> GuestHardware:
        """What changes the hardware of the guest; see Vmm."""
        return GuestHardware(self._api, self._directory)

    async def state(self, timeout: float = 10) -> VmmState:
        """Return what Cloud Hypervisor says of itself; see Vmm."""
        try:
            found = await self._info(timeout)
        except Failed:
            # It refuses to describe a VM that it has not got. One that is gone refuses this too.
            await self._get("vmm.ping", timeout)
            return VmmState.EMPTY
        match found:
            case {"state": str(state)} if state in _STATES:
                return _STATES[state]
        raise _unknown("its state")

    async def pause(self, timeout: float = 10) -> None:
        """Stop the vCPUs; see Vmm."""
        await self._reach("vm.pause", VmmState.PAUSED, timeout)

    async def resume(self, timeout: float = 10) -> None:
        """Let the vCPUs go on; see Vmm."""
        await self._reach("vm.resume", VmmState.RUNNING, timeout)

    async def power_off(self, timeout: float = 10) -> None:
        """Press the power button, which a guest with ACPI hears; see Vmm."""
        await self._put("vm.power-button", None, timeout)

    async def stats(self, timeout: float = 10) -> Mapping[str, int]:
        """Return `vcpus` and, where there is a balloon, `balloon_target`; see Vmm."""
        match await self._config(timeout):
            case {"cpus": {"boot_vcpus": int(cpus)}, "balloon": {"size": int(size)}}:
                return {"vcpus": cpus, "balloon_target": size}
            case {"cpus": {"boot_vcpus": int(cpus)}}:
                return {"vcpus": cpus}
        raise _unknown("its CPUs")

    async def prepare_snapshot(self, timeout: float = 10) -> None:
        """Begin the talk; see Vmm."""
        await self.state(timeout)

    async def snapshot(
        self, state: str, memory: str, *, diff: bool = False, timeout: float = 300
    ) -> None:
        """Write the paused VM's state and memory beside each other; see Vmm."""
        where = f"file://{os.path.dirname(state)}"
        await self._put("vm.snapshot", {"destination_url": where}, timeout)

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
        """Wait until the snapshot is loaded that the command line named, or load one; see Vmm."""
        found = await self.state(timeout)  # answered in turn, so after that
        if found is VmmState.EMPTY:
            nics = await trio.to_thread.run_sync(read_nics, self._directory)
            if not nics:
                raise Failed("Cloud Hypervisor has loaded no guest")
            await self._restore(state, nics, restore_mode, timeout)
            found = VmmState.PAUSED
        if resume and found is VmmState.PAUSED:
            await self.resume(timeout)

    async def _restore(
        self, state: str, nics: Sequence[Nic], restore_mode: str, timeout: float
    ) -> None:
        """Load a snapshot with its network interfaces connected to nothing; it stays paused."""
        body = {
            "source_url": f"file://{os.path.dirname(state)}",
            "memory_restore_mode": _RESTORE_MODES[restore_mode],
            # RestoredNetConfig of vmm/src/config.rs, which the description leaves out.
            "net_fds": [{"id": nic.id, "num_fds": nic.queue_pairs} for nic in nics],
        }
        async with tap.unconnected([nic.queue_pairs for nic in nics]) as descriptors:
            await self._put("vm.restore", body, timeout, descriptors)

    async def _config(self, timeout: float) -> Any:
        match await self._info(timeout):
            case {"config": dict(config)}:
                return config
        raise _unknown("its configuration")

    async def _info(self, timeout: float) -> Any:
        return await self._get("vm.info", timeout)

    async def _reach(self, command: str, state: VmmState, timeout: float) -> None:
        """Run a command that is refused when it has nothing to do."""
        try:
            await self._put(command, None, timeout)
        except Failed:
            if await self.state(timeout) is not state:
                raise

    async def _get(self, path: str, timeout: float) -> Any:
        return await self._api.call("GET", f"{API}/{path}", timeout=timeout)

    async def _put(
        self,
        path: str,
        body: Mapping[str, Any] | None,
        timeout: float,
        descriptors: Sequence[int] = (),
    ) -> None:
        target = f"{API}/{path}"
        await self._api.call("PUT", target, body, descriptors=descriptors, timeout=timeout)


def _unknown(what: str) -> Failed:
    return Failed(f"Cloud Hypervisor described {what} in a way that is unknown")


def _boot_arguments(vm: Vm) -> list[str]:
    """Return the whole machine, one option after another."""
    config, boot = vm.config, vm.config.boot
    if boot is None:
        raise Invalid('there is nothing to boot: write {"kernel": …} or {"firmware": …} to boot')
    _check_possible(config)
    words = [
        *("--cpus", f"boot={config.cpu},max={config.most_cpu}"),
        *("--memory", _memory_words(config)),
        *("--rng", f"src={_RANDOM}"),
        "--watchdog",
        *("--serial", f"socket={canonical.CONSOLE_SOCKET}"),
        *("--console", "off"),
    ]
    if boot.firmware:
        words += ["--firmware", canonical.FIRMWARE]
    else:
        words += ["--kernel", canonical.KERNEL, "--cmdline", boot.cmdline or DEFAULT_CMDLINE]
        words += ["--initramfs", canonical.INITRD] if boot.initrd else []
    if config.memory >= _BALLOON_FROM:
        size = config.memory // _BALLOON_SHARE
        words += ["--balloon", f"size={size},deflate_on_oom=on,free_page_reporting=on"]
    disks = [disk_words(drive, config) for drive in drives(config, seed=bool(vm.seed))]
    if sum(map(len, disks)) > _MOST_DISK_WORDS:
        raise Invalid(
            f"queue_affinity of VM {vm.name} is too long for a command line with {len(disks)} "
            "disks: name CPUs that follow each other, or fewer"
        )
    return [*words, "--disk", *disks] if disks else words


def _memory_words(config: VmConfig) -> str:
    later = config.most_memory - config.memory
    return f"size={config.memory}" + (f",hotplug_size={later}" if later else "")


def _check_possible(config: VmConfig) -> None:
    """Raise Unsupported or Invalid for what this backend does not do."""
    if config.track_dirty:
        raise Unsupported(
            "Cloud Hypervisor keeps no record of changed memory: set track_dirty to no, or "
            "hypervisor to firecracker"
        )
