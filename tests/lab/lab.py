"""The lab's command line: a private systemd, with this tree's agent or without, for one command."""

import argparse
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from boot import SYSTEM_PATH, Lab, running
from cgroups import LabError

TREE = Path(__file__).resolve().parents[2]
CACHE = Path("/var/cache/cocoon-host-tests")
VMMS = ("firecracker", "cloud-hypervisor", "qemu-system-x86_64")
LAB_FAILED = 125
# linux/kvm.h
KVM_CHECK_EXTENSION = 0xAE03
KVM_CAP_NESTED_STATE = 157
FILES = {
    "system/lab.target": """[Unit]
Description=What a lab runs
Requires=dbus.socket systemd-journald.service
Wants=systemd-journald-dev-log.socket
After=dbus.socket systemd-journald.service systemd-journald-dev-log.socket
""",
    # An empty file masks: what the kernel audits is the host's business.
    "system/systemd-journald-audit.socket": "",
    "journald.conf": """[Journal]
Storage=volatile
RuntimeMaxUse=512M
RateLimitIntervalSec=0
ForwardToSyslog=no
ForwardToWall=no
Audit=no
""",
}


def unit_files(python: Path, path: str) -> dict[str, str]:
    """The agent's units out of this tree, as files below /etc/systemd."""
    files = dict(FILES)
    for unit in (TREE / "units").glob("*"):
        if unit.suffix in (".service", ".slice", ".timer"):
            files[f"system/{unit.name}"] = unit.read_text()
        elif unit.suffix in (".sysusers", ".tmpfiles"):
            files[f"{unit.suffix[1:]}/{unit.stem}.conf"] = unit.read_text()
    found = (shutil.which(program, path=path) for program in VMMS)
    programs = {os.path.dirname(program) for program in found if program}
    files["system/cocoon-host.service.d/lab.conf"] = f"""[Service]
ExecStart=
ExecStart={python} -m agent.cli.main run
# Tests that end the agent wait for its return; how long it rests first is no matter to them.
RestartSec=100ms
Environment="PYTHONPATH={TREE}" "PATH={":".join(sorted(programs))}:{SYSTEM_PATH}"
Environment=COCOON_CRASH_AT=/run/crash-at
"""
    return files


def nested_state(guests: Path, path: str) -> dict[str, str]:
    """What gives Cloud Hypervisor, where there is one, the one ioctl that some KVMs lack.

    A preloaded library, in the jails of this lab's VMs.
    """
    if shutil.which("cloud-hypervisor", path=path) is None or knows_nested_state():
        return {}
    library = guests / "nested_state.so"
    lines = f"[Service]\nEnvironment=LD_PRELOAD={library}\nBindReadOnlyPaths={library}\n"
    return {"system/cocoon-vm-.service.d/50-nested-state.conf": lines}


def knows_nested_state() -> bool:
    """Whether KVM can save the state of guests in guests; true where there is no KVM to ask."""
    try:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        return fcntl.ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_NESTED_STATE) > 0
    finally:
        os.close(kvm)


def build_guests() -> Path:
    """The tests' guests, built once for each state of their sources."""
    sources = sorted((TREE / "tests/guest").iterdir())
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    guests = CACHE / f"guests-{digest}"
    if not (guests / "halt.elf").exists():
        subprocess.run([TREE / "tests/guest/build", guests], check=True)
    return guests


def start_agent(lab: Lab, environment: dict[str, str]) -> None:
    """Start the agent in the lab and wait until it is ready."""
    if not (TREE / "units/cocoon-host.service").exists():
        raise LabError("there is no units/cocoon-host.service in this tree")
    if lab.enter(["systemctl", "start", "cocoon-host.service"], env=environment).wait() != 0:
        journal = ["journalctl", "--no-pager", "--lines=50", "--unit=cocoon-host.service"]
        lab.enter(journal, env=environment, stdout=sys.stderr).wait()
        raise LabError("cocoon-host.service did not start; its journal is above")


def run(options: argparse.Namespace) -> int:
    """Run the command in a lab and return its exit status."""
    path = f"{CACHE / 'bin'}:{os.environ.get('PATH', SYSTEM_PATH)}"
    guests = Path("/nonexistent")
    if options.guests:
        if options.agent and shutil.which("firecracker", path=path) is None:
            subprocess.run([TREE / "packaging/fetch-firecracker", CACHE / "bin"], check=True)
        guests = build_guests()
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("XDG_", "DBUS_"))
        and name not in ("NOTIFY_SOCKET", "INVOCATION_ID", "TMPDIR")
    }
    environment |= {
        "PATH": path,
        "PYTHONPATH": str(TREE),
        "COCOON_TEST_GUESTS": str(guests),
        "COCOON_TEST_PYTHON": str(options.python),
    }
    visible = [TREE, Path.cwd(), options.python.parents[1], *options.bind]
    files = unit_files(options.python, path)
    if options.guests:
        files |= nested_state(guests, path)
    with running(options.state, visible, files) as lab:
        if options.agent:
            start_agent(lab, environment)
        scope = ["systemd-run", "--scope", "--quiet", "--collect", "--unit=command"]
        environment["COCOON_LAB"] = lab.name
        process = lab.enter([*scope, "--", *options.command], env=environment)
        if os.isatty(0):
            # The terminal sends it to the command as well, whose answer counts.
            signal.signal(signal.SIGINT, lambda *_: None)
        status = process.wait()
    return status if status >= 0 else 128 - status


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/lab/run", description=__doc__.partition("\n")[0])
    parser.add_argument("--agent", action="store_true", help="start cocoon-host of this tree first")
    parser.add_argument(
        "--no-guests",
        dest="guests",
        action="store_false",
        help="do without what the tests need: their guests, and a Firecracker",
    )
    parser.add_argument(
        "--python", type=Path, default=Path("/usr/bin/python3"), help="what runs it"
    )
    parser.add_argument("--state", type=Path, help="its state directory, kept (a fresh one)")
    parser.add_argument(
        "--bind",
        type=Path,
        action="append",
        default=[],
        help="a path in /tmp, /var/tmp or /run to see inside",
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse(sys.argv[1:])

    def end(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    try:
        if os.geteuid() != 0:
            raise LabError("a lab needs root")
        return run(options)
    except (LabError, OSError, subprocess.CalledProcessError) as error:
        print(f"tests/lab/run: {error}", file=sys.stderr)
        return LAB_FAILED


if __name__ == "__main__":
    sys.exit(main())
