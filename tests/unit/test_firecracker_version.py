import os
from pathlib import Path

import pytest

from agent.model.errors import Failed, Missing, Unsupported
from agent.vmm.firecracker import Firecracker
from agent.vmm.program import is_dynamic

pytestmark = pytest.mark.anyio


@pytest.fixture
def program(tmp_path):
    """`program(output)` makes a firecracker that prints that, and counts how often it was asked."""

    def make(output, name="firecracker", status=0):
        path = tmp_path / name
        fresh = tmp_path / "fresh"
        fresh.write_text(
            f'#!/bin/sh\n[ "$*" = --version ] || exit 9\necho asked >>{tmp_path}/asked\n'
            f"cat <<'END'\n{output}\nEND\nexit {status}\n"
        )
        fresh.chmod(0o755)
        fresh.rename(path)
        return str(path)

    make.count = lambda: (tmp_path / "asked").read_text().count("asked")
    return make


async def test_the_program_tells_its_version(program):
    path = program("Firecracker v1.12.1\n\n2026 [anonymous-instance:main] exiting successfully")
    version = await Firecracker(path).version()
    assert (version.binary, version.text, version.numbers) == (path, "1.12.1", (1, 12, 1))


async def test_a_development_version_counts_as_what_it_will_be(program):
    version = await Firecracker(program("Firecracker v1.17.0-dev")).version()
    assert version.numbers == (1, 17, 0)


async def test_an_old_one_is_refused_with_the_remedy(program):
    with pytest.raises(
        Unsupported, match=r"Firecracker 1\.11\.0: versions from 1\.12 work.*releases"
    ):
        await Firecracker(program("Firecracker v1.11.0")).version()


async def test_it_is_asked_once_until_it_changes(program):
    driver = Firecracker(program("Firecracker v1.12.1"))
    assert [(await driver.version()).text for _ in range(3)] == ["1.12.1"] * 3
    assert program.count() == 1
    program("Firecracker v1.16.1")
    assert [(await driver.version()).text for _ in range(3)] == ["1.16.1"] * 3
    assert program.count() == 2


async def test_links_to_it_are_resolved(program, tmp_path):
    path = program("Firecracker v1.12.1", name="firecracker-v1.12.1")
    (tmp_path / "current").symlink_to(path)
    assert (await Firecracker(f"{tmp_path}/current").version()).binary == path


async def test_it_is_found_on_the_path(program, tmp_path, monkeypatch):
    path = program("Firecracker v1.12.1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert (await Firecracker().version()).binary == path


@pytest.mark.parametrize("path", ["", "/nowhere/firecracker", "no-such-program"])
async def test_a_missing_one_is_named_with_the_remedy(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Missing, match=r"no program firecracker .*agent\.toml") as caught:
        await Firecracker(path).version()
    assert ("/nowhere" in str(caught.value)) == path.startswith("/")


async def test_a_program_that_is_something_else_is_a_failure(program):
    with pytest.raises(Failed, match="does not tell a version"):
        await Firecracker(program("hello")).version()


async def test_a_program_that_cannot_be_run_is_a_failure(tmp_path):
    path = tmp_path / "firecracker"
    path.write_bytes(b"\x7fELF nonsense")
    path.chmod(0o755)
    with pytest.raises(Failed, match="cannot be run"):
        await Firecracker(str(path)).version()


def test_a_program_with_a_loader_is_dynamic():
    assert is_dynamic(os.path.realpath("/bin/sh"))


def test_a_program_without_one_is_not(tmp_path):
    header = bytearray(64)
    header[:4] = b"\x7fELF"
    path = Path(tmp_path, "static")
    path.write_bytes(bytes(header))
    assert not is_dynamic(str(path))


def test_a_script_needs_the_host_too(tmp_path):
    path = Path(tmp_path, "script")
    path.write_text("#!/bin/sh\n")
    assert is_dynamic(str(path))
