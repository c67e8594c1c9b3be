"""CPUs, memory and disks of VMs that run, on a real Cloud Hypervisor where there is one on PATH.

The tests' guest makes no use of what it is given, and lets go of nothing that it is asked for.
"""

import contextlib
import errno
import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from snapshot_tools import archive, away, died, dying_at, refused, restarted_by_systemd

MIB = 1 << 20
SMALL, LARGE = 64 * MIB, 192 * MIB
DISK = {"name": "d", "size": "8M", "serial": "blue"}
OTHER = {"name": "e", "size": "8M", "serial": "red"}

only_cloud_hypervisor = pytest.mark.skipif(
    shutil.which("cloud-hypervisor") is None, reason="cloud-hypervisor is not installed"
)


@pytest.fixture
def vm(make_vm: Callable[..., Any]) -> Any:
    """A VM that counts, with room for more."""
    vm = make_vm(
        hypervisor="cloud-hypervisor",
        storage="8M",
        max_cpu=2,
        max_memory="512M",
        stop_timeout=1,
    )
    vm.verb("start")
    vm.wait_counting()
    return vm


@pytest.fixture
def name(vm_name: Callable[[], str], agent: Any) -> Any:
    name = f"snap-{vm_name()}"
    yield name
    archive(agent, name).unlink(missing_ok=True)


class Api(http.client.HTTPConnection):
    """Cloud Hypervisor's own, of a VM."""

    def __init__(self, vm: Any) -> None:
        super().__init__("localhost", timeout=10)
        self._path = f"/run/cocoon/{vm.read('id')}/sock/api"

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def described(vm: Any) -> Any:
    api = Api(vm)
    api.request("GET", "/api/v1/vm.info")
    return json.loads(api.getresponse().read())


