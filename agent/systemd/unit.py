"""The transient unit of one VM: the properties that differ from VM to VM.

What all VMs' units have in common is in `drop_in`. Names and signatures are those of
org.freedesktop.systemd1(5), as systemd 252 has them; where systemd.exec(5) and its neighbours call
a property otherwise, it is for the unit of time (`TimeoutStopSec`, `TimeoutStopUSec`).
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dbus_next.signature import Variant

from agent.model import canonical
from agent.model.config import MAXIMUM_DISKS
from agent.model.launch import Bind, LaunchPlan
from agent.model.vm import Vm

Property = tuple[str, Variant]

SECOND = 1_000_000
STOP_GRACE = 5 * SECOND
"""What ExecStop may take beyond the VM's stop_timeout: `helpers/stop.py` kills before that."""


@dataclass(frozen=True, slots=True)
class Paths:
    """Where on the host the parts of one VM lie.

    `run` is the VM's run directory, root's alone; `directory` has its disks; `jail` is the skeleton
    that all VMs share.
    """

    run: str
    directory: str
    jail: str

    @property
    def sockets(self) -> str:
        return f"{self.run}/sock"

    @property
    def environment(self) -> str:
        return f"{self.run}/environment"

    @property
    def console_input(self) -> str:
        return f"{self.run}/console.in"

    @property
    def console_output(self) -> str:
        return f"{self.run}/console.out"

    @property
    def exit_record(self) -> str:
        return f"{self.run}/exit"


def vm_unit(vm: Vm, plan: LaunchPlan, paths: Paths, binds: Iterable[Bind] = ()) -> list[Property]:
    """Return the properties of the VM's unit, for StartTransientUnit.

    `binds` come on top of the plan's: kernel, initrd, disks of the host. The unit needs the drop-in
    (`drop_in.write_drop_in`), the environment file, the skeleton, the run directory, the user and
    both FIFOs in their places.
    """
    config = vm.config
    program = os.path.basename(plan.binary)
    mounts = _mounts(plan, paths, binds)
    return [
        ("Description", Variant("s", f"microVM {vm.name} ({program})")),
        ("EnvironmentFiles", Variant("a(sb)", [[paths.environment, False]])),
        ("TimeoutStopUSec", Variant("t", config.stop_timeout * SECOND + STOP_GRACE)),
        ("Restart", Variant("s", config.restart)),
        *_standard_streams(plan, paths),
        ("SyslogIdentifier", Variant("s", program)),
        (
            "LogExtraFields",
            Variant("aay", [f"VM_NAME={vm.name}".encode(), f"VM_ID={vm.id}".encode()]),
        ),
        ("User", Variant("s", str(vm.uid))),
        ("RootDirectory", Variant("s", paths.jail)),
        ("BindPaths", _bind_property(bind for bind in mounts if not bind.readonly)),
        ("BindReadOnlyPaths", _bind_property(bind for bind in mounts if bind.readonly)),
        ("DeviceAllow", Variant("a(ss)", _devices(plan, mounts))),
        # What the drop-in denies comes on top.
        *([] if plan.sets_affinity else [_denied("sched_setaffinity")]),
        *resource_limits(vm, plan.memory),
        # Some VMMs have a thread for each queue of a disk, of which there is one a CPU.
        ("TasksMax", Variant("t", 64 + (8 + MAXIMUM_DISKS) * config.most_cpu)),
    ]


def _denied(*calls: str) -> Property:
    return ("SystemCallFilter", Variant("(bas)", [False, list(calls)]))


def _standard_streams(plan: LaunchPlan, paths: Paths) -> list[Property]:
    if plan.serial_socket:
        return [
            ("StandardInput", Variant("s", "null")),
            ("StandardOutput", Variant("s", "journal")),
        ]
    return [
        ("StandardInputFile", Variant("s", paths.console_input)),
        ("StandardOutputFile", Variant("s", paths.console_output)),
    ]


