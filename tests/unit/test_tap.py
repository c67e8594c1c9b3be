"""TAPs that lead nowhere: they take what a guest sends, and the host sees nothing of them."""

import errno
import fcntl
import os
import socket
import struct

import pytest
import trio

from agent.model.errors import Failed, Unsupported
from agent.vmm import tap

pytestmark = pytest.mark.anyio
TUNGETIFF = 0x800454D2  # linux/if_tun.h
FRAME = bytes(10) + b"\xff" * 6 + bytes(54)
"""Behind the header of virtio's, one for everybody."""

needs_tap = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists(tap.DEVICE), reason="makes TAPs"
)


def interface(descriptor):
    """The name of the TAP, and whether it has several queues."""
    answer = fcntl.ioctl(descriptor, TUNGETIFF, bytes(40))
    name, flags = struct.unpack("16sH22x", answer)
    return name.rstrip(b"\0").decode(), bool(flags & 0x0100)


def namespace():
    """The network namespace of the thread that asks."""
    return os.stat("/proc/thread-self/ns/net").st_ino


@needs_tap
async def test_each_queue_is_a_descriptor_that_takes_all_and_gives_nothing():
    async with tap.unconnected([1, 3]) as descriptors:
        found = [interface(descriptor) for descriptor in descriptors]
        assert found == [("nic0", False), *[("nic1", True)] * 3]
        for descriptor in descriptors:
            for _ in range(3):
                assert os.write(descriptor, FRAME) == len(FRAME)
            with pytest.raises(BlockingIOError):
                os.read(descriptor, 2000)
    for descriptor in descriptors:
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.fstat(descriptor)


@needs_tap
async def test_neither_the_host_nor_a_thread_that_goes_on_is_where_they_are():
    names, own = socket.if_nameindex(), namespace()
    async with tap.unconnected([1]):
        assert socket.if_nameindex() == names
        assert own == namespace() == await trio.to_thread.run_sync(namespace)


@needs_tap
async def test_what_fails_leaves_no_descriptor(monkeypatch):
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(tap, "DEVICE", "/dev/null")
    with pytest.raises(Failed, match="making a TAP failed"):
        async with tap.unconnected([2, 1]):
            pass
    assert os.listdir("/proc/self/fd") == before


def test_a_host_without_them_is_told_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(tap, "DEVICE", str(tmp_path / "tun"))
    with pytest.raises(Unsupported, match="modprobe tun"):
        tap.check()
    (tmp_path / "tun").touch()
    tap.check()
