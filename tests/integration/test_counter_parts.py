"""What the counters promise: numbers without a hole in order of commit, whichever part of a counter is at work, and a cost that has a bound
also while an old transaction keeps all versions of all rows alive."""

from __future__ import annotations

import asyncio
import random
import re
from itertools import product

import asyncpg
import pytest

from relay.postgres import migrate as schema
from relay.postgres.connect import Connection
from relay.postgres.migrate import migrate, migrations
from tests.harness.outbox import connected, until

INSERT = "INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload) VALUES ('order', $1, 'Changed', '{}') RETURNING seq"
MANY = "INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload) SELECT 'order', $1, 'Changed', '{}' FROM generate_series(1, $2)"
NUMBERS = "SELECT seq FROM relay.outbox WHERE aggregate_id = $1 ORDER BY id"
PART = 32
"""Events after which a counter moves on, as sql/migrations/0007 has it."""

BEFORE = (0, 1, PART - 2, PART - 1, PART, PART + 1, 2 * PART - 1, 2 * PART, 5 * PART)
AFTER = (1, 2, PART, PART + 1, 3 * PART)


async def test_the_number_of_the_latest_event_can_be_read_at_any_length(database: str) -> None:
    async with connected(database) as db:
        for seq in range(1, 3 * PART + 2):
            assert await db.fetchval(INSERT, "1") == seq
            assert [tuple(r) for r in await db.fetch("TABLE relay.outbox_aggregate")] == [("order", "1", seq)]
        assert await db.fetchval("SELECT count(*) FROM relay.outbox_counter") == 2


@pytest.mark.parametrize("isolation", ["read_committed", "repeatable_read", "serializable"])
async def test_one_transaction_may_write_a_whole_history(database: str, isolation: str) -> None:
    async with connected(database) as db:
        async with db.transaction(isolation=isolation):  # type: ignore[arg-type]
            await db.execute(MANY, "1", 2 * PART + 5)
            assert await db.fetchval(INSERT, "1") == 2 * PART + 6
        assert [r["seq"] for r in await db.fetch(NUMBERS, "1")] == list(range(1, 2 * PART + 7))


async def test_a_savepoint_that_is_undone_takes_the_move_to_the_next_part_with_it(database: str) -> None:
    async with connected(database) as db:
        for part in (1, 2, 3):
            await db.execute(MANY, "1", PART - 1)
            async with db.transaction():
                undone = db.transaction()
                await undone.start()
                await db.execute(MANY, "1", PART + 2)
                await undone.rollback()
                assert await db.fetchval(INSERT, "1") == part * PART
        assert await db.fetchval("SELECT last_seq FROM relay.outbox_aggregate") == 3 * PART


async def test_who_waits_for_the_counter_gets_the_number_after_however_far_it_has_moved(database: str) -> None:
    async with connected(database) as first, connected(database) as second:
        for n, (before, after) in enumerate(product(BEFORE, AFTER)):
            await first.execute(MANY, str(n), before)
            async with first.transaction():
                await first.execute(MANY, str(n), after)
                waiting = asyncio.create_task(second.fetchval(INSERT, str(n)))
                await _until_it_waits(first, second)
            assert await waiting == before + after + 1, (before, after)
            assert await first.fetchval(INSERT, str(n)) == before + after + 2


async def test_who_waits_gets_the_same_number_when_the_move_is_rolled_back(database: str) -> None:
    async with connected(database) as first, connected(database) as second:
        for n, (before, after) in enumerate(product(BEFORE, AFTER)):
            await first.execute(MANY, str(n), before)
            undone = first.transaction()
            await undone.start()
            await first.execute(MANY, str(n), after)
            waiting = asyncio.create_task(second.fetchval(INSERT, str(n)))
            await _until_it_waits(first, second)
            await undone.rollback()
            assert await waiting == before + 1, (before, after)


@pytest.mark.parametrize("isolation", ["repeatable_read", "serializable"])
async def test_with_a_snapshot_from_before_others_wrote_it_is_told_to_retry(database: str, isolation: str) -> None:
    async with connected(database) as first, connected(database) as second:
        for n, (before, after) in enumerate(product(BEFORE, AFTER)):
            await first.execute(MANY, str(n), before)
            late = second.transaction(isolation=isolation)  # type: ignore[arg-type]
            await late.start()
            await second.fetchval("SELECT count(*) FROM relay.outbox_cursor")
            await first.execute(MANY, str(n), after)
            with pytest.raises(asyncpg.SerializationError):
                await second.fetchval(INSERT, str(n))
            await late.rollback()
            async with second.transaction(isolation=isolation):  # type: ignore[arg-type]
                assert await second.fetchval(INSERT, str(n)) == before + after + 1, (before, after)


