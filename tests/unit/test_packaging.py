"""What is packaged beside the program says what the program does."""

import dataclasses
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from agent.model.config import KEYS
from agent.model.errors import Invalid
from agent.settings import Settings, load_settings

TREE = Path(__file__).resolve().parents[2]
PAGE = TREE / "packaging/man/cocoon-host.8"


def usage() -> str:
    shown = ""
    for name in ("run", "doctor"):
        command = [sys.executable, "-m", "agent.cli.main", name, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=TREE)
        shown += done.stdout
    return shown


def test_the_example_of_settings_has_every_setting_with_its_default(tmp_path: Path) -> None:
    text = (TREE / "packaging/agent.toml").read_text()
    file = tmp_path / "agent.toml"
    file.write_text(re.sub(r"^#(?=\w+ =)", "", text, flags=re.MULTILINE))
    with file.open("rb") as opened:
        shown = tomllib.load(opened)
    assert set(shown) == {field.name for field in dataclasses.fields(Settings)}
    assert load_settings({"config": str(file)}, {}) == Settings()


def test_what_ends_at_reboot_is_not_where_the_jails_files_are() -> None:
    assert load_settings({"run_dir": "/var/lib/cocoon-run"}, {}).run_dir == "/var/lib/cocoon-run"
    with pytest.raises(Invalid, match="--run-dir: '/var/lib/cocoon/run' is below /var/lib/cocoon"):
        load_settings({"run_dir": "/var/lib/cocoon/run"}, {})


def test_the_manual_page_is_set_without_warnings() -> None:
    if shutil.which("man") is None:
        pytest.skip("man-db is not installed")
    done = subprocess.run(
        ["man", "--warnings", "--local-file", PAGE], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


def test_the_manual_page_names_every_option_setting_and_key() -> None:
    page = PAGE.read_text().replace("\\-", "-")
    names = [field.name for field in dataclasses.fields(Settings)]
    names += [*KEYS, *re.findall(r"--[a-z-]+", usage())]
    assert [name for name in names if name not in page] == []


def test_the_readme_names_every_key() -> None:
    readme = (TREE / "README.md").read_text()
    assert [name for name in KEYS if f"`{name}`" not in readme] == []


def test_completions_name_every_option() -> None:
    completions = (TREE / "packaging/completions/cocoon-host").read_text()
    options = set(re.findall(r"--[a-z-]+", usage()))
    assert options
    assert [option for option in options if option not in completions] == []
