"""Whether KVM really runs guests: asked of KVM itself, not of its device node.

Some hosts offer a /dev/kvm on which small guests run and Linux does not. The question is one vCPU
in 64-bit mode with an instruction that such implementations lack, a short loop, and a halt. The
interface is Documentation/virt/kvm/api.rst of Linux; structures are those of x86.
"""

import ctypes
import fcntl
import mmap
import os
import struct

import trio

DEVICE = "/dev/kvm"

_API_VERSION = 12
_GET_API_VERSION, _CREATE_VM, _VCPU_SIZE = 0xAE00, 0xAE01, 0xAE04
_CREATE_VCPU, _RUN = 0xAE41, 0xAE80
_SET_MEMORY, _SET_REGISTERS = 0x4020AE46, 0x4090AE82
_GET_SPECIAL, _SET_SPECIAL, _SPECIAL_SIZE = 0x8138AE83, 0x4138AE84, 312
_EXIT_REASON_AT, _EXIT_HALT = 8, 5

_MEMORY = 64 << 10
_CODE_AT, _TABLES_AT = 0x1000, 0x2000
_CODE = (
    b"\x48\xc7\xc7\x00\x80\x00\x00"  # mov rdi, 0x8000
    b"\xf0\x48\x0f\xc7\x0f"  # lock cmpxchg16b [rdi]
    b"\xb9\xe8\x03\x00\x00"  # mov ecx, 1000
    b"\xff\xc9\x75\xfc"  # dec ecx; jnz back
    b"\xf4"  # hlt
)
_PRESENT_WRITABLE, _LARGE = 0x3, 0x80
# kvm_segment: base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable, padding.
_SEGMENT = struct.Struct("<QIH10B")
_CODE_SEGMENT = _SEGMENT.pack(0, 0xFFFFFFFF, 8, 11, 1, 0, 0, 1, 1, 1, 0, 0, 0)
_DATA_SEGMENT = _SEGMENT.pack(0, 0xFFFFFFFF, 16, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
_DATA_SEGMENTS = 5  # ds, es, fs, gs, ss, which follow cs
_CONTROL_AT = 224  # cr0, cr2, cr3, cr4, cr8, efer
_CR0, _CR4, _EFER = 0x80000011, 0x20, 0x500  # paging, protection; PAE; long mode


_known: list[str] = []


async def kvm_obstacle() -> str:
    """Return what `refusal` says of this host, which is asked once."""
    if not _known:
        _known.append(await trio.to_thread.run_sync(refusal))
    return _known[0]


def refusal(device: str = DEVICE) -> str:
    """Return why KVM runs no guests on this host, "" when it does; takes some milliseconds."""
    try:
        kvm = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return f"there is no {device}"
    except OSError as error:
        return f"{device} cannot be opened: {error.strerror}"
    try:
        if fcntl.ioctl(kvm, _GET_API_VERSION) != _API_VERSION:
            return f"{device} is of another version"
        reason = _run(kvm)
    except OSError as error:
        return f"{device} makes no VM: {error.strerror}"
    finally:
        os.close(kvm)
    return "" if reason == _EXIT_HALT else f"{device} does not run 64-bit guests (exit {reason})"


def _run(kvm: int) -> int:
    """Return the reason for which the test guest leaves its vCPU."""
    machine = fcntl.ioctl(kvm, _CREATE_VM, 0)
    try:
        vcpu = fcntl.ioctl(machine, _CREATE_VCPU, 0)
        try:
            with (
                mmap.mmap(-1, _MEMORY) as memory,
                mmap.mmap(vcpu, fcntl.ioctl(kvm, _VCPU_SIZE)) as state,
            ):
                _prepare(memory, machine, vcpu)
                fcntl.ioctl(vcpu, _RUN, 0)
                (reason,) = struct.unpack_from("<I", state, _EXIT_REASON_AT)
                return int(reason)
        finally:
            os.close(vcpu)
    finally:
        os.close(machine)


def _prepare(memory: mmap.mmap, machine: int, vcpu: int) -> None:
    memory[_CODE_AT : _CODE_AT + len(_CODE)] = _CODE
    # Three levels, and a page of 2 MiB at address 0.
    for at, entry in (
        (_TABLES_AT, (_TABLES_AT + 0x1000) | _PRESENT_WRITABLE),
        (_TABLES_AT + 0x1000, (_TABLES_AT + 0x2000) | _PRESENT_WRITABLE),
        (_TABLES_AT + 0x2000, _PRESENT_WRITABLE | _LARGE),
    ):
        struct.pack_into("<Q", memory, at, entry)
    first = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(first)
    del first  # else the memory could not be unmapped
    fcntl.ioctl(machine, _SET_MEMORY, struct.pack("<IIQQQ", 0, 0, 0, _MEMORY, address))
    special = bytearray(_SPECIAL_SIZE)
    fcntl.ioctl(vcpu, _GET_SPECIAL, special)
    segments = _CODE_SEGMENT + _DATA_SEGMENTS * _DATA_SEGMENT
    special[: len(segments)] = segments
    struct.pack_into("<QQQQQQ", special, _CONTROL_AT, _CR0, 0, _TABLES_AT, _CR4, 0, _EFER)
    fcntl.ioctl(vcpu, _SET_SPECIAL, bytes(special))
    registers = [0] * 16 + [_CODE_AT, 2]  # rip, rflags
    fcntl.ioctl(vcpu, _SET_REGISTERS, struct.pack("<18Q", *registers))
