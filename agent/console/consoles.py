"""All consoles: one pump a running VM reads its output once and gives it to everyone."""

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import trio

from agent.model.errors import Invalid, TimedOut, from_os_error
from agent.model.vm import Vm

from . import journal
from .fanout import ByteStream, Fanout
from .inherited import Inherited
from .journal import Journal, LineCutter
from .log import LIMIT, BoundedLog
from .serial import SerialSocket
from .sockets import ConsoleSocket
from .source import CAPACITY, NOTIFY_SOCKET, Fifos, remove_fifos

HISTORY: Final = 64 * 1024
"""Bytes of the log that a live stream shows first."""
HELD_LINES: Final = 1000
"""Lines for the journal that wait, after a start, until the VMM's process is known."""
WRITE_TIMEOUT: Final = 5.0
"""Seconds that input waits for a guest that does not read."""
READ_SIZE: Final = 64 * 1024
SHORTEST_PAUSE: Final = 0.005
LONGEST_PAUSE: Final = 0.05
"""Seconds between reads of one console: with READ_SIZE, no guest gets more than 1.3 MB/s read."""
HANG_UP_LIMIT: Final = 1.0
"""Seconds that a VMM has to end the connection of an agent that leaves."""
_THREADS: Final = 2

Source = Fifos | SerialSocket
"""Where a VM's output comes from: standard streams, or a socket that its VMM makes."""

_logger = logging.getLogger(__name__)


