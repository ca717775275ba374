"""The reader's queries stay on the index, whatever the history: EXPLAIN of the very blocks, on a session as the daemon opens it.

Three histories of 200 000 rows over the whole ring: many small transactions, a few giant ones, and many small ones that
were never analysed. What is bounded are blocks and rows, which do not depend on the machine. Each statement is planned for its values,
as whoever replays has it planned, and once for all values, as the daemon has: also on the day when the log was still empty.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import SecretStr

from relay.postgres.connect import Connection, close, connect, connection
from relay.postgres.planning import Planning
from relay.postgres.queries import query
from relay.sandbox import Postgres
from relay.settings import PostgresSettings
from tests.harness.outbox import connected

HISTORY = 200_000
NEW = 100  # rows since the cursor, in transactions of their own
LATE = 3  # rows of the transaction that was in progress at the cursor
FIRST_XID = 1000
PAGE = 1000
PAGE_BYTES = 8 * 1024 * 1024

# How many rows a transaction of the history wrote, and whether the tables were analysed since.
HISTORIES = {"many_small_transactions": (5, True), "a_few_giant_ones": (50_000, True), "never_analysed": (5, False)}


@dataclass(frozen=True)
class Log:
    """A seeded log and the numbers of its transactions."""

    dsn: str
    seen: int  # xmax of the cursor's snapshot: the history is published, but for `late`
    late: int  # a transaction that began in the middle of the history and committed after the cursor
    current: int  # xmax of a snapshot that sees everything
    last_id: int


@dataclass(frozen=True)
class Explained:
    """What a query did."""

    rows: int
    blocks: int
    scans: list[dict[str, Any]]

    def sequential(self) -> list[str]:
        """The tables with rows that were read from end to end."""
        return [scan["Relation Name"] for scan in self.scans if scan["Node Type"] == "Seq Scan" and _touched(scan)]

    def indexes(self) -> set[str]:
        """The kinds of indexes that rows were found by: xid, id."""
        used = {scan["Index Name"] for scan in self.scans if "Index Name" in scan and scan["Actual Rows"]}
        return {name.removesuffix("_idx").rpartition("_")[2] for name in used}

    def read(self) -> int:
        """Rows that were read, whether or not they were wanted."""
        return sum(_touched(scan) for scan in self.scans if "Relation Name" in scan)


@pytest.fixture(scope="module", params=HISTORIES)
def log(request: pytest.FixtureRequest, postgres: Postgres, template_database: str) -> Iterator[Log]:
    rows_each, analysed = HISTORIES[request.param]
    with _made(postgres, template_database) as dsn, asyncio.Runner() as runner:
        yield runner.run(_seed(dsn, rows_each, analysed=analysed))


@contextmanager
def _made(postgres: Postgres, template_database: str) -> Iterator[str]:
    name = f"relay_plans_{secrets.token_hex(4)}"
    yield postgres.create_database(name, template_database)
    postgres.drop_database(name)


@pytest.fixture(params=[Planning.for_values, Planning.once])
async def session(request: pytest.FixtureRequest, log: Log) -> AsyncIterator[Connection]:
    opened = await connect(PostgresSettings(dsn=SecretStr(log.dsn)), application="test plans")
    await request.param(Planning(opened))
    yield opened
    await close(opened)


async def test_a_steady_window_reads_only_what_is_new(session: Connection, log: Log) -> None:
    done = await _explain(session, "open_window", 0, str(log.seen), PAGE, PAGE_BYTES)
    assert done.rows == NEW
    assert done.sequential() == []
    assert done.indexes() == {"xid"}
    assert done.read() == NEW
    assert done.blocks < 50


async def test_an_empty_window_costs_a_look_at_each_index(session: Connection, log: Log) -> None:
    done = await _explain(session, "open_window", 0, str(log.current), PAGE, PAGE_BYTES)
    assert (done.rows, done.read()) == (1, 0)  # the row that says so
    assert done.sequential() == []
    assert done.blocks < 30


async def test_late_transactions_are_found_by_their_ids(session: Connection, log: Log) -> None:
    done = await _explain(session, "open_window_with_late", 0, str(log.seen), PAGE, PAGE_BYTES, [str(log.late)])
    assert done.rows == NEW + LATE
    assert done.sequential() == []
    assert done.indexes() == {"xid"}
    assert done.read() == NEW + LATE
    assert done.blocks < 80


async def test_a_long_list_of_late_transactions_is_still_looked_up(session: Connection, log: Log) -> None:
    nobodys = [str(log.current + n) for n in range(200)]  # in progress, and not yet heard of
    done = await _explain(
        session, "open_window_with_late", 0, str(log.seen), PAGE, PAGE_BYTES, [str(log.late), *nobodys]
    )
    assert done.rows == NEW + LATE
    assert done.sequential() == []
    assert done.indexes() >= {"xid"}
    assert done.read() <= NEW + LATE  # EXPLAIN tells the mean of 201 look-ups, so three rows may be told as none
    assert done.blocks < 2500  # about two of an index for each of the list in each of the four partitions


async def test_the_first_page_of_a_whole_backlog_reads_it_once_by_transaction(session: Connection, log: Log) -> None:
    done = await _explain(session, "open_window", 0, "1", PAGE, PAGE_BYTES)
    assert done.rows == PAGE
    assert done.sequential() == []
    assert done.indexes() == {"xid"}
    assert done.read() == HISTORY + NEW + LATE


@pytest.mark.parametrize("place", [0.001, 0.3, 0.6, 0.99])
async def test_each_following_page_reads_only_itself(session: Connection, log: Log, place: float) -> None:
    window = f"{log.current}:{log.current}:"
    after = int(log.last_id * place)
    done = await _explain(session, "next_page", 0, "1", PAGE, PAGE_BYTES, [], after, window)
    assert done.rows == PAGE
    assert done.sequential() == []
    assert done.indexes() == {"id"}
    assert done.read() <= PAGE + 4  # one of each partition, to see which is the next
    assert done.blocks < 250


async def test_the_page_behind_the_last_one_reads_nothing(session: Connection, log: Log) -> None:
    window = f"{log.current}:{log.current}:"
    done = await _explain(
        session, "next_page", 0, str(log.seen), PAGE, PAGE_BYTES, [str(log.late)], log.last_id, window
    )
    assert (done.rows, done.read()) == (0, 0)
    assert done.sequential() == []
    assert done.blocks < 30


async def test_planned_when_the_log_was_empty_they_read_no_more_of_a_large_one(
    postgres: Postgres, template_database: str
) -> None:
    with _made(postgres, template_database) as dsn:
        await _prepare_to_seed(dsn)
        async with connection(PostgresSettings(dsn=SecretStr(dsn)), application="test plans") as session:
            await Planning(session).once()
            await session.execute("ANALYZE")
            for name, arguments in (
                ("open_window", ()),
                ("open_window_with_late", (["1"],)),
                ("next_page", ([], 0, "9:9:")),
            ):
                await _explain(session, name, 0, "1", PAGE, PAGE_BYTES, *arguments)
            log = await _fill(dsn, 5, analysed=False)
            first = await _explain(session, "open_window", 0, str(log.seen), PAGE, PAGE_BYTES)
            late = await _explain(session, "open_window_with_late", 0, str(log.seen), PAGE, PAGE_BYTES, [str(log.late)])
            window = f"{log.current}:{log.current}:"
            later = await _explain(session, "next_page", 0, "1", PAGE, PAGE_BYTES, [], log.last_id // 2, window)
    assert [(first.read(), first.indexes()), (late.read(), late.indexes())] == [(NEW, {"xid"}), (NEW + LATE, {"xid"})]
    assert (later.rows, later.indexes()) == (PAGE, {"id"})
    assert later.read() <= PAGE + 4


async def test_new_ids_after_a_restore_take_some_passes_over_the_log_however_many_rows_get_one(
    postgres: Postgres, template_database: str
) -> None:
    rows = 10_000
    with _made(postgres, template_database) as dsn:
        await _prepare_to_seed(dsn)
        async with connection(PostgresSettings(dsn=SecretStr(dsn)), application="test plans") as session:
            await session.execute(_SEED, rows, FIRST_XID, 5, 0)
            restored = "UPDATE relay.outbox_cursor SET high_id = $1, updated_at = now() - interval '1 day'"
            await session.execute(restored, rows)
            async with session.transaction():
                await session.execute(query("rebase"), 0)
                done = await _explain(session, "renumber", 0)
                changed = await session.fetchval("SELECT count(*) FROM relay.outbox WHERE id > $1", rows)
    assert changed == rows
    assert done.read() < 8 * rows


async def _prepare_to_seed(dsn: str) -> None:
    """What makes plans be forgotten, before there is anything to plan for."""
    async with connected(dsn) as seeding:
        await seeding.execute("ALTER TABLE relay.outbox DISABLE TRIGGER outbox_assign")
        for slot in range(4):
            await seeding.execute(f"ALTER TABLE relay.outbox_{slot} SET (autovacuum_enabled = off)")


async def _seed(dsn: str, rows_each: int, *, analysed: bool) -> Log:
    await _prepare_to_seed(dsn)
    return await _fill(dsn, rows_each, analysed=analysed)


async def _fill(dsn: str, rows_each: int, *, analysed: bool) -> Log:
    """The history as the trigger would have left it, with transaction ids of our choosing, in order over the ring."""
    async with connected(dsn) as seeding:
        # Every second transaction id is the history's, so that a late one can lie between them.
        seen = FIRST_XID + 2 * (HISTORY // rows_each)
        late, current = FIRST_XID + HISTORY // rows_each // 2 * 2 + 1, seen + 2 * NEW
        await seeding.execute(_SEED, HISTORY, FIRST_XID, rows_each, 0)
        await seeding.execute(_SEED, NEW, seen, 1, HISTORY)
        await seeding.execute(_SEED_LATE, LATE, str(late), HISTORY // 2)
        if analysed:
            await seeding.execute("ANALYZE")
        return Log(dsn, seen, late, current, HISTORY + NEW)


_SEED = """
INSERT INTO relay.outbox (id, xid, slot, shard, aggregate_type, aggregate_id, seq, event_type, payload, size)
SELECT $4::bigint + n, ($2::bigint + (n - 1) / $3::bigint * 2)::text::xid8, least(3, (n + $4::bigint) * 4 / 200001), 0, 'order', (n % 1000)::text,
       n / 1000 + 1, 'Changed', jsonb_build_object('text', repeat('x', 100)), 112
