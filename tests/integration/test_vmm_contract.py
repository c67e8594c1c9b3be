"""The VMMs that are made from descriptions beside the real ones: the same steps, the same answers.

The real ones run alone: no unit, no jail, no agent.
"""

import contextlib
import json
import os
import shutil
import subprocess
from contextlib import asynccontextmanager

import pytest
import trio
from ch_api import environment
from described_vmm import EMPTY, RUNNING, VMMS

from agent.model.errors import Failed
from agent.vmm.cloud_hypervisor import CloudHypervisor
from agent.vmm.firecracker import Firecracker
from agent.vmm.http import HttpApi

pytestmark = pytest.mark.anyio

FILES = {"snapshot_path": "state", "mem_file_path": "memory"}
MEMORY = {"mem_backend": {"backend_type": "File", "backend_path": "memory"}}
DRIVERS = {"firecracker": Firecracker(), "cloud-hypervisor": CloudHypervisor()}
REQUESTS = {
    "firecracker": {
        "state": ("GET", "/", None),
        "pause": ("PATCH", "/vm", {"state": "Paused"}),
        "resume": ("PATCH", "/vm", {"state": "Resumed"}),
        "snapshot": ("PUT", "/snapshot/create", FILES),
        "load": ("PUT", "/snapshot/load", {"snapshot_path": "state"} | MEMORY),
        "button": ("PUT", "/actions", {"action_type": "SendCtrlAltDel"}),
    },
    "cloud-hypervisor": {
        "state": ("GET", "/api/v1/vm.info", None),
        "boot": ("PUT", "/api/v1/vm.boot", None),
        "pause": ("PUT", "/api/v1/vm.pause", None),
        "resume": ("PUT", "/api/v1/vm.resume", None),
        "snapshot": ("PUT", "/api/v1/vm.snapshot", {"destination_url": "file://."}),
        "restore": ("PUT", "/api/v1/vm.restore", {"source_url": "file://."}),
        "button": ("PUT", "/api/v1/vm.power-button", None),
        "cpus": ("PUT", "/api/v1/vm.resize", {"desired_vcpus": 99}),
        "fewer": ("PUT", "/api/v1/vm.resize", {"desired_vcpus": 1}),
        "same": ("PUT", "/api/v1/vm.resize", {"desired_vcpus": 2}),
        "more": ("PUT", "/api/v1/vm.resize", {"desired_vcpus": 3}),
        "odd": ("PUT", "/api/v1/vm.resize", {"desired_ram": (64 << 20) + 4096}),
        "memory": ("PUT", "/api/v1/vm.resize", {"desired_ram": (64 + 128) << 20}),
        "wide": (
            "PUT",
            "/api/v1/vm.add-disk",
            {"path": "disk", "id": "three", "num_queues": 5, "image_type": "Raw"},
        ),
        "add": ("PUT", "/api/v1/vm.add-disk", {"path": "disk", "id": "two", "image_type": "Raw"}),
        "remove": ("PUT", "/api/v1/vm.remove-device", {"id": "two"}),
        "shutdown": ("PUT", "/api/v1/vm.shutdown", None),
    },
}
LIVES = {
    "firecracker": [
        (RUNNING, "resume snapshot load pause pause snapshot load resume pause button"),
        (EMPTY, "resume pause snapshot button load load pause snapshot resume load pause button"),
    ],
    "cloud-hypervisor": [
        (
            RUNNING,
            "boot restore resume snapshot button cpus odd memory same wide add add remove remove "
            "add pause boot pause restore snapshot button cpus odd more remove fewer same more "
            "shutdown shutdown restore pause resume snapshot button fewer same remove boot boot "
            "shutdown add add remove remove boot pause resume add fewer cpus more same",
        ),
        (EMPTY, "boot pause resume snapshot button cpus odd add remove shutdown"),
    ],
}
"""The state in which each begins, and its steps; the later load what the first has saved."""


@pytest.fixture(autouse=True)
async def deadline():
    with trio.fail_after(60):
        yield


@pytest.fixture(params=["firecracker-1.12", "cloud-hypervisor-53"])
def name(request):
    """The name of a description, of whose VMM there is a real one."""
    program = request.param.rpartition("-")[0]
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    return request.param


@pytest.fixture
def arguments(guests, tmp_path, monkeypatch):
    """`arguments(program, state)` starts one that has booted a guest, or is empty."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    machine = {"vcpu_count": 1, "mem_size_mib": 64}
    boot = {"kernel_image_path": str(guests.guest)}
    document = {"boot-source": boot, "machine-config": machine, "drives": []}
    (tmp_path / "vm.json").write_text(json.dumps(document))
    socket = {"firecracker": "--api-sock", "cloud-hypervisor": "--api-socket"}
    further = {
        "firecracker": ["--config-file", "vm.json"],
        "cloud-hypervisor": [
            *("--kernel", str(guests.guest), "--memory", "size=64M", "--cpus", "boot=2,max=4"),
            *("--serial", "null", "--console", "off"),
        ],
    }
    return lambda program, state: [
        *(program, socket[program], "real"),
        *(further[program] if state == RUNNING else ()),
    ]


@asynccontextmanager
async def running(arguments, state):
    """Run the real one until it is in the state; the value is its API."""
    driver = DRIVERS[arguments[0]]
    with open("log", "wb") as log:
        process = await trio.lowlevel.open_process(
            arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment()
        )
    try:
        while process.poll() is None and not (
            os.path.exists("real") and (state == EMPTY or driver.answers(process.pid))
        ):
            await trio.sleep(0.002)
        async with reach("real") as api:
            yield api
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        for path in ("real", "real.lock"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


@asynccontextmanager
async def reach(path):
    socket = os.open(path, os.O_PATH)
    try:
        yield HttpApi(socket, "it")
    finally:
        os.close(socket)


async def go_through(api, requests, steps):
    """Take the steps; return what each was answered, and the state that it left."""
    return [(step, await ask(api, *requests[step]), await tell(api, requests)) for step in steps]


async def ask(api, method, path, body):
    """Return the refusal, None when there is none."""
    try:
        await api.call(method, path, body, timeout=30)
    except Failed as refusal:
        return str(refusal)
    return None


async def tell(api, requests):
    try:
        return (await api.call(*requests["state"], timeout=30))["state"]
    except Failed as refusal:
        return str(refusal)


async def test_the_real_one_answers_as_the_one_made_from_its_description(name, arguments):
    program = name.rpartition("-")[0]
    for state, steps in LIVES[program]:
        described = VMMS[name](name, state)
        async with described.serving("described"), reach("described") as api:
            expected = await go_through(api, REQUESTS[program], steps.split())
        async with running(arguments(program, state), state) as api:
            assert await go_through(api, REQUESTS[program], steps.split()) == expected
