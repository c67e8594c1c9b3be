"""What the watch settles after changes that may have been missed."""

import math
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import trio

from agent.lifecycle.watch import settle, watch
from agent.model.access import Access
from agent.model.config import VmConfig
from agent.model.errors import TimedOut
from agent.model.vm import State, Vm
from agent.systemd.watch import Resync

pytestmark = pytest.mark.anyio

STATES = {
    "never-started": State.CREATED,
    "ended": State.STOPPED,
    "failed": State.ERROR,
    "runs": State.RUNNING,
    "came-up": State.STOPPED,
}
UNITS = {
    "cocoon-vm-failed.service": "failed",
    "cocoon-vm-runs.service": "active",
    "cocoon-vm-came-up.service": "activating",
    "cocoon-vm-stranger.service": "active",
}


class Units:
    """systemd, which has forgotten nothing and lost a signal."""

    def __init__(self, failure=None):
        self._failure = failure
        self._into, self._changes = trio.open_memory_channel(math.inf)
        self._into.send_nowait(Resync())
        self._into.close()

    @asynccontextmanager
    async def changes(self):
        yield self._changes

    async def names(self):
        if self._failure:
            raise self._failure
        return UNITS


async def settled(units):
    vms = [
        Vm(name, name, 70000, Access(0, 0), VmConfig(), state=state)
        for name, state in STATES.items()
    ]
    services = SimpleNamespace(index=SimpleNamespace(vms=SimpleNamespace(all=lambda: vms)))
    services.units = units
    turns = []
    operations = SimpleNamespace(run_in_turn=lambda vm_id, work: turns.append(vm_id))
    await watch(services, operations)
    return turns


async def test_of_many_vms_only_those_that_run_or_should_are_asked_for():
    assert await settled(Units()) == ["runs", "came-up"]


async def test_all_are_asked_for_when_systemd_does_not_list_its_units():
    assert await settled(Units(TimedOut("busy"))) == list(STATES)


async def test_a_removal_that_failed_stays_recorded():
    async def state(vm):
        return None

    vm = Vm("half", "half", 70000, Access(0, 0), VmConfig(), state=State.DELETING)
    # Nothing else of the services is there: to record an end would raise.
    await settle(SimpleNamespace(vm=lambda vm_id: vm, units=SimpleNamespace(state=state)), vm.id)
