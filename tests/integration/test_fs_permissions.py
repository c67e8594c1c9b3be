"""Three users (the owner, a member of the group, a stranger) against every file and every verb."""

import grp
import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

OWNER, MEMBER, STRANGER = 4001, 4002, 4003
USERS = ("owner", "member", "stranger")
READ_ONLY = ("id", "unit", "pid", "info.json", "error", "stats")
LINKS = ("console.live", "console.sock")


@pytest.fixture(scope="module")
def group() -> int:
    return grp.getgrnam("cocoon").gr_gid


@pytest.fixture
def as_user(group):
    """`as_user(name, command)` runs a shell command as that user."""
    users = {"owner": (OWNER, [group]), "member": (MEMBER, [group]), "stranger": (STRANGER, [])}

    def run(name: str, command: str) -> "subprocess.CompletedProcess[str]":
        uid, groups = users[name]
        return subprocess.run(
            ["bash", "-c", command], user=uid, group=uid, extra_groups=groups, cwd="/",
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    return run


@pytest.fixture
def vm(make_vm, group) -> Any:
    """A VM that belongs to the owner, ready to be started."""
    vm = make_vm(stop_timeout=5)
    os.chown(vm.path, OWNER, group)
    return vm


def ways(as_user: Any, user: str, path: Path) -> str:
    done = as_user(user, f"(: < {path}) && printf r; (: >> {path}) && printf w; :")
    for line in done.stderr.splitlines():
        assert line.endswith("Permission denied")
    return done.stdout


def test_every_file_of_the_host(agent, as_user):
    expected = {
        "README": ("r", "r", "r"),
        "version": ("r", "r", "r"),
        "doctor": ("r", "r", "r"),
        "create": ("rw", "rw", ""),
        "errors": ("r", "r", ""),
        "events": ("r", "r", ""),
        "events.live": ("r", "r", ""),
        "index.json": ("r", "r", ""),
    }
    files = [path for path in agent.mount.iterdir() if not path.is_dir()]
    assert {path.name for path in files} == set(expected)
    for path in files:
        assert tuple(ways(as_user, user, path) for user in USERS) == expected[path.name], path.name


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (0o770, ("rw", "rw", "")),
        (0o700, ("rw", "", "")),
        (0o750, ("rw", "r", "")),
        (0o755, ("rw", "r", "r")),
        (0o777, ("rw", "rw", "rw")),
        (0o070, ("", "rw", "")),
    ],
)
def test_every_file_of_a_vm(vm, as_user, mode, expected):
    os.chmod(vm.path, mode)
    for name in os.listdir(vm.path):
        # The socket is there while the VM has a process, and tested there.
        if name == "console.sock" or (vm.path / name).is_dir():
            continue
        shown = name in READ_ONLY or name in LINKS
        wanted = tuple(way.replace("w", "") if shown else way for way in expected)
        assert tuple(ways(as_user, user, vm.path / name) for user in USERS) == wanted, name


@pytest.mark.parametrize(
    ("verb", "state"),
    [("start", "running"), ("pause", "paused"), ("resume", "running"), ("restart", "running"),
     ("stop", "stopped"), ("kill", "stopped")],
)  # fmt: skip
@pytest.mark.parametrize("user", USERS)
def test_every_verb(vm, as_user, user, verb, state):
    for before in {"start": [], "resume": ["start", "pause"]}.get(verb, ["start"]):
        vm.verb(before)
    before_state = vm.state
    done = as_user(user, f"echo {verb} > {vm.path}/state")
    may = user != "stranger"
    assert (done.returncode == 0) is may, done.stderr
    assert vm.state == (state if may else before_state)


@pytest.mark.parametrize("user", USERS)
def test_creating_and_removing(agent, as_user, vm_name, group, user):
    path = agent.mount / "vms" / vm_name()
    may = user != "stranger"
    assert (as_user(user, f"mkdir {path}").returncode == 0) is may
    if may:
        found = path.stat()
        uid = OWNER if user == "owner" else MEMBER
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (uid, group, 0o770)
        other = "member" if user == "owner" else "owner"
        for who in (other, "stranger"):
            assert as_user(who, f"rmdir {path}").returncode != 0
        assert as_user(user, f"mv {path} {path}-new && mv {path}-new {path}").returncode == 0
        assert as_user(user, f"rmdir {path}").returncode == 0
    assert not path.exists()


