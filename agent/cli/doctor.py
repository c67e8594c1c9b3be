"""`cocoon-host doctor`: the checks of /cocoon/doctor, made now, with or without an agent."""

import argparse
import dataclasses
import json
import os
import shutil
import sys
from typing import TYPE_CHECKING

from agent.model.finding import Finding, Level, show_findings
from agent.settings import CONFIG_FILE, Settings, load_settings

from .command import add_command

if TYPE_CHECKING:
    from .command import Commands


def register(commands: "Commands") -> None:
    """Add the command."""
    doctor = add_command(
        commands,
        "doctor",
        _run,
        "check this host, and say what to do about what it lacks",
        description="Check whether this host can run VMs: a line each with ok, warn or fail. "
        "No agent need run, and nothing is changed. Not all can be checked but by root.",
        epilog="The exit status is 1 when a check failed. /cocoon/doctor shows the agent's own.",
    )
    doctor.add_argument("--config", metavar="FILE", help=f"settings in TOML ({CONFIG_FILE})")
    doctor.add_argument("--json", action="store_true", help="show the same as JSON")


def _run(options: argparse.Namespace) -> int:
    findings = _examine(load_settings({"config": options.config}, os.environ))
    if options.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        # Into a pipe a line each, for grep.
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
        sys.stdout.write(show_findings(findings, width))
    return int(any(finding.level is Level.FAIL for finding in findings))


def _examine(settings: Settings) -> list[Finding]:
    try:
        # Here, so that --help and wrong usage are answered without loading all there is.
        import trio

        from agent import app
    except ModuleNotFoundError as error:
        name = error.name or str(error)
        remedy = f"apt-get install python3-{name.replace('_', '-')}"
        return [Finding(Level.FAIL, "libraries", f"Python finds no {name}", remedy)]
    return trio.run(app.examine, settings, strict_exception_groups=True)
