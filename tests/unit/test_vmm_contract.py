"""The drivers with VMMs made from the published descriptions: lives, refusals, silence, death."""

import ast
import contextlib
import inspect
import json
import os
import subprocess
import sys
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

import described_vmm
import pytest
import trio
from described_vmm import CREATED, EMPTY, PAUSED, RUNNING, VMMS, Refusal

import agent.vmm
from agent.model import canonical
from agent.model.config import VmConfig
from agent.model.disks import Drive
from agent.model.errors import Failed, TimedOut
from agent.model.size import MIB
from agent.vmm import cloud_hypervisor, firecracker, tap
from agent.vmm.cloud_hypervisor import CloudHypervisor, CloudHypervisorVmm
from agent.vmm.driver import VmmState
from agent.vmm.firecracker import Firecracker, FirecrackerVmm

pytestmark = pytest.mark.anyio

FIRECRACKER = (Firecracker, FirecrackerVmm, firecracker)
DRIVERS = {
    "firecracker-1.12": FIRECRACKER,
    "firecracker-1.16": FIRECRACKER,
    "cloud-hypervisor-53": (CloudHypervisor, CloudHypervisorVmm, cloud_hypervisor),
}
FILES = {"state": f"{canonical.VM}/save/state", "memory": f"{canonical.VM}/save/memory"}
CALLS = {
    "state": [{}],
    "pause": [{}],
    "resume": [{}],
    "power_off": [{}],
    "stats": [{}],
    "prepare_snapshot": [{}],
    "snapshot": [{**FILES, "diff": diff} for diff in (False, True)],
    "load": [
        {**FILES, "track_dirty": track_dirty, "resume": resume}
        for track_dirty in (False, True)
        for resume in (False, True)
    ],
}
"""All that a connection can do: by method, the arguments that make it ask for different things."""
DISK = Drive(f"{canonical.VM}/data-d.raw")
CHANGES = {
    "set_cpus": (3,),
    "set_memory": (192 * MIB,),
    "add_disk": (DISK, VmConfig(cpu=2, queue_affinity=((1,), (0, 2)))),
    "remove_disk": (DISK,),
}
"""What changes the hardware of a guest, where that can be."""


@pytest.fixture(params=VMMS)
def name(request):
    """The name of a description, and so of a VMM and its version."""
    return request.param


@pytest.fixture
def described(name):
    """`described(state, …)` is the VMM."""
    return lambda state=RUNNING, **more: VMMS[name](name, state, **more)


@pytest.fixture
def connected(name, tmp_path):
    """`async with connected(vmm)` serves the VMM; its value is the driver's connection."""

    @asynccontextmanager
    async def connect(vmm):
        path = tmp_path / "api"
        async with vmm.serving(path), reach(name, path) as connection:
            yield connection

    return connect


@asynccontextmanager
async def reach(name, path, directory=nullcontext):
    socket = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    try:
        async with DRIVERS[name][0]().connect(socket, directory) as connection:
            yield connection
    finally:
        os.close(socket)


@pytest.fixture
def with_nics(tmp_path, monkeypatch):
    """`async with with_nics(vmm)` serves a Cloud Hypervisor that has a guest with such to load."""

    @asynccontextmanager
    async def unconnected(queues):
        with open(os.devnull) as file:
            yield [file.fileno()] * sum(queues)

    @contextlib.contextmanager
    def directory():
        own = os.open(tmp_path, os.O_RDONLY)
        yield own
        os.close(own)

    @asynccontextmanager
    async def serve(vmm):
        monkeypatch.setattr(tap, "unconnected", unconnected)
        net = [{"id": "_net0", "num_queues": 2}, {"id": "_net1", "num_queues": 4}]
        (tmp_path / "config.json").write_text(json.dumps({"net": net}))
        path = tmp_path / "api"
        async with vmm.serving(path), reach("cloud-hypervisor-53", path, directory) as connection:
            yield vmm, connection

    return serve


def before(name, method):
    """The state that a method is for: Firecracker is told to load, Cloud Hypervisor has loaded."""
    if method == "load" and "firecracker" in name:
        return EMPTY
    return PAUSED if method in ("resume", "snapshot", "load") else RUNNING


