"""Every errno of the contract that a VM of its own can meet, by system calls."""

import contextlib
import errno
import json
import os
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@contextlib.contextmanager
def fails(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as raised:  # noqa: PT011 - the errno is checked below
        yield
    assert errno.errorcode[raised.value.errno or 0] == errno.errorcode[number]


@contextlib.contextmanager
def refuses(vm: Any, agent: Any, number: int, *words: str) -> Iterator[None]:
    """The body fails with `number`, changes nothing, and is told in `error` and `errors`."""
    before = vm.read("config"), vm.state
    with fails(number):
        yield
    assert (vm.read("config"), vm.state) == before
    told = vm.read("error"), (agent.mount / "errors").read_text().splitlines()[-1]
    for word in words:
        assert word in told[0]
        assert word in told[1]
    assert f" 0 vms/{vm.name}/" in told[1]
    assert any(told[0] in line for line in agent.lines())


def test_bash_tells_of_an_unknown_verb(agent, make_vm):
    vm = make_vm()
    done = subprocess.run(
        ["bash", "-c", f"echo bogus > {vm.path}/state"], capture_output=True, text=True
    )
    assert done.stderr.endswith("write error: Invalid argument\n")
    for verb in ("start", "stop", "kill", "pause", "resume", "restart"):
        assert verb in vm.read("error")
    assert vm.state == "created"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("state", "bogus", ["bogus", "start, stop, kill"]),
        ("state", "", ["start, stop, kill"]),
        ("state", "pause", ["pause", "created"]),
        ("config", '{"colour": "red"}', ["colour", "memory"]),
        ("config", '{"cpu": 100000}', ["cpu"]),
        ("config", '{"memory": }', ["JSON"]),
        ("config", "[1]", ["object"]),
        ("memory", "1K", ["memory"]),
        ("restart", "sometimes", ["restart", "on-failure"]),
        ("disks", "{}", ["disks"]),
    ],
)
def test_einval_for_what_is_wrong(agent, make_vm, name, text, words):
    vm = make_vm()
    with refuses(vm, agent, errno.EINVAL, *words):
        vm.write(name, text)


def test_ebusy_for_what_needs_the_vm_stopped(agent, make_vm):
    vm = make_vm()
    vm.verb("start")
    with refuses(vm, agent, errno.EBUSY, "storage", "stop"):
        vm.write("storage", "128M")
    with fails(errno.EBUSY):
        vm.path.rmdir()
    with fails(errno.EBUSY):
        vm.path.rename(vm.path.with_name("other"))
    assert vm.state == "running"


def test_eexist_for_a_name_that_is_taken(agent, make_vm):
    vm, other = make_vm(), make_vm()
    with fails(errno.EEXIST):
        vm.path.mkdir()
    with fails(errno.EEXIST):
        vm.path.rename(other.path)
    with fails(errno.EEXIST):
        (agent.mount / "create").write_text(json.dumps({"name": vm.name}))
    assert vm.name in (agent.mount / "errors").read_text().splitlines()[-1]


def test_enoent_for_what_a_write_names_and_is_not_there(agent, make_vm):
    vm = make_vm()
    with refuses(vm, agent, errno.ENOENT, "/no/such/kernel"):
        vm.write("boot", '{"kernel": "/no/such/kernel"}')
    with fails(errno.ENOENT):
        (agent.mount / "vms" / ".Trash").stat()


def test_eopnotsupp_for_what_no_backend_does(agent, make_vm):
    vm = make_vm(hypervisor="firecracker", boot=None)
    firmware = Path("/var/lib/cocoon/boot/firmware.fd")
    firmware.write_bytes(bytes(64 << 10))
    vm.write("boot", '{"firmware": "firmware.fd"}')
    with refuses(vm, agent, errno.EOPNOTSUPP, "qemu can"):
        vm.verb("start")
    tied = make_vm(hypervisor="firecracker", queue_affinity=[[0]])
    with refuses(tied, agent, errno.EOPNOTSUPP, "cloud-hypervisor does"):
        tied.verb("start")


