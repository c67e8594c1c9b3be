"""What the program inside a jail (tests/guest/inside.c) reports, and how tests read it."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

Identity = tuple[int, int]
"""Device and inode: the same file by whatever path."""


def identity(path: str | Path) -> Identity:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def identities_below(directory: str | Path) -> set[Identity]:
    return {identity(directory)} | {identity(path) for path in Path(directory).rglob("*")}


@dataclass(frozen=True)
class Seen:
    """A path that the program inside sees."""

    path: str
    kind: str
    identity: Identity
    access: str


@dataclass
class Report:
    """What the program inside tried, and what came of it."""

    seen: list[Seen] = field(default_factory=list)
    changed: list[tuple[str, str]] = field(default_factory=list)
    made: set[str] = field(default_factory=set)
    descriptors: dict[int, tuple[str, Identity, int]] = field(default_factory=dict)
    calls: dict[str, str] = field(default_factory=dict)
    processes: dict[tuple[int, str], str] = field(default_factory=dict)
    sockets: dict[str, str] = field(default_factory=dict)
    interfaces: list[str] = field(default_factory=list)
    status: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, lines: Iterable[str]) -> Self:
        report = cls()
        for line in lines:
            topic, *words = line.split("\t")
            report.add(topic, words)
        return report

    def add(self, topic: str, words: list[str]) -> None:
        match topic:
            case "path":
                path, kind, _, _, _, device, inode, _, access = words
                self.seen.append(Seen(path, kind, (int(device), int(inode)), access))
            case "changed":
                self.changed.append((words[0], words[1]))
            case "made":
                self.made.add(words[0])
            case "descriptor":
                number, kind, device, inode, flags = words
                file = int(device), int(inode)
                self.descriptors[int(number)] = kind, file, int(flags, 8)
            case "call":
                self.calls[words[0]] = words[1]
            case "process":
                self.processes[int(words[0]), words[1]] = words[2]
            case "socket":
                self.sockets[words[0]] = words[1]
            case "interface":
                self.interfaces.append(words[0])
            case "status":
                self.status[words[0]] = words[1]
            case "environment":
                name, _, value = words[0].partition("=")
                self.environment[name] = value
            case _:
                raise ValueError(topic)
