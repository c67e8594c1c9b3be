"""The command `cocoon-host`."""

import argparse
import os
import resource
import sys
from collections.abc import Sequence

from agent import __version__
from agent.model.errors import CocoonError
from agent.settings import CONFIG_FILE, LOG_LEVELS, Settings, load_settings

_SETTINGS = ("config", "root_dir", "run_dir", "mount", "log_level")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 1 for a failure, 2 for wrong usage."""
    options = _parser().parse_args(arguments)
    flags = {name: getattr(options, name) for name in _SETTINGS}
    try:
        return _run(flags)
    except (CocoonError, ExceptionGroup) as error:
        refusals = _refusals(error)
        if not refusals:
            raise
        for refusal in refusals:
            print(f"cocoon-host: {refusal}", file=sys.stderr)
        return 1


def _refusals(error: Exception) -> list[CocoonError]:
    """Return what went wrong, as sentences; none when anything of it is a fault of ours."""
    if isinstance(error, CocoonError):
        return [error]
    if not isinstance(error, ExceptionGroup):
        return []
    found = [_refusals(inner) for inner in error.exceptions]
    return [refusal for inner in found for refusal in inner] if all(found) else []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cocoon-host",
        description="A host agent for microVMs: every VMM a systemd unit, every VM a directory.",
        epilog="VMs are operated through the mounted tree: see its README file.",
    )
    parser.add_argument("--version", action="version", version=f"cocoon-host {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = commands.add_parser(
        "run",
        help="run the agent in the foreground, as its systemd service does",
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
    return parser


def _run(flags: dict[str, str | None]) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
