"""A VM's life through its files, with real systemd and Firecracker, with and without the agent."""

import errno
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest


def systemctl(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(
        ["systemctl", *arguments], check=check, capture_output=True, text=True, timeout=60
    )
    return done.stdout.strip()


def refused(number: int) -> Any:
    """Expect the errno `number` from what is done in the block."""
    return pytest.raises(OSError, match=os.strerror(number))


def events_of(agent: Any, name: str) -> list[dict[str, Any]]:
    lines = (agent.mount / "events").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["name"] == name]


def transitions(agent: Any, name: str) -> list[tuple[str, str]]:
    return [(event["state"], event["reason"]) for event in events_of(agent, name)]


def test_a_vm_starts_counts_pauses_and_stops(agent, make_vm):
    vm = make_vm()
    assert vm.state == "created"
    vm.verb("start")
    assert vm.state == "running"
    assert systemctl("is-active", vm.unit) == "active"
    assert int(vm.read("pid")) == int(systemctl("show", "-P", "MainPID", vm.unit))
    vm.wait_counting()
    vm.verb("pause")
    assert vm.state == "paused"
    seen = len(vm.counts)
    vm.verb("resume")
    assert vm.state == "running"
    vm.wait_counting()
    assert vm.counts[seen - 1 :] == list(range(seen, len(vm.counts) + 1))
    vm.verb("stop")
    assert vm.state == "stopped"
    assert vm.read("pid") == "0"
    assert systemctl("is-active", vm.unit, check=False) == "inactive"
    assert transitions(agent, vm.name) == [
        ("created", "create"),
        ("created", "configure"),
        ("starting", "boot"),
        ("running", "boot"),
        ("paused", "user-pause"),
        ("running", "user-resume"),
        ("stopping", "user-stop"),
        ("stopped", "user-stop"),
    ]
    assert [event["generation"] for event in events_of(agent, vm.name)] == list(range(1, 9))


def test_one_write_creates_and_starts_a_vm(agent, guests, vm_name):
    name = vm_name()
    document = {
        "name": name,
        "memory": "64M",
        "boot": {"kernel": str(guests.guest)},
        "state": "start",
    }
    (agent.mount / "create").write_text(json.dumps(document))
    path = agent.mount / "vms" / name
    assert (path / "state").read_text() == "running\n"
    (path / "state").write_text("kill")
    path.rmdir()
    assert not path.exists()


def test_a_creation_that_fails_leaves_nothing(agent, guests, vm_name):
    name = vm_name()
    not_a_kernel = Path("/run/lab-not-a-kernel")
    not_a_kernel.write_bytes(b"no kernel at all" * 100)
    document = {"name": name, "boot": {"kernel": str(not_a_kernel)}, "state": "start"}
    with refused(errno.ENOEXEC):
        (agent.mount / "create").write_text(json.dumps(document))
    assert not (agent.mount / "vms" / name).exists()
    assert str(not_a_kernel) in (agent.mount / "errors").read_text().splitlines()[-1]


def test_the_same_vm_counts_on_over_a_restart_and_a_kill_of_the_agent(agent, make_vm):
    vm = make_vm()
    vm.verb("start")
    vm.wait_counting()
    for interrupt in (agent.restart, agent.kill):
        before = vm.read("pid"), vm.read("id")
        interrupt()
        assert vm.state == "running"
        assert (vm.read("pid"), vm.read("id")) == before
        vm.wait_counting()
    counts = vm.counts
    assert counts == list(range(1, len(counts) + 1))


def test_a_stop_and_start_of_the_agent_is_no_different(agent, make_vm):
    vm = make_vm()
    vm.verb("start")
    agent.stop()
    assert systemctl("is-active", vm.unit) == "active"
    time.sleep(1)  # long enough for lines that only the FIFO holds
    agent.start()
    assert vm.state == "running"
    vm.wait_counting()
    assert vm.counts == list(range(1, len(vm.counts) + 1))


