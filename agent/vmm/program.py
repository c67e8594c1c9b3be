"""Finds a VMM's program and asks it for its version, once until it changes."""

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import suppress

import trio

from agent.model.errors import Failed, Missing, TimedOut, Unsupported

from .driver import Version

_ANSWER_WITHIN = 10.0
_PROGRAM_INTERPRETER = 3  # PT_INTERP, elf(5)


class Program:
    """One VMM program: `name` on root's PATH, or the path that the settings give."""

    def __init__(
        self,
        name: str,
        path: str,
        *,
        title: str,
        pattern: str,
        minimum: tuple[int, ...],
        remedy: str,
    ) -> None:
        """`pattern` finds the version in what `--version` prints; its groups are the numbers.

        Errors call it `title`; `remedy` is what to do about a version before `minimum`.
        """
        self._name = name
        self._title = title
        self._pattern = re.compile(pattern)
        self._path = path
        self._minimum = minimum
        self._remedy = remedy
        self._known: tuple[tuple[object, ...], Version] | None = None
        self._asking = trio.Lock()

    async def version(self) -> Version:
        """Return the program's path and version.

        Raises Missing when there is none, Unsupported when it is too old, Failed or TimedOut when
        it does not say its version. A cancellation waits for the program, which has 10 s.
        """
        async with self._asking:
            # Part of every start: a few looks at local directories, cheaper than a thread for them.
            path = self._find()
            facts = os.stat(path)
            identity = (path, facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
            if self._known is None or self._known[0] != identity:
                self._known = identity, await trio.to_thread.run_sync(self._ask, path)
            version = self._known[1]
        if version.numbers < self._minimum:
            raise Unsupported(
                f"{version.binary} is {self._title} {version.text}: versions from "
                f"{'.'.join(map(str, self._minimum))} work, {self._remedy}"
            )
        return version

    def _find(self) -> str:
        found = shutil.which(self._path or self._name)
        if found is None:
            where = f"at {self._path}" if "/" in self._path else "on the agent's PATH"
            raise Missing(
                f"there is no program {self._name} {where}: install it, or name its path in "
                "/etc/cocoon/agent.toml"
            )
        return os.path.realpath(found)

    def _ask(self, path: str) -> Version:
        try:
            done = subprocess.run(
                [path, "--version"],
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=_ANSWER_WITHIN,
            )
        except subprocess.TimeoutExpired:
            raise TimedOut(f"{path} --version did not end within {_ANSWER_WITHIN:g} s") from None
        except OSError as error:
            raise Failed(f"{path} cannot be run: {error.strerror}") from None
        match = self._pattern.search(done.stdout.decode(errors="replace"))
        if match is None:
            raise Failed(f"{path} --version does not tell a version of {self._name}")
        numbers = tuple(int(number) for number in match.groups())
        return Version(path, ".".join(map(str, numbers)), numbers, is_dynamic(path))


def is_dynamic(path: str) -> bool:
    """Whether the program at `path` is an ELF64 file that wants a dynamic loader, or a script."""
    with open(path, "rb") as file:
        header = file.read(64)
        if header[:4] != b"\x7fELF" or len(header) < 64:
            return True
        (offset,) = struct.unpack_from("<Q", header, 0x20)
        size, count = struct.unpack_from("<HH", header, 0x36)
        file.seek(offset)
        table = file.read(size * count)
    return any(
        struct.unpack_from("<I", table, index * size)[0] == _PROGRAM_INTERPRETER
        for index in range(len(table) // max(size, 1))
    )


def has_thread(pid: int, prefix: bytes) -> bool:
    """Whether the process has a thread of such a name; false when it is gone."""
    return any(name.startswith(prefix) for name in _thread_names(pid))


def count_threads(pid: int, prefix: bytes) -> int:
    """Return how many threads of such a name the process has; 0 when it is gone."""
    return sum(name.startswith(prefix) for name in _thread_names(pid))


def _thread_names(pid: int) -> Iterator[bytes]:
    """Yield the names of the process's threads, none when it is gone."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return
    for task in reversed(tasks):  # those of vCPUs come last
        with suppress(FileNotFoundError, ProcessLookupError):
            comm = os.open(f"/proc/{pid}/task/{task}/comm", os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield os.read(comm, 16)
            finally:
                os.close(comm)
