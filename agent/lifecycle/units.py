"""VMs' units, as operations use them: systemd's answers with its refusals made into sentences."""

import contextlib
import hashlib
import logging
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import trio

from agent.model.errors import Exists, Failed, TimedOut
from agent.model.vm import UNIT_PREFIX, Vm
from agent.systemd.bus import Bus, BusError, BusFailure, BusTimeout
from agent.systemd.machines import register_machine
from agent.systemd.manager import NO_SUCH_UNIT, Manager
from agent.systemd.unit import Property
from agent.systemd.usage import unit_usage
from agent.systemd.watch import Changes, UnitState

_UNIT_EXISTS = "org.freedesktop.systemd1.UnitExists"
_KILL_AGAIN = 0.05  # seconds
_WORDS = 40  # lines: some VMMs take many to say one thing
_WORDS_LIMIT = 2.0  # seconds that journalctl may take
_WORDS_AT_ONCE = 4  # however many VMs crash
_log = logging.getLogger(__name__)


class Units:
    """All calls raise Failed or TimedOut when systemd refuses, or cannot be reached."""

    def __init__(self, manager: Manager, bus: Bus) -> None:
        self._manager = manager
        self._bus = bus
        self._reading = trio.CapacityLimiter(_WORDS_AT_ONCE)

    async def start(self, vm: Vm, properties: Sequence[Property]) -> str:
        """Start the VM's unit; return the job's result, `done` for success.

        Raises Exists when there is one of that name already, which is left alone.
        """
        with _translated(f"starting {vm.unit}"):
            try:
                return await self._manager.start_transient(vm.unit, properties)
            except BusError as error:
                if error.name != _UNIT_EXISTS:
                    raise
                unit = await self._manager.unit_state(vm.unit)
                if unit is not None and unit.active not in ("inactive", "failed"):
                    raise Exists(
                        f"unit {vm.unit} runs already, and it is not this agent's: look at it with "
                        "systemctl status, and stop it"
                    ) from error
                await self._manager.reset_failed(vm.unit)
                return await self._manager.start_transient(vm.unit, properties)

    async def stop(self, vm: Vm, timeout: float) -> None:
        """Stop the VM's unit, as `systemctl stop` does, and forget that it failed.

        Raises TimedOut after `timeout` seconds. A unit that is not there has stopped.
        """
        with trio.move_on_after(timeout) as scope, _translated(f"stopping {vm.unit}"):
            await self._stop(vm)
        if scope.cancelled_caught:
            raise TimedOut(f"systemd did not stop {vm.unit} within {timeout:.0f} seconds: try kill")
        await self.reset_failed(vm)

    async def kill(self, vm: Vm, timeout: float) -> None:
        """End all processes of the VM's unit at once, for good; as `stop` otherwise."""
        with trio.move_on_after(timeout) as scope, _translated(f"killing {vm.unit}"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_killing, vm)
                # After SIGKILL alone, systemd would restart the unit in a second.
                await self._stop(vm)
                nursery.cancel_scope.cancel()
        if scope.cancelled_caught:
            raise TimedOut(f"{vm.unit} did not end within {timeout:.0f} seconds of SIGKILL")
        await self.reset_failed(vm)

    async def reset_failed(self, vm: Vm) -> None:
        """Let systemd forget that the VM's unit failed, if it did."""
        with _translated(f"resetting {vm.unit}"):
            await self._manager.reset_failed(vm.unit)

    async def set_properties(self, vm: Vm, properties: Sequence[Property]) -> None:
        """Change properties of the VM's running unit."""
        with _translated(f"setting properties of {vm.unit}"):
            await self._manager.set_properties(vm.unit, properties)

    async def state(self, vm: Vm) -> UnitState | None:
        """Return what systemd says of the VM's unit, None when it knows none."""
        with _translated(f"asking for {vm.unit}"):
            return await self._manager.unit_state(vm.unit)

    async def started_state(self, vm: Vm) -> UnitState | None:
        """Return the same of a unit whose start is just done: most often systemd has told it."""
        told = self._manager.told_state(vm.unit)
        return told if told is not None and told.active == "active" else await self.state(vm)

    async def names(self) -> dict[str, str]:
        """Return the names of all VMs' units that systemd knows, with their active states."""
        with _translated("listing VMs' units"):
            units = await self._manager.list_units(f"{UNIT_PREFIX}*.service")
        return {unit.unit: unit.active for unit in units}

    @asynccontextmanager
    async def changes(self) -> AsyncIterator[Changes]:
        """Get the new state of every VM's unit whenever it differs."""
        async with self._manager.changes(UNIT_PREFIX) as changes:
            yield changes

    async def usage(self, vm: Vm) -> dict[str, int]:
        """Return what systemd counts for the VM's running unit."""
        with _translated(f"asking for the usage of {vm.unit}"):
            return await unit_usage(self._bus, vm.unit, vm.pid)

    async def register_machine(self, vm: Vm) -> None:
        """Show the VM in `machinectl`, where the host has systemd-machined."""
        identity = hashlib.sha256(vm.id.encode()).digest()[:16]
        with _translated(f"registering {vm.name} with systemd-machined"):
            await register_machine(self._bus, vm.name, identity, vm.pid)

    async def last_lines(self, vm: Vm) -> list[str]:
        """Return the last lines that the VM's VMM wrote to its error output."""
        command = ["journalctl", "--quiet", "--output=cat", f"--lines={_WORDS}"]
        command.append("_TRANSPORT=stdout")
        command.append(f"_SYSTEMD_UNIT={vm.unit}")
        command.append(f"--since=@{int(vm.started_at)}")
        async with self._reading:
            with trio.move_on_after(_WORDS_LIMIT), contextlib.suppress(OSError):
                found = await trio.run_process(
                    command, capture_stdout=True, check=False, stderr=subprocess.DEVNULL
                )
                return found.stdout.decode(errors="replace").splitlines()
        return []

    async def _stop(self, vm: Vm) -> None:
        try:
            result = await self._manager.stop(vm.unit)
        except BusError as error:
            if error.name != NO_SUCH_UNIT:
                raise
        else:
            if result not in ("done", "skipped"):
                raise Failed(f"systemd did not stop {vm.unit}: its job ended with {result}")

    async def _keep_killing(self, vm: Vm) -> None:
        """Kill what there is and what comes: the stop starts the unit's helpers."""
        while True:
            with contextlib.suppress(BusError):  # no process is left, or no unit
                await self._manager.kill(vm.unit, "all", signal.SIGKILL)
            await trio.sleep(_KILL_AGAIN)


@contextlib.contextmanager
def _translated(doing: str) -> Iterator[None]:
    try:
        yield
    except (BusFailure, ExceptionGroup) as error:
        cause: Exception = error
        while isinstance(cause, ExceptionGroup) and len(cause.exceptions) == 1:
            cause = cause.exceptions[0]
        match cause:
            case BusTimeout():
                raise TimedOut(f"{doing}: {cause}") from error
            case BusFailure():
                raise Failed(f"{doing} failed: {cause}") from error
            case Failed():
                raise cause from None
            case _:
                raise
