"""Emptying the ring: what is unpublished, parked, young, or still to be replayed survives every attempt; the rest goes, and its space."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from relay.daemon import Outbox
from relay.outbox import retention
from relay.outbox.retention import Retention
from relay.postgres.connect import Connection, connection
from relay.sandbox import Postgres
from relay.settings import PostgresSettings
from tests.harness.audit import audit
from tests.harness.logins import Logins
from tests.harness.outbox import connected, insert, outbox_running, settings_for, until

DAY_S = 86400
OLD = "interval '5 days'"
"""Older than the retention, which is four."""


@pytest.fixture
async def db(database: str) -> AsyncIterator[Connection]:
    async with connected(database) as opened:
        yield opened


@pytest.fixture
def ring(database: str) -> Retention:
    return retention_of(database)


def retention_of(dsn: str, *, retention_s: float = 4 * DAY_S) -> Retention:
    settings = PostgresSettings(dsn=SecretStr(dsn))
    return Retention(lambda: connection(settings, application="test retention"), retention_s=retention_s)


def old_slot(*, slots_ago: int = 3) -> int:
    """The slot that was filled from six days ago to four days ago, or later."""
    return (int(time.time()) // (2 * DAY_S) - slots_ago) % 4


async def fill(
    db: Connection, *, count: int = 3, slot: int | None = None, age: str = OLD, aggregate: str = "order"
) -> None:
    """Rows that were inserted so long ago, as the table's owner can write them."""
    await db.execute(
        "INSERT INTO relay.outbox (slot, aggregate_type, aggregate_id, event_type, payload, created_at)"
        f" SELECT $1, $3, '1', 'Changed', '{{}}', now() - {age} FROM generate_series(1, $2)",
        old_slot() if slot is None else slot,
        count,
        aggregate,
    )


async def publish_all(db: Connection) -> None:
    """What a checkpoint after the last row would leave."""
    await db.execute(
        "UPDATE relay.outbox_cursor SET snapshot = pg_current_snapshot(), window_snapshot = NULL, after_id = 0"
    )


async def count(db: Connection, slot: int | None = None) -> int:
    counted: int = await db.fetchval("SELECT count(*) FROM relay.outbox WHERE slot = coalesce($1, slot)", slot)
    return counted


async def act(db: Connection, name: str = "skip") -> int:
    audited: int = await db.fetchval(
        "INSERT INTO relay.audit (who, side, act, selection, rows) VALUES ('test', 'outbox', $1, '{}', 1) RETURNING id",
        name,
    )
    return audited


