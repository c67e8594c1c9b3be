"""The command `cocoon-host`: one module a command; this one runs the one that was asked for."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from agent import __version__
from agent.model.errors import CocoonError

from . import console, doctor, inspection, listing, run

if TYPE_CHECKING:
    from .command import Commands

COMMANDS: Final[tuple[Callable[["Commands"], None], ...]] = (
    run.register,
    doctor.register,
    listing.register,
    inspection.register,
    console.register,
)
"""Each adds its command, in the order in which help lists them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 1 for a failure, 2 for wrong usage.

    Ended by Ctrl-C, or by nobody reading what it prints, it says nothing and returns 128 and the
    number of the signal, as a shell does.
    """
    options = _parser().parse_args(arguments)
    try:
        status: int = options.action(options)
        sys.stdout.flush()
    except (CocoonError, ExceptionGroup) as error:
        refusals = _refusals(error)
        if not refusals:
            raise
        for refusal in refusals:
            print(f"cocoon-host: {refusal}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Else the interpreter complains when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


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
    for register in COMMANDS:
        register(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
