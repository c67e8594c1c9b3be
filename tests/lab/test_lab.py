"""The lab, seen from the host: it returns what its command returned, and leaves nothing behind."""

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

RUN = str(Path(__file__).with_name("run"))
LABS = Path("/var/tmp")
PATIENCE = 30.0


def lab(*arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([RUN, *arguments], capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload, no-any-return]


def in_lab(script: str) -> str:
    done = lab("--", "sh", "-euc", script)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def until(predicate: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not predicate():
        assert time.monotonic() < deadline, f"not within {PATIENCE} s"
        time.sleep(0.01)


def processes() -> dict[int, str]:
    """The control groups of every process of the host; a lab's carry its name."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            # Whose parent has not asked for its status yet is gone all the same.
            if ") Z " not in (directory / "stat").read_text():
                found[int(directory.name)] = (directory / "cgroup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def is_alive(pid: int) -> bool:
    return pid in processes()


def left_by(*names: str) -> list[str]:
    """What of the labs with these names is still there."""
    left = [f"process {pid}" for pid, text in processes().items() if any(n in text for n in names)]
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    left += [line for line in mounts if any(name in line for name in names)]
    for parent, directories, _ in os.walk("/sys/fs/cgroup"):
        left += [f"{parent}/{each}" for each in directories if each in names]
    left += [str(LABS / name) for name in names if (LABS / name).exists()]
    return left


class Started:
    """A lab whose command waits."""

    def __init__(self) -> None:
        script = 'echo "$COCOON_LAB"; exec sleep infinity'
        self.runner = subprocess.Popen(
            [RUN, "--", "sh", "-c", script],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.runner.stdout is not None
        self.name = self.runner.stdout.readline().strip()
        children = Path(f"/proc/{self.runner.pid}/task/{self.runner.pid}/children")
        self.children = [int(pid) for pid in children.read_text().split()]
        # The keeper leads a session of its own, nsenter does not.
        (self.keeper,) = (pid for pid in self.children if os.getsid(pid) == pid)

    def left(self) -> list[str]:
        left = left_by(self.name)
        return left + ([f"keeper {self.keeper}"] if is_alive(self.keeper) else [])


@pytest.fixture
def started() -> Iterator[Started]:
    lab = Started()
    assert lab.left(), "a lab that runs must be seen"
    yield lab
    lab.runner.kill()
    lab.runner.wait()
    until(lambda: not lab.left())


@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_the_exit_status_of_the_command_is_returned(status: int) -> None:
    assert lab("--", "sh", "-c", f"exit {status}").returncode == status


def test_a_command_ended_by_a_signal_reads_as_in_a_shell() -> None:
    assert lab("--", "sh", "-c", "kill -KILL $$").returncode == 128 + signal.SIGKILL


def test_standard_streams_and_the_working_directory_are_the_callers(tmp_path: Path) -> None:
    done = lab("--", "sh", "-c", "pwd; cat; echo wrong >&2", input="through", cwd=tmp_path)
    assert (done.stdout, done.stderr) == (f"{tmp_path}\nthrough", "wrong\n")


def test_systemd_dbus_and_the_journal_work_inside() -> None:
    in_lab(
        """
        test "$(systemctl is-system-running)" = running
        systemd-run --quiet --wait --unit=hello echo from a unit
        journalctl --sync
        journalctl --unit=hello | grep -q 'from a unit'
        busctl --quiet call org.freedesktop.DBus /org/freedesktop/DBus org.freedesktop.DBus GetId
        systemctl daemon-reexec
        systemctl restart dbus
        systemd-run --quiet --wait true
        """
    )


def test_units_run_as_users_of_systemds_user_database() -> None:
    script = """
        mkdir -p /run/userdb
        echo '{"userName":"cvm-70000","uid":70000,"gid":70000}' >/run/userdb/70000.user
        systemd-run --quiet --pipe --wait -p User=70000 -p SupplementaryGroups=kvm \
            sh -c 'id -u; id -un; test ! -e /dev/kvm || test -w /dev/kvm'
        getent group cocoon >/dev/null
        """
    assert in_lab(script).split() == ["70000", "cvm-70000"]


def test_machined_is_started_when_asked_for() -> None:
    assert "No machines" in in_lab("machinectl list")


def test_what_a_lab_writes_outside_home_directories_stays_in_it() -> None:
    paths = ["/cocoon", "/etc", "/run", "/tmp", "/dev", "/var/lib/cocoon", "/var/log", "/var/tmp"]
    in_lab(f"for path in {' '.join(paths)}; do touch $path/written-in-a-lab; done")
    assert [path for path in paths if Path(path, "written-in-a-lab").exists()] == []
    in_lab(f"for path in {' '.join(paths)}; do test ! -e $path/written-in-a-lab; done")


def test_the_state_directory_can_be_kept(tmp_path: Path) -> None:
    for _ in range(2):
        done = lab("--state", str(tmp_path), "--", "sh", "-c", "echo x >>/var/lib/cocoon/kept")
        assert done.returncode == 0
    assert (tmp_path / "kept").read_text() == "x\nx\n"


def test_the_agent_is_ready_and_has_firecracker_when_the_command_starts() -> None:
    script = "test -d /cocoon/vms; systemctl is-active cocoon-host; firecracker --version"
    done = lab("--agent", "--", "sh", "-ec", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("active\nFirecracker v")


def test_labs_side_by_side_do_not_see_each_other(started: Started) -> None:
    seen = in_lab("echo $COCOON_LAB; systemctl --no-legend list-units '*.scope'; ps -e -o args=")
    assert started.name not in seen
    assert "sleep infinity" not in seen
    assert started.runner.poll() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_runner_ends_the_lab(started: Started, number: signal.Signals) -> None:
    started.runner.send_signal(number)
    assert started.runner.wait(PATIENCE) == 128 + number
    assert started.left() == []


def test_a_signal_to_the_whole_process_group_ends_the_lab(started: Started) -> None:
    os.killpg(started.runner.pid, signal.SIGTERM)
    assert started.runner.wait(PATIENCE) == 128 + signal.SIGTERM
    assert started.left() == []


def test_nothing_is_left_when_nsenter_is_killed(started: Started) -> None:
    (nsenter,) = {*started.children} - {started.keeper}
    os.kill(nsenter, signal.SIGTERM)
    assert started.runner.wait(PATIENCE) == 128 + signal.SIGTERM
    assert started.left() == []


def test_nothing_is_left_when_the_runner_is_killed(started: Started) -> None:
    started.runner.kill()
    until(lambda: not started.left())


def test_nothing_is_left_when_the_keeper_is_killed(started: Started) -> None:
    os.kill(started.keeper, signal.SIGKILL)
    assert started.runner.wait(PATIENCE) == 128 + signal.SIGKILL
    assert started.left() == []


def test_later_runs_remove_what_two_kills_left(started: Started) -> None:
    os.kill(started.runner.pid, signal.SIGSTOP)
    os.kill(started.keeper, signal.SIGKILL)
    started.runner.kill()
    started.runner.wait()
    until(lambda: not any(each.startswith("process ") for each in started.left()))
    until(lambda: [in_lab("true"), started.left()][1] == [])


def test_nothing_is_left_when_the_runner_is_killed_while_the_lab_boots(
    rounds: Callable[[int, int], int],
) -> None:
    for number in range(rounds(4, 40)):
        runner = subprocess.Popen([RUN, "--", "sleep", "infinity"])
        # A point of the boot that differs each time; any is good.
        time.sleep(0.02 * number)
        runner.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, runner.pid, os.WSTOPPED)
        descriptors = Path(f"/proc/{runner.pid}/fd").iterdir()
        held = [Path(os.readlink(descriptor)) for descriptor in descriptors]
        names = [path.name for path in held if path.parent == LABS]
        runner.kill()
        runner.wait()
        until(partial(lambda names: not left_by(*names), names))


def unowned() -> set[str]:
    """Directories of labs that nobody holds the lock of."""
    found = set()
    for directory in LABS.glob("cocoon-lab-*"):
        with contextlib.suppress(OSError):
            lock = os.open(directory, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                found.add(directory.name)
            finally:
                os.close(lock)
    return found


def test_a_lab_that_does_not_boot_says_why_in_one_line_and_is_removed(tmp_path: Path) -> None:
    before = unowned()
    (tmp_path / "file").touch()
    done = lab("--state", str(tmp_path / "file"), "--", "true")
    assert done.returncode == 125
    assert len(done.stderr.splitlines()) == 1
    until(lambda: unowned() <= before)


def test_loop_devices_end_with_the_lab() -> None:
    if not Path("/dev/loop-control").exists():
        pytest.skip("this machine has no loop devices")
    files = [
        f"{place}/{os.urandom(8).hex()}"
        for place in ("/tmp", "/var/tmp", "/var/lib", "/var/lib/cocoon")
    ]
    in_lab(
        f"""
        truncate -s 64M {" ".join(files)}
        mkfs.ext4 -q {files[0]}
        mkdir /tmp/mounted
        mount -o loop {files[0]} /tmp/mounted
        for file in {" ".join(files)}; do losetup --find $file; done
        """
    )
    backing = [each.read_text() for each in Path("/sys/block").glob("loop*/loop/backing_file")]
    assert [name for name in files if any(Path(name).name in each for each in backing)] == []


def groups_in_the_roots() -> set[Path]:
    roots = [Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()]
    groups = [group for root in roots if root.is_dir() for group in root.iterdir()]
    return {group for group in groups if group.is_dir() and "cocoon-lab" not in group.name}


def test_many_rounds_leave_nothing_behind(rounds: Callable[[int, int], int]) -> None:
    mounts, groups = Path("/proc/self/mountinfo").read_text(), groups_in_the_roots()
    for _ in range(rounds(2, 20)):
        name = in_lab("echo $COCOON_LAB; systemd-run --quiet sleep infinity; sleep infinity &")
        assert left_by(name.strip()) == []
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert groups_in_the_roots() == groups
