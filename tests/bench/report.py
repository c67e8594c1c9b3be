"""Rows of the benchmarks' table: how they leave the lab, are judged and are shown."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One comparison, or one figure. What is shown and judged is the median of the samples.

    `beside` are samples of what it is compared with, taken in turn with `ours`. The target is a
    bound: `most` or `least`, of the ratio of both medians where there is something beside, else of
    the median itself. Without either the row is there to explain others. Where nothing is
    `compared`, what is beside is a second figure.
    """

    what: str
    unit: str
    ours: Sequence[float]
    beside: Sequence[float] = ()
    most: float | None = None
    least: float | None = None
    compared: bool = True

    @property
    def ratio(self) -> float | None:
        """Our median in proportion to the other."""
        if not self.beside or not self.compared:
            return None
        other = statistics.median(self.beside)
        return statistics.median(self.ours) / other if other else math.inf

    @property
    def judged(self) -> float:
        """The figure that the target is about."""
        return statistics.median(self.ours) if self.ratio is None else self.ratio

    @property
    def target(self) -> str:
        """The bound in words, "" for none."""
        unit = "" if self.beside else f" {self.unit}"
        if self.most is not None:
            return f"at most {self.most:g}{unit}"
        if self.least is not None:
            return f"at least {self.least:g}{unit}"
        return ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if self.most is not None:
            return self.judged <= self.most
        if self.least is not None:
            return self.judged >= self.least
        return None

    def line(self) -> str:
        """Return the row as a line of JSON; `row_of` reads it."""
        return json.dumps(dataclasses.asdict(self))

    def document(self) -> dict[str, Any]:
        """Return all that the JSON file says of the row."""
        return {
            **dataclasses.asdict(self),
            "median": statistics.median(self.ours),
            "median_beside": statistics.median(self.beside) if self.beside else None,
            "ratio": self.ratio,
            "target": self.target,
            "met": self.met,
        }

    def cells(self) -> tuple[str, ...]:
        """Return what the table shows."""
        return (
            self.what,
            _shown(self.ours, self.unit),
            _shown(self.beside, self.unit) if self.beside else "",
            "" if self.ratio is None else f"{self.ratio:.2f}",
            self.target,
            {True: "ok", False: "missed", None: ""}[self.met],
        )


def row_of(line: str) -> Row:
    """Return the row that `Row.line` wrote."""
    return Row(**json.loads(line))


def table(rows: Iterable[Row], ours: str, beside: str) -> list[str]:
    """Return the lines of a table; `ours` and `beside` head the columns of medians."""
    lines = [("", ours, beside, "ratio", "target", ""), *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(_aligned(cells, widths)).rstrip() for cells in lines]


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> Iterable[str]:
    for number, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        yield cell.rjust(width) if 1 <= number <= 3 else cell.ljust(width)


def _shown(samples: Sequence[float], unit: str) -> str:
    value = statistics.median(samples)
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} {unit}"
