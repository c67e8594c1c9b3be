"""Taking, exporting, importing, renaming and removing snapshots, with real VMMs."""

import errno
import json
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from snapshot_tools import (
    archive,
    described,
    directories,
    extract,
    goes_on_from,
    last_count,
    names,
    refused,
    settled,
    write_once,
)

from agent.model.snapshot import STATE_FILES

pytestmark = [pytest.mark.thorough(group="snapshots"), pytest.mark.backends]


@pytest.fixture
def name(vm_name: Callable[[], str], agent: Any) -> Any:
    """The name of a snapshot, removed afterwards."""
    name = f"snap-{vm_name()}"
    yield name
    for found in names(agent):
        if found.startswith(name):
            archive(agent, found).unlink()


def events(agent: Any, name: str) -> list[dict[str, Any]]:
    lines = (agent.mount / "events").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["name"] == name]


def counting(make_vm: Callable[..., Any], **config: Any) -> Any:
    vm = make_vm(storage="8M", **config)
    vm.verb("start")
    vm.wait_counting()
    return vm


@pytest.mark.backends(core=True)
def test_a_snapshot_is_taken_and_the_vm_goes_on(agent, make_vm, name):
    vm = counting(make_vm)
    vm.write("snapshot", name)
    assert vm.state == "running"
    vm.wait_counting()
    counts = vm.counts
    assert counts == list(range(1, len(counts) + 1))
    assert os.readlink(vm.path / "snapshots" / name) == f"../../../snapshots/{name}.tar"
    assert (vm.path / "snapshots" / name).stat().st_size == described(agent, name)["archive_size"]
    shown = described(agent, name)
    assert shown["source_vm_id"] == vm.read("id")
    assert shown["pause_ms"] > 0
    (event,) = [event for event in events(agent, name) if event["type"] == "ADDED"]
    assert (event["kind"], event["state"]) == ("snapshot", "ready")
    assert event["pause_ms"] == shown["pause_ms"]
    settled(agent)


def test_what_vms_share_is_roots_and_read_only(agent, make_vm, name, backend):
    vm = counting(make_vm)
    vm.write("snapshot", name)
    directory = agent.root_dir / "snapshots" / described(agent, name)["id"]
    assert {path.name for path in directory.iterdir()} == {
        "cocoon.json",
        "cow.raw",
        "kernel",
        STATE_FILES[backend].memory,
        *STATE_FILES[backend].small,
    }
    for path in directory.iterdir():
        facts = path.stat()
        assert (facts.st_uid, facts.st_mode & 0o777) == (0, 0o444), path.name


def test_a_snapshot_names_no_path_that_cocoon_would_look_for(agent, make_vm, name):
    vm = counting(make_vm)
    vm.write("snapshot", name)
    directory = agent.root_dir / "snapshots" / described(agent, name)["id"]
    told = json.loads((directory / "cocoon.json").read_text())
    # Cocoon 0.3.6 opens the kernel when it clones, and takes a disk below its run directory.
    assert told["boot_config"]["kernel_path"] == told["boot_config"]["initrd_path"] == ""
    assert [disk["path"] for disk in told["storage_configs"]] == ["/var/lib/cocoon/run/vm/cow.raw"]


def test_zeros_in_memory_are_holes_in_a_snapshot(agent, make_vm, name, backend):
    vm = counting(make_vm)
    vm.write("snapshot", name)
    directory = agent.root_dir / "snapshots" / described(agent, name)["id"]
    memory = directory / STATE_FILES[backend].memory
    assert memory.stat().st_size == 64 << 20
    assert memory.stat().st_blocks * 512 < 4 << 20


def test_a_name_taken_is_eexist_and_a_bad_one_einval(agent, make_vm, name):
    vm = counting(make_vm)
    vm.write("snapshot", name)
    with pytest.raises(FileExistsError):
        vm.write("snapshot", name)
    with refused(errno.EINVAL):
        vm.write("snapshot", "../../etc")
    assert vm.state == "running"
    settled(agent)


def test_a_vm_that_does_not_run_cannot_be_snapshotted(agent, make_vm, name):
    vm = make_vm()
    with refused(errno.EINVAL):
        vm.write("snapshot", name)
    assert name not in names(agent)


