"""What all VM units have in common: the drop-in `cocoon-vm-.service.d`, and why each line is there.

A file and not properties given over D-Bus: after any `daemon-reload` systemd reads transient units
from what it wrote down itself, and systemd 252 writes `ExecStop` with a prefix, a `$` in a command
and an empty `RestrictNamespaces` so that it does not read them back. The VMs that run would lose
their way to power off, their exit record, their restart and a part of their jail.
"""

import os

from agent.model import canonical
from agent.model.vm import UNIT_PREFIX

SLICE = "cocoon-vms.slice"
DIRECTORY = f"/run/systemd/system/{UNIT_PREFIX}.service.d"
FILE = "10-cocoon-host.conf"
"""Sorts before what an administrator adds in /etc/systemd/system/cocoon-vm-.service.d."""

_TEXT = """\
# Written by cocoon-host at its start, for every VM's unit.
# Own settings go to /etc/systemd/system/{prefix}.service.d/50-local.conf.

[Unit]
# A failed VM stays in `systemctl --failed` until it is started or removed.
CollectMode=inactive
# A VMM that dies at each start is given up, visibly, after five tries.
StartLimitIntervalSec=60
StartLimitBurst=5

[Service]
Type=exec
Slice={slice}
TimeoutStartSec=30
RestartSec=1
KillMode=mixed
OOMPolicy=stop

# The words come from the unit's EnvironmentFile, which is read again before each start.
ExecStart=@{binary} ${{BACKEND}} $ARGUMENTS $BOOT_ARGUMENTS
# On the host's root, as root. Both run without the agent.
RootDirectoryStartOnly=yes
# The VM's files are bound there, in the jail and, for the two commands below, on the host's root:
# what they land on is made here, and nowhere else.
TemporaryFileSystem={files}:ro
ExecStop=-+{python} -I -S {stop} ${{BACKEND}} ${{RUN_DIRECTORY}} ${{VM_UID}} ${{STOP_TIMEOUT}}
ExecStopPost=-+{python} -I -S {stop_post} ${{RUN_DIRECTORY}}

StandardError=journal
# Else a line of the VMM's that starts with <0> is an emergency, shown on every terminal.
SyslogLevelPrefix=no
# The unit itself keeps both FIFOs of its console: output and input survive the agent.
FileDescriptorStoreMax=2
NotifyAccess=main
# A core file would hold the guest's memory.
LimitCORE=0

# The jail: an empty root, a uid of the VM's own, no capability, no network, no foreign device.
MountAPIVFS=no
SupplementaryGroups=kvm
UMask=0077
DevicePolicy=closed
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
KeyringMode=private
LockPersonality=yes
MemoryDenyWriteExecute=yes
# Abstract sockets belong to a network namespace too.
PrivateNetwork=yes
IPAddressDeny=any
RestrictAddressFamilies=AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
ProtectClock=yes
ProtectHome=yes
ProtectKernelLogs=yes
ProtectSystem=strict
SystemCallArchitectures=native
# What no VMM needs. Each has a tighter filter of its own, which a list of what is allowed broke.
SystemCallErrorNumber=EPERM
SystemCallFilter=~@clock @cpu-emulation @debug @keyring @module @mount @obsolete @privileged
SystemCallFilter=~@raw-io @reboot @swap
# @resources but for sched_setaffinity: each unit denies it whose VMM ties no thread to a CPU. One
# cannot allow what is denied here, for this is read after the unit.
SystemCallFilter=~ioprio_set mbind migrate_pages move_pages nice sched_setattr sched_setparam
SystemCallFilter=~sched_setscheduler set_mempolicy set_mempolicy_home_node setpriority setrlimit
SystemCallFilter=~kcmp process_vm_readv process_vm_writev setns syslog unshare
SystemCallFilter=~mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink
SystemCallFilter=~msgctl msgget msgrcv msgsnd semctl semget semop semtimedop
SystemCallFilter=~shmat shmctl shmdt shmget
"""


def drop_in(helpers: str, python: str) -> str:
    """Return the drop-in; `python` runs the programs in the directory `helpers`."""
    return _TEXT.format(
        prefix=UNIT_PREFIX,
        slice=SLICE,
        binary=canonical.BINARY,
        files=canonical.ROOT,
        python=_word(python),
        stop=_word(f"{helpers}/stop.py"),
        stop_post=_word(f"{helpers}/stop_post.py"),
    )


def write_drop_in(text: str, directory: str = DIRECTORY) -> bool:
    """Put the drop-in in its place; return whether it was not there yet; raises OSError.

    systemd has to reload then (Manager.Reload), before the next VM starts.
    """
    path = f"{directory}/{FILE}"
    try:
        with open(path, encoding="utf-8") as file:
            if file.read() == text:
                return False
    except FileNotFoundError:
        os.makedirs(directory, mode=0o755, exist_ok=True)
    # systemd reads *.conf alone: never one that is half written.
    temporary = f"{path}.new"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
    os.rename(temporary, path)
    return True


def _word(text: str) -> str:
    """Return `text` as one word of a command in a unit file (systemd.service(5))."""
    for special, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$")):
        text = text.replace(special, escaped)
    return f'"{text}"'
