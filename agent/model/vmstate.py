"""Whether a file that Firecracker wrote as a VM's state is whole.

Its layout is told in Firecracker's src/vmm/src/snapshot/mod.rs: a magic number, the version, the
state, and a CRC-64 of all before it (that of the crate crc64, which is Redis's: Jones's polynomial,
reflected, from zero).
"""

from .errors import Damaged

_MAGIC = (0x0710_1984_8664_0000, 0x0710_1984_AAAA_0000)  # x86_64, aarch64
_POLYNOMIAL = 0x95AC9329AC4BC9B5  # 0xad93d23594c935a9, bits reversed
_WORD = 8
_MOST = 1 << 20  # bytes that are summed up: more takes longer than it is worth


def _table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)


_TABLE = _table()


def crc64(data: bytes) -> int:
    """Return the checksum that Firecracker puts behind its state."""
    value = 0
    for byte in data:
        value = value >> 8 ^ _TABLE[(value ^ byte) & 0xFF]
    return value


def check_vmstate(data: bytes) -> None:
    """Raise Damaged when `data`, the content of a `vmstate`, is not what Firecracker wrote."""
    if int.from_bytes(data[:_WORD], "little") not in _MAGIC:
        raise Damaged("vmstate is not a state that Firecracker wrote")
    if len(data) > _MOST:
        return
    if crc64(data[:-_WORD]) != int.from_bytes(data[-_WORD:], "little"):
        raise Damaged("vmstate is damaged: its checksum is another")