def test_a_paused_vm_is_still_paused_after_the_agent_restarts(agent, make_vm):
    vm = make_vm()
    vm.verb("start")
    vm.verb("pause")
    agent.kill()
    vm.wait_for_state("paused")
    vm.verb("resume")
    vm.wait_counting()


@pytest.mark.parametrize(
    ("verb", "state"), [("pause", "paused"), ("resume", "running"), ("kill", "stopped")]
)
def test_what_a_user_did_is_known_right_after_a_kill_of_the_agent(agent, make_vm, verb, state):
    vm = make_vm(restart="on-failure")
    vm.verb("start")
    if verb == "resume":
        vm.verb("pause")
    host, vmm = agent.pid, vm.pid
    vm.verb(verb)
    os.kill(host, signal.SIGKILL)
    if verb != "kill":
        os.kill(vmm, signal.SIGSTOP)  # it tells nothing
    agent.wait_ready(other_than=host)
    assert vm.state == state
    if verb != "kill":
        os.kill(vmm, signal.SIGCONT)


def test_systemctl_stop_is_the_same_graceful_stop(agent, make_vm):
    vm = make_vm()
    vm.verb("start")
    vm.wait_counting()
    began = time.monotonic()
    systemctl("stop", vm.unit)
    assert time.monotonic() - began < 20  # far below stop_timeout: the guest was asked and went
    vm.wait_for_state("stopped")
    vm.verb("start")
    assert vm.state == "running"


def test_systemctl_stop_works_while_the_agent_is_away(agent, make_vm):
    vm = make_vm()
    vm.verb("start")
    vm.wait_counting()
    agent.stop()
    systemctl("stop", vm.unit)
    agent.start()
    assert vm.state == "stopped"
    assert vm.read("error") == ""


def test_a_guest_that_powers_off_is_stopped(agent, make_vm):
    vm = make_vm()
    vm.verb("start")
    vm.wait_counting()
    vm.write("console", "q")
    vm.wait_for_state("stopped")
    assert transitions(agent, vm.name)[-1] == ("stopped", "guest-exit")


def test_a_guest_that_powers_off_while_the_agent_is_away_is_stopped(agent, make_vm, until):
    vm = make_vm()
    vm.verb("start")
    vm.wait_counting()
    vm_id = vm.read("id")
    agent.stop()
    Path(f"/run/cocoon/{vm_id}/console.in").write_bytes(b"q\n")  # what the agent would have done
    until(lambda: systemctl("is-active", vm.unit, check=False) == "inactive", what="it is over")
    agent.start()
    assert vm.state == "stopped"
    assert transitions(agent, vm.name)[-1] == ("stopped", "guest-exit")


def test_a_vmm_that_dies_is_an_error_with_its_reason(agent, make_vm):
    vm = make_vm()
    vm.verb("start")
    os.kill(int(vm.read("pid")), signal.SIGKILL)
    vm.wait_for_state("error")
    assert "killed by signal KILL" in vm.read("error")
    assert transitions(agent, vm.name)[-1] == ("error", "crash")
    assert vm.unit in systemctl("--failed", "--plain", "--no-legend")
    vm.verb("start")
    assert vm.state == "running"
    assert vm.read("error") == ""
    assert vm.unit not in systemctl("--failed", "--plain", "--no-legend")


def test_a_vmm_that_died_while_the_agent_was_away_is_told_with_its_reason(agent, make_vm):
    vm = make_vm()
    vm.verb("start")
    pid = int(vm.read("pid"))
    agent.stop()
    os.kill(pid, signal.SIGKILL)
    agent.start()
    assert vm.state == "error"
    assert "killed by signal KILL" in vm.read("error")
    vm.verb("stop")
    assert vm.state == "stopped"
    assert vm.unit not in systemctl("--failed", "--plain", "--no-legend")


