"""The watchdog is fed by looks at the mount, and a look that fails ends nothing."""

import errno
import os

import pytest
import trio

from agent.service import Service

pytestmark = pytest.mark.anyio


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "30000")  # a look each hundredth of a second
    said = []
    service = Service()
    monkeypatch.setattr(service._notifier, "notify", said.append)
    service.said = said
    return service


async def fed(service, mount):
    """Return once the watchdog is fed; raise TooSlowError when it never is."""
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.feed_watchdog, str(mount))
            while "WATCHDOG=1" not in service.said:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()


async def test_a_mount_that_answers_again_feeds_it_again(service, tmp_path, caplog):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fed, service, tmp_path)
        while "does not answer" not in caplog.text:
            await trio.sleep(0.01)
        assert service.said == []
        (tmp_path / "version").write_text("1\n")


async def test_a_host_without_room_for_a_process_ends_nothing(
    service, tmp_path, monkeypatch, caplog
):
    (tmp_path / "version").write_text("1\n")
    opened = trio.lowlevel.open_process
    refusals = [OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))] * 2

    async def sometimes(*arguments, **options):
        if refusals:
            raise refusals.pop()
        return await opened(*arguments, **options)

    monkeypatch.setattr(trio.lowlevel, "open_process", sometimes)
    await fed(service, tmp_path)
    assert "cannot be looked at" in caplog.text
