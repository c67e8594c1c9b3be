"""The manager against the lab's systemd, which is reloaded, re-executed and cut off meanwhile."""

import itertools
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from dbus_next.signature import Variant

from agent.systemd.bus import Bus, BusError, open_bus
from agent.systemd.manager import (
    NO_SUCH_UNIT,
    UNIT_EXISTS,
    Manager,
    Property,
    open_manager,
)
from agent.systemd.watch import Changes, Resync, UnitChange, UnitState

pytestmark = pytest.mark.anyio

PATIENCE = 60.0
PREFIX = "manager-test-"

Names = Callable[[], str]


@pytest.fixture
async def bus() -> AsyncIterator[Bus]:
    async with open_bus() as bus:
        yield bus


@pytest.fixture
async def manager(bus: Bus) -> AsyncIterator[Manager]:
    async with open_manager(bus) as manager:
        yield manager


_numbers = itertools.count(1)


@pytest.fixture
async def name(manager: Manager) -> AsyncIterator[Names]:
    """`name()` is a unit that is not there; it is stopped and forgotten when the test ends."""
    made: list[str] = []

    def make() -> str:
        made.append(f"{PREFIX}{next(_numbers)}.service")
        return made[-1]

    yield make
    if made:
        await systemctl("kill", "--signal=KILL", *made, check=False)
        await systemctl("stop", *made, check=False)
        await systemctl("reset-failed", *made, check=False)


async def systemctl(*arguments: str, check: bool = True) -> str:
    done = await trio.run_process(
        ["systemctl", *arguments], capture_stdout=True, capture_stderr=True, check=check
    )
    return done.stdout.decode().strip()


def service(*command: str, **more: Variant) -> list[Property]:
    """A unit that runs a command, or sleeps."""
    words = list(command or ("sleep", "infinity"))
    return [
        ("Type", Variant("s", "exec")),
        ("CollectMode", Variant("s", "inactive")),
        ("ExecStart", Variant("a(sasb)", [[words[0], words, False]])),
        *more.items(),
    ]


