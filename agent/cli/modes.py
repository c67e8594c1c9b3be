"""The terminal modes that output switched on, and what switches them off again.

A guest whose editor is on the screen when the user detaches leaves a terminal in the alternate
screen, with the mouse captured or the cursor hidden; termios knows nothing of these. Sequences are
those of xterm (ctlseqs: DECSET, DECRST, DECKPAM, SGR, RIS). It does no I/O.
"""

import re
from typing import Final

_ORDER: Final = (1, 7, 25, 47, 1000, 1002, 1003, 1004, 1005, 1006, 1015, 1047, 1049, 2004)
"""Private modes that are put back, leaving the alternate screen late."""
_NORMALLY_ON: Final = frozenset({7, 25})
_SEQUENCE: Final = re.compile(rb"\x1b(?:\[\?([0-9;]*)([hl])|\[([0-9;]*)m|([=>])|(c))")
_UNFINISHED: Final = re.compile(rb"\x1b(?:\[\??[0-9;]{0,64})?\Z")


class ModeTracker:
    """Follows what a terminal is told."""

    def __init__(self) -> None:
        self._rest = b""
        self._changed: set[int] = set()
        self._keypad = False
        self._coloured = False

    def feed(self, data: bytes) -> None:
        """Take note of output, which may break off within a sequence."""
        data = self._rest + data
        unfinished = _UNFINISHED.search(data)
        self._rest = data[unfinished.start() :] if unfinished else b""
        for modes, switch, rendition, keypad, reset in _SEQUENCE.findall(data):
            if switch:
                self._switch(modes, switch == b"h")
            elif keypad:
                self._keypad = keypad == b"="
            elif reset:
                self._changed.clear()
                self._keypad = self._coloured = False
            else:
                self._coloured = rendition.strip(b"0;") != b""

    def undo(self) -> bytes:
        """Return what puts the terminal back, nothing when all is as it was."""
        undone = [
            b"\x1b[?%d%c" % (mode, b"h" if mode in _NORMALLY_ON else b"l")
            for mode in _ORDER
            if mode in self._changed
        ]
        if self._keypad:
            undone.append(b"\x1b>")
        if self._coloured:
            undone.append(b"\x1b[m")
        return b"".join(undone)

    def _switch(self, modes: bytes, on: bool) -> None:
        for text in modes.split(b";"):
            mode = int(text or 0)
            if mode in _ORDER and on != (mode in _NORMALLY_ON):
                self._changed.add(mode)
            else:
                self._changed.discard(mode)