async def test_under_serializable_those_who_write_other_new_aggregates_are_not_in_the_way(database: str) -> None:
    async with connected(database) as first, connected(database) as second:
        async with first.transaction(isolation="serializable"), second.transaction(isolation="serializable"):
            for n in range(5):
                assert await first.fetchval(INSERT, f"a{n}") == 1
                assert await second.fetchval(INSERT, f"b{n}") == 1


async def test_a_crowd_at_one_aggregate_that_also_rolls_back_leaves_no_hole(database: str) -> None:
    async def writer(number: int) -> int:
        dice, committed = random.Random(number), 0
        async with connected(database) as db:
            for _ in range(6):
                events = dice.choice((1, 1, 3, PART))
                transaction = db.transaction()
                await transaction.start()
                await db.execute(MANY, "1", events)
                if dice.random() < 0.3:
                    await transaction.rollback()
                else:
                    await transaction.commit()
                    committed += events
        return committed

    committed = sum(await asyncio.gather(*map(writer, range(40))))
    assert committed > 20 * PART
    async with connected(database) as db:
        assert [r["seq"] for r in await db.fetch(NUMBERS, "1")] == list(range(1, committed + 1)), "by id"


async def test_a_lost_counter_is_an_error_that_names_the_aggregate_and_what_to_do(database: str) -> None:
    async with connected(database) as db:
        await db.execute(MANY, "1", PART + 3)
        await db.execute("DELETE FROM relay.outbox_counter WHERE part > 0")
        with pytest.raises(asyncpg.DataCorruptedError, match="the counter of order/1 is lost") as told:
            await db.fetchval(INSERT, "1")
        assert "Set last_seq" in str(told.value.hint)
        await db.execute("UPDATE relay.outbox_counter SET last_seq = $1", PART + 3)
        assert await db.fetchval(INSERT, "1") == PART + 4


async def test_while_an_old_snapshot_is_held_an_insert_looks_at_no_more_pages_after_many_events(database: str) -> None:
    """With one row for a counter it was more than a page for each version: 400 here."""
    async with connected(database) as holder, connected(database) as db:
        async with holder.transaction(isolation="repeatable_read"):
            await holder.fetchval("SELECT count(*) FROM relay.outbox")
            for _ in range(400):
                await db.execute(
                    "INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload)"
                    " SELECT 'order', n::text, 'Changed', '{}' FROM generate_series(1, 100) n"
                )
            pages = [await _pages(db, str(n)) for n in range(1, 100, 3)]
    assert max(pages) < 120, pages


async def test_while_an_old_snapshot_is_held_statistics_do_not_lead_to_a_plan_that_reads_all_versions(
    database: str,
) -> None:
    """Two rows in many pages: reading all that the index has and sorting it seems as good as the index's own order."""
    async with connected(database) as holder, connected(database) as db:
        async with holder.transaction(isolation="repeatable_read"):
            await holder.fetchval("SELECT count(*) FROM relay.outbox")
            await db.execute(MANY, long := "1" * 500, 3000)
            await db.execute("ANALYZE relay.outbox_counter")
        async with connected(database) as fresh:
            await _pages(fresh, long)  # its catalog's pages
            assert await _pages(fresh, long) < 60


async def test_a_plan_made_while_the_counters_were_few_is_still_by_key_when_they_are_many(database: str) -> None:
    async with connected(database) as db:
        await db.execute(MANY, "1", 2 * PART)
        await db.execute("VACUUM ANALYZE relay.outbox_counter")
        statement = await db.prepare(INSERT)
        for _ in range(8):  # past the five custom plans
            await statement.fetchval("1")
        async with connected(database) as other:
            await other.execute(
                "INSERT INTO relay.outbox_aggregate SELECT 'order', 'x' || n, 1 FROM generate_series(1, 20000) n"
            )
        assert await _pages(db, "1") < 60


