"""Cursors are written where their rows were when they were locked: whatever moved the rows before, and nothing does after."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from relay.inbox.database import Database
from relay.inbox.failures import CommitFailed
from relay.inbox.sequencer import Cursor, Key
from relay.inbox.store import Store
from relay.postgres.connect import Connection
from relay.settings import PostgresSettings
from tests.harness.outbox import connected, until

ONE, TWO, THREE = KEYS = [("shop", "order", name) for name in ("1", "2", "3")]


@asynccontextmanager
async def session(database: str) -> AsyncIterator[Database]:
    """As the inbox has it."""
    opened = Database(PostgresSettings.model_validate({"dsn": database}), application="test inbox")
    try:
        yield opened
    finally:
        await opened.close()


async def apply(database: Database, *keys: Key, handler: str = "SELECT") -> None:
    """A transaction that moves these cursors on by one, and in it what a handler does."""
    async with database.transaction() as connection:
        store = Store(connection, "billing")
        cursors = await store.lock_cursors(keys)
        await connection.execute(handler)
        await store.write_cursors({key: Cursor(cursors[key].last_seq + 1) for key in keys}, look=True)


async def numbers(db: Connection) -> list[int]:
    rows = await db.fetch("SELECT last_seq FROM relay.inbox_aggregate ORDER BY aggregate_id")
    return [last_seq for (last_seq,) in rows]


async def test_new_cursors_and_old_ones_are_written_together(database: str) -> None:
    async with session(database) as inbox, connected(database) as db:
        await apply(inbox, ONE, THREE)
        await apply(inbox, ONE, TWO, THREE)
        assert await numbers(db) == [2, 1, 2]


@pytest.mark.parametrize("between", ["", "VACUUM relay.inbox_aggregate", "VACUUM FULL relay.inbox_aggregate"])
async def test_a_cursor_is_found_again_wherever_it_was_moved_between_two_batches(between: str, database: str) -> None:
    async with session(database) as inbox, connected(database) as db:
        for _ in range(100):  # more versions than a page has room for
            await apply(inbox, *KEYS)
        if between:
            await db.execute(between)
        await apply(inbox, *KEYS)
        assert await numbers(db) == [101, 101, 101]


async def test_who_waited_for_a_cursor_writes_it_where_its_last_owner_has_left_it(database: str) -> None:
    async with session(database) as first, session(database) as second, connected(database) as db:
        await apply(first, *KEYS)
        async with first.transaction() as connection:
            owner = Store(connection, "billing")
            await owner.lock_cursors([TWO, THREE])
            waiting = asyncio.create_task(apply(second, *KEYS))
            await until(lambda: _waits(db))
            await owner.write_cursors({TWO: Cursor(2), THREE: Cursor(2)}, look=True)
        await waiting
        assert await numbers(db) == [2, 3, 3]


async def test_who_waited_for_one_that_was_being_created_writes_it_all_the_same(database: str) -> None:
    async with session(database) as first, session(database) as second, connected(database) as db:
        async with first.transaction() as connection:
            owner = Store(connection, "billing")
            await owner.lock_cursors([ONE])
            waiting = asyncio.create_task(apply(second, ONE))
            await until(lambda: _waits(db))
            await owner.write_cursors({ONE: Cursor(1)}, look=True)
        await waiting
        assert await numbers(db) == [2]


async def test_a_row_that_is_changed_by_its_own_transaction_takes_everything_back(database: str) -> None:
    async with session(database) as inbox, connected(database) as db:
        await apply(inbox, *KEYS)
        with pytest.raises(CommitFailed, match="were changed inside"):
            await apply(inbox, *KEYS, handler="UPDATE relay.inbox_aggregate SET last_seq = 7 WHERE aggregate_id = '2'")
        assert await numbers(db) == [1, 1, 1]


async def test_a_row_whose_place_is_another_aggregates_now_is_not_written(database: str) -> None:
    async with session(database) as inbox, connected(database) as db:
        await db.execute(
            "INSERT INTO relay.inbox_aggregate (consumer, source, aggregate_type, aggregate_id, last_seq)"
            " VALUES ('billing', 'shop', 'order', '2', 1), ('billing', 'shop', 'order', '1', 1)"
        )
        with pytest.raises(CommitFailed, match="were changed inside"):
            await apply(inbox, TWO, handler="CLUSTER relay.inbox_aggregate USING inbox_aggregate_pkey")
        assert await numbers(db) == [1, 1]


async def _waits(db: Connection) -> bool:
    found = await db.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name LIKE 'test inbox%'"
    )
    return bool(found)
