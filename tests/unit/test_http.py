import array
import json
import os
import socket
from pathlib import Path

import pytest
import trio

from agent.model.errors import Failed, TimedOut
from agent.vmm.http import MAXIMUM_REPLY, HttpApi

pytestmark = pytest.mark.anyio


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "api")


@pytest.fixture
async def serve(path):
    """`await serve(reply)` answers every request on the socket; `seen` of the result has them."""
    async with trio.open_nursery() as nursery:

        async def start(reply, path=path):
            seen = []

            async def answer(stream):
                async with stream:
                    received = b""
                    while not _is_whole(received):
                        data = await stream.receive_some()
                        if not data:
                            return
                        received += data
                    seen.append(received)
                    try:
                        await _send(stream, reply)
                    except trio.BrokenResourceError:
                        return

            listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            await listener.bind(path)
            listener.listen(8)
            nursery.start_soon(trio.serve_listeners, answer, [trio.SocketListener(listener)])
            return seen

        yield start
        nursery.cancel_scope.cancel()


async def _send(stream, reply):
    if callable(reply):
        await reply(stream)
    else:
        await stream.send_all(reply)


def _is_whole(request):
    head, found, body = request.partition(b"\r\n\r\n")
    if not found:
        return False
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(body) >= int(line.partition(b":")[2])
    return True


def reply(status, body=b""):
    return b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


@pytest.fixture
def api(path):
    """`api()` reaches what stands at `path` now."""
    opened = []

    def reach():
        opened.append(os.open(path, os.O_PATH | os.O_NOFOLLOW))
        return HttpApi(opened[-1], "Firecracker")

    yield reach
    for descriptor in opened:
        os.close(descriptor)


async def test_a_reply_in_json_is_returned(serve, api):
    await serve(reply(200, b'{"state": "Running"}'))
    assert await api().call("GET", "/", timeout=5) == {"state": "Running"}


async def test_a_reply_without_content_is_none(serve, api):
    await serve(reply(204))
    assert await api().call("PATCH", "/vm", {"state": "Paused"}, timeout=5) is None


async def test_the_body_is_sent_as_json_with_its_length(serve, api):
    seen = await serve(reply(204))
    await api().call("PUT", "/actions", {"action_type": "SendCtrlAltDel"}, timeout=5)
    head, _, body = seen[0].partition(b"\r\n\r\n")
    assert head.startswith(b"PUT /actions HTTP/1.1\r\n")
    assert f"content-length: {len(body)}".encode() in head.lower()
    assert json.loads(body) == {"action_type": "SendCtrlAltDel"}


async def test_descriptors_arrive_with_the_request(path, api):
    with trio.socket.socket(socket.AF_UNIX) as listener, open(os.devnull) as null:
        await listener.bind(path)
        listener.listen()

        async def call():
            descriptors = [null.fileno()] * 253
            await api().call("PUT", "/x", {"a": 1}, descriptors=descriptors, timeout=5)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            connection, _ = await listener.accept()
            with connection:
                data, ancillary, *_ = await connection.recvmsg(4096, socket.CMSG_SPACE(4 * 253))
                await connection.send(reply(204))
    ((level, kind, rights),) = ancillary
    received = array.array("i", rights)
    assert {os.readlink(f"/proc/self/fd/{number}") for number in received} == {os.devnull}
    for number in received:
        os.close(number)
    assert (level, kind, len(received)) == (socket.SOL_SOCKET, socket.SCM_RIGHTS, 253)
    assert data.startswith(b"PUT /x ")
    assert data.endswith(b'{"a": 1}')


async def test_calls_one_after_another_do_not_depend_on_each_other(serve, api):
    await serve(reply(200, b"1"))
    reached = api()
    assert [await reached.call("GET", "/", timeout=5) for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"fault_message": "no such drive"}', "no such drive"),
        (b'["The VM could not boot", "no kernel"]', "The VM could not boot: no kernel"),
        (b"plain words", "plain words"),
        (b"", "status 400"),
        (b"[" * 100_000, "[["),
    ],
)
async def test_a_refusal_carries_the_vmms_own_message(serve, api, body, message):
    await serve(reply(400, body))
    with pytest.raises(Failed, match="Firecracker refused PUT /drives/x: ") as caught:
        await api().call("PUT", "/drives/x", {}, timeout=5)
    assert message in str(caught.value)


