"""Operations: what a caller asked for, running to its end whether or not the caller waits.

Operations on one object run one after another in the order they came, those on different objects
side by side. An operation lives in the agent's own nursery: a caller that is killed, or that did
not want to wait, changes nothing about it.
"""

import functools
import logging
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from agent.model.access import Caller
from agent.model.errors import Aborted, CocoonError, Failed

_log = logging.getLogger(__name__)

Report = Callable[[Caller, str, CocoonError | None], Awaitable[None]]
"""Awaited with caller, object id and outcome of every operation, before its caller is told."""

Work = Callable[[], Awaitable[None]]


class Operation:
    """One accepted operation."""

    def __init__(self) -> None:
        self._finished = trio.Event()
        self._error: CocoonError | None = None

    @property
    def finished(self) -> bool:
        return self._finished.is_set()

    async def wait(self) -> None:
        """Return when the operation has succeeded; raise its CocoonError when it failed.

        Cancelling the wait does not stop the operation.
        """
        await self._finished.wait()
        if self._error is not None:
            raise self._error

    def finish(self, error: CocoonError | None) -> None:
        """Set the outcome and wake who waits."""
        self._error = error
        self._finished.set()


class Operations:
    """Starts operations, each when the turn of its object comes, and reports how they ended."""

    def __init__(self, nursery: trio.Nursery, report: Report) -> None:
        self._nursery = nursery
        self._report = report
        self._queues: dict[str, deque[trio.Event]] = {}

    def busy(self, object_id: str) -> bool:
        """Whether an operation on the object runs or waits."""
        return object_id in self._queues

    def submit(self, caller: Caller, object_id: str, work: Work) -> Operation:
        """Take a place in the object's queue, and return; `work` runs when its turn comes."""
        operation = Operation()
        run = functools.partial(self._run, operation, caller, object_id, work)
        self.run_in_turn(object_id, run)
        return operation

    def submit_at_once(self, caller: Caller, object_id: str, work: Work) -> Operation:
        """Run `work` past whatever else runs or waits for the object."""
        operation = Operation()
        self._nursery.start_soon(self._run, operation, caller, object_id, work)
        return operation

    def run_in_turn(self, object_id: str, work: Work) -> None:
        """Run the agent's own `work` when the object's turn comes; nobody is told how it ended."""
        queue = self._queues.setdefault(object_id, deque())
        turn = trio.Event()
        queue.append(turn)
        if queue[0] is turn:
            turn.set()
        self._nursery.start_soon(self._run_when, turn, object_id, work)

    async def _run_when(self, turn: trio.Event, object_id: str, work: Work) -> None:
        try:
            await turn.wait()
            await work()
        except CocoonError as error:
            _log.warning("%s", error)
        except Exception:
            # As below: and a record that cannot be made good must not keep the agent from starting.
            _log.exception("the agent's own work on %s failed unexpectedly", object_id)
        finally:
            queue = self._queues[object_id]
            queue.remove(turn)
            if queue:
                queue[0].set()
            else:
                del self._queues[object_id]

    async def _run(self, operation: Operation, caller: Caller, object_id: str, work: Work) -> None:
        error: CocoonError | None = Aborted(
            "the agent stopped during the operation: it is completed or undone when it is back"
        )
        try:
            await work()
            error = None
        except CocoonError as failure:
            error = failure
        except Exception as failure:
            # A fault of ours must not take other operations, or the mount, with it.
            _log.exception("an operation on %s failed unexpectedly", object_id)
            error = Failed(f"the agent has a fault ({failure!r}): see journalctl -u cocoon-host")
        finally:
            with trio.CancelScope(shield=True):
                await self._report(caller, object_id, error)
            operation.finish(error)
