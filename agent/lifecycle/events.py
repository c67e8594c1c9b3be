"""What happened, and what was refused: two bounded logs, one of them also a live stream."""

import json
import logging
import time

import trio

from agent.console.fanout import ByteStream, Fanout
from agent.console.log import BoundedLog
from agent.model.access import Caller
from agent.model.errors import CocoonError
from agent.model.event import Event, Kind, Type
from agent.model.image import Image
from agent.model.snapshot import Snapshot
from agent.model.vm import Vm, timestamp

_logger = logging.getLogger(__name__)


class Lines:
    """A log that takes lines without waiting and writes together what came together."""

    def __init__(self, log: BoundedLog, fanout: Fanout | None = None) -> None:
        self.log = log
        self._fanout = fanout
        self._batch = _Batch()
        self._last: _Batch | None = None
        self._is_over = False

    def put(self, line: bytes) -> None:
        """Add a line; it can be read soon."""
        self._batch.lines.append(line)
        self._batch.begun.set()

    async def flush(self) -> None:
        """Wait until what was put so far can be read, or never will be."""
        if self._is_over:
            return
        batch = self._batch if self._batch.lines else self._last
        if batch is not None:
            await batch.written.wait()

    async def run(self) -> None:
        """Write what is put, until cancelled."""
        try:
            while True:
                await self._batch.begun.wait()
                await self._write()
        finally:
            if self._batch.lines:
                await self._write()
            self._is_over = True

    async def _write(self) -> None:
        batch, self._batch = self._batch, _Batch()
        self._last = batch
        data = b"".join(batch.lines)
        with trio.CancelScope(shield=True):
            try:
                await self.log.append(data)
            except OSError as error:
                _logger.error("events cannot be written, lines are lost: %s", error)
            if self._fanout is not None:
                self._fanout.publish(data)
        batch.written.set()


class _Batch:
    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.begun = trio.Event()
        self.written = trio.Event()


class Events:
    """The agent's own account: `happened` goes to `events`, `refused` to `errors`."""

    def __init__(self, directory: str, limit: int) -> None:
        self._fanout = Fanout(overflow=_overflow_line)
        self.events = Lines(BoundedLog(f"{directory}/events", limit), self._fanout)
        self.errors = Lines(BoundedLog(f"{directory}/errors", limit))

    def live(self) -> ByteStream:
        """Return a stream of the events from now on."""
        return self._fanout.subscribe()

    async def flush(self) -> None:
        """Wait until all that was told so far can be read in both logs."""
        await self.events.flush()
        await self.errors.flush()

    async def run(self) -> None:
        """Write both logs, until cancelled; the live streams end with it."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.events.run)
                nursery.start_soon(self.errors.run)
        finally:
            self._fanout.close()

    def happened(
        self, kind: Type, record: Vm | Snapshot | Image, **details: str | int | float
    ) -> None:
        """Tell of a committed transition of a VM, a snapshot or an image."""
        what: Kind = "vm"
        if not isinstance(record, Vm):
            what = "image" if isinstance(record, Image) else "snapshot"
        event = Event(
            time=record.updated_at,
            type=kind,
            kind=what,
            name=record.name,
            id=record.id,
            state=record.state.value,
            reason=record.reason,
            generation=record.generation,
            details=tuple(details.items()),
        )
        self.events.put(event.line())
        fields = {"VM_NAME": record.name, "VM_ID": record.id} if what == "vm" else {}
        _logger.info(
            "%s %s is %s (%s)",
            "VM" if what == "vm" else what,
            record.name,
            "gone" if kind == "REMOVED" else record.state.value,
            record.reason,
            extra={"fields": {**fields, "OPERATION": record.reason}},
        )

    def refused(self, caller: Caller, error: CocoonError, vm: Vm | None) -> None:
        """Tell of a refusal or failure: time, uid, path, sentence."""
        sentence = " ".join(str(error).split())
        moment = timestamp(time.time())
        self.errors.put(f"{moment} {caller.uid} {caller.path} {sentence}\n".encode())
        fields = {"VM_NAME": vm.name, "VM_ID": vm.id} if vm else {}
        _logger.warning("%s: %s", caller.path, sentence, extra={"fields": fields})


def _overflow_line(lost: int) -> bytes:
    event = {"time": timestamp(time.time()), "type": "OVERFLOW", "lost_bytes": lost}
    return json.dumps(event).encode() + b"\n"