def test_restart_on_failure_brings_a_vm_back_without_the_agent(agent, make_vm, until):
    vm = make_vm(restart="on-failure")
    vm.verb("start")
    vm.wait_counting()
    pid = int(vm.read("pid"))
    agent.stop()
    os.kill(pid, signal.SIGKILL)
    until(
        lambda: (
            systemctl("show", "-P", "MainPID", vm.unit) not in ("0", str(pid))
            and systemctl("is-active", vm.unit, check=False) == "active"
        ),
        what="systemd restarts the VM",
    )
    agent.start()
    assert vm.state == "running"
    assert int(vm.read("pid")) != pid
    vm.wait_counting()
    vm.write("console", "x")
    until(lambda: "echo x" in vm.read("console"), what="the guest hears its console")


def test_restart_on_failure_brings_a_vm_back_under_the_agent(agent, make_vm, until):
    vm = make_vm(restart="on-failure")
    vm.verb("start")
    pid = vm.read("pid")
    os.kill(int(pid), signal.SIGKILL)
    until(lambda: vm.read("pid") not in ("0", pid) and vm.state == "running", what="it is back")
    assert transitions(agent, vm.name)[-2:] == [("starting", "restart"), ("running", "restart")]
    seen = vm.read("console").count("count 1\n")
    until(lambda: vm.read("console").count("count 1\n") >= max(seen, 2), what="it counts anew")


def test_kill_is_at_once_and_for_good(agent, make_vm):
    vm = make_vm(restart="always")
    vm.verb("start")
    vm.verb("kill")
    assert vm.state == "stopped"
    time.sleep(2.5)  # RestartSec is one second
    assert vm.state == "stopped"
    assert systemctl("is-active", vm.unit, check=False) == "inactive"
    assert transitions(agent, vm.name)[-1] == ("stopped", "user-kill")


def test_kill_goes_past_a_stop_that_waits(agent, make_vm, guests, until):
    vm = make_vm(boot={"kernel": str(guests.halt)}, stop_timeout=60)  # halted: hears nothing
    vm.verb("start")
    stop = subprocess.Popen(["sh", "-c", f"echo stop > {vm.path}/state"])
    until(lambda: vm.state == "stopping", what="the stop is under way")
    began = time.monotonic()
    vm.verb("kill")
    assert time.monotonic() - began < 10
    assert vm.state == "stopped"
    stop.wait(timeout=20)


def test_one_that_dies_while_it_is_stopped_is_stopped(agent, make_vm, guests, until):
    vm = make_vm(boot={"kernel": str(guests.halt)}, stop_timeout=60)
    vm.verb("start")
    vmm = vm.pid
    with subprocess.Popen(["sh", "-c", f"echo stop > {vm.path}/state"], stderr=subprocess.DEVNULL):
        until(lambda: vm.state == "stopping", what="the stop is under way")
        agent.kill()
    assert vm.state == "stopping"
    os.kill(vmm, signal.SIGKILL)
    vm.wait_for_state("stopped")


def test_a_guest_that_does_not_listen_is_stopped_by_force(agent, make_vm, guests):
    vm = make_vm(boot={"kernel": str(guests.halt)}, stop_timeout=1)
    vm.verb("start")
    vm.verb("stop")
    assert vm.state == "stopped"


def test_a_kernel_that_ends_at_once_is_a_start_that_failed(agent, make_vm):
    broken = Path("/run/lab-broken.elf")
    vm = make_vm()
    # The ELF header of the guest, and nothing behind it.
    broken.write_bytes(Path(json.loads(vm.read("boot"))["kernel"]).read_bytes()[:64])
    with refused(errno.EBADMSG):
        vm.write("boot", json.dumps({"kernel": str(broken)}))
    assert str(broken) in vm.read("error")
    assert vm.state == "created"


