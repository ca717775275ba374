"""What ends the time in which the next page gathers, beside the time itself."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest

from relay.outbox.cursor import Page, Position, Snapshot
from relay.outbox.progress import Progress
from relay.outbox.shard import Shard
from relay.settings import OutboxSettings
from tests.unit.test_parking import rows


def gathering(*, gather_s: float) -> Any:
    """A shard that has read many rows, with nothing in flight any more."""
    anything: Any = MagicMock()
    ownership = MagicMock(shard=0, epoch=1, high_id=0, position=Position(Snapshot(9, 9)))
    wakeup = MagicMock(urgent=asyncio.Event(), acted=False)
    shard: Any = Shard(
        ownership=ownership,
        reader=anything,
        store=anything,
        publisher=anything,
        probe=anything,
        wakeup=wakeup,
        settings=OutboxSettings(gather_s=gather_s),
        source="shop",
        progress=Progress(),
        stop=asyncio.Event(),
    )
    clock = asyncio.get_running_loop().time
    shard._blocked._look_at = clock() + 3600
    for size in (0, 1000):
        shard._pace.saw(Page(rows(*"a" * size), Snapshot(9, 9), True), clock())
    assert shard._pace.gathers
    return shard


async def test_a_parked_row_that_becomes_due_does_not_wait_for_what_gathers() -> None:
    shard = gathering(gather_s=60)
    shard._retry._due_at = asyncio.get_running_loop().time()
    async with asyncio.timeout(1):
        await shard._gather()


async def test_what_an_event_loop_that_counts_milliseconds_cannot_wait_for_is_not_waited_for() -> None:
    """uvloop would come back at once, again and again until its next millisecond."""
    shard = gathering(gather_s=60)
    shard._nap = AsyncMock(side_effect=AssertionError("it waits"))
    shard._clock = lambda: shard._pace._due_at - 0.0004
    await shard._gather()
    shard._clock = lambda: shard._pace._due_at - 0.0006
    with pytest.raises(AssertionError, match="it waits"):
        await shard._gather()


async def test_an_interruption_after_which_there_is_nothing_to_do_does_not_make_the_log_read_again_and_again() -> None:
    """As where the answer to a row that is tried alone was taken before the news of it came; and the broker has an alarm."""
    shard = gathering(gather_s=0.01)
    shard._publisher.publish = lambda _: asyncio.Event().wait()
    shard._publisher.lost = None
    shard._blocked.heed = shard._blocked.look = shard._wakeup.get_up = AsyncMock()
    shard._pipeline.begin(Page(rows("a"), Snapshot(9, 9), True))
    reads = 0

    async def read(*_: object, **__: object) -> Page:
        nonlocal reads
        reads += 1
        await asyncio.sleep(0)
        return Page((), Snapshot(9, 9), True)

    shard._reader.read = read
    shard._wakeup.urgent.set()
    running = asyncio.create_task(shard.run())
    for _ in range(1000):
        await asyncio.sleep(0)
    assert not running.done()
    assert reads < 10
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