def hardware(vm: Any) -> tuple[int, int, int, set[str]]:
    """What the VMM has given its guest: CPUs, those it goes on with, memory, disks beside its own.

    Of the process itself where that can be seen.
    """
    info = described(vm)
    threads = [(task / "comm").read_text() for task in Path(f"/proc/{vm.pid}/task").iterdir()]
    paths = []
    for file in Path(f"/proc/{vm.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a connection that ended meanwhile
            paths.append(os.readlink(file))
    names = [Path(path).name for path in paths]
    return (
        sum(name.startswith("vcpu") for name in threads),
        info["config"]["cpus"]["boot_vcpus"],
        info["memory_actual_size"],
        {name[5:-4] for name in names if name.startswith("data-") and name.endswith(".raw")},
    )


def recorded(vm: Any) -> tuple[int, int, int, set[str]]:
    """The same as the agent shows it."""
    cpu = int(vm.read("cpu"))
    disks = {disk["name"] for disk in json.loads(vm.read("disks"))}
    return cpu, cpu, int(vm.read("memory")), disks


def files(agent: Any, vm: Any) -> set[str]:
    """The files of disks beside the VM's own."""
    directory = Path(agent.root_dir) / "vms" / vm.read("id")
    return {path.name[5:-4] for path in directory.glob("*data-*")}


def limits(vm: Any) -> dict[str, str]:
    properties = ["MemoryMax", "CPUQuotaPerSecUSec", "CPUWeight"]
    command = ["systemctl", "show", f"--property={','.join(properties)}", vm.unit]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(line.split("=") for line in lines)


def counts_on(vm: Any) -> None:
    vm.wait_counting()
    counts = vm.counts
    assert counts == list(range(1, len(counts) + 1))


@only_cloud_hypervisor
def test_it_grows_and_starts_again_as_large(agent, vm):
    began = limits(vm)
    vm.write("cpu", "2")
    vm.write("memory", "192M")
    vm.write("disks", json.dumps([DISK]))
    assert hardware(vm) == recorded(vm) == (2, 2, LARGE, {"d"})
    grown = limits(vm)
    assert int(grown["MemoryMax"]) - int(began["MemoryMax"]) >= LARGE - SMALL
    assert (grown["CPUQuotaPerSecUSec"], grown["CPUWeight"]) == ("2.500000s", "200")
    info = json.loads(vm.read("info.json"))
    assert (info["config"]["cpu"], info["config"]["memory"]) == (2, LARGE)
    assert info["storage_configs"][-1]["serial"] == "blue"
    assert (vm.read("max_cpu"), vm.read("max_memory")) == ("2", str(512 * MIB))
    assert "vcpus 2" in vm.read("stats").splitlines()
    counts_on(vm)
    vm.verb("stop")
    assert (vm.state, vm.read("error")) == ("stopped", "")
    for memory in ("192M", "64M"):
        vm.write("memory", memory)
        vm.verb("start")
        vm.wait_counting()
        assert hardware(vm) == recorded(vm)
        vm.verb("stop")
    assert vm.state == "stopped"


@only_cloud_hypervisor
def test_all_in_one_write_with_what_needs_no_vmm(agent, vm, until):
    change = {"cpu": 2, "memory": "192M", "disks": [DISK], "autostart": True}
    vm.write("config", json.dumps(change))
    assert hardware(vm) == recorded(vm) == (2, 2, LARGE, {"d"})
    assert vm.read("autostart") == "yes"
    # As the unit is started by systemd alone.
    vm.write("restart", "on-failure")
    vm.verb("stop")
    vm.verb("start")
    vm.write("disks", json.dumps([DISK, OTHER]))
    restarted_by_systemd(agent, vm, until)
    vm.wait_for_state("running")
    vm.wait_counting()
    assert hardware(vm) == recorded(vm) == (2, 2, LARGE, {"d", "e"})


@only_cloud_hypervisor
@pytest.mark.parametrize("mode", ["copy", "ondemand"])
def test_what_was_changed_goes_on_in_clones_and_restores(agent, make_vm, vm, name, mode):
    change = {"cpu": 2, "memory": "192M", "disks": [DISK], "restore_mode": mode}
    vm.write("config", json.dumps(change))
    own = Path(agent.root_dir) / "vms" / vm.read("id") / "data-d.raw"
    with own.open("r+b") as disk:
        disk.write(b"kept")
    vm.write("snapshot", name)
    clone = make_vm(hypervisor=None, memory=None, boot=None, stop_timeout=1)
    clone.write("restore_mode", mode)
    clone.write("from", name)
    clone.verb("start")
    clone.wait_counting()
    assert clone.counts[0] > 1
    assert hardware(clone) == recorded(clone) == (2, 2, LARGE, {"d"})
    clone.write("memory", "320M")
    assert hardware(clone) == recorded(clone) == (2, 2, LARGE + 128 * MIB, {"d"})
    copy = Path(agent.root_dir) / "vms" / clone.read("id") / "data-d.raw"
    assert copy.read_bytes()[:4] == b"kept"
    # What was changed later is no more.
    vm.write("disks", json.dumps([DISK, OTHER]))
    vm.write("restore", name)
    vm.wait_counting()
    assert hardware(vm) == recorded(vm) == (2, 2, LARGE, {"d"})
    for each, memory in ((vm, LARGE), (clone, LARGE + 128 * MIB)):
        each.verb("stop")
        assert each.state == "stopped"
        each.verb("start")
        each.wait_counting()
        assert hardware(each) == recorded(each) == (2, 2, memory, {"d"})
        assert each.read("max_memory") == str(512 * MIB)


@only_cloud_hypervisor
@pytest.mark.parametrize(
    ("change", "number", "words"),
    [
        ({"cpu": 3}, errno.EINVAL, ["cpu 3"]),
        ({"memory": "1G"}, errno.EINVAL, ["max_memory 512M"]),
        ({"memory": "96M"}, errno.EINVAL, ["multiples of 128M", "write 192M"]),
        ({"memory": "500M"}, errno.EINVAL, ["write 448M, or stop"]),
        ({"memory": "32M"}, errno.EOPNOTSUPP, ["takes no memory", "stop"]),
        ({"cpu": 2, "storage": "16M"}, errno.EBUSY, ["storage", "stopped"]),
        ({"cpu": 2, "max_cpu": 2, "max_memory": "1G"}, errno.EBUSY, ["max_memory"]),
        ({"disks": [{"path": "/dev/null"}]}, errno.EBUSY, ["disks of the host"]),
        ({"disks": [OTHER | {"serial": "blue"}]}, errno.EINVAL, ["until its guest lets go"]),
        ({"disks": [DISK | {"size": "16M"}]}, errno.EBUSY, ["d itself"]),
        ({"disks": [DISK | {"serial": "red"}]}, errno.EBUSY, ["d itself"]),
        ({"disks": [DISK, OTHER], "memory": "33M"}, errno.EOPNOTSUPP, []),
    ],
)
def test_what_cannot_be_is_refused_with_nothing_changed(agent, vm, change, number, words):
    vm.write("disks", json.dumps([DISK]))
    before = hardware(vm), recorded(vm), limits(vm)
    with refused(number):
        vm.write("config", json.dumps(change))
    assert all(word in vm.read("error") for word in words), vm.read("error")
    assert (hardware(vm), recorded(vm), limits(vm)) == before
    assert files(agent, vm) == {"d"}
    counts_on(vm)


@only_cloud_hypervisor
def test_what_the_vmm_itself_refuses_is_told_and_the_rest_is_kept(agent, vm):
    vm.verb("stop")
    vm.write("config", json.dumps({"memory": "128M", "max_memory": "2G"}))
    vm.verb("start")
    # It has eight slots.
    for size in range(256, 128 * 10, 128):
        vm.write("memory", f"{size}M")
    with refused(errno.EOPNOTSUPP):
        vm.write("config", json.dumps({"cpu": 2, "memory": "1280M"}))
    assert "eight times" in vm.read("error")
    assert hardware(vm) == recorded(vm) == (2, 2, 128 * 9 * MIB, set())
    vm.wait_counting()


@only_cloud_hypervisor
def test_a_paused_vm_is_left_alone(vm):
    vm.verb("pause")
    with refused(errno.EBUSY):
        vm.write("cpu", "2")
    assert "paused" in vm.read("error")
    vm.write("autostart", "yes")
    vm.verb("resume")
    vm.write("cpu", "2")
    assert hardware(vm) == recorded(vm)


@only_cloud_hypervisor
def test_a_disk_that_the_guest_does_not_let_go_of_stays(agent, vm, name):
    vm.write("disks", json.dumps([DISK]))
    with refused(errno.ETIMEDOUT):
        vm.write("disks", "[]")
    assert "let go of disk d" in vm.read("error")
    assert hardware(vm) == recorded(vm) == (1, 1, SMALL, {"d"})
    assert files(agent, vm) == {"d"}
    # The VMM's own configuration lacks it already: no process could load that.
    with refused(errno.EBUSY):
        vm.write("snapshot", name)
    assert "disk d" in vm.read("error")
    with refused(errno.ETIMEDOUT):
        vm.write("config", json.dumps({"disks": [OTHER], "memory": "192M"}))
    assert hardware(vm) == recorded(vm) == (1, 1, LARGE, {"d", "e"})
    counts_on(vm)
    vm.verb("stop")
    vm.verb("start")
    vm.wait_counting()
    assert hardware(vm) == recorded(vm) == (1, 1, LARGE, {"d", "e"})
    vm.write("snapshot", name)


@only_cloud_hypervisor
def test_a_cpu_that_the_guest_does_not_let_go_of_stays(make_vm, vm, name):
    vm.write("cpu", "2")
    with refused(errno.ETIMEDOUT):
        vm.write("cpu", "1")
    assert "1 of its CPUs" in vm.read("error")
    assert hardware(vm) == recorded(vm) == (2, 2, SMALL, set())
    with refused(errno.EBUSY):
        vm.write("cpu", "1")
    assert hardware(vm) == recorded(vm) == (2, 2, SMALL, set())
    vm.write("snapshot", name)
    clone = make_vm(hypervisor=None, memory=None, boot=None, stop_timeout=1)
    clone.write("from", name)
    clone.verb("start")
    clone.wait_counting()
    assert hardware(clone) == recorded(clone) == (2, 2, SMALL, set())
    vm.verb("stop")
    vm.write("cpu", "1")
    vm.verb("start")
    assert hardware(vm) == recorded(vm) == (1, 1, SMALL, set())
    assert vm.read("max_cpu") == "1"


@only_cloud_hypervisor
def test_a_kill_ends_the_wait_for_the_guest(agent, vm, until):
    vm.write("disks", json.dumps([DISK]))
    failures: list[OSError] = []

    def remove() -> None:
        try:
            vm.write("disks", "[]")
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=remove)
    thread.start()
    until(lambda: "d" not in {disk["id"][5:] for disk in described(vm)["config"]["disks"]})
    vm.verb("kill")
    thread.join()
    assert len(failures) == 1
    assert vm.state == "stopped"
    assert json.loads(vm.read("disks"))[0]["name"] == "d"
    vm.verb("start")
    vm.wait_counting()
    assert hardware(vm) == recorded(vm) == (1, 1, SMALL, {"d"})


