"""The mounted tree, as the commands for people read it: finds VMs and says why it cannot."""

import argparse
import errno
import json
import os
from dataclasses import dataclass
from typing import Any, Final

from agent.model.errors import CocoonError, Denied, Failed, Invalid, Missing
from agent.model.names import is_id, is_name
from agent.settings import load_settings

SHORTEST_PREFIX: Final = 3
"""Characters of an id that may stand for it, when they fit no other."""
_ID_LETTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyz234567")
_SHOWN: Final = 5
_AWAY: Final = frozenset({errno.ENOTCONN, errno.ECONNABORTED, errno.EHOSTDOWN})


class Away(CocoonError):
    """There is no tree: the agent does not run, or is not up yet."""

    errno = errno.ENOTCONN


def add_mount_option(parser: argparse.ArgumentParser) -> None:
    """Let the user say where the tree is."""
    parser.add_argument(
        "--mount", metavar="DIR", help="where the tree is (as the agent's settings)"
    )


@dataclass(frozen=True, slots=True)
class Mount:
    """The tree at `path`. What it reads raises CocoonError, Away among them."""

    path: str

    @classmethod
    def named_by(cls, options: argparse.Namespace) -> "Mount":
        """Return the one of `--mount`, COCOON_MOUNT or the settings; raise Away without a tree."""
        # A user who names the tree need not be able to read the settings.
        given = options.mount or os.environ.get("COCOON_MOUNT")
        mount = cls(os.path.abspath(given or load_settings({}, os.environ).mount))
        mount.check()
        return mount

    def check(self) -> None:
        """Raise Away when there is no tree."""
        self.read("version")

    def join(self, *parts: str) -> str:
        """Return the path of something in the tree."""
        return os.path.join(self.path, *parts)

    def read(self, *parts: str) -> str:
        """Return the text of a file."""
        try:
            with open(self.join(*parts), "rb") as file:
                return file.read().decode(errors="replace")
        except OSError as error:
            raise self.refusal(error, "/".join(parts)) from error

    def read_json(self, *parts: str) -> Any:
        """Return the content of a JSON file."""
        try:
            return json.loads(self.read(*parts))
        except ValueError as error:
            raise Failed(f"{self.join(*parts)} is no JSON: {error}") from error

    def list(self, directory: str) -> list[str]:
        """Return the sorted names in a directory."""
        try:
            return sorted(os.listdir(self.join(directory)))
        except OSError as error:
            raise self.refusal(error, directory) from error

    def find_vm(self, text: str) -> str:
        """Return the name of the VM with this name, id, or unique prefix of an id."""
        if is_name(text) and self._exists("vms", text):
            return text
        ids = []
        if len(text) >= SHORTEST_PREFIX and _ID_LETTERS.issuperset(text):
            ids = [text] if is_id(text) else self.list("by-id")
        names = [name for vm_id in ids if vm_id.startswith(text) and (name := self.name_of(vm_id))]
        if not names:
            raise Missing(f"there is no VM {text[:80]!r}: cocoon-host list shows those there are")
        if len(names) > 1:
            shown = ", ".join(sorted(names)[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")
            raise Invalid(
                f"{text!r} begins the ids of {len(names)} VMs ({shown}): write more of it"
            )
        return names[0]

    def name_of(self, vm_id: str) -> str:
        """Return the name of the VM with this id, "" when there is none."""
        try:
            return os.path.basename(os.readlink(self.join("by-id", vm_id)))
        except FileNotFoundError:
            self.check()
            return ""
        except OSError as error:
            raise self.refusal(error, f"by-id/{vm_id}") from error

    def refusal(self, error: OSError, what: str) -> CocoonError:
        """Return what an error of the tree means; `what` is a path in it."""
        if error.errno in _AWAY or (error.errno == errno.ENOENT and what == "version"):
            return Away(
                f"nothing is mounted at {self.path}: the agent does not run (systemctl start "
                "cocoon-host; VMs run on without it) or has another mount (--mount)"
            )
        if error.errno in (errno.EACCES, errno.EPERM):
            return Denied(
                f"{self.path}/{what} is not yours to use: join its group, or let its owner or root "
                "allow it with chmod or chown"
            )
        if error.errno == errno.ENOENT:
            return Missing(f"there is no {self.path}/{what}")
        return Failed(f"{self.path}/{what}: {error.strerror}")

    def _exists(self, *parts: str) -> bool:
        try:
            os.lstat(self.join(*parts))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self.refusal(error, "/".join(parts)) from error
        return True
