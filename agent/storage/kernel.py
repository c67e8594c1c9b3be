"""Keeps what VMs boot, by content: a file is copied once, and stays as it was when it was booted.

`<digest>` holds the bytes of a kernel, initrd or firmware as they were given, named by their
SHA-256. Beside a kernel that is a bzImage, `<digest>.elf` holds the ELF that was packed in it, made
when a VMM that boots nothing else asks for it; so the original stays for those that do. All are
root's, 0444.
"""

import hashlib
import os
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO

import trio

from agent.model.config import Boot
from agent.model.errors import Busy, Damaged, Invalid, Missing, UnknownFormat
from agent.model.vm import BootFiles, FirmwareFormat

from . import directory
from .kernel_image import Read, inspect_kernel, unpack_kernel
from .tree import Tree

MAXIMUM_FILE = 4 << 30
"""Bytes that a kernel or initrd may have."""
MAXIMUM_FIRMWARE = 16 << 20
"""Bytes that a firmware may have: a PC has no more room for it, below 4 GiB, above its devices."""

_PIECE = 1 << 20
_FLASH_BLOCK = 64 << 10  # QEMU takes no other (hw/i386/x86.c, x86_bios_rom_init)
_ELF = b"\x7fELF"
_UNFINISHED = "."  # what names of incomplete files start with
# Seconds after which a file's time stamps tell any further change: kernels take them from a clock
# that ticks a few hundred times a second.
_SETTLED = 1.0


