"""Names for the moments between which an agent may die, so that tests can make it die there.

`COCOON_CRASH_AT=<file>` has the process send itself a signal when it comes to the step that is
written there as `<step> <signal>`, once: the file is renamed to `<file>.done` then. Nobody but a
test sets it.
"""

import logging
import os
import signal

_VARIABLE = "COCOON_CRASH_AT"
_log = logging.getLogger(__name__)


def step(name: str) -> None:
    """Say that what comes before `name` is done."""
    _log.debug("step %s", name)
    request = os.environ.get(_VARIABLE)
    if not request:
        return
    try:
        with open(request) as file:
            wanted, by = file.read().split()
    except FileNotFoundError:
        return
    if wanted == name:
        os.rename(request, f"{request}.done")
        os.kill(os.getpid(), signal.Signals[by])
