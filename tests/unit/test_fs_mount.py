"""The tree through the kernel: a real mount of a host in memory, used by system calls and tools.

The mount is served by a process of its own (`fs_host.py`), so that what these tests do to it
cannot wait for themselves.
"""

import ctypes
import errno
import functools
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    os.getuid() != 0 or not os.path.exists("/dev/fuse"), reason="mounting needs root and /dev/fuse"
)

SERVER = Path(__file__).with_name("fs_host.py")
PATIENCE = 20.0
OWNER, MEMBER, STRANGER, GROUP = 3001, 3002, 3003, 4000

libc = ctypes.CDLL(None, use_errno=True)


class Tree:
    """A mounted tree, and the way to the host behind it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, SERVER, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        assert self._answer() == "ready"
        self._number = 0

    def tell(self, *command: Any) -> Any:
        assert self.process.stdin is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the server ended:\n{self.logged()}"
        return json.loads(line)

    def logged(self) -> str:
        self.log.seek(0)
        return self.log.read().decode()

    def new(self, prefix: str = "vm") -> Path:
        self._number += 1
        path = self.path / "vms" / f"{prefix}{self._number}"
        path.mkdir()
        return path

    def is_idle(self) -> bool:
        return bool(self.tell("counts") == {"open": 0, "waiting": 0, "streams": 0})

    def leave(self) -> int:
        """Let the server leave as the agent does, and return its status."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        status = self.process.wait(PATIENCE)
        self.log.close()
        return status


@pytest.fixture
def mountpoint() -> Iterator[Path]:
    """A directory that every uid can reach; what is still mounted there goes."""
    with tempfile.TemporaryDirectory(prefix="cocoon-fs-", ignore_cleanup_errors=True) as name:
        os.chmod(name, 0o755)
        path = Path(name, "mount")
        path.mkdir()
        yield path
        while libc.umount2(os.fsencode(path), 2 | 8) == 0:
            pass


@pytest.fixture(scope="module")
def shared_tree() -> Iterator[Tree]:
    with tempfile.TemporaryDirectory(prefix="cocoon-fs-", ignore_cleanup_errors=True) as name:
        os.chmod(name, 0o755)
        path = Path(name, "mount")
        tree = Tree(path)
        try:
            yield tree
            log = tree.logged()
            assert tree.leave() == 0, log
        finally:
            tree.process.kill()
            while libc.umount2(os.fsencode(path), 2 | 8) == 0:
                pass


@pytest.fixture
def tree(shared_tree: Tree) -> Iterator[Tree]:
    """The tree, empty; when the test is over it has seen no fault and holds nothing open."""
    before = shared_tree.logged()
    shared_tree.tell("clear")
    yield shared_tree
    wait_until(shared_tree.is_idle)
    logged = shared_tree.logged().removeprefix(before)
    assert "Traceback" not in logged, logged


@pytest.fixture
def vm(tree: Tree) -> Path:
    return tree.new()


