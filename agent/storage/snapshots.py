"""The directories of snapshots: made in staging, published, given to VMs, removed.

`<id>.staging` becomes `<id>` when it is complete and on disk. Both are root's, and so are the files
in them: 0444, for VMs share them. A VM's own directory belongs to a VMM that may have been taken
over; what its VMM wrote there for a snapshot (in `save/`) is taken over as `reflink` tells.

All calls block on files: callers run them by `Tree.in_thread`. They raise OSError or CocoonError.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from agent.model import canonical
from agent.model.ch_config import localised, untied
from agent.model.config import QueueAffinity
from agent.model.disks import disk_files
from agent.model.errors import Damaged, Missing
from agent.model.pinned import boot_files
from agent.model.snapshot import (
    CH_CONFIG,
    STATE_FILES,
    Snapshot,
    SnapshotFile,
    is_disk,
    metadata_size,
)
from agent.model.vm import Vm

from . import directory
from .archive import Layout, read_layout
from .reflink import PRIVATE, SHARED, copy_file, dig_holes, open_owned, take_over
from .sparse import data_ranges
from .staging import Staged
from .tree import BESIDE, Tree

SAVE = "save"
"""Where in its own directory a VMM writes its state and memory."""

_MEMORIES = frozenset(files.memory for files in STATE_FILES.values())
_NEW, _OLD, _BOUND = BESIDE
_FINE = 4096  # bytes of a block, beyond which a file of changed pages does not tell which they are
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Base:
    """The memory file, open as `fd`, that a file of changed pages completes."""

    fd: int

    def close(self) -> None:
        os.close(self.fd)


class SnapshotStore(Staged):
    """All snapshots' directories, and the ways between them and VMs' directories."""

    def __init__(self, tree: Tree) -> None:
        super().__init__(tree.snapshots)
        self._tree = tree

    # Taking

    def begin(self, snapshot_id: str, vm: Vm | None = None) -> None:
        """Make an empty staging directory, and in the VM's directory one for its VMM to write."""
        self.stage(snapshot_id)
        if vm is not None:
            with directory.opened_as(self._tree.directory(vm.id), vm.uid) as own:
                _remove_entry(own, SAVE)
                os.mkdir(SAVE, 0o700, dir_fd=own)
                with directory.opened(SAVE, parent=own) as save:
                    os.fchown(save, vm.uid, vm.uid)

    def saved_blocks(self, vm: Vm) -> int:
        """Return how many blocks the VMM has written so far."""
        memory = STATE_FILES[vm.hypervisor].memory
        path = f"{self._tree.directory(vm.id)}/{SAVE}/{memory}"
        with contextlib.suppress(OSError):
            return os.lstat(path).st_blocks
        return 0

    def copy_disks(self, snapshot_id: str, vm: Vm, memory: bool = False) -> None:
        """Copy the VM's disks, which nobody writes now, into staging; with `memory`, that too."""
        with (
            directory.opened(self.staging(snapshot_id)) as staging,
            directory.opened_as(self._tree.directory(vm.id), vm.uid) as own,
        ):
            if memory:
                name = STATE_FILES[vm.hypervisor].memory
                with _owned(own, name, vm.uid) as live:
                    _check_memory(live, vm)
                    copy_file(live, staging, name, mode=SHARED, sync=False)
            disks = [file.name for file in disk_files(vm.config)]
            for name in (*disks, *([canonical.SEED] if vm.seed else [])):
                with _owned(own, name, vm.uid) as disk:
                    copy_file(disk, staging, name, mode=SHARED, sync=False)

    def open_base(self, snapshot: Snapshot) -> Base | None:
        """Open the memory of a snapshot as what changes are counted from.

        None when it is gone, or when the filesystem does not tell one page from the next.
        """
        if os.statvfs(self._tree.snapshots).f_bsize > _FINE:
            return None
        try:
            path = f"{self.directory(snapshot.id)}/{snapshot.state_files.memory}"
            return Base(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
        except FileNotFoundError:
            return None

    def collect(self, snapshot_id: str, vm: Vm, base: Base | None, memory: bool = True) -> None:
        """Take what the VMM wrote into staging; with `base`, its memory file has changes only.

        Without `memory` it wrote none.
        """
        files = STATE_FILES[vm.hypervisor]
        with (
            directory.opened(self.staging(snapshot_id)) as staging,
            directory.opened_as(self._tree.directory(vm.id), vm.uid) as own,
        ):
            with directory.opened(SAVE, parent=own) as save:
                for name in files.small:
                    with _owned(save, name, vm.uid) as state:
                        _take(state, staging, name)
                if memory:
                    with _owned(save, files.memory, vm.uid) as written:
                        _check_memory(written, vm)
                        if base is None:
                            _take(written, staging, files.memory)
                        else:
                            copy_file(base.fd, staging, files.memory, mode=SHARED, sync=False)
                            _apply(written, staging, files.memory)
            _remove_entry(own, SAVE)

    def link_boot(self, snapshot_id: str, files: Mapping[str, str]) -> None:
        """Put what was booted, `files` of the kernel store by name, into staging."""
        with directory.opened(self.staging(snapshot_id)) as staging:
            for name, path in files.items():
                _link(path, staging, name)

    def write(self, snapshot_id: str, name: str, content: bytes) -> None:
        """Write a small file into staging."""
        with directory.opened(self.staging(snapshot_id)) as staging:
            _write(staging, name, content, sync=False)

    def untie(self, snapshot_id: str) -> None:
        """Take out of CH_CONFIG in staging which CPUs the VM's disks are tied to."""
        with open(f"{self.staging(snapshot_id)}/{CH_CONFIG}", "rb") as file:
            # One that is longer is refused as no JSON, which it then is not.
            data = file.read(_PIECE)
        self.write(snapshot_id, CH_CONFIG, untied(data))

    def seal(self, snapshot_id: str) -> tuple[SnapshotFile, ...]:
        """Turn zeros in the memory file into holes, sync all files; return names and sizes."""
        files = []
        with directory.opened(self.staging(snapshot_id)) as staging:
            for name in sorted(os.listdir(staging)):
                flags = os.O_RDWR if name in _MEMORIES else os.O_RDONLY
                file = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=staging)
                try:
                    if name in _MEMORIES:
                        dig_holes(file)
                    os.fsync(file)
                    files.append(SnapshotFile(name, os.fstat(file).st_size))
                finally:
                    os.close(file)
            os.fsync(staging)
        return tuple(files)

    def read_staged(self, snapshot_id: str, name: str) -> bytes:
        """Return the content of a small file in staging."""
        with open(f"{self.staging(snapshot_id)}/{name}", "rb") as file:
            return file.read()

    def digest(self, snapshot_id: str, name: str) -> str:
        """Return the SHA-256 of a file in staging."""
        sha = hashlib.sha256()
        with open(f"{self.staging(snapshot_id)}/{name}", "rb") as file:
            while piece := file.read(_PIECE):
                sha.update(piece)
        return sha.hexdigest()

    def discard(self, snapshot_id: str, vm: Vm | None = None) -> None:
        """Remove what there is of a snapshot, staged or published, and of its making."""
        self.clear(snapshot_id)
        if vm is not None:
            with (
                contextlib.suppress(FileNotFoundError),
                directory.opened_as(self._tree.directory(vm.id), vm.uid) as own,
            ):
                _remove_entry(own, SAVE)

    # Showing

    def layout(self, snapshot: Snapshot) -> Layout:
        """Return the layout of the snapshot's archive."""
        with self.opened(snapshot) as own:
            names = [file.name for file in snapshot.files]
            return read_layout(own, names, metadata_size(snapshot), int(snapshot.created_at))

    @contextmanager
    def opened(self, snapshot: Snapshot) -> Iterator[int]:
        """Lend a descriptor of the snapshot's directory; raise Missing when it is gone."""
        try:
            with directory.opened(self.directory(snapshot.id)) as own:
                yield own
        except FileNotFoundError:
            raise Missing(
                f"snapshot {snapshot.name} was removed, or a file of it is gone"
            ) from None

    def read_state(self, snapshot: Snapshot) -> bytes:
        """Return the state of the VM's devices."""
        with open(f"{self.directory(snapshot.id)}/{snapshot.state_files.state}", "rb") as file:
            return file.read()

    # Giving to VMs

    def store_boot(self, snapshot: Snapshot) -> None:
        """Put what the snapshot's VM had booted into the kernel store."""
        with directory.opened(self._tree.kernels) as kernels:
            for name, digest in boot_files(snapshot).digests().items():
                with contextlib.suppress(FileExistsError):
                    _link(f"{self.directory(snapshot.id)}/{name}", kernels, digest)

    def check_config(self, snapshot: Snapshot) -> None:
        """Raise Unsupported and the like for a snapshot that `fill` would refuse."""
        with self.opened(snapshot) as source:
            _localised(source, snapshot)

    def fill(self, snapshot: Snapshot, vm: Vm) -> None:
        """Make the directory of a VM that has none in use, with all that the snapshot holds."""
        self._fill(snapshot, vm, self._tree.directory(vm.id), sync=False)
        self._bind(snapshot, vm, self._tree.directory(vm.id))

    def has_loaded(self, vm: Vm) -> bool:
        """Whether the VM's directory holds what its process was loaded from; does not wait."""
        own = self._tree.directory(vm.id)
        return any(os.path.lexists(f"{own}/{name}") for name in _MEMORIES)

    def forget_loaded(self, vm: Vm) -> None:
        """Remove what the VM's process was loaded from: it has none, and will boot."""
        with directory.opened_as(self._tree.directory(vm.id), vm.uid) as own:
            # Of whichever backend: the VM may have another one now.
            for name in {name for files in STATE_FILES.values() for name in files.small}:
                _remove_entry(own, name)
            for name in _MEMORIES:
                _remove_entry(own, name)
        directory.remove(self._beside(vm, _BOUND))

    def sync_disks(self, vm: Vm) -> None:
        """Write the VM's disks out, as far as they are not."""
        with directory.opened_as(self._tree.directory(vm.id), vm.uid) as own:
            for file in disk_files(vm.config):
                with _owned(own, file.name, vm.uid) as disk:
                    os.fsync(disk)

    def stage_restore(self, snapshot: Snapshot, vm: Vm) -> None:
        """Make the directory that will take the place of the VM's, beside it."""
        path = self._beside(vm, _NEW)
        self._fill(snapshot, vm, path, sync=True)

    def restage(self, snapshot: Snapshot, vm: Vm) -> None:
        """Make what a begun restore puts into place again; the VM must have no process."""
        self.stage_restore(snapshot, vm)
        if self.is_exchanged(vm):
            directory.remove(self._tree.directory(vm.id))

    def unstage_restore(self, vm: Vm) -> None:
        """Remove what `stage_restore` made, if it is there."""
        directory.remove(self._beside(vm, _NEW))

    def is_exchanged(self, vm: Vm) -> bool:
        """Whether `exchange` has begun, and its outcome is not settled yet."""
        return os.path.isdir(self._beside(vm, _OLD))

    def exchange(self, snapshot: Snapshot, vm: Vm) -> None:
        """Put the staged directory in the place of the VM's, which is kept; can be repeated.

        The VM must have no process.
        """
        own = self._tree.directory(vm.id)
        if not self.is_exchanged(vm):
            with contextlib.suppress(FileNotFoundError):
                os.rename(own, self._beside(vm, _OLD))
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._beside(vm, _NEW), own)
        self._sync_vms()
        self._bind(snapshot, vm, own)

    def exchange_back(self, vm: Vm) -> None:
        """Undo `exchange`; can be repeated. The VM must have no process."""
        if self.is_exchanged(vm):
            directory.remove(self._tree.directory(vm.id))
            os.rename(self._beside(vm, _OLD), self._tree.directory(vm.id))
        self._sync_vms()
        self.unstage_restore(vm)

    def forget_old(self, vm: Vm) -> None:
        """Remove the directory that `exchange` kept, if it is there."""
        directory.remove(self._beside(vm, _OLD))

    def bound(self, vm: Vm, name: str) -> str:
        """Return the path of a disk of the VM's in a directory that its VMM cannot change."""
        return f"{self._beside(vm, _BOUND)}/{name}"

    def leftovers(self) -> list[str]:
        """Return the ids of VMs beside whose directories something of a restore stands."""
        names = os.listdir(self._tree.vms)
        return [name.partition(".")[0] for name in names if name.endswith((_NEW, _OLD))]

    def _beside(self, vm: Vm, suffix: str) -> str:
        return self._tree.directory(vm.id) + suffix

    def _sync_vms(self) -> None:
        with directory.opened(self._tree.vms) as vms:
            os.fsync(vms)

    def _fill(self, snapshot: Snapshot, vm: Vm, target: str, *, sync: bool) -> None:
        written = snapshot.state_files
        directory.remove(target)
        os.mkdir(target, 0o700)
        try:
            with self.opened(snapshot) as source, directory.opened(target) as own:
                config = _localised(source, snapshot, vm.config.queue_affinity)
                for file in snapshot.files:
                    is_live = file.name == written.memory and snapshot.memory_is_live
                    if is_disk(file.name) or is_live:
                        with _whole(source, file) as disk:
                            copy_file(disk, own, file.name, mode=PRIVATE, sync=sync and not is_live)
                        os.chown(file.name, vm.uid, vm.uid, dir_fd=own, follow_symlinks=False)
                    elif file.name == CH_CONFIG and config is not None:
                        _write(own, CH_CONFIG, config, sync=sync)
                    elif file.name in (written.memory, *written.small):
                        with _whole(source, file):
                            _link_at(source, own, file.name)
                # Last: up to here nobody else can change anything in it.
                os.fchown(own, vm.uid, vm.uid)
                if sync:
                    os.fsync(own)
        except BaseException:
            directory.remove(target)
            raise

    def _bind(self, snapshot: Snapshot, vm: Vm, own: str) -> None:
        """Link the disks that the VMM's state expects elsewhere to where they can be bound from.

        The VMM can put links in its own directory, and systemd would follow them when it restarts
        the unit.
        """
        beside = self._beside(vm, _BOUND)
        directory.remove(beside)
        if snapshot.bound:
            os.mkdir(beside, 0o700)
            with directory.opened(own) as source, directory.opened(beside) as target:
                for name in {bound.name for bound in snapshot.bound}:
                    _link_at(source, target, name)


