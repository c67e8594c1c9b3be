"""The user's side of a console: the terminal in raw mode, signals, output that waits for nobody."""

import contextlib
import os
import signal
import socket
import stat
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from agent.model.errors import from_os_error

from .modes import ModeTracker

ENDING: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
"""Signals that end the program once the terminal is as it was."""
_PIECE: Final = 4096
_CAREFUL_PIECE: Final = 256
_CONTROL_CHARACTERS: Final = 6  # the index in what tcgetattr returns


class Terminal:
    """The terminal on a descriptor, put back to how it was found whatever happens in the block."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._found = termios.tcgetattr(fd)
        self._is_raw = False

    def __enter__(self) -> "Terminal":
        self.make_raw()
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def make_raw(self) -> None:
        """Pass every key on, and show output as it is: cfmakeraw of termios(3)."""
        raw = termios.tcgetattr(self._fd)
        raw[0] &= ~(
            termios.IGNBRK
            | termios.BRKINT
            | termios.PARMRK
            | termios.ISTRIP
            | termios.INLCR
            | termios.IGNCR
            | termios.ICRNL
            | termios.IXON
        )
        raw[1] &= ~termios.OPOST
        raw[2] = raw[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        raw[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
        raw[_CONTROL_CHARACTERS][termios.VMIN] = 1
        raw[_CONTROL_CHARACTERS][termios.VTIME] = 0
        # First: what can come between the two must not leave a raw terminal behind.
        self._is_raw = True
        termios.tcsetattr(self._fd, termios.TCSANOW, raw)

    def restore(self) -> None:
        """Put back what was found; nothing when it is not raw."""
        if not self._is_raw:
            return
        before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        try:
            # A terminal that was hung up has nothing to put back.
            with contextlib.suppress(termios.error, OSError):
                termios.tcsetattr(self._fd, termios.TCSANOW, self._found)
        finally:
            self._is_raw = False
            signal.signal(signal.SIGTTOU, before)

    def suspend(self) -> None:
        """Give the terminal back and stop, as Ctrl-Z does; return raw, once continued."""
        self.restore()
        before = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        try:
            # The whole job, as the terminal does it; nothing where no shell could continue it.
            os.killpg(os.getpgrp(), signal.SIGTSTP)
        finally:
            signal.signal(signal.SIGTSTP, before)
            self.make_raw()

    def size(self) -> os.terminal_size:
        """Return its columns and lines, zeros when it does not know."""
        return os.get_terminal_size(self._fd)


class Output:
    """Standard output: takes all, writes what can be written now, keeps the rest."""

    def __init__(self, fd: int) -> None:
        self.pending = bytearray()
        self._is_terminal = os.isatty(fd)
        self._modes = ModeTracker()
        self.fd, self._piece = _not_blocking(fd, self._is_terminal)

    def add(self, data: bytes) -> None:
        """Take `data`, to be written by `flush`."""
        self.pending += data
        if self._is_terminal:
            self._modes.feed(data)

    def flush(self) -> None:
        """Write some of what is pending; raises BrokenPipeError when nobody reads, CocoonError."""
        try:
            del self.pending[: os.write(self.fd, self.pending[: self._piece])]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            raise
        except OSError as error:
            raise from_os_error(error, "writing the output") from error

    def undo_modes(self) -> None:
        """Switch off the modes of the terminal that the guest left on."""
        undo = self._modes.undo()
        if undo:
            with contextlib.suppress(OSError):
                os.write(self.fd, undo)


class Signals:
    """A descriptor that can be read when one of the given signals came."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self.fd = self._reader.fileno()

    @contextmanager
    def caught(self, *numbers: signal.Signals) -> Iterator[None]:
        """Catch them in the block instead of what they do otherwise; what is ignored stays so."""
        before = {number: signal.getsignal(number) for number in numbers}
        caught = [number for number in numbers if before[number] != signal.SIG_IGN]
        wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in caught:
            signal.signal(number, lambda _number, _frame: None)
        try:
            yield
        finally:
            for number in caught:
                signal.signal(number, before[number])
            signal.set_wakeup_fd(wakeup)
            self._reader.close()
            self._writer.close()

    def take(self) -> bytes:
        """Return the numbers of those that came, a byte each."""
        with contextlib.suppress(BlockingIOError):
            return self._reader.recv(256)
        return b""


def say(text: str, raw: bool) -> None:
    """Print a line to standard error, from its first column, on a raw terminal too."""
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"\r\n{text}\r\n".encode() if raw else f"{text}\n".encode())


def _not_blocking(fd: int, is_terminal: bool) -> tuple[int, int]:
    """Return a descriptor to write to, and how much may be written at once when it is writable.

    The description behind `fd` may be the shell's as well: it cannot be made non-blocking, but
    another one of the same terminal or pipe can be had.
    """
    mode = os.fstat(fd).st_mode
    if is_terminal or stat.S_ISFIFO(mode):
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        with contextlib.suppress(OSError):  # another user's terminal, a pipe that nobody reads
            return os.open(f"/proc/self/fd/{fd}", flags), _PIECE
    return fd, _CAREFUL_PIECE if is_terminal else _PIECE
