"""`cocoon-host console`: a VM's serial console on the user's terminal, or in a pipe."""

import argparse
import math
import os
import signal
from typing import TYPE_CHECKING, Final

from .command import add_command
from .mount import Mount, add_mount_option

if TYPE_CHECKING:
    from .command import Commands

_LINES: Final = 10
_LINGER: Final = 1.0


def register(commands: "Commands") -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "console",
        _console,
        "attach the terminal to a VM's console",
        description="Attach the terminal to the serial console of a VM that runs. Detach with ~. "
        "at the start of a line (over ssh ~~.) or Ctrl-]; ~? shows what else there is. The VM goes "
        "on; so does the session when the agent is restarted.",
        epilog="With input from a file or pipe there are no escape sequences: all of it is sent, "
        "and what the guest says from then on is printed, until --linger seconds after the end of "
        "the input or the end of the VM. Exit status: 0 after detaching or when the VM has ended, "
        "1 when it failed.",
    )
    parser.add_argument("name", metavar="NAME", help="name, id, or the beginning of an id")
    parser.add_argument(
        "-n",
        "--lines",
        metavar="N",
        type=_count,
        help=f"how many lines of the log to show first ({_LINES}; 0 without a terminal)",
    )
    parser.add_argument(
        "-e",
        "--escape",
        metavar="CHAR",
        type=_escape,
        default=b"~",
        help="what escape sequences begin with (~), or none: all that is typed is the guest's",
    )
    parser.add_argument(
        "--linger",
        metavar="SECONDS",
        type=_seconds,
        default=_LINGER,
        help=f"how long to go on after the end of piped input ({_LINGER:g}; inf: until the VM "
        "ends)",
    )
    add_mount_option(parser)


def _console(options: argparse.Namespace) -> int:
    # Here, so that other commands do not load it.
    from .escapes import EscapeParser
    from .session import Session
    from .terminal import ENDING, Output, Signals, Terminal
    from .transcript import Transcript
    from .vm_console import VmConsole

    mount = Mount.named_by(options)
    console = VmConsole(mount, mount.find_vm(options.name))
    connection = console.connect()
    terminal = Terminal(0) if os.isatty(0) else None
    lines = options.lines if options.lines is not None else _LINES if terminal else 0
    session = Session(
        console,
        Transcript(lines),
        EscapeParser(options.escape),
        Output(1),
        terminal,
        options.linger,
    )
    signals = Signals()
    if terminal is None:
        with signals.caught(*ENDING):
            return session.run(connection, signals)
    with signals.caught(*ENDING, signal.SIGTSTP, signal.SIGCONT), terminal:
        session.say(_banner(console.name, options.escape))
        return session.run(connection, signals)


def _banner(name: str, escape: bytes | None) -> str:
    if escape is None:
        return f"[{name}: connected; no escape sequences: end it with a signal from elsewhere]"
    character = escape.decode()
    return f"[{name}: connected; {character}. after Enter or Ctrl-] detaches, {character}? helps]"


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of lines")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


def _escape(text: str) -> bytes | None:
    if text == "none":
        return None
    if len(text) != 1 or not text.isascii() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is not one printable ASCII character, nor none")
    return text.encode()
