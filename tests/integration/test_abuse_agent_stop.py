"""The agent stopped in the midst of operations: it goes at once, and nothing is lost."""

import contextlib
import threading
import time

import pytest

LONG = 15.0
"""Seconds: systemd waits for 30 before it kills."""


@pytest.mark.parametrize("operation", ["snapshot", "restore", "hibernate", "restart", "stop"])
def test_an_agent_that_is_stopped_in_an_operation_leaves_at_once(agent, make_vm, operation):
    vm = make_vm(memory="256M", stop_timeout=3)
    name = f"cut-{operation}"
    kept = agent.mount / "snapshots" / f"{name}-kept.tar"
    vm.verb("start")
    vm.write("snapshot", kept.stem)
    vm.wait_counting()

    def begin() -> None:
        with contextlib.suppress(OSError):
            if operation == "restore":
                vm.write("restore", kept.stem)
            elif operation in ("restart", "stop"):
                vm.verb(operation)
            else:
                vm.write(operation, name)

    other = threading.Thread(target=begin)
    other.start()
    while vm.state == "running" and other.is_alive():
        time.sleep(0.001)
    began = time.monotonic()
    agent.stop()
    assert time.monotonic() - began < LONG
    other.join(30)
    agent.start()
    if operation in ("snapshot", "restore"):
        vm.wait_for_state("running")
        vm.wait_counting()
    else:
        assert vm.state in ("running", "stopped")
    for left in (kept, agent.mount / "snapshots" / f"{name}.tar"):
        with contextlib.suppress(FileNotFoundError):
            left.unlink()


@pytest.mark.thorough
@pytest.mark.parametrize("operation", ["start", "clone"])
@pytest.mark.parametrize("moment", [0, 0.005, 0.01, 0.015, 0.02])
def test_a_start_that_is_cut_off_is_no_error(agent, make_vm, until, operation, moment):
    vm = make_vm()
    snapshot = agent.mount / "snapshots" / f"cut-off-{vm.name}.tar"
    if operation == "clone":
        vm.verb("start")
        vm.write("snapshot", snapshot.stem)
        vm = make_vm(hypervisor=None, memory=None, boot=None)
        vm.write("from", snapshot.stem)

    def begin() -> None:
        with contextlib.suppress(OSError):
            vm.verb("start")

    other = threading.Thread(target=begin)
    other.start()
    while vm.state == "created" and other.is_alive():
        time.sleep(0.001)
    time.sleep(moment)
    agent.stop()
    other.join(30)
    agent.start()
    # A clone that was begun is completed or undone once the agent is ready.
    until(lambda: vm.state != "starting")
    assert vm.state in ("running", "stopped"), vm.read("error")
    vm.verb("start")
    vm.wait_counting()
    with contextlib.suppress(FileNotFoundError):
        snapshot.unlink()
