"""What the modules of this package share: how a command enters the command line."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

Action = Callable[[argparse.Namespace], int]
"""Does what a command says, and returns the exit status; may raise CocoonError."""


def add_command(
    commands: "Commands", name: str, action: Action, help_line: str, **more: Any
) -> argparse.ArgumentParser:
    """Add a command, and return its parser for further arguments; `more` goes to the parser."""
    parser = commands.add_parser(name, help=help_line, **more)
    parser.set_defaults(action=action)
    return parser