class TestTheMigration:
    @pytest.fixture
    async def database_of_6(self, empty_database: str, monkeypatch: pytest.MonkeyPatch) -> str:
        """A database as the last version left it, with a short, a full and a long history."""
        with monkeypatch.context() as patch:
            patch.setattr(schema, "migrations", lambda: [m for m in migrations() if m.version < 7])
            async with connected(empty_database) as db:
                await migrate(db)
                for name, events in (("short", 3), ("full", PART - 1), ("long", 3 * PART + 7)):
                    await db.execute(MANY, name, events)
        return empty_database

    async def test_every_aggregate_counts_on(self, database_of_6: str) -> None:
        async with connected(database_of_6) as db:
            await migrate(db)
            for name, events in (("short", 3), ("full", PART - 1), ("long", 3 * PART + 7)):
                for seq in range(events + 1, events + 2 * PART):
                    assert await db.fetchval(INSERT, name) == seq

    async def test_who_could_read_the_counters_still_can_in_the_session_that_is_open(self, database_of_6: str) -> None:
        async with connected(database_of_6) as daemon, connected(database_of_6) as owner:
            await daemon.execute("SET ROLE relay_daemon")
            read = "SELECT last_seq FROM relay.outbox_aggregate WHERE aggregate_id = $1"
            assert await daemon.fetchval(read, "long") == 3 * PART + 7
            await migrate(owner)
            await owner.execute(MANY, "long", PART)
            assert await daemon.fetchval(read, "long") == 4 * PART + 7
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await daemon.fetchval("SELECT last_seq FROM relay.outbox_counter")

    async def test_who_could_read_columns_or_grant_it_on_still_can(self, database_of_6: str) -> None:
        async with connected(database_of_6) as owner, connected(database_of_6) as other:
            await owner.execute("GRANT SELECT (aggregate_id, last_seq) ON relay.outbox_aggregate TO relay_taker")
            await owner.execute("GRANT SELECT ON relay.outbox_aggregate TO relay_consumer WITH GRANT OPTION")
            await migrate(owner)
            await other.execute("SET ROLE relay_taker")
            assert await other.fetchval("SELECT last_seq FROM relay.outbox_aggregate WHERE aggregate_id = 'short'") == 3
            await other.execute("SET ROLE relay_consumer")
            await other.execute("GRANT SELECT ON relay.outbox_aggregate TO relay_producer")
            await other.execute("SET ROLE relay_producer")
            assert await other.fetchval("SELECT count(*) FROM relay.outbox_aggregate") == 3

    async def test_producers_that_come_meanwhile_wait_and_count_on(self, database_of_6: str) -> None:
        async with (
            connected(database_of_6) as warm,
            connected(database_of_6) as cold,
            connected(database_of_6) as owner,
        ):
            assert await warm.fetchval(INSERT, "short") == 4
            async with owner.transaction():
                await migrate(owner)
                waiting = []
                for producer in (warm, cold):
                    waiting.append(asyncio.create_task(producer.fetchval(INSERT, "short")))
                    await _until_it_waits(owner, producer)
            assert sorted(await asyncio.gather(*waiting)) == [5, 6]

    async def test_beside_an_older_transaction_that_has_written_the_key_is_used_at_once(
        self, database_of_6: str
    ) -> None:
        async with connected(database_of_6) as batch, connected(database_of_6) as owner:
            await owner.execute(
                "INSERT INTO relay.outbox_aggregate SELECT 'order', n::text, 1 FROM generate_series(1, 20000) n"
            )
            async with batch.transaction():
                await batch.fetchval("SELECT pg_current_xact_id()")
                for _ in range(3):
                    await owner.execute(MANY, "long", 1)
                await migrate(owner)
                await owner.execute(MANY, "long", PART)
                async with connected(database_of_6) as fresh:
                    await _pages(fresh, "long")  # its catalog's pages
                    assert await _pages(fresh, "long") < 60


async def _pages(db: Connection, aggregate: str) -> int:
    """Pages that an insert looks at, counted by PostgreSQL, the index and the log's own included."""
    undone = db.transaction()
    await undone.start()
    told = await db.fetch(
        "EXPLAIN (ANALYZE, BUFFERS, TIMING OFF) INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload)"
        f" VALUES ('order', '{aggregate}', 'Changed', '{{}}')"
    )
    await undone.rollback()
    found = re.search(r"Buffers: shared hit=(\d+)(?: read=(\d+))?", "\n".join(r[0] for r in told))
    assert found
    return sum(int(n or 0) for n in found.groups())


async def _until_it_waits(watcher: Connection, waiter: Connection) -> None:
    async def waits() -> bool:
        return bool(await watcher.fetchval("SELECT cardinality(pg_blocking_pids($1)) > 0", waiter.get_server_pid()))

    await until(waits)
