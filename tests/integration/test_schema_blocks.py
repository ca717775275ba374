"""Every named block of sql/queries is valid against the migrated schema: PostgreSQL itself prepares it."""

from __future__ import annotations

import asyncpg
import pytest

from relay.postgres.queries import all_queries, query
from tests.harness.outbox import connected

# What PREPARE does not take, and why. Each is run by a test of what it does.
NOT_PREPARABLE = {
    "create_migration_table": "two statements",
    "lock_log": "a utility statement",
    "bench_tables": "two statements",
}


async def test_every_block_can_be_prepared(database: str) -> None:
    failures = {}
    async with connected(database) as connection:
        await connection.execute(query("bench_tables"))  # the benchmark's own, which no migration makes
        for name in sorted(all_queries().keys() - NOT_PREPARABLE.keys()):
            try:
                await connection.prepare(query(name))
            except asyncpg.PostgresError as error:
                failures[name] = str(error)
    assert failures == {}


@pytest.mark.parametrize("name", sorted(NOT_PREPARABLE))
async def test_what_cannot_be_prepared_runs_as_a_script(database: str, name: str) -> None:
    async with connected(database) as connection, connection.transaction():
        await connection.execute(query(name))
