"""Takes a base image in as its bytes arrive, and finds out what it is: qcow2, or a raw disk.

What it is given may be hostile. No program looks at a qcow2 before its header is known to want no
other file (`qcow2.read_header`), and then without rights (`tools.check_qcow2`).
"""

import contextlib
import functools
import hashlib
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

from agent.model.errors import CocoonError, Damaged, Invalid, UnknownFormat
from agent.model.size import MIB, show_size

from .qcow2 import MAGIC, read_header
from .sink import Buffer, Sink
from .tools import check_qcow2

NAME = "image"
"""Name of the file in the image's directory."""

LARGEST_HOLE = 64 << 30
"""Bytes; a hole in a raw disk is read as zeros for its digest, a minute or two for this."""

_SECTOR = 512
_ZEROS = memoryview(bytes(MIB))
_HEAD = 66 * 1024  # bytes from which all of the signatures below can be told
# What a raw disk that can be booted or mounted shows: signature and where. Of partition tables:
# UEFI 2.10, 5.2.3 and 5.3.2; of filesystems: linux/magic.h and each one's description.
_RAW = (
    (510, b"\x55\xaa"),
    (512, b"EFI PART"),
    (0x438, b"\x53\xef"),  # ext2 to ext4
    (0, b"XFSB"),
    (0x10040, b"_BHRfS_M"),  # btrfs
    (0x8001, b"CD001"),  # ISO 9660
    (0, b"hsqs"),  # squashfs
    (1024, b"\xe2\xe1\xf5\xe0"),  # EROFS
    (536, b"LABELONE"),  # LVM
)
_FOREIGN = (
    (b"\x1f\x8b", "is packed with gzip: unpack it on its way, zcat FILE > images/NAME"),
    (b"\xfd7zXZ\0", "is packed with xz: unpack it on its way, xzcat FILE > images/NAME"),
    (b"\x28\xb5\x2f\xfd", "is packed with zstd: unpack it on its way, zstdcat FILE > images/NAME"),
    (b"BZh", "is packed with bzip2: unpack it on its way, bzcat FILE > images/NAME"),
    (b"KDMV", "is a VMDK: write it out with qemu-img convert -O qcow2"),
    (b"# Disk DescriptorFile", "is a VMDK: write it out with qemu-img convert -O qcow2"),
    (b"vhdxfile", "is a VHDX: write it out with qemu-img convert -O qcow2"),
    (b"conectix", "is a VHD: write it out with qemu-img convert -O qcow2"),
    (b"<<< ", "is a VDI: write it out with qemu-img convert -O qcow2"),
    (b"QED\0", "is a QED: write it out with qemu-img convert -O qcow2"),
)


@dataclass(frozen=True, slots=True)
class FoundImage:
    """What came in: format (raw or qcow2), bytes of the disk in it and of the file, SHA-256."""

    format: str
    size: int
    file_size: int
    digest: str


