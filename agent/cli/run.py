"""`cocoon-host run`: the agent itself, in the foreground."""

import argparse
import os
import resource
import sys
from typing import TYPE_CHECKING

from agent.settings import CONFIG_FILE, LOG_LEVELS, Settings, load_settings

from .command import add_command

if TYPE_CHECKING:
    from .command import Commands

_SETTINGS = ("config", "root_dir", "run_dir", "mount", "log_level")


def register(commands: "Commands") -> None:
    """Add the command."""
    run = add_command(
        commands,
        "run",
        _run,
        "run the agent in the foreground, as its systemd service does",
        description="Run the agent in the foreground until SIGTERM or SIGINT; VMs go on after it.",
        epilog=f"Settings come from {CONFIG_FILE}, then COCOON_* variables, then these flags. "
        "SIGHUP reads them again.",
    )
    defaults = Settings()
    run.add_argument("--root-dir", metavar="DIR", help=f"what lasts ({defaults.root_dir})")
    run.add_argument("--run-dir", metavar="DIR", help=f"what ends at reboot ({defaults.run_dir})")
    run.add_argument("--mount", metavar="DIR", help=f"where the tree appears ({defaults.mount})")
    run.add_argument("--config", metavar="FILE", help=f"settings in TOML ({CONFIG_FILE})")
    run.add_argument(
        "--log-level", choices=LOG_LEVELS, help=f"least that is logged ({defaults.log_level})"
    )


def _run(options: argparse.Namespace) -> int:
    flags = {name: getattr(options, name) for name in _SETTINGS}

    def load() -> Settings:
        return load_settings(flags, os.environ)

    settings = load()
    if os.geteuid() != 0:
        print("cocoon-host: run needs root: it mounts, and starts units", file=sys.stderr)
        return 1
    # Here, so that --help and wrong usage are answered without loading all there is.
    import trio

    from agent import app, logs

    # A running VM takes four descriptors, each reader of a stream one.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    logs.start_logging(settings.log_level)
    trio.run(app.run, settings, load, strict_exception_groups=True)
    return 0
