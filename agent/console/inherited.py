"""What the agent leaves to the next one: connections, in the fd store of its own unit.

Protocol: sd_notify(3), FDSTORE, and sd_listen_fds(3) for what comes back. systemd keeps them while
it starts the agent again, however that ended, and drops by itself those whose other end is gone.
"""

import os
import socket
import struct
from collections.abc import Mapping
from typing import Final

_FIRST: Final = 3  # SD_LISTEN_FDS_START
_PREFIX: Final = "console-"


class Inherited:
    """The connections that an earlier agent stored, by VM id, and the store for the next one."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Take over what systemd passed to this process; without systemd, do nothing at all."""
        self._notify_socket = environment.get("NOTIFY_SOCKET", "")
        self._found: dict[str, int] = {}
        if environment.get("LISTEN_PID") != str(os.getpid()):
            return
        for number, name in enumerate(environment.get("LISTEN_FDNAMES", "").split(":")):
            fd = _FIRST + number
            os.set_inheritable(fd, False)
            vm_id = name.removeprefix(_PREFIX)
            if name.startswith(_PREFIX) and vm_id not in self._found:
                self._found[vm_id] = fd
            else:
                os.close(fd)

    def take(self, vm_id: str) -> int | None:
        """Return the descriptor for the VM, the caller's from now on; None when there is none."""
        return self._found.pop(vm_id, None)

    def store(self, vm_id: str, fd: int) -> None:
        """Leave `fd` to the next agent, in place of what was left for the VM; errors cost that."""
        self.remove(vm_id)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))
        self._send(b"FDSTORE=1\nFDNAME=" + _name(vm_id), [rights])

    def remove(self, vm_id: str) -> None:
        """Leave nothing for the VM."""
        self._send(b"FDSTOREREMOVE=1\nFDNAME=" + _name(vm_id), [])

    def _send(self, message: bytes, ancillary: list[tuple[int, int, bytes]]) -> None:
        if not self._notify_socket:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
            notify.setblocking(False)
            try:
                notify.connect(_address(self._notify_socket))
                notify.sendmsg([message], ancillary)
            except OSError:
                return  # the console works all the same, until an agent dies


def _name(vm_id: str) -> bytes:
    return f"{_PREFIX}{vm_id}".encode()


def _address(path: str) -> str:
    """Return the address of a socket, of which `@` at the start tells that it is abstract."""
    return f"\0{path[1:]}" if path.startswith("@") else path
