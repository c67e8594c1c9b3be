"""What Cloud Hypervisor is asked for a guest that runs, and what it is said to have."""

import os
from contextlib import asynccontextmanager, nullcontext

import pytest
import trio
from described_vmm import Refusal
from live_guest import Guest

from agent.model import canonical
from agent.model.config import Disk, VmConfig
from agent.model.disks import own_disks
from agent.model.errors import Busy, Failed, Invalid, TimedOut, Unsupported
from agent.model.size import MIB
from agent.vmm import cloud_hypervisor_hardware
from agent.vmm.cloud_hypervisor_hardware import GuestHardware
from agent.vmm.driver import Hardware
from agent.vmm.http import HttpApi

pytestmark = pytest.mark.anyio
PID = 4711
DRIVE, OTHER = own_disks(
    VmConfig(disks=(Disk(name="d", size=MIB, serial="blue"), Disk(name="e", size=MIB)))
).values()
CALLS = {
    "hardware": (PID, [DRIVE]),
    "set_cpus": (3,),
    "set_memory": (192 * MIB,),
    "add_disk": (OTHER, VmConfig(queue_affinity=((0,),))),
    "remove_disk": (DRIVE,),
}


@pytest.fixture
def guest(monkeypatch):
    """One that has a disk more than its own."""
    guest = Guest()
    path = f"{canonical.VM}/data-d.raw"
    guest.config["disks"].append({"id": "data-d", "path": path, "num_queues": 1})
    guest.boot()
    count = {(PID, b"vcpu"): lambda: guest.cpus}
    monkeypatch.setattr(cloud_hypervisor_hardware, "count_threads", lambda *asked: count[asked]())
    return guest


@asynccontextmanager
async def served(guest, path):
    """Serve the guest's VMM at `path`; the value is what changes its hardware."""
    async with guest.serving(path):
        socket = os.open(path, os.O_PATH)
        try:
            yield GuestHardware(HttpApi(socket, "Cloud Hypervisor"), nullcontext)
        finally:
            os.close(socket)


async def test_a_guest_has_what_it_was_given(guest):
    live = GuestHardware(guest, nullcontext)
    await live.set_cpus(3)
    await live.set_memory(192 * MIB)
    await live.add_disk(OTHER, VmConfig(cpu=3, queue_affinity=((4,), (), (1, 0))))
    now = await live.hardware(PID, [DRIVE, OTHER])
    assert now == Hardware(3, 3, 3, 192 * MIB, frozenset([DRIVE, OTHER]))
    route, body = guest.changes[-1]
    assert route == "/vm.add-disk"
    assert body["path"] == f"{canonical.VM}/data-e.raw"
    assert (body["image_type"], body["direct"], body["num_queues"]) == ("Raw", True, 3)
    assert body["queue_affinity"] == [
        {"queue_index": 0, "host_cpus": [4]},
        {"queue_index": 2, "host_cpus": [1, 0]},
    ]


async def test_a_disk_that_is_tied_to_no_cpu_says_nothing_of_it(guest):
    await GuestHardware(guest, nullcontext).add_disk(OTHER, VmConfig())
    assert "queue_affinity" not in guest.changes[-1][1]


async def test_a_guest_has_what_it_has_not_let_go_of(guest):
    live = GuestHardware(guest, nullcontext)
    await live.set_cpus(2)
    guest.obeys = False
    await live.remove_disk(DRIVE)
    await live.set_cpus(1)
    now = await live.hardware(PID, [DRIVE])
    assert (now.cpu, now.claimed_cpu) == (2, 1)
    assert now.disks == now.leaving == {DRIVE}
    with pytest.raises(Busy, match="has not let go"):
        await live.set_cpus(3)
    await live.set_cpus(2)
    guest.let_go()
    now = await live.hardware(PID, [DRIVE])
    assert (now.cpu, now.disks, now.leaving) == (2, frozenset(), frozenset())