class Consoles:
    """The consoles of all VMs, by VM id.

    `run_dir` holds a directory a VM, root's alone, for the FIFOs, and `console/` for the sockets;
    both it and `log_dir` must exist. A VM that runs has an open console: its source, a socket, its
    log's descriptor and a pump. Any other VM has a file.
    """

    def __init__(
        self,
        run_dir: str,
        log_dir: str,
        *,
        log_limit: int = LIMIT,
        notify_socket: str = NOTIFY_SOCKET,
        journal_socket: str = journal.SOCKET,
        inherited: Inherited | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._log_dir = log_dir
        self._log_limit = log_limit
        self._notify_socket = notify_socket
        self._journal = Journal(journal_socket)
        self._inherited = inherited or Inherited({})
        self._threads = trio.CapacityLimiter(_THREADS)
        self._consoles: dict[str, _Console] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        """Own the tasks of all consoles until cancelled; call `open` once this has started.

        Sockets that an earlier agent left go first. At the end, streams and clients end, and what
        the guests write from then on waits for the next agent.
        """
        self._clear_sockets()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._journal.run)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            with trio.CancelScope(shield=True):
                for console in list(self._consoles.values()):
                    await console.leave()
                    console.fanout.close()
                    await console.log.close()
            self._journal.close()

    async def open(self, vm: Vm, *, serial_socket: bool = False) -> None:
        """Make the console ready for a start of `vm`: source, socket, pump; raises CocoonError.

        Without it systemd would wait for ever in opening the FIFOs; with `serial_socket` there are
        none, and the VMM makes a socket. A console that is open stays as it is.
        """
        with self._using(vm.id) as console:
            if console.is_open:
                return
            # Before the first output: what is read and not in the log yet dies with the agent.
            with contextlib.suppress(OSError):  # on a full disk VMs start all the same
                await console.log.open()
            if self._nursery is None:
                await console.log.close()
                raise Invalid(f"console of {vm.name}: the agent is not up yet, or leaving")
            try:
                run = self._run_directory(vm.id)
                source = SerialSocket(run, vm, self._inherited) if serial_socket else Fifos(run)
                console.open(vm, source, run, self.socket_path(vm.id), self._nursery)
            except BaseException:
                await console.log.close()
                raise

    async def keep(self, vm: Vm, main_pid: int) -> None:
        """Give the source to the unit of the started VMM, which keeps it without the agent.

        Idempotent. Raises Failed or TimedOut when systemd cannot be told.
        """
        console = self._consoles.get(vm.id)
        if console is None or console.source is None:
            raise Invalid(f"console of {vm.name}: it is not open")
        self.speak_for(vm, main_pid)
        await console.source.keep(main_pid, self._notify_socket)

    def speak_for(self, vm: Vm, main_pid: int) -> None:
        """Log to the journal in the name of the VMM's process, as its unit's; `keep` does it too.

        Until then a console that is open holds its lines back.
        """
        console = self._consoles.get(vm.id)
        if console is not None:
            console.speak_for(main_pid)

    async def adopt(self, vm: Vm, main_pid: int = 0) -> None:
        """Take over the console of a VM whose unit runs already; raises CocoonError.

        What the guest wrote meanwhile is read first. With `main_pid` the unit is given the FIFOs
        once more: an agent that died between a start and `keep` is made good.
        """
        await self.open(vm)
        if main_pid > 0:
            await self.keep(vm, main_pid)

    async def close(self, vm: Vm) -> None:
        """Read what a VM that has stopped left behind, then let go of its FIFOs and socket.

        Clients of the socket are sent the rest and disconnected; streams wait for the next start.
        """
        with self._using(vm.id) as console, trio.CancelScope(shield=True):
            await console.close()

    async def forget(self, vm: Vm) -> None:
        """Delete what there is of the console of a VM that is removed; its streams end."""
        with self._using(vm.id) as console, trio.CancelScope(shield=True):
            await console.close()
            console.fanout.close()
            try:
                await console.log.remove()
                remove_fifos(self._run_directory(vm.id))
            except OSError as error:
                raise from_os_error(error, f"removing the console of {vm.name}") from error

    def log(self, vm_id: str) -> BoundedLog:
        """Return the log of everything the guest wrote, over all its starts."""
        console = self._consoles.get(vm_id)
        return self._new_log(vm_id) if console is None else console.log

    @asynccontextmanager
    async def live(self, vm_id: str) -> AsyncIterator[ByteStream]:
        """Return a stream of the last 64 KiB and all that comes, over stops and starts of the VM.

        It ends when the VM is removed or the agent leaves.
        """
        with self._using(vm_id) as console:
            # In one step, so that nothing is missing between the two and nothing is there twice.
            async with console.fanout.subscribe(console.log.excerpt(HISTORY)) as stream:
                await trio.lowlevel.checkpoint()
                yield stream

    async def write(self, vm_id: str, data: bytes) -> int:
        """Send `data` to the guest; return how many bytes it took within WRITE_TIMEOUT seconds.

        Raises Invalid when there is no process, TimedOut when the guest took nothing.
        """
        console = self._consoles.get(vm_id)
        if console is None:
            raise Invalid("nothing reads the console: the VM has no process; start it first")
        return await console.write(data)

    def socket_path(self, vm_id: str) -> str:
        """Return where the console's Unix socket is while the VM has a process."""
        return os.path.join(self._socket_directory, f"{vm_id}.sock")

    async def set_access(self, vm: Vm) -> None:
        """Let the socket follow the VM's owner, group and mode; raises CocoonError."""
        console = self._consoles.get(vm.id)
        if console is not None and console.socket is not None:
            console.socket.set_access(vm.access)
        await trio.lowlevel.checkpoint()

    @property
    def _socket_directory(self) -> str:
        return os.path.join(self._run_dir, "console")

    def _run_directory(self, vm_id: str) -> str:
        return os.path.join(self._run_dir, vm_id)

    def _new_log(self, vm_id: str) -> BoundedLog:
        path = os.path.join(self._log_dir, f"{vm_id}.console")
        return BoundedLog(path, self._log_limit, self._threads)

    @contextmanager
    def _using(self, vm_id: str) -> Iterator["_Console"]:
        """Have the console of a VM for as long as the block takes, and longer while it is open."""
        console = self._consoles.get(vm_id)
        if console is None:
            console = _Console(vm_id, self._new_log(vm_id), self._journal)
            if self._nursery is None:
                console.fanout.close()
            self._consoles[vm_id] = console
        console.users += 1
        try:
            yield console
        finally:
            console.users -= 1
            if not console.users and not console.is_open:
                del self._consoles[vm_id]

    def _clear_sockets(self) -> None:
        directory = self._socket_directory
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory)
        # Users pass through it, whatever the umask says; each socket has a mode of its own.
        os.chmod(directory, 0o755)  # noqa: S103
        for name in os.listdir(directory):
            os.unlink(os.path.join(directory, name))


