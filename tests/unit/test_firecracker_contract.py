"""All that the driver can send, against the API that Firecracker publishes for each version."""

import json
import re
from pathlib import Path

import pytest

from agent.model.access import Access
from agent.model.config import Boot, Disk, VmConfig
from agent.model.errors import Failed
from agent.model.size import GIB, MIB
from agent.model.vm import Vm
from agent.vmm.driver import Version, VmmState
from agent.vmm.firecracker import Firecracker, FirecrackerVmm

pytestmark = pytest.mark.anyio
DATA = Path(__file__).parents[1] / "data"
VERSIONS = {"1.12": "1.12.1", "1.16": "1.16.1"}


class Description:
    """A published API description (Swagger 2.0), and what it says about values."""

    def __init__(self, path):
        self.content = json.loads(path.read_text())
        self.definitions = self.content["definitions"]

    def operation(self, method, path):
        for template, operations in self.content["paths"].items():
            if re.fullmatch(re.sub(r"\{\w+\}", r"[^/]+", template), path):
                assert method.lower() in operations, f"{template} takes no {method}"
                return operations[method.lower()]
        raise AssertionError(f"there is no path {path}")

    def check_request(self, method, path, body):
        parameters = self.operation(method, path).get("parameters", [])
        schemas = [entry["schema"] for entry in parameters if entry["in"] == "body"]
        if not schemas:
            assert body is None, f"{method} {path} takes no body"
            return
        self.check(schemas[0], body, f"{method} {path}")

    def check(self, schema, value, where):
        if "$ref" in schema:
            schema = self.definitions[schema["$ref"].rpartition("/")[2]]
        kind = schema.get("type", "object")
        expected = {
            "object": dict,
            "array": list,
            "string": str,
            "integer": int,
            "boolean": bool,
            "number": (int, float),
        }[kind]
        assert isinstance(value, expected), f"{where} is not of type {kind}"
        assert kind != "integer" or not isinstance(value, bool), f"{where} is not an integer"
        if "enum" in schema:
            assert value in schema["enum"], f"{where}: {value!r} is not in {schema['enum']}"
        assert value >= schema["minimum"] if "minimum" in schema else True, where
        assert value <= schema["maximum"] if "maximum" in schema else True, where
        if kind == "array":
            for index, item in enumerate(value):
                self.check(schema["items"], item, f"{where}[{index}]")
        if kind == "object":
            properties = schema.get("properties", {})
            missing = set(schema.get("required", ())) - value.keys()
            assert not missing, f"{where} lacks {missing}"
            for name, item in value.items():
                assert name in properties, f"{where} has no {name}"
                self.check(properties[name], item, f"{where}.{name}")


@pytest.fixture(params=VERSIONS)
def described(request):
    """A version and its description."""
    return VERSIONS[request.param], Description(DATA / f"firecracker-{request.param}.json")


class Api:
    """Stands for the API: keeps what it is asked, answers as the description's examples would."""

    def __init__(self, answers):
        self.answers = answers
        self.asked = []

    async def call(self, method, path, body=None, *, timeout):
        assert timeout > 0
        self.asked.append((method, path, body))
        return self.answers.get(path)


def answers(version, state="Running"):
    return {
        "/": {"app_name": "Firecracker", "id": "a", "state": state, "vmm_version": version},
        "/vm/config": {
            "machine-config": {"vcpu_count": 2, "mem_size_mib": 512},
            "balloon": {"amount_mib": 128, "deflate_on_oom": True},
        },
    }


async def everything(vmm):
    await vmm.state()
    await vmm.pause()
    await vmm.resume()
    await vmm.power_off()
    await vmm.stats()
    for diff in (False, True):
        await vmm.snapshot("/state", "/memory", diff=diff)
    for track_dirty in (False, True):
        for resume in (False, True):
            await vmm.load("/state", "/memory", track_dirty=track_dirty, resume=resume)


