"""The paths that every VMM sees inside its jail.

They are the same for all VMs and on all hosts, so nothing that a VMM writes into a snapshot
depends on where it ran. They lie below the directories that Cocoon's default settings trust
(`/var/lib/cocoon`, `/var/lib/cocoon/run`), so that its archives and ours are interchangeable.
"""

ROOT = "/var/lib/cocoon"
"""Below this lies all that a VM is given as files."""
RUN = f"{ROOT}/run"
VM = f"{RUN}/vm"
"""The VM's own directory: disks, configuration, memory and state files."""
SOCKETS = f"{RUN}/sock"
API_SOCKET = f"{SOCKETS}/api"
CONSOLE_SOCKET = f"{SOCKETS}/console"
"""The guest's serial console, of VMMs that have it as a socket."""
KERNEL = f"{RUN}/kernel"
INITRD = f"{RUN}/initrd"
FIRMWARE = f"{RUN}/firmware"
DISKS = f"{RUN}/disk"
"""Host disks that root gave the VM, by number."""
BINARY = f"{RUN}/vmm"
COW = "cow.raw"
"""File name of the VM's own writable disk."""
OVERLAY = "overlay.qcow2"
"""File name of the same where it holds what differs from a base image."""
SEED = "cidata.img"
"""File name of the disk from which cloud-init learns what to do at a first boot."""
BASES = f"{ROOT}/cloudimg/blobs"
"""Base images, read-only: where Cocoon keeps its own, so that overlays find theirs there too."""


def base_path(digest: str, kind: str) -> str:
    """Return where a VMM sees the base image with that SHA-256, in hex; `kind` is its format."""
    return f"{BASES}/{digest}.{kind}"
