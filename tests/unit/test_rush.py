"""What waits for a rush of starts to be over goes on when it is, or when patience ends."""

import contextlib
import math

import pytest
import trio
import trio.testing

from agent.lifecycle.rush import Rush

pytestmark = pytest.mark.anyio


async def test_it_is_over_when_the_last_start_has_ended_however_it_ended():
    rush, ended = Rush(), []

    async def wait() -> None:
        await rush.over(math.inf)
        ended.append(True)

    async with trio.open_nursery() as nursery:
        with contextlib.suppress(ZeroDivisionError), rush.start():
            nursery.start_soon(wait)
            with rush.start():
                await trio.testing.wait_all_tasks_blocked()
            await trio.testing.wait_all_tasks_blocked()
            assert not ended
            raise ZeroDivisionError
    assert ended


async def test_nothing_waits_longer_than_it_has_patience():
    rush = Rush()
    with rush.start():
        await rush.over(0.01)
    await rush.over(math.inf)
