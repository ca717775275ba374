"""Pages of the log are planned once, what is asked of parked rows for its values: over one session, whichever comes when."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from relay.errors import PostgresUnavailable
from relay.outbox.cursor import Position, Snapshot
from relay.outbox.reader import Reader
from relay.outbox.store import Store
from relay.postgres.connect import Connection, connection
from relay.postgres.planning import Planning
from relay.postgres.queries import query
from relay.settings import OutboxSettings, PostgresSettings

START = Position(Snapshot.parse("1:1:"))
TIMES = 8


async def plans(session: Connection, name: str) -> tuple[int, int]:
    """How often a statement was carried out by a plan for its values, and by one for all values."""
    found = await session.fetchrow(
        "SELECT custom_plans, generic_plans FROM pg_prepared_statements WHERE statement = $1", query(name)
    )
    assert found is not None
    return found[0], found[1]


async def test_each_statement_is_planned_its_way_however_they_take_turns(database: str) -> None:
    async with connection(PostgresSettings(dsn=SecretStr(database)), application="test") as session:
        planning = Planning(session)
        reader = Reader(session, shard=0, page_rows=10, page_bytes=1000, planning=planning)
        store = Store(session, shard=0, epoch=0, settings=OutboxSettings(), planning=planning)
        for _ in range(TIMES):
            await reader.read(START)
            await reader.read(START)
            await store.blocked()
        assert await plans(session, "open_window") == (0, 2 * TIMES)
        assert await plans(session, "blocked_aggregates") == (TIMES, 0)


async def test_the_session_is_asked_to_switch_only_when_it_has_to(database: str) -> None:
    async with connection(PostgresSettings(dsn=SecretStr(database)), application="test") as session:
        planning = Planning(session)
        await planning.once()
        await session.execute("SET plan_cache_mode = auto")  # behind its back, to see whether it is asked
        await planning.once()
        assert await session.fetchval("SHOW plan_cache_mode") == "auto"
        await planning.for_values()
        assert await session.fetchval("SHOW plan_cache_mode") == "force_custom_plan"


async def test_a_store_says_what_happened_when_the_session_ends_while_it_switches(database: str) -> None:
    async with connection(PostgresSettings(dsn=SecretStr(database)), application="test") as session:
        store = Store(session, shard=0, epoch=0, settings=OutboxSettings(), planning=Planning(session))
        session.terminate()
        with pytest.raises(PostgresUnavailable, match="not usable"):
            await store.blocked()