async def test_every_request_is_one_that_the_version_describes(described):
    version, description = described
    api = Api(answers(version))
    await everything(FirecrackerVmm(api))
    for method, path, body in api.asked:
        description.check_request(method, path, body)
    assert {path for _, path, _ in api.asked} == {
        "/",
        "/vm",
        "/vm/config",
        "/actions",
        "/snapshot/create",
        "/snapshot/load",
    }


async def test_no_request_uses_what_the_version_calls_deprecated(described):
    version, description = described
    api = Api(answers(version))
    await everything(FirecrackerVmm(api))
    loads = description.definitions["SnapshotLoadParams"]["properties"]
    deprecated = {name for name, schema in loads.items() if "(Deprecated)" in str(schema)}
    for _, path, body in api.asked:
        assert path != "/snapshot/load" or not deprecated & body.keys()


CONFIGS = {
    "the least": VmConfig(memory=16 * MIB, boot=Boot(kernel="k")),
    "the most": VmConfig(
        cpu=32,
        memory=64 * GIB,
        storage=GIB,
        boot=Boot(kernel="k", initrd="i", cmdline="console=ttyS0"),
        disks=(Disk(path="/dev/sdb", readonly=True), Disk(name="data", size=MIB)),
        track_dirty=True,
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("io_uring", [False, True])
def test_the_configuration_file_is_one_that_the_version_describes(described, config, io_uring):
    version, description = described
    numbers = tuple(map(int, version.split(".")))
    vm = Vm("a" * 26, "web", 70000, Access(0, 0), config)
    plan = Firecracker(io_uring=io_uring).plan(vm, Version("/firecracker", version, numbers))
    document = json.loads(plan.files["vm.json"])
    description.check({"$ref": "#/definitions/FullVmConfiguration"}, document, "vm.json")


def test_the_check_finds_what_is_wrong(described):
    _, description = described
    for body in (None, {}, {"state": "paused"}, {"state": "Paused", "more": 1}, {"state": True}):
        with pytest.raises(AssertionError):
            description.check_request("PATCH", "/vm", body)
    with pytest.raises(AssertionError):
        description.check_request("POST", "/vm", {"state": "Paused"})


@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("Not started", VmmState.EMPTY),
        ("Running", VmmState.RUNNING),
        ("Paused", VmmState.PAUSED),
    ],
)
async def test_every_state_that_is_described_is_understood(described, word, state):
    version, description = described
    words = description.definitions["InstanceInfo"]["properties"]["state"]["enum"]
    assert word in words
    assert len(words) == 3
    assert await FirecrackerVmm(Api(answers(version, word))).state() is state


async def test_the_figures_are_those_of_the_configuration():
    vmm = FirecrackerVmm(Api(answers("1.12.1")))
    assert await vmm.stats() == {"vcpus": 2, "balloon_target": 128 * MIB}


async def test_without_a_balloon_there_is_no_figure_of_it():
    described = answers("1.12.1")
    described["/vm/config"]["balloon"] = None
    assert await FirecrackerVmm(Api(described)).stats() == {"vcpus": 2}


@pytest.mark.parametrize(
    "said",
    [
        None,
        [],
        {},
        {"state": "Running"},
        {"state": "Dancing", "vmm_version": "1.12.1"},
        {"state": ["Running"], "vmm_version": "1.12.1"},
    ],
)
async def test_a_description_that_makes_no_sense_is_a_failure(said):
    vmm = FirecrackerVmm(Api({"/": said}))
    with pytest.raises(Failed, match="in a way that is unknown"):
        await vmm.state()


@pytest.mark.parametrize("said", [None, {}, {"machine-config": {"vcpu_count": "2"}}])
async def test_figures_that_make_no_sense_are_a_failure(said):
    with pytest.raises(Failed, match="in a way that is unknown"):
        await FirecrackerVmm(Api({"/vm/config": said})).stats()