async def kept_because(ring: Retention) -> str:
    """The reason that is logged when nothing is emptied."""
    with capture_logs() as told:
        assert await ring.sweep() == []
    return str(next((t["reason"] for t in told if t["event"] == "slot_kept"), "nothing was told"))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot may be tried again at once."""
    monkeypatch.setattr(retention, "_EVERY_S", 0.0)


async def test_a_slot_with_only_old_and_published_rows_is_emptied_and_its_file_shrinks(
    db: Connection, ring: Retention
) -> None:
    await fill(db, count=5000)
    await fill(db, count=10, slot=old_slot(slots_ago=2), age="interval '3 days'")
    await publish_all(db)
    sizes = (
        "SELECT pg_relation_size('relay.outbox_' || $1::int), pg_indexes_size(('relay.outbox_' || $1::int)::regclass)"
    )
    before = await db.fetchrow(sizes, old_slot())
    with capture_logs() as told:
        assert await ring.sweep() == [old_slot()]
    after = await db.fetchrow(sizes, old_slot())
    assert before is not None
    assert after is not None
    assert (after[0], before[0] > 500_000) == (0, True)
    assert after[1] < before[1] / 10
    assert await count(db) == 10
    (emptied,) = [t for t in told if t["event"] == "slot_emptied"]
    assert (emptied["slot"], emptied["rows"], emptied["bytes"] > 500_000) == (old_slot(), 5000, True)
    assert await ring.sweep() == []


class TestWhatSurvives:
    async def test_an_unpublished_row(self, db: Connection, ring: Retention) -> None:
        await fill(db)
        await publish_all(db)
        await fill(db, count=1)
        assert await kept_because(ring) == "a row in it is not published yet"
        assert await count(db) == 4

    async def test_a_row_whose_transaction_was_in_progress_at_the_cursor(
        self, db: Connection, ring: Retention, database: str
    ) -> None:
        async with connected(database) as late:
            await late.execute("BEGIN")
            await fill(late, count=1)
            await fill(db, aggregate="invoice")
            await publish_all(db)  # its snapshot has the other transaction in progress
            await late.execute("COMMIT")
        assert await kept_because(ring) == "a row in it is not published yet"
        assert await count(db) == 4

    async def test_a_row_of_a_backlog_that_is_being_paged_through(self, db: Connection, ring: Retention) -> None:
        await fill(db)
        await db.execute("UPDATE relay.outbox_cursor SET window_snapshot = pg_current_snapshot(), after_id = 2")
        assert await kept_because(ring) == "a row in it is not published yet"

    async def test_a_row_of_a_shard_that_has_no_cursor(self, db: Connection, ring: Retention) -> None:
        await fill(db)
        await db.execute("UPDATE relay.outbox SET shard = 5 WHERE seq = 2")
        await publish_all(db)
        assert await kept_because(ring) == "a row in it is not published yet"

    @pytest.mark.parametrize("seq", [1, 2, 3])
    async def test_a_parked_row(self, db: Connection, ring: Retention, seq: int) -> None:
        await fill(db)
        await publish_all(db)
        await db.execute(
            "INSERT INTO relay.outbox_parked (id, shard, aggregate_type, aggregate_id, seq, reason, state)"
            " SELECT id, shard, aggregate_type, aggregate_id, seq, 'nacked', 'stuck' FROM relay.outbox WHERE seq = $1",
            seq,
        )
        assert await kept_because(ring) == "a row in it is parked"
        assert await count(db) == 3
        await db.execute("DELETE FROM relay.outbox_parked")
        assert await ring.sweep() == [old_slot()]

    async def test_a_young_row_even_between_old_ones(self, db: Connection, ring: Retention) -> None:
        await fill(db)
        await fill(db, count=1, age="interval '3 days 23 hours'")
        await fill(db)
        await publish_all(db)
        assert await kept_because(ring) == "a row in it is younger than outbox.retention_s"
        assert await count(db) == 7

    async def test_a_row_from_the_future(self, db: Connection, ring: Retention) -> None:
        await fill(db)
        await fill(db, count=1, age="interval '-9 days'")  # the clock was wrong, or it was imported
        await publish_all(db)
        assert await kept_because(ring) == "a row in it is younger than outbox.retention_s"

    async def test_a_row_imported_today_with_the_time_of_years_ago(self, db: Connection, database: str) -> None:
        """What counts for it is when its slot was filled."""
        ring = retention_of(database, retention_s=0)
        await db.execute(
            "INSERT INTO relay.outbox (event_type, payload, created_at) VALUES ('Changed', '{}', '2001-01-01 00:00Z')"
        )
        await fill(db, slot=old_slot(slots_ago=2), age="interval '20 years'")
        await publish_all(db)
        assert await ring.sweep() == [old_slot(slots_ago=2)]
        assert await count(db) == 1
        assert await retention_of(database).sweep() == []

    @pytest.mark.parametrize(
        ("after_id", "last_id", "kept"), [(0, 2, True), (2, 9, True), (3, 9, False), (0, 0, False)]
    )
    async def test_a_row_that_an_unfinished_replay_is_still_to_read(
        self, db: Connection, ring: Retention, after_id: int, last_id: int, kept: bool
    ) -> None:
        await fill(db)
        await publish_all(db)
        first: int = await db.fetchval("SELECT min(id) FROM relay.outbox")
        await db.execute(
            "INSERT INTO relay.outbox_replay (audit_id, selection, after_id, last_id, total) VALUES ($1, '{}', $2, $3, 3)",
            await act(db, "replay"),
            after_id + first - 1,
            last_id + first - 1,
        )
        if kept:
            assert (await kept_because(ring)).startswith("an unfinished replay is still to read it")
            await db.execute("UPDATE relay.outbox_replay SET state = 'done'")
        assert await ring.sweep() == [old_slot()]

    async def test_a_row_in_the_slot_that_producers_fill_now(self, db: Connection, database: str) -> None:
        ring = retention_of(database, retention_s=0)
        await fill(db, slot=old_slot(slots_ago=0), age="interval '30 days'")
        await publish_all(db)
        assert await ring.sweep() == []
        assert await emptied_by_hand(db, old_slot(slots_ago=0)) == "current"
        assert await count(db) == 3


async def scanned(db: Connection) -> str:
    """The snapshot of a scan that found all well."""
    seen: str = await db.fetchval("SELECT pg_current_snapshot()::text")
    return seen


async def emptied_by_hand(db: Connection, slot: int, seen: str | None = None) -> str | None:
    """What the last step alone says: the lock, the checks under it, the TRUNCATE."""
    why: str | None = await db.fetchval(
        "SELECT relay.outbox_empty_slot($1::smallint, $2::text::pg_snapshot)", slot, seen or await scanned(db)
    )
    return why


class TestAnInsertThatRaces:
    async def test_from_a_transaction_that_is_open_before_the_lock(
        self, db: Connection, ring: Retention, database: str
    ) -> None:
        await fill(db)
        await publish_all(db)
        async with connected(database) as producer:
            await producer.execute("BEGIN")
            await fill(producer, count=1)
            started = asyncio.get_running_loop().time()
            assert await kept_because(ring) == "another session holds a lock on it"
            assert asyncio.get_running_loop().time() - started < 2, "everybody waited behind us for the lock"
            await producer.execute("COMMIT")
        # What the scan found is remembered; that it is not all there is now, is noticed under the lock.
        with capture_logs() as told:
            assert await ring.sweep() == []
        assert [t["reason"] for t in told if t["event"] == "slot_kept"] == ["a row in it is not published yet"]
        assert await count(db) == 4

    async def test_that_arrives_while_the_lock_is_held(self, db: Connection, database: str) -> None:
        await fill(db)
        await publish_all(db)
        async with connected(database) as sweeper:
            await sweeper.execute("BEGIN")
            assert await emptied_by_hand(sweeper, old_slot()) is None
            arriving = asyncio.create_task(fill(db, count=1))
            await until(lambda: _waits(sweeper))
            await sweeper.execute("COMMIT")
            await arriving
        assert [r["seq"] for r in await db.fetch("SELECT seq FROM relay.outbox")] == [4]

    async def test_that_is_committed_between_the_scan_and_the_lock(self, db: Connection) -> None:
        await fill(db)
        seen = await scanned(db)
        await fill(db, count=1, age="interval '1 second'")
        await publish_all(db)  # even published: it is young
        assert await emptied_by_hand(db, old_slot(), seen) == "arriving"
        assert await count(db) == 4

    async def test_that_was_in_progress_during_the_scan(self, db: Connection, database: str) -> None:
        async with connected(database) as producer:
            await producer.execute("BEGIN")
            await fill(producer, count=1, aggregate="invoice")
            await fill(db)
            seen = await scanned(db)
            await producer.execute("COMMIT")
        await publish_all(db)
        assert await emptied_by_hand(db, old_slot(), seen) == "arriving"
        assert await count(db) == 4

    async def test_a_cursor_that_was_put_back_between_the_scan_and_the_lock(self, db: Connection) -> None:
        await fill(db)
        seen = await scanned(db)  # the cursor is still at its beginning: as if everything were to be published again
        assert await emptied_by_hand(db, old_slot(), seen) == "unpublished"
        assert await count(db) == 3

    async def test_an_operator_who_parks_a_published_row_for_its_tombstone(
        self, db: Connection, ring: Retention, database: str
    ) -> None:
        await fill(db)
        await publish_all(db)
        async with connected(database) as operator:
            await operator.execute("BEGIN")
            await operator.execute(
                "INSERT INTO relay.outbox_parked (id, shard, aggregate_type, aggregate_id, seq, reason, state, next_attempt_at)"
                " SELECT id, shard, aggregate_type, aggregate_id, seq, 'tombstone', 'retrying', now() FROM relay.outbox WHERE seq = 2"
            )
            assert await kept_because(ring) == "another session holds a lock on it"
            await operator.execute("COMMIT")
        assert await kept_because(ring) == "a row in it is parked"


async def _waits(db: Connection) -> Any:
    return await db.fetchval(
        "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted AND relation = $1::regclass", f"relay.outbox_{old_slot()}"
    )


async def test_marks_of_rows_that_are_gone_are_forgotten_and_others_are_not(db: Connection, ring: Retention) -> None:
    await fill(db)
    await fill(db, slot=old_slot(slots_ago=1), age="interval '1 day'")
    await publish_all(db)
    await db.execute(
        "INSERT INTO relay.outbox_tombstone (id, shard, act, audit_id) SELECT id, shard, 'skip', $1 FROM relay.outbox WHERE seq IN (2, 5)",
        await act(db),
    )
    assert await ring.sweep() == [old_slot()]
    assert [
        r["seq"] for r in await db.fetch("SELECT seq FROM relay.outbox_tombstone JOIN relay.outbox USING (id)")
    ] == [5]
    assert await db.fetchval("SELECT count(*) FROM relay.outbox_tombstone") == 1


async def test_relay_run_empties_a_slot_by_itself_with_its_own_role_and_goes_on_publishing_in_order(
    database: str, broker: str, db: Connection, postgres: Postgres
) -> None:
    await fill(db, count=20)
    with Logins(postgres) as logins:
        settings = settings_for(logins.create(database, "relay_daemon"), broker)
        async with audit(broker) as witness:
            with capture_logs() as told:
                async with outbox_running(settings):
                    await witness.wait_for(20)
                    await until(lambda: _is_zero(db, old_slot()))
                    await insert(db, "order/1", count=5)
                    await witness.wait_for(25)
            assert [t["slot"] for t in told if t["event"] == "slot_emptied"] == [old_slot()]
            assert not [t for t in told if t["event"] in ("service_failed", "session_failed")]
        assert witness.sequences(first_only=False) == {"order/1": list(range(1, 26))}


async def _is_zero(db: Connection, slot: int) -> bool:
    return await count(db, slot) == 0


async def test_a_log_that_is_only_ever_drained_is_emptied_as_well(database: str, broker: str, db: Connection) -> None:
    await fill(db)
    async with audit(broker):
        await Outbox(settings_for(database, broker)).run(drain=True)
    assert await count(db) == 0


async def test_a_reader_with_an_old_snapshot_of_the_slot_keeps_it(
    db: Connection, ring: Retention, database: str
) -> None:
    await fill(db)
    await publish_all(db)
    async with connected(database) as dump:
        await dump.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        assert await count(dump) == 3
        assert await kept_because(ring) == "another session holds a lock on it"
        assert await count(dump) == 3
        await dump.execute("COMMIT")
    assert await ring.sweep() == [old_slot()]


async def test_a_slot_that_is_locked_is_left_alone_for_longer_and_longer(
    db: Connection, ring: Retention, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_EVERY_S", 60.0)
    await fill(db)
    await publish_all(db)
    async with connected(database) as dump:
        await dump.execute("BEGIN")
        await count(dump)
        assert await kept_because(ring) == "another session holds a lock on it"
    assert await ring.sweep() == []  # nobody holds a lock now, but it is not tried again at once
    with pytest.raises(asyncpg.PostgresError):
        await db.execute(
            "SELECT relay.outbox_empty_slot(9::smallint, '1:1:')"
        )  # no such slot: an error, and nothing else