FROM generate_series(1, $1::bigint) AS n
"""


# Its ids are of the middle of the history, beside those of others: what matters here is where its rows lie.
_SEED_LATE = """
INSERT INTO relay.outbox (id, xid, slot, shard, aggregate_type, aggregate_id, seq, event_type, payload, size)
SELECT $3::bigint, $2::text::xid8, 2, 0, 'late', n::text, 1, 'Changed', '{}', 2 FROM generate_series(1, $1::bigint) AS n
"""


async def _explain(session: Connection, name: str, *arguments: Any) -> Explained:
    await _prepare(session, name)
    values = ", ".join(map(_literal, arguments))
    text = await session.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) EXECUTE {name} ({values})")
    plan = json.loads(text)[0]["Plan"]
    scans = [
        node
        for node in _nodes(plan)
        if node["Node Type"].endswith(("Seq Scan", "Index Scan", "Index Only Scan", "Heap Scan"))
    ]
    return Explained(round(plan["Actual Rows"]), plan["Shared Hit Blocks"] + plan["Shared Read Blocks"], scans)


async def _prepare(session: Connection, name: str) -> None:
    if not await session.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE name = $1", name):
        await session.execute(f"PREPARE {name} AS {query(name)}")


def _literal(value: Any) -> str:
    """As EXECUTE takes it: an unknown literal becomes what the parameter is."""
    if value is None:
        return "NULL"
    text = "{" + ",".join(f'"{each}"' for each in value) + "}" if isinstance(value, list) else str(value)
    return "'" + text.replace("'", "''") + "'"


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from _nodes(child)


def _touched(scan: dict[str, Any]) -> int:
    """Rows that a scan looked at: those it gave and those it threw away."""
    thrown: int = scan.get("Rows Removed by Filter", 0) + scan.get("Rows Removed by Index Recheck", 0)
    return round(float((scan["Actual Rows"] + thrown) * scan["Actual Loops"]))
