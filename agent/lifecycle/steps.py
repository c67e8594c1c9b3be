"""Names for the moments between which an agent may die, so that tests can make it die there.

`COCOON_CRASH_AT=<step>@<file>` ends the process at that step by SIGKILL, once: `<file>` is made
then, and as long as it is there nothing happens. `COCOON_CRASH_BY=SIGTERM` lets it leave in order
instead. Nobody but a test sets them.
"""

import logging
import os
import signal

_VARIABLE = "COCOON_CRASH_AT"
_SIGNAL = "COCOON_CRASH_BY"
_log = logging.getLogger(__name__)


def step(name: str) -> None:
    """Say that what comes before `name` is done."""
    _log.debug("step %s", name)
    wanted, _, marker = os.environ.get(_VARIABLE, "").partition("@")
    if wanted != name:
        return
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.Signals[os.environ.get(_SIGNAL, "SIGKILL")])
