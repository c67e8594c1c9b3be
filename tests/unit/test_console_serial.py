"""The console that a VMM serves on a socket."""

import os
import socket

import trio
import trio.testing

from agent.console.inherited import Inherited
from agent.console.serial import DIRECTORY, SOCKET, SerialSocket
from agent.model.access import Access
from agent.model.config import VmConfig
from agent.model.vm import Vm


def test_a_guest_that_runs_has_its_console_connected_at_once(tmp_path):
    """No time passes, so that no look is due but the one that is asked for."""
    vm = Vm("a", "a", os.getuid(), Access(0, 0), VmConfig())
    directory = tmp_path / "vm" / DIRECTORY

    async def start() -> None:
        console = SerialSocket(str(tmp_path / "vm"), vm, Inherited({}))
        directory.mkdir()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(console.wait)
            await trio.testing.wait_all_tasks_blocked()
            with (
                socket.socket(socket.AF_UNIX) as server,
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify,
            ):
                server.bind(str(directory / SOCKET))
                server.listen()
                notify.bind(str(tmp_path / "notify"))
                await console.keep(os.getpid(), str(tmp_path / "notify"))
                server.accept()[0].close()
            nursery.cancel_scope.cancel()
        console.close()

    clock = trio.testing.MockClock(autojump_threshold=0.1)  # once nothing else happens
    trio.run(start, clock=clock)
    assert clock.current_time() == 0
