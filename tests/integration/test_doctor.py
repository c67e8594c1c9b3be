"""The doctor on a real host: by the agent's file, by the command with and without an agent."""

import json
import os
import subprocess
import sys
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
NAMES = {
    *("kvm", "firecracker", "qemu", "auto", "systemd", "cgroups", "users", "machined", "fuse"),
    *("userfaultfd", "directories", "space", "reflinks", "group", "clock"),
}


def doctor(*options, environment=None, **settings):
    command = [sys.executable, "-m", "agent.cli.main", "doctor", *options]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=TREE,
        env={**os.environ, **(environment or {})},
        **settings,
    )


def by_name(text):
    """The lines, by the check's name: level and sentence."""
    parts = [line.split(maxsplit=2) for line in text.splitlines()]
    return {name: (level, sentence) for level, name, sentence in parts}


def test_the_agent_and_the_command_find_the_same(agent, until):
    file = agent.mount / "doctor"
    shown = until(lambda: text if set(by_name(text := file.read_text())) >= NAMES else "")
    assert file.stat().st_size == len(file.read_bytes())
    done = doctor()
    assert (done.returncode, done.stderr) == (0, "")
    told, asked = by_name(shown), by_name(done.stdout)
    assert list(told) == list(asked)
    for name in told:
        assert told[name][0] == asked[name][0], (told[name], asked[name])
    # What nothing changes meanwhile reads the same.
    same = NAMES - {"space", "clock"}
    assert {name: told[name] for name in same} == {name: asked[name] for name in same}
    # The agent may ask the kernel whether the clock is right, although it may not set it.
    assert all("synchronised" in found["clock"][1] for found in (told, asked))
    agent.stop()
    alone = doctor("--json")
    assert alone.returncode == 0
    assert {each["name"]: each["level"] for each in json.loads(alone.stdout)} == {
        name: level for name, (level, _) in asked.items()
    }


def test_what_is_broken_fails_with_a_remedy(agent):
    done = doctor(environment={"PATH": "/none", "COCOON_GROUP": "vm-users"})
    found = by_name(done.stdout)
    assert done.returncode == 1
    assert found["group"][0] == "fail"
    assert found["group"][1].endswith("groupadd --system vm-users, then restart the agent")
    assert found["qemu"][0] == "warn"
    assert found["qemu"][1].endswith("apt-get install qemu-system-x86")
    assert found["auto"][0] == "fail"
    assert found["systemd"][0] == "ok"


def test_without_a_bus_all_else_is_told(agent):
    done = doctor(environment={"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/none"})
    found = by_name(done.stdout)
    assert done.returncode == 1
    assert found["systemd"][0] == "fail"
    assert found["systemd"][1].endswith("systemctl start dbus.socket")
    assert {name for name in found if found[name][0] == "fail"} == {"systemd"}


def test_who_is_not_root_is_told_what_was_not_tried(agent):
    done = doctor(user=65534, group=65534, extra_groups=[])
    found = by_name(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    unsure = {name for name in found if found[name][1].endswith("run it as root")}
    assert unsure == {"kvm", "auto", "reflinks"}
    assert {found[name][0] for name in unsure} == {"warn"}
    assert found["directories"][0] == "ok"


def test_settings_that_cannot_be_are_one_sentence(tmp_path):
    (tmp_path / "agent.toml").write_text("root_dir = 'relative'\n")
    done = doctor("--config", str(tmp_path / "agent.toml"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("cocoon-host: ")
    assert done.stderr.count("\n") == 1
