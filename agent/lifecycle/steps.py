"""Names for the moments between which an agent may die, so that tests can make it die there.

`COCOON_CRASH_AT=<step>@<file>` ends the process at that step by SIGKILL, once: `<file>` is made
then, and as long as it is there nothing happens. Nobody but a test sets it.
"""

import logging
import os
import signal

_VARIABLE = "COCOON_CRASH_AT"
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
    os.kill(os.getpid(), signal.SIGKILL)
