"""The ways down: stop, kill, and what is left to do when a VM's process has ended."""

import time
from typing import Any

import trio

from agent.model.errors import Failed, Invalid
from agent.model.vm import State, Vm
from agent.systemd.exit_record import ExitRecord
from agent.systemd.users import remove_user

from .services import PROCESS_GONE, Services

_STOP_GRACE = 15.0  # seconds beyond stop_timeout that systemd and the helpers may take
KILL_LIMIT = 10.0  # seconds
_WORDS_LENGTH = 500
_ASKED = ("user-stop", "systemd-stop")


async def stop(services: Services, vm_id: str) -> None:
    """Ask the guest to power off, and end it by force after `stop_timeout` seconds."""
    vm = services.vm(vm_id)
    match vm.state:
        case State.STOPPED:
            return
        case State.RUNNING | State.PAUSED:
            vm = services.note(vm_id, state=State.STOPPING, reason="user-stop")
        case State.ERROR:
            pass
        case _:
            raise Invalid(
                f"VM {vm.name} is {vm.state}: stop takes a VM that is running, paused or in error"
            )
    await services.units.stop(vm, vm.config.stop_timeout + _STOP_GRACE)
    await ended(services, vm_id, State.STOPPED, reason="user-stop")


async def kill(services: Services, vm_id: str) -> None:
    """End the process at once; the VM's restart policy does not bring it back."""
    await _killed(services, vm_id)
    vm = services.vm(vm_id)
    if vm.state is State.STOPPED:
        # What stopped it may be about to start it again.
        services.killed.add(vm_id)
        return
    if not vm.has_process and vm.state is not State.ERROR:
        raise Invalid(f"VM {vm.name} is {vm.state}: there is no process to kill")
    services.killed.add(vm_id)
    over = services.killing[vm_id] = trio.Event()
    try:
        await services.units.kill(vm, KILL_LIMIT)
        await ended(services, vm_id, State.STOPPED, reason="user-kill")
        # To the next agent it would look like a crash.
        await services.flush()
    finally:
        del services.killing[vm_id]
        over.set()


async def begin_start(services: Services, vm_id: str) -> None:
    """Let kills that came before an operation which starts the VM count no more."""
    await _killed(services, vm_id)
    services.killed.discard(vm_id)


def check_not_killed(services: Services, vm: Vm) -> None:
    """Raise Failed when a kill has come since `begin_start`: it goes past a start, too."""
    if vm.id in services.killed:
        raise Failed(f"VM {vm.name} was killed meanwhile")


async def _killed(services: Services, vm_id: str) -> None:
    while over := services.killing.get(vm_id):
        await over.wait()


async def ended(
    services: Services, vm_id: str, state: State, *, reason: str, error: str = ""
) -> Vm:
    """Record that the VM's process has ended, and let go of what it used."""
    if vm_id in services.killed:
        state, reason, error = State.STOPPED, "user-kill", ""
    await let_go(services, services.vm(vm_id))
    vm = services.vm(vm_id)
    if vm.state is state and vm.reason == reason and vm.pid == 0:
        return vm
    changes: dict[str, Any] = {"seeded": vm.seed} if _has_booted(services, vm, reason) else {}
    return services.note(
        vm_id,
        state=state,
        reason=reason,
        error=error,
        stopped_at=time.time(),
        changing=None,
        **PROCESS_GONE,
        **changes,
    )


def _has_booted(services: Services, vm: Vm, reason: str) -> bool:
    """Whether the VM's last boot, with a seed, was a success.

    Without an agent in the guest there is one sign: that it powered off when it was asked to. One
    that ends by itself may have panicked, or wanted to reboot before its first boot is done.
    """
    if not vm.seed or vm.state is not State.STOPPING or reason not in _ASKED:
        return False
    record = services.exit_record(vm)
    return (
        record is not None
        and (record.result, record.code, record.status) == ("success", "exited", "0")
        and record.time < vm.updated_at + vm.config.stop_timeout  # then the VMM was ended
    )


async def let_go(services: Services, vm: Vm) -> None:
    """Give back what a start has taken for the VM, which has no process; can be repeated."""
    await services.consoles.close(vm)
    await services.tree.release_disks(vm)
    # Every start of a unit lists all users there are: no more than have a process.
    await services.tree.in_thread("forgetting the user of the VM", remove_user, vm.uid)


def describe_exit(record: ExitRecord) -> str:
    """Return what a person would say of an exit: the end of a sentence about the VMM."""
    match record.result:
        case "success":
            return "ended by itself"
        case "signal" | "core-dump":
            return f"was killed by signal {record.status}"
        case "oom-kill":
            return "was killed because it used more memory than it may"
        case "timeout" | "watchdog":
            return f"did not end in time and was killed ({record.result})"
        case "exit-code":
            return f"exited with status {record.status}"
        case "start-limit-hit":
            return "died again and again, and systemd gave up restarting it"
        case _:
            return f"ended ({record.result} {record.code} {record.status})".rstrip()


async def last_words(services: Services, vm: Vm) -> str:
    """Return what the VM's VMM said last of why it ended, "" when it said nothing."""
    driver = services.drivers.get(vm.hypervisor)
    lines = await services.units.last_lines(vm)
    return driver.explain(lines)[:_WORDS_LENGTH] if driver else ""
