"""A kill goes past whatever else runs for a VM, and the VM does not come back."""

import contextlib
import threading
import time

import pytest


@pytest.mark.parametrize("operation", ["restart", "restore"])
def test_a_vm_killed_in_the_midst_of_another_start_stays_down(
    agent, make_vm, operation, rng, rounds
):
    snapshot = agent.mount / "snapshots" / f"killed-{operation}.tar"
    vm = make_vm()
    vm.verb("start")
    vm.write("snapshot", snapshot.stem)

    def begin() -> None:
        with contextlib.suppress(OSError):
            if operation == "restart":
                vm.verb("restart")
            else:
                vm.write("restore", snapshot.stem)

    for _ in range(rounds(6, 100)):
        vm.verb("start")
        other = threading.Thread(target=begin)
        other.start()
        while vm.state == "running" and other.is_alive():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.04))
        vm.verb("kill")
        other.join(30)
        assert vm.state == "stopped"
        assert vm.read("pid") == "0"
    snapshot.unlink()
