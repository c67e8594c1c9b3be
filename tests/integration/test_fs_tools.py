"""Ordinary tools on the tree of a host whose VMs run."""

import errno
import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest


def shell(command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)


@pytest.fixture
def vm(make_vm):
    """A VM that runs and counts."""
    vm = make_vm()
    vm.verb("start")
    vm.wait_counting()
    return vm


def test_what_walks_the_tree_finds_everything_and_disturbs_nothing(agent, vm, make_vm, tmp_path):
    make_vm()
    before = vm.pid, (agent.mount / "events").read_text()
    for command in (
        "ls -lR .",
        "find . -ls",
        "find . -type f -exec stat {} +",
        f"grep -r '^count 1$' . | grep -q ^./vms/{vm.name}/console:",
        f"cp -r . {tmp_path}/copy",
        f"rsync -a . {tmp_path}/synced",
        "du -s .",
        "wc -c README vms/*/config index.json",
    ):
        done = shell(f"cd {agent.mount} && {command}")
        assert (done.returncode, done.stderr) == (0, ""), command
    # What grows while it is read, as a console does, tar reports with 1.
    done = shell(f"tar -C {agent.mount} -cf {tmp_path}/x.tar .")
    assert done.returncode in (0, 1), done.stderr
    assert "console" in done.stderr or not done.stderr
    assert (vm.state, vm.pid, (agent.mount / "events").read_text()) == ("running", *before)
    for copy in ("copy", "synced"):
        config = tmp_path / copy / "vms" / vm.name / "config"
        assert json.loads(config.read_text()) == json.loads(vm.read("config"))


def test_sizes_are_those_of_what_is_read(agent, vm):
    for folder, _, names in os.walk(agent.mount):
        for name in names:
            path = Path(folder, name)
            if path.is_symlink():
                continue
            size, content = path.stat().st_size, path.read_bytes()
            if name in ("console", "events", "errors"):
                assert len(content) >= size, path
            else:
                assert len(content) == size, path


def test_rm_and_mv_leave_the_vm_whole(agent, vm, tmp_path):
    pid = vm.pid
    for command in (
        f"rm -rf {vm.path}",
        f"mv {vm.path} {tmp_path}/backup",
        f"find {vm.path} -delete",
    ):
        assert shell(command).returncode != 0
    vm.verb("stop")
    for command in (f"rm -rf {vm.path}", f"mv {vm.path} {tmp_path}/backup2"):
        assert shell(command).returncode != 0
    shell(f"python3 -c 'import shutil; shutil.rmtree(\"{vm.path}\", ignore_errors=True)'")
    shell(f"find {vm.path} -delete")
    vm.verb("start")
    assert vm.state == "running"
    assert vm.pid != pid
    vm.wait_counting()


@pytest.mark.parametrize(
    "writer",
    [
        "echo 96M > {f}",
        "echo 96M >> {f}",
        "echo 96M | tee {f}",
        "cp {s} {f}",
        "dd if={s} of={f} bs=512",
        "dash -c 'echo 96M > {f}'",
        "vim -es -u NONE -c 'set nobackup nowritebackup noswapfile' -c '%s/.*/96M/' -c wq {f}",
        "rsync --inplace {s} {f}",
    ],
)
def test_a_value_can_be_set_with(agent, make_vm, tmp_path, writer):
    vm = make_vm()
    (tmp_path / "value").write_text("96M\n")
    done = shell(writer.format(f=vm.path / "memory", s=tmp_path / "value"))
    assert done.returncode == 0, done.stderr
    assert vm.read("memory") == str(96 << 20)


@pytest.mark.parametrize(
    "writer",
    ["sed -i s/64/96/ {f}", "mv {s} {f}", "cp --remove-destination {s} {f}", "rsync {s} {f}"],
)
def test_what_replaces_a_file_is_refused_and_harms_nothing(agent, make_vm, tmp_path, writer):
    vm = make_vm()
    (tmp_path / "value").write_text("96M\n")
    assert shell(writer.format(f=vm.path / "memory", s=tmp_path / "value")).returncode != 0
    assert vm.read("memory") == str(64 << 20)


def test_a_configuration_can_be_copied_from_vm_to_vm(agent, make_vm):
    vm, other = make_vm(restart="on-failure", stop_timeout=7), make_vm()
    assert shell(f"cp {vm.path}/config {other.path}/config").returncode == 0
    assert other.read("config") == vm.read("config")


