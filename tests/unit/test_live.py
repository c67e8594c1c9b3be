"""Changes to VMs that run, with a guest that lets go of what it is asked for, late, or never."""

import dataclasses
import functools
import json
import os
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import trio
from live_guest import Guest

from agent.lifecycle import affinity, configure, live
from agent.lifecycle.services import Services
from agent.model.access import Access, Caller
from agent.model.config import Boot, Disk, VmConfig
from agent.model.errors import Busy, Failed, Invalid, NoSpace, TimedOut, Unsupported
from agent.model.size import MIB
from agent.model.vm import State, Vm, from_row, to_row
from agent.storage.tree import Tree
from agent.systemd.cpus import HostCpus
from agent.vmm import cloud_hypervisor_hardware
from agent.vmm.cloud_hypervisor import CloudHypervisor
from agent.vmm.cloud_hypervisor_hardware import GuestHardware
from agent.vmm.driver import Version
from agent.vmm.firecracker import Firecracker

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other uids"),
]
ROOT = Caller(uid=0, gid=0, groups=frozenset(), pid=1)
D, E = (Disk(name=name, size=MIB, serial=f"s{name}") for name in "de")
PID = 4711
ID = "a" * 26


class Table:
    """The index: what is saved is on disk, and what a reader would find there."""

    def __init__(self, vm):
        self.vm = vm
        self.saved = []
        self.failure = None

    def get(self, vm_id):
        return self.vm

    def note(self, vm):
        self.vm = vm

    async def save(self, vm, *, frees=False):
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure
        self.saved.append(from_row(to_row(vm)))
        self.vm = vm


class Driver(CloudHypervisor):
    async def version(self):
        return Version("/usr/bin/cloud-hypervisor", "53.0", (53, 0))


class Host:
    """A VM that runs `guest`, in a real directory, and the services that know it."""

    def __init__(self, tree, guest, **config):
        given = {"memory": 64 * MIB, "max_memory": 512 * MIB, "max_cpu": 4, "storage": MIB}
        config = VmConfig(**given | {"boot": Boot(kernel="k")} | config)
        vm = Vm(ID, "web", 70000, Access(0, 0), config, state=State.RUNNING)
        vm = dataclasses.replace(vm, hypervisor="cloud-hypervisor", pid=PID, started_at=1)
        self.guest = guest
        self.tree = tree
        self.limits = []
        self.table = Table(vm)

        async def set_properties(vm, settings):
            self.limits.append({name: value.value for name, value in settings})

        self.services = Services(
            index=SimpleNamespace(vms=self.table),
            units=SimpleNamespace(set_properties=set_properties),
            consoles=None,
            tree=tree,
            kernels=None,
            drivers={"firecracker": Firecracker(), "cloud-hypervisor": Driver()},
            events=SimpleNamespace(happened=lambda *told: None),
            background=None,
            in_turn=None,
            host_cpus=8,
            jail="/jail",
            claim_host=lambda: None,
            snapshots=None,
            images=None,
        )

    @property
    def vm(self):
        return self.table.vm

    @property
    def environment(self):
        with open(f"{self.tree.run_directory(ID)}/environment") as file:
            return file.read()

    def files(self):
        return {name for name in os.listdir(self.tree.directory(ID)) if "data" in name}

    async def write(self, **changes):
        await configure.configure(self.services, ROOT, ID, changes)


@pytest.fixture
async def make_host(tmp_path, monkeypatch):
    tree = Tree(f"{tmp_path}/root", f"{tmp_path}/run")
    await tree.prepare()
    monkeypatch.setattr(live, "_LET_GO_LIMIT", 0.1)

    async def make(guest=None, **config):
        host = Host(tree, guest or Guest(), **config)
        for disk in host.vm.config.disks:
            path = f"/var/lib/cocoon/run/vm/data-{disk.name}.raw"
            given = {"id": f"data-{disk.name}", "path": path, "num_queues": 1}
            host.guest.config["disks"].append(given)
        host.guest.boot()
        await tree.prepare_vm(host.vm, {}, b"")

        @asynccontextmanager
        async def connected(services, vm):
            directory = functools.partial(tree.open_directory, vm)
            yield SimpleNamespace(live=GuestHardware(host.guest, directory))

        monkeypatch.setattr(live, "connected", connected)
        monkeypatch.setattr(
            cloud_hypervisor_hardware, "count_threads", lambda pid, name: host.guest.cpus
        )
        return host

    return make


def disks(*wanted):
    return [{"name": disk.name, "size": disk.size, "serial": disk.serial} for disk in wanted]


