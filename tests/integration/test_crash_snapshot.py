"""An agent that dies between any two steps: what it leaves is finished or undone by the next.

Every acknowledged snapshot is whole then, every other one whole or gone, no VM is lost, left paused
that its user had running, or resumed that its user had paused.
"""

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from snapshot_tools import AWAY, archive, away, died, dying_at, extract, names, settled

pytestmark = [pytest.mark.thorough(group="crashes"), pytest.mark.backends]


@pytest.fixture
def name(vm_name: Callable[[], str], agent: Any) -> Any:
    name = f"snap-{vm_name()}"
    yield name
    for found in names(agent):
        if found.startswith(name):
            archive(agent, found).unlink()


def started(make_vm: Callable[..., Any], **config: Any) -> Any:
    vm = make_vm(storage="8M", **config)
    vm.verb("start")
    vm.wait_counting()
    return vm


def whole(agent: Any, name: str, make_vm: Callable[..., Any], tmp_path: Path) -> None:
    """Fail unless the snapshot can be read and cloned."""
    extract(archive(agent, name), tmp_path / name)
    clone = make_vm(hypervisor=None, memory=None, boot=None)
    clone.write("from", name)
    clone.verb("start")
    clone.wait_counting()
    assert clone.counts[0] > 1
    clone.remove()


TAKE = [
    "recorded",
    "prepared",
    "paused",
    "written",
    "copied",
    "resumed",
    "collected",
    "sealed",
    "published",
    "ready",
]


@pytest.mark.parametrize(
    "paused",
    [
        pytest.param(False, id="running"),
        pytest.param(True, id="paused", marks=pytest.mark.long(group="taking of a paused VM")),
    ],
)
@pytest.mark.parametrize("step", TAKE)
def test_taking(agent, make_vm, until, name, tmp_path, step, paused):
    with dying_at(agent, f"take:{step}"):
        vm = started(make_vm)
        if paused:
            vm.verb("pause")
        with away():
            vm.write("snapshot", name)
        died(agent, until)
        vm.wait_for_state("paused" if paused else "running")
        if paused:
            assert vm.state == "paused"
            vm.verb("resume")
        seen = len(vm.counts)
        vm.wait_counting()
        counts = vm.counts
        assert counts == list(range(1, len(counts) + 1))
        assert len(counts) > seen
        settled(agent)
        assert (name in names(agent)) == (step == "ready")
        if step == "ready":
            whole(agent, name, make_vm, tmp_path)
        vm.write("snapshot", f"{name}-2")
        whole(agent, f"{name}-2", make_vm, tmp_path)


@pytest.mark.parametrize(
    ("step", "by"),
    [
        *((step, "SIGKILL") for step in TAKE if step not in ("resumed", "ready")),
        ("written", "SIGTERM"),
        ("published", "SIGTERM"),
    ],
)
def test_hibernating(agent, make_vm, until, name, step, by):
    with dying_at(agent, f"hibernate:{step}", by):
        vm = started(make_vm)
        with away():
            vm.write("hibernate", name)
        died(agent, until)
        vm.wait_for_state("running")
        vm.wait_counting()
        counts = vm.counts
        assert counts == list(range(1, len(counts) + 1))
        assert name not in names(agent)
        settled(agent)


@pytest.mark.parametrize(
    ("step", "by"), [("ready", "SIGKILL"), ("ready", "SIGTERM"), ("killed", "SIGKILL")]
)
def test_hibernating_once_the_snapshot_is_durable(agent, make_vm, until, name, step, by):
    with dying_at(agent, f"hibernate:{step}", by):
        vm = started(make_vm)
        with away():
            vm.write("hibernate", name)
        died(agent, until)
        vm.wait_for_state("stopped")
        settled(agent)
        lines = len(vm.counts)
        vm.write("restore", name)
        vm.wait_counting()
        assert vm.counts[lines] > 1


