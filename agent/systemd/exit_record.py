"""How a VM's last process ended, as `helpers/stop_post.py` wrote it down."""

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """What systemd told the unit's ExecStopPost (systemd.exec(5), `$SERVICE_RESULT`).

    `result` is `success`, `exit-code`, `signal`, `core-dump`, `oom-kill`, `timeout`…; `code` is
    `exited`, `killed` or `dumped`, and `status` the exit status or the signal's name; both are
    empty when no process ended. `time` is in seconds since the epoch. `invocation` tells one start
    of the unit from the next: it is the unit's InvocationID in hex.
    """

    result: str
    code: str
    status: str
    time: float
    invocation: str


def read_exit_record(path: str) -> ExitRecord | None:
    """Return the record at `path`, None when there is none or it is not whole; raises OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:
        words = file.read(4096).decode(errors="replace").removesuffix("\n").split(" ")
    try:
        result, code, status, time, invocation = words
        return ExitRecord(result, code, status, float(time), invocation)
    except ValueError:
        return None
