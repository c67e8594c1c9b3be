"""One sitting at a console: moves bytes both ways until the user leaves or the VM ends.

A connection that ends says nothing about why. The tree does: the VM has ended, or it starts anew,
or the agent is away, and consoles outlive the agent.
"""

import contextlib
import math
import os
import select
import signal
import socket
import time
from typing import Final

from agent.model.errors import CocoonError, Missing, TimedOut

from .escapes import Escape, EscapeParser
from .mount import Away
from .terminal import ENDING, Output, Signals, Terminal, say
from .transcript import Transcript
from .vm_console import NoProcess, VmConsole

LOG_END: Final = 64 * 1024
SETTLING: Final = 0.02
"""Seconds in which what the log has already arrives through the connection as well."""
RETRY: Final = 0.25
"""Seconds between attempts to connect again."""
GRACE: Final = 0.5
"""Seconds that a VM has no process before it counts as ended: `restart` stops it for a moment."""
PATIENCE: Final = 60.0
"""Seconds that a session without a user waits for the agent."""
_PIECE: Final = 64 * 1024
_MOST_PENDING: Final = 256 * 1024
_BELL: Final = b"\a"
_HELP: Final = """\
~.   detach (Ctrl-] too, at any place in a line)
~w   type `stty rows R cols C` for the guest's shell: a serial console has no window size
~^Z  suspend
~~   a ~     ~^]  a Ctrl-]
~?   this help
~ counts at the start of a line only. ssh takes it first: type ~~. there."""