async def test_limits_are_raised_before_the_guest_grows_and_fall_after_it_shrank(make_host):
    host = await make_host()
    seen = []
    call = host.guest.call

    async def watched(method, path, body=None, *, timeout):
        if body is not None:
            seen.append((path, host.limits[-1]["CPUQuotaPerSecUSec"], host.limits[-1]["MemoryMax"]))
        return await call(method, path, body, timeout=timeout)

    host.guest.call = watched
    await host.write(cpu=3, memory="192M")
    assert [quota for _, quota, _ in seen] == [3_500_000, 3_500_000]
    assert all(limit > 192 * MIB for _, _, limit in seen)
    await host.write(cpu=1)
    assert seen[-1][1] == 3_500_000
    assert host.limits[-1]["CPUQuotaPerSecUSec"] == 1_500_000
    assert (host.vm.config.cpu, host.vm.config.most_cpu) == (1, 4)
    assert "boot=1,max=4" in host.environment
    assert "size=201326592,hotplug_size=335544320" in host.environment


async def test_what_is_wanted_is_recorded_before_anything_and_what_came_of_it_after(make_host):
    host = await make_host(disks=(E,))
    await host.write(cpu=2, memory="192M", disks=disks(D))
    first, last = host.table.saved
    assert first.config.cpu == 1
    assert (first.changing.cpu, first.changing.disks) == (2, (D,))
    assert last.changing is None
    assert last.config == first.changing
    assert host.files() == {"data-d.raw"}
    assert "data-d.raw" in host.environment
    assert "data-e.raw" not in host.environment


async def test_a_disk_is_made_before_it_is_given_and_removed_when_it_was_let_go_of(make_host):
    host = await make_host()
    call = host.guest.call

    async def watched(method, path, body=None, *, timeout):
        if path.endswith(("add-disk", "remove-device")):
            assert host.files() == {"data-d.raw"}
        return await call(method, path, body, timeout=timeout)

    host.guest.call = watched
    await host.write(disks=disks(D))
    assert host.vm.config.disks == (D,)
    await host.write(disks=[])
    assert host.vm.config.disks == ()
    assert host.files() == set()


async def test_what_the_guest_keeps_stays_in_the_record_and_can_be_asked_for_again(make_host):
    host = await make_host(Guest(obeys=False), disks=(D,))
    with pytest.raises(TimedOut, match="disk d within"):
        await host.write(disks=disks(E))
    assert host.vm.config.disks == (E, D)
    assert host.files() == {"data-d.raw", "data-e.raw"}
    assert host.vm.changing is None
    with pytest.raises(Busy, match="disk d"):
        await live.check_settled(host.services, ID)
    host.guest.let_go()
    await host.write(disks=disks(E))
    assert host.vm.config.disks == (E,)
    assert host.files() == {"data-e.raw"}
    await live.check_settled(host.services, ID)


async def test_a_network_interface_that_the_guest_keeps_is_in_the_way_of_a_snapshot(make_host):
    host = await make_host()
    own = f"{host.tree.directory(ID)}/config.json"
    for config in ({}, {"net": []}, {"net": [{"id": "_net0", "num_queues": 2}]}):
        with open(own, "w") as file:
            json.dump(config, file)
        await live.check_settled(host.services, ID)  # none, or it has let go
    host.guest.devices["_net0"] = {"id": "_net0"}
    host.guest.obeys = False
    with pytest.raises(Busy, match="has not let go of _net0"):
        await live.check_settled(host.services, ID)
    for name in (os.devnull, "."):
        os.unlink(own)
        os.symlink(name, own)
        with pytest.raises(Failed, match=r"reading config\.json failed"):
            await live.check_settled(host.services, ID)


async def test_cpus_that_the_guest_gives_back_late_are_recorded_before_a_snapshot(make_host):
    host = await make_host(Guest(obeys=False))
    await host.write(cpu=3)
    with pytest.raises(TimedOut, match="2 of its CPUs"):
        await host.write(cpu=1)
    assert host.vm.config.cpu == 3
    # Else a snapshot would go on without two that the guest uses.
    assert host.guest.config["cpus"]["boot_vcpus"] == 3
    host.guest.cpus = 2
    host.guest.owes_cpus = False
    await live.check_settled(host.services, ID)
    assert (host.vm.config.cpu, host.vm.config.most_cpu) == (2, 4)
    assert host.guest.config["cpus"]["boot_vcpus"] == 2
    assert "boot=2,max=4" in host.environment
    assert host.limits[-1]["CPUQuotaPerSecUSec"] == 2_500_000


