"""Pause and resume, and the way to a running VMM."""

import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from agent.model.errors import Failed, Invalid, TimedOut
from agent.model.vm import State, Vm
from agent.vmm.driver import Vmm

from .operation import Operations
from .services import Services

_PAUSE_LIMIT = 10.0  # seconds, from the contract's table of verbs
_HELD_LOOK = 11.0  # seconds; more than one try may take


@asynccontextmanager
async def connected(services: Services, vm: Vm) -> AsyncIterator[Vmm]:
    """Talk to the VM's VMM; raise Missing when its socket is not there, Failed if not its own."""
    driver = services.drivers.get(vm.hypervisor)
    if driver is None:
        raise Failed(f"this agent has no backend {vm.hypervisor!r} to talk to VM {vm.name} with")
    with services.tree.open_socket(vm) as socket:
        directory = functools.partial(services.tree.open_directory, vm)
        async with driver.connect(socket, directory) as vmm:
            yield vmm


async def pause(services: Services, vm_id: str) -> None:
    """Stop the vCPUs, until the user resumes them."""
    vm = services.vm(vm_id)
    if vm.state is State.PAUSED:
        if not vm.user_paused:
            await _wished(services, vm_id, State.PAUSED)
        return
    if vm.state is not State.RUNNING:
        raise Invalid(f"VM {vm.name} is {vm.state}: pause takes a VM that is running")
    async with _within_limit(vm, "pause"), connected(services, vm) as vmm:
        await vmm.pause()
    await _wished(services, vm_id, State.PAUSED)


async def resume(services: Services, vm_id: str) -> None:
    """Let the vCPUs go on."""
    vm = services.vm(vm_id)
    if vm.state is State.RUNNING:
        return
    if vm.state is not State.PAUSED:
        raise Invalid(f"VM {vm.name} is {vm.state}: resume takes a VM that is paused")
    async with _within_limit(vm, "resume"), connected(services, vm) as vmm:
        await vmm.resume()
    await _wished(services, vm_id, State.RUNNING)


async def _wished(services: Services, vm_id: str, state: State) -> None:
    """Record what the user wished, which the VMM has done; it is on disk when this returns.

    The VMM could tell the next agent whether its guest stands still, but not by whose wish.
    """
    paused = state is State.PAUSED
    reason = "user-pause" if paused else "user-resume"
    services.note(vm_id, state=state, user_paused=paused, reason=reason)
    await services.flush()


async def resume_held(services: Services, operations: Operations) -> None:
    """Let guests go on that stand still though no user paused them, each in its VM's turn.

    Such are left by a VMM that hung in the middle of a snapshot and could not be told to resume.
    """
    while True:
        for vm in services.index.vms.all():
            if _is_held(vm) and not operations.busy(vm.id):
                operations.run_in_turn(vm.id, functools.partial(_go_on, services, vm.id))
        await trio.sleep(_HELD_LOOK)


def _is_held(vm: Vm) -> bool:
    return vm.state is State.PAUSED and not vm.user_paused


async def _go_on(services: Services, vm_id: str) -> None:
    if _is_held(services.vm(vm_id)):
        await resume(services, vm_id)


@asynccontextmanager
async def _within_limit(vm: Vm, verb: str) -> AsyncIterator[None]:
    with trio.move_on_after(_PAUSE_LIMIT) as scope:
        yield
    if scope.cancelled_caught:
        raise TimedOut(
            f"the VMM of {vm.name} did not {verb} within {_PAUSE_LIMIT:.0f} seconds: kill the VM"
        )
