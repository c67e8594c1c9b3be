"""The agent as a systemd service: readiness, status, watchdog, and the signals it obeys."""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable

import sdnotify
import trio

_PROBE_LIMIT = 5.0  # seconds that one look at the mount may take
_STATUS_EVERY = 1.0
_log = logging.getLogger(__name__)


class Service:
    """Talks to the service manager, if there is one (sd_notify(3))."""

    def __init__(self) -> None:
        self._notifier = sdnotify.SystemdNotifier()
        # Neither VMs' helpers nor probes may speak for the agent.
        watchdog = os.environ.pop("WATCHDOG_USEC", "")
        os.environ.pop("WATCHDOG_PID", None)
        os.environ.pop("NOTIFY_SOCKET", None)
        self._watchdog = int(watchdog) / 1e6 if watchdog.isdigit() else 0.0

    def ready(self) -> None:
        """Say that the mount answers."""
        self._notifier.notify("READY=1")

    def stopping(self) -> None:
        """Say that the agent is leaving."""
        self._notifier.notify("STOPPING=1")

    def status(self, text: str) -> None:
        """Set the line that `systemctl status` shows."""
        self._notifier.notify(f"STATUS={text}")

    async def show_status(self, text: Callable[[], str]) -> None:
        """Keep the status line true, until cancelled."""
        shown = ""
        while True:
            if (now := text()) != shown:
                self.status(shown := now)
            await trio.sleep(_STATUS_EVERY)

    async def feed_watchdog(self, mount: str) -> None:
        """Prove to systemd, until cancelled, that the loop and the mount are alive.

        The mount is looked at by a child process: a look of our own would wait for ourselves.
        """
        if not self._watchdog:
            return
        while True:
            if await _answers(f"{mount}/version"):
                self._notifier.notify("WATCHDOG=1")
            else:
                _log.error("the mount %s does not answer", mount)
            await trio.sleep(self._watchdog / 3)

    async def obey_signals(self, stop: Callable[[], None], reload: Callable[[], None]) -> None:
        """Call `stop` on the first SIGTERM or SIGINT, `reload` on each SIGHUP."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
            async for number in received:
                if number == signal.SIGHUP:
                    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
                    self._notifier.notify(f"RELOADING=1\nMONOTONIC_USEC={now}")
                    reload()
                    self.ready()
                else:
                    _log.info("leaving on %s; VMs go on", signal.Signals(number).name)
                    stop()
                    return


async def _answers(path: str) -> bool:
    """Whether a child process gets to read `path`; one that hangs is left to end by itself."""
    try:
        child = await trio.lowlevel.open_process(
            ["/bin/cat", path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except OSError as error:
        # A host that is short of processes or memory for a moment is no reason to leave.
        _log.error("the mount cannot be looked at: %s", error)
        return False
    with trio.move_on_after(_PROBE_LIMIT):
        return await child.wait() == 0
    child.kill()
    return False