def test_enoexec_for_a_file_of_an_unknown_format(agent, make_vm, tmp_path):
    vm = make_vm()
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"no kernel at all" * 1000)
    with refuses(vm, agent, errno.ENOEXEC, "kernel"):
        vm.write("boot", json.dumps({"kernel": str(kernel)}))


def test_ebadmsg_for_half_a_document(agent, make_vm):
    vm = make_vm()
    fd = os.open(vm.path / "config", os.O_WRONLY)
    os.write(fd, b'{"memory": ')
    with refuses(vm, agent, errno.EBADMSG, "incomplete"):
        os.close(fd)


def test_enospc_leaves_nothing_half_made(agent, make_vm, guests, tmp_path):
    kernel = tmp_path / "kernel"
    kernel.write_bytes(guests.guest.read_bytes() + os.urandom(100_000))
    vm = make_vm(boot={"kernel": str(kernel)})
    store = agent.root_dir / "kernels"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", store], check=True)
    try:
        with refuses(vm, agent, errno.ENOSPC, "space"):
            vm.verb("start")
        assert os.listdir(store) == []
    finally:
        subprocess.run(["umount", store], check=True)
    vm.verb("start")


def test_etimedout_for_a_vmm_that_does_not_answer(agent, make_vm):
    vm = make_vm()
    vm.verb("start")
    pid = vm.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        with refuses(vm, agent, errno.ETIMEDOUT, "10 seconds"):
            vm.verb("pause")
        vm.verb("kill")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    assert vm.state == "stopped"


def test_eio_carries_the_vmms_own_message(agent, make_vm, guests, tmp_path):
    kernel = tmp_path / "kernel"
    kernel.write_bytes(loaded_nowhere(guests.guest.read_bytes()))
    vm = make_vm(boot={"kernel": str(kernel)})
    with fails(errno.EIO):
        vm.verb("start")
    assert vm.state == "error"
    assert "kernel" in vm.read("error").lower()
    assert vm.read("error") in (agent.mount / "errors").read_text().splitlines()[-1]


def loaded_nowhere(kernel: bytes) -> bytes:
    """A kernel that asks to be loaded where no guest has memory (p_paddr of elf(5))."""
    changed = bytearray(kernel)
    (table,) = struct.unpack_from("<Q", changed, 32)
    entry, count = struct.unpack_from("<HH", changed, 54)
    for start in range(table, table + entry * count, entry):
        struct.pack_into("<Q", changed, start + 24, 1 << 45)
    return bytes(changed)


def test_econnaborted_when_the_agent_goes_away(agent, make_vm, guests):
    vm = make_vm(boot={"kernel": str(guests.halt)}, stop_timeout=20)
    vm.verb("start")
    writer = subprocess.Popen(
        ["bash", "-c", f"echo stop > {vm.path}/state"], stderr=subprocess.PIPE, text=True
    )
    vm.wait_for_state("stopping")
    agent.kill()
    assert "write error: Software caused connection abort" in writer.communicate(timeout=20)[1]
    vm.verb("kill")
    assert vm.state == "stopped"


def test_enotconn_while_the_agent_is_dead(agent, make_vm, until):
    vm = make_vm()
    pid = agent.pid
    drop_in = Path(f"/run/systemd/system/{agent.unit}.d/slow.conf")
    drop_in.parent.mkdir(parents=True, exist_ok=True)
    drop_in.write_text("[Service]\nRestartSec=2\n")
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    try:
        subprocess.run(["systemctl", "kill", "--signal=KILL", agent.unit], check=True)
        until(lambda: agent.pid == 0)
        for look in (vm.path.stat, agent.mount.stat, lambda: vm.verb("start")):
            with fails(errno.ENOTCONN):
                look()
        agent.wait_ready(other_than=pid)
        assert vm.state == "created"
    finally:
        drop_in.unlink()
        subprocess.run(["systemctl", "daemon-reload"], check=True)