def test_what_was_booted_is_booted_again_when_the_file_is_gone(agent, make_vm, guests):
    kernel = Path("/run/lab-kernel.elf")
    kernel.write_bytes(guests.guest.read_bytes())
    vm = make_vm(boot={"kernel": str(kernel)})
    vm.verb("start")
    vm.verb("kill")
    kernel.unlink()
    vm.verb("start")
    assert vm.state == "running"
    other = make_vm(boot=None)
    with refused(errno.ENOENT):
        other.write("boot", json.dumps({"kernel": str(kernel)}))
    assert str(kernel) in other.read("error")


def test_a_vm_is_renamed_with_its_unit_while_it_has_no_process(agent, make_vm, vm_name):
    vm = make_vm()
    vm.verb("start")
    new = agent.mount / "vms" / vm_name()
    with refused(errno.EBUSY):
        vm.path.rename(new)
    vm.verb("kill")
    vm.path.rename(new)
    try:
        (new / "state").write_text("start")
        assert systemctl("is-active", f"cocoon-vm-{new.name}") == "active"
        agent.restart()
        assert (new / "state").read_text() == "running\n"
        (new / "state").write_text("kill")
    finally:
        new.rename(vm.path)


def test_machinectl_lists_the_vm(agent, make_vm, until):
    vm = make_vm()
    vm.verb("start")

    def listed() -> list[str]:
        done = subprocess.run(
            ["machinectl", "list", "--no-legend"], capture_output=True, text=True, check=True
        )
        return [line.split()[0] for line in done.stdout.splitlines() if line.strip()]

    until(lambda: vm.name in listed(), what="machinectl lists it")
    vm.verb("kill")
    until(lambda: vm.name not in listed(), what="it is gone from the list")


