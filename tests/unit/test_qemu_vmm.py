"""What QEMU is told to save and to load, in which order, and what its answers mean."""

import contextlib
import errno
import os

import pytest

from agent.model import canonical
from agent.model.errors import Damaged, Failed, NoSpace, Unsupported
from agent.vmm.driver import VmmState
from agent.vmm.qemu import Qemu, QemuVmm

pytestmark = pytest.mark.anyio

STATE, MEMORY = f"{canonical.VM}/save/vmstate", f"{canonical.VM}/save/mem"


class Qmp:
    """A QEMU that does as it is told, and writes and reads the state."""

    def __init__(self):
        self.told = []
        self.status = "paused"
        self.kvm = False
        self.outcome = "completed"
        self.saved = b"stream"
        self.loaded = b""
        self.descriptor = -1
        self.busy = 0
        self.broken = False

    async def execute(self, command, arguments=None, *, descriptor=None, timeout):
        self.told.append(command)
        match command:
            case "cont" if self.busy:
                self.busy -= 1
                raise Failed("QEMU: Migration is not finalized yet")
            case "cont" if self.broken:
                raise Failed("QEMU: there is no guest")
            case "query-status":
                return {"status": self.status}
            case "query-kvm":
                return {"enabled": self.kvm, "present": True}
            case "query-migrate":
                return {"status": "failed", "error-desc": "Unable to write: no space"}
            case "getfd":
                self.descriptor = os.dup(descriptor)
            case "migrate":
                os.write(self.descriptor, self.saved)
                os.close(self.descriptor)
                self.status = "postmigrate"
            case "migrate-incoming":
                self.loaded = os.read(self.descriptor, 100)
                os.close(self.descriptor)
        return {}

    async def execute_all(self, *commands, timeout):
        return [await self.execute(*command, timeout=timeout) for command in commands]

    async def wait_for(self, name, key, values, timeout):
        assert (name, key) == ("MIGRATION", "status")
        assert self.outcome in values
        return self.outcome


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "save").mkdir()
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield lambda: contextlib.nullcontext(descriptor)
    os.close(descriptor)


@pytest.fixture
def qmp():
    return Qmp()


@pytest.fixture
def vmm(qmp, directory):
    return QemuVmm(qmp, directory)


async def test_what_was_saved_is_what_is_loaded(vmm, qmp, tmp_path):
    await vmm.snapshot(STATE, MEMORY)
    assert qmp.told.index("migrate-set-capabilities") < qmp.told.index("migrate")
    state = tmp_path / "save/vmstate"
    assert state.stat().st_mode & 0o777 == 0o600
    assert state.read_bytes().endswith(b"stream")
    qmp.told.clear()
    await vmm.load(STATE, MEMORY)
    assert qmp.loaded == b"stream"
    assert qmp.told.index("migrate-set-capabilities") < qmp.told.index("migrate-incoming")
    assert qmp.told[-1] == "cont"


async def test_a_guest_may_stay_paused_after_its_load(vmm, qmp):
    await vmm.snapshot(STATE, MEMORY)
    await vmm.load(STATE, MEMORY, resume=False)
    assert "cont" not in qmp.told


@pytest.mark.parametrize("prepared", [False, True])
async def test_a_guest_that_was_saved_already_is_stopped_anew(vmm, qmp, tmp_path, prepared):
    await vmm.snapshot(STATE, MEMORY)
    os.unlink(tmp_path / "save/vmstate")
    if prepared:
        await vmm.prepare_snapshot()
    qmp.told.clear()
    await vmm.snapshot(STATE, MEMORY)
    assert qmp.told.index("cont") + 1 == qmp.told.index("stop") < qmp.told.index("migrate")
    assert ("query-status" in qmp.told) == (not prepared)


async def test_what_was_prepared_is_not_asked_while_the_guest_stands_still(vmm, qmp):
    qmp.status = "running"
    await vmm.prepare_snapshot()
    qmp.told.clear()
    await vmm.pause()
    await vmm.snapshot(STATE, MEMORY)
    assert qmp.told == ["stop", "getfd", "migrate"]


async def test_a_guest_goes_on_once_qemu_has_done_with_its_state(vmm, qmp):
    qmp.busy = 3
    await vmm.resume()
    assert qmp.told == ["cont"] * 4
    qmp.broken = True
    with pytest.raises(Failed, match="no guest"):
        await vmm.resume()


async def test_a_state_that_could_not_be_saved_is_a_failure_in_qemus_words(vmm, qmp):
    qmp.outcome = "failed"
    with pytest.raises(Failed, match="Unable to write: no space"):
        await vmm.snapshot(STATE, MEMORY)


async def test_a_state_goes_on_only_where_the_guest_runs_the_same_way(vmm, qmp, tmp_path):
    await vmm.snapshot(STATE, MEMORY)
    qmp.kvm = True
    with pytest.raises(Unsupported, match="ran on QEMU's translator when it was saved, here.*KVM"):
        await vmm.load(STATE, MEMORY)
    with pytest.raises(Unsupported):
        Qemu(accelerated=True).check_state((tmp_path / "save/vmstate").read_bytes())
    Qemu(accelerated=False).check_state((tmp_path / "save/vmstate").read_bytes())
    assert "migrate-incoming" not in qmp.told


@pytest.mark.parametrize("place", [0, 14, 40, 100, -1])
async def test_a_bit_that_turned_in_a_state_is_noticed(vmm, qmp, tmp_path, place):
    await vmm.snapshot(STATE, MEMORY)
    state = tmp_path / "save/vmstate"
    content = bytearray(state.read_bytes())
    Qemu().check_state(bytes(content))
    content[place] ^= 4
    state.write_bytes(content)
    with pytest.raises(Damaged):
        Qemu().check_state(bytes(content))
    with pytest.raises(Damaged):
        await vmm.load(STATE, MEMORY)
    assert "migrate-incoming" not in qmp.told


async def test_a_state_that_finds_no_room_is_told_from_other_failures(vmm, qmp, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    qmp.outcome = "failed"
    with pytest.raises(NoSpace):
        await vmm.snapshot(STATE, MEMORY)


@pytest.mark.parametrize("content", [b"", b"short", bytes(100)])
async def test_what_is_no_state_never_reaches_qemu(vmm, qmp, tmp_path, content):
    (tmp_path / "save/vmstate").write_bytes(content)
    with pytest.raises(Damaged, match="not a state"):
        await vmm.load(STATE, MEMORY)
    assert "getfd" not in qmp.told


async def test_links_in_the_vms_directory_are_not_followed(vmm, tmp_path):
    target = tmp_path / "elsewhere"
    (tmp_path / "save/vmstate").symlink_to(target)
    with pytest.raises(Failed):
        await vmm.snapshot(STATE, MEMORY)
    assert not target.exists()
    (tmp_path / "save/vmstate").unlink()
    (tmp_path / "save").rmdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "save").symlink_to(tmp_path / "other")
    with pytest.raises(Failed):
        await vmm.snapshot(STATE, MEMORY)
    assert not list((tmp_path / "other").iterdir())


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("running", VmmState.RUNNING),
        ("paused", VmmState.PAUSED),
        ("postmigrate", VmmState.PAUSED),
        ("inmigrate", VmmState.EMPTY),
    ],
)
async def test_states_are_the_protocols(vmm, qmp, status, state):
    qmp.status = status
    assert await vmm.state() is state


async def test_a_guest_that_kvm_gave_up_does_not_run(vmm, qmp):
    qmp.status = "internal-error"
    with pytest.raises(Failed, match="cannot go on: internal-error"):
        await vmm.state()
