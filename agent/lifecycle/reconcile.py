"""The truth after a restart: what the records say, made to agree with what systemd runs."""

import functools
import logging
import secrets
from collections.abc import Iterable

import trio

from agent.model.errors import CocoonError, NoSpace
from agent.model.vm import State, Vm
from agent.systemd.users import known_users, write_user
from agent.vmm.driver import VmmState

from .configure import finish_removal
from .pause import connected
from .services import RESTING, Services
from .start import look_after, recollect
from .stop import ended, let_go
from .watch import record_end, settle

ALIVE = frozenset({"active", "activating", "deactivating", "reloading"})
_ASK_LIMIT = 5.0  # seconds that one VMM has to say whether it is paused
_log = logging.getLogger(__name__)


async def reconcile(services: Services, unfinished: Iterable[Vm] = ()) -> list[Vm]:
    """Adopt running units, notice those that ended, finish removals; before anybody may ask.

    Leaves the VMs `unfinished` alone. Returns the VMs that run, for `ask_vmms`.
    """
    units = await services.units.names()
    users = await services.tree.in_thread("listing the users of VMs", known_users)
    recovered = {vm.id for vm in unfinished}
    alive = []
    async with trio.open_nursery() as nursery:
        for vm in services.index.vms.all():
            is_alive = units.pop(vm.unit, "") in ALIVE
            if vm.uid in users and vm.state in RESTING and not (is_alive or vm.restoring):
                # The agent died in the midst of a start.
                nursery.start_soon(_let_go, services, vm)
            if vm.id in recovered:
                continue
            if is_alive:
                alive.append(vm)
                _claim_host(services)
                nursery.start_soon(_adopt, services, vm)
            elif vm.state not in RESTING:
                nursery.start_soon(_settle, services, vm)
    for name in units:
        _log.warning("unit %s belongs to no VM of this agent; systemctl stop ends it", name)
    now = [services.index.vms.get(vm.id) for vm in alive]
    return [vm for vm in now if vm is not None and vm.pid]


def _claim_host(services: Services) -> None:
    try:
        services.claim_host()
    except CocoonError as error:
        _log.error("%s", error)


async def _adopt(services: Services, vm: Vm) -> None:
    try:
        # /run is lost with a boot only, but whoever cleans it up must not cost a VM its restart.
        await services.tree.in_thread("making the user of the VM known", write_user, vm.uid)
        await settle(services, vm.id)
        await recollect(services, vm.id)
        now = services.index.vms.get(vm.id)
        if now is not None and now.pid and now.pid == vm.pid:
            # An agent that died right after the start may have left something undone.
            services.background.start_soon(look_after, services, vm.id)
    except CocoonError as error:
        _log.error("VM %s cannot be adopted: %s", vm.name, error)


async def _let_go(services: Services, vm: Vm) -> None:
    try:
        await let_go(services, vm)
    except CocoonError as error:
        _log.error("what VM %s used is not given back: %s", vm.name, error)


async def _settle(services: Services, vm: Vm) -> None:
    try:
        await settle_without_process(services, vm)
    except CocoonError as error:
        _log.error("what became of VM %s cannot be recorded: %s", vm.name, error)


async def settle_without_process(services: Services, vm: Vm) -> None:
    """Record what became of a VM that has no process any more."""
    record = services.exit_record(vm)
    if vm.state is State.DELETING:
        await finish_removal(services, vm)
    elif vm.state is State.STARTING and (record is None or record.time < vm.started_at):
        lost = "the agent went away while the VM was starting: start it again"
        await ended(services, vm.id, State.STOPPED, reason="agent-restart", error=lost)
    else:
        await record_end(services, vm)


async def host_has_booted(services: Services) -> bool:
    """Whether this is the agent's first start since the host booted.

    The run directory is empty after a boot: a marker there, also kept in the index, tells.
    """
    path = f"{services.tree.run}/run-id"
    run_id = await services.tree.in_thread("reading the run marker", _run_id, path)
    if run_id and run_id == services.index.fact("run_id"):
        return False
    run_id = secrets.token_hex(16)
    await services.tree.in_thread("writing the run marker", _write_run_id, path, run_id)
    try:
        await services.index.save_fact("run_id", run_id)
    except NoSpace as error:
        # An agent that does not start frees nothing. At worst the next one starts VMs once more.
        _log.error("%s", error)
    return True


def _run_id(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read(64)
    except FileNotFoundError:
        return ""


def _write_run_id(path: str, run_id: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(run_id)


def ask_vmms(services: Services, running: list[Vm]) -> None:
    """Ask each VMM in its VM's turn whether it is paused; one that hangs delays no other VM."""
    for vm in running:
        services.in_turn(vm.id, functools.partial(_ask_vmm, services, vm))


async def _ask_vmm(services: Services, vm: Vm) -> None:
    try:
        with trio.fail_after(_ASK_LIMIT):
            async with connected(services, vm) as vmm:
                state = await vmm.state()
    except (CocoonError, trio.TooSlowError) as error:
        _log.warning("VM %s does not say whether it is paused: %s", vm.name, error or "no answer")
        return
    now = services.index.vms.get(vm.id)
    if now is None or now.state not in (State.RUNNING, State.PAUSED):
        return
    if state is VmmState.PAUSED and now.state is State.RUNNING:
        services.note(vm.id, state=State.PAUSED, user_paused=True, reason="user-pause")
    if state is VmmState.RUNNING and now.state is State.PAUSED:
        services.note(vm.id, state=State.RUNNING, user_paused=False, reason="user-resume")