def test_a_second_agent_says_who_has_the_directory(agent):
    done = subprocess.run(
        [os.environ.get("COCOON_TEST_PYTHON", "/usr/bin/python3"), "-m", "agent.cli.main", "run"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 1
    assert f"process {agent.pid}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_after_a_boot_of_the_host_vms_are_stopped_and_those_with_autostart_start(
    agent, make_vm, until
):
    vm, auto = make_vm(), make_vm(autostart=True)
    for each in (vm, auto):
        each.verb("start")
    agent.stop()
    for each in (vm, auto):
        systemctl("kill", "--signal=KILL", each.unit)
        until(
            lambda unit=each.unit: systemctl("is-active", unit, check=False) == "failed",
            what="the unit is over",
        )
        systemctl("reset-failed", each.unit)
    # A boot empties /run, and the units are gone with it.
    subprocess.run("rm -rf /run/cocoon/*", shell=True, check=True)
    agent.start()
    assert vm.state == "stopped"
    assert transitions(agent, vm.name)[-1] == ("stopped", "host-boot")
    auto.wait_for_state("running")


def test_a_vm_in_error_starts_with_the_host_too(agent, make_vm, until):
    vm = make_vm(autostart=True)
    vm.verb("start")
    os.kill(vm.pid, signal.SIGKILL)
    vm.wait_for_state("error")
    agent.stop()
    systemctl("reset-failed", vm.unit)
    subprocess.run("rm -rf /run/cocoon/*", shell=True, check=True)
    agent.start()
    vm.wait_for_state("running")


def test_a_vm_starts_while_the_mount_is_dead_and_the_agent_comes_back_on_it(agent, make_vm):
    vm = make_vm(restart="on-failure")
    vm.verb("start")
    pid = int(vm.read("pid"))
    # Killed with its restart held back: the mount stays, and nobody answers.
    os.kill(agent.pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while systemctl("show", "-P", "MainPID", vm.unit) in ("0", str(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    agent.kill()
    assert vm.state == "running"
    vm.wait_counting()


def test_sighup_reads_the_settings_again(agent, until):
    systemctl("reload", "cocoon-host")
    until(
        lambda: any("settings read again" in line for line in agent.lines()),
        what="the agent says so",
    )
    assert agent.is_active()


def test_the_status_line_counts_vms(agent, make_vm, until):
    vm = make_vm()
    vm.verb("start")
    until(
        lambda: "1 running" in systemctl("show", "-P", "StatusText", "cocoon-host"),
        what="systemctl status tells",
    )


def test_many_operations_on_one_vm_run_in_their_order(agent, make_vm):
    vm = make_vm()
    script = "; ".join(
        f"echo {verb} > {vm.path}/state" for verb in ["start", "pause", "resume", "stop"] * 2
    )
    subprocess.run(["sh", "-ec", script], check=True, timeout=120)
    assert vm.state == "stopped"
    states = [state for state, _ in transitions(agent, vm.name)][2:]
    assert states == ["starting", "running", "paused", "running", "stopping", "stopped"] * 2


def test_a_write_that_does_not_wait_tells_its_outcome_in_state(agent, make_vm):
    vm = make_vm()
    descriptor = os.open(vm.path / "state", os.O_WRONLY | os.O_NONBLOCK)
    os.write(descriptor, b"start\n")
    os.close(descriptor)
    vm.wait_for_state("running")


@pytest.mark.parametrize("verb", ["pause", "resume", "stop", "restart", "kill"])
def test_a_verb_that_makes_no_sense_in_this_state_changes_nothing(agent, make_vm, verb):
    vm = make_vm()
    with refused(errno.EINVAL):
        vm.verb(verb)
    assert "created" in vm.read("error")
    assert vm.state == "created"


def count_processes(pattern: str) -> int:
    done = subprocess.run(["pgrep", "-fc", pattern], capture_output=True, text=True, check=False)
    return int(done.stdout)


def test_sixteen_vms_at_once_are_neither_lost_nor_doubled_by_a_kill_of_the_agent(
    agent, make_vm, guests, until
):
    vms = [make_vm(boot={"kernel": str(guests.halt)}, memory="32M") for _ in range(16)]
    starts = [
        subprocess.Popen(["sh", "-c", f"echo start > {vm.path}/state"], stderr=subprocess.DEVNULL)
        for vm in vms
    ]
    time.sleep(0.3)  # in the middle of it
    agent.kill()
    for start in starts:
        start.wait(timeout=60)
    for vm in vms:
        until(lambda vm=vm: vm.state != "starting", what="systemd has come to an end with it")
        if vm.state != "running":
            vm.verb("start")
        assert vm.state == "running"
    assert count_processes("firecracker --api-sock") == 16
    pids = {vm.read("pid") for vm in vms}
    assert len(pids) == 16


@pytest.mark.parametrize(
    "command", [("daemon-reload",), ("daemon-reexec",), ("restart", "dbus.service")]
)
def test_the_agent_goes_on_when_systemd_or_the_bus_starts_anew(agent, make_vm, until, command):
    vm = make_vm(restart="on-failure")
    vm.verb("start")
    pid = agent.pid
    systemctl(*command)
    vm.wait_counting()
    vm.verb("pause")
    vm.verb("resume")
    vmm = vm.read("pid")
    os.kill(int(vmm), signal.SIGKILL)
    until(lambda: vm.read("pid") not in ("0", vmm) and vm.state == "running", what="it is back")
    vm.verb("stop")
    assert vm.state == "stopped"
    vm.verb("start")
    assert vm.state == "running"
    assert agent.pid == pid


def test_stats_tell_what_the_vm_uses(make_vm, until):
    vm = make_vm()
    assert vm.read("stats") == ""
    vm.verb("start")
    stats = until(lambda: vm.read("stats"), what="there are figures")
    figures = dict(line.split() for line in stats.splitlines())
    assert set(figures) >= {"cpu_nsec", "memory_bytes", "io_read_bytes", "io_write_bytes", "vcpus"}
    assert figures["vcpus"] == "1"
    assert 0 < int(figures["memory_bytes"]) < 128 << 20
