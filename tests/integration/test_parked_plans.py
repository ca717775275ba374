"""With very many parked rows, trying them again reads only the portion that is tried, and retention looks only at indexes.

As in test_reader_plans: EXPLAIN of the very blocks, on a session as the daemon opens it; what is bounded are blocks.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from pydantic import SecretStr

from relay.postgres.connect import Connection, close, connect
from relay.postgres.queries import query
from relay.sandbox import Postgres
from relay.settings import PostgresSettings
from tests.harness.outbox import connected

LINES = 200  # aggregates with 100 parked rows each
LONG = 20_000  # parked rows of one aggregate
SUSPECTS = 40_000  # rows that are tried alone, due longer than all others
EACH = 50
PORTION = 10


@pytest.fixture(scope="module", params=["analysed", "never analysed"])
def dsn(request: pytest.FixtureRequest, postgres: Postgres, template_database: str) -> Iterator[str]:
    name = f"relay_parked_plans_{secrets.token_hex(4)}"
    made = postgres.create_database(name, template_database)
    yield made
    postgres.drop_database(name)


@pytest.fixture
async def session(dsn: str, request: pytest.FixtureRequest) -> AsyncIterator[Connection]:
    async with connected(dsn) as db:
        if not await db.fetchval("SELECT EXISTS (SELECT FROM relay.outbox_parked)"):
            for slot in range(4):
                await db.execute(f"ALTER TABLE relay.outbox_{slot} SET (autovacuum_enabled = off)")
            await db.execute("ALTER TABLE relay.outbox_parked SET (autovacuum_enabled = off)")
            await db.execute(_SEED.format(lines=LINES, long=LONG, suspects=SUSPECTS))
            if "never" not in request.node.name:
                await db.execute("ANALYZE")
    opened = await connect(PostgresSettings(dsn=SecretStr(dsn)), application="test plans")
    undone = opened.transaction()
    await undone.start()
    yield opened
    await undone.rollback()
    await close(opened)


# Slots 1 and 2 hold the rows, half each; every line's first row is due, the long line's too.
_SEED = """
ALTER TABLE relay.outbox DISABLE TRIGGER outbox_assign;
INSERT INTO relay.outbox (id, xid, slot, shard, aggregate_type, aggregate_id, seq, event_type, payload, size)
SELECT n, '700', 1 + n * 2 / ({lines} * 100 + 1), 0, 'order', (n % {lines})::text, 1 + (n - 1) / {lines}, 'Changed', '{{}}', 2
FROM generate_series(1, {lines} * 100) AS n;
INSERT INTO relay.outbox (id, xid, slot, shard, aggregate_type, aggregate_id, seq, event_type, payload, size)
SELECT {lines} * 100 + n, '700', 2, 0, 'order', 'long', n, 'Changed', '{{}}', 2 FROM generate_series(1, {long}) AS n;
INSERT INTO relay.outbox_parked (id, shard, aggregate_type, aggregate_id, seq, reason, state, next_attempt_at)
SELECT id, 0, aggregate_type, aggregate_id, seq, CASE seq WHEN 1 THEN 'nacked' ELSE 'behind' END,
       CASE seq WHEN 1 THEN 'retrying' ELSE 'waiting' END, CASE seq WHEN 1 THEN now() - interval '1 minute' - id * interval '1 ms' END
FROM relay.outbox;
INSERT INTO relay.outbox (id, xid, slot, shard, aggregate_type, aggregate_id, seq, event_type, payload, size)
SELECT {lines} * 100 + {long} + n, '700', 2, 0, 'hung', n::text, 1, 'Changed', '{{}}', 2 FROM generate_series(1, {suspects}) AS n;
INSERT INTO relay.outbox_parked (id, shard, aggregate_type, aggregate_id, seq, reason, state, next_attempt_at)
SELECT id, 0, aggregate_type, aggregate_id, seq, 'unconfirmed', 'retrying', now() - interval '1 day' FROM relay.outbox
WHERE aggregate_type = 'hung';
UPDATE relay.outbox_cursor SET snapshot = pg_current_snapshot();
"""


async def test_a_portion_of_due_rows_reads_only_itself(session: Connection) -> None:
    rows, blocks = await _explain(session, "due_parked", 0, PORTION, EACH, 8 * 1024 * 1024, [])
    assert rows == PORTION * EACH
    assert (
        blocks < PORTION * EACH * 14 + 200
    )  # of a parked row its index entry; of a row of the log four partitions' indexes


async def test_a_portion_beside_suspects_of_its_own_kind_reads_past_those_only(session: Connection) -> None:
    suspects = list(range(1, 51))
    rows, blocks = await _explain(session, "due_parked", 0, PORTION, EACH, 8 * 1024 * 1024, suspects)
    assert rows == PORTION * EACH
    assert blocks < PORTION * EACH * 14 + 300


@pytest.mark.parametrize("suspects", [[], list(range(1, 1001))])
async def test_what_is_tried_alone_next_is_one_look_at_an_index(session: Connection, suspects: list[int]) -> None:
    rows, blocks = await _explain(session, "due_alone", 0, suspects)
    assert rows == 1
    assert blocks < 150 + 4 * len(suspects)
    _, blocks = await _explain(session, "next_parked_attempt", 0, suspects)
    assert blocks < 30 + 4 * len(suspects)


async def test_finding_the_next_head_does_not_read_the_whole_line(session: Connection) -> None:
    rows, blocks = await _explain(session, "promote_parked", 0, ["order"] * 2, ["long", "7"])
    assert rows == 2
    assert blocks < 100


async def test_when_the_next_row_is_due_is_read_from_the_index(session: Connection) -> None:
    rows, blocks = await _explain(session, "next_parked_attempt", 0, [])
    assert (rows, blocks < 20) == (1, True)


async def test_a_look_at_everything_is_one_pass_over_the_parked_rows(session: Connection) -> None:
    rows, blocks = await _explain(session, "blocked_aggregates", 0)
    assert rows == LINES + 1 + SUSPECTS
    assert blocks < 3 * (LINES * 100 + LONG + SUSPECTS)
    for block in ("promote_headless", "hold_paused", "release_paused"):
        _, blocks = await _explain(session, block, 0)
        assert blocks < 3 * (LINES * 100 + LONG) + 12 * SUSPECTS, (
            block
        )  # of those that are tried, the event's type is asked


async def test_whether_a_slot_is_needed_is_read_from_indexes(session: Connection) -> None:
    """What is asked under the lock that keeps everybody from reading the log."""
    for slot, reason in ((1, "parked"), (2, "parked"), (3, None)):
        told = await session.fetchval("SELECT relay.outbox_slot_is_needed($1::smallint)", slot)
        assert told in (reason, "current")
        assert await _blocks(session, f"SELECT relay.outbox_slot_is_needed({slot}::smallint)") < 300
    await session.execute("DELETE FROM relay.outbox_parked WHERE id <= 10000")  # all of slot 1, all others stay
    assert await session.fetchval("SELECT relay.outbox_slot_is_needed(1::smallint)") in (None, "current")
    assert await _blocks(session, "SELECT relay.outbox_slot_is_needed(1::smallint)") < 500


async def _explain(session: Connection, name: str, *arguments: Any) -> tuple[int, int]:
    """(rows, blocks) of a block."""
    text = await session.fetchval("EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) " + query(name), *arguments)
    plan = json.loads(text)[0]["Plan"]
    return round(plan["Actual Rows"]), plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]


async def _blocks(session: Connection, statement: str) -> int:
    text = await session.fetchval("EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) " + statement)
    plan = json.loads(text)[0]["Plan"]
    found: int = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
    return found