@pytest.mark.backends(core=True)
def test_a_vm_that_its_user_paused_stays_paused(agent, make_vm, name):
    vm = counting(make_vm)
    vm.verb("pause")
    vm.write("snapshot", name)
    assert vm.state == "paused"
    assert described(agent, name)["pause_ms"] == 0
    seen = len(vm.counts)
    vm.verb("resume")
    vm.wait_counting()
    assert vm.counts[:seen] == list(range(1, seen + 1))


def test_a_vm_with_a_writable_disk_of_the_host_cannot_be_snapshotted(agent, make_vm, name):
    disk = Path("/var/lib/host-disk.raw")
    disk.write_bytes(bytes(1 << 20))
    vm = make_vm(disks=[{"path": str(disk)}])
    vm.verb("start")
    with refused(errno.EOPNOTSUPP):
        vm.write("snapshot", name)
    assert str(disk) in vm.read("error")
    assert vm.state == "running"


@pytest.mark.backends(core=True)
def test_a_failing_vmm_leaves_a_running_vm_and_no_trace(agent, make_vm, name):
    vm = counting(make_vm)
    full = agent.root_dir / "vms" / vm.read("id")
    # What the VMM writes is larger than what its directory may hold.
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1M,mode=0777", "tmpfs", str(full)], check=True
    )
    try:
        with refused(errno.EIO, errno.ENOSPC, errno.ENOEXEC, errno.EBADMSG, errno.ESPIPE):
            vm.write("snapshot", name)
    finally:
        subprocess.run(["umount", "--lazy", str(full)], check=True)
    assert vm.state == "running"
    vm.wait_counting()
    assert name not in names(agent)
    settled(agent)


@pytest.mark.backends("firecracker")
def test_later_snapshots_with_track_dirty_pause_for_the_changes_only(agent, make_vm, name):
    vm = counting(make_vm, memory="256M", track_dirty=True)
    for number in range(3):
        vm.write("snapshot", f"{name}-{number}")
    pauses = [described(agent, f"{name}-{number}")["pause_ms"] for number in range(3)]
    assert max(pauses[1:]) < pauses[0]
    # All are whole: memory that did not change since the first is in the last too.
    files = [
        agent.root_dir / "snapshots" / described(agent, f"{name}-{number}")["id"] / "mem"
        for number in range(3)
    ]
    assert {file.stat().st_size for file in files} == {256 << 20}
    clone = make_vm(f"{vm.name}-clone", hypervisor=None, memory=None, boot=None)
    count = len(vm.counts)
    clone.write("from", f"{name}-2")
    clone.verb("start")
    clone.wait_counting()
    assert clone.counts[0] <= count + 2


@pytest.mark.backends("firecracker")
def test_a_snapshot_whose_base_is_gone_is_full(agent, make_vm, name):
    vm = counting(make_vm, memory="256M", track_dirty=True)
    for number in range(3):
        vm.write("snapshot", f"{name}-{number}")
        if number:
            archive(agent, f"{name}-{number}").unlink()
    vm.write("snapshot", f"{name}-4")
    memory = agent.root_dir / "snapshots" / described(agent, f"{name}-4")["id"] / "mem"
    first = agent.root_dir / "snapshots" / described(agent, f"{name}-0")["id"] / "mem"
    assert memory.stat().st_size == first.stat().st_size
    assert memory.stat().st_blocks >= first.stat().st_blocks - 8


def test_an_archive_has_its_exact_size_and_the_same_bytes_each_time(agent, make_vm, name, rng):
    vm = counting(make_vm)
    vm.write("snapshot", name)
    path = archive(agent, name)
    whole = path.read_bytes()
    assert len(whole) == path.stat().st_size == described(agent, name)["archive_size"]
    with path.open("rb", buffering=0) as file:
        for _ in range(50):
            offset = rng.randrange(len(whole))
            size = rng.randrange(1, 70000)
            assert os.pread(file.fileno(), size, offset) == whole[offset : offset + size]
    assert path.read_bytes() == whole


