"""Where the agent's log goes: to the journal with fields under systemd, else to the terminal."""

import logging
import os
import socket
import sys

from .settings import LOG_LEVELS

JOURNAL_SOCKET = "/run/systemd/journal/socket"
# Priorities of syslog(3), which the journal uses.
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}


class JournalHandler(logging.Handler):
    """Sends records to journald by its native protocol, one datagram each.

    A record's `fields` attribute (a mapping) becomes journal fields: VM_NAME, VM_ID, OPERATION.
    What the journal does not take at once is dropped: logging must not hold up the loop.
    """

    def __init__(self, path: str = JOURNAL_SOCKET) -> None:
        super().__init__()
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; see logging.Handler."""
        fields = {
            "MESSAGE": self.format(record),
            "PRIORITY": str(_PRIORITIES.get(record.levelno, 5)),
            "SYSLOG_IDENTIFIER": "cocoon-host",
            "LOGGER": record.name,
            **getattr(record, "fields", {}),
        }
        # VM_NAME= would do for a search; OBJECT_SYSTEMD_UNIT= shows it in `journalctl -u` as well.
        if "VM_NAME" in fields:
            fields["OBJECT_SYSTEMD_UNIT"] = f"cocoon-vm-{fields['VM_NAME']}.service"
        try:
            self._socket.sendto(b"".join(map(_field, fields, fields.values())), self._path)
        except OSError:
            self.handleError(record)


def start_logging(level: str) -> None:
    """Send the log where whoever started the agent looks for it."""
    to_journal = "JOURNAL_STREAM" in os.environ and os.path.exists(JOURNAL_SOCKET)
    handler = JournalHandler() if to_journal else logging.StreamHandler(sys.stderr)
    layout = "%(message)s" if to_journal else "%(asctime)s %(levelname)s %(message)s"
    handler.setFormatter(logging.Formatter(layout))
    logging.basicConfig(handlers=[handler])
    logging.raiseExceptions = not to_journal
    set_level(level)


def set_level(level: str) -> None:
    """Log what is at least as grave as `level`, one of LOG_LEVELS."""
    assert level in LOG_LEVELS
    logging.getLogger().setLevel(level.upper())
    # One line a request of ours says nothing that the caller does not.
    for chatty in ("httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _field(name: str, value: str) -> bytes:
    """Return a field of systemd's native journal protocol; values with newlines carry a length."""
    data = value.encode(errors="replace")
    if b"\n" not in data:
        return name.encode() + b"=" + data + b"\n"
    return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
