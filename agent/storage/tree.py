"""The directories below the root and the run directory: where things are, whose, and gone again."""

import contextlib
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import trio

from agent.model import canonical
from agent.model.config import VmConfig
from agent.model.disks import data_file, disk_files, host_disk_binds
from agent.model.errors import (
    CocoonError,
    Failed,
    Missing,
    NotPermitted,
    from_os_error,
)
from agent.model.seed import seed_files
from agent.model.vm import Vm

from . import directory
from .disk import ensure_disk
from .lend import Lender
from .seed import seed_image, write_seed

T = TypeVar("T")

BESIDE = (".new", ".old", ".bound")
"""What may stand beside a VM's directory: the one that a restore has staged, the one that it has
replaced, and disks bound to where a snapshot of another host's expects them."""

_TRASH = ".removed-"
_OWN = (canonical.COW, canonical.OVERLAY)
_DATA_DISK = re.compile(r"data-.+\.raw")
_THREADS = 8
_log = logging.getLogger(__name__)
_SOCKET = os.path.basename(canonical.API_SOCKET)


class Tree:
    """Where the agent keeps what lasts (`root`) and what ends with the host's uptime (`run`).

    Both are absolute paths; what lies below them is in formats.md, "Layout". Calls that are not
    coroutines look at one file of a local filesystem and do not wait.
    """

    def __init__(self, root: str, run: str) -> None:
        self.root, self.run = root, run
        self.index = f"{root}/index.db"
        self.vms = f"{root}/vms"
        self.snapshots = f"{root}/snapshots"
        self.images = f"{root}/images"
        self.log = f"{root}/log"
        self.kernels = f"{root}/kernels"
        self.boot = f"{root}/boot"
        self.consoles = f"{run}/console"
        self._lender = Lender()
        self._threads = trio.CapacityLimiter(_THREADS)
        self._emptying = trio.Lock()

    def directory(self, vm_id: str) -> str:
        """Return the directory that the VMM sees at `canonical.VM`."""
        return f"{self.vms}/{vm_id}"

    def run_directory(self, vm_id: str) -> str:
        """Return root's own directory of the VM: FIFOs, exit record, environment of the unit."""
        return f"{self.run}/{vm_id}"

    async def in_thread(self, doing: str, act: Callable[..., T], *args: Any) -> T:
        """Run `act` in one of a few threads; an OSError becomes a CocoonError with `doing` in it.

        A cancellation waits until `act` is done, so what it made is never left half known.
        """
        try:
            return await trio.to_thread.run_sync(act, *args, limiter=self._threads)
        except OSError as error:
            raise from_os_error(error, doing) from error

    async def prepare(self) -> None:
        """Make what is missing of the tree, and check whose it is.

        Raises NotPermitted, with the remedy, when somebody but root could change a directory.
        """
        await self.in_thread("making the agent's directories", self._prepare)

    async def prepare_vm(
        self, vm: Vm, files: Mapping[str, bytes], environment: bytes, base: str = ""
    ) -> tuple[str, ...]:
        """Make all files that a start of the VM needs; return the block devices it must reach.

        `files` go into the VM's directory by name, `environment` into root's run directory. Disks
        are created or grown, `base` being the path of the image behind the VM's own; the host's
        are lent to the VM's uid, sockets of an earlier process are removed. The VM must have no
        process. Raises NoSpace, Missing, Invalid, Damaged or Failed; disks of the host are then
        lent no more.
        """
        doing = f"preparing the files of VM {vm.name}"
        return await self.in_thread(doing, self._prepare_vm, vm, files, environment, base)

    async def make_disks(self, vm: Vm, config: VmConfig, names: Collection[str]) -> None:
        """Make the agent's own disks `names` of `config`, which a VM that runs is to be given.

        Raises as `prepare_vm` does.
        """
        if names:
            doing = f"making disks of VM {vm.name}"
            await self.in_thread(doing, self._make_disks, vm, config, names)

    async def remove_disks(self, vm: Vm, names: Collection[str]) -> None:
        """Remove the agent's own disks `names`, which the VM has no more."""
        if names:
            await self.in_thread(f"removing disks of VM {vm.name}", self._remove_disks, vm, names)

    async def remove_stale_disks(self, vm: Vm) -> None:
        """Remove the agent's own disks that the VM, which has started without them, has no more."""
        await self.in_thread(f"removing old disks of VM {vm.name}", self._remove_stale_disks, vm)

    async def write_seed(self, vm: Vm, *, loads: bool = False) -> None:
        """Put the seed into the VM's directory, or remove one it has and no more needs.

        With `loads` it takes the place of the one that came with a snapshot; see `write_seed`.
        """
        await self.in_thread(
            f"writing the first-boot configuration of VM {vm.name}", self._write_seed, vm, loads
        )

    async def write_environment(self, vm: Vm, environment: bytes) -> None:
        """Replace the environment of the VM's unit, which counts from its next start on."""
        await self.in_thread(
            f"writing the environment of VM {vm.name}", self._write_environment, vm, environment
        )

    async def release_disks(self, vm: Vm) -> None:
        """Take back the disks of the host that were lent to the VM, which has no process now."""
        if host_disk_binds(vm.config):
            await self.in_thread(f"taking back the disks of VM {vm.name}", self._release, vm)

    async def remove_vm(self, vm: Vm) -> None:
        """Put all files of the VM, which has no process, out of the way, for `empty_trash`.

        Deleting a large disk takes its time, and nobody should have to wait for that. Files that
        are gone are no error.
        """
        await self.in_thread(f"removing the files of VM {vm.name}", self._remove_vm, vm)

    async def empty_trash(self) -> None:
        """Delete what `remove_vm` put out of the way, now or before the agent died."""
        async with self._emptying:
            await self.in_thread("deleting the files of removed VMs", self._empty_trash)

    async def free_space(self) -> int:
        """Return the bytes that may still be written below the root directory."""
        facts = await self.in_thread("asking for free space", os.statvfs, self.root)
        return facts.f_bavail * facts.f_frsize

    def has_socket(self, vm: Vm) -> bool:
        """Whether the VMM has made its API socket, or something in its place."""
        return os.path.lexists(f"{self._sockets(vm)}/{_SOCKET}")

    @contextmanager
    def open_socket(self, vm: Vm) -> Iterator[int]:
        """Lend an O_PATH descriptor of the VMM's API socket.

        Raises Missing when there is none, and Failed when it is not the VMM's own.
        """
        path = f"{self._sockets(vm)}/{_SOCKET}"
        try:
            with directory.opened_as(self._sockets(vm), vm.uid) as parent:
                socket = os.open(_SOCKET, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        except FileNotFoundError:
            raise Missing(f"the VMM of {vm.name} has no API socket: {path} is missing") from None
        try:
            facts = os.fstat(socket)
            if not stat.S_ISSOCK(facts.st_mode) or facts.st_uid != vm.uid:
                raise Failed(
                    f"{path} is not the socket of {vm.name}'s VMM, which may have been taken over: "
                    "kill the VM"
                )
            yield socket
        finally:
            os.close(socket)

    @contextmanager
    def open_directory(self, vm: Vm) -> Iterator[int]:
        """Lend a descriptor of the VM's directory; raises Missing, or Failed when it is not its."""
        try:
            with directory.opened_as(self.directory(vm.id), vm.uid) as own:
                yield own
        except FileNotFoundError:
            raise Missing(f"the directory of VM {vm.name} is gone") from None

    def _sockets(self, vm: Vm) -> str:
        return f"{self.run_directory(vm.id)}/sock"

    def _prepare(self) -> None:
        for path in (self.root, self.run):
            os.makedirs(path, mode=0o755, exist_ok=True)
            check_path(path)
        for path in (self.vms, self.snapshots, self.images, self.log, self.kernels):
            directory.ensure(path, 0o700, os.geteuid())
        for path in (self.boot, self.consoles):
            directory.ensure(path, 0o755, os.geteuid())

    def _prepare_vm(
        self, vm: Vm, files: Mapping[str, bytes], environment: bytes, base: str
    ) -> tuple[str, ...]:
        own = self.directory(vm.id)
        directory.ensure(own, 0o700, vm.uid)
        with directory.opened_as(own, vm.uid) as opened:
            if vm.config.base is not None and not (vm.started_at or vm.is_to_be_cloned):
                # A start that failed may have made one from another image.
                for name in _OWN:
                    directory.discard(opened, name)
            for file in disk_files(vm.config):
                ensure_disk(opened, file, vm.uid, base)
            for name, content in files.items():
                # Gone first: a file that replaces another by its name, ext4 writes out at once.
                directory.discard(opened, name)
                directory.write_file(opened, name, content, vm.uid)
        directory.ensure(self.run_directory(vm.id), 0o700, os.geteuid())
        self._write_environment(vm, environment)
        directory.ensure(self._sockets(vm), 0o700, vm.uid)
        with directory.opened_as(self._sockets(vm), vm.uid) as opened:
            directory.empty(opened)
        try:
            return tuple(
                bind.source
                for bind in host_disk_binds(vm.config)
                if self._lender.lend(bind.source, vm.uid, readonly=bind.readonly)
            )
        except (CocoonError, OSError):
            self._release(vm)
            raise

    def _write_seed(self, vm: Vm, loads: bool) -> None:
        image = seed_image(seed_files(vm)) if vm.seed else b""
        with directory.opened_as(self.directory(vm.id), vm.uid) as opened:
            if vm.seed:
                write_seed(opened, image, vm.uid, loads=loads)
            else:
                directory.discard(opened, canonical.SEED)

    def _make_disks(self, vm: Vm, config: VmConfig, names: Iterable[str]) -> None:
        wanted = {data_file(name) for name in names}
        with directory.opened_as(self.directory(vm.id), vm.uid) as opened:
            for file in disk_files(config):
                if file.name in wanted:
                    ensure_disk(opened, file, vm.uid)

    def _remove_disks(self, vm: Vm, names: Iterable[str]) -> None:
        with directory.opened_as(self.directory(vm.id), vm.uid) as opened:
            for name in names:
                directory.discard(opened, data_file(name))

    def _remove_stale_disks(self, vm: Vm) -> None:
        wanted = {file.name for file in disk_files(vm.config)}
        with directory.opened_as(self.directory(vm.id), vm.uid) as opened:
            for name in os.listdir(opened):
                if name not in wanted and (name in _OWN or _DATA_DISK.fullmatch(name)):
                    directory.discard(opened, name)

    def _write_environment(self, vm: Vm, environment: bytes) -> None:
        with directory.opened(self.run_directory(vm.id)) as opened:
            directory.write_file(opened, "environment", environment, os.geteuid())

    def _release(self, vm: Vm) -> None:
        for bind in host_disk_binds(vm.config):
            try:
                self._lender.take_back(bind.source, vm.uid)
            except (CocoonError, OSError) as error:
                # Something else is there now, which must not keep a VM from ending or going.
                _log.warning("disk %s is not taken back from %s: %s", bind.source, vm.name, error)

    def _remove_vm(self, vm: Vm) -> None:
        self._release(vm)
        directory.remove(self.run_directory(vm.id))
        # A clone that was undone has been here before, and what was removed of it may still be.
        trash = f"{self.vms}/{_TRASH}{vm.id}-{secrets.token_hex(8)}"
        for suffix in ("", *BESIDE):
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.directory(vm.id) + suffix, trash + suffix)

    def _empty_trash(self) -> None:
        for name in os.listdir(self.vms):
            if name.startswith(_TRASH):
                directory.remove(f"{self.vms}/{name}")


def check_path(path: str) -> None:
    """Raise NotPermitted when somebody but root (or the agent's user) may change `path`."""
    real = os.path.realpath(path)
    here = real
    while True:
        facts = os.stat(here)
        loose = facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        sticky = facts.st_mode & stat.S_ISVTX and here != real
        if facts.st_uid not in (0, os.geteuid()) or (loose and not sticky):
            raise NotPermitted(
                f"{here} is not safe to keep VMs in: uid {facts.st_uid} owns it, with mode "
                f"{stat.S_IMODE(facts.st_mode):04o}. Run: chown root: {here}; chmod go-w {here}"
            )
        if here == "/":
            return
        here = os.path.dirname(here)
