"""When many VMs start at once, what nobody waits for comes after what somebody waits for."""

from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Rush:
    """How many starts are under way."""

    def __init__(self) -> None:
        self._starts = 0
        self._over = trio.Event()

    @contextmanager
    def start(self) -> Iterator[None]:
        """Count one more start for as long as the block takes."""
        self._starts += 1
        try:
            yield
        finally:
            self._starts -= 1
            if not self._starts:
                self._over.set()
                self._over = trio.Event()

    async def over(self, patience: float) -> None:
        """Wait until no start is under way, `patience` seconds at most."""
        with trio.move_on_after(patience):
            while self._starts:
                await self._over.wait()
