"""A test's database may have been another's before: whatever that one did is undone, or the database is not used again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from typing import Any

import asyncpg
import pytest

from relay.sandbox import Postgres
from tests.harness.databases import Databases, fresh_name
from tests.harness.maintenance import Maintenance
from tests.harness.outbox import connected, insert

IDENTITY = "SELECT oid FROM pg_database WHERE datname = current_database()"


CHANGES = (
    "ALTER TABLE relay.outbox ADD COLUMN mine int",
    "ALTER TABLE relay.inbox_held ALTER COLUMN reason SET DEFAULT 'failed'",
    "ALTER TABLE relay.outbox DISABLE TRIGGER ALL",
    "ALTER TABLE relay.inbox SET (fillfactor = 50)",
    "ALTER SEQUENCE relay.outbox_id_seq INCREMENT 2",
    "CREATE INDEX ON relay.outbox_parked (detail)",
    "DROP TABLE relay.inbox_seed",
    "CREATE VIEW mine AS SELECT 1",
    "CREATE TYPE mine AS ENUM ('a')",
    "CREATE OR REPLACE FUNCTION relay.outbox_assign() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
    "GRANT SELECT ON relay.outbox TO PUBLIC",
    "REVOKE CONNECT ON DATABASE {name} FROM PUBLIC",
    "GRANT CREATE ON SCHEMA public TO PUBLIC",
    "REVOKE SELECT ON pg_proc FROM PUBLIC",
    "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC",
    "ALTER DATABASE {name} SET statement_timeout = 1000",
    "COMMENT ON TABLE relay.outbox IS 'mine'",
    "CREATE PUBLICATION mine FOR TABLE relay.outbox",
    "SELECT lo_create(0)",
)


@pytest.fixture(scope="module")
def own(postgres: Postgres) -> Iterator[Databases]:
    """Databases that no other test gives back."""
    with closing(Databases(postgres)) as made:
        yield made


@pytest.fixture
async def undone(own: Databases) -> AsyncIterator[asyncpg.Connection[Any]]:
    """A connection whose every change is undone in the end, so that one database is enough for many changes."""
    with own.one() as dsn:
        async with connected(dsn) as db:
            change = db.transaction()
            await change.start()
            yield db
            await change.rollback()


async def everything(db: asyncpg.Connection[Any]) -> dict[str, Any]:
    """Every row of relay's tables, and the next number of every sequence."""
    tables = await db.fetch(
        "SELECT oid::regclass::text FROM pg_class WHERE relkind = 'r' AND relnamespace = 'relay'::regnamespace"
    )
    rows = {row[0]: await db.fetch(f"SELECT * FROM {row[0]}") for row in tables}
    return rows | {"sequences": await db.fetch("SELECT seqrelid, pg_sequence_last_value(seqrelid) FROM pg_sequence")}


async def use(dsn: str, statement: str = "SELECT 1") -> int:
    """Do something in it; which database it was."""
    async with connected(dsn) as db:
        await db.execute(statement)
        return int(await db.fetchval(IDENTITY))


async def test_what_was_written_is_gone_and_numbers_start_again(own: Databases) -> None:
    with own.one() as dsn:
        first = await use(dsn)
        async with connected(dsn) as db:
            fresh = await everything(db)
            await insert(db, "order/1", count=3)
            await db.execute(
                "UPDATE relay.outbox_cursor SET epoch = 7; CREATE TABLE effect (id bigint PRIMARY KEY);"
                "CREATE SCHEMA shop; CREATE TABLE shop.orders (id serial); CREATE TEMPORARY TABLE passing (id int);"
                "CREATE FUNCTION answer() RETURNS int LANGUAGE sql RETURN 42; ANALYZE"
            )
            assert await everything(db) != fresh
    with own.one() as dsn:
        assert await use(dsn) == first
        async with connected(dsn) as db:
            assert await everything(db) == fresh
            assert await db.fetchval("SELECT to_regclass('effect') IS NULL AND to_regnamespace('shop') IS NULL")
            assert await db.fetchval("SELECT to_regproc('answer') IS NULL")
            assert await db.fetchval("SELECT reltuples FROM pg_class WHERE oid = 'relay.outbox_cursor'::regclass") == -1


@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_of_the_schema_of_a_privilege_or_of_a_setting_is_seen(
    own: Databases, undone: asyncpg.Connection[Any], change: str
) -> None:
    await undone.execute(change.format(name=await undone.fetchval("SELECT current_database()")))
    assert not await own.fresh.restore(undone)


async def test_a_row_that_was_there_from_the_start_is_as_it_was(own: Databases) -> None:
    """The log's cursor: its table is no larger, and nobody has counted it."""
    with own.one() as dsn:
        async with connected(dsn) as db:
            fresh = await everything(db)
            await db.execute("UPDATE relay.outbox_cursor SET epoch = 7")
            assert await everything(db) != fresh
            assert await own.fresh.restore(db)
            assert await everything(db) == fresh


async def test_without_one_there_is_nothing_to_see(own: Databases, undone: asyncpg.Connection[Any]) -> None:
    assert await own.fresh.restore(undone)


async def test_a_changed_database_is_not_used_again(own: Databases) -> None:
    with own.one() as dsn:
        changed = await use(dsn, CHANGES[0])
    with own.one() as dsn:
        assert await use(dsn) != changed


async def test_whoever_is_left_is_thrown_out_and_does_not_find_it_again(own: Databases) -> None:
    with own.one() as dsn:
        left = await asyncpg.connect(dsn)
        await left.execute("BEGIN; SELECT pg_advisory_lock(1); LOCK TABLE relay.outbox")
        first = await left.fetchval(IDENTITY)
    with own.one() as again:
        assert await use(again) == first
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)):
            await left.fetchval("SELECT 1")
        with pytest.raises(asyncpg.InvalidCatalogNameError):
            await use(dsn)


async def test_two_at_the_same_time_are_two(own: Databases) -> None:
    with own.one() as one, own.one() as two:
        assert await use(one) != await use(two)


async def test_a_maintenance_session_that_has_ended_is_replaced(postgres: Postgres) -> None:
    """As it has after a test that restarts the server."""
    name = fresh_name("session")
    with closing(Maintenance(postgres.dsn())) as maintenance:
        maintenance.execute(f"SET application_name = {name}")
        async with connected(postgres.dsn()) as db:
            of_it = "FROM pg_stat_activity WHERE application_name = $1"
            assert await db.fetchval(f"SELECT pg_terminate_backend(pid, 10000) {of_it}", name)
            maintenance.execute(f"SET application_name = {name}")
            assert await db.fetchval(f"SELECT count(*) {of_it}", name) == 1
