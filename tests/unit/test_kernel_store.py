import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest
import trio
from kernels import make_bzimage, make_elf, make_payload

from agent.model.config import Boot
from agent.model.errors import (
    Busy,
    Damaged,
    Invalid,
    Missing,
    NoSpace,
    UnknownFormat,
)
from agent.model.vm import BootFiles, FirmwareFormat
from agent.storage import kernel as kernel_module
from agent.storage.kernel import KernelStore
from agent.storage.tree import Tree

pytestmark = pytest.mark.anyio

ELF = make_elf(100_000)
IMAGE = make_bzimage(make_payload("gzip", ELF))


@pytest.fixture
async def tree(tmp_path):
    tree = Tree(f"{tmp_path}/root", f"{tmp_path}/run")
    await tree.prepare()
    return tree


@pytest.fixture
def store(tree, monkeypatch):
    # The tests' files are always fresh; one test is about that.
    monkeypatch.setattr(kernel_module, "_SETTLED", 0.0)
    return KernelStore(tree)


@pytest.fixture
def boot_file(tree):
    """`boot_file(name, content)` puts a file where root offers kernels to users."""

    def put(name, content):
        Path(tree.boot, name).write_bytes(content)
        return name

    return put


@pytest.fixture
def count_copies(store, monkeypatch):
    """The names of the files that were read as a whole."""
    copied = []
    copy = KernelStore._copy

    def counted(self, name, part):
        copied.append(name)
        return copy(self, name, part)

    monkeypatch.setattr(KernelStore, "_copy", counted)
    return copied


def digest(content):
    return hashlib.sha256(content).hexdigest()


def names(tree):
    return sorted(os.listdir(tree.kernels))


async def test_kernel_and_initrd_are_kept_by_their_content(store, tree, boot_file):
    boot = Boot(kernel=boot_file("vmlinux", ELF), initrd=boot_file("initrd", b"cpio"))
    stored = await store.store(boot)
    assert stored == BootFiles(digest(ELF), digest(b"cpio"), source=boot)
    assert Path(store.path(stored.kernel)).read_bytes() == ELF
    assert Path(store.path(stored.initrd)).read_bytes() == b"cpio"


async def test_what_is_stored_is_for_everybody_to_read_and_nobody_to_change(store, boot_file):
    stored = await store.store(Boot(kernel=boot_file("vmlinux", ELF)))
    facts = os.stat(store.path(stored.kernel))
    assert stat.S_IMODE(facts.st_mode) == 0o444
    assert facts.st_uid == os.geteuid()


async def test_a_path_of_the_host_may_be_a_link(store, tmp_path):
    (tmp_path / "vmlinux-6.1").write_bytes(ELF)
    (tmp_path / "vmlinux").symlink_to("vmlinux-6.1")
    assert (await store.store(Boot(kernel=f"{tmp_path}/vmlinux"))).kernel == digest(ELF)


async def test_what_was_read_once_is_not_read_again(store, boot_file, count_copies):
    boot = Boot(kernel=boot_file("vmlinux", ELF), initrd=boot_file("initrd", b"cpio"))
    first = await store.store(boot)
    assert await store.store(boot) == first
    assert count_copies == ["vmlinux", "initrd"]


async def test_a_file_that_changed_is_stored_anew(store, tree, boot_file):
    boot = Boot(kernel=boot_file("vmlinux", ELF))
    first = await store.store(boot)
    boot_file("vmlinux", make_elf(100_000, seed=2))
    second = await store.store(boot, first)
    assert second.kernel != first.kernel
    assert names(tree) == sorted([first.kernel, second.kernel])


async def test_a_file_that_changed_just_now_is_not_taken_to_be_known(tree, boot_file, count_copies):
    kernel_module._SETTLED = 3600.0  # the fixture behind count_copies restores it
    store = KernelStore(tree)
    boot = Boot(kernel=boot_file("vmlinux", ELF))
    assert await store.store(boot) == await store.store(boot)
    assert count_copies == ["vmlinux", "vmlinux"]


async def test_the_same_content_under_two_names_is_stored_once(store, tree, boot_file):
    first = await store.store(Boot(kernel=boot_file("one", ELF)))
    second = await store.store(Boot(kernel=boot_file("two", ELF)))
    assert first.kernel == second.kernel
    assert names(tree) == [first.kernel]