@pytest.fixture(params=CALLS)
def method(request):
    return request.param


async def call(connection, method, **more):
    return await getattr(connection, method)(**CALLS[method][-1], **more)


def test_every_method_of_a_connection_is_tried(name):
    functions = inspect.getmembers(DRIVERS[name][1], inspect.isfunction)
    assert {key for key, _ in functions if key[0] != "_"} == CALLS.keys()


async def test_every_request_that_the_driver_names_is_sent_as_described(
    name, described, connected, with_nics
):
    vmm = described(EMPTY)
    async with connected(vmm) as connection:
        assert await connection.state() is VmmState.EMPTY
    sent = {path for _, path, _ in vmm.requests}
    for method, variants in CALLS.items():
        for arguments in variants:
            vmm = described(before(name, method))
            async with connected(vmm) as connection:
                await getattr(connection, method)(**arguments)
            sent |= {path for _, path, _ in vmm.requests}
    if "cloud" in name:
        vmm = described(hotplug=128 * MIB)
        async with connected(vmm) as connection:
            for change, wanted in CHANGES.items():
                await getattr(connection.live, change)(*wanted)
        sent |= {path for _, path, _ in vmm.requests}
        async with with_nics(described(EMPTY)) as (vmm, connection):
            await connection.load(**FILES, restore_mode="copy")
        sent |= {path for _, path, _ in vmm.requests}
    sources = [path.read_text() for path in Path(agent.vmm.__file__).parent.glob("*.py")]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    words = {node.value for node in nodes if isinstance(node, ast.Constant)}
    lead = "/" if vmm.description.root else ""  # the driver's words follow the root
    assert sent == {path for path in vmm.description.paths if path.removeprefix(lead) in words}


async def test_nothing_is_sent_that_the_version_calls_deprecated(name, described, connected):
    sent = set()
    for arguments in CALLS["load"]:
        vmm = described(before(name, "load"))
        async with connected(vmm) as connection:
            await connection.load(**arguments)
        sent |= {field for _, _, body in vmm.requests for field in body or ()}
    schemas = vmm.description.schemas
    fields = schemas.get("SnapshotLoadParams", schemas.get("RestoreConfig"))["properties"]
    assert not sent & {field for field, about in fields.items() if "Deprecated" in str(about)}


async def test_a_life_from_a_boot_to_the_end(described, connected):
    vmm = described(balloon=128 * MIB)
    async with connected(vmm) as connection:
        assert await connection.state() is VmmState.RUNNING
        for _ in range(2):  # what is so already stays so
            await connection.pause()
            assert await connection.state() is VmmState.PAUSED
        await connection.snapshot(**FILES)
        for _ in range(2):
            await connection.resume()
            assert await connection.state() is VmmState.RUNNING
        assert await connection.stats() == {"vcpus": 2, "balloon_target": 128 * MIB}
        await connection.power_off()
    path, body = vmm.requests[-1][1:]
    assert (path, body) in (
        ("/actions", {"action_type": "SendCtrlAltDel"}),
        ("/vm.power-button", None),
    )


async def test_a_snapshot_goes_where_it_is_told(described, connected):
    vmm = described(PAUSED)
    async with connected(vmm) as connection:
        await connection.snapshot(**FILES)
    state, memory = FILES.values()
    (request,) = vmm.requests
    assert request[2] in (
        {"snapshot_type": "Full", "snapshot_path": state, "mem_file_path": memory},
        {"destination_url": f"file://{canonical.VM}/save"},
    )


@pytest.mark.parametrize("resume", [False, True])
async def test_a_life_from_a_snapshot_on(name, described, connected, resume):
    vmm = described(before(name, "load"))
    async with connected(vmm) as connection:
        await connection.load(**FILES, track_dirty=True, resume=resume)
        assert await connection.state() is (VmmState.RUNNING if resume else VmmState.PAUSED)
        await connection.resume()
        assert await connection.stats() == {"vcpus": 2}
        await connection.pause()
        await connection.snapshot(**FILES, diff=True)
        await connection.resume()
        await connection.power_off()
    assert vmm.state == RUNNING