async def test_a_disk_of_a_foreign_snapshot_is_found_by_its_file(guest):
    path = "/var/lib/cocoon/run/cloudhypervisor/abc/data-e.raw"
    guest.config["disks"].append({"id": "_disk3", "path": path, "num_queues": 1})
    guest.boot()
    live = GuestHardware(guest, nullcontext)
    now = await live.hardware(PID, [OTHER])
    assert (now.disks, now.leaving) == (frozenset([OTHER]), frozenset())
    await live.remove_disk(OTHER)
    assert guest.changes[-1] == ("/vm.remove-device", {"id": "_disk3"})


@pytest.mark.parametrize("answer", [None, [], {"config": {}}, {"config": {"cpus": {}}}])
async def test_an_answer_that_makes_no_sense_is_a_failure(answer):
    class Strange:
        async def call(self, *arguments, **more):
            return answer

    with pytest.raises(Failed, match="unknown"):
        await GuestHardware(Strange(), nullcontext).hardware(PID, [])


async def test_a_process_without_vcpus_has_ended(guest):
    guest.cpus = 0
    guest.obeys = False
    with pytest.raises(Failed, match="ended"):
        await GuestHardware(guest, nullcontext).hardware(PID, [])


async def test_memory_that_cannot_be_plugged_any_more_says_until_when(guest):
    guest.refusals["/vm.resize"] = Failed("Memory manager error: No ACPI slot available")
    with pytest.raises(Unsupported, match="before the next start"):
        await GuestHardware(guest, nullcontext).set_memory(192 * MIB)
    guest.refusals["/vm.resize"] = Failed("Memory manager error: another")
    with pytest.raises(Failed, match="another"):
        await GuestHardware(guest, nullcontext).set_memory(192 * MIB)


@pytest.mark.parametrize("call", CALLS)
async def test_refusals_silence_and_answers_that_break_off_are_told(guest, tmp_path, call):
    async with served(guest, tmp_path / "api") as live:
        ask, send = getattr(live, call), guest.send
        guest.refusal = Refusal(500, ("no",))
        with pytest.raises(Failed, match=r"refused .*: no"):
            await ask(*CALLS[call])
        guest.refusal = None

        async def keep(stream, reply):
            await trio.sleep_forever()

        guest.send = keep
        with pytest.raises(TimedOut, match="did not answer"):
            await ask(*CALLS[call], timeout=0.05)

        async def cut(stream, reply):
            await stream.send_all(reply[:10])

        guest.send = cut
        with pytest.raises(Failed, match="broke off during"):
            await ask(*CALLS[call])
        guest.send = send
        assert (await live.hardware(PID, [])).cpu


@pytest.mark.parametrize(
    ("config", "kind", "words"),
    [
        ({"memory": 32 * MIB}, Unsupported, "takes no memory .* 64M"),
        ({"memory": 65 * MIB, "max_memory": 512 * MIB}, Invalid, "128M: write 192M, or stop"),
        ({"memory": 200 * MIB, "max_memory": 512 * MIB}, Invalid, "write 192M or 320M, or stop"),
        ({"memory": 100 * MIB, "max_memory": 128 * MIB}, Invalid, "128M: stop"),
        ({"cpu": 1, "memory": 64 * MIB}, Unsupported, "2 queues"),
    ],
)
def test_what_a_guest_cannot_come_to_says_what_it_can(config, kind, words):
    now = Hardware(cpu=2, claimed_cpu=2, least_cpu=2, memory=64 * MIB)
    with pytest.raises(kind, match=words):
        GuestHardware(Guest(), nullcontext).check(
            now, VmConfig(**{"cpu": 2, "max_cpu": 4} | config)
        )


@pytest.mark.parametrize("config", [{}, {"cpu": 1}, {"cpu": 4, "memory": 320 * MIB}])
def test_what_a_guest_can_come_to_passes(config):
    now = Hardware(cpu=2, claimed_cpu=2, least_cpu=1, memory=64 * MIB)
    GuestHardware(Guest(), nullcontext).check(now, VmConfig(**{"memory": 64 * MIB} | config))