@only_cloud_hypervisor
def test_a_disk_taken_out_comes_back_as_new_at_once_after_a_start(agent, vm):
    vm.write("disks", json.dumps([DISK]))
    vm.verb("stop")
    vm.write("disks", "[]")
    vm.verb("start")
    vm.write("disks", json.dumps([DISK]))
    assert hardware(vm) == recorded(vm) == (1, 1, SMALL, {"d"})
    assert files(agent, vm) == {"d"}


STEPS = [
    "recorded",
    "limited",
    "made",
    "cpu",
    "memory",
    "added",
    "asked",
    "written",
    "settled",
    "removed",
]


@only_cloud_hypervisor
@pytest.mark.thorough
@pytest.mark.parametrize(
    "removes",
    [
        pytest.param(False, id="growing"),
        # The guest is waited for.
        pytest.param(True, id="removing", marks=pytest.mark.long(group="removing")),
    ],
)
@pytest.mark.parametrize("step", STEPS)
def test_an_agent_that_dies_finds_what_came_of_it(agent, make_vm, until, name, step, removes):
    with dying_at(agent, f"change:{step}"):
        vm = make_vm(
            hypervisor="cloud-hypervisor",
            max_cpu=2,
            max_memory="192M",
            disks=[DISK] * removes,
            stop_timeout=1,
        )
        vm.verb("start")
        vm.wait_counting()
        disks = [OTHER]
        with away():
            vm.write("config", json.dumps({"cpu": 2, "memory": "192M", "disks": disks}))
        died(agent, until)
        # In its turn, so after what the next agent has to do.
        vm.write("autostart", "yes")
        after = STEPS.index(step)
        reached = {
            "cpu": 2 if after >= STEPS.index("cpu") else 1,
            "memory": LARGE if after >= STEPS.index("memory") else SMALL,
            "disks": {"d"} if removes else set(),
        }
        if after >= STEPS.index("added"):
            reached["disks"].add("e")
        cpu, claimed, memory, present = hardware(vm)
        assert (cpu, claimed, memory, present) == recorded(vm)
        assert {"cpu": cpu, "memory": memory, "disks": present} == reached
        assert files(agent, vm) == present
        counts_on(vm)
        vm.verb("stop")
        assert vm.state == "stopped"
        vm.verb("start")
        vm.wait_counting()
        assert hardware(vm) == recorded(vm)
        assert files(agent, vm) == present
        vm.write("snapshot", name)


