"""What the checks of the host found: a level, a name, what is so, and what to do about it."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """`WARN`: VMs run, but something is slower or missing. `FAIL`: what should work does not."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's outcome; `remedy` is what a person can type or do, "" when nothing is wrong."""

    level: Level
    name: str
    detail: str
    remedy: str = ""

    @property
    def sentence(self) -> str:
        """What is so, and the remedy, on one line."""
        whole = f"{self.detail}: {self.remedy}" if self.remedy else self.detail
        return " ".join(whole.split())


def show_findings(findings: Iterable[Finding], width: int = 0) -> str:
    """Return aligned lines, one a finding; with a `width`, in columns, long ones are folded."""
    found = list(findings)
    column = max((len(finding.name) for finding in found), default=0)
    lines = []
    for finding in found:
        head = f"{finding.level:4}  {finding.name:{column}}  "
        line = head + finding.sentence
        if width > len(head):
            # Commands and paths in it are to be copied: they are not broken at hyphens.
            line = textwrap.fill(
                line,
                width,
                subsequent_indent=" " * len(head),
                break_on_hyphens=False,
                break_long_words=False,
            )
        lines.append(f"{line}\n")
    return "".join(lines)
