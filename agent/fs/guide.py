"""The text of `README`, for someone who just found the tree."""

from agent.model.config import KEYS

_TEXT = """\
Every directory in vms/ is a virtual machine. Whatever can be done to one is done by reading and
writing its files; a write returns when it is done, and fails with an errno when it was not.

    cd {mount}
    mkdir vms/web                                       create a VM
    echo '{{"memory": "1G", "boot": {{"kernel": "vmlinux"}}}}' > vms/web/config
    echo start > vms/web/state                          start it
    cat vms/web/state                                   how it is
    tail -f vms/web/console                             what it says
    echo hello > vms/web/console                        say something to it
    systemctl status cocoon-vm-web                      it is a unit of systemd
    echo stop > vms/web/state                           ask the guest to power off
    rmdir vms/web                                       remove it with its disks

    echo nightly > vms/web/snapshot                     take a snapshot
    cp snapshots/nightly.tar /backup/                   export it; cp it back to import
    echo nightly > vms/web/restore                      put the VM back to it
    mkdir vms/copy; echo nightly > vms/copy/from        make another VM of it
    echo start > vms/copy/state

    cp debian.qcow2 images/debian                       import a base image
    echo debian > vms/web/image                         start with a disk made from it

    echo '{{"name": "db", "boot": {{"kernel": "vmlinux"}}, "state": "start"}}' > create

state     write start, stop, kill, pause, resume or restart; read how it is
config    all keys at once, as JSON; each is a file of its own too:
{keys}
console   log of the guest's output; what is written goes to the guest
console.live
          the same as a stream: the last 64 KiB, then live
console.sock
          Unix socket: socat -,raw,echo=0,escape=0x1d UNIX:{mount}/vms/web/console.sock
snapshot, restore, hibernate
          write a snapshot's name: take it, go back to it, take it and stop
from      write a snapshot's name before the first start: the VM becomes its clone
error     why the last operation or the VM failed
info.json, stats, id, unit, pid
          what is known about it

When a write fails, read vms/<name>/error, or errors for those of everyone. events tells what
happened, one JSON object a line; events.live tells it as it happens. index.json is everything at
once, by-id/ finds a VM by its id. doctor says what this host lacks, and what to do about it.

chown, chgrp and chmod on a VM's directory give it to someone else. The files in it cannot be
removed; mv renames a VM that is stopped. Snapshots and images are files: rm deletes, mv renames.
"""


def guide(mount: str) -> str:
    """Return the text, for a tree mounted at `mount`."""
    width = max(map(len, KEYS)) + 2
    keys = "\n".join(f"          {name:{width}}{key.help}" for name, key in KEYS.items())
    return _TEXT.format(mount=mount, keys=keys)
