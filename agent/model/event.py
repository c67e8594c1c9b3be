"""What happened to an object, as `events` tells it."""

import json
from dataclasses import dataclass
from typing import Literal

from .vm import timestamp

Type = Literal["ADDED", "MODIFIED", "REMOVED", "OVERFLOW"]
Kind = Literal["vm", "snapshot", "image"]


@dataclass(frozen=True, slots=True)
class Event:
    """One committed transition; `generation` lets a reader who reconnects tell what it missed."""

    time: float
    type: Type
    kind: Kind
    name: str
    id: str
    state: str
    reason: str
    generation: int
    details: tuple[tuple[str, str | int | float], ...] = ()

    def line(self) -> bytes:
        """Return the event as one line of JSON, newline included."""
        fields: dict[str, object] = {
            "time": timestamp(self.time),
            "type": self.type,
            "kind": self.kind,
            "name": self.name,
            "id": self.id,
            "state": self.state,
            "reason": self.reason,
            "generation": self.generation,
            **dict(self.details),
        }
        return json.dumps(fields, ensure_ascii=False).encode() + b"\n"