async def test_a_hostile_message_becomes_one_short_printable_line(serve, api):
    words = "kernel\n\x1b[31mred\x1b[0m\x00\u2028" + "x" * 10_000
    await serve(reply(400, json.dumps({"fault_message": words}).encode()))
    with pytest.raises(Failed) as caught:
        await api().call("GET", "/", timeout=5)
    sentence = str(caught.value)
    assert sentence.isprintable()
    assert len(sentence) < 600


async def test_a_vmm_that_does_not_answer_is_a_timeout(serve, api):
    async def silence(stream):
        await trio.sleep_forever()

    await serve(silence)
    with pytest.raises(TimedOut, match=r"did not answer GET / within 0\.05 s"):
        await api().call("GET", "/", timeout=0.05)


async def test_a_vmm_that_answers_byte_by_byte_for_ever_is_a_timeout(serve, api):
    async def drip(stream):
        await stream.send_all(b"HTTP/1.1 200 x\r\nContent-Length: 1000000\r\n\r\n")
        while True:
            await stream.send_all(b" ")
            await trio.sleep(0.001)

    await serve(drip)
    with pytest.raises(TimedOut):
        await api().call("GET", "/", timeout=0.1)


@pytest.mark.parametrize("framing", [b"Transfer-Encoding: chunked", b"Content-Length: 1000000000"])
async def test_a_reply_without_end_is_refused(serve, api, framing):
    async def flood(stream):
        await stream.send_all(b"HTTP/1.1 200 x\r\n" + framing + b"\r\n\r\n")
        piece = b" " * 0x10000
        if b"chunked" in framing:
            piece = b"10000\r\n" + piece + b"\r\n"
        while True:
            await stream.send_all(piece)

    await serve(flood)
    with pytest.raises(Failed, match=str(MAXIMUM_REPLY)):
        await api().call("GET", "/", timeout=30)


@pytest.mark.parametrize(
    ("garbage", "why"),
    [
        (b"", "it closed the connection"),
        (b"\x00" * 50_000, ""),
        (b"HTTP/1.1 200 x\r\nContent-Length: 9", "it closed the connection"),
        (b"HTTP/1.1 200 x\r\nContent-Length: 9\r\n\r\n{}", "peer closed connection"),
    ],
)
async def test_a_vmm_that_breaks_off_or_talks_something_else_is_a_failure(serve, api, garbage, why):
    await serve(garbage)
    with pytest.raises(Failed, match=f"broke off during GET /: {why}"):
        await api().call("GET", "/", timeout=5)


@pytest.mark.parametrize("body", [b"{", b"[" * 100_000, b"\xff"])
async def test_a_reply_that_is_no_json_is_a_failure(serve, api, body):
    await serve(reply(200, body))
    with pytest.raises(Failed, match="no JSON"):
        await api().call("GET", "/", timeout=5)


async def test_a_socket_that_nobody_listens_on_is_a_failure(path, api):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with pytest.raises(Failed, match="does not answer on its API socket"):
        await api().call("GET", "/", timeout=5)


async def test_a_socket_swapped_for_a_link_is_not_followed(serve, api, path):
    await serve(reply(200, b'"mine"'))
    other = f"{path}.other"
    await serve(reply(200, b'"other"'), other)
    reached = api()
    Path(path).unlink()
    Path(path).symlink_to(other)
    assert await reached.call("GET", "/", timeout=5) == "mine"


async def test_a_cancelled_call_leaves_no_connection_behind(serve, api):
    asked = trio.Event()

    async def silence(stream):
        asked.set()
        await trio.sleep_forever()

    await serve(silence)
    reached = api()
    before = len(os.listdir("/proc/self/fd"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_call, reached)
        await asked.wait()
        nursery.cancel_scope.cancel()
    # The server's side of the connection stays open: it sleeps.
    assert len(os.listdir("/proc/self/fd")) == before + 1


async def _call(api):
    await api.call("GET", "/", timeout=30)