class Session:
    """Input from a descriptor to a VM's console, its output to standard output.

    With `terminal` a user is there: what `parser` finds is obeyed, and what is typed while there is
    no connection is lost. Otherwise input is a file: it is all sent, and `linger` seconds after its
    end the session ends.
    """

    def __init__(
        self,
        console: VmConsole,
        transcript: Transcript,
        parser: EscapeParser,
        output: Output,
        terminal: Terminal | None,
        linger: float,
        input_fd: int = 0,
    ) -> None:
        self._console = console
        self._transcript = transcript
        self._parser = parser
        self._output = output
        self._terminal = terminal
        self._linger = linger
        self._input_fd = input_fd
        self._input_open = True
        self._to_guest = bytearray()
        self._connection: socket.socket | None = None
        self._lost_at = 0.0
        self._next_try = math.inf
        self._resting_since = math.inf
        self._ends_at = math.inf
        self._told_away = False
        self._ending: int | None = None
        self._farewell = ""
        self._status: int | None = None

    def run(self, connection: socket.socket, signals: Signals) -> int:
        """Run until the end; return the exit status.

        0 after leaving, or when the VM has ended well; 1 when it failed or there is no agent; 128
        and a number after that signal. Raises CocoonError when the VM may no longer be used.
        """
        try:
            self._attach(connection)
            while self._status is None:
                self._turn(signals)
        finally:
            if self._connection is not None:
                # What was typed just before leaving.
                with contextlib.suppress(OSError):
                    self._connection.send(self._to_guest)
                self._connection.close()
            self._output.undo_modes()
        if self._farewell:
            self._note(self._farewell)
        return self._status

    def say(self, text: str) -> None:
        """Tell the user something that the guest has not said."""
        if self._terminal is not None:
            text = text.replace("\n", "\r\n")
        say(text, raw=self._terminal is not None)

    def _note(self, text: str) -> None:
        self.say(f"[{self._console.name}: {text}]")

    def _turn(self, signals: Signals) -> None:
        """Wait for something to happen, and do what follows from it."""
        poll = select.poll()
        poll.register(signals.fd, select.POLLIN)
        if self._input_open and len(self._to_guest) < _MOST_PENDING:
            poll.register(self._input_fd, select.POLLIN)
        if self._output.pending:
            poll.register(self._output.fd, select.POLLOUT)
        if self._connection is not None:
            wanted = select.POLLOUT if self._to_guest else 0
            if len(self._output.pending) < _MOST_PENDING:
                wanted |= select.POLLIN
            if wanted:
                poll.register(self._connection, wanted)
        ready = {fd for fd, _ in poll.poll(self._timeout())}
        if signals.fd in ready:
            self._obey(signals.take())
        if self._status is None and self._input_fd in ready:
            self._read_input()
        if self._connection is not None and self._connection.fileno() in ready:
            self._exchange(self._connection)
        if self._output.pending and self._output.fd in ready:
            self._output.flush()
        if self._status is None:
            self._look_at_the_clock()

    def _timeout(self) -> float | None:
        due = min(self._next_try, self._ends_at, 0 if self._is_done() else math.inf)
        return None if due == math.inf else max(0.0, due - time.monotonic()) * 1000

    def _is_done(self) -> bool:
        return self._ending is not None and not self._output.pending

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        if self._ending is not None:
            if self._is_done():
                self._status = self._ending
            return
        if now >= self._next_try:
            self._try_to_connect(now)
        if self._connection is not None and not self._input_open and not self._to_guest:
            if self._ends_at == math.inf:
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_WR)
                self._ends_at = now + self._linger
            elif now >= self._ends_at:
                self._status = 0
        elif now >= self._ends_at or (
            self._terminal is None and self._connection is None and now > self._lost_at + PATIENCE
        ):
            self._end(1, "the agent is away, and the rest of the console is in its log later")

    def _end(self, status: int, text: str) -> None:
        """End once what the guest said last is shown."""
        self._next_try = self._ends_at = math.inf
        self._ending, self._farewell = status, text

    # The guest's side.

    def _attach(self, connection: socket.socket) -> None:
        try:
            log = self._console.log_end(LOG_END)
        except CocoonError:
            connection.close()
            raise
        on_its_way = select.poll()
        on_its_way.register(connection, select.POLLIN)
        on_its_way.poll(SETTLING * 1000)
        fresh = b""
        # The end of the connection, should it be there already, is seen again.
        with contextlib.suppress(BlockingIOError, ConnectionError):
            fresh = connection.recv(_PIECE)
        self._output.add(self._transcript.join(log, fresh))
        self._connection = connection
        self._next_try = self._resting_since = math.inf

    def _try_to_connect(self, now: float) -> None:
        self._next_try = now + RETRY
        try:
            self._reconnect(now)
        except Missing:
            self._end(0, "was removed")
        except (Away, TimedOut):
            self._resting_since = math.inf
            if not self._told_away:
                self._told_away = True
                self._note("the agent is away, and the VM runs on without it; waiting")

    def _reconnect(self, now: float) -> None:
        try:
            connection = self._console.connect()
        except NoProcess as absent:
            if not absent.is_over:
                self._resting_since = math.inf
            elif self._resting_since == math.inf:
                self._resting_since = now
            elif now > self._resting_since + GRACE:
                text, failed = self._console.ending()
                self._end(1 if failed else 0, text)
            return
        self._told_away = False
        self._note("connected again")
        self._attach(connection)

    def _exchange(self, connection: socket.socket) -> None:
        try:
            if self._to_guest:
                with contextlib.suppress(BlockingIOError):
                    del self._to_guest[: connection.send(self._to_guest)]
            data = connection.recv(_PIECE)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if data:
            self._output.add(self._transcript.show(data))
            return
        connection.close()
        self._connection = None
        self._lost_at = self._next_try = time.monotonic()
        if self._terminal is not None:
            self._to_guest.clear()

    # The user's side.

    def _read_input(self) -> None:
        try:
            data = os.read(self._input_fd, _PIECE)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # the terminal was hung up
        if not data:
            self._input_open = False
            if self._terminal is not None:
                self._status = 128 + signal.SIGHUP
        elif self._terminal is None:
            self._to_guest += data
        else:
            self._obey_user(data, self._terminal)

    def _obey_user(self, data: bytes, terminal: Terminal) -> None:
        for event in self._parser.feed(data):
            match event:
                case Escape.DETACH:
                    self._status, self._farewell = 0, "detached"
                    return
                case Escape.HELP:
                    self.say(_HELP.replace("~", (self._parser.character or b"").decode()))
                case Escape.SUSPEND:
                    terminal.suspend()
                case Escape.TYPE_WINDOW_SIZE:
                    size = terminal.size()
                    if all(size):
                        self._type(f"stty rows {size.lines} cols {size.columns}\r".encode())
                    else:
                        self._output.add(_BELL)
                case bytes():
                    self._type(event)

    def _type(self, data: bytes) -> None:
        if self._connection is None:
            self._output.add(_BELL)
        else:
            self._to_guest += data

    def _obey(self, numbers: bytes) -> None:
        for number in numbers:
            if number in ENDING:
                self._status = 128 + number
                return
            if self._terminal is None:
                continue
            if number == signal.SIGTSTP:
                self._terminal.suspend()
            elif number == signal.SIGCONT:
                self._terminal.make_raw()