async def test_a_guest_may_have_given_back_more_than_is_recorded(make_host):
    host = await make_host(Guest(obeys=False))
    await host.write(cpu=3)
    with pytest.raises(TimedOut):
        await host.write(cpu=1)
    host.guest.let_go()
    host.guest.cpus = 1
    host.guest.refusals["/vm.resize"] = Failed("no")
    with pytest.raises(Failed, match="no"):
        await host.write(memory="192M")
    host.guest.refusals.clear()
    await host.write(autostart=True)
    assert (host.vm.config.cpu, host.vm.config.memory) == (1, 64 * MIB)
    await host.write(cpu=3, memory="192M")
    assert (host.guest.cpus, host.guest.memory) == (3, 192 * MIB)


@pytest.mark.parametrize("route", ["/vm.resize", "/vm.add-disk", "/vm.remove-device"])
async def test_a_refusal_in_the_middle_leaves_a_record_of_what_is(make_host, route):
    host = await make_host()
    await host.write(disks=disks(E))
    host.guest.refusals[route] = Failed("no")
    with pytest.raises(Failed, match="no"):
        await host.write(cpu=2, disks=disks(D))
    guest = host.guest
    assert host.vm.config.cpu == guest.cpus == guest.config["cpus"]["boot_vcpus"]
    assert {f"data-{disk.name}" for disk in host.vm.config.disks} == guest.devices.keys() - {"cow"}
    assert host.files() == {f"data-{disk.name}.raw" for disk in host.vm.config.disks}
    assert host.vm.changing is None
    assert f"boot={guest.cpus}" in host.environment
    guest.refusals.clear()
    await host.write(cpu=2, disks=disks(D))
    assert (host.vm.config.cpu, host.vm.config.disks) == (2, (D,))


async def test_what_is_not_known_yet_is_found_out_by_the_next_write(make_host):
    host = await make_host()
    call = host.guest.call

    async def silent(*request, timeout):
        raise TimedOut("Cloud Hypervisor did not answer")

    async def falls_silent(method, path, body=None, *, timeout):
        answer = await call(method, path, body, timeout=timeout)
        if path.endswith("add-disk"):
            host.guest.call = silent
        return answer

    host.guest.call = falls_silent
    with pytest.raises(TimedOut):
        await host.write(cpu=2, disks=disks(D))
    assert host.vm.changing is not None
    assert host.vm.config.disks == ()
    with pytest.raises(TimedOut):
        await host.write(cpu=3)
    host.guest.call = call
    await host.write(autostart=True)
    assert (host.vm.config.cpu, host.vm.config.disks, host.vm.changing) == (2, (D,), None)
    assert host.files() == {"data-d.raw"}


async def test_a_full_disk_changes_nothing(make_host, monkeypatch):
    host = await make_host()

    async def full(*arguments):
        raise NoSpace("no room")

    monkeypatch.setattr(host.tree, "make_disks", full)
    before = host.vm.config
    with pytest.raises(NoSpace):
        await host.write(memory="192M", disks=disks(D))
    assert (host.vm.config, host.guest.config["memory"]["size"]) == (before, 64 * MIB)
    assert host.guest.changes == []
    host.table.failure = NoSpace("no room for the index")
    with pytest.raises(NoSpace):
        await host.write(cpu=2)
    assert (host.vm.config, host.vm.changing, host.guest.cpus) == (before, None, 1)


@pytest.mark.parametrize(("cpu", "memory"), [(7, 64), (1, 1 << 30)])
async def test_a_vmm_is_not_believed_what_nobody_asked_for(make_host, cpu, memory):
    host = await make_host(Guest(obeys=False))
    call = host.guest.call

    async def lies(method, path, body=None, *, timeout):
        answer = await call(method, path, body, timeout=timeout)
        if body is not None:
            host.guest.cpus = cpu
            host.guest.config["memory"]["size"] = memory * MIB
        return answer

    host.guest.call = lies
    with pytest.raises(Failed, match="nobody asked for"):
        await host.write(disks=disks(D))
    assert (host.vm.config.cpu, host.vm.config.memory) == (1, 64 * MIB)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"cpu": 5}, Invalid, "max_cpu 4"),
        ({"memory": "576M"}, Invalid, "max_memory 512M"),
        ({"disks": [{"path": "/dev/sdb"}]}, Busy, "disks of the host"),
        ({"disks": [*disks(D, E), {"path": "/dev/sda"}]}, Busy, "those before them"),
        ({"disks": [{"path": "/dev/sda"}, *disks(E, D)]}, Busy, "those before them"),
        (
            {"disks": [*disks(D), {"path": "/dev/sda"}, {"name": "e", "size": "2M"}]},
            Busy,
            "e itself",
        ),
        (
            {
                "disks": [
                    *disks(D),
                    {"path": "/dev/sda"},
                    {"name": "f", "size": "1M", "serial": "se"},
                ]
            },
            Invalid,
            "take the old ones away first",
        ),
        ({"cpu": 2, "storage": "2M"}, Busy, "storage can change only"),
        ({"cpu": 2, "max_cpu": 8}, Busy, "max_cpu can change only"),
    ],
)
async def test_what_cannot_be_is_refused_before_anything(make_host, changes, kind, words):
    host = await make_host(max_cpu=4)
    host.table.vm = dataclasses.replace(
        host.vm,
        config=dataclasses.replace(host.vm.config, disks=(D, Disk(path="/dev/sda"), E)),
    )
    before = host.vm
    with pytest.raises(kind, match=words):
        await host.write(**changes)
    assert (host.vm, host.table.saved, host.guest.changes) == (before, [], [])