def resource_limits(vm: Vm, memory: int) -> list[Property]:
    """Return what the unit may use: `memory`, in bytes, and its share of the host's CPUs."""
    return [
        *memory_limit(memory),
        ("CPUWeight", Variant("t", min(100 * vm.config.cpu, 10_000))),
    ]


def running_properties(vm: Vm) -> list[Property]:
    """Return the CPU quota: of a VM that boots from the start, else once its guest runs.

    From the first instruction on it would throttle the restore of a snapshot; but to set it later
    (SetUnitProperties) costs as much as a tenth of a start. Half a CPU beyond the guest's own is
    for the VMM's devices.
    """
    quota = vm.config.cpu * SECOND + SECOND // 2
    return [("CPUQuotaPerSecUSec", Variant("t", quota))]


def memory_limit(limit: int) -> list[Property]:
    """Return what SetUnitProperties sets to give the unit another memory limit, in bytes.

    The page cache of a snapshot that is being written counts against it.
    """
    return [("MemoryMax", Variant("t", limit))]


def environment_file(vm: Vm, plan: LaunchPlan, paths: Paths, boot: bool = True) -> bytes:
    """Return the unit's environment file, from which the drop-in's commands take their words.

    With `boot` it has the arguments with which the VMM boots its guest, else those with which it
    loads one. Raises ValueError for an argument with a control character, which no environment file
    can carry.
    """
    values = {
        "BACKEND": vm.hypervisor,
        "ARGUMENTS": _words(plan.arguments),
        "BOOT_ARGUMENTS": _words(plan.boot_arguments if boot else plan.load_arguments),
        "RUN_DIRECTORY": paths.run,
        "VM_UID": str(vm.uid),
        "STOP_TIMEOUT": str(vm.config.stop_timeout),
    }
    return "".join(
        f"{name}={_quoted(value, _IN_FILE)}\n" for name, value in values.items()
    ).encode()


_IN_FILE = '\\"$`'
"""What needs a backslash in a quoted value (systemd.exec(5), EnvironmentFile=)."""
_IN_WORD = '\\"'
"""What needs one in a quoted word of a variable that is split (systemd.service(5))."""


def _words(arguments: Sequence[str]) -> str:
    for argument in arguments:
        if not argument.isprintable():
            raise ValueError(f"argument {argument!r} has a control character")
    return " ".join(_quoted(argument, _IN_WORD) for argument in arguments)


def _quoted(text: str, special: str) -> str:
    return '"' + "".join("\\" + char if char in special else char for char in text) + '"'


def _mounts(plan: LaunchPlan, paths: Paths, binds: Iterable[Bind]) -> list[Bind]:
    """Return what is bound into the jail."""
    files = [*plan.binds, *binds]
    elsewhere = {bind.source for bind in files}
    return [
        Bind(paths.directory, canonical.VM, readonly=False),
        Bind(paths.sockets, canonical.SOCKETS, readonly=False),
        Bind(plan.binary, canonical.BINARY),
        # Writing to a device needs no writable mount.
        *(Bind(device, device) for device in plan.devices if device not in elsewhere),
        *(Bind(path, path) for path in ("/usr", "/lib", "/lib64") if plan.dynamic),
        *files,
    ]


def _bind_property(binds: Iterable[Bind]) -> Variant:
    # Not recursive: what is mounted below a source stays out of the jail.
    return Variant("a(ssbt)", [[bind.source, bind.target, False, 0] for bind in binds])


def _devices(plan: LaunchPlan, mounts: Iterable[Bind]) -> list[list[str]]:
    """Return what the device cgroup lets through: the plan's devices, and disks of the host."""
    disks = {
        bind.source: "r" if bind.readonly else "rw"
        for bind in mounts
        if bind.source.startswith("/dev/") and bind.source != bind.target
    }
    return [[path, access] for path, access in (dict.fromkeys(plan.devices, "rw") | disks).items()]