class _Console:
    """One VM's console: a log and a fan-out, and while it is open, a source, a socket, a pump."""

    def __init__(self, vm_id: str, log: BoundedLog, to_journal: Journal) -> None:
        self.vm_id = vm_id
        self.log = log
        self.fanout = Fanout()
        self.source: Source | None = None
        self.socket: ConsoleSocket | None = None
        self.users = 0
        self._journal = to_journal
        self._fields = b""
        self._main_pid = 0
        self._held: list[str] = []
        self._lines = LineCutter(0)
        self._pumping = trio.CancelScope()
        self._pump_ended = trio.Event()
        self._log_failed = False

    @property
    def is_open(self) -> bool:
        return self.source is not None

    def open(
        self, vm: Vm, source: Source, directory: str, socket_path: str, nursery: trio.Nursery
    ) -> None:
        try:
            self.socket = ConsoleSocket(socket_path, directory, vm.access)
        except BaseException:
            source.close()
            raise
        self.source = source
        self._fields = journal.vm_fields(vm)
        self._lines = LineCutter(trio.current_time())
        self._pumping = trio.CancelScope()
        self._pump_ended = trio.Event()
        nursery.start_soon(self._pump, source, self._pumping, self._pump_ended)
        nursery.start_soon(self.socket.serve, self.fanout, self.write)

    async def close(self) -> None:
        if self.source is None or self.socket is None:
            return
        self._pumping.cancel()
        await self._pump_ended.wait()
        # The VMM has ended, so all that it said is there: what the FIFO holds and no more.
        rest = CAPACITY
        while rest > 0 and self.source is not None:
            size = await self._deliver(self.source)
            rest = rest - size if size else 0
        self.release()
        await self.log.close()

    async def leave(self) -> None:
        """Let go of a console whose VM goes on."""
        if isinstance(self.source, SerialSocket):
            self.source.hang_up()
            # Until the connection has ended: then there is no more to wait for.
            with trio.move_on_after(HANG_UP_LIMIT), contextlib.suppress(trio.ClosedResourceError):
                while True:
                    await self.source.wait()
                    await self._deliver(self.source)
        self.release()

    def speak_for(self, main_pid: int) -> None:
        """Log to the journal in the name of this process, what was held until it is known first."""
        self._main_pid = main_pid
        held, self._held = self._held, []
        self._to_journal(held)

    def release(self) -> None:
        """Let go of the source and the socket at once; what is unread stays where it is."""
        self._pumping.cancel()
        if self.source is not None:
            self.source.close()
            self.source = None
            self._to_journal(self._lines.finish(trio.current_time()))
            self._main_pid = 0
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    async def write(self, data: bytes) -> int:
        if self.source is None:
            raise Invalid("nothing reads the console: the VM has no process; start it first")
        try:
            written = await self.source.write(data, WRITE_TIMEOUT)
        except trio.ClosedResourceError:
            raise Invalid("nothing reads the console any more: the VM has stopped") from None
        if data and not written:
            raise TimedOut(f"the guest did not read its console for {WRITE_TIMEOUT:g} s")
        return written

    async def _pump(self, source: Source, pumping: trio.CancelScope, ended: trio.Event) -> None:
        """Read output as it comes; an idle guest costs nothing.

        VMMs write byte by byte. A pause before each read gathers a line or a screen into one turn,
        and grows while output goes on, so that neither many guests that chatter nor one that floods
        take the loop from the others; what is not read yet is the FIFO's to keep. `pumping` and
        `ended` are this opening's own: the console may be open anew before this has begun.
        """
        pause = SHORTEST_PAUSE
        try:
            with pumping:
                while True:
                    asleep = trio.current_time()
                    await source.wait()
                    quiet = trio.current_time() - asleep >= LONGEST_PAUSE
                    pause = SHORTEST_PAUSE if quiet else min(2 * pause, LONGEST_PAUSE)
                    await trio.sleep(pause)
                    # What has left the FIFO is nowhere else until it is in the log.
                    with trio.CancelScope(shield=True):
                        await self._deliver(source)
        except trio.ClosedResourceError:
            pass  # released: the agent is leaving
        finally:
            ended.set()

    async def _deliver(self, source: Source) -> int:
        """Give on what there is, some at a time; return how many bytes it was."""
        data = b""

        def read() -> bytes:
            nonlocal data
            data = source.read(READ_SIZE)
            return data

        try:
            await self.log.append_from(read)
            self._log_failed = False
        except OSError as error:
            if not self._log_failed:
                _logger.warning("console log of %s: output is lost: %s", self.vm_id, error)
            self._log_failed = True
            if not data:  # the log could not even be opened: whoever watches gets it all the same
                read()
        if data:
            self.fanout.publish(data)
            self._to_journal(self._lines.feed(data, trio.current_time()))
        return len(data)

    def _to_journal(self, lines: list[str]) -> None:
        if self.is_open and not self._main_pid:
            # `keep` comes within milliseconds of a start.
            room = HELD_LINES - len(self._held)
            self._held += lines[:room]
            self._lines.lost(len(lines[room:]))
            return
        lines, self._held = self._held + lines, []
        if lines:
            self._lines.lost(self._journal.submit(lines, self._fields, self._main_pid))
