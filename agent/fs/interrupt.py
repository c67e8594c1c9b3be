"""Ends the waiting of processes that were sent a signal.

A process inside a request cannot be interrupted, not even by SIGKILL, before the filesystem has
replied, and pyfuse3 does not show the kernel's INTERRUPT. So while handlers wait, `/proc` is asked
about those they wait for.
"""

import errno
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import trio

from .node import Refused
from .permissions import Opener, read_status

INTERVAL: Final = 0.2
"""Seconds between two looks."""

# Their default action ends no process, so programs do not expect them to end a write: shells get
# SIGCHLD for any child, Go programs send themselves SIGURG all the time, and a process that is to
# stop does so when it returns.
_HARMLESS: Final = (
    signal.SIGCHLD,
    signal.SIGCONT,
    signal.SIGURG,
    signal.SIGWINCH,
    signal.SIGSTOP,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
)
_HARMLESS_MASK: Final = sum(1 << (number - 1) for number in _HARMLESS)
_GONE: Final = (b"Z", b"X")
_BATCH: Final = 50


class Interrupts:
    """All handlers that wait, and the processes behind them."""

    def __init__(self) -> None:
        self._waits: dict[trio.CancelScope, Opener] = {}
        self._some = trio.Event()

    def __len__(self) -> int:
        return len(self._waits)

    @contextmanager
    def ending(self, opener: Opener) -> Iterator[None]:
        """Run the body, a wait, and raise Refused(EINTR) when a signal to `opener` ended it."""
        if opener.caller.pid <= 0:  # in a PID namespace that the agent does not see into
            yield
            return
        with trio.CancelScope() as scope:
            self._waits[scope] = opener
            self._some.set()
            try:
                yield
            finally:
                del self._waits[scope]
        if scope.cancelled_caught:
            raise Refused(errno.EINTR)

    async def run(self) -> None:
        """Look after those who wait, until cancelled."""
        while True:
            if not self._waits:
                self._some = trio.Event()
                await self._some.wait()
            await trio.sleep(INTERVAL)
            for number, (scope, opener) in enumerate(list(self._waits.items())):
                if is_interrupted(opener):
                    scope.cancel()
                if number % _BATCH == 0:
                    await trio.lowlevel.checkpoint()


def is_interrupted(opener: Opener) -> bool:
    """Whether a signal that would end a system call is pending for `opener`, or it is gone."""
    status = read_status(opener.caller.pid)
    if not status and opener.process != opener.caller.pid:
        # The thread that opened the file may have ended, and another one of its process wait.
        status = read_status(opener.process)
    if not status or status[b"State"].startswith(_GONE):
        return True
    pending = int(status[b"SigPnd"], 16) | int(status[b"ShdPnd"], 16)
    held_back = int(status[b"SigBlk"], 16) | int(status[b"SigIgn"], 16)
    return bool(pending & ~held_back & ~_HARMLESS_MASK)