def wait_until(predicate: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (value := predicate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


@contextmanager
def fails(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as raised:  # noqa: PT011 - the errno is checked below
        yield
    assert errno.errorcode[raised.value.errno or 0] == errno.errorcode[number]


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        with suppress(OSError):
            os.close(fd)


def write(path: Path, data: bytes | str, flags: int = os.O_TRUNC) -> None:
    """One open, one write, one close."""
    with opened(path, os.O_WRONLY | flags) as fd:
        data = data.encode() if isinstance(data, str) else data
        assert os.write(fd, data) == len(data)


def shell(command: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, **options
    )


def regular_files(tree: Tree) -> list[Path]:
    found = [Path(folder, name) for folder, _, names in os.walk(tree.path) for name in names]
    return [path for path in found if not path.is_symlink()]


# Reading


def test_sizes_are_exact(tree: Tree, vm: Path) -> None:
    tree.tell("say", vm.name, "hello\n" * 1000)
    for path in regular_files(tree):
        assert path.stat().st_size == len(path.read_bytes()), path


def test_every_byte_can_be_read_alone(tree: Tree, vm: Path) -> None:
    tree.tell("say", vm.name, "count 1\ncount 2\n")
    for name in ("state", "config", "console", "info.json"):
        with opened(vm / name, os.O_RDONLY) as fd:
            pieces = list(iter(functools.partial(os.read, fd, 1), b""))
        assert b"".join(pieces) == (vm / name).read_bytes()


def test_any_part_can_be_read(vm: Path) -> None:
    whole = (vm / "config").read_bytes()
    with opened(vm / "config", os.O_RDONLY) as fd:
        for offset in (0, 5, 100, len(whole) - 1, len(whole), len(whole) + 1, 1 << 40):
            assert os.pread(fd, 50, offset) == whole[offset : offset + 50]


def test_a_listing_is_complete_whoever_comes_and_goes(tree: Tree) -> None:
    kept = {tree.new("kept").name for _ in range(200)}
    gone = [tree.new("gone") for _ in range(200)]
    with os.scandir(tree.path / "vms") as entries:
        seen = [next(entries).name]
        for path in gone:
            path.rmdir()
        seen += [entry.name for entry in entries]
    assert len(seen) == len(set(seen))
    assert kept <= set(seen)


def test_a_listing_has_itself_and_its_parent(tree: Tree) -> None:
    assert shell(f"ls -a {tree.path}").stdout.split()[:2] == [".", ".."]


def test_the_streams_directory_shows_in_no_listing(tree: Tree) -> None:
    assert ".live" not in os.listdir(tree.path)
    assert os.listdir(tree.path / ".live") == []


def test_index_shows_every_vm_in_cocoons_shape(tree: Tree) -> None:
    names = {tree.new().name for _ in range(120)}
    index = json.loads((tree.path / "index.json").read_bytes())
    assert set(index) == {"vms", "names"}
    assert names <= set(index["names"])
    assert all(index["vms"][vm_id]["name"] == name for name, vm_id in index["names"].items())


def test_links_lead_where_they_say(tree: Tree, vm: Path) -> None:
    vm_id = (vm / "id").read_text().strip()
    assert (tree.path / "by-id" / vm_id).samefile(vm)
    assert os.readlink(vm / "console.sock") == f"/run/cocoon/console/{vm_id}.sock"
    assert (vm / "console.live").resolve() == tree.path / ".live" / vm_id
    for path in (tree.path / "by-id" / vm_id, vm / "console.sock", vm / "console.live"):
        assert path.lstat().st_size == len(os.readlink(path))


def test_stats_have_the_size_that_was_measured(vm: Path) -> None:
    for _ in range(3):
        assert (vm / "stats").stat().st_size == len((vm / "stats").read_bytes())


@pytest.mark.parametrize(
    "name", [".Trash", ".hidden", "nothing", "x" * 200, "größe", b"\xff\xfe", "a\nb", "state "]
)
@pytest.mark.parametrize("where", ["", "vms", "by-id", ".live", "vms/{vm}"])
def test_what_is_not_there_is_enoent(tree: Tree, vm: Path, where: str, name: str | bytes) -> None:
    directory = os.fsencode(tree.path / where.format(vm=vm.name))
    with fails(errno.ENOENT):
        os.lstat(os.path.join(directory, os.fsencode(name)))


def test_the_kernel_learns_at_once_who_is_gone(tree: Tree, vm: Path) -> None:
    with opened(vm, os.O_RDONLY | os.O_DIRECTORY) as directory:
        vm.rmdir()
        with fails(errno.ENOENT):
            os.stat("state", dir_fd=directory)
        with fails(errno.ENOENT):
            os.listdir(directory)
    with fails(errno.ENOENT):
        vm.stat()


def test_a_log_grows_under_an_open_file(tree: Tree, vm: Path) -> None:
    with opened(vm / "console", os.O_RDONLY) as fd:
        assert os.read(fd, 100) == b""
        tree.tell("say", vm.name, "count 1\n")
        assert os.fstat(fd).st_size == 8
        assert os.read(fd, 100) == b"count 1\n"
        assert os.lseek(fd, 0, os.SEEK_END) == 8


# Creating, renaming, removing


@pytest.mark.parametrize(
    "name", [".a", "-a", "a b", "a" * 64, "a.service", "a\nb", "ä", "a" * 255, b"\xff"]
)
def test_a_bad_name_is_einval(tree: Tree, name: str | bytes) -> None:
    with fails(errno.EINVAL):
        os.mkdir(os.path.join(os.fsencode(tree.path), b"vms", os.fsencode(name)))


def test_a_bad_name_is_told(tree: Tree) -> None:
    with fails(errno.EINVAL):
        (tree.path / "vms" / "no name").mkdir()
    assert "'no name' is not a name" in (tree.path / "errors").read_text().splitlines()[-1]


def test_a_taken_name_is_eexist(vm: Path) -> None:
    with fails(errno.EEXIST):
        vm.mkdir()


@pytest.mark.parametrize("where", ["", "by-id", ".live", "vms/{vm}"])
def test_directories_are_made_in_vms_only(tree: Tree, vm: Path, where: str) -> None:
    with fails(errno.EPERM):
        (tree.path / where.format(vm=vm.name) / "new").mkdir()


def test_a_new_vm_belongs_to_its_creator_and_the_group(tree: Tree) -> None:
    name = "made-by-member"
    done = as_user(MEMBER, [GROUP], f"mkdir {tree.path}/vms/{name}")
    assert done.returncode == 0, done.stderr
    found = (tree.path / "vms" / name).stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (MEMBER, GROUP, 0o770)


def test_a_mode_that_was_asked_for_is_given(tree: Tree) -> None:
    path = tree.path / "vms" / "private"
    assert shell(f"mkdir -m 700 {path}").returncode == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_vm_without_a_process_can_be_renamed(tree: Tree, vm: Path) -> None:
    before = vm.stat().st_ino
    new = vm.with_name(f"{vm.name}-renamed")
    assert shell(f"mv {vm} {new}").returncode == 0
    assert not vm.exists()
    assert new.stat().st_ino == before
    assert (new / "unit").read_text() == f"cocoon-vm-{new.name}.service\n"


def test_a_running_vm_keeps_its_name_and_its_life(vm: Path) -> None:
    write(vm / "state", "start")
    with fails(errno.EBUSY):
        vm.rename(vm.with_name("other"))
    with fails(errno.EBUSY):
        vm.rmdir()
    assert (vm / "state").read_text() == "running\n"


def renameat2(old: Path, new: Path, flags: int) -> None:
    if libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def test_renames_that_make_no_sense_are_refused(tree: Tree, vm: Path) -> None:
    other = tree.new()
    with fails(errno.EEXIST):
        vm.rename(other)
    with fails(errno.EEXIST):
        renameat2(vm, other, 1)
    with fails(errno.EINVAL):
        renameat2(vm, other, 2)
    with fails(errno.EINVAL):
        vm.rename(vm.with_name("a bad name"))
    for target in (other / "inside", tree.path / "outside", tree.path / "by-id" / "x"):
        with fails(errno.EPERM):
            vm.rename(target)
    with fails(errno.EPERM):
        (vm / "state").rename(vm / "stage")
    with fails(errno.EPERM):
        (tree.path / "vms").rename(tree.path / "machines")


def test_files_cannot_be_made_or_removed(tree: Tree, vm: Path) -> None:
    for directory in (tree.path, tree.path / "vms", tree.path / "by-id", vm):
        with fails(errno.EACCES):
            os.open(directory / "new", os.O_CREAT | os.O_WRONLY)
        with fails(errno.EPERM):
            os.mknod(directory / "new", 0o600 | stat.S_IFIFO)
        with fails(errno.EPERM):
            os.symlink("target", directory / "new")
        with fails(errno.EPERM):
            os.link(vm / "state", directory / "new")
    for path in [vm / "state", vm / "console.live", tree.path / "README", tree.path / "create"]:
        with fails(errno.EPERM):
            path.unlink()
    with fails(errno.EPERM):
        (tree.path / "vms").rmdir()
    with fails(errno.ENOTDIR):
        (vm / "state").rmdir()


@pytest.mark.parametrize(
    "command",
    [
        "rm -rf {vm}",
        "find {vm} -delete",
        "find {vm} -depth -exec rm -f {{}} +; rm -r {vm}",
        "mv {vm} {away}",
        f"{sys.executable} -c 'import shutil; shutil.rmtree(\"{{vm}}\", ignore_errors=True)'",
        "rsync -a --remove-source-files {vm}/ {away}/; rm -rf {vm}",
    ],
)
def test_no_accident_removes_a_vm(vm: Path, tmp_path: Path, command: str) -> None:
    before = (vm / "config").read_text()
    shell(command.format(vm=vm, away=tmp_path / "away"))
    assert (vm / "config").read_text() == before
    assert (vm / "state").read_text() == "created\n"


def test_who_removes_files_one_by_one_is_told_how_to_remove_a_vm(tree: Tree, vm: Path) -> None:
    with fails(errno.EPERM):
        (vm / "state").unlink()
    with fails(errno.EPERM):
        vm.rmdir()
    assert "use rmdir alone" in (tree.path / "errors").read_text().splitlines()[-1]
    assert shell(f"rmdir {vm}").returncode == 0


# Writing values


def test_an_unknown_verb_is_einval_and_the_verbs_are_named(tree: Tree, vm: Path) -> None:
    done = shell(f"echo bogus > {vm}/state")
    assert "write error: Invalid argument" in done.stderr
    assert "start, stop, kill" in (vm / "error").read_text()
    assert f"0 vms/{vm.name}/state 'bogus'" in (tree.path / "errors").read_text().splitlines()[-1]
    assert (vm / "state").read_text() == "created\n"


@pytest.mark.parametrize("text", ["start", "start\n", " start \n\n"])
def test_a_verb_may_have_space_around_it(vm: Path, text: str) -> None:
    write(vm / "state", text)
    assert (vm / "state").read_text() == "running\n"


@pytest.mark.parametrize("flags", [0, os.O_TRUNC, os.O_APPEND])
def test_offsets_count_for_nothing_in_a_value(vm: Path, flags: int) -> None:
    with opened(vm / "memory", os.O_RDWR | flags) as fd:
        os.lseek(fd, 12345, os.SEEK_SET)
        assert os.write(fd, b"64M") == 3
        assert os.pwrite(fd, b"128M\n", 7) == 5
        assert os.pread(fd, 100, 0) == b"134217728\n"


def test_what_is_there_can_always_be_written_back(vm: Path) -> None:
    write(vm / "user_data", "#cloud-config\nhostname: a\n")
    write(vm / "ssh_keys", "ssh-ed25519 AAAA one\nssh-ed25519 BBBB two\n")
    write(vm / "boot", '{"kernel": "vmlinux", "cmdline": "console=ttyS0"}')
    others = {"state", "console", "console.live", "console.sock"}
    others |= {"snapshot", "restore", "hibernate", "from", "snapshots"}
    before = {path.name: path.read_bytes() for path in vm.iterdir() if path.name not in others}
    written = [vm / name for name in before if (vm / name).stat().st_mode & 0o200]
    assert len(written) > 15
    for path in written:
        write(path, before[path.name])
        assert path.read_bytes() == before[path.name], path.name
    assert "cloud-config" in json.loads(before["config"])["user_data"]


@pytest.mark.parametrize(
    ("name", "text"), [("cpu", "none"), ("memory", "1Q"), ("boot", "{}"), ("hostname", "\xff")]
)
def test_a_bad_value_is_einval_and_changes_nothing(vm: Path, name: str, text: str) -> None:
    before = (vm / "config").read_text()
    with fails(errno.EINVAL):
        write(vm / name, text.encode("latin-1"))
    assert (vm / "config").read_text() == before
    assert (vm / "error").read_text() != ""


def test_success_empties_error(vm: Path) -> None:
    with fails(errno.EINVAL):
        write(vm / "cpu", "none")
    assert (vm / "error").stat().st_size > 0
    write(vm / "cpu", "1")
    assert (vm / "error").stat().st_size == 0


def test_touch_and_truncate_do_nothing(vm: Path) -> None:
    before = (vm / "config").read_text()
    for command in (
        f"touch {vm}/state {vm}/config {vm}/error {vm}/console {vm}",
        f"touch -d 2001-01-01 {vm}/memory",
        f"truncate -s 0 {vm}/memory",
        f"truncate -s 100 {vm}/config",
        f": > {vm}/state",
        f": > {vm}/config",
    ):
        done = shell(command)
        assert done.returncode == 0, done.stderr
    assert (vm / "config").read_text() == before


@pytest.mark.parametrize(
    "writer",
    [
        "echo 64M > {f}",
        "echo 64M >> {f}",
        "echo 64M | tee {f}",
        "echo 64M | tee -a {f}",
        "cat {s} > {f}",
        "cp {s} {f}",
        "dd if={s} of={f} bs=3",
        "dd if={s} of={f} conv=notrunc",
        "printf 64M > {f}",
        "dash -c 'echo 64M > {f}'",
    ],
)
def test_every_tool_can_write_a_value(vm: Path, tmp_path: Path, writer: str) -> None:
    source = tmp_path / "value"
    source.write_text("64M" if "bs=3" in writer else "64M\n")
    done = shell(writer.format(f=vm / "memory", s=source))
    assert done.returncode == 0, done.stderr
    assert (vm / "memory").read_text() == f"{64 << 20}\n"


@pytest.mark.parametrize(
    "writer",
    [
        "cat {s} > {f}",
        "cp {s} {f}",
        "dd if={s} of={f} bs=1",
        "dd if={s} of={f} bs=17",
        "dd if={s} of={f} bs=1M",
        'while IFS= read -r l; do echo "$l"; done < {s} > {f}',
        'echo "$(cat {s})" > {f}',
        "tee {f} < {s}",
        "cat {s} >> {f}",
        "vim -es -u NONE -c 'set nobackup nowritebackup noswapfile' "
        "-c '%d' -c '0r {s}' -c 'wq' {f}",
    ],
)
def test_every_tool_can_write_a_document(vm: Path, tmp_path: Path, writer: str) -> None:
    source = tmp_path / "document"
    source.write_text(json.dumps({"memory": "64M", "hostname": "web"}, indent=2) + "\n")
    done = shell(writer.format(f=vm / "config", s=source))
    assert done.returncode == 0, done.stderr
    config = json.loads((vm / "config").read_text())
    assert (config["memory"], config["hostname"]) == (64 << 20, "web")


def test_an_incomplete_document_is_ebadmsg_at_close(vm: Path) -> None:
    fd = os.open(vm / "config", os.O_WRONLY)
    os.write(fd, b'{"memory": ')
    with fails(errno.EBADMSG):
        os.close(fd)
    assert "incomplete" in (vm / "error").read_text()


def test_cp_hears_of_an_incomplete_document(vm: Path, tmp_path: Path) -> None:
    (tmp_path / "half").write_text('{"memory": ')
    done = shell(f"cp {tmp_path}/half {vm}/config")
    assert done.returncode == 1
    assert "Bad message" in done.stderr


def test_a_duplicate_descriptor_may_go_on_after_a_flush(vm: Path) -> None:
    with opened(vm / "config", os.O_WRONLY) as fd:
        os.write(fd, b'{"memory": ')
        with fails(errno.EBADMSG):
            os.close(os.dup(fd))
        os.write(fd, b'"64M"}')
    assert (vm / "memory").read_text() == f"{64 << 20}\n"


def test_going_backwards_in_a_document_is_espipe(vm: Path) -> None:
    fd = os.open(vm / "config", os.O_WRONLY)
    os.write(fd, b'{"memory": ')
    with fails(errno.ESPIPE):
        os.pwrite(fd, b"{", 0)
    with fails(errno.EBADMSG):
        os.close(fd)


@pytest.mark.parametrize("text", ["{bad}", "[]", "hello", '{"unknown": 1}', "{} {}"])
def test_a_bad_document_is_einval_in_the_write(tree: Tree, vm: Path, text: str) -> None:
    for path in (vm / "config", tree.path / "create"):
        with fails(errno.EINVAL):
            write(path, text)


def test_one_write_to_create_makes_a_vm(tree: Tree) -> None:
    write(tree.path / "create", '{"name": "whole", "memory": "64M", "state": "start"}')
    assert (tree.path / "vms/whole/state").read_text() == "running\n"
    assert (tree.path / "vms/whole/memory").read_text() == f"{64 << 20}\n"
    with fails(errno.EEXIST):
        write(tree.path / "create", '{"name": "whole"}')


def test_what_is_written_to_a_console_goes_to_the_guest(tree: Tree, vm: Path) -> None:
    with fails(errno.EINVAL):
        write(vm / "console", "nobody listens\n")
    assert "start it first" in (vm / "error").read_text()
    write(vm / "state", "start")
    write(vm / "console", "hello\n")
    write(vm / "console", "again\n", os.O_APPEND)
    assert tree.tell("sent") == ["hello\n", "again\n"]


def test_python_hears_of_a_refusal(vm: Path) -> None:
    with fails(errno.EINVAL), open(vm / "state", "w") as file:
        file.write("bogus\n")


def test_extended_attributes_are_not_supported(vm: Path) -> None:
    for path in (vm, vm / "state"):
        with fails(errno.ENOTSUP):
            os.getxattr(path, "user.x")
        with fails(errno.ENOTSUP):
            os.setxattr(path, "user.x", b"1")
        with fails(errno.ENOTSUP):
            os.setxattr(path, "user.x", b"1", os.XATTR_CREATE)
        with fails(errno.ENOTSUP):
            os.removexattr(path, "user.x")


def test_statvfs_tells_that_nothing_is_stored(tree: Tree) -> None:
    found = os.statvfs(tree.path)
    assert (found.f_blocks, found.f_bfree, found.f_namemax) == (0, 0, 255)


def test_the_mount_says_what_it_is(tree: Tree) -> None:
    found = shell(f"findmnt --noheadings --output SOURCE,FSTYPE {tree.path}")
    assert found.stdout.split() == ["cocoon", "fuse.cocoon"]


# Waiting


@contextmanager
def held(tree: Tree, vm: Path) -> Iterator[Callable[[], None]]:
    """Operations on the VM wait in the body, or until the value of this is called."""
    tree.tell("hold", vm.name)
    released: list[None] = []

    def let_go() -> None:
        if not released:
            released.append(tree.tell("let go", vm.name))

    try:
        yield let_go
    finally:
        let_go()


def waits(tree: Tree, count: int = 1) -> None:
    wait_until(lambda: bool(tree.tell("counts")["waiting"] == count))


def test_a_write_returns_when_its_operation_has_finished(tree: Tree, vm: Path) -> None:
    with held(tree, vm) as let_go:
        writer = subprocess.Popen(
            ["bash", "-c", f"echo start > {vm}/state && cat {vm}/state"],
            stdout=subprocess.PIPE,
            text=True,
        )
        waits(tree)
        assert (vm / "state").read_text() == "created\n"
        let_go()
        assert writer.communicate(timeout=PATIENCE)[0] == "running\n"


def test_kill_gets_through_while_stop_waits(tree: Tree, vm: Path) -> None:
    write(vm / "state", "start")
    with held(tree, vm):
        writer = subprocess.Popen(["bash", "-c", f"echo stop > {vm}/state"])
        waits(tree)
        write(vm / "state", "kill")
        assert (vm / "state").read_text() == "stopped\n"
        assert writer.poll() is None
    assert writer.wait(PATIENCE) == 0


def test_state_is_the_same_file_until_somebody_may_write(vm: Path) -> None:
    first = (vm / "state").stat().st_ino
    with opened(vm / "state", os.O_RDONLY) as fd:
        assert os.fstat(fd).st_ino == first
    assert shell(f"cp {vm}/state /dev/null").stderr == ""
    with opened(vm / "state", os.O_WRONLY) as fd:
        assert os.fstat(fd).st_ino == first
        later = (vm / "state").stat().st_ino
        assert later != first
        assert os.fstat(fd).st_ino == first
    assert (vm / "state").stat().st_ino == later


def test_with_o_nonblock_a_write_returns_when_accepted(tree: Tree, vm: Path) -> None:
    with held(tree, vm) as let_go:
        write(vm / "state", "start", os.O_NONBLOCK)
        assert (vm / "state").read_text() == "created\n"
        let_go()
        wait_until(lambda: (vm / "state").read_text() == "running\n")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL", "SIGALRM"])
def test_a_signal_ends_the_wait_and_the_operation_goes_on(tree: Tree, vm: Path, name: str) -> None:
    with held(tree, vm) as let_go:
        writer = subprocess.Popen(
            ["bash", "-c", f"exec tee {vm}/state <<< start"], stdout=subprocess.DEVNULL
        )
        waits(tree)
        writer.send_signal(getattr(signal, name))
        assert writer.wait(PATIENCE) == -getattr(signal, name)
        waits(tree, 0)
        assert (vm / "state").read_text() == "created\n"
        let_go()
        wait_until(lambda: (vm / "state").read_text() == "running\n")


def test_a_handled_signal_shows_as_eintr(tree: Tree, vm: Path) -> None:
    code = f"""
import os, signal, ctypes
libc = ctypes.CDLL(None, use_errno=True)
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.1)
fd = os.open({str(vm / "state")!r}, os.O_WRONLY)
print(libc.write(fd, b"start", 5), ctypes.get_errno())
"""
    with held(tree, vm):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["-1", str(errno.EINTR)], done.stderr


@pytest.mark.parametrize("name", ["SIGCHLD", "SIGWINCH", "SIGURG", "SIGCONT"])
def test_harmless_signals_do_not_end_a_wait(tree: Tree, vm: Path, name: str) -> None:
    code = f"""
import os, signal, sys
signal.signal(signal.{name}, lambda *_: None)
fd = os.open({str(vm / "state")!r}, os.O_WRONLY)
os.write(fd, b"start")
print("written")
"""
    with held(tree, vm) as let_go:
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        waits(tree)
        writer.send_signal(getattr(signal, name))
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(0.7)
        assert tree.tell("counts")["waiting"] == 1
        let_go()
        assert writer.communicate(timeout=PATIENCE)[0] == "written\n"
    assert len([asked for asked in tree.tell("asked") if asked["what"] == "start"]) >= 1


def test_a_write_by_another_thread_outlives_the_one_that_opened(tree: Tree, vm: Path) -> None:
    fds: list[int] = []
    opener = threading.Thread(target=lambda: fds.append(os.open(vm / "state", os.O_WRONLY)))
    opener.start()
    opener.join()
    with ThreadPoolExecutor(1) as pool, held(tree, vm) as let_go:
        written = pool.submit(os.write, fds[0], b"start")
        waits(tree)
        time.sleep(0.5)  # two looks at a thread that is no more
        assert not written.done()
        let_go()
        assert written.result(PATIENCE) == 5
    os.close(fds[0])


def test_a_vm_that_is_slow_delays_no_other(tree: Tree, vm: Path) -> None:
    other = tree.new()
    keys = {"memory": "64M", "cpu": "1", "restart": "no", "hostname": "a", "user": "b"}
    with ThreadPoolExecutor(len(keys)) as pool, held(tree, vm):
        waiting = [pool.submit(write, vm / key, value) for key, value in keys.items()]
        waits(tree, len(keys))
        write(other / "state", "start")
        assert (other / "state").read_text() == "running\n"
        assert not any(done.done() for done in waiting)


def test_who_asked_is_known_from_the_open(tree: Tree, vm: Path) -> None:
    os.chmod(vm, 0o777)
    tree.tell("asked")
    as_user(STRANGER, [5001, 5002], f"echo 64M > {vm}/memory")
    (asked,) = tree.tell("asked")
    assert asked["what"] == "configure"
    assert (asked["uid"], asked["gid"], asked["groups"]) == (STRANGER, STRANGER, [5001, 5002])
    assert asked["path"] == f"vms/{vm.name}/memory"


# Streams


def test_a_stream_tells_what_happens_from_its_opening_on(tree: Tree) -> None:
    tree.tell("event", "before\n")
    with opened(tree.path / "events.live", os.O_RDONLY) as fd, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(os.read, fd, 100)
        waits(tree)
        tree.tell("event", "after\n")
        assert reading.result(PATIENCE) == b"after\n"
    assert b"before\n" in (tree.path / "events").read_bytes()


def test_a_console_stream_shows_what_the_guest_says(tree: Tree, vm: Path) -> None:
    reader = subprocess.Popen(["cat", vm / "console.live"], stdout=subprocess.PIPE)
    waits(tree)
    tree.tell("say", vm.name, "count 1\n")
    assert reader.stdout is not None
    assert reader.stdout.readline() == b"count 1\n"
    reader.send_signal(signal.SIGINT)
    assert reader.wait(PATIENCE) == -signal.SIGINT
    reader.stdout.close()


def test_a_stream_has_no_offsets(tree: Tree) -> None:
    with opened(tree.path / "events.live", os.O_RDONLY) as fd:
        assert os.fstat(fd).st_size == 0
        with fails(errno.ESPIPE):
            os.lseek(fd, 0, os.SEEK_SET)
        with fails(errno.ESPIPE):
            os.pread(fd, 1, 0)


def test_with_o_nonblock_an_empty_stream_is_eagain(tree: Tree) -> None:
    with opened(tree.path / "events.live", os.O_RDONLY | os.O_NONBLOCK) as fd:
        with fails(errno.EAGAIN):
            os.read(fd, 100)
        tree.tell("event", "one\n")
        assert os.read(fd, 100) == b"one\n"
        with fails(errno.EAGAIN):
            os.read(fd, 100)


def test_a_read_gets_no_more_than_it_asked_for(tree: Tree) -> None:
    with opened(tree.path / "events.live", os.O_RDONLY | os.O_NONBLOCK) as fd:
        tree.tell("event", "0123456789")
        assert [os.read(fd, 1), os.read(fd, 4), os.read(fd, 100)] == [b"0", b"1234", b"56789"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_a_blocked_reader_can_be_ended(tree: Tree, name: str) -> None:
    reader = subprocess.Popen(["cat", tree.path / "events.live"])
    waits(tree)
    reader.send_signal(getattr(signal, name))
    assert reader.wait(PATIENCE) == -getattr(signal, name)


def test_500_blocked_readers_delay_nobody(tree: Tree, vm: Path) -> None:
    write(vm / "state", "start")
    with ThreadPoolExecutor(500) as pool:
        fds = [os.open(tree.path / "events.live", os.O_RDONLY) for _ in range(500)]
        try:
            reading = [pool.submit(os.read, fd, 100) for fd in fds]
            waits(tree, 500)
            assert (vm / "state").stat().st_size == len("running\n")
            write(vm / "state", "kill")
            assert (vm / "state").read_text() == "stopped\n"
            assert not any(done.done() for done in reading)
            tree.tell("event", "all\n")
            assert {done.result(PATIENCE) for done in reading} == {b"all\n"}
        finally:
            for fd in fds:
                os.close(fd)


def test_nothing_that_walks_the_tree_hangs(tree: Tree, vm: Path, tmp_path: Path) -> None:
    tree.tell("say", vm.name, "needle in the console\n")
    for command, status in (
        ("grep -r needle .", 0),
        ("ls -lR .", 0),
        ("find . -ls", 0),
        ("find . -exec stat {} +", 0),
        (f"tar --create --file {tmp_path}/x.tar .", 0),
        (f"cp -r . {tmp_path}/copy", 0),
        (f"cp -a . {tmp_path}/archive", 0),
        (f"rsync -a ./ {tmp_path}/synced/", 0),
        ("du -s .", 0),
        ("md5sum vms/*/config", 0),
        (f"diff -r -x stats --no-dereference vms {tmp_path}/copy/vms", 0),
        (f"diff -r -x stats --no-dereference vms {tmp_path}/synced/vms", 0),
    ):
        done = shell(f"cd {tree.path} && {command}")
        assert (done.returncode, done.stderr) == (status, ""), command
    assert "needle" in (tmp_path / "copy/vms" / vm.name / "console").read_text()
    listed = shell(f"tar --list --file {tmp_path}/x.tar").stdout
    assert f"./vms/{vm.name}/state\n" in listed


def test_an_archive_of_the_tree_is_whole(tree: Tree, vm: Path, tmp_path: Path) -> None:
    shell(f"tar -C {tree.path} -cf {tmp_path}/x.tar vms/{vm.name} README index.json")
    shell(f"tar -C {tmp_path} -xf {tmp_path}/x.tar")
    for name in (f"vms/{vm.name}/config", f"vms/{vm.name}/info.json", "README", "index.json"):
        assert (tmp_path / name).read_bytes() == (tree.path / name).read_bytes()


@pytest.mark.parametrize("size", [1, 3, 17, 512, 4096, 1000003])
def test_dd_reads_with_any_block_size(tree: Tree, vm: Path, size: int) -> None:
    for path in (vm / "config", tree.path / "README"):
        done = subprocess.run(["dd", f"if={path}", f"bs={size}"], capture_output=True)
        assert done.stdout == path.read_bytes()


def test_64_processes_at_once(tree: Tree) -> None:
    script = """
for round in 1 2 3; do
    mkdir vms/p$1-$round && echo start > vms/p$1-$round/state &&
    grep -q running vms/p$1-$round/state && echo 64M > vms/p$1-$round/memory &&
    ls vms > /dev/null && cat vms/p$1-$round/config > /dev/null &&
    echo stop > vms/p$1-$round/state && mv vms/p$1-$round vms/q$1-$round &&
    rmdir vms/q$1-$round || exit 1
done
"""
    running = [
        subprocess.Popen(["bash", "-c", script, "bash", str(number)], cwd=tree.path)
        for number in range(64)
    ]
    assert [process.wait(100) for process in running] == [0] * 64
    assert not [
        name
        for name in os.listdir(tree.path / "vms")
        if name[0] in "pq" and "-" in name and name[1].isdigit()
    ]


# Permissions


def as_user(uid: int, groups: list[int], command: str) -> "subprocess.CompletedProcess[str]":
    return shell(command, user=uid, group=uid, extra_groups=groups, cwd="/")


USERS = {"owner": (OWNER, [GROUP]), "member": (MEMBER, [GROUP]), "stranger": (STRANGER, [])}
TREE_ACCESS = {
    "README": ("r", "r", "r"),
    "version": ("r", "r", "r"),
    "doctor": ("r", "r", "r"),
    "create": ("rw", "rw", ""),
    "errors": ("r", "r", ""),
    "events": ("r", "r", ""),
    "events.live": ("r", "r", ""),
    "index.json": ("r", "r", ""),
}
MODES = {
    0o770: ("rw", "rw", ""),
    0o700: ("rw", "", ""),
    0o750: ("rw", "r", ""),
    0o755: ("rw", "r", "r"),
    0o777: ("rw", "rw", "rw"),
    0o744: ("rw", "", ""),
}


def allowed(user: str, path: Path) -> str:
    """Which of r and w the kernel grants; opening waits for nothing."""
    uid, groups = USERS[user]
    ways = as_user(uid, groups, f"(: < {path}) && printf r; (: >> {path}) && printf w; :")
    for line in ways.stderr.splitlines():
        assert line.endswith("Permission denied")
    return ways.stdout


@pytest.mark.parametrize("number", range(3), ids=list(USERS))
@pytest.mark.parametrize("name", list(TREE_ACCESS))
def test_the_hosts_files_are_open_to_whom_the_table_says(
    tree: Tree, name: str, number: int
) -> None:
    assert allowed(list(USERS)[number], tree.path / name) == TREE_ACCESS[name][number]


@pytest.mark.parametrize("mode", list(MODES), ids=oct)
@pytest.mark.parametrize("name", ["state", "config", "memory", "password", "console"])
def test_a_vms_files_are_open_to_whom_its_mode_says(tree: Tree, mode: int, name: str) -> None:
    vm = tree.new()
    os.chown(vm, OWNER, GROUP)
    os.chmod(vm, mode)
    assert tuple(allowed(user, vm / name) for user in USERS) == MODES[mode]


@pytest.mark.parametrize("mode", list(MODES), ids=oct)
@pytest.mark.parametrize("name", ["id", "info.json", "stats", "error", "console.live"])
def test_what_is_only_shown_can_be_written_by_nobody(tree: Tree, mode: int, name: str) -> None:
    vm = tree.new()
    os.chown(vm, OWNER, GROUP)
    os.chmod(vm, mode)
    expected = tuple(ways.replace("w", "") for ways in MODES[mode])
    assert tuple(allowed(user, vm / name) for user in USERS) == expected


def test_a_stream_is_closed_to_whom_its_vm_is_closed(tree: Tree, vm: Path) -> None:
    os.chown(vm, OWNER, GROUP)
    os.chmod(vm, 0o700)
    stream = (vm / "console.live").resolve()
    assert [allowed(user, stream) for user in USERS] == ["r", "", ""]


@pytest.mark.parametrize(("user", "may"), [("owner", True), ("member", True), ("stranger", False)])
def test_members_of_the_group_create(tree: Tree, user: str, may: bool) -> None:
    path = tree.path / "vms" / f"by-{user}"
    done = as_user(*USERS[user], f"mkdir {path}")
    assert (done.returncode == 0) is may
    assert path.exists() is may


@pytest.mark.parametrize(("user", "may"), [("owner", True), ("member", False), ("stranger", False)])
def test_only_the_owner_removes_renames_and_delegates(tree: Tree, user: str, may: bool) -> None:
    vm = tree.new()
    os.chown(vm, OWNER, GROUP)
    os.chmod(vm, 0o777)
    for command in (
        f"chmod 750 {vm}",
        f"chgrp {GROUP} {vm}",
        f"mv {vm} {vm}x && mv {vm}x {vm}",
        f"rmdir {vm}",
    ):
        assert (as_user(*USERS[user], command).returncode == 0) is may, command


def test_nobody_but_root_gives_a_vm_away(tree: Tree, vm: Path) -> None:
    os.chown(vm, OWNER, GROUP)
    assert as_user(*USERS["owner"], f"chown {MEMBER} {vm}").returncode != 0
    os.chown(vm, MEMBER, STRANGER)
    found = (vm / "state").stat()
    assert (found.st_uid, found.st_gid) == (MEMBER, STRANGER)


def test_modes_keep_to_permission_bits(vm: Path) -> None:
    os.chmod(vm, 0o7750)
    assert stat.S_IMODE(vm.stat().st_mode) == 0o750


def test_what_is_in_a_vm_cannot_be_delegated_alone(tree: Tree, vm: Path) -> None:
    for path in (vm / "state", tree.path / "create", tree.path / "vms", tree.path):
        with fails(errno.EPERM):
            os.chmod(path, 0o777)
        with fails(errno.EPERM):
            os.chown(path, OWNER, -1)


# Faults, and the ends of mounts


def test_a_fault_is_eio_and_told_and_ends_nothing(shared_tree: Tree) -> None:
    vm = shared_tree.new("faulty")
    other = shared_tree.new()
    with fails(errno.EIO):
        write(vm / "state", "start")
    with fails(errno.EIO):
        (vm / "info.json").read_bytes()
    assert "Traceback" in shared_tree.logged()
    assert "a fault that a test made" in shared_tree.logged()
    assert "the agent has a fault" in (shared_tree.path / "errors").read_text()
    write(other / "state", "start")
    assert (other / "state").read_text() == "running\n"
    vm.rmdir()


def test_a_dead_mount_is_replaced(mountpoint: Path) -> None:
    first = Tree(mountpoint)
    (mountpoint / "vms" / "a").mkdir()
    with opened(mountpoint / "vms", os.O_RDONLY):
        first.process.kill()
        first.process.wait()
        with fails(errno.ENOTCONN):
            os.stat(mountpoint)
        second = Tree(mountpoint)
        assert os.listdir(mountpoint / "vms") == []
        assert second.leave() == 0
    assert not os.path.ismount(mountpoint)


def test_what_somebody_else_mounted_stays(mountpoint: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", mountpoint], check=True)
    (mountpoint / "theirs").touch()
    tree = Tree(mountpoint)
    assert (mountpoint / "version").exists()
    assert tree.leave() == 0
    assert os.listdir(mountpoint) == ["theirs"]


def test_a_mount_point_is_made(mountpoint: Path) -> None:
    tree = Tree(mountpoint / "not" / "there")
    assert (mountpoint / "not" / "there" / "version").exists()
    assert tree.leave() == 0


def test_leaving_does_not_wait_for_those_who_wait(mountpoint: Path) -> None:
    tree = Tree(mountpoint)
    vm = tree.new()
    tree.tell("hold", vm.name)
    readers = [
        subprocess.Popen(["cat", mountpoint / "events.live"], stderr=subprocess.PIPE)
        for _ in range(20)
    ]
    writer = subprocess.Popen(["bash", "-c", f"echo start > {vm}/state"], stderr=subprocess.PIPE)
    waits(tree, 21)
    assert tree.leave() == 0
    for process in [*readers, writer]:
        assert b"Software caused connection abort" in process.communicate(timeout=PATIENCE)[1]
    assert not os.path.ismount(mountpoint)


def test_an_agent_whose_mount_is_taken_away_ends(mountpoint: Path) -> None:
    tree = Tree(mountpoint)
    subprocess.run(["umount", "--lazy", mountpoint], check=True)
    assert tree.process.wait(PATIENCE) != 0
    assert "was unmounted by somebody else" in tree.logged()


def test_a_stream_ends_when_its_source_does(mountpoint: Path) -> None:
    tree = Tree(mountpoint)
    reader = subprocess.Popen(["cat", mountpoint / "events.live"], stdout=subprocess.PIPE)
    waits(tree)
    tree.tell("event", "last\n")
    tree.tell("end streams")
    assert reader.communicate(timeout=PATIENCE)[0] == b"last\n"
    assert reader.returncode == 0
    assert tree.leave() == 0
