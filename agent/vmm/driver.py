"""What a backend must offer: one driver a VMM program, one connection a running VMM."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from agent.model.config import VmConfig
from agent.model.disks import Drive
from agent.model.launch import LaunchPlan
from agent.model.vm import Vm

Directory = Callable[[], AbstractContextManager[int]]
"""Lends a descriptor of the VM's directory, `canonical.VM` in the jail; raises CocoonError."""


@dataclass(frozen=True, slots=True)
class Version:
    """The VMM program that was found, and what it calls itself.

    `binary` is its path with links resolved; `dynamic` tells that it needs the host's shared
    libraries.
    """

    binary: str
    text: str
    numbers: tuple[int, ...]
    dynamic: bool = False


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do; the README's table is made from these.

    With `disk_boot` it has a firmware of its own, which boots a disk where no kernel is named. With
    `elf_kernel` it boots no bzImage: `canonical.KERNEL` must be the ELF that is packed in it. With
    `qcow2` it has disks in that format too, not only raw ones. With `serial_socket` the guest's
    console is `canonical.CONSOLE_SOCKET`, made by the VMM, else its standard input and output.
    `firmware` is the format of the firmware files that it boots, "" where it boots none. With
    `live_changes` its VMMs have `Vmm.live`, which also takes out network interfaces that came with
    a snapshot. With `queue_affinity` disks have a thread for each queue, which can be tied to CPUs
    of the host.
    """

    pause: bool = True
    snapshot: bool = False
    track_dirty: bool = False
    live_changes: bool = False
    queue_affinity: bool = False
    disk_serials: bool = False
    qcow2: bool = False
    first_boot_seed: bool = False
    disk_boot: bool = False
    elf_kernel: bool = False
    serial_socket: bool = False
    firmware: str = ""


class VmmState(StrEnum):
    """What the VMM says of itself; `EMPTY` has no guest yet."""

    EMPTY = "empty"
    RUNNING = "running"
    PAUSED = "paused"


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a guest has while it runs.

    `cpu` are the vCPUs that exist, `claimed_cpu` those that a snapshot or a reboot would go on
    with, `least_cpu` how few there may be. `memory` is in bytes. `disks` are those of the disks
    asked about that the guest has, `leaving` those of them that it was asked to let go of.
    """

    cpu: int
    claimed_cpu: int
    least_cpu: int
    memory: int
    disks: frozenset[Drive] = frozenset()
    leaving: frozenset[Drive] = frozenset()


class LiveChanges(Protocol):
    """What changes the hardware of a guest that runs; its calls raise as those of `Vmm`.

    What is given is there when the call returns, and the guest's to make use of. What is taken
    away is a request to the guest: `hardware` tells when it has let go.
    """

    async def hardware(self, pid: int, drives: Iterable[Drive], timeout: float = 10) -> Hardware:
        """Return what the guest has; `pid` is the VMM's process, `drives` what to look for."""
        ...

    def check(self, now: Hardware, config: VmConfig) -> None:
        """Raise Unsupported or Invalid when a guest that has `now` cannot come to `config`."""
        ...

    async def set_cpus(self, cpu: int, timeout: float = 10) -> None:
        """Give the guest vCPUs, or ask it for them; raise Busy while it owes some."""
        ...

    async def set_memory(self, memory: int, timeout: float = 10) -> None:
        """Give the guest memory, to have so many bytes then."""
        ...

    async def add_disk(self, drive: Drive, config: VmConfig, timeout: float = 10) -> None:
        """Give the guest, which has the CPUs of `config`, a disk, whose file is there."""
        ...

    async def remove_disk(self, drive: Drive, timeout: float = 10) -> None:
        """Ask the guest to let go of a disk."""
        ...

    async def remove_nics(self, timeout: float = 10) -> None:
        """Ask the guest to let go of the network interfaces that came with its snapshot."""
        ...

    async def leaving_nics(self, timeout: float = 10) -> tuple[str, ...]:
        """Return the ids of those that it has not let go of."""
        ...


