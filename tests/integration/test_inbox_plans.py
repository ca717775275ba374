"""The inbox's statements find their rows by key: on tables that are empty, large, never analysed or analysed, and however they are planned.

Handlers run on the inbox's connection, and are planned there as in any other session: PostgreSQL may plan a statement for its
values, or once for all, and that one perhaps on the first day, when the tables were empty. Both must keep to the index.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from typing import Any

import pytest

from relay.errors import SandboxError
from relay.inbox.database import PLANS
from relay.postgres import arrays
from relay.postgres.connect import Connection, connect
from relay.postgres.queries import query
from relay.sandbox import SandboxPostgres
from relay.sandbox.postgres_binaries import find_postgres_binaries
from relay.settings import PostgresSettings
from tests.harness.databases import Databases

IDS = [str(i) for i in range(200)]
KEYS: tuple[Any, ...] = (["s"], ["t"], arrays.texts(IDS), [])
MIXED: tuple[Any, ...] = (["s", "s"], ["t", "u"], arrays.texts(IDS), [1, 2] * 100)
SEQS = [1] * 200
TIDS = arrays.texts([f"(0,{i})" for i in range(1, 201)])
STATEMENTS: dict[str, tuple[Any, ...]] = {
    "lock_cursors": ("c", *KEYS),
    "create_cursors": ("c", *KEYS),
    "lines_with_held": ("c", *KEYS),
    "insert_seen": ("c", ["s"] * 200, IDS),
    "held_successors": ("c", "s", "t", IDS, SEQS, 64, 1_000_000),
    "make_successors_due": ("c", "s", "t", IDS, SEQS),
    "release_waiting": ("c", "", "", "", 2000),
    "due_held": ("c", 100, 1_000_000),
    "lock_due_held": ("c", SEQS),
    "next_due": ("c",),
    "write_cursors": ("c", *KEYS, TIDS, arrays.numbers([2] * 200), arrays.octets([b""] * 200), [], True),
    "delete_held_through": ("c", "s", "t", IDS, SEQS, IDS, SEQS, [b""] * 200, "relay.tombstone"),
    "held_by_id": ("c", SEQS),
    "delete_held": (SEQS,),
    "held_digest": ("c", "s", "t", "1", 3),
    "update_held": (SEQS, ["early"] * 200, ["waiting"] * 200, SEQS, [None] * 200, [None] * 200),
    "let_first_lead": ("c", "", "", "", "", 2000),
    "gap_states": ("c", ["s"] * 200, ["t"] * 200, IDS),
}
BY_INDEX = {
    "lock_cursors": "inbox_aggregate_pkey",
    "lines_with_held": "inbox_held_by_aggregate",
    "held_successors": "inbox_held_by_aggregate",
    "make_successors_due": "inbox_held_by_aggregate",
    "release_waiting": "inbox_held_by_aggregate",
    "delete_held_through": "inbox_held_by_aggregate",
    "held_digest": "inbox_held_by_aggregate",
    "write_cursors": "inbox_held_by_aggregate",
    "due_held": "inbox_held_due",
    "next_due": "inbox_held_due",
    "lock_due_held": "inbox_held_pkey",
    "let_first_lead": "inbox_by_aggregate",
}
NEVER_ANALYSED, ANALYSED = "", "ANALYZE relay.inbox_aggregate, relay.inbox_held, relay.inbox, relay.inbox_seen"


@pytest.fixture(scope="module", params=["the suite's", "18"])
def databases(request: pytest.FixtureRequest, databases: Databases) -> Iterator[Databases]:
    """Of two servers: what `enable_seqscan = off` keeps the planner from has changed in PostgreSQL 18."""
    if request.param != "18":
        yield databases
        return
    try:
        find_postgres_binaries("18")
    except SandboxError as exc:
        pytest.skip(f"needs PostgreSQL 18: {exc}")
    with SandboxPostgres("18", fsync=False) as server, closing(Databases(server)) as made:
        yield made


@asynccontextmanager
async def tables(database: str, rows: int, then: str = NEVER_ANALYSED) -> AsyncIterator[Connection]:
    """A connection as the inbox has it, to a database with so many rows in each table."""
    connection = await connect(PostgresSettings.model_validate({"dsn": database}), application="plans", plans=PLANS)
    try:
        await fill(connection, rows)
        if then:
            await connection.execute(then)
        yield connection
    finally:
        await connection.close()


async def fill(connection: Connection, rows: int) -> None:
    series = f"FROM generate_series(1, {rows}) i"
    for into, values in {
        "inbox_aggregate (consumer, source, aggregate_type, aggregate_id, last_seq)": "'c', 's', 't', i, 1",
        "inbox_held (consumer, source, aggregate_type, aggregate_id, seq, message_id, event_type, content_type, body, digest, reason, "
        "state)": "'c', 's', 't', i, 3, i, 'T', '', '', '', 'early', 'waiting'",
        "inbox (consumer, source, aggregate_type, aggregate_id, seq, message_id, event_type, content_type, headers, body)": "'c', 's', "
        "'t', i, 3, i, 'T', '', '{}', ''",
        "inbox_seen (consumer, source, message_id)": "'c', 's', i",
    }.items():
        await connection.execute(f"INSERT INTO relay.{into} SELECT {values} {series}")


def scans(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The nodes of a plan that read a table or an index."""
    if "Scan" in plan["Node Type"] and ("Relation Name" in plan or "Index Name" in plan):
        yield plan
    for child in plan.get("Plans", []):
        yield from scans(child)