@pytest.mark.parametrize("step", ["begun", "whole", "recorded", "published", "ready"])
def test_importing(agent, make_vm, until, name, tmp_path, step):
    with dying_at(agent, f"import:{step}"):
        vm = started(make_vm)
        vm.write("snapshot", name)
        copy = tmp_path / "copy.tar"
        shutil.copyfile(archive(agent, name), copy)
        with away():
            shutil.copyfile(copy, archive(agent, f"{name}-2"))
        died(agent, until)
        settled(agent)
        assert (f"{name}-2" in names(agent)) == (step == "ready")
        assert name in names(agent)
        if step == "ready":
            whole(agent, f"{name}-2", make_vm, tmp_path)
        shutil.copyfile(copy, archive(agent, f"{name}-3"))
        whole(agent, f"{name}-3", make_vm, tmp_path)


@pytest.mark.parametrize("step", ["filled", "prepared", "loaded", "running"])
def test_cloning(agent, make_vm, until, name, step):
    with dying_at(agent, f"clone:{step}"):
        vm = started(make_vm)
        vm.write("snapshot", name)
        clone = make_vm(hypervisor=None, memory=None, boot=None)
        clone.write("from", name)
        with away():
            clone.verb("start")
        died(agent, until)
        if step in ("loaded", "running"):
            clone.wait_for_state("running")
        else:
            assert clone.state in ("created", "stopped")
            clone.verb("start")
        clone.wait_counting()
        assert clone.counts[0] > 1
        clone.verb("stop")
        lines = len(clone.counts)
        clone.verb("start")
        clone.wait_counting()
        assert clone.counts[lines] == 1


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
@pytest.mark.parametrize(
    "step",
    [
        "staged",
        "recorded",
        "killed",
        "exchanged",
        "loaded",
        "running",
        "synced",
        "forgotten",
    ],
)
def test_restoring(agent, make_vm, until, name, step, stopped):
    with dying_at(agent, f"restore:{step}"):
        vm = started(make_vm)
        vm.write("snapshot", name)
        if stopped:
            vm.verb("stop")
        lines = len(vm.counts)
        with away():
            vm.write("restore", name)
        died(agent, until)
        undone = step == "staged" or (step == "recorded" and not stopped)
        vm.wait_for_state("stopped" if undone and stopped else "running")
        settled(agent)
        if not (undone and stopped):
            until(lambda: len(vm.counts) > lines + 1)
            counts = vm.counts
            if undone:
                assert counts == list(range(1, len(counts) + 1))
            else:
                assert counts[lines + 1] > 1
        vm.write("restore", name)
        assert vm.state == "running"
        vm.wait_counting()
        settled(agent)


@pytest.mark.parametrize("step", ["recorded", "removed", "forgotten"])
def test_deleting(agent, make_vm, until, name, step):
    with dying_at(agent, f"delete:{step}"):
        vm = started(make_vm)
        vm.write("snapshot", name)
        with away():
            archive(agent, name).unlink()
        died(agent, until)
        assert name not in names(agent)
        assert list((vm.path / "snapshots").iterdir()) == []
        settled(agent)
        vm.write("snapshot", name)


@pytest.mark.long
@pytest.mark.parametrize("paused_meanwhile", [False, True], ids=["let-be", "paused"])
def test_a_guest_whose_vmm_hangs_when_it_is_to_resume_goes_on_once_it_answers(
    agent, make_vm, until, name, paused_meanwhile
):
    with dying_at(agent, "take:copied", by="SIGSTOP"):
        vm = started(make_vm)
        vmm = vm.pid
        taking = threading.Thread(target=lambda: vm.write("snapshot", name))
        taking.start()
        host = agent.pid
        until(
            lambda: " T " in Path(f"/proc/{host}/stat").read_text(), what="the agent stands still"
        )
        os.kill(vmm, signal.SIGSTOP)
        os.kill(host, signal.SIGCONT)
        taking.join()
        assert vm.state == "paused"
        if paused_meanwhile:
            vm.verb("pause")
        os.kill(vmm, signal.SIGCONT)
        if paused_meanwhile:
            vm.verb("resume")
        else:
            vm.wait_for_state("running")
        vm.wait_counting()
        counts = vm.counts
        assert counts == list(range(1, len(counts) + 1))


