"""What must run for a VM, as values: the word between the room that knows VMMs and systemd's."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bind:
    """A file or device of the host and the path at which the VMM sees it in its jail."""

    source: str
    target: str
    readonly: bool = True


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What must run; it knows neither systemd nor host paths of the VM.

    `arguments` are given at every start of the process, `boot_arguments` only when it boots cold,
    `load_arguments` only when it loads a snapshot instead, as in a clone's first start. `files` are
    written, by name, into the VM's directory, which the VMM sees at `canonical.VM`. `memory` is
    what the process may use, in bytes: the guest's memory and the VMM's own. `dynamic` programs
    need the host's shared libraries. With `serial_socket` the guest's console is a socket that the
    VMM makes, else it is the process's standard input and output. `restore_mode` is how memory is
    loaded, where the VMM knows several ways. With `sets_affinity` the VMM ties threads of its own
    to CPUs of the host.
    """

    binary: str
    arguments: tuple[str, ...]
    boot_arguments: tuple[str, ...]
    files: Mapping[str, bytes]
    memory: int
    binds: tuple[Bind, ...] = ()
    devices: tuple[str, ...] = ("/dev/kvm",)
    dynamic: bool = False
    load_arguments: tuple[str, ...] = ()
    serial_socket: bool = False
    restore_mode: str = ""
    sets_affinity: bool = False
