"""The VM's unit with a real Firecracker: start, stop, restart, limits, all without the agent."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.model.vm import UNIT_PREFIX
from agent.systemd.unit import running_properties
from tests.integration.vm_units import (
    MIB,
    Console,
    VmUnit,
    VmUnits,
    replace_plan,
    systemctl,
    with_manager,
)

FUSE_SUPER = "rootmode=40000,user_id=0,group_id=0"

AGAIN = rb"count 1\r?\n"
"""A guest that begins anew; one that was killed may have left half a line before it."""


@pytest.fixture
def units() -> Iterator[VmUnits]:
    firecracker = shutil.which("firecracker")
    assert firecracker is not None
    made = VmUnits(sys.executable, firecracker, Path(os.environ["COCOON_TEST_GUESTS"]))
    yield made
    made.remove()


def counting(console: Console, beyond: int = 0) -> int:
    """Wait for a whole counter line that is higher, and return its number."""
    number = 0
    while number <= beyond:
        line = console.read_until(rb"^count (\d+)\r?\n")
        number = int(line.split()[-1])
    return number


def is_gone(unit: VmUnit) -> bool:
    return unit.show("LoadState") == "not-found"


def test_a_guest_runs_and_answers_on_its_console(units):
    unit = units.firecracker_vm()
    assert unit.start() == "done"
    counting(unit.console, beyond=2)
    unit.console.write("hello\n")
    unit.console.read_until(rb"echo hello")


def test_a_stop_powers_the_guest_off_and_is_recorded(units):
    unit = units.firecracker_vm()
    unit.start()
    counting(unit.console)
    invocation = unit.show("InvocationID")
    assert os.listdir(unit.paths.sockets) == ["api"]
    unit.stop()
    record = unit.exit_record
    assert record is not None
    assert (record.result, record.code, record.status) == ("success", "exited", "0")
    assert record.invocation == invocation
    assert os.listdir(unit.paths.sockets) == []
    assert is_gone(unit)


def test_a_paused_guest_is_resumed_so_that_it_can_power_off(units):
    unit = units.firecracker_vm(stop_timeout=60)
    unit.start()
    counting(unit.console)
    unit.request("PATCH", "/vm", {"state": "Paused"})
    unit.stop()
    record = unit.exit_record
    assert record is not None
    assert (record.code, record.status) == ("exited", "0")


def test_a_guest_that_does_not_listen_is_terminated_when_its_time_is_up(units):
    unit = units.firecracker_vm("halt.elf", stop_timeout=1)
    unit.start()
    unit.console.read_until(rb"idle")
    unit.stop()
    record = unit.exit_record
    assert record is not None
    assert (record.result, record.code, record.status) == ("success", "killed", "TERM")


def test_a_guest_that_ends_by_itself_is_recorded_and_stays_down(units, until):
    unit = units.firecracker_vm(restart="on-failure")
    unit.start()
    counting(unit.console)
    unit.console.write("q\n")
    until(lambda: is_gone(unit), what="the unit is gone")
    record = unit.exit_record
    assert record is not None
    assert (record.result, record.code, record.status) == ("success", "exited", "0")


@pytest.mark.parametrize("disturbance", [None, "daemon-reload", "daemon-reexec"])
def test_systemd_alone_brings_a_vmm_back_that_died(units, until, disturbance):
    unit = units.firecracker_vm(restart="on-failure")
    unit.start()
    assert counting(unit.console, beyond=5) > 5
    first = unit.show("InvocationID")
    if disturbance:
        systemctl(disturbance)
    unit.kill()
    unit.console.read_until(AGAIN)
    counting(unit.console, beyond=2)
    record = unit.exit_record
    assert record is not None
    assert (record.result, record.code, record.status) == ("signal", "killed", "KILL")
    assert record.invocation == first
    assert unit.show("NRestarts") == "1"
    unit.stop()
    record = unit.exit_record
    assert record is not None
    assert (record.code, record.status) == ("exited", "0")


def test_a_vm_with_restart_always_comes_back_when_its_guest_reboots(units):
    unit = units.firecracker_vm(restart="always")
    unit.start()
    counting(unit.console, beyond=5)
    unit.console.write("q\n")
    unit.console.read_until(AGAIN)


def test_a_stop_and_then_a_kill_ends_a_vm_for_good(units, until):
    unit = units.firecracker_vm("halt.elf", restart="always", stop_timeout=600)
    unit.start()
    unit.console.read_until(rb"idle")
    systemctl("stop", "--no-block", unit.name)
    until(lambda: unit.show("SubState") == "stop", what="the unit stops")
    unit.kill()
    until(lambda: unit.show("ActiveState") in ("inactive", "failed"), what="the unit is down")
    assert unit.show("NRestarts") in ("0", "")
    systemctl("reset-failed", unit.name, check=False)
    until(lambda: is_gone(unit), what="the unit is gone")


def test_a_vmm_that_dies_at_each_start_is_given_up_visibly(units, until):
    unit = units.firecracker_vm(restart="on-failure")
    replace_plan(unit, boot_arguments=("--no-such-option",))
    unit.write_environment()
    # It was executed, and has ended: systemd tells of whichever it sees first.
    assert unit.start() in ("done", "failed")
    until(lambda: unit.show("ActiveState") == "failed", what="systemd gives up")
    assert unit.name in systemctl("list-units", "--failed", "--plain", "--no-legend")
    record = unit.exit_record
    assert record is not None
    assert (record.result, record.code) == ("exit-code", "exited")


def test_a_missing_program_fails_the_start(units):
    unit = units.program("/bin/true")
    replace_plan(unit, binary="/no/such/program")
    assert unit.start() == "failed"


def test_a_crash_while_nobody_holds_the_console_waits_for_who_does(units, until):
    """An agent that went away before the unit kept the console finds all as it was."""
    unit = units.firecracker_vm(restart="on-failure")
    unit.start()
    counting(unit.console)
    unit.console.close()
    unit.kill()
    until(lambda: unit.show("SubState") == "stop-post", what="the VMM is dead")
    assert unit.exit_record is None
    unit.console = Console(unit.paths)
    unit.console.read_until(AGAIN)
    record = unit.exit_record
    assert record is not None
    assert (record.result, record.status) == ("signal", "KILL")


ODD = ["a b", 'say "x"', "back\\slash", "$HOME ${HOME} $$", "`id`", "100%n", "", "'", "ü", "a=b#c;"]


@pytest.mark.parametrize("boot", [False, True])
@pytest.mark.parametrize("reload", [False, True])
def test_arguments_reach_the_vmm_as_they_are(units, until, boot, reload):
    words = [word for pair in zip(["-s"] * len(ODD), ODD, strict=True) for word in pair]
    inside = Path(os.environ["COCOON_TEST_GUESTS"], "inside")
    unit = units.program(str(inside), *([] if boot else words), restart="always")
    if boot:
        replace_plan(unit, boot_arguments=tuple(words))
        unit.write_environment()
    unit.start()
    unit.console.read_until(rb"^end\n")
    if reload:
        systemctl("daemon-reload")
        unit.console.write("exit 0\n")
        unit.console.read_until(rb"^end\n")
    line = Path(f"/proc/{unit.pid}/cmdline").read_bytes().decode()
    assert line.split("\0")[1:-1] == words


def test_a_start_without_boot_arguments_leaves_an_empty_vmm(units):
    unit = units.firecracker_vm()
    unit.write_environment(boot=False)
    unit.start()
    line = Path(f"/proc/{unit.pid}/cmdline").read_bytes().decode().split("\0")
    assert "--config-file" not in line
    unit.stop()
    record = unit.exit_record
    assert record is not None
    assert record.status == "TERM"


def test_a_vmm_that_takes_more_memory_than_its_limit_dies(units, until):
    unit = units.firecracker_vm(memory=8 * MIB)
    unit.start()
    counting(unit.console)
    unit.console.write("m\n")
    until(lambda: unit.show("ActiveState") == "failed", what="the VMM is killed")
    record = unit.exit_record
    assert record is not None
    # Control groups of version 1 do not tell systemd why.
    assert (record.result, record.status) in [("oom-kill", "KILL"), ("signal", "KILL")]


def test_the_limits_are_those_of_the_vm(units):
    unit = units.firecracker_vm(cpu=2, stop_timeout=7)
    unit.start()
    expected = {
        "MemoryMax": str(128 * MIB),
        "CPUWeight": "200",
        "CPUQuotaPerSecUSec": "infinity",
        "TimeoutStopUSec": "12s",
        "Slice": "cocoon-vms.slice",
        "User": str(unit.vm.uid),
    }
    assert {name: unit.show(name) for name in expected} == expected
    properties = running_properties(unit.vm)
    with_manager(lambda manager: manager.set_properties(unit.name, properties))
    assert float(unit.show("CPUQuotaPerSecUSec").removesuffix("s")) == 2.5


def test_the_exposure_that_systemd_computes_is_at_most_one_and_a_half(units):
    unit = units.firecracker_vm()
    unit.start()
    lines = subprocess.run(
        ["systemd-analyze", "--no-pager", "security", unit.name],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    # A face follows the figure, in letters or as an emoji, as the locale has it.
    score = re.search(rf"exposure level for {re.escape(unit.name)}: ([0-9.]+)", lines[-1])
    assert score is not None
    assert float(score[1]) <= 1.5


def test_what_the_vmm_says_on_standard_error_is_in_the_journal(units, journal):
    unit = units.firecracker_vm()
    replace_plan(unit, boot_arguments=("--no-such-option",))
    unit.write_environment()
    unit.start()
    entries = [
        entry
        for entry in journal.entries(unit.name)
        if "no-such-option" in str(entry.get("MESSAGE", ""))
    ]
    assert entries
    assert entries[0]["VM_NAME"] == unit.vm.name
    assert entries[0]["VM_ID"] == unit.vm.id
    assert entries[0]["SYSLOG_IDENTIFIER"] == "firecracker"


def test_a_vm_starts_while_a_fuse_mount_is_dead(units):
    mount = Path("/cocoon-dead")
    mount.mkdir()
    fuse = os.open("/dev/fuse", os.O_RDWR)
    try:
        options = f"fd={fuse},{FUSE_SUPER}"
        command = ["mount", "-i", "-t", "fuse", "-o", options, "dead", mount]
        subprocess.run(command, check=True, pass_fds=[fuse])
        os.close(fuse)
        fuse = -1
        with pytest.raises(OSError, match="not connected"):
            os.listdir(mount)
        unit = units.firecracker_vm()
        assert unit.start() == "done"
        counting(unit.console)
        unit.stop()
    finally:
        if fuse >= 0:
            os.close(fuse)
        subprocess.run(["umount", "--lazy", mount], check=False)
        mount.rmdir()


def test_an_administrator_can_add_to_all_vm_units(units):
    directory = Path(f"/etc/systemd/system/{UNIT_PREFIX}.service.d")
    directory.mkdir(parents=True, exist_ok=True)
    own = directory / "50-local.conf"
    try:
        own.write_text("[Service]\nTasksMax=50\n")
        systemctl("daemon-reload")
        unit = units.firecracker_vm()
        unit.start()
        assert unit.show("TasksMax") == "50"
    finally:
        own.unlink()
        systemctl("daemon-reload")


def test_a_socket_that_was_swapped_for_a_link_reaches_nobody(units, tmp_path):
    unit = units.firecracker_vm()
    unit.start()
    counting(unit.console)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other"))
        other.listen()
        other.setblocking(False)
        api = Path(unit.paths.sockets, "api")
        api.unlink()
        api.symlink_to(tmp_path / "other")
        unit.stop()
        with pytest.raises(BlockingIOError):
            other.accept()
    assert not api.is_symlink()
    assert (tmp_path / "other").exists()
    record = unit.exit_record
    assert record is not None
    assert record.status == "TERM"


def test_the_units_of_the_package_are_sound(tmp_path):
    tree = Path(__file__).parents[2]
    (tmp_path / "cocoon-host.service").write_text(
        (tree / "units/cocoon-host.service")
        .read_text()
        .replace("/usr/bin/cocoon-host", sys.executable)
    )
    shutil.copy(tree / "units/cocoon-vms.slice", tmp_path)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, tmp_path.iterdir())],
        check=False,
        capture_output=True,
        text=True,
    )
    assert [line for line in done.stderr.splitlines() if "cocoon" in line] == []


def test_the_tests_see_a_guest_that_stands_still(units):
    """Else a console that repeats old lines would look like a guest that runs."""
    unit = units.firecracker_vm()
    unit.start()
    counting(unit.console, beyond=2)
    unit.request("PATCH", "/vm", {"state": "Paused"})
    unit.console.forget()
    unit.request("PATCH", "/vm", {"state": "Resumed"})
    assert counting(unit.console) > 2