@pytest.mark.long
@pytest.mark.parametrize("number", range(100))
def test_at_random(agent, make_vm, until, name, tmp_path, number, rng, rounds):
    for turn in range(rounds(1, 2)):
        at_random(agent, make_vm, until, f"{name}-{turn}", tmp_path, rng)


def at_random(
    agent: Any,
    make_vm: Callable[..., Any],
    until: Callable[..., Any],
    name: str,
    tmp_path: Path,
    rng: random.Random,
) -> None:
    """Let the agent die, or leave, at any moment of any change; what was acknowledged must hold."""
    first, second = f"{name}-0", f"{name}-1"
    vm = started(make_vm)
    paused = rng.random() < 0.3
    vm.write("snapshot", first)
    copy = tmp_path / f"{name}.tar"
    shutil.copyfile(archive(agent, first), copy)
    clone = make_vm(hypervisor=None, memory=None, boot=None)
    clone.write("from", first)
    if paused:
        vm.verb("pause")
    moves: dict[str, Callable[[], object]] = {
        "take": lambda: vm.write("snapshot", second),
        "restore": lambda: vm.write("restore", first),
        "hibernate": lambda: vm.write("hibernate", second),
        "import": lambda: shutil.copyfile(copy, archive(agent, second)),
        "clone": lambda: clone.verb("start"),
        "delete": lambda: archive(agent, first).unlink(),
    }
    move = rng.choice(sorted(moves))
    failures: list[BaseException] = []

    def act() -> None:
        try:
            moves[move]()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=act)
    thread.start()
    time.sleep(rng.random() * (0.1 if move in ("clone", "delete") else 0.4))
    if rng.random() < 0.7:
        agent.kill()
    else:
        agent.restart()
    thread.join()
    until(lambda: os.path.ismount(agent.mount))
    until(lambda: vm.state in ("running", "paused", "stopped"))
    for failure in failures:
        assert isinstance(failure, OSError), failure
        assert failure.errno in AWAY, failure
    done = not failures
    shown = names(agent)
    settled(agent)
    assert first in shown or move == "delete"
    if done:
        assert (second in shown) == (move in ("take", "hibernate", "import"))
        assert (first in shown) == (move != "delete")
    match move:
        case "restore":
            assert vm.state in ("running", "paused")
        case "hibernate":
            # The guest is in one place, and in no other.
            assert vm.state == ("stopped" if second in shown else "paused" if paused else "running")
        case _:
            assert vm.state == ("paused" if paused else "running")
    if move == "clone":
        until(lambda: clone.state in ("created", "running", "stopped", "error"))
        assert clone.state == "running" or not done
        clone.verb("start")
        clone.wait_counting()
        assert clone.counts[0] > 1
    for found in shown:
        if found.startswith(name):
            whole(agent, found, make_vm, tmp_path)
    clone.remove()
    vm.remove()


@pytest.mark.backends("firecracker")
def test_a_restore_that_was_cut_off_beside_a_hung_vmm_does_not_come_later(
    agent, make_vm, until, name
):
    with dying_at(agent, "restore:recorded"):
        vm = started(make_vm)
        vm.write("snapshot", name)
        os.kill(vm.pid, signal.SIGSTOP)
        with away():
            vm.write("restore", name)
        died(agent, until)
        vm.wait_for_state("running")
    vm.verb("kill")
    vm.verb("start")
    vm.verb("stop")
    agent.restart()
    time.sleep(1)
    assert vm.state == "stopped"