class ImageSink(Sink):
    """One base image on its way in; see Sink."""

    def __init__(self, staging: int) -> None:
        super().__init__(staging, "image")
        self._file = -1
        self._length = 0
        self._looked = False
        self._sha = hashlib.sha256()
        self._result: FoundImage | None = None

    @property
    def is_finished(self) -> bool:
        return self._result is not None

    def feed(self, data: Buffer) -> None:
        """Take the next bytes; raises UnknownFormat, Damaged, Invalid, NoSpace; see Sink."""
        with self._refusing():
            view = memoryview(data)
            self._open()
            self._sha.update(view)
            self._write(self._file, self._length, view)
            self._grow(len(view))

    def skip(self, count: int) -> None:
        """Take `count` zero bytes, which the digest counts too; see Sink."""
        with self._refusing():
            self._open()
            if count > LARGEST_HOLE:
                raise Invalid(
                    f"the image has a hole of {show_size(count)}, which takes too long to read: "
                    "write it out with qemu-img convert -O qcow2"
                )
            for start in range(0, count, MIB):
                self._sha.update(_ZEROS[: count - start])
            self._grow(count)

    def finish(self) -> FoundImage:
        """Check that the image is whole and good, sync it, and return what it is.

        One that ends too early is Damaged, but what arrived is kept, so that more may come.
        """
        if self._result is not None:
            return self._result
        if self._refusal is None:
            kind, size = self._examine()
        with self._refusing():
            os.fsync(self._file)
            os.fsync(self._staging)
            os.close(self._file)
            self._file = -1
            self._result = FoundImage(kind, size, self._length, self._sha.hexdigest())
        return self._result

    def discard(self) -> None:
        """Remove what was written; see Sink."""
        if self._result is None and self._file >= 0:
            os.close(self._file)
            self._file = -1
            with contextlib.suppress(FileNotFoundError):
                os.unlink(NAME, dir_fd=self._staging)

    def _open(self) -> None:
        if self._file < 0:
            self._file = self._create(NAME)

    def _grow(self, count: int) -> None:
        self._length += count
        os.ftruncate(self._file, self._length)
        if not self._looked and self._length >= _HEAD:
            # Now, and not after ten gigabytes.
            self._look()

    def _examine(self) -> tuple[str, int]:
        """Return format and size of the disk; raise what is wrong with the image."""
        if not self._length:
            raise Damaged("the image is empty")
        self._look()
        if self._is_qcow2():
            size = self._header(whole=True)
            try:
                check_qcow2(self._file)
            except Damaged as error:
                raise Damaged(f"the image {error}") from None
            return "qcow2", size
        wanted = raw_length(functools.partial(_read, self._file))
        if self._length < wanted or self._length % _SECTOR:
            raise Damaged(
                f"the image is incomplete: it ends after {self._length} bytes, and what is on it "
                f"needs {wanted}"
            )
        return "raw", self._length

    def _look(self) -> None:
        """Raise UnknownFormat for what can be no image, and Damaged for what can be no good one."""
        self._looked = True
        if self._is_qcow2():
            self._header(whole=False)
            return
        head = _read(self._file, 0, _HEAD)
        for magic, words in _FOREIGN:
            if head.startswith(magic):
                raise UnknownFormat(f"the image {words}")
        if not any(head.startswith(magic, offset) for offset, magic in _RAW):
            raise UnknownFormat(
                "the image is neither qcow2 nor a raw disk: there is no partition table and no "
                "filesystem on it"
            )

    def _is_qcow2(self) -> bool:
        return _read(self._file, 0, len(MAGIC)) == MAGIC

    def _header(self, *, whole: bool) -> int:
        try:
            header = read_header(self._file, whole=whole)
        except CocoonError as error:
            raise type(error)(f"the image {error}") from None
        if header.has_backing:
            raise Damaged(
                "the image holds only what differs from another file: put both into one with "
                "qemu-img convert -O qcow2"
            )
        if header.is_dirty:
            raise Damaged(
                "the image was in use when it was copied: repair it with qemu-img check -r all"
            )
        return header.size


def raw_length(read: Callable[[int, int], bytes]) -> int:
    """Return how many bytes at least a raw disk has, by its partition table or filesystem.

    `read` gives what is at an offset, fewer bytes at the end. A raw disk has no end mark: this is
    how one can be told that was cut off.
    """
    head = read(0, 4096)
    size = 0
    if head.startswith(b"EFI PART", 512):
        size = _SECTOR * (_number("<Q", head, 512 + 32) + 1)  # the other header's place is the last
    elif head.startswith(b"XFSB"):
        size = _number(">I", head, 4) * _number(">Q", head, 8)
    elif head.startswith(b"\x53\xef", 0x438):
        size = _number("<I", head, 0x404) << (10 + min(_number("<I", head, 0x418), 6))
    elif head.startswith(b"\x55\xaa", 510):
        entries = [head[start : start + 16] for start in range(446, 510, 16)]
        # Else it is the boot sector of a filesystem.
        if all(entry[0] in (0, 0x80) for entry in entries):
            used = [entry for entry in entries if entry[4]]
            ends = (_number("<I", entry, 8) + _number("<I", entry, 12) for entry in used)
            size = _SECTOR * max(ends, default=0)
    return max(size, _SECTOR)


def _number(kind: str, data: bytes, offset: int) -> int:
    (number,) = struct.unpack_from(kind, data, offset)
    return int(number)


def _read(file: int, offset: int, length: int) -> bytes:
    return os.pread(file, length, offset)
