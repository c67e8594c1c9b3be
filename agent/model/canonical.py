"""The paths that every VMM sees inside its jail.

They are the same for all VMs and on all hosts, so nothing that a VMM writes into a snapshot
depends on where it ran. They lie below the directories that Cocoon's default settings trust
(`/var/lib/cocoon`, `/var/lib/cocoon/run`), so that its archives and ours are interchangeable.
"""

RUN = "/var/lib/cocoon/run"
VM = f"{RUN}/vm"
"""The VM's own directory: disks, configuration, memory and state files."""
SOCKETS = f"{RUN}/sock"
API_SOCKET = f"{SOCKETS}/api"
KERNEL = f"{RUN}/kernel"
INITRD = f"{RUN}/initrd"
DISKS = f"{RUN}/disk"
"""Host disks that root gave the VM, by number."""
BINARY = "/bin/vmm"
COW = "cow.raw"
"""File name of the VM's own writable disk."""
