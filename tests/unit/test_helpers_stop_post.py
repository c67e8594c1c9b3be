import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.helpers import stop_post
from agent.systemd.exit_record import read_exit_record

HELPER = Path(stop_post.__file__)
INVOCATION = "d156e123ad7412d8006d4feef3fd81ab"


def end(run: Path, result: str = "success", code: str = "exited", status: str = "0") -> None:
    environment = {
        "SERVICE_RESULT": result,
        "EXIT_CODE": code,
        "EXIT_STATUS": status,
        "INVOCATION_ID": INVOCATION,
    }
    subprocess.run([sys.executable, "-I", "-S", HELPER, run], env=environment, check=True)


@pytest.fixture
def run_directory(tmp_path) -> Path:
    (tmp_path / "run/sock").mkdir(parents=True)
    return tmp_path / "run"


def test_it_records_how_the_process_ended(run_directory):
    before = time.time()
    end(run_directory, "signal", "killed", "KILL")
    record = read_exit_record(str(run_directory / "exit"))
    assert record is not None
    assert (record.result, record.code, record.status) == ("signal", "killed", "KILL")
    assert record.invocation == INVOCATION
    assert before - 1 < record.time < time.time() + 1


def test_the_last_record_counts(run_directory):
    end(run_directory, "signal", "killed", "KILL")
    end(run_directory)
    record = read_exit_record(str(run_directory / "exit"))
    assert record is not None
    assert record.result == "success"
    assert sorted(path.name for path in run_directory.iterdir()) == ["exit", "sock"]


def test_a_start_that_had_no_process_is_recorded_without_a_status(run_directory):
    end(run_directory, "resources", "", "")
    record = read_exit_record(str(run_directory / "exit"))
    assert record is not None
    assert (record.result, record.code, record.status) == ("resources", "", "")


def test_sockets_are_removed(run_directory):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(run_directory / "sock/api"))
    (run_directory / "sock/api.lock").touch()
    end(run_directory)
    assert list((run_directory / "sock").iterdir()) == []


def test_links_go_and_what_they_point_to_stays(run_directory, tmp_path):
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "file").write_text("kept")
    (run_directory / "sock/api").symlink_to(treasure / "file")
    (run_directory / "sock/directory").symlink_to(treasure)
    (run_directory / "sock/below").mkdir()
    (run_directory / "sock/below/link").symlink_to(treasure)
    os.link(treasure / "file", run_directory / "sock/hard")
    end(run_directory)
    assert list((run_directory / "sock").iterdir()) == []
    assert (treasure / "file").read_text() == "kept"


def test_a_link_in_the_place_of_the_directory_is_not_followed(run_directory, tmp_path):
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "file").touch()
    (run_directory / "sock").rmdir()
    (run_directory / "sock").symlink_to(treasure)
    with pytest.raises(subprocess.CalledProcessError):
        end(run_directory)
    assert (treasure / "file").exists()
    assert read_exit_record(str(run_directory / "exit")) is not None


def test_a_maze_costs_bounded_work_and_no_failure(run_directory):
    deep = run_directory / "sock"
    for _ in range(200):
        deep = deep / "d"
        deep.mkdir()
    for number in range(2 * stop_post.MOST_ENTRIES):
        (run_directory / f"sock/{number}").touch()
    end(run_directory)
    assert len(list((run_directory / "sock").iterdir())) >= stop_post.MOST_ENTRIES
    assert read_exit_record(str(run_directory / "exit")) is not None