def test_two_reads_of_a_large_archive_are_equal_and_dd_finds_its_place(
    agent, make_vm, name, rng, rounds, tmp_path
):
    size = rounds(16, 2048)
    vm = make_vm(storage=f"{size}M")
    vm.verb("start")
    with (agent.root_dir / "vms" / vm.read("id") / "cow.raw").open("r+b") as disk:
        for _ in range(size):
            disk.write(rng.randbytes(1 << 20))
    vm.write("snapshot", name)
    path, copy = archive(agent, name), tmp_path / "copy"
    subprocess.run(["cp", path, copy], check=True, timeout=600)
    subprocess.run(["cmp", path, copy], check=True, timeout=600)
    assert copy.stat().st_size > size << 20
    for _ in range(10):
        block = rng.randrange(1, 200_000)
        skip = rng.randrange((size << 20) // block)
        words = ["dd", f"bs={block}", f"skip={skip}", "count=3", "status=none"]
        ours, theirs = (
            subprocess.run([*words, f"if={file}"], check=True, capture_output=True).stdout
            for file in (path, copy)
        )
        assert ours == theirs, words


@pytest.mark.parametrize("tool", ["tar", "bsdtar", "python"])
def test_tools_extract_the_files_bit_for_bit(agent, make_vm, name, tool, tmp_path, backend):
    vm = counting(make_vm)
    vm.write("snapshot", name)
    commands = {
        "tar": ["tar", "-x", "-S", "-f", str(archive(agent, name)), "-C", str(tmp_path)],
        "bsdtar": ["bsdtar", "-x", "-S", "-f", str(archive(agent, name)), "-C", str(tmp_path)],
        "python": ["python3", "-m", "tarfile", "-e", str(archive(agent, name)), str(tmp_path)],
    }
    if shutil.which(commands[tool][0]) is None:
        pytest.skip(f"{tool} is not installed")
    subprocess.run(commands[tool], check=True, timeout=60)
    directory = agent.root_dir / "snapshots" / described(agent, name)["id"]
    for path in directory.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    assert (tmp_path / STATE_FILES[backend].memory).stat().st_blocks * 512 < 8 << 20


def test_a_reader_of_a_removed_snapshot_reads_to_the_end(agent, make_vm, name):
    vm = counting(make_vm)
    vm.write("snapshot", name)
    path = archive(agent, name)
    whole = path.read_bytes()
    with path.open("rb", buffering=0) as file:
        assert file.read(1000) == whole[:1000]
        path.unlink()
        assert name not in names(agent)
        assert not directories(agent) or name not in directories(agent)
        rest = b""
        while piece := file.read(1 << 20):
            rest += piece
    assert rest == whole[1000:]


def test_renaming_and_describing_move_the_mtime_and_nothing_else(agent, make_vm, name):
    vm = counting(make_vm)
    vm.write("snapshot", name)
    path = archive(agent, name)
    before = path.stat()
    whole = path.read_bytes()
    with path.open("rb") as held:
        held.read(1)
        renamed = path.rename(path.with_name(f"{name}-new.tar"))
        write_once(renamed.with_suffix(".json"), json.dumps({"description": "of a tuesday"}))
        held.seek(0)
        assert held.read() == whole
    assert renamed.stat().st_size == before.st_size
    assert renamed.stat().st_mtime > before.st_mtime
    after = renamed.read_bytes()
    assert after[512 + 4096 :] == whole[512 + 4096 :]
    assert b"of a tuesday" in after[: 512 + 4096]
    assert described(agent, f"{name}-new")["description"] == "of a tuesday"
    assert [path.name for path in (vm.path / "snapshots").iterdir()] == [f"{name}-new"]


def test_only_the_description_is_written(agent, make_vm, name):
    vm = counting(make_vm)
    vm.write("snapshot", name)
    path = agent.mount / "snapshots" / f"{name}.json"
    write_once(path, path.read_text())
    for change in ({"cpu": 7}, {"no": 1}, {"description": "x" * 2000}):
        with refused(errno.EINVAL):
            write_once(path, json.dumps(change))


def imported(agent: Any, make_vm: Callable[..., Any], vm: Any, name: str) -> None:
    """Clone an imported snapshot of `vm` and see that it goes on."""
    clone = make_vm(f"{name}-vm", hypervisor=None, memory=None, boot=None)
    clone.write("from", name)
    clone.verb("start")
    clone.wait_counting()
    counts = clone.counts
    assert counts[0] > 1
    assert counts == list(range(counts[0], counts[0] + len(counts)))


FAR_END = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
shift 2
[ "$*" = sftp ] && exec /usr/lib/openssh/sftp-server
exec sh -c "$*"
"""
"""What scp takes for ssh: it runs the other host's program here."""


@pytest.mark.parametrize(
    "command",
    [
        "cp {source} {directory}/{name}.tar",
        "cp -p {source} {directory}/{name}.tar",
        "cat {source} > {directory}/{name}.tar",
        "cat {source} | cat > {directory}/{name}.tar",
        "dd if={source} of={directory}/{name}.tar bs=1000 status=none",
        "gzip < {source} > {directory}/{name}.tar",
        "zstd -q < {source} > {directory}/{name}.tar",
        "cp {source} /var/tmp/{name}.tar; rsync -a /var/tmp/{name}.tar {directory}/",
        "cp {source} /var/tmp/{name}.tar; rsync --inplace /var/tmp/{name}.tar {directory}/",
        "cp {source} /var/tmp/{name}.tar; mv /var/tmp/{name}.tar {directory}/",
        "cp --sparse=always {source} /var/tmp/{name}.tar; cp /var/tmp/{name}.tar {directory}/",
        "scp -qS {far_end} {source} host:{directory}/{name}.tar",
        "scp -OpqS {far_end} {source} host:{directory}/{name}.tar",
    ],
)
def test_an_archive_comes_back_however_it_is_copied(agent, make_vm, name, command, tmp_path):
    tool = command.split()[0]
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    vm = counting(make_vm)
    vm.write("snapshot", name)
    copy = tmp_path / "copy.tar"
    shutil.copy(archive(agent, name), copy)
    original = extract(copy, tmp_path / "original")
    far_end = tmp_path / "far-end"
    far_end.write_text(FAR_END)
    far_end.chmod(0o755)
    directory = agent.mount / "snapshots"
    text = command.format(source=copy, directory=directory, name=f"{name}-2", far_end=far_end)
    subprocess.run(["bash", "-ec", f"set -o pipefail; {text}"], check=True, timeout=60)
    again = extract(archive(agent, f"{name}-2"), tmp_path / "again")
    assert set(again) == set(original)
    for file in set(original) - {"snapshot.json"}:
        assert again[file].read_bytes() == original[file].read_bytes(), file
    imported(agent, make_vm, vm, f"{name}-2")
    settled(agent)


def test_a_name_taken_refuses_a_copy_and_keeps_what_is_there(agent, make_vm, name, tmp_path):
    vm = counting(make_vm)
    vm.write("snapshot", name)
    whole = archive(agent, name).read_bytes()
    copy = tmp_path / "copy.tar"
    copy.write_bytes(whole)
    with pytest.raises(FileExistsError):
        os.open(archive(agent, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    assert subprocess.run(["cp", copy, archive(agent, name)]).returncode != 0
    assert archive(agent, name).read_bytes() == whole


def test_a_copy_that_breaks_off_leaves_nothing(agent, make_vm, name):
    vm = counting(make_vm)
    vm.write("snapshot", name)
    part = archive(agent, name).read_bytes()[:-20000]
    descriptor = os.open(archive(agent, f"{name}-2"), os.O_WRONLY | os.O_CREAT, 0o644)
    os.write(descriptor, part)
    assert f"{name}-2" in names(agent)
    with refused(errno.EBADMSG):
        os.close(descriptor)
    assert f"{name}-2" not in names(agent)
    assert "incomplete" in (agent.mount / "errors").read_text().splitlines()[-1]
    settled(agent)


@pytest.mark.backends("firecracker")
def test_a_foreign_file_is_refused_with_a_reason(agent, name):
    descriptor = os.open(archive(agent, name), os.O_WRONLY | os.O_CREAT, 0o644)
    with refused(errno.ENOEXEC, errno.EBADMSG):
        for _ in range(2):
            os.write(descriptor, random.Random(1).randbytes(1 << 20))
    with refused(errno.EIO, errno.ENOSPC, errno.ENOEXEC, errno.EBADMSG, errno.ESPIPE):
        os.close(descriptor)
    assert name not in names(agent)
    settled(agent)


@pytest.mark.backends("firecracker")
def test_going_backwards_is_espipe(agent, name):
    descriptor = os.open(archive(agent, name), os.O_WRONLY | os.O_CREAT, 0o644)
    os.write(descriptor, b"some")
    with refused(errno.ESPIPE):
        os.pwrite(descriptor, b"same", 0)
    with refused(errno.EIO, errno.ENOSPC, errno.ENOEXEC, errno.EBADMSG, errno.ESPIPE):
        os.close(descriptor)
    assert name not in names(agent)


@pytest.mark.backends("firecracker")
@pytest.mark.parametrize(
    "sample", ["cocoon-0.3.6-firecracker.tar", "cocoon-0.3.6-firecracker.tar.gz"]
)
def test_archives_of_cocoon_come_in_and_go_out_again(agent, name, sample, tmp_path):
    data = Path(__file__).parents[1] / "data" / "cocoon" / sample
    shutil.copyfile(data, archive(agent, name))
    shown = described(agent, name)
    assert shown["memory"] == 512 << 20
    assert not shown["boots_cold"]
    files = extract(archive(agent, name), tmp_path / "files")
    assert files["cow.raw"].stat().st_size == 10 << 30
    assert set(files) == {"snapshot.json", "cocoon.json", "cow.raw", "mem", "vmstate"}


def test_a_broken_copy_out_is_finished_by_rsync(agent, make_vm, name, tmp_path):
    if shutil.which("rsync") is None:
        pytest.skip("rsync is not installed")
    vm = counting(make_vm)
    vm.write("snapshot", name)
    whole = archive(agent, name).read_bytes()
    copy = tmp_path / f"{name}.tar"
    copy.write_bytes(whole[: len(whole) // 2])
    subprocess.run(
        ["rsync", "--partial", "--append", archive(agent, name), copy], check=True, timeout=60
    )
    assert copy.read_bytes() == whole


def test_many_read_at_once(agent, make_vm, name):
    vm = counting(make_vm)
    vm.write("snapshot", name)
    whole = archive(agent, name).read_bytes()
    read: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: read.append(archive(agent, name).read_bytes()))
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == [whole] * 16


def test_a_stranger_reads_no_snapshot_until_it_is_delegated(agent, make_vm, name):
    vm = counting(make_vm)
    vm.write("snapshot", name)
    path = archive(agent, name)

    def stranger(command: str) -> int:
        words = ["setpriv", "--reuid=4242", "--regid=4242", "--clear-groups", "sh", "-c", command]
        return subprocess.run(words, timeout=60, capture_output=True).returncode

    assert stranger(f"cat {path} > /dev/null") != 0
    assert stranger(f"rm -f {path}") != 0
    assert stranger(f"cat /dev/null > {agent.mount}/snapshots/mine.tar") != 0
    os.chown(path, 4242, -1)
    assert stranger(f"cat {path} > /dev/null") == 0
    agent.restart()
    assert path.stat().st_uid == 4242
    os.chown(path, 0, -1)
    assert stranger(f"cat {path} > /dev/null") != 0


@pytest.mark.backends(core=True)
def test_hibernate_ends_the_vm_and_restore_wakes_it_after_a_restart(agent, make_vm, name):
    vm = counting(make_vm)
    vm.write("hibernate", name)
    assert (vm.state, vm.read("pid")) == ("stopped", "0")
    seen = last_count((vm.path / "console").read_bytes())
    agent.restart()
    vm.write("restore", name)
    assert vm.state == "running"
    goes_on = len(vm.counts)
    vm.wait_counting()
    assert vm.counts[seen : goes_on + 1] == list(range(seen + 1, goes_on + 2))


@pytest.mark.backends(core=True)
def test_a_state_directory_lost_is_made_good_by_an_archive(agent, make_vm, name, tmp_path):
    vm = counting(make_vm)
    vm.write("snapshot", name)
    count = last_count((vm.path / "console").read_bytes())
    copy = tmp_path / f"{name}.tar"
    shutil.copyfile(archive(agent, name), copy)
    vm.remove()
    archive(agent, name).unlink()
    shutil.copyfile(copy, archive(agent, name))
    clone = make_vm(f"{vm.name}-again", hypervisor=None, memory=None, boot=None)
    clone.write("from", name)
    clone.verb("start")
    clone.wait_counting()
    assert clone.counts[0] <= count + 2
    goes_on_from(clone, clone.counts[0] - 1)
