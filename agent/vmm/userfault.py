"""Whether a VMM in its jail may have memory filled as the guest touches it: userfaultfd(2).

That takes a descriptor for faults of the kernel too, since KVM's are such: by the device, which
Linux has from 6.1 on and which must be the group kvm's (or everybody's), or by a sysctl.
"""

import grp
import os
import stat

DEVICE = "/dev/userfaultfd"
SYSCTL = "/proc/sys/vm/unprivileged_userfaultfd"
REMEDY = (
    f"give {DEVICE} (Linux 6.1 and later) to the group kvm, mode 0660, or set the sysctl "
    "vm.unprivileged_userfaultfd to 1"
)
_GROUP = "kvm"  # of all VMMs, by their unit


def device_opens(device: str = DEVICE) -> bool:
    """Whether a process of a VM's own uid, in the group kvm, may open the device; does not wait."""
    try:
        facts = os.stat(device)
        of_group = facts.st_gid == grp.getgrnam(_GROUP).gr_gid
    except (OSError, KeyError):
        return False
    wanted = stat.S_IRGRP | stat.S_IWGRP if of_group else stat.S_IROTH | stat.S_IWOTH
    return stat.S_ISCHR(facts.st_mode) and facts.st_mode & wanted == wanted


def is_unprivileged(sysctl: str = SYSCTL) -> bool:
    """Whether every process may have such a descriptor without the device; does not wait."""
    try:
        with open(sysctl) as file:
            return file.read().strip() == "1"
    except OSError:
        return False