def wrong_with(name: str, explained: str) -> list[str]:
    """Which of its scans reads all of a table or an index; or that it uses another index."""
    found = list(scans(json.loads(explained)[0]["Plan"]))
    wrong = [
        f"{name}: {node['Node Type']} on {node.get('Relation Name') or node['Index Name']}"
        for node in found
        if node["Node Type"] != "Bitmap Heap Scan" and "Index Cond" not in node and node["Node Type"] != "Tid Scan"
    ]
    if (index := BY_INDEX.get(name)) and index not in {node.get("Index Name") for node in found}:
        wrong.append(f"{name}: not by {index}")
    return wrong


@pytest.mark.parametrize(("rows", "then"), [(0, NEVER_ANALYSED), (20_000, NEVER_ANALYSED), (20_000, ANALYSED)])
async def test_planned_for_its_values_no_statement_of_a_batch_scans_a_table(
    rows: int, then: str, database: str
) -> None:
    mixed = {
        name: ("c", *MIXED, *STATEMENTS[name][5:]) for name in ("lock_cursors", "lines_with_held", "write_cursors")
    }
    async with tables(database, rows, then) as connection:
        wrong = []
        for name, values in (*STATEMENTS.items(), *mixed.items()):
            explained = await connection.fetchval(f"EXPLAIN (FORMAT JSON) {query(name)}", *values)
            wrong += wrong_with(name, explained)
    assert wrong == []


@pytest.mark.parametrize(("rows", "then"), [(0, NEVER_ANALYSED), (20_000, NEVER_ANALYSED), (20_000, ANALYSED)])
async def test_planned_once_for_all_values_no_statement_of_a_batch_scans_a_table(
    rows: int, then: str, database: str
) -> None:
    async with tables(database, rows, then) as connection:
        await connection.execute("SET plan_cache_mode = force_generic_plan")
        wrong = []
        for name, values in STATEMENTS.items():
            await connection.execute(f"PREPARE {name} AS {query(name)}")
            nulls = ", ".join("NULL" for _ in values)
            wrong += wrong_with(name, await connection.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE {name} ({nulls})"))
    assert wrong == []


ONE: tuple[Any, ...] = (["s"], ["t"], arrays.texts(["1"]), [])
USUAL: dict[str, tuple[Any, ...]] = {
    "lock_cursors": ("c", *ONE),
    "create_cursors": ("c", *ONE),
    "lines_with_held": ("c", *ONE),
    "insert_seen": ("c", ["s"], ["1"]),
    "write_cursors": ("c", *ONE, arrays.texts(["(0,1)"]), arrays.numbers([2]), arrays.octets([b""]), [], True),
}


@pytest.mark.parametrize(("rows", "then"), [(0, NEVER_ANALYSED), (20_000, NEVER_ANALYSED), (20_000, ANALYSED)])
async def test_what_every_batch_asks_is_planned_once_for_all_also_when_batches_are_of_one_message(
    rows: int, then: str, database: str
) -> None:
    """PostgreSQL plans five executions for their values, and goes on with that unless a plan for all values looks as cheap."""
    async with tables(database, rows, then) as connection:
        times = dict.fromkeys(USUAL, 0)
        for name, values in USUAL.items():
            for _ in range(12):
                await connection.fetch(query(name), *values)
            times[name] = await connection.fetchval(
                "SELECT custom_plans FROM pg_prepared_statements WHERE statement = $1", query(name)
            )
    assert times == dict.fromkeys(USUAL, 5)


async def test_handlers_are_planned_as_in_any_other_session(database: str) -> None:
    """To plan each statement of a handler anew costs the server 40 % more."""
    async with tables(database, 0) as connection:
        assert await connection.fetchval("SHOW plan_cache_mode") == "auto"