@pytest.mark.parametrize("mode", ["copy", "ondemand"])
async def test_a_guest_with_network_interfaces_stands_still_until_they_are_taken_out(
    with_nics, mode
):
    vmm = VMMS["cloud-hypervisor-53"]("cloud-hypervisor-53", EMPTY)
    async with with_nics(vmm) as (_, connection):
        await connection.load(**FILES, restore_mode=mode, resume=False)
        ((_, path, body),) = (request for request in vmm.requests if request[0] == "PUT")
        assert (path, body["source_url"]) == ("/vm.restore", f"file://{canonical.VM}/save")
        assert body["memory_restore_mode"].lower() == mode
        assert vmm.state == PAUSED
        assert await connection.live.leaving_nics() == ("_net0", "_net1")
        await connection.live.remove_nics()
        assert vmm.config["net"] == []
        assert await connection.live.leaving_nics() == ("_net0", "_net1")
        vmm.let_go()
        assert await connection.live.leaving_nics() == ()
        await connection.resume()
    assert vmm.state == RUNNING


OUT_OF_TURN = {
    "firecracker": {
        (EMPTY, "pause"): "before starting the microVM",
        (EMPTY, "resume"): "before starting the microVM",
        (EMPTY, "power_off"): "before starting the microVM",
        (EMPTY, "snapshot"): "before starting the microVM",
        (RUNNING, "snapshot"): "unavailable while running",
        (RUNNING, "load"): "after starting the microVM",
        (PAUSED, "load"): "after starting the microVM",
    },
    "cloud-hypervisor": {
        **{
            (state, method): "VM is not running"
            for state in (EMPTY, CREATED)
            for method in ("pause", "resume", "power_off", "snapshot")
        },
        (EMPTY, "stats"): "VM is not created",
        (EMPTY, "load"): "has loaded no guest",
        (CREATED, "load"): "has loaded no guest",
        (RUNNING, "snapshot"): "Trying to snapshot while VM is running",
    },
}


async def test_what_comes_out_of_turn_is_refused_in_the_vmms_words(name, described, connected):
    for (state, method), words in OUT_OF_TURN[name.rpartition("-")[0]].items():
        vmm = described(state)
        async with connected(vmm) as connection:
            with pytest.raises(Failed, match=words):
                await call(connection, method)
        assert vmm.state == state


async def test_every_error_that_is_described_is_told(name, described, connected, method):
    vmm = described(before(name, method))
    operations = [
        operation for methods in vmm.description.paths.values() for operation in methods.values()
    ]
    answers = {status for operation in operations for status in operation["responses"]}
    errors = {int(status) for status in answers - {"default"} if status >= "400"}
    async with connected(vmm) as connection:
        for status in errors | {400, 500}:
            vmm.refusal = Refusal(status, (f"no, {status}",))
            with pytest.raises(Failed, match=f"refused .*: no, {status}"):
                await call(connection, method)
        vmm.refusal = None
        await call(connection, method)


async def test_one_that_does_not_answer_is_a_timeout(name, described, connected, method):
    vmm = described(before(name, method))
    send = vmm.send

    async def keep(stream, reply):
        await trio.sleep_forever()

    async with connected(vmm) as connection:
        vmm.send = keep
        with pytest.raises(TimedOut, match="did not answer"):
            await call(connection, method, timeout=0.05)
        vmm.send = send
        assert await connection.state() in VmmState


@pytest.mark.parametrize("end", [0, 10, -1], ids=["nothing", "part of the head", "all but a byte"])
async def test_an_answer_that_breaks_off_is_a_failure(name, described, connected, method, end):
    vmm = described(before(name, method))

    async def cut(stream, reply):
        await stream.send_all(reply[:end])

    vmm.send = cut
    async with connected(vmm) as connection:
        with pytest.raises(Failed, match="broke off during"):
            await call(connection, method)


