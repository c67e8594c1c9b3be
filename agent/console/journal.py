"""Serial output as lines of the journal, under the VM's unit.

Protocol: systemd's native journal protocol, one datagram an entry. Each comes with the credentials
of the VM's VMM, as root may (unix(7), SCM_CREDENTIALS): so journald takes it for the unit's own and
counts it against the unit's rate limit, not the agent's. What comes after the VMM is gone is shown
by `journalctl -u` for its OBJECT_SYSTEMD_UNIT=. The `console` log has every byte; the journal gets
lines of text, and only as many as a journal can bear.
"""

import contextlib
import os
import re
import socket
import struct
from collections import deque
from collections.abc import Iterable
from typing import Final

import trio

from agent.model.vm import Vm

SOCKET: Final = "/run/systemd/journal/socket"
LINE_LENGTH: Final = 2048
"""Bytes after which a line goes on in a further entry."""
LINES_PER_SECOND: Final = 100
LINE_BURST: Final = 2000
"""Enough for a booting Linux, at once."""
QUEUE: Final = 4096
"""Entries, of all VMs, that wait for a slow journal; what comes on top is left out."""
_SENDS_PER_TURN: Final = 64

# ECMA-48: CSI sequences, OSC and other strings up to their terminator, two-byte escapes.
_ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\|$)|[ -/]*[0-~])"
)
# journalctl shows a message with a control character as "[… blob data]": show what it was instead.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if code != 0x09}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class LineCutter:
    """Cuts one console's bytes into lines of text, few enough of them; knows no socket.

    At most LINES_PER_SECOND lines pass on average and LINE_BURST at once. What is left out is
    counted and told as soon as there is room again.
    """

    __slots__ = ("_left_out", "_rest", "_room", "_room_at")

    def __init__(self, now: float) -> None:
        self._rest = b""
        self._room = float(LINE_BURST)
        self._room_at = now
        self._left_out = 0

    def feed(self, data: bytes, now: float) -> list[str]:
        """Return the lines that `data`, read at `now` (seconds of a monotonic clock), completes."""
        self._refill(now)
        lines: list[str] = []
        data = self._rest + data
        start = 0
        while self._room >= 1 and (end := data.find(b"\n", start)) >= 0:
            self._take(data[start:end], lines)
            start = end + 1
        self._left_out += data.count(b"\n", start)
        self._rest = data[max(start, data.rfind(b"\n") + 1) :]
        while len(self._rest) > LINE_LENGTH:
            end = _character_boundary(self._rest, LINE_LENGTH)
            self._take(self._rest[:end], lines)
            self._rest = self._rest[end:]
        return lines

    def finish(self, now: float) -> list[str]:
        """Return the line that has no end, if there is one, and what is left to tell."""
        lines = self.feed(b"\n", now)
        if self._left_out:
            lines.append(self._notice())
        return lines

    def lost(self, lines: int) -> None:
        """Count lines that passed and then found no way into the journal."""
        self._left_out += lines

    def _refill(self, now: float) -> None:
        more = (now - self._room_at) * LINES_PER_SECOND
        self._room = min(float(LINE_BURST), self._room + more)
        self._room_at = now

    def _take(self, piece: bytes, lines: list[str]) -> None:
        while piece:
            end = _character_boundary(piece, LINE_LENGTH)
            text = _plain(piece[:end])
            piece = piece[end:]
            if not text:
                continue
            if self._room < 1:
                self._left_out += 1
                continue
            if self._left_out:
                lines.append(self._notice())
            self._room -= 1
            lines.append(text)

    def _notice(self) -> str:
        notice = f"({self._left_out} lines left out here: see the VM's console file)"
        self._left_out = 0
        return notice


class Journal:
    """The one connection to journald. Lines that it does not take in time are dropped."""

    def __init__(self, path: str = SOCKET) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self._queue: deque[tuple[bytes, int]] = deque()
        self._queued = trio.Event()

    def submit(self, lines: Iterable[str], fields: bytes, pid: int = 0) -> int:
        """Log `lines` in the name of process `pid`; return how many were left out. Never waits.

        A `pid` of 0 is the agent's own.
        """
        left_out = 0
        for line in lines:
            entry = b"MESSAGE=" + line.encode() + b"\n" + fields
            if not self._queue and self._send(entry, pid):
                continue
            if len(self._queue) >= QUEUE:
                left_out += 1
                continue
            self._queue.append((entry, pid))
            self._queued.set()
        return left_out

    async def run(self) -> None:
        """Send what could not be sent at once; runs until cancelled."""
        while True:
            await self._queued.wait()
            await self._drain()
            self._queued = trio.Event()

    def close(self) -> None:
        """Let go of the connection; a later `submit` makes another."""
        if self._socket is not None:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
            self._socket = None

    async def _drain(self) -> None:
        sent = 0
        while self._queue:
            if self._send(*self._queue[0]):
                self._queue.popleft()
                sent += 1
                if sent % _SENDS_PER_TURN == 0:
                    await trio.lowlevel.checkpoint()
            elif self._socket is not None:
                # The next line of any console may find the connection dead and make another.
                with contextlib.suppress(trio.ClosedResourceError):
                    await trio.lowlevel.wait_writable(self._socket)

    def _send(self, entry: bytes, pid: int) -> bool:
        """Whether `entry` is dealt with: sent, or impossible to send because nobody listens."""
        for _ in range(2):  # A journald that was replaced leaves a socket that leads nowhere.
            try:
                if self._socket is None:
                    self._connect()
                assert self._socket is not None
                self._socket.sendmsg([entry], _credentials(pid))
            except BlockingIOError:
                return False
            except (ProcessLookupError, PermissionError):
                pid = 0  # The VMM has ended, or the agent may not speak for it.
            except OSError:
                self.close()
            else:
                return True
        return True

    def _connect(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._socket.connect(self._path)


def _credentials(pid: int) -> list[tuple[int, int, bytes]]:
    if not pid:
        return []
    packed = struct.pack("iII", pid, os.geteuid(), os.getegid())  # struct ucred
    return [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, packed)]


def vm_fields(vm: Vm) -> bytes:
    """Return the fields that all entries of the console of `vm` share.

    Names: systemd.journal-fields(7); VM_NAME and VM_ID are ours.
    """
    fields = {
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "console",
        "OBJECT_SYSTEMD_UNIT": vm.unit,
        "VM_NAME": vm.name,
        "VM_ID": vm.id,
    }
    return "".join(f"{name}={value}\n" for name, value in fields.items()).encode()


def _character_boundary(data: bytes, end: int) -> int:
    """Return where to cut `data` at or before `end` so that no UTF-8 character is torn."""
    if end >= len(data):
        return len(data)
    for cut in range(end, end - 4, -1):
        if data[cut] & 0xC0 != 0x80:
            return cut
    return end


def _plain(line: bytes) -> str:
    """Return `line` as text that a terminal and the journal take for what it is."""
    text = _ESCAPES.sub("", line.decode(errors="replace").rstrip("\r"))
    return text.translate(_PICTURES).rstrip()
