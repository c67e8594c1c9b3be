"""What becomes of VMs without anybody asking: guests power off, VMMs die, systemd restarts them."""

import functools
import logging
import time

import trio

from agent.model.errors import CocoonError
from agent.model.vm import UNIT_PREFIX, State, Vm
from agent.systemd.watch import ENDED, Resync, UnitChange, UnitState

from . import live
from .operation import Operations
from .services import PROCESS_GONE, RESTING, Services
from .start import look_after
from .stop import describe_exit, ended, last_words

_UP = frozenset({State.STARTING, State.RUNNING, State.PAUSED, State.SAVING, State.RESTORING})
_log = logging.getLogger(__name__)


async def watch(
    services: Services,
    operations: Operations,
    *,
    task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED,
) -> None:
    """Follow the VMs' units for ever, and settle each VM whose record says otherwise."""
    waiting: dict[str, UnitState | None] = {}
    async with services.units.changes() as changes:
        task_status.started()
        async for change in changes:
            match change:
                case Resync():
                    await _settle_all(services, operations)
                case UnitChange(unit, state):
                    _note_change(services, operations, waiting, unit, state)


async def _settle_all(services: Services, operations: Operations) -> None:
    """Settle each VM that has a process, or had one.

    systemd is asked once for all units: of thousands of VMs most may never have been started, and
    it looks for the files of each unit that it is asked for and does not know.
    """
    try:
        units = await services.units.names()
    except CocoonError as error:
        _log.warning("each VM's unit is asked for: %s", error)
        units = dict.fromkeys((vm.unit for vm in services.index.vms.all()), "unknown")
    for vm in services.index.vms.all():
        if vm.state not in RESTING or units.get(vm.unit, "inactive") not in ENDED:
            operations.run_in_turn(vm.id, functools.partial(settle, services, vm.id))


def _note_change(
    services: Services,
    operations: Operations,
    waiting: dict[str, UnitState | None],
    unit: str,
    state: UnitState | None,
) -> None:
    """Settle the VM in its turn; `waiting` has the newest state of each VM that waits for that."""
    vm = services.index.vms.named(unit.removeprefix(UNIT_PREFIX).removesuffix(".service"))
    if vm is None:
        return
    vm_id = vm.id
    has_place = vm_id in waiting
    waiting[vm_id] = state
    if has_place:
        return

    async def settle_if_needed() -> None:
        # By now the operation that caused the changes, if one did, has recorded what they led to.
        state = waiting.pop(vm_id)
        now = services.index.vms.get(vm_id)
        if now is not None and not _agrees(now, state):
            await settle(services, vm_id)

    operations.run_in_turn(vm_id, settle_if_needed)


def _is_over(state: UnitState | None) -> bool:
    return state is None or state.active in ENDED


def _agrees(vm: Vm, state: UnitState | None) -> bool:
    if state is None or _is_over(state):
        return vm.state in RESTING
    return state.active == "active" and vm.state in _UP and vm.pid == state.main_pid


async def settle(services: Services, vm_id: str) -> None:
    """Make the record say what systemd says; call it in the VM's turn."""
    vm = services.vm(vm_id)
    unit = await services.units.state(vm)
    match unit.active if unit else "inactive":
        case "active" | "reloading":
            assert unit is not None
            await services.open_console(vm)
            if vm.pid != unit.main_pid or vm.state not in _UP:
                reason = "restart" if vm.pid not in (0, unit.main_pid) else vm.reason
                # An agent that died right after the VM's first start may not have recorded it.
                services.note(
                    vm_id,
                    state=State.RUNNING,
                    pid=unit.main_pid,
                    reason=reason,
                    first_booted=not vm.is_to_be_cloned,
                    started_at=vm.started_at or time.time(),
                )
                services.background.start_soon(look_after, services, vm_id)
            if vm.changing is not None:
                services.in_turn(vm_id, functools.partial(live.settle, services, vm_id))
        case "activating":
            # systemd waits in opening the FIFOs until somebody holds them.
            await services.open_console(vm)
            if vm.state is not State.STARTING:
                services.note(vm_id, state=State.STARTING, reason="restart", **PROCESS_GONE)
        case "deactivating":
            # Without a main process the guest has ended by itself, and the end comes in a moment.
            assert unit is not None
            asked = vm.state is State.STOPPING or vm_id in services.killed
            if unit.main_pid and not asked:
                services.note(vm_id, state=State.STOPPING, reason="systemd-stop")
        case _:
            # A removal that failed stays recorded, for the next try or the agent's next start.
            if vm.state not in RESTING and vm.state is not State.DELETING:
                await record_end(services, vm)


async def record_end(services: Services, vm: Vm) -> None:
    """Record why a process ended that nobody was waiting for."""
    record = services.exit_record(vm)
    if record is None:
        # Nothing wrote it: the host went down with the VM running.
        await ended(services, vm.id, State.STOPPED, reason="host-boot")
    elif vm.state is State.STOPPING:
        # That is what was wanted, whatever the VMM died of in the end.
        await ended(services, vm.id, State.STOPPED, reason=vm.reason)
    elif record.result == "success":
        await ended(services, vm.id, State.STOPPED, reason="guest-exit")
    else:
        words = await last_words(services, vm)
        error = f"{vm.hypervisor} of VM {vm.name} {describe_exit(record)}"
        if words:
            error += f": {words}"
        await ended(services, vm.id, State.ERROR, reason="crash", error=error)
