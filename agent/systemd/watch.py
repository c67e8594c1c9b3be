"""What systemd tells of services, as values: the state of one, and a stream of changes.

Properties are those of org.freedesktop.systemd1(5).
"""

import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .bus import Received, properties

UNITS = "/org/freedesktop/systemd1/unit"
"""The path below which systemd has its units."""

ENDED = frozenset({"inactive", "failed"})
"""The active states of a unit of which nothing runs."""

STATE_PROPERTIES = frozenset(
    {
        "ActiveState",
        "SubState",
        "InvocationID",
        "Result",
        "MainPID",
        "ExecMainCode",
        "ExecMainStatus",
        "NRestarts",
    }
)
"""The properties that make a UnitState."""

_ENDED_AT = "InactiveEnterTimestampMonotonic"
_WATCHED = STATE_PROPERTIES | {_ENDED_AT}


@dataclass(frozen=True, slots=True)
class UnitState:
    """What systemd says of a service now.

    `exec_main_code` is a CLD_ constant of waitid(2) (0 while the process runs), and
    `exec_main_status` its exit status or signal; `invocation` is 32 hexadecimal digits that differ
    from start to start, "" before the first.
    """

    active: str
    sub: str
    result: str
    main_pid: int
    exec_main_code: int
    exec_main_status: int
    restarts: int
    invocation: str


@dataclass(frozen=True, slots=True)
class UnitChange:
    """A unit is in a new state; None: systemd forgot the unit."""

    unit: str
    state: UnitState | None


@dataclass(frozen=True, slots=True)
class Resync:
    """Changes may have been missed: ask for the state of all units; from here on none is missed."""


Changes = AsyncIterator[UnitChange | Resync]
"""What a consumer of changes iterates over."""


def unit_path(unit: str) -> str:
    """Return the object path of a unit (sd_bus_path_encode(3))."""
    label = re.sub(r"^[0-9]|[^A-Za-z0-9]", lambda match: f"_{ord(match[0]):02x}", unit)
    return f"{UNITS}/{label}"


def unit_name(path: str) -> str:
    """Return the unit of an object path."""
    label = path.removeprefix(f"{UNITS}/")
    return re.sub(r"_([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), label)


def unit_state_of(values: Mapping[str, Any]) -> UnitState:
    """Return the state that STATE_PROPERTIES have in `values`."""
    return UnitState(
        active=values["ActiveState"],
        sub=values["SubState"],
        result=values["Result"],
        main_pid=values["MainPID"],
        exec_main_code=values["ExecMainCode"],
        exec_main_status=values["ExecMainStatus"],
        restarts=values["NRestarts"],
        invocation=values["InvocationID"].hex(),
    )


class Watch:
    """Turns signals about services whose names begin alike into changes, for one consumer."""

    def __init__(self, prefix: str, put: Callable[[UnitChange | Resync], None]) -> None:
        self._path_prefix = unit_path(prefix)
        self._put = put
        self._values: dict[str, dict[str, Any]] = {}
        self._states: dict[str, UnitState] = {}

    def state(self, unit: str) -> UnitState | None:
        """Return what was told last of a unit, None when nothing was."""
        return self._states.get(unit_path(unit))

    def properties_changed(self, signal: Received) -> None:
        """Take a PropertiesChanged signal of any unit."""
        path = signal.path
        if not path.startswith(self._path_prefix):
            return
        values = self._values.setdefault(path, {_ENDED_AT: 0})
        ended_at = values[_ENDED_AT]
        news = properties(signal, _WATCHED)
        values |= news
        # systemd tells the service's properties first, and then the unit's, which complete them.
        if "ActiveState" not in news or not values.keys() >= _WATCHED:
            return
        state = unit_state_of(values)
        # A unit about to start is once more said to have ended, when it did before.
        starts = state.active in ENDED and values[_ENDED_AT] == ended_at
        if not starts and state != self._states.get(path):
            self._states[path] = state
            self._put(UnitChange(unit_name(path), state))

    def unit_removed(self, unit: str, path: str) -> None:
        """Take a UnitRemoved signal of any unit; systemd sends them also after mere questions."""
        self._values.pop(path, None)
        if self._states.pop(path, None) is not None:
            self._put(UnitChange(unit, None))

    def resynchronise(self) -> None:
        """Start anew, since signals may have been missed."""
        self._values.clear()
        self._states.clear()
        self._put(Resync())
