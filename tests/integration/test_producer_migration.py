"""Migration 0006 under producers that go on as before: they wait for it at most, and no event is lost, refused or numbered twice."""

from __future__ import annotations

import asyncio
import re

import asyncpg
import pytest

from relay.errors import PostgresError
from relay.postgres import migrate as schema
from relay.postgres.connect import Connection
from relay.postgres.migrate import migrate, migrations, missing, roles_sql
from tests.harness.outbox import connected, until

EARLIER = [m for m in migrations() if m.version < 6]
INSERT = (
    "INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload, headers)"
    """ VALUES ('order', $1, $2, '{}', '{"n": 1}') RETURNING seq"""
)


@pytest.fixture
async def database_of_5(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database as the last version left it."""
    roles = re.sub(r",\s+relay\.outbox_is_valid\([^)]*\)", "", roles_sql())
    with monkeypatch.context() as patch:
        patch.setattr(schema, "migrations", lambda: EARLIER)
        patch.setattr(schema, "roles_sql", lambda: roles)
        async with connected(empty_database) as connection:
            await migrate(connection)
    return empty_database


async def test_producers_that_are_at_work_do_not_notice_it(database_of_5: str) -> None:
    done = asyncio.Event()
    seqs: dict[str, list[int]] = {str(n): [] for n in range(4)}

    async def produce(name: str) -> None:
        async with connected(database_of_5) as connection:
            await connection.execute("SET ROLE relay_producer")
            statement = await connection.prepare(INSERT)
            while not done.is_set():
                async with connection.transaction():
                    for _ in range(3):
                        seqs[name].append(await statement.fetchval(name, "Changed"))

    async with connected(database_of_5) as owner, asyncio.TaskGroup() as producers:
        for name in seqs:
            producers.create_task(produce(name))
        await until(lambda: _at_least(seqs, 30))
        assert (await migrate(owner)).applied == tuple(f"{m.version:04} {m.name}" for m in migrations()[len(EARLIER) :])
        more = max(map(len, seqs.values())) + 30
        await until(lambda: _at_least(seqs, more))
        done.set()
    assert all(found == list(range(1, len(found) + 1)) for found in seqs.values())
    async with connected(database_of_5) as owner:
        assert await missing(owner) == []
        assert await owner.fetchval("SELECT count(*) FROM relay.outbox") == sum(map(len, seqs.values()))
        with pytest.raises(asyncpg.CheckViolationError, match="outbox_event_type_is_a_name"):
            await owner.fetchval(INSERT, "1", "not a name")


async def test_it_gives_up_rather_than_keep_producers_waiting_behind_a_transaction_that_does_not_end(
    database_of_5: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = [*EARLIER, *(_with_timeout(m, "100ms") for m in migrations()[len(EARLIER) :])]
    monkeypatch.setattr(schema, "migrations", lambda: impatient)
    async with connected(database_of_5) as producer, connected(database_of_5) as owner:
        async with producer.transaction():
            assert await producer.fetchval(INSERT, "1", "Changed") == 1
            with pytest.raises(PostgresError, match=r"lock timeout.*nothing was changed"):
                await migrate(owner)
            assert await owner.fetchval("SELECT max(version) FROM relay.migration") == EARLIER[-1].version
            assert await producer.fetchval(INSERT, "1", "Changed") == 2
        await migrate(owner)
        assert await producer.fetchval(INSERT, "1", "Changed") == 3
        assert await _lock_timeout(owner) == "0"


def _with_timeout(migration: schema.Migration, timeout: str) -> schema.Migration:
    return schema.Migration(migration.version, migration.name, migration.sql.replace("'10s'", f"'{timeout}'"))


async def _at_least(seqs: dict[str, list[int]], count: int) -> bool:
    return all(len(found) >= count for found in seqs.values())


async def _lock_timeout(connection: Connection) -> object:
    return await connection.fetchval("SHOW lock_timeout")
