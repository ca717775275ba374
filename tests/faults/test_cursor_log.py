"""The laboratory's own watch over the outbox's cursor finds every kind of zombie, and nothing wrong with a take-over."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import pytest

from relay.postgres.connect import Connection
from tests.faults.lab import cursor_log
from tests.harness.outbox import connected

TAKE_OVER = "UPDATE relay.outbox_cursor SET epoch = epoch + 1, owner = $1 WHERE shard = 0"
CHECKPOINT = "UPDATE relay.outbox_cursor SET high_id = high_id + 1 WHERE shard = 0"
Connect = Callable[[], Coroutine[Any, Any, Connection]]


@pytest.fixture
async def connect(database: str) -> AsyncIterator[Connect]:
    """Opens sessions, in the order of the calls."""
    async with AsyncExitStack() as stack:

        async def open_() -> Connection:
            return await stack.enter_async_context(connected(database))

        await (await open_()).execute(cursor_log.TABLES)
        yield open_


async def owner(connect: Connect, name: str) -> tuple[Connection, Connection]:
    """(lease, reader) of a relay that takes the log over: it opens the reader when it owns the log, see relay.daemon."""
    lease = await connect()
    await lease.execute(TAKE_OVER, name)
    return lease, await connect()


async def test_owners_that_follow_each_other_are_all_right_and_their_writes_are_counted(connect: Connect) -> None:
    waiting = await connect()  # a standby's lease is older than the owner's take-over
    lease, reader = await owner(connect, "a")
    await lease.execute(CHECKPOINT)  # as `name_source` does
    await reader.execute(CHECKPOINT)
    await waiting.execute(TAKE_OVER, "b")
    await waiting.execute(CHECKPOINT)
    await (await connect()).execute(CHECKPOINT)
    assert (await cursor_log.stale(reader), await cursor_log.writes(reader)) == (0, 6)


async def test_a_session_that_has_written_before_it_lost_the_log_is_stale(connect: Connect) -> None:
    _, zombie = await owner(connect, "a")
    await zombie.execute(CHECKPOINT)
    await owner(connect, "b")
    await zombie.execute(CHECKPOINT)
    assert await cursor_log.stale(zombie) == 1


async def test_a_session_that_had_not_written_when_it_lost_the_log_is_stale(connect: Connect) -> None:
    _, zombie = await owner(connect, "a")
    _, reader = await owner(connect, "b")
    await reader.execute(CHECKPOINT)
    await zombie.execute(CHECKPOINT)
    assert await cursor_log.stale(zombie) == 1


async def test_a_lease_that_was_lost_is_stale(connect: Connect) -> None:
    zombie, _ = await owner(connect, "a")
    await owner(connect, "b")
    await zombie.execute(CHECKPOINT)
    assert await cursor_log.stale(zombie) == 1


@pytest.mark.parametrize("epoch", [1, 4])
async def test_an_epoch_that_is_written_back_or_skipped_is_stale_whoever_writes_it(
    connect: Connect, epoch: int
) -> None:
    await owner(connect, "a")
    await owner(connect, "b")
    late = await connect()
    await late.execute("UPDATE relay.outbox_cursor SET high_id = 1, epoch = $1 WHERE shard = 0", epoch)
    assert await cursor_log.stale(late) == 1
