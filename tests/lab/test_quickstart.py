"""packaging/quickstart, seen from the host: it shows a real VM, and leaves what it should.

Where process 1 is systemd it would install the agent on the host, so these tests run where it is
none; what packaging/install puts where is tested everywhere.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TREE = Path(__file__).resolve().parents[2]
RUN = Path("/run/cocoon-quickstart")
PLAIN = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
# Guests are translated where KVM does not work, and other tests run beside these.
QUICKSTART: dict[str, Any] = {
    "capture_output": True,
    "text": True,
    "timeout": 600,
    "env": PLAIN,
    "stdin": subprocess.DEVNULL,
}

in_a_lab = pytest.mark.skipif(
    Path("/proc/1/comm").read_text() == "systemd\n",
    reason="process 1 is systemd: quickstart would install the agent on this host",
)


def quickstart(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([TREE / "packaging/quickstart", *arguments], **QUICKSTART, cwd=TREE)


def lab_of(done: "subprocess.CompletedProcess[str]") -> str:
    (lab,) = set(re.findall(r"cocoon-lab-\w+", done.stdout))
    return str(lab)


def left_of(lab: str) -> list[str]:
    """What is still there of a lab: processes, mounts, control groups, files."""
    left = [str(path) for path in (RUN, Path("/var/tmp", lab)) if path.exists()]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if ") Z " in (process / "stat").read_text():
                continue
            if lab in (process / "cgroup").read_text():
                left.append((process / "cmdline").read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    left += [line for line in mounts if lab in line]
    for parent, directories, _ in os.walk("/sys/fs/cgroup"):
        left += [f"{parent}/{each}" for each in directories if each == lab]
    return left


@pytest.fixture
def nothing_runs() -> Iterator[None]:
    """Skip where somebody's own quickstart runs; end what the test left."""
    if RUN.exists():
        pytest.skip(f"{RUN} is there: somebody's quickstart --keep is not to be disturbed")
    yield
    if RUN.exists():
        quickstart("--remove")


@in_a_lab
def test_the_tour_works_without_kvm_and_leaves_nothing(nothing_runs: None, tmp_path: Path) -> None:
    (tmp_path / "no-device").touch()
    hide = f"! test -e /dev/kvm || mount --bind {tmp_path}/no-device /dev/kvm"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", f"{hide}; exec {TREE}/packaging/quickstart"],
        **QUICKSTART,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line for line in lines if len(line.expandtabs()) > 80] == []
    assert '  "hypervisor": "qemu",' in lines
    # What each command says follows it, so that the tour shows what it claims.
    listings = [lines[at + 1].split() for at, line in enumerate(lines) if line.endswith("ls /disk")]
    shown = [files for files in listings if "before" in files]
    assert [sorted({"before", "after", "clone"} & set(files)) for files in shown] == [
        ["after", "before"],  # both were written,
        ["before"],  # and the later is gone after the restore;
        ["before", "clone"],  # the clone writes to a disk of its own,
        ["before"],
        ["before"],  # and what there was is there after the next boot
    ]
    for line in ("stopped", "hello:/# power button: going down", "Linux 6."):
        assert any(line in shown for shown in lines), line
    assert "bash: echo: write error: Invalid argument" in lines
    assert left_of(lab_of(done)) == []


@in_a_lab
def test_what_is_kept_can_be_entered_shown_again_and_removed(nothing_runs: None) -> None:
    interrupted = subprocess.Popen(
        [TREE / "packaging/quickstart", "--keep"], stdout=subprocess.PIPE, text=True, env=PLAIN
    )
    assert interrupted.stdout is not None
    named = (re.search(r"cocoon-lab-\w+", line) for line in interrupted.stdout)
    first = next(found[0] for found in named if found)
    interrupted.kill()
    interrupted.wait()
    assert RUN.exists()
    kept = quickstart("--keep")
    assert (kept.returncode, kept.stderr) == (0, "")
    assert lab_of(kept) != first
    assert left_of(first) == [str(RUN)]  # which is the second's now
    entered = quickstart("--enter", "cat", "/cocoon/vms/hello/state")
    assert (entered.returncode, entered.stdout) == (0, "running\n")
    again = quickstart()
    assert again.returncode == 0
    assert lab_of(again) == lab_of(kept)
    assert quickstart("--remove").returncode == 0
    assert left_of(lab_of(kept)) == []
    refused = quickstart("--remove")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)


def test_the_installed_program_runs_from_where_it_was_put(tmp_path: Path) -> None:
    prefix = tmp_path / "prefix"
    environment = {**PLAIN, "DESTDIR": "/", "PREFIX": str(prefix)}
    subprocess.run([TREE / "packaging/install"], check=True, env=environment, cwd="/")
    unit = (prefix / "lib/systemd/system/cocoon-host.service").read_text()
    assert f"ExecStart={prefix}/bin/cocoon-host run\n" in unit
    for file in ("sysusers.d/cocoon-host.conf", "tmpfiles.d/cocoon-host.conf"):
        assert (prefix / "lib" / file).exists()
    done = subprocess.run(
        [prefix / "bin/cocoon-host", "--version"], capture_output=True, text=True, cwd="/"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("cocoon-host ")
