"""What the floor must know of each backend: what to say to its VMM, and what a clone of it needs.

The product's own driver makes the VMM's arguments and configuration; the talk is written out here.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from agent.model import canonical
from agent.vmm.cloud_hypervisor import CloudHypervisor
from agent.vmm.driver import Driver
from agent.vmm.firecracker import Firecracker
from agent.vmm.qemu import Qemu
from agent.vmm.qemu_state import HEAD_SIZE


@dataclass(frozen=True)
class Step:
    """What is sent, and what the VMM says then; `file` of the VM's directory goes with it.

    QEMU reads the file from `offset` on. It is sent again, a moment later, when the answer has one
    of `not_yet`.
    """

    request: bytes
    answer: bytes
    file: str = ""
    offset: int = 0
    not_yet: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Backend:
    """One VMM program: how to `ask` whether its guest runs, and how to `load` a snapshot.

    A clone has links to the snapshot's files that are `linked`, and copies of those `copied`.
    `burst` VMs are started at once, and again beside `others`.
    """

    name: str
    driver: Callable[[], Driver]
    ask: tuple[Step, ...]
    load: tuple[Step, ...]
    linked: tuple[str, ...]
    copied: tuple[str, ...]
    burst: int
    others: int
    tracks_changes: bool = False


def _http(method: str, path: str, body: str = "") -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


def qmp(command: str, **arguments: Any) -> bytes:
    """Return a command for QEMU."""
    return json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"


QMP_GREETING = (Step(b"", b'"QMP"'), Step(qmp("qmp_capabilities"), b'"return"'))
QMP_CAPABILITIES = Step(
    qmp(
        "migrate-set-capabilities",
        capabilities=[
            {"capability": name, "state": True} for name in ("x-ignore-shared", "events")
        ],
    ),
    b'"return"',
)

FIRECRACKER = Backend(
    name="firecracker",
    driver=Firecracker,
    ask=(Step(_http("GET", "/"), b'"state":"Running"'),),
    load=(
        Step(
            _http(
                "PUT",
                "/snapshot/load",
                json.dumps(
                    {
                        "snapshot_path": f"{canonical.VM}/vmstate",
                        "mem_backend": {
                            "backend_type": "File",
                            "backend_path": f"{canonical.VM}/mem",
                        },
                        "resume_vm": True,
                    }
                ),
            ),
            b" 204 ",
        ),
    ),
    linked=("mem", "vmstate"),
    copied=(canonical.COW,),
    burst=64,
    others=128,
    tracks_changes=True,
)

QEMU = Backend(
    name="qemu",
    driver=Qemu,
    ask=(*QMP_GREETING, Step(qmp("query-status"), b'"status": "running"')),
    load=(
        *QMP_GREETING,
        QMP_CAPABILITIES,
        Step(qmp("getfd", fdname="state"), b'"return"', "vmstate", HEAD_SIZE),
        Step(qmp("migrate-incoming", uri="fd:state"), b'"status": "completed"'),
        Step(qmp("cont"), b'"return"'),
    ),
    linked=("vmstate",),
    copied=("mem", canonical.COW),
    burst=16,
    others=0,
)

_IS_RUNNING = Step(
    _http("GET", "/api/v1/vm.info"),
    b'"state":"Running"',
    not_yet=(b'"state":"', b"HTTP/1.1 404", b"HTTP/1.1 500"),
)

CLOUD_HYPERVISOR = Backend(
    name="cloud-hypervisor",
    driver=CloudHypervisor,
    ask=(_IS_RUNNING,),
    load=(_IS_RUNNING,),  # what to load is on its command line
    linked=("memory-ranges", "state.json", "config.json"),
    copied=(canonical.COW,),
    burst=64,
    others=128,
)

BACKENDS: Mapping[str, Backend] = {
    backend.name: backend for backend in (FIRECRACKER, QEMU, CLOUD_HYPERVISOR)
}
