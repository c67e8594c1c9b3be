"""How long a snapshot pauses its VM."""

import array
import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator

import product
from backends import QMP_CAPABILITIES, QMP_GREETING, Backend, Step, qmp
from product import MIB
from report import Row

from agent.model import canonical
from agent.storage.reflink import SHARED, copy_file

PAUSED_MEMORY = 1024 * MIB
BY_HAND = "/var/lib/cocoon/by-hand"
_MS = 1000
_PATIENCE = 60.0


def pause(backend: Backend, long: bool) -> Iterator[Row]:
    """How long a snapshot pauses its VM."""
    yield from (_pause_tracked if backend.tracks_changes else _pause_beside)(backend, long)


def _pause_tracked(backend: Backend, long: bool) -> Iterator[Row]:
    """How long the first snapshot of a guest, and one after it has changed 16 MiB, pause it."""
    first, second = [], []
    for number in range(9 if long else 3):
        name = f"paused{number}"
        _run(name, backend, track_dirty=True)
        first.append(_taken(name, f"{name}-first"))
        product.write(f"{product.VMS}/{name}/console", "m")
        _wait_for(name, b"dirtied")
        second.append(_taken(name, f"{name}-second"))
        for snapshot in ("first", "second"):
            os.unlink(f"{product.MOUNT}/snapshots/{name}-{snapshot}.tar")
        product.remove(name)
    what = f"pause of {PAUSED_MEMORY // MIB} MiB with 16 MiB changed, beside the first"
    yield Row(what, "ms", second, first, most=0.1)


def _pause_beside(backend: Backend, long: bool) -> Iterator[Row]:
    """How long a snapshot pauses a guest with 16 MiB of data, beside the VMM's bare commands.

    Both in one VM, which is the same after each.
    """
    ours, theirs = [], []
    _run("paused", backend)
    product.write(f"{product.VMS}/paused/console", "m")
    _wait_for("paused", b"dirtied")
    with open(f"{product.VMS}/paused/id") as file:
        vm_id = file.read().strip()
    for number in range(30 if long else 10):
        with product.agent_frozen():
            took = _MS * _by_hand(vm_id)
        ours.append(_taken("paused", "paused"))
        os.unlink(f"{product.MOUNT}/snapshots/paused.tar")
        product.settle()
        theirs.append(took)
        if number == 0:  # finds caches cold
            ours, theirs = [], []
    product.remove("paused")
    what = f"pause of {PAUSED_MEMORY // MIB} MiB of which 16 MiB are in use"
    yield Row(what, "ms", ours, theirs, most=1.3)


def _run(name: str, backend: Backend, **keys: object) -> None:
    product.create(name, PAUSED_MEMORY, guest="guest.elf", hypervisor=backend.name, **keys)
    product.start(name)


def _by_hand(vm_id: str) -> float:
    """Do what a snapshot of QEMU's needs while its guest stands still; return the seconds."""
    directory = f"/var/lib/cocoon/vms/{vm_id}"
    os.mkdir(BY_HAND)
    target = os.open(BY_HAND, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as api:
        api.connect(f"/run/cocoon/{vm_id}/sock/api")
        for step in QMP_GREETING:
            _say(api, step)
        began = time.perf_counter()
        _say(api, Step(qmp("stop"), b'"return"'))
        _say(api, QMP_CAPABILITIES)
        state = os.open(f"{BY_HAND}/vmstate", os.O_WRONLY | os.O_CREAT)
        _say(api, Step(qmp("getfd", fdname="by-hand"), b'"return"'), state)
        _say(api, Step(qmp("migrate", uri="fd:by-hand"), b'"status": "completed"'))
        for copied in ("mem", canonical.COW):
            with contextlib.suppress(FileNotFoundError):
                source = os.open(f"{directory}/{copied}", os.O_RDONLY)
                copy_file(source, target, copied, mode=SHARED, sync=False)
                os.close(source)
        _say(api, Step(qmp("cont"), b'"RESUME"'))
        took = time.perf_counter() - began
    os.close(state)
    os.close(target)
    shutil.rmtree(BY_HAND)
    return took


def _say(api: socket.socket, step: Step, file: int = -1) -> None:
    if file >= 0:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))
        api.sendmsg([step.request], [rights])
    elif step.request:
        api.sendall(step.request)
    heard = b""
    while step.answer not in heard:
        assert b'"error"' not in heard, heard
        data = api.recv(4096)
        assert data, heard
        heard += data


def _taken(name: str, snapshot: str) -> float:
    """Take a snapshot; return how many milliseconds the VM was paused."""
    product.write(f"{product.VMS}/{name}/snapshot", snapshot)
    with open(f"{product.MOUNT}/snapshots/{snapshot}.json") as file:
        return float(json.load(file)["pause_ms"])


def _wait_for(name: str, text: bytes) -> None:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        with open(f"{product.VMS}/{name}/console", "rb") as console:
            if text in console.read():
                return
        time.sleep(0.05)
    raise TimeoutError(f"the guest of {name} does not say {text!r}")