class Gate:
    """What a program waits for in `cat` until the test opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)

    async def open(self) -> None:
        """Let the program go on; wait until it reads."""
        await trio.to_thread.run_sync(self.path.write_text, "go")


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


def shell(script: str, **more: Variant) -> list[Property]:
    return service("sh", "-c", script, **more)


def notifying(script: str) -> list[Property]:
    """A unit that has started when its script says so."""
    properties = dict(shell(script, NotifyAccess=Variant("s", "all")))
    return list((properties | {"Type": Variant("s", "notify")}).items())


async def next_of(changes: Changes) -> UnitChange | Resync:
    with trio.fail_after(PATIENCE):
        return await anext(changes)


async def next_state(changes: Changes, unit: str, active: str) -> UnitState:
    """Wait until the unit is told to be in this state."""
    while True:
        change = await next_of(changes)
        if isinstance(change, UnitChange) and change.unit == unit:
            assert change.state is not None
            if change.state.active == active:
                return change.state


async def states_until_gone(changes: Changes, unit: str) -> list[str]:
    """The active states that are told of a unit until it is forgotten."""
    states: list[str] = []
    while True:
        change = await next_of(changes)
        if isinstance(change, UnitChange) and change.unit == unit:
            if change.state is None:
                return states
            states.append(change.state.active)


class TestJobs:
    async def test_a_start_is_done_when_the_program_runs(
        self, manager: Manager, name: Names
    ) -> None:
        unit = name()
        assert await manager.start_transient(unit, service()) == "done"
        state = await manager.unit_state(unit)
        assert state is not None
        assert (state.active, state.sub, state.result) == ("active", "running", "success")
        assert Path(f"/proc/{state.main_pid}/comm").read_text() == "sleep\n"
        assert len(state.invocation) == 32
        assert (await manager.control_group(unit)).endswith(f"/{unit}")

    async def test_a_stop_is_done_when_nothing_runs_and_forgets_the_unit(
        self, manager: Manager, name: Names
    ) -> None:
        unit = name()
        await manager.start_transient(unit, service())
        assert await manager.stop(unit) == "done"
        assert await manager.unit_state(unit) is None
        assert await manager.list_units(unit) == []

    async def test_a_missing_program_fails_the_start_and_says_why(
        self, manager: Manager, name: Names
    ) -> None:
        unit = name()
        assert await manager.start_transient(unit, service("/nonexistent")) == "failed"
        state = await manager.unit_state(unit)
        assert state is not None
        assert (state.active, state.result, state.main_pid) == ("failed", "exit-code", 0)
        assert (state.exec_main_code, state.exec_main_status) == (os.CLD_EXITED, 203)
        await manager.reset_failed(unit)
        assert await manager.unit_state(unit) is None

    async def test_a_start_that_somebody_stops_is_canceled(
        self, manager: Manager, name: Names
    ) -> None:
        unit = name()
        results: list[str] = []

        async def start() -> None:
            results.append(await manager.start_transient(unit, notifying("sleep infinity")))

        async with manager.changes(unit) as changes, trio.open_nursery() as nursery:
            nursery.start_soon(start)
            await next_state(changes, unit, "activating")
            assert await manager.stop(unit) == "done"
        assert results == ["canceled"]

    async def test_a_name_that_is_taken_is_an_error(self, manager: Manager, name: Names) -> None:
        unit = name()
        await manager.start_transient(unit, service())
        with pytest.raises(BusError) as raised:
            await manager.start_transient(unit, service())
        assert raised.value.name == UNIT_EXISTS

    async def test_an_unknown_property_is_an_error_that_names_it(
        self, manager: Manager, name: Names
    ) -> None:
        with pytest.raises(BusError, match="Nonsense"):
            await manager.start_transient(name(), service(Nonsense=Variant("b", True)))

    async def test_stopping_what_is_not_there_is_an_error(
        self, manager: Manager, name: Names
    ) -> None:
        with pytest.raises(BusError) as raised:
            await manager.stop(name())
        assert raised.value.name == NO_SUCH_UNIT

    async def test_forgetting_a_failure_that_never_was_is_none(
        self, manager: Manager, name: Names
    ) -> None:
        await manager.reset_failed(name())

    async def test_a_restart_runs_the_program_anew(self, manager: Manager, name: Names) -> None:
        unit = name()
        await manager.start_transient(unit, service())
        before = await manager.unit_state(unit)
        assert await manager.restart(unit) == "done"
        after = await manager.unit_state(unit)
        assert before is not None
        assert after is not None
        assert before.main_pid != after.main_pid
        assert before.invocation != after.invocation

    async def test_a_killed_program_fails_its_unit(self, manager: Manager, name: Names) -> None:
        unit = name()
        async with manager.changes(unit) as changes:
            await manager.start_transient(unit, service())
            await manager.kill(unit, "main", signal.SIGKILL)
            state = await next_state(changes, unit, "failed")
        assert (state.result, state.main_pid) == ("signal", 0)
        assert (state.exec_main_code, state.exec_main_status) == (os.CLD_KILLED, 9)
        assert await manager.unit_state(unit) == state

    async def test_properties_change_while_it_runs(self, manager: Manager, name: Names) -> None:
        unit = name()
        await manager.start_transient(unit, service())
        await manager.set_properties(unit, [("CPUWeight", Variant("t", 321))])
        assert await systemctl("show", "--property=CPUWeight", "--value", unit) == "321"

    async def test_sixty_four_at_once_are_told_apart(self, manager: Manager, name: Names) -> None:
        results: dict[str, str] = {}
        units = [name() for _ in range(64)]

        async def start(number: int) -> None:
            program = service() if number % 4 else service("/nonexistent")
            results[units[number]] = await manager.start_transient(units[number], program)

        async with trio.open_nursery() as nursery:
            for number in range(64):
                nursery.start_soon(start, number)
        assert [results[unit] for unit in units] == ["failed", "done", "done", "done"] * 16
        listed = {unit.unit: unit.active for unit in await manager.list_units(f"{PREFIX}*")}
        assert [listed[unit] for unit in units] == ["failed", "active", "active", "active"] * 16


class TestChanges:
    async def test_a_life_is_told_in_order(self, manager: Manager, name: Names, gate: Gate) -> None:
        unit = name()
        async with manager.changes(PREFIX) as changes:
            assert await manager.start_transient(unit, shell(f"cat {gate.path}")) == "done"
            await gate.open()
            assert await states_until_gone(changes, unit) == ["activating", "active", "inactive"]

    async def test_many_lives_at_once_are_each_told_in_order(
        self, manager: Manager, name: Names, rounds: Callable[[int, int], int]
    ) -> None:
        units = [name() for _ in range(rounds(64, 256))]
        told: dict[str, list[str | None]] = {unit: [] for unit in units}
        async with manager.changes(PREFIX) as changes:
            async with trio.open_nursery() as nursery:
                for unit in units:
                    nursery.start_soon(manager.start_transient, unit, service())
            async with trio.open_nursery() as nursery:
                for unit in units:
                    nursery.start_soon(manager.stop, unit)
            while any(not states or states[-1] is not None for states in told.values()):
                change = await next_of(changes)
                if isinstance(change, UnitChange):
                    told[change.unit].append(change.state.active if change.state else None)
        life = ["activating", "active", "deactivating", "inactive", None]
        assert told == dict.fromkeys(units, life)

    async def test_what_a_job_led_to_is_told_before_the_job_ends(
        self, manager: Manager, name: Names
    ) -> None:
        running, missing = name(), name()
        assert manager.told_state(running) is None
        async with manager.changes(PREFIX):
            await manager.start_transient(running, service())
            state = manager.told_state(running)
            assert state is not None
            assert (state.active, state.main_pid != 0) == ("active", True)
            assert state == await manager.unit_state(running)
            await manager.start_transient(missing, service("/nonexistent"))
            state = manager.told_state(missing)
            assert state is not None
            assert (state.active, state.exec_main_status) == ("failed", 203)

    async def test_a_restart_by_systemd_is_told(self, manager: Manager, name: Names) -> None:
        unit = name()
        again = {"Restart": Variant("s", "on-failure"), "RestartUSec": Variant("t", 0)}
        async with manager.changes(unit) as changes:
            await manager.start_transient(unit, service(**again))
            first = await next_state(changes, unit, "active")
            await manager.kill(unit, "main", signal.SIGKILL)
            assert (await next_state(changes, unit, "activating")).main_pid == 0
            second = await next_state(changes, unit, "active")
        assert (first.restarts, second.restarts) == (0, 1)
        assert first.main_pid != second.main_pid
        assert first.invocation != second.invocation

    async def test_other_units_are_not_told(self, manager: Manager, name: Names) -> None:
        noise, unit = name(), name()
        async with manager.changes(unit) as changes:
            await manager.start_transient(noise, service())
            await manager.start_transient(unit, service())
            await manager.stop(noise)
            await manager.stop(unit)
            await states_until_gone(changes, unit)

    async def test_a_reload_asks_for_a_new_look_and_loses_nobody(
        self, manager: Manager, name: Names
    ) -> None:
        unit = name()
        async with manager.changes(PREFIX) as changes:
            await manager.start_transient(unit, service())
            assert (await next_state(changes, unit, "active")).active == "active"
            await manager.reload()
            while not isinstance(change := await next_of(changes), Resync):
                assert change.state is not None
            await manager.stop(unit)
            assert await states_until_gone(changes, unit) == ["active", "deactivating", "inactive"]


class Outage:
    """Ways in which systemd, or the bus between it and us, can go away and come back."""

    async def reexec(self) -> None:
        await systemctl("daemon-reexec")

    async def reload(self) -> None:
        await systemctl("daemon-reload")

    async def restart_bus(self) -> None:
        await systemctl("reset-failed", "dbus.service")  # or it may not be started again so soon
        await systemctl("restart", "dbus.service")


OUTAGES = ["reexec", "reload", "restart_bus"]


@pytest.mark.parametrize("outage", OUTAGES)
class TestOutages:
    async def test_starts_that_are_cut_off_are_done_and_run_once(
        self,
        manager: Manager,
        name: Names,
        outage: str,
        tmp_path: Path,
        rounds: Callable[[int, int], int],
    ) -> None:
        # In a file of its own: systemd 252 mangles semicolons in the arguments of a transient unit
        # that it reads again before it has started it.
        script = str(tmp_path / "script")
        Path(script).write_text(f"cd {tmp_path}; echo >>$1; >$1.written; exec sleep infinity")
        for _ in range(rounds(2, 20)):
            results: dict[str, str] = {}
            units = [name() for _ in range(48)]

            async def start(unit: str, results: dict[str, str] = results) -> None:
                results[unit] = await manager.start_transient(unit, service("sh", script, unit))

            async with trio.open_nursery() as nursery:
                for unit in units[:24]:
                    nursery.start_soon(start, unit)
                nursery.start_soon(getattr(Outage(), outage))
                for unit in units[24:]:
                    nursery.start_soon(start, unit)
                    await trio.sleep(0.01)
            assert results == dict.fromkeys(units, "done")
            # A unit that has started has been executed; its script may still have to write.
            while any(not (tmp_path / f"{unit}.written").exists() for unit in units):
                await trio.sleep(0.01)
            runs = {unit: (tmp_path / unit).read_text() for unit in units}
            assert runs == dict.fromkeys(units, "\n")

    async def test_stops_that_are_cut_off_are_done(
        self, manager: Manager, name: Names, outage: str
    ) -> None:
        results: dict[str, str] = {}
        units = [name() for _ in range(24)]

        async def stop(unit: str) -> None:
            try:
                results[unit] = await manager.stop(unit)
            except BusError as error:  # asked again, since the first answer was lost
                results[unit] = "done" if error.name == NO_SUCH_UNIT else error.name

        async with trio.open_nursery() as nursery:
            for unit in units:
                nursery.start_soon(manager.start_transient, unit, service())
        async with trio.open_nursery() as nursery:
            for unit in units[:12]:
                nursery.start_soon(stop, unit)
            nursery.start_soon(getattr(Outage(), outage))
            for unit in units[12:]:
                nursery.start_soon(stop, unit)
                await trio.sleep(0.01)
        assert results == dict.fromkeys(units, "done")
        assert await manager.list_units(f"{PREFIX}*") == []

    async def test_a_job_is_awaited_across_it(
        self, manager: Manager, name: Names, outage: str, gate: Gate
    ) -> None:
        unit = name()
        results: list[str] = []
        script = f"cat {gate.path}; systemd-notify --ready; exec sleep infinity"

        async def start() -> None:
            results.append(await manager.start_transient(unit, notifying(script)))

        async with manager.changes(unit) as changes, trio.open_nursery() as nursery:
            nursery.start_soon(start)
            await next_state(changes, unit, "activating")
            await getattr(Outage(), outage)()
            while not isinstance(await next_of(changes), Resync):
                pass
            assert results == []
            await gate.open()
        assert results == ["done"]

    async def test_changes_go_on_after_it(self, manager: Manager, name: Names, outage: str) -> None:
        lasting, ending = name(), name()
        async with manager.changes(PREFIX) as changes:
            for unit in (lasting, ending):
                await manager.start_transient(unit, service())
            await getattr(Outage(), outage)()
            while not isinstance(await next_of(changes), Resync):
                pass
            state = await manager.unit_state(lasting)
            assert state is not None
            assert state.active == "active"
            await manager.kill(ending, "main", signal.SIGKILL)
            assert (await next_state(changes, ending, "failed")).result == "signal"
            await manager.stop(lasting)
            await next_state(changes, lasting, "inactive")


class TestWhatHappensWhileTheBusIsAway:
    """A job that ends unseen is judged by its unit."""

    @pytest.mark.parametrize(
        ("end", "result"),
        [("systemd-notify --ready; exec sleep infinity", "done"), ("exit 3", "failed")],
    )
    async def test_a_start_ends(
        self,
        manager: Manager,
        name: Names,
        gate: Gate,
        end: str,
        result: str,
        until: Callable[..., None],
    ) -> None:
        unit = name()
        results: list[str] = []

        async def start() -> None:
            script = f"cat {gate.path}; {end}"
            results.append(await manager.start_transient(unit, notifying(script)))

        async with manager.changes(unit) as changes, trio.open_nursery() as nursery:
            nursery.start_soon(start)
            await next_state(changes, unit, "activating")
            await systemctl("stop", "dbus.socket", "dbus.service")
            await gate.open()
            while await systemctl("show", "--property=Job", "--value", unit):
                await trio.sleep(0.01)
            assert results == []
            await systemctl("start", "dbus.socket")
        assert results == [result]

    async def test_a_stop_ends(self, manager: Manager, name: Names, gate: Gate) -> None:
        unit = name()
        results: list[str] = []
        stop = ["cat", str(gate.path)]

        async def end() -> None:
            results.append(await manager.stop(unit))

        program = service(ExecStop=Variant("a(sasb)", [["cat", stop, False]]))
        async with manager.changes(unit) as changes, trio.open_nursery() as nursery:
            await manager.start_transient(unit, program)
            nursery.start_soon(end)
            await next_state(changes, unit, "deactivating")
            await systemctl("stop", "dbus.socket", "dbus.service")
            await gate.open()
            while await systemctl("is-active", unit, check=False) != "inactive":
                await trio.sleep(0.01)
            assert results == []
            await systemctl("start", "dbus.socket")
        assert results == ["done"]