async def test_many_starts_at_once_copy_a_kernel_once(store, boot_file, count_copies):
    boot = Boot(kernel=boot_file("vmlinux", ELF))
    async with trio.open_nursery() as nursery:
        for _ in range(16):
            nursery.start_soon(store.store, boot)
    assert count_copies == ["vmlinux"]


async def test_a_stored_file_that_was_removed_is_stored_again(store, boot_file):
    boot = Boot(kernel=boot_file("vmlinux", ELF))
    stored = await store.store(boot)
    os.unlink(store.path(stored.kernel))
    assert await store.store(boot) == stored
    assert os.path.exists(store.path(stored.kernel))


async def test_what_was_booted_is_booted_again_when_the_file_is_gone(store, tree, boot_file):
    boot = Boot(kernel=boot_file("vmlinux", ELF), initrd=boot_file("initrd", b"cpio"))
    before = await store.store(boot)
    Path(tree.boot, "vmlinux").unlink()
    Path(tree.boot, "initrd").unlink()
    assert await KernelStore(tree).store(boot, before) == before


async def test_a_file_that_is_gone_is_missed_when_something_else_was_booted(store, tree, boot_file):
    before = await store.store(Boot(kernel=boot_file("old", ELF)))
    with pytest.raises(Missing, match=f"no file new in {tree.boot}"):
        await store.store(Boot(kernel="new"), before)


async def test_a_file_that_is_gone_from_the_store_too_is_missed(store, tree, boot_file):
    boot = Boot(kernel=boot_file("vmlinux", ELF))
    before = await store.store(boot)
    os.unlink(store.path(before.kernel))
    Path(tree.boot, "vmlinux").unlink()
    with pytest.raises(Missing):
        await store.store(boot, before)


@pytest.mark.parametrize(
    ("content", "kind"),
    [(bytes(64 << 10), FirmwareFormat.FLASH), (make_elf(1000), FirmwareFormat.ELF)],
)
async def test_a_firmware_is_kept_and_its_format_known(store, tree, boot_file, content, kind):
    boot = Boot(firmware=boot_file("uefi.fd", content))
    stored = await store.store(boot)
    assert stored == BootFiles(firmware=digest(content), firmware_format=kind, source=boot)
    Path(tree.boot, "uefi.fd").unlink()
    assert await KernelStore(tree).store(boot, stored) == stored
    # One that came with a snapshot is known by its content alone.
    boot = Boot(firmware=f"sha256:{digest(content)}")
    arrived = BootFiles(firmware=digest(content), source=boot)
    assert (await store.store(boot, arrived)).firmware_format is kind


@pytest.mark.parametrize("size", [1, (64 << 10) + 1, kernel_module.MAXIMUM_FIRMWARE + (64 << 10)])
async def test_what_is_no_firmware_is_refused(store, tree, boot_file, size):
    boot = Boot(firmware=boot_file("uefi.fd", bytes(size)))
    for act in (store.check, store.store):
        with pytest.raises(UnknownFormat, match=rf"uefi\.fd is no firmware: {size} bytes"):
            await act(boot)
    assert names(tree) == []


async def test_the_elf_of_an_elf_is_itself(store, tree, boot_file):
    stored = await store.store(Boot(kernel=boot_file("vmlinux", ELF)))
    assert await store.elf(stored.kernel) == store.path(stored.kernel)
    assert names(tree) == [stored.kernel]


async def test_the_elf_of_a_bzimage_is_unpacked_beside_the_original(store, tree, boot_file):
    stored = await store.store(Boot(kernel=boot_file("vmlinuz", IMAGE)))
    path = await store.elf(stored.kernel)
    assert Path(path).read_bytes() == ELF
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o444
    assert Path(store.path(stored.kernel)).read_bytes() == IMAGE
    assert names(tree) == [stored.kernel, f"{stored.kernel}.elf"]


async def test_a_kernel_is_unpacked_once(store, boot_file, monkeypatch):
    stored = await store.store(Boot(kernel=boot_file("vmlinuz", IMAGE)))
    path = await store.elf(stored.kernel)
    monkeypatch.setattr(kernel_module, "unpack_kernel", None)
    assert await store.elf(stored.kernel) == path