@pytest.mark.parametrize("user", USERS)
def test_the_creation_in_one_write(agent, as_user, vm_name, user):
    name = vm_name()
    done = as_user(user, f"echo '{json.dumps({'name': name})}' > {agent.mount}/create")
    path = agent.mount / "vms" / name
    assert path.exists() is (done.returncode == 0) is (user != "stranger")
    if path.exists():
        path.rmdir()


@pytest.mark.parametrize("user", USERS)
def test_only_the_owner_renames_delegates_and_removes(vm, as_user, group, user):
    os.chmod(vm.path, 0o777)
    may = user == "owner"
    for command in (
        f"mv {vm.path} {vm.path}-new && mv {vm.path}-new {vm.path}",
        f"chmod 750 {vm.path}",
        f"chgrp {group} {vm.path}",
        f"rmdir {vm.path}",
    ):
        assert (as_user(user, command).returncode == 0) is may, command


def test_delegation_to_an_outsider_persists(agent, vm, as_user):
    os.chown(vm.path, STRANGER, STRANGER)
    os.chmod(vm.path, 0o700)
    agent.restart()
    found = vm.path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (STRANGER, STRANGER, 0o700)
    assert as_user("stranger", f"echo start > {vm.path}/state").returncode == 0
    assert as_user("owner", f"cat {vm.path}/state").returncode != 0
    assert as_user("stranger", f"echo kill > {vm.path}/state").returncode == 0
    # What comes and goes in `vms` stays the group's affair.
    assert as_user("stranger", f"rmdir {vm.path}").returncode != 0


@pytest.mark.parametrize("user", USERS)
def test_paths_of_the_host_are_for_root_alone(agent, vm, as_user, user, guests):
    os.chmod(vm.path, 0o777)
    path = "/etc/shadow"
    for name, value in (
        ("boot", {"kernel": path}),
        ("boot", {"kernel": str(guests.guest), "initrd": path}),
        ("disks", [{"path": path}]),
        ("config", {"boot": {"kernel": path}}),
    ):
        done = as_user(user, f"echo '{json.dumps(value)}' > {vm.path}/{name}")
        assert "Operation not permitted" in done.stderr
        assert "only root" in vm.read("error")
    if user != "stranger":
        document = json.dumps({"name": "mine", "boot": {"kernel": path}})
        done = as_user(user, f"echo '{document}' > {agent.mount}/create")
        assert "Operation not permitted" in done.stderr
        assert not (agent.mount / "vms" / "mine").exists()


def test_a_user_may_name_what_root_offers_and_what_is_there_already(agent, vm, as_user, guests):
    offered = agent.root_dir / "boot" / "offered"
    offered.write_bytes(guests.guest.read_bytes())
    try:
        # Writing back what root configured changes nothing, so it is no naming.
        done = as_user(
            "owner", f"cat {vm.path}/config > /dev/shm/own && cat /dev/shm/own > {vm.path}/config"
        )
        assert done.returncode == 0, done.stderr
        done = as_user("owner", f'echo \'{{"kernel": "offered"}}\' > {vm.path}/boot')
        assert done.returncode == 0, done.stderr
        assert as_user("owner", f"echo start > {vm.path}/state").returncode == 0
        vm.wait_counting()
    finally:
        offered.unlink()


def test_the_console_socket_follows_owner_group_and_mode(vm, as_user, group):
    vm.verb("start")
    vm.wait_counting()
    connect = (
        "python3 -c 'import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])' "
        f"{vm.path}/console.sock"
    )
    resolved = os.readlink(vm.path / "console.sock")
    direct = connect.replace(str(vm.path / "console.sock"), resolved)
    for mode, expected in ((0o770, [True, True, False]), (0o700, [True, False, False])):
        os.chmod(vm.path, mode)
        for command in (connect, direct):
            assert [as_user(user, command).returncode == 0 for user in USERS] == expected


def test_the_console_stream_is_as_private_as_its_vm(vm, as_user):
    os.chmod(vm.path, 0o700)
    stream = (vm.path / "console.live").resolve()
    assert [ways(as_user, user, stream) for user in USERS] == ["r", "", ""]


def test_who_did_it_is_in_errors(agent, vm, as_user):
    as_user("member", f"echo bogus > {vm.path}/state")
    last = (agent.mount / "errors").read_text().splitlines()[-1]
    assert f" {MEMBER} vms/{vm.name}/state " in last
