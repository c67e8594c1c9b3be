"""What has been shown of a console, and what of its log is still to be shown.

The log and the socket are two ways to the same output: on connecting, the log has what came before,
and the two overlap by what the guest said in between. It does no I/O.
"""

from typing import Final

_KEPT: Final = 1024
"""Bytes of what was shown by which its end is found again in the log."""
_LONGEST_OVERLAP: Final = 8192
"""Bytes that a guest says while a connection is made, at most."""
_SHORTEST_OVERLAP: Final = 8
"""Bytes that are no coincidence: better a word twice than one lost."""


class Transcript:
    """Remembers the end of what was shown of one console."""

    def __init__(self, lines: int) -> None:
        """Begin; of a log that is seen first, the last `lines` lines are to be shown."""
        self._lines = lines
        self._shown = b""
        self._expected = b""

    def show(self, data: bytes) -> bytes:
        """Return what to show of what came through the connection, and remember it."""
        known = min(len(data), len(self._expected))
        if data[:known] == self._expected[:known]:
            data, self._expected = data[known:], self._expected[known:]
        else:
            self._expected = b""  # it was a coincidence
        self._shown = (self._shown + data)[-_KEPT:]
        return data

    def join(self, log: bytes, fresh: bytes) -> bytes:
        """Return what to show on connecting, and remember it.

        `log` is the end of the log, read once the connection was there, `fresh` what had come
        through the connection by then.
        """
        at = log.rfind(self._shown) if self._shown else -1
        missed = log[at + len(self._shown) :] if at >= 0 else last_lines(log, self._lines)
        self._expected = b""
        missed = self.show(missed)
        self._expected = _known(log[-_LONGEST_OVERLAP:], fresh)
        return missed + self.show(fresh)


def _known(log: bytes, fresh: bytes) -> bytes:
    """Return the end of `log` that will come through a connection that began with `fresh`."""
    if len(fresh) < _SHORTEST_OVERLAP:
        return b""
    at = log.rfind(fresh)
    if at >= 0:
        return log[at:]
    for length in range(min(len(log), len(fresh)), _SHORTEST_OVERLAP - 1, -1):
        if log.endswith(fresh[:length]):
            return fresh[:length]
    return b""


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