async def test_a_disk_is_added_to_the_cpus_of_the_others_while_there_are_these(
    make_host, monkeypatch
):
    host = await make_host(cpu=1, queue_affinity=((1,), (0,)))
    usable = frozenset({0, 1})
    monkeypatch.setattr(affinity, "host_cpus", lambda: HostCpus(usable, usable, usable))
    await host.write(disks=disks(D))
    (body,) = [body for route, body in host.guest.changes if route == "/vm.add-disk"]
    assert body["queue_affinity"] == [
        {"queue_index": 0, "host_cpus": [1]},
        {"queue_index": 1, "host_cpus": [0]},
    ]
    usable = frozenset({0})
    with pytest.raises(Invalid, match="CPU 1, which this host does not have"):
        await host.write(disks=disks(D, E))
    await host.write(disks=[])
    assert host.vm.config.disks == ()
    with pytest.raises(Busy, match="queue_affinity can change only while it is stopped"):
        await host.write(queue_affinity=[])


async def test_the_room_that_a_vm_was_started_with_stays(make_host):
    host = await make_host(cpu=2, max_cpu=0, memory=192 * MIB, max_memory=0)
    host.guest.config["cpus"]["boot_vcpus"] = 2
    host.guest.config["memory"]["size"] = 192 * MIB
    host.guest.boot()
    for changes in ({"cpu": 3}, {"memory": "320M"}):
        with pytest.raises(Invalid, match="was started with max_"):
            await host.write(**changes)
    await host.write(cpu=1)
    assert (host.vm.config.cpu, host.vm.config.max_cpu) == (1, 2)
    await host.write(cpu=2)
    assert (host.vm.config.cpu, host.vm.config.max_cpu) == (2, 0)


@pytest.mark.parametrize("state", [State.PAUSED, State.STARTING, State.STOPPING])
async def test_only_a_vm_that_runs_is_changed(make_host, state):
    host = await make_host()
    host.table.vm = dataclasses.replace(host.vm, state=state)
    with pytest.raises(Busy, match=f"is {state}"):
        await host.write(cpu=2)


async def test_a_backend_that_cannot_names_the_one_that_can(make_host):
    host = await make_host(max_cpu=0)
    host.table.vm = dataclasses.replace(host.vm, hypervisor="firecracker")
    for changes in ({"cpu": 2}, {"memory": "320M"}, {"disks": disks(D)}):
        with pytest.raises(Unsupported, match=r"firecracker changes no .*cloud-hypervisor does"):
            await host.write(**changes)


async def test_a_change_that_is_cut_off_is_left_to_the_next_agent(make_host):
    host = await make_host(Guest(obeys=False), disks=(D,))
    with trio.CancelScope() as scope:
        call = host.guest.call

        async def cut_off(method, path, body=None, *, timeout):
            answer = await call(method, path, body, timeout=timeout)
            if path.endswith("remove-device"):
                scope.cancel()
            return answer

        host.guest.call = cut_off
        await host.write(cpu=2, disks=[])
    assert scope.cancelled_caught
    assert host.vm.changing is not None
    host.guest.let_go()
    await live.settle(host.services, ID)
    assert (host.vm.config.cpu, host.vm.config.disks, host.vm.changing) == (2, (), None)
    assert host.files() == set()
    await live.settle(host.services, ID)


async def test_one_without_a_process_has_nothing_to_settle(make_host):
    host = await make_host()
    gone = dataclasses.replace(host.vm, pid=0, changing=host.vm.config)
    host.table.vm = gone
    await live.settle(host.services, ID)
    assert host.vm == gone
