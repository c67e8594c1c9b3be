"""The conversation with a QEMU that is slow, silent, gone or hostile."""

import array
import json
import os
import socket

import pytest
import trio

from agent.model.errors import Failed, TimedOut
from agent.vmm.qmp import QmpConnection, open_qmp

pytestmark = pytest.mark.anyio

GREETING = {"QMP": {"version": {}, "capabilities": []}}


class Peer:
    """A QEMU of the test's: it answers commands as `answers` says, by name."""

    def __init__(self):
        self.answers = {"qmp_capabilities": lambda number: [{"return": {}, "id": number}]}
        self.seen = []
        self.received = []
        self.clients = 0

    async def serve(self, stream):
        self.clients += 1
        await send(stream, GREETING)
        pending = b""
        while True:
            data, rights, _, _ = await stream.socket.recvmsg(65536, 1024)
            for _, _, content in rights:
                self.received += array.array("i", content)
            if not data:
                return
            pending += data
            while b"\n" in pending:
                line, _, pending = pending.partition(b"\n")
                command = json.loads(line)
                self.seen.append((command["execute"], command.get("arguments")))
                for answer in self.answers[command["execute"]](command["id"]):
                    await send(stream, answer)


async def send(stream, message):
    raw = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\r\n"
    await stream.send_all(raw)


@pytest.fixture
async def peer(tmp_path):
    peer = Peer()

    async def serve(stream):
        async with stream:
            try:
                await peer.serve(stream)
            except trio.BrokenResourceError:
                return

    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listener.bind(str(tmp_path / "api"))
    listener.listen(8)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
        yield peer
        nursery.cancel_scope.cancel()


@pytest.fixture
async def qmp(peer, tmp_path):
    entry = os.open(tmp_path / "api", os.O_PATH | os.O_NOFOLLOW)
    try:
        async with open_qmp(entry, "QEMU") as connection:
            yield connection
    finally:
        os.close(entry)


async def test_the_conversation_begins_with_the_first_command(peer, qmp):
    assert peer.clients == 0
    peer.answers["stop"] = lambda number: [{"return": {}, "id": number}]
    assert await qmp.execute("stop", timeout=5) == {}
    assert [name for name, _ in peer.seen] == ["qmp_capabilities", "stop"]


async def test_events_between_command_and_reply_wait_for_whoever_asks(peer, qmp):
    peer.answers["migrate"] = lambda number: [
        {"event": "MIGRATION", "data": {"status": "setup"}},
        {"return": {}, "id": number},
        {"event": "STOP"},
        {"event": "MIGRATION", "data": {"status": "completed"}},
    ]
    await qmp.execute("migrate", {"uri": "fd:x"}, timeout=5)
    assert await qmp.wait_for("MIGRATION", "status", ("completed", "failed"), 5) == "completed"


async def test_a_refusal_has_qemus_own_words(peer, qmp):
    peer.answers["cont"] = lambda number: [{"error": {"desc": "Reset first"}, "id": number}]
    with pytest.raises(Failed, match="QEMU refused cont: Reset first"):
        await qmp.execute("cont", timeout=5)


async def test_commands_that_go_together_are_answered_one_by_one(peer, qmp):
    peer.answers["stop"] = lambda number: [{"event": "STOP"}, {"return": {}, "id": number}]
    peer.answers["query-kvm"] = lambda number: [{"return": {"enabled": True}, "id": number}]
    peer.answers["bad"] = lambda number: [{"error": {"desc": "No"}, "id": number}]
    together = (("stop", {}), ("query-kvm", {}))
    assert await qmp.execute_all(*together, timeout=5) == [{}, {"enabled": True}]
    with pytest.raises(Failed, match="QEMU refused bad: No"):
        await qmp.execute_all(("bad", {}), *together, timeout=5)
    # What was answered beyond that is nobody's.
    assert await qmp.execute("query-kvm", timeout=5) == {"enabled": True}


async def test_a_command_that_is_never_answered_times_out_and_the_next_is_understood(peer, qmp):
    late = []

    def stop(number):
        late.append(number)
        return []

    peer.answers["stop"] = stop
    peer.answers["query-status"] = lambda number: [
        {"return": {"late": True}, "id": late[0]},
        {"return": {"status": "running"}, "id": number},
    ]
    with pytest.raises(TimedOut, match="did not answer stop within 0.2 s"):
        await qmp.execute("stop", timeout=0.2)
    assert await qmp.execute("query-status", timeout=5) == {"status": "running"}


async def test_an_event_that_never_comes_times_out(peer, qmp):
    peer.answers["migrate"] = lambda number: [{"return": {}, "id": number}]
    await qmp.execute("migrate", timeout=5)
    with pytest.raises(TimedOut, match="MIGRATION"):
        await qmp.wait_for("MIGRATION", "status", ("completed",), 0.2)


async def test_a_descriptor_goes_with_its_command(peer, qmp, tmp_path):
    peer.answers["getfd"] = lambda number: [{"return": {}, "id": number}]
    file = os.open(tmp_path / "state", os.O_RDWR | os.O_CREAT)
    try:
        await qmp.execute("getfd", {"fdname": "x"}, descriptor=file, timeout=5)
        (theirs,) = peer.received
        try:
            assert os.path.sameopenfile(file, theirs)
        finally:
            os.close(theirs)
    finally:
        os.close(file)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"\x1b]nonsense\n", "no JSON"),
        (b'{"unknown": 1}\n', "unknown kind"),
        (b"x" * (2 << 20), "more than"),
    ],
)
async def test_what_is_no_qmp_is_a_failure_in_plain_words(peer, qmp, answer, words):
    peer.answers["stop"] = lambda number: [answer]
    with pytest.raises(Failed, match=words) as failure:
        await qmp.execute("stop", timeout=5)
    assert str(failure.value).isprintable()


async def test_a_vmm_that_ends_in_the_middle_is_a_failure(tmp_path):
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listener.bind(str(tmp_path / "api"))
    listener.listen(1)

    async def end():
        client, _ = await listener.accept()
        client.close()

    connection = QmpConnection(str(tmp_path / "api"), "QEMU")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(end)
        with pytest.raises(Failed, match="QEMU broke off during stop"):
            await connection.execute("stop", timeout=5)
    connection.close()
    listener.close()


async def test_a_socket_that_does_not_listen_yet_is_waited_for(tmp_path):
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listener.bind(str(tmp_path / "api"))
    connection = QmpConnection(str(tmp_path / "api"), "QEMU")
    peer = Peer()
    peer.answers["stop"] = lambda number: [{"return": {}, "id": number}]

    async def listen():
        await trio.sleep(0.05)
        listener.listen(1)
        client, _ = await listener.accept()
        await peer.serve(trio.SocketStream(client))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        assert await connection.execute("stop", timeout=5) == {}
        connection.close()
        nursery.cancel_scope.cancel()
    listener.close()


async def test_a_socket_that_nobody_listens_on_is_a_failure(tmp_path):
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listener.bind(str(tmp_path / "api"))
    listener.close()
    connection = QmpConnection(str(tmp_path / "api"), "QEMU")
    with pytest.raises(Failed, match="Connection refused"):
        await connection.execute("stop", timeout=5)
