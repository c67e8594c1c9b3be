"""Tables for people: aligned and cut to fit a terminal; whole, with tabs, for a program."""

import io
import os
import sys
import unicodedata
from collections.abc import Sequence
from typing import Final

_GAP: Final = "  "
_CUT: Final = "…"


def printable(text: str) -> str:
    """Return `text` on one line, with what would steer a terminal shown as an escape sequence."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def show_table(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> None:
    """Print rows, the first of which has the titles; columns in `right` align there.

    A terminal gets them in columns, each row cut at its width. Anything else gets all of it, a tab
    between values, and `-` for what is empty, so that columns can be counted.
    """
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(errors="backslashreplace")
    cells = [[printable(value) or "-" for value in row] for row in rows]
    if out.isatty():
        lines = _aligned(cells, right, os.get_terminal_size(out.fileno()).columns)
    else:
        lines = ["\t".join(row) for row in cells]
    out.write("".join(f"{line}\n" for line in lines))


def _aligned(cells: Sequence[Sequence[str]], right: frozenset[int], columns: int) -> list[str]:
    widths = [max(map(width, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = []
        for number, (value, most) in enumerate(zip(row, widths, strict=True)):
            space = " " * (most - width(value))
            padded.append(space + value if number in right else value + space)
        lines.append(fit(_GAP.join(padded).rstrip(), columns))
    return lines


def fit(text: str, columns: int) -> str:
    """Return `text`, cut to `columns` columns; 0 columns mean that nobody knows how many."""
    if columns <= 0 or width(text) <= columns:
        return text
    kept, used = [], width(_CUT)
    for character in text:
        used += width(character)
        if used > columns:
            break
        kept.append(character)
    return "".join(kept) + _CUT


def width(text: str) -> int:
    """Return how many columns `text` takes."""
    if text.isascii():
        return len(text)
    return sum(map(_character_width, text))


def _character_width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
