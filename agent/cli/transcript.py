"""What has been shown of a console, and what of its log is still to be shown.

The log and the socket are two ways to the same output: on connecting, the log has what came before,
and the two overlap by what the guest said in between. It does no I/O.
"""

from typing import Final

_KEPT: Final = 1024
"""Bytes of what was shown by which its end is found again in the log."""
_LONGEST_OVERLAP: Final = 8192


class Transcript:
    """Remembers the end of what was shown of one console."""

    def __init__(self, lines: int) -> None:
        """Begin; of a log that is seen first, the last `lines` lines are to be shown."""
        self._lines = lines
        self._shown = b""

    def show(self, data: bytes) -> bytes:
        """Remember that `data` is shown, and return it."""
        self._shown = (self._shown + data)[-_KEPT:]
        return data

    def join(self, log: bytes, fresh: bytes) -> bytes:
        """Return what to show on connecting, and remember it.

        `log` is the end of the log, read once the connection was there, `fresh` what had come
        through the connection by then.
        """
        at = log.rfind(self._shown) if self._shown else -1
        missed = log[at + len(self._shown) :] if at >= 0 else last_lines(log, self._lines)
        return self.show(missed + fresh[overlap(log, fresh) :])


def overlap(before: bytes, after: bytes) -> int:
    """Return how many bytes at the end of `before` are the first ones of `after`, at most.

    More than _LONGEST_OVERLAP are not looked for: they do not come within one connecting.
    """
    for length in range(min(len(before), len(after), _LONGEST_OVERLAP), 0, -1):
        if before.endswith(after[:length]):
            return length
    return 0


def last_lines(log: bytes, count: int) -> bytes:
    """Return the last `count` lines; a last one without an end, such as a prompt, is one."""
    at = len(log)
    if log.endswith(b"\n"):
        at -= 1
    for _ in range(count):
        at = log.rfind(b"\n", 0, at)
        if at < 0:
            return log
    return log[at + 1 :] if count > 0 else b""