class Vmm(Protocol):
    """A running VMM, reached over its API socket.

    Every call raises Failed with the VMM's own message or because it is gone, TimedOut when it does
    not answer within `timeout` seconds, or Unsupported. Paths are those of the jail.
    """

    @property
    def live(self) -> LiveChanges | None:
        """What changes the hardware of the guest, None where the VMM cannot."""
        ...

    async def state(self, timeout: float = 10) -> VmmState:
        """Return what the VMM says of itself.

        A VMM that was started with a guest answers only once the guest runs or could not be built.
        """
        ...

    async def pause(self, timeout: float = 10) -> None:
        """Stop the vCPUs; a paused VMM stays so."""
        ...

    async def resume(self, timeout: float = 10) -> None:
        """Let the vCPUs go on; a running VMM stays so."""
        ...

    async def power_off(self, timeout: float = 10) -> None:
        """Ask the guest to power off; returns when it was asked, not when it did.

        A paused guest sees the request once it is resumed.
        """
        ...

    async def stats(self, timeout: float = 10) -> Mapping[str, int]:
        """Return the VMM's own figures: `vcpus`, and `balloon_target` in bytes if it has one."""
        ...

    async def prepare_snapshot(self, timeout: float = 10) -> None:
        """Do what `snapshot` would do first, but while the guest still runs."""
        ...

    async def snapshot(
        self, state: str, memory: str, *, diff: bool = False, timeout: float = 300
    ) -> None:
        """Write the paused VM's state and memory to the files `state` and `memory`.

        They have the names of `STATE_FILES`; what else is named there comes beside them.

        With `diff`, `memory` becomes a sparse file of the guest's size that holds only what changed
        since the last snapshot (or load), in a VM with `track_dirty`. Whatever the outcome, the
        record of changes starts afresh.
        """
        ...

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
        """Load a snapshot into an empty VMM and, with `resume`, let it run.

        One whose arguments say what to load does so by itself, and is waited for. `restore_mode` is
        that of the plan.

        The file `memory` must stay as it is while the VM runs.
        """
        ...


def last_line(lines: Sequence[str]) -> str:
    """Return the last of a VMM's lines of error output, which most often says why it ended."""
    return lines[-1].strip() if lines else ""


class Driver(Protocol):
    """One VMM program."""

    name: str
    capabilities: Capabilities

    async def version(self) -> Version:
        """Return the program and its version; raise Missing or Unsupported, with the remedy.

        Cheap after the first call, until the program changes.
        """
        ...

    async def obstacle(self) -> str:
        """Return why this host runs no ordinary guests of this VMM's, "" when it does.

        A VM that names its backend is started all the same.
        """
        ...

    def plan(self, vm: Vm, version: Version, *, loads: bool = False, nics: int = 0) -> LaunchPlan:
        """Return what to launch for `vm`; raise Unsupported for what this backend cannot do.

        With `loads` its first start loads a snapshot, of a guest with `nics` network interfaces: to
        have nothing to boot is no error then, and leaves `boot_arguments` empty.

        Kernel, initrd and firmware are expected at `canonical.KERNEL`, `canonical.INITRD` and
        `canonical.FIRMWARE`, as `vm.config.boot` names them; binding them there is the caller's
        part, as is to ask for no firmware of a format that `capabilities` does not have.
        """
        ...

    def check_state(self, state: bytes) -> None:
        """Raise Damaged when `state`, what `Vmm.snapshot` wrote to its file, is not whole.

        Raise Unsupported when it is, and this host cannot load it all the same. Takes some
        milliseconds: callers run it in a thread.
        """
        ...

    def answers(self, pid: int, *, loads: bool = False) -> bool:
        """Whether the process `pid`, launched to boot a guest, has come so far as to be asked.

        Asking a VMM that still builds its guest may cost the message with which it would fail. Also
        false when the process is gone. Looks at /proc, does not wait. With `loads` it was launched
        to load one, and is yet to be told what.
        """
        ...

    def is_loading(self, pid: int) -> bool:
        """Whether the process `pid` still loads memory beside its guest, and takes no snapshot.

        Looks at /proc, does not wait.
        """
        ...

    def explain(self, lines: Sequence[str]) -> str:
        """Return what the last lines of a VMM's error output say of why it ended, "" for nothing.

        They are the VMM's words, of which none may be trusted.
        """
        ...

    def connect(self, socket: int, directory: Directory) -> AbstractAsyncContextManager[Vmm]:
        """Talk to a running VMM through `socket`, an O_PATH descriptor of its API socket.

        It stays the caller's, and must stay open as long as the connection is used. From
        `directory` the driver opens what its VMM wants handed over.
        """
        ...