@pytest.mark.parametrize(("method", "state"), [("pause", PAUSED), ("resume", RUNNING)])
async def test_what_was_done_though_its_answer_was_lost_can_be_asked_for_again(
    described, connected, method, state
):
    vmm = described(PAUSED if state == RUNNING else RUNNING)
    send = vmm.send

    async def lose(stream, reply):
        vmm.send = send

    vmm.send = lose
    async with connected(vmm) as connection:
        with contextlib.suppress(Failed):
            await call(connection, method)
        assert vmm.send == send
        await call(connection, method)
        assert vmm.state == state


@pytest.mark.thorough
async def test_one_that_dies_in_the_middle_is_a_failure(name, method, tmp_path):
    path = str(tmp_path / "api")
    process = await trio.lowlevel.open_process(
        [sys.executable, described_vmm.__file__, name, path, before(name, method)],
        stdout=subprocess.PIPE,
    )

    async def said(word):
        heard = b""
        while word not in heard:
            data = await process.stdout.receive_some()
            assert data
            heard += data

    async def kill_once_asked():
        await said(b"asked")
        process.kill()

    try:
        await said(b"serving")
        async with reach(name, path) as connection, trio.open_nursery() as nursery:
            nursery.start_soon(kill_once_asked)
            with pytest.raises(Failed, match="broke off during|does not answer on its API socket"):
                await call(connection, method)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


def test_every_state_that_is_described_is_known(name, described):
    schemas = described().description.schemas
    words = schemas.get("VmState") or schemas["InstanceInfo"]["properties"]["state"]
    assert DRIVERS[name][2]._STATES.keys() == set(words["enum"])


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        {"state": "Running"},
        {"state": "Dancing", "vmm_version": "1.12.1", "config": {}},
        {"state": ["Running"], "vmm_version": "1.12.1", "config": {"cpus": 1}},
        {"machine-config": {"vcpu_count": "2"}, "config": []},
    ],
)
async def test_an_answer_that_makes_no_sense_is_a_failure(name, described, connected, content):
    vmm = described()
    vmm.answer = lambda *request: (200, content)
    async with connected(vmm) as connection:
        for method in ("stats", "state"):
            if method == "state" and "cloud" in name and content == {"state": "Running"}:
                continue  # it needs no more
            with pytest.raises(Failed, match="in a way that is unknown"):
                await call(connection, method)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PATCH", "/vm", None),
        ("PATCH", "/vm", {}),
        ("PATCH", "/vm", {"state": "paused"}),
        ("PATCH", "/vm", {"state": True}),
        ("PATCH", "/vm", {"state": "Paused", "more": 1}),
        ("PUT", "/vm", {"state": "Paused"}),
        ("GET", "/vm/config", {}),
        ("GET", "/vm/more", None),
        ("PUT", "/vm.pause", None),
        ("PUT", "/api/v1/vm.pause", {}),
        ("GET", "/api/v1/vm.pause", None),
        ("PUT", "/api/v1/vm.more", None),
        ("PUT", "/api/v1/vm.resize", None),
        ("PUT", "/api/v1/vm.resize", {"desired_vcpus": 0}),
        ("PUT", "/api/v1/vm.resize", {"desired_ram": 1.5}),
        ("PUT", "/api/v1/vm.snapshot", {"destination_url": "file:///x", "more": 1}),
        ("PUT", "/api/v1/vm.add-disk", {"path": "/x", "image_type": "raw"}),
    ],
)
def test_what_is_not_described_is_refused(described, method, path, body):
    vmm = described()
    status, _ = vmm.answer(method, path, body)
    assert status in (400, 404)
    assert vmm.requests == []


def test_an_answer_that_is_not_described_fails_the_test(name, described):
    vmm = described()
    path = "/" if "firecracker" in name else "/api/v1/vm.info"
    vmm.answer("GET", path, None)
    for content in (None, {}, vmm.act("/" if path == "/" else "/vm.info", {}) | {"state": "X"}):
        vmm.act = lambda *request, content=content: content
        with pytest.raises(AssertionError, match="not described"):
            vmm.answer("GET", path, None)
        del vmm.act