@contextmanager
def _owned(parent: int, name: str, uid: int) -> Iterator[int]:
    file = open_owned(parent, name, uid)
    try:
        yield file
    finally:
        os.close(file)


@contextmanager
def _whole(parent: int, file: SnapshotFile) -> Iterator[int]:
    """Lend a file of a published snapshot; raise Damaged when it is not what was recorded."""
    try:
        opened = os.open(file.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except FileNotFoundError:
        raise Damaged(f"the snapshot's {file.name} is gone") from None
    try:
        size = os.fstat(opened).st_size
        if size != file.size:
            raise Damaged(f"the snapshot's {file.name} has {size} bytes instead of {file.size}")
        yield opened
    finally:
        os.close(opened)


def _localised(source: int, snapshot: Snapshot, affinity: QueueAffinity = ()) -> bytes | None:
    """Return what is to be written for the snapshot's CH_CONFIG, None when that can be shared."""
    for file in snapshot.files:
        if file.name == CH_CONFIG and CH_CONFIG in snapshot.state_files.small:
            with _whole(source, file) as config:
                data = os.pread(config, file.size, 0)
            changed = localised(data, snapshot, affinity)
            return None if changed is data else changed
    return None


def _check_memory(memory: int, vm: Vm) -> None:
    size = os.fstat(memory).st_size
    if size != vm.config.memory:
        raise Damaged(
            f"the VMM of {vm.name} wrote {size} bytes of memory instead of {vm.config.memory}"
        )


def _take(source: int, staging: int, name: str) -> None:
    if not take_over(source, staging, name):
        copy_file(source, staging, name, mode=SHARED, sync=False)


def _apply(changes: int, staging: int, name: str) -> None:
    """Write the data of the file open as `changes` over the same places in `name`."""
    target = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=staging)
    try:
        for start, length in data_ranges(changes, os.fstat(changes).st_size):
            end = start + length
            while start < end:
                start += os.pwrite(
                    target, os.pread(changes, min(end - start, _PIECE), start), start
                )
    finally:
        os.close(target)


def _write(parent: int, name: str, content: bytes, *, sync: bool) -> None:
    """Write a file that VMs share."""
    directory.write_file(parent, name, content, os.geteuid())
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        os.fchmod(file, SHARED)
        if sync:
            os.fsync(file)
    finally:
        os.close(file)


def _link(path: str, parent: int, name: str) -> None:
    """Link or, where that cannot be, copy a file that VMs share."""
    try:
        os.link(path, name, dst_dir_fd=parent, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:
        source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            copy_file(source, parent, name, mode=SHARED)
        finally:
            os.close(source)


def _link_at(source: int, target: int, name: str) -> None:
    try:
        os.link(name, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
    except FileNotFoundError:
        raise Missing(f"the snapshot's {name} was removed") from None


def _remove_entry(parent: int, name: str) -> None:
    """Remove a file, or a directory with all in it; what is gone is no error."""
    try:
        with directory.opened(name, parent=parent) as inner:
            os.fchown(inner, os.geteuid(), os.getegid())  # so that nobody puts more into it
            directory.empty(inner)
        os.rmdir(name, dir_fd=parent)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        os.unlink(name, dir_fd=parent)
