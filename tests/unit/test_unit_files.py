import configparser
import json
import os
import stat

import pytest

from agent.systemd.drop_in import FILE, drop_in, write_drop_in
from agent.systemd.exit_record import ExitRecord, read_exit_record
from agent.systemd.jail import make_jail
from agent.systemd.users import remove_user, write_user


def test_the_drop_in_names_the_helpers_and_what_runs_them():
    text = drop_in("/usr/lib/cocoon-host/helpers", "/usr/bin/python3")
    assert '-+"/usr/bin/python3" -I -S "/usr/lib/cocoon-host/helpers/stop.py"' in text
    assert '-+"/usr/bin/python3" -I -S "/usr/lib/cocoon-host/helpers/stop_post.py"' in text


def test_the_drop_in_quotes_odd_paths():
    text = drop_in('/a b/%n/$x/"', "/usr/bin/python3")
    assert '"/a b/%%n/$$x/\\"/stop.py"' in text


def test_the_drop_in_is_a_unit_file_with_no_setting_left_open():
    parser = configparser.RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read_string(drop_in("/helpers", "/usr/bin/python3"))
    assert parser.sections() == ["Unit", "Service"]
    for name, value in parser["Service"].items():
        assert value or name in ("CapabilityBoundingSet", "AmbientCapabilities")


def test_what_the_drop_in_denies_is_no_more_than_every_vmm_can_do_without():
    lines = [
        line.removeprefix("SystemCallFilter=~").split()
        for line in drop_in("/helpers", "/usr/bin/python3").splitlines()
        if line.startswith("SystemCallFilter=")
    ]
    denied = {word for line in lines for word in line}
    # Units deny that themselves, but for those of VMMs that tie threads to CPUs.
    assert denied & {"@resources", "sched_setaffinity"} == set()
    assert {"sched_setscheduler", "setpriority", "setrlimit"} <= denied


def test_the_drop_in_is_written_once(tmp_path):
    directory = tmp_path / "unit.d"
    assert write_drop_in("text", str(directory))
    assert (directory / FILE).read_text() == "text"
    assert not write_drop_in("text", str(directory))
    assert write_drop_in("other", str(directory))
    assert (directory / FILE).read_text() == "other"
    assert [path.name for path in directory.iterdir()] == [FILE]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_skeleton_can_be_passed_by_a_vmm_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        make_jail(str(tmp_path / "jail"))
    finally:
        os.umask(before)
    for path in [tmp_path / "jail", *(tmp_path / "jail").rglob("*")]:
        status = path.lstat()
        assert stat.S_ISDIR(status.st_mode) or status.st_size == 0
        assert not status.st_mode & 0o022
        if path.is_dir():
            assert status.st_mode & 0o555 == 0o555


def test_the_skeleton_is_completed_and_otherwise_left_alone(tmp_path):
    jail = tmp_path / "jail"
    make_jail(str(jail))
    before = {path: path.lstat().st_ino for path in jail.rglob("*")}
    (jail / "dev/kvm").unlink()
    make_jail(str(jail))
    after = {path: path.lstat().st_ino for path in jail.rglob("*")}
    assert before.keys() == after.keys()
    assert {path for path in before if before[path] != after[path]} <= {jail / "dev/kvm"}


def test_a_user_is_made_known_and_forgotten(tmp_path):
    directory = tmp_path / "userdb"
    write_user(70000, str(directory))
    record = directory / "70000.user"
    assert json.loads(record.read_text()) == {"userName": "cvm-70000", "uid": 70000, "gid": 70000}
    assert stat.S_IMODE(record.stat().st_mode) == 0o644
    before = record.stat().st_ino
    write_user(70000, str(directory))
    assert record.stat().st_ino == before
    remove_user(70000, str(directory))
    remove_user(70000, str(directory))
    assert list(directory.iterdir()) == []


def test_a_damaged_user_record_is_written_again(tmp_path):
    record = tmp_path / "70000.user"
    record.write_text('{"userName":')
    write_user(70000, str(tmp_path))
    assert json.loads(record.read_text())["uid"] == 70000


def test_an_exit_record_is_read(tmp_path):
    path = tmp_path / "exit"
    path.write_text("exit-code exited 3 1700000000.250000 d156e123ad7412d8006d4feef3fd81ab\n")
    assert read_exit_record(str(path)) == ExitRecord(
        "exit-code", "exited", "3", 1700000000.25, "d156e123ad7412d8006d4feef3fd81ab"
    )


def test_an_exit_record_of_a_start_without_a_process_has_no_status(tmp_path):
    path = tmp_path / "exit"
    path.write_text("resources   1700000000.0 ab\n")
    assert read_exit_record(str(path)) == ExitRecord("resources", "", "", 1700000000.0, "ab")


@pytest.mark.parametrize("text", ["", "success", "a b c d e\n", "a b c 1 e f\n", "\xff" * 5000])
def test_what_is_no_exit_record_reads_as_none(tmp_path, text):
    path = tmp_path / "exit"
    path.write_text(text)
    assert read_exit_record(str(path)) is None


def test_no_exit_record_reads_as_none(tmp_path):
    assert read_exit_record(str(tmp_path / "exit")) is None


def test_an_exit_record_is_never_a_link(tmp_path):
    (tmp_path / "secret").write_text("success exited 0 1.0 ab\n")
    (tmp_path / "exit").symlink_to("secret")
    with pytest.raises(OSError, match="symbolic links"):
        read_exit_record(str(tmp_path / "exit"))
