"""The doctor: gathers the facts about this host, and has what was found last for who reads it."""

import contextlib
import ctypes
import grp
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import trio

from agent.model.access import Access
from agent.model.config import HYPERVISORS, Boot, VmConfig
from agent.model.errors import CocoonError, Unsupported
from agent.model.finding import Finding, Level, show_findings
from agent.model.vm import Vm
from agent.storage.facts import StorageFacts, storage_facts
from agent.storage.reflink import shares_blocks
from agent.storage.tree import Tree
from agent.systemd.bus import Bus
from agent.systemd.facts import SystemdAnswers, SystemdFiles, systemd_answers, systemd_files
from agent.vmm import userfault
from agent.vmm.driver import Driver, Version
from agent.vmm.kvm import kvm_obstacle

from . import checks
from .start import plan_launch

_AT_MOST, _AT_LEAST = 60.0, 2.0  # seconds between two looks
_NOT_YET = Finding(Level.WARN, "doctor", "the first look is not done", "read again in a moment")
_ANY = Vm("any", "any", 65536, Access(0, 0), VmConfig(boot=Boot(kernel="vmlinuz")))
"""What stands for a VM that boots a kernel, in the question what `auto` takes."""
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised
_TIMEX_SIZE = 208
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Files:
    """What looking at local files tells."""

    systemd: SystemdFiles
    storage: StorageFacts
    fuse_device: bool
    fuse_known: bool
    fusermount: str
    userfaultfd: bool
    unprivileged_userfaultfd: bool
    group: bool
    synchronised: bool | None


class Doctor:
    """Looks at the host as an agent with these settings sees it; looking changes nothing."""

    def __init__(self, drivers: Mapping[str, Driver], tree: Tree, group: str) -> None:
        self._drivers, self._tree, self._group = drivers, tree, group
        self._shared: bool | None = None
        self._found: list[Finding] = [_NOT_YET]
        self._wanted = trio.Event()

    @property
    def findings(self) -> list[Finding]:
        """What was found last."""
        return self._found

    def read(self) -> str:
        """Return that as lines, at once, and have the next look come soon."""
        self._wanted.set()
        return show_findings(self._found)

    async def run(self, bus: Bus) -> None:
        """Keep what is found fresh until cancelled: at most a minute old, 2 s after a read."""
        while True:
            try:
                self._found = await self.examine(await systemd_answers(bus))
            except Exception as error:
                # The agent goes on without a doctor.
                _log.exception("the checks of the host failed")
                self._found = [Finding(Level.FAIL, "doctor", f"its checks failed, {error!r}")]
            self._wanted = trio.Event()
            await trio.sleep(_AT_LEAST)
            with trio.move_on_after(_AT_MOST - _AT_LEAST):
                await self._wanted.wait()

    async def examine(self, answers: SystemdAnswers) -> list[Finding]:
        """Look at everything now, and return what was found; a check that fails is a finding."""
        tree, root = self._tree, os.geteuid() == 0
        found = await self._examine_backends(root=root)
        try:
            files = await tree.in_thread("looking at the host", self._look)
        except CocoonError as error:
            return [*found, Finding(Level.FAIL, "files", str(error))]
        if self._shared is None and root and files.storage.made:
            trying = "trying whether files share blocks"
            self._shared = await tree.in_thread(trying, shares_blocks, tree.root)
        storage = files.storage
        return [
            *found,
            checks.check_systemd(files.systemd, answers),
            checks.check_cgroups(files.systemd.cgroups),
            checks.check_users(files.systemd),
            checks.check_machined(answers),
            checks.check_fuse(
                device=files.fuse_device, known=files.fuse_known, fusermount=files.fusermount
            ),
            checks.check_userfaultfd(
                device=files.userfaultfd, unprivileged=files.unprivileged_userfaultfd
            ),
            checks.check_directories(storage, tree.root),
            checks.check_space(storage, tree.root),
            checks.check_reflinks(self._shared, tree.root, made=storage.made, root_asks=root),
            checks.check_disk_tools(storage.missing),
            checks.check_group(self._group, exists=files.group),
            checks.check_clock(time.time(), files.synchronised),
        ]

    async def _examine_backends(self, *, root: bool) -> list[Finding]:
        kvm = await kvm_obstacle()
        tried = root or "cannot be opened" not in kvm
        found = [checks.check_kvm(kvm, tried=tried)]
        for name in HYPERVISORS:
            if driver := self._drivers.get(name):
                version, obstacle = await _version(driver), await driver.obstacle()
                firmware = driver.capabilities.firmware
                found.append(checks.check_backend(name, version, obstacle, firmware))
        chosen = obstacle = ""
        with contextlib.suppress(Unsupported):
            vm, _ = await plan_launch(self._drivers, _ANY)
            chosen = vm.hypervisor
            obstacle = await self._drivers[chosen].obstacle()
        return [*found, checks.check_choice(chosen, obstacle, tried=tried)]

    def _look(self) -> _Files:
        return _Files(
            systemd=systemd_files(),
            storage=storage_facts(self._tree.root, self._tree.run),
            fuse_device=_is_device("/dev/fuse"),
            fuse_known=b"\tfuse\n" in _read("/proc/filesystems"),
            fusermount=shutil.which("fusermount3") or "",
            userfaultfd=userfault.device_opens(),
            unprivileged_userfaultfd=userfault.is_unprivileged(),
            group=_exists(grp.getgrnam, self._group),
            synchronised=_clock_is_synchronised(),
        )


async def _version(driver: Driver) -> Version | CocoonError:
    try:
        return await driver.version()
    except CocoonError as error:
        return error


def _exists(find: Callable[[str], object], name: str) -> bool:
    try:
        find(name)
    except KeyError:
        return False
    return True


def _is_device(path: str) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISCHR(os.stat(path).st_mode)
    return False


def _read(path: str) -> bytes:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read()
    return b""


def _clock_is_synchronised() -> bool | None:
    """Ask the kernel, by adjtimex(2) with nothing to set; None when it does not say."""
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_SIZE))
    return None if state < 0 else state != _TIME_ERROR