@dataclass(frozen=True, slots=True)
class _Identity:
    """Which file, and which state of it: the same identity means the same content."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int


class KernelStore:
    """The store in `tree.kernels`."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._known: dict[_Identity, str] = {}
        self._elves: dict[str, str] = {}
        self._copying = trio.Lock()

    def path(self, digest: str) -> str:
        """Return the path of a stored file."""
        return f"{self._tree.kernels}/{digest}"

    async def check(self, boot: Boot | None) -> None:
        """Raise what `store` would raise for files that are missing or of another kind.

        Reads no more than the headers.
        """
        if boot is not None:
            await self._tree.in_thread("looking at the boot files", self._check, boot)

    async def store(self, boot: Boot, before: BootFiles | None = None) -> BootFiles:
        """Return what `boot` names now, by content, after copying what was not stored yet.

        `before` is what the VM booted last: a file that is gone since, under the same names, is
        taken from the store. Raises Missing, Invalid, UnknownFormat, Damaged or NoSpace with the
        name of the file, and Busy when it is being written.
        """
        if before is None or before.source != boot:
            before = BootFiles()
        args = (boot, before)
        if stored := await self._tree.in_thread("finding boot files", self._known_files, *args):
            return stored
        async with self._copying:
            return await self._tree.in_thread("storing boot files", self._store, *args)

    async def elf(self, digest: str, name: str = "the kernel") -> str:
        """Return the path of the ELF of a stored kernel, after unpacking it if need be.

        Raises UnknownFormat or Damaged, with `name`, when it cannot be unpacked, Missing or
        NoSpace.
        """
        if known := self._known_elf(digest):
            return known
        path = await self._tree.in_thread("finding a kernel", self._find_elf, digest, name)
        if path is None:
            async with self._copying:
                path = await self._tree.in_thread("unpacking a kernel", self._unpack, digest, name)
        self._elves[digest] = path
        return path

    def _check(self, boot: Boot) -> None:
        for part, name in boot.files().items():
            with self._opened(name) as (file, identity):
                self._inspect(name, file, identity, part)

    def _known_files(self, boot: Boot, before: BootFiles) -> BootFiles | None:
        """Return the boot files if they are stored and have not changed since."""
        digests = {}
        for part, name in boot.files().items():
            digest = self._known_digest(name, before.digests().get(part, ""))
            if digest is None:
                return None
            digests[part] = digest
        return self._boot_files(boot, digests)

    def _store(self, boot: Boot, before: BootFiles) -> BootFiles:
        digests = {}
        for part, name in boot.files().items():
            digest = self._known_digest(name, before.digests().get(part, ""))
            digests[part] = self._copy(name, part) if digest is None else digest
        return self._boot_files(boot, digests)

    def _boot_files(self, boot: Boot, digests: Mapping[str, str]) -> BootFiles:
        kind = ""
        if firmware := digests.get("firmware"):
            with open(self.path(firmware), "rb") as file:
                is_elf = file.read(len(_ELF)) == _ELF
            kind = FirmwareFormat.ELF if is_elf else FirmwareFormat.FLASH
        return BootFiles(**digests, firmware_format=kind, source=boot)

    def _known_digest(self, name: str, before: str) -> str | None:
        """Return the digest of what `name` is now, None when it must be copied."""
        try:
            with self._opened(name) as (_, identity):
                digest = self._known.get(identity)
        except Missing:
            if not before or not os.path.lexists(self.path(before)):
                raise
            return before
        return digest if digest and os.path.lexists(self.path(digest)) else None

    def _copy(self, name: str, part: str) -> str:
        """Store what `name` is now, the `part` of what boots; return its digest."""
        with self._opened(name) as (file, identity):
            self._inspect(name, file, identity, part)
            sha = hashlib.sha256()
            with self._unfinished() as (target, temporary):
                length = 0
                while piece := os.pread(file, _PIECE, length):
                    sha.update(piece)
                    target.write(piece)
                    length += len(piece)
                if length != identity.size or _identity(os.fstat(file)) != identity:
                    raise Busy(f"{name} changes while it is read: start when it is complete")
                digest = sha.hexdigest()
                self._publish(target, temporary, digest)
        if time.time() - identity.changed / 1e9 > _SETTLED:
            self._known[identity] = digest
        return digest

    def _known_elf(self, digest: str) -> str | None:
        path = self._elves.get(digest)
        return path if path is not None and os.path.lexists(path) else None

    def _find_elf(self, digest: str, name: str) -> str | None:
        path = f"{self.path(digest)}.elf"
        if os.path.lexists(path):
            return path
        with self._stored(digest, name) as (read, size):
            return self.path(digest) if inspect_kernel(read, size) is None else None

    def _unpack(self, digest: str, name: str) -> str:
        if path := self._find_elf(digest, name):
            return path
        with self._stored(digest, name) as (read, size):
            payload = inspect_kernel(read, size)
            assert payload is not None
            with self._unfinished() as (target, temporary):
                target.writelines(unpack_kernel(read, payload))
                self._publish(target, temporary, f"{digest}.elf")
        return f"{self.path(digest)}.elf"

    @contextmanager
    def _stored(self, digest: str, name: str) -> Iterator[tuple[Read, int]]:
        """Lend a stored kernel; errors about its format get its name."""
        try:
            file = os.open(self.path(digest), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise Missing(f"{name} is not stored any more: start the VM again") from None
        try:
            with _naming(name):
                yield lambda length, offset: os.pread(file, length, offset), os.fstat(file).st_size
        finally:
            os.close(file)

    @contextmanager
    def _opened(self, name: str) -> Iterator[tuple[int, _Identity]]:
        """Lend a descriptor of the file that a configuration names; it is regular."""
        try:
            # Nothing is opened before it is known to be a file: opening a device can do things.
            handle = self._handle(name)
            try:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    raise Invalid(f"{name} is no regular file")
                file = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC)
            finally:
                os.close(handle)
        except (FileNotFoundError, NotADirectoryError):
            where = "" if name.startswith("/") else f" in {self._tree.boot}"
            raise Missing(f"there is no file {name}{where}") from None
        try:
            identity = _identity(os.fstat(file))
            if identity.size > MAXIMUM_FILE:
                raise Invalid(f"{name} has {identity.size} bytes: nothing that large is booted")
            yield file, identity
        finally:
            os.close(file)

    def _handle(self, name: str) -> int:
        flags = os.O_PATH | os.O_CLOEXEC
        if name.startswith("/"):
            return os.open(name, flags)
        if "/" in name or name.startswith("."):
            raise Invalid(f"{name!r} is not the name of a file")
        with directory.opened(self._tree.boot) as boot:
            return os.open(name, flags | os.O_NOFOLLOW, dir_fd=boot)

    def _inspect(self, name: str, file: int, identity: _Identity, part: str) -> None:
        with _naming(name):
            if part == "kernel":
                inspect_kernel(lambda length, offset: os.pread(file, length, offset), identity.size)
            elif identity.size == 0:
                raise Damaged("is empty")
            elif part == "firmware":
                _inspect_firmware(os.pread(file, len(_ELF), 0), identity.size)

    @contextmanager
    def _unfinished(self) -> Iterator[tuple[BinaryIO, str]]:
        """Lend a new file of the store, which goes again unless it is published.

        The caller has the lock, so others there are were left by an agent that died.
        """
        for name in os.listdir(self._tree.kernels):
            if name.startswith(_UNFINISHED):
                os.unlink(self.path(name))
        temporary = self.path(f"{_UNFINISHED}{secrets.token_hex(8)}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o600), "wb") as target:
            try:
                yield target, temporary
            finally:
                os.unlink(temporary)

    def _publish(self, target: BinaryIO, temporary: str, name: str) -> None:
        """Let a complete file appear under its name, once it is on disk."""
        target.flush()
        os.fchmod(target.fileno(), 0o444)
        os.fsync(target.fileno())
        with suppress(FileExistsError):
            os.link(temporary, self.path(name))
        with directory.opened(self._tree.kernels) as store:
            os.fsync(store)


def _identity(facts: os.stat_result) -> _Identity:
    return _Identity(
        facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
    )


def _inspect_firmware(head: bytes, size: int) -> None:
    """Raise UnknownFormat for what is neither kind of firmware."""
    if size > MAXIMUM_FIRMWARE or (head != _ELF and size % _FLASH_BLOCK):
        raise UnknownFormat(
            f"is no firmware: {size} bytes are neither an ELF nor an image of a PC's flash memory "
            f"(whole blocks of {_FLASH_BLOCK >> 10} KiB, {MAXIMUM_FIRMWARE >> 20} MiB at most; of "
            "OVMF the file with code and variables in one)"
        )


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put `name` before the sentences of errors about a file's format."""
    try:
        yield
    except (Damaged, UnknownFormat) as error:
        raise type(error)(f"{name} {error}") from None