def test_everything_may_be_written_back_while_the_vm_runs(agent, vm):
    for path in vm.path.iterdir():
        special = ("state", "console", "console.live", "console.sock")
        if path.name not in special and path.stat().st_mode & 0o200:
            path.write_bytes(path.read_bytes())
    assert vm.state == "running"


@pytest.mark.parametrize("size", [1, 7, 4095, 65537])
def test_dd_copies_a_growing_console_with_any_block_size(agent, vm, tmp_path, size):
    vm.verb("pause")
    copy = tmp_path / "console"
    done = shell(f"dd if={vm.path}/console of={copy} bs={size}")
    assert done.returncode == 0, done.stderr
    assert copy.read_bytes() == (vm.path / "console").read_bytes()


def test_500_blocked_readers_delay_neither_stat_nor_kill(agent, vm, until):
    readers = [
        subprocess.Popen(["cat", path], stdout=subprocess.DEVNULL)
        for path in [agent.mount / "events.live", vm.path / "console.live"] * 250
    ]
    try:
        # Each is in a read of the tree when it waits for FUSE to answer.
        until(
            lambda: all(
                Path(f"/proc/{reader.pid}/wchan").read_text().startswith(("request_wait", "fuse"))
                for reader in readers
            )
        )
        begun = time.monotonic()
        assert (vm.path / "state").stat().st_size == len("running\n")
        vm.verb("kill")
        assert vm.state == "stopped"
        assert time.monotonic() - begun < 5
        assert all(reader.poll() is None for reader in readers)
    finally:
        for reader in readers:
            reader.terminate()
        ended = [reader.wait(20) for reader in readers]
    assert ended == [-signal.SIGTERM] * 500


def test_64_processes_at_once(agent):
    script = """
for round in 1 2; do
    vm=vms/crowd$1-$round
    mkdir $vm && echo 64M > $vm/memory && echo '{"restart": "always"}' > $vm/config &&
    grep -q always $vm/restart && cat $vm/* > /dev/null 2>&1 < /dev/null; ls vms > /dev/null &&
    mv $vm $vm-moved && stat $vm-moved/state > /dev/null && rmdir $vm-moved || exit 1
done
"""
    # cat $vm/* would follow the stream for ever.
    script = script.replace("cat $vm/*", "cat $vm/config $vm/info.json $vm/stats")
    running = [
        subprocess.Popen(["bash", "-c", script, "bash", str(number)], cwd=agent.mount)
        for number in range(64)
    ]
    assert [process.wait(60) for process in running] == [0] * 64
    assert not [name for name in os.listdir(agent.mount / "vms") if name.startswith("crowd")]


def test_many_readers_and_writers_of_one_vm_see_whole_values(agent, make_vm):
    vm = make_vm()
    sizes = [f"{size}M" for size in range(64, 96)]

    def write(size: str) -> None:
        vm.write("memory", size)

    def read(_: int) -> int:
        return int(vm.read("memory"))

    with ThreadPoolExecutor(32) as pool:
        written = [pool.submit(write, size) for size in sizes]
        seen = set(pool.map(read, range(200)))
        for done in written:
            done.result()
    assert seen <= {size << 20 for size in range(64, 96)}


def test_a_fault_is_seen_in_the_journal_and_ends_neither_mount_nor_agent(agent, make_vm):
    agent.expects_tracebacks = True
    vm, other = make_vm(), make_vm()
    pid = agent.pid
    log = agent.root_dir / "log" / f"{vm.read('id')}.console"
    log.mkdir()  # a log that cannot be read, as no handler foresees
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            (vm.path / "console").read_bytes()
    finally:
        log.rmdir()
    lines = agent.lines()
    assert any("read has a fault" in line for line in lines)
    assert any("Traceback" in line for line in lines)
    assert "the agent has a fault" in (agent.mount / "errors").read_text()
    assert agent.pid == pid
    other.verb("start")
    assert (vm.path / "console").read_bytes() == b""
    assert other.state == "running"


def test_a_mount_that_is_taken_away_comes_back(agent, make_vm, until):
    vm = make_vm()
    vm.verb("start")
    pid = agent.pid
    subprocess.run(["umount", "--lazy", agent.mount], check=True)
    agent.wait_ready(other_than=pid)
    until(vm.path.exists)
    assert vm.state == "running"
    vm.wait_counting()
