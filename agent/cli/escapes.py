"""What a user types at a console: input for the guest, and escape sequences in it, as ssh has them.

Bytes in, events out; it does no I/O.
"""

from enum import Enum, auto
from typing import Final

DETACH_KEY: Final = b"\x1d"
"""Ctrl-], which detaches at any place in a line, as virsh and socat users expect."""
_SUSPEND_KEY: Final = b"\x1a"
_LINE_ENDS: Final = b"\r\n"


class Escape(Enum):
    """What the user asks of this program instead of the guest."""

    DETACH = auto()
    HELP = auto()
    TYPE_WINDOW_SIZE = auto()
    SUSPEND = auto()


Event = bytes | Escape


class EscapeParser:
    """Finds escape sequences. They count at the start of a line: after Enter, and at first.

    The escape character is held until the next one tells what it is. Twice it is itself once;
    before one that means nothing both are the guest's. Without an escape character, nothing is an
    escape sequence.
    """

    def __init__(self, character: bytes | None = b"~") -> None:
        self.character = character
        self._at_start = True
        self._held = False
        self._meanings = {
            b".": Escape.DETACH,
            b"?": Escape.HELP,
            b"w": Escape.TYPE_WINDOW_SIZE,
            _SUSPEND_KEY: Escape.SUSPEND,
        }

    def feed(self, data: bytes) -> list[Event]:
        """Return what `data` means, input of the guest in as few pieces as possible."""
        if self.character is None:
            return [data] if data else []
        events: list[Event] = []
        text = bytearray()
        for number in data:
            event = self._next(bytes((number,)))
            if isinstance(event, bytes):
                text += event
                continue
            if text:
                events.append(bytes(text))
                text.clear()
            events.append(event)
        if text:
            events.append(bytes(text))
        return events

    def _next(self, character: bytes) -> Event:
        if self._held:
            self._held = False
            if character in self._meanings:
                return self._meanings[character]
            self._at_start = character in _LINE_ENDS
            if character in (self.character, DETACH_KEY):
                return character
            return (self.character or b"") + character
        if character == DETACH_KEY:
            return Escape.DETACH
        if self._at_start and character == self.character:
            self._held = True
            return b""
        self._at_start = character in _LINE_ENDS
        return character