async def test_a_kernel_that_does_not_unpack_leaves_nothing(store, tree, boot_file):
    payload = make_payload("gzip", ELF)
    image = make_bzimage(payload[:5000] + payload[-4:])
    stored = await store.store(Boot(kernel=boot_file("vmlinuz", image)))
    with pytest.raises(Damaged, match="^vmlinuz has gzip data that ends early"):
        await store.elf(stored.kernel, "vmlinuz")
    assert names(tree) == [stored.kernel]


async def test_what_is_no_kernel_is_refused_by_name_and_not_stored(store, tree, boot_file):
    boot = Boot(kernel=boot_file("notes", b"hello"))
    for refuse in (store.check, store.store):
        with pytest.raises(UnknownFormat, match="^notes is no kernel"):
            await refuse(boot)
    assert names(tree) == []


async def test_a_kernel_that_is_cut_off_is_refused_by_name(store, tree, boot_file):
    boot = Boot(kernel=boot_file("vmlinux", ELF[:-1]))
    with pytest.raises(Damaged, match="^vmlinux is cut off"):
        await store.store(boot)
    assert names(tree) == []


async def test_an_empty_initrd_is_refused(store, boot_file):
    boot = Boot(kernel=boot_file("vmlinux", ELF), initrd=boot_file("initrd", b""))
    with pytest.raises(Damaged, match="^initrd is empty"):
        await store.store(boot)


async def test_what_is_missing_is_said_when_it_is_written(store, boot_file):
    boot_file("vmlinux", ELF)
    await store.check(None)
    await store.check(Boot(kernel="vmlinux"))
    for boot in (Boot(kernel="vmlinuz"), Boot(kernel="vmlinux", initrd="initrd")):
        with pytest.raises(Missing, match="there is no file"):
            await store.check(boot)


@pytest.mark.parametrize("name", ["../vmlinux", "sub/vmlinux", ".hidden", ".."])
async def test_a_name_stays_in_the_boot_directory(store, tree, name):
    Path(tree.root, "vmlinux").write_bytes(ELF)
    with pytest.raises(Invalid, match="not the name of a file"):
        await store.store(Boot(kernel=name))


async def test_a_name_is_not_followed_through_a_link(store, tree, tmp_path):
    (tmp_path / "secret").write_bytes(ELF)
    Path(tree.boot, "vmlinux").symlink_to(tmp_path / "secret")
    with pytest.raises(Invalid, match="no regular file"):
        await store.store(Boot(kernel="vmlinux"))


@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
async def test_what_is_no_file_is_refused_without_waiting(store, tmp_path, kind):
    path = f"{tmp_path}/kernel"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        os.mkdir(path)
    else:
        path = "/dev/zero"
    for refuse in (store.check, store.store):
        with pytest.raises(Invalid, match="no regular file"):
            await refuse(Boot(kernel=path))


async def test_a_file_larger_than_anything_is_refused(store, tmp_path):
    path = tmp_path / "kernel"
    with path.open("wb") as file:
        file.write(ELF)
        file.truncate(kernel_module.MAXIMUM_FILE + 1)
    with pytest.raises(Invalid, match="nothing that large is booted"):
        await store.store(Boot(kernel=str(path)))


@pytest.mark.parametrize("change", ["longer", "shorter", "other"])
async def test_a_file_that_changes_while_it_is_read_is_refused(
    store, tree, boot_file, monkeypatch, change
):
    boot = Boot(kernel=boot_file("vmlinux", ELF))
    path = Path(tree.boot, "vmlinux")
    pread = os.pread
    changes = {
        "longer": lambda: path.open("ab").write(b"more"),
        "shorter": lambda: os.truncate(path, len(ELF) - 1),
        "other": lambda: os.utime(path),
    }

    def changing(file, size, offset):
        if size == kernel_module._PIECE and offset == 0:
            changes[change]()
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", changing)
    with pytest.raises(Busy, match="vmlinux changes while it is read"):
        await store.store(boot)
    assert names(tree) == []


async def test_without_room_nothing_half_made_stays(store, tree, boot_file, monkeypatch):
    boot = Boot(kernel=boot_file("vmlinux", ELF))

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(NoSpace):
            await store.store(boot)
    assert names(tree) == []
    assert (await store.store(boot)).kernel == digest(ELF)


async def test_what_an_agent_that_died_left_half_made_is_removed(store, tree, boot_file):
    Path(tree.kernels, ".0123456789abcdef").write_bytes(b"half")
    stored = await store.store(Boot(kernel=boot_file("vmlinux", ELF)))
    assert names(tree) == [stored.kernel]
