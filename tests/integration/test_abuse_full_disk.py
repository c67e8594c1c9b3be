"""A disk without a byte left: the agent starts, and what is there can be removed."""

import contextlib
import subprocess

import pytest


def command(*words):
    subprocess.run(words, check=True, timeout=60)


@pytest.fixture(params=["ext4", "xfs"])
def small(agent, request, tmp_path):
    """Let the agent keep everything on a small filesystem."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(320 << 20 if request.param == "xfs" else 96 << 20)
    command(f"mkfs.{request.param}", "-q", str(image))
    agent.stop()
    command("mount", "-o", "loop", str(image), str(agent.root_dir))
    agent.start()
    yield agent.root_dir
    agent.stop()
    command("umount", str(agent.root_dir))
    agent.start()


def fill(directory):
    for _ in range(2):
        with (directory / "filler").open("ab", buffering=0) as file:
            for size in (1 << 20, 4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))
        command("sync", "-f", str(directory))


def test_what_fills_a_disk_can_be_removed(agent, small, make_vm):
    vm, idle = make_vm(memory="32M"), make_vm(storage="8M")
    snapshot = agent.mount / "snapshots" / "filling.tar"
    vm.verb("start")
    vm.write("snapshot", snapshot.stem)
    idle.verb("start")
    idle.verb("kill")
    fill(small)
    agent.stop()
    command("rm", "-rf", "/run/cocoon/run-id")  # as after a boot
    fill(small)
    agent.start()
    fill(small)
    snapshot.unlink()
    fill(small)
    idle.path.rmdir()
    (small / "filler").unlink()
    agent.restart()
    assert not snapshot.exists()
    assert not idle.path.exists()
    assert vm.state == "running"
    vm.verb("kill")
    vm.path.rmdir()