@only_cloud_hypervisor
@pytest.mark.long
@pytest.mark.parametrize("number", range(50))
def test_an_agent_that_dies_at_any_moment_finds_what_came_of_it(agent, vm, until, number, rng):
    failures: list[OSError] = []
    change = {"cpu": 2, "memory": "192M", "disks": [DISK]}

    def act() -> None:
        try:
            vm.write("config", json.dumps(change))
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=act)
    thread.start()
    time.sleep(rng.random() * 0.1)
    if rng.random() < 0.7:
        agent.kill()
    else:
        agent.restart()
    thread.join()
    until(lambda: os.path.ismount(agent.mount))
    vm.write("autostart", "yes")
    assert hardware(vm) == recorded(vm)
    assert failures or recorded(vm) == (2, 2, LARGE, {"d"})
    counts_on(vm)
    vm.write("config", json.dumps(change))
    assert hardware(vm) == recorded(vm) == (2, 2, LARGE, {"d"})
    vm.verb("stop")
    assert vm.state == "stopped"


@pytest.mark.backends("firecracker", "qemu", core=True)
@pytest.mark.parametrize("key", ["cpu", "memory", "disks"])
def test_a_backend_that_cannot_names_the_one_that_can(agent, make_vm, key):
    vm = make_vm()
    vm.verb("start")
    before = vm.read("config")
    with refused(errno.EOPNOTSUPP):
        vm.write(key, {"cpu": "2", "memory": "128M", "disks": json.dumps([DISK])}[key])
    assert all(word in vm.read("error") for word in (key, "cloud-hypervisor does", "stop"))
    assert vm.read("config") == before
    assert files(agent, vm) == set()
    assert vm.state == "running"
