"""A database, or a role, whose transactions are REPEATABLE READ or SERIALIZABLE by default: relay's own sessions are not.

Everywhere relay takes a lock and then looks. With a snapshot that is older than the lock it would not see what the lock's last
owner has committed.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from relay.inbox.database import Database
from relay.message import Row
from relay.outbox import retention
from relay.outbox.lease import wait_for_ownership
from relay.outbox.store import Store
from relay.postgres.connect import Connection, connection
from relay.postgres.planning import Planning
from relay.settings import OutboxSettings, Settings
from tests.harness.outbox import connected, insert, settings_for, until
from tests.integration.test_retention import count, emptied_by_hand, fill, old_slot, publish_all, retention_of


@pytest.fixture(params=["repeatable read", "serializable"])
async def db(database: str, request: pytest.FixtureRequest) -> Any:
    """The database, made so; a session that was opened before."""
    async with connected(database) as opened:
        name = await opened.fetchval("SELECT current_database()")
        await opened.execute(f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = '{request.param}'")
        yield opened


@pytest.fixture
def settings(database: str) -> Settings:
    return settings_for(database, "amqp://127.0.0.1:1/")


class TestRetention:
    async def test_keeps_a_row_that_was_committed_while_it_waited_for_the_lock(
        self, db: Connection, database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(retention, "_EVERY_S", 0.0)
        await fill(db)
        await publish_all(db)
        ring = retention_of(database)
        async with connected(database) as producer:
            await producer.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
            await fill(producer, count=1, aggregate="late")
            assert await ring.sweep() == []  # locked; what the scan found is remembered
            sweep = asyncio.create_task(ring.sweep())
            await until(lambda: _waits(db, "AccessExclusiveLock"), every_s=0.005)
            await producer.execute("COMMIT")
            assert await sweep == []
        assert await count(db) == 4

    async def test_refuses_a_session_that_could_not_see_such_a_row(self, db: Connection, database: str) -> None:
        await fill(db)
        await publish_all(db)
        async with connected(database) as by_hand:
            with pytest.raises(asyncpg.InvalidTransactionStateError, match="it must be READ COMMITTED"):
                await emptied_by_hand(by_hand, old_slot())
        assert await count(db) == 3


async def test_a_standby_that_waited_for_the_last_checkpoint_goes_on_from_there(
    db: Connection, settings: Settings
) -> None:
    async with connection(settings.postgres, application="test standby") as standby:
        async with db.transaction(isolation="read_committed"):
            await db.execute("UPDATE relay.outbox_cursor SET high_id = 77")
            taking = asyncio.create_task(
                wait_for_ownership(standby, shard=0, source="shop", interval_s=1, stop=asyncio.Event())
            )
            await until(lambda: _waits(db, "ShareLock"))
        owned = await taking
    assert owned is not None
    assert (owned.epoch, owned.high_id) == (1, 77)


async def test_a_row_that_was_skipped_while_the_daemon_waited_for_the_act_stays_for_its_tombstone(
    db: Connection, settings: Settings
) -> None:
    await insert(db, "order/1")
    await db.execute(
        "INSERT INTO relay.outbox_parked (id, shard, aggregate_type, aggregate_id, seq, reason, state, next_attempt_at)"
        " SELECT id, shard, aggregate_type, aggregate_id, seq, 'nacked', 'retrying', now() FROM relay.outbox"
    )
    row = Row(
        id=await db.fetchval("SELECT id FROM relay.outbox"),
        aggregate_type="order",
        aggregate_id="1",
        seq=1,
        event_type="Changed",
        content_type="application/json",
        headers={},
        routing_key=None,
        created_at=datetime.now(UTC),
        body=b"{}",
    )
    async with connection(settings.postgres, application="test daemon") as daemon:
        store = Store(daemon, shard=0, epoch=0, settings=OutboxSettings(), planning=Planning(daemon))
        async with db.transaction(isolation="read_committed"):  # the act
            await db.execute("SELECT FROM relay.outbox_cursor FOR UPDATE")
            await db.execute(_SKIP_ALL)
            unparking = asyncio.create_task(store.unpark([row], []))  # it went out as it was
            await until(lambda: _waits(db, "ShareLock"))
        await unparking
    assert await db.fetchval("SELECT count(*) FROM relay.outbox_parked") == 1


_SKIP_ALL = """
WITH act AS (INSERT INTO relay.audit (who, side, act, selection, rows) VALUES ('test', 'outbox', 'skip', '{}', 1) RETURNING id)
INSERT INTO relay.outbox_tombstone (id, shard, act, audit_id) SELECT p.id, p.shard, 'skip', act.id FROM relay.outbox_parked p, act
"""


async def test_the_inbox_sees_what_others_commit_in_its_transactions_and_beside_them(
    db: Connection, settings: Settings
) -> None:
    inbox = Database(settings.postgres, application="test inbox")
    seen = "SELECT count(*) FROM relay.inbox_seen"
    one = "INSERT INTO relay.inbox_seen (consumer, source, message_id) VALUES ('c', 's', $1)"
    try:
        async with inbox.transaction() as inside:
            assert await inside.fetchval(seen) == 0
            await db.execute(one, "a")
            assert await inside.fetchval(seen) == 1
        beside = await inbox.connection()
        async with beside.transaction():
            assert await beside.fetchval(seen) == 1
            await db.execute(one, "b")
            assert await beside.fetchval(seen) == 2
    finally:
        await inbox.close()


async def _waits(db: Connection, mode: str) -> Any:
    """Whether a session of this database waits for a lock of this mode (on a row: ShareLock, on its owner's transaction)."""
    return await db.fetchval(
        "SELECT count(*) > 0 FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
        " WHERE NOT l.granted AND l.mode = $1 AND a.datname = current_database()",
        mode,
    )
