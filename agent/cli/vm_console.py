"""A VM's console as the tree has it: its log, its socket, and how the VM is."""

import os
import socket
from typing import Any, Final

from agent.model.errors import CocoonError, Failed, Missing, TimedOut
from agent.model.vm import WITH_PROCESS

from .mount import Away, Mount
from .table import printable

CONNECT_TIMEOUT: Final = 5.0
_WITH_PROCESS: Final = frozenset(state.value for state in WITH_PROCESS)


class NoProcess(CocoonError):
    """The VM has no console now; `is_over` tells that it is not about to have one."""

    def __init__(self, sentence: str, is_over: bool) -> None:
        super().__init__(sentence)
        self.is_over = is_over


class VmConsole:
    """The console of the VM that has this name now; its id says later which one that was."""

    def __init__(self, mount: Mount, name: str) -> None:
        self.name = name
        self._mount = mount
        self._id = mount.read("vms", name, "id").strip()

    def connect(self) -> socket.socket:
        """Return a connection to the socket, which does not block.

        Raises Away when there is no agent, Missing when the VM was removed, NoProcess, Denied, or
        TimedOut when the agent does not answer.
        """
        path = self._mount.join("by-id", self._id, "console.sock")
        try:
            # By descriptor: a socket's path has 107 bytes, and the agent's may be longer.
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            raise self._why_absent() from None
        except OSError as error:
            raise self._refusal(error) from error
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(CONNECT_TIMEOUT)
            connection.connect(f"/proc/self/fd/{place}")
            connection.setblocking(False)
        except OSError as error:
            connection.close()
            if isinstance(error, ConnectionRefusedError):
                raise Away(f"the agent that made the console of {self.name} is gone") from error
            if isinstance(error, TimeoutError | BlockingIOError):
                raise TimedOut("the agent does not answer: systemctl status cocoon-host") from error
            raise self._refusal(error) from error
        finally:
            os.close(place)
        return connection

    def log_end(self, size: int) -> bytes:
        """Return the last `size` bytes of the log."""
        try:
            with open(self._mount.join("by-id", self._id, "console"), "rb") as log:
                end = os.fstat(log.fileno()).st_size
                return os.pread(log.fileno(), size, max(0, end - size))
        except OSError as error:
            raise self._mount.refusal(error, f"vms/{self.name}/console") from error

    def ending(self) -> tuple[str, bool]:
        """Return how the VM ended, as a phrase, and whether it failed."""
        record = self._record()
        if record.get("state") == "error":
            return f"has failed: {printable(str(record.get('error')))}", True
        return f"has ended ({printable(str(record.get('reason')))})", False

    def _record(self) -> dict[str, Any]:
        record = self._mount.read_json("by-id", self._id, "info.json")
        if not isinstance(record, dict):
            raise Failed(f"the record of VM {self.name} has another shape than expected")
        return record

    def _why_absent(self) -> CocoonError:
        try:
            if not self._mount.name_of(self._id):
                return Missing(f"VM {self.name} was removed")
            state = str(self._record().get("state"))
        except CocoonError as error:
            return error
        if state in _WITH_PROCESS:
            return NoProcess(f"VM {self.name} is {state}: try again in a moment", is_over=False)
        sentence = f"VM {self.name} has no process, its state is {printable(state)}"
        remedy = f"echo start > {self._mount.join('vms', self.name, 'state')}"
        return NoProcess(f"{sentence}; start it with: {remedy}", is_over=True)

    def _refusal(self, error: OSError) -> CocoonError:
        return self._mount.refusal(error, f"vms/{self.name}/console.sock")
