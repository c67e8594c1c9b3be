"""TAPs that lead nowhere, for network interfaces that a guest is to lose.

Each call makes a network namespace of its own, which nothing else is in and no name leads to: the
kernel keeps it as long as a descriptor of a TAP in it is open, and the host never sees the TAPs.
Constants are those of linux/if_tun.h, linux/if.h, linux/sockios.h and linux/sched.h.
"""

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import trio

from agent.model.errors import Unsupported, from_os_error

DEVICE = "/dev/net/tun"

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_MULTI_QUEUE, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x0100, 0x1000, 0x4000
_SIOCSIFFLAGS, _SIOCSIFMTU = 0x8914, 0x8922
_IFF_UP = 0x1
_LEAST_MTU = 68

_libc = ctypes.CDLL(None, use_errno=True)


def check() -> None:
    """Raise Unsupported where the host has no TAPs; does not wait."""
    if not os.path.exists(DEVICE):
        raise Unsupported(
            f"the snapshot has network interfaces, and this host nothing to connect them to: "
            f"{DEVICE} is missing (modprobe tun)"
        )


@asynccontextmanager
async def unconnected(queues: Sequence[int]) -> AsyncIterator[list[int]]:
    """Lend the descriptors of TAPs: one for each queue of the first, then of the next.

    `queues` are how many each has. Raises Failed and the like.
    """
    try:
        descriptors = await trio.to_thread.run_sync(_in_thread_of_its_own, queues)
    except OSError as error:
        raise from_os_error(error, "making a TAP") from error
    try:
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _in_thread_of_its_own(queues: Sequence[int]) -> list[int]:
    # A thread stays in the namespace that it has made: this one ends.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(_open, queues).result()


def _open(queues: Sequence[int]) -> list[int]:
    if _libc.unshare(_CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    descriptors: list[int] = []
    try:
        for index, count in enumerate(queues):
            name = f"nic{index}".encode()
            flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if count > 1 else 0)
            for _ in range(count):
                descriptors.append(os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
                fcntl.ioctl(descriptors[-1], _TUNSETIFF, struct.pack("16sH22x", name, flags))
            _set_up(name)
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return descriptors


def _set_up(name: bytes) -> None:
    """Let the TAP take what the guest sends: writing to one that is down fails, and ends a VMM."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as control:
        # With less than 1280 bytes it has no IPv6, and so nothing to say to the guest.
        fcntl.ioctl(control, _SIOCSIFMTU, struct.pack("16si20x", name, _LEAST_MTU))
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name, _IFF_UP))
