"""Every CHECK of the outbox has a row that violates it, and the error names it. A new constraint without a case fails here."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest

from relay.postgres.connect import Connection
from relay.sandbox import Postgres
from tests.harness.outbox import connected, insert

LIMIT = 16 * 1024 * 1024


@pytest.fixture(scope="module")
def scratch(postgres: Postgres, template_database: str) -> Iterator[str]:
    """One database for all of them: whatever a test writes is rolled back."""
    name = f"relay_constraints_{secrets.token_hex(4)}"
    yield postgres.create_database(name, template_database)
    postgres.drop_database(name)


@pytest.fixture
async def connection(scratch: str) -> AsyncIterator[Connection]:
    async with connected(scratch) as opened:
        undone = opened.transaction()
        await undone.start()
        yield opened
        await undone.rollback()


def event(**columns: str) -> str:
    """An INSERT of one event, valid but for the SQL expressions given by column."""
    chosen = {
        "aggregate_type": "'order'",
        "aggregate_id": "'1'",
        "event_type": "'Changed'",
        "payload": "'{}'",
    } | columns
    return f"INSERT INTO relay.outbox ({', '.join(chosen)}) VALUES ({', '.join(chosen.values())})"


def parked(**columns: str) -> str:
    """An INSERT of one parked row, valid but for the SQL expressions given by column."""
    chosen = {"id": "1", "shard": "0", "reason": "'nacked'", "state": "'stuck'"} | columns
    return f"INSERT INTO relay.outbox_parked ({', '.join(chosen)}) VALUES ({', '.join(chosen.values())})"


def pause(**columns: str) -> str:
    """An INSERT of one pause, of the SQL expressions given by column."""
    chosen = {"audit_id": "1"} | columns
    return f"INSERT INTO relay.outbox_pause ({', '.join(chosen)}) VALUES ({', '.join(chosen.values())})"


def change(assignment: str) -> str:
    """What no INSERT can do, because the trigger assigns the column: only an owner's UPDATE of the row that is there."""
    return f"UPDATE relay.outbox SET {assignment}"


# table -> constraint -> statements, each of which violates it. Those of the outbox are rules of one constraint: see RULES_OF.
CASES: dict[str, dict[str, list[str]]] = {
    "outbox": {
        "outbox_id_is_positive": [change("id = 0"), change("id = -1")],
        "outbox_shard_is_not_negative": [change("shard = -1")],
        "outbox_aggregate_type_is_a_name": [
            event(aggregate_type=value)
            for value in ("''", "'an order'", "'.order'", "'órder'", "E'order\\n'", "repeat('x', 101)")
        ],
        "outbox_aggregate_id_is_1_to_512_bytes": [
            event(aggregate_id=value) for value in ("''", "repeat('x', 513)", "repeat('é', 257)")
        ],
        "outbox_aggregate_id_needs_a_type": [event(aggregate_type="NULL")],
        "outbox_seq_goes_with_an_aggregate": [event(aggregate_id="NULL", seq="1"), change("seq = NULL")],
        "outbox_seq_counts_from_one": [change("seq = 0")],
        "outbox_event_type_is_a_name": [
            event(event_type=value) for value in ("''", "'Order Paid'", "':Paid'", "E'Paid\\n'", "repeat('x', 101)")
        ],
        "outbox_event_type_is_not_reserved": [event(event_type="'relay.tombstone'"), event(event_type="'relay.'")],
        "outbox_payload_or_body": [event(payload="NULL"), event(body="''")],
        "outbox_size_is_at_most_16_mib": [
            event(payload="NULL", body=f"convert_to(repeat('x', {LIMIT + 1}), 'UTF8')"),
            event(payload=f"to_jsonb(repeat('x', {LIMIT}))"),  # with its quotes two bytes too many
        ],
        "outbox_created_at_is_from_1970_to_9999": [
            event(created_at=value)
            for value in ("'1969-12-31 23:59:59Z'", "'-infinity'", "'10000-01-01 00:00Z'", "'infinity'")
        ],
        "outbox_content_type_is_printable": [
            event(content_type=value) for value in ("''", "E'a\\tb'", "'é'", "repeat('x', 101)")
        ],
        "outbox_routing_key_is_1_to_255_bytes": [
            event(routing_key=value) for value in ("''", "repeat('x', 256)", "repeat('é', 128)")
        ],
        "outbox_headers_are_flat_small_and_not_ours": [event(headers="'[]'")],  # and many more below
    },
    "outbox_cursor": {
        "outbox_cursor_shard_is_not_negative": ["INSERT INTO relay.outbox_cursor (shard) VALUES (-1)"],
        "outbox_cursor_after_id_needs_a_window": ["UPDATE relay.outbox_cursor SET after_id = 1"],
        "outbox_cursor_counts_up": [
            "UPDATE relay.outbox_cursor SET high_id = -1",
            "UPDATE relay.outbox_cursor SET epoch = -1",
            "UPDATE relay.outbox_cursor SET after_id = -1, window_snapshot = '1:1:'",
        ],
        "outbox_cursor_published_counts_up": [
            "UPDATE relay.outbox_cursor SET published = -1",
            "UPDATE relay.outbox_cursor SET rate = -1",
        ],
    },
    "outbox_parked": {
        "outbox_parked_reason_is_known": [parked(reason="'because'")],
        "outbox_parked_state_is_known": [parked(state="'gone'")],
        "outbox_parked_retrying_has_a_time": [parked(state="'retrying'"), parked(next_attempt_at="now()")],
        "outbox_parked_waiting_is_behind": [parked(state="'waiting'")],
        "outbox_parked_seq_goes_with_an_aggregate": [
            parked(seq="1"),
            parked(aggregate_type="'order'", aggregate_id="'1'"),
        ],
        "outbox_parked_attempts_count_up": [parked(attempts="-1")],
    },
    "outbox_tombstone": {
        "outbox_tombstone_act_is_known": ["INSERT INTO relay.outbox_tombstone VALUES (1, 0, 'retry', 1)"],
    },
    "outbox_pause": {
        "outbox_pause_scope_says_what": [
            pause(scope="'everything'"),
            pause(scope="'aggregate'", aggregate_type="'order'"),
            pause(scope="'aggregate'", aggregate_type="'order'", aggregate_id="'1'", event_type="'Paid'"),
            pause(scope="'aggregate'", aggregate_type="'order'", aggregate_id="'1'", shard="0"),
            pause(scope="'aggregate_type'"),
            pause(scope="'aggregate_type'", aggregate_type="'order'", aggregate_id="'1'"),
            pause(scope="'event_type'", aggregate_type="'order'"),
            pause(scope="'event_type'", event_type="'Paid'", aggregate_type="'order'"),
            pause(scope="'shard'"),
            pause(scope="'shard'", shard="0", event_type="'Paid'"),
        ],
    },
    "outbox_replay": {
        "outbox_replay_state_is_known": [
            "INSERT INTO relay.outbox_replay (audit_id, selection, last_id, total, state) VALUES (1, '{}', 1, 1, 'paused')"
        ],
    },
}


RULES_OF = "outbox_is_valid"
"""The one constraint of relay.outbox, and its function, which tells a broken rule by a name of its own."""


@pytest.mark.parametrize("table", CASES)
async def test_every_constraint_has_a_case(connection: Connection, table: str) -> None:
    records = await connection.fetch(
        "SELECT conname FROM pg_constraint WHERE contype = 'c' AND conrelid = $1::text::regclass", f"relay.{table}"
    )
    found = {r["conname"] for r in records}
    if table == "outbox":
        assert found == {RULES_OF}
        source = await connection.fetchval("SELECT prosrc FROM pg_proc WHERE proname = $1", RULES_OF)
        found = set(re.findall(r"'(outbox_\w+)'", source))
    assert found == set(CASES[table]), "a constraint came or went: change CASES"


async def test_every_table_of_the_outbox_that_has_constraints_has_cases(connection: Connection) -> None:
    records = await connection.fetch(
        "SELECT DISTINCT c.relname FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid"
        " WHERE k.contype = 'c' AND c.relnamespace = 'relay'::regnamespace AND c.relname LIKE 'outbox%' AND NOT c.relispartition"
    )
    assert {r["relname"] for r in records} == set(CASES)


@pytest.mark.parametrize(
    ("constraint", "statement"),
    [
        pytest.param(name, statement, id=f"{name}-{number}")
        for cases in CASES.values()
        for name, statements in cases.items()
        for number, statement in enumerate(statements)
    ],
)
async def test_a_row_that_violates_a_constraint_is_refused_under_its_name(
    connection: Connection, constraint: str, statement: str
) -> None:
    await insert(connection, "order/0")
    with pytest.raises(asyncpg.CheckViolationError) as caught:
        async with connection.transaction():
            await connection.execute(statement)
    assert caught.value.constraint_name == constraint
    assert await connection.fetchval("SELECT count(*) FROM relay.outbox") == 1


async def test_an_event_type_is_required(connection: Connection) -> None:
    with pytest.raises(asyncpg.NotNullViolationError, match="event_type"):
        async with connection.transaction():
            await connection.execute(event(event_type="NULL"))


@pytest.mark.parametrize(
    "statement",
    [
        event(aggregate_type="repeat('x', 100)", aggregate_id="repeat('é', 256)", event_type="repeat('y', 100)"),
        event(aggregate_type="'A-b_c.d:e9'", event_type="'0.x:y-z'"),
        event(payload="'null'"),
        event(payload="NULL", body="''"),
        event(content_type="repeat('~', 100)", routing_key="repeat('é', 127)"),
        event(aggregate_id="NULL", aggregate_type="NULL"),
        event(payload="NULL", body=f"convert_to(repeat('x', {LIMIT}), 'UTF8')"),
        event(payload=f"to_jsonb(repeat('x', {LIMIT - 2}))"),
    ],
)
async def test_what_is_just_within_the_limits_is_accepted(connection: Connection, statement: str) -> None:
    await connection.execute(statement)
    assert await connection.fetchval(
        "SELECT size = coalesce(octet_length(body), octet_length(payload::text)) FROM relay.outbox"
    )


async def test_an_event_that_is_too_large_is_told_its_size_the_limit_and_the_way_out(connection: Connection) -> None:
    with pytest.raises(asyncpg.CheckViolationError) as caught:
        async with connection.transaction():
            await connection.execute(event(payload="NULL", body=f"convert_to(repeat('x', {LIMIT + 1}), 'UTF8')"))
    assert caught.value.args == (
        "relay.outbox: the payload of Changed order/1 is 16777217 bytes, the limit is 16777216 (16 MiB)",
    )
    assert caught.value.hint == "Store large content elsewhere and send a reference to it."


async def test_a_refused_event_does_not_use_up_a_number(connection: Connection) -> None:
    await insert(connection, "order/1")
    with pytest.raises(asyncpg.CheckViolationError):
        async with connection.transaction():
            await connection.execute(event(headers="'[]'"))
    assert await connection.fetchval("SELECT relay.emit('order', '1', 'Changed', '{}')") == 2


@pytest.mark.parametrize(
    "headers",
    [
        None,
        {},
        {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "ok": True, "n": 0},
        {"n": 2**63 - 1, "m": -(2**63)},
        {"!" * 64 + "~" * 64: "ümläut \N{SNOWMAN}"},
        {"x-tagged": "", "x-relayed": 1, "X-Sequence-Of-Mine": False},
        {"large": "x" * (16384 - len('{"large": ""}'))},
    ],
)
async def test_good_headers_are_accepted(connection: Connection, headers: dict[str, Any] | None) -> None:
    text = None if headers is None else json.dumps(headers, ensure_ascii=False)
    await connection.execute("SELECT relay.emit('order', '1', 'Changed', '{}', headers => $1)", text)
    stored = await connection.fetchval("SELECT headers FROM relay.outbox")
    assert (None if stored is None else json.loads(stored)) == headers


@pytest.mark.parametrize(
    "headers",
    [
        "[]",
        '"text"',
        "1",
        "null",
        '{"nested": {}}',
        '{"nested": []}',
        '{"nothing": null}',
        '{"fraction": 0.5}',
        '{"would travel as a float": 1.0}',
        '{"float": 1.0}',
        '{"too_large": 9223372036854775808}',
        '{"too_small": -9223372036854775809}',
        '{"huge": 1e30}',
        '{"": "no name"}',
        '{"with space": 1}',
        '{"ümlaut": 1}',
        json.dumps({"x" * 129: 1}),
        '{"x-aggregate-type": "order"}',
        '{"x-aggregate-id": "1"}',
        '{"x-sequence": 1}',
        '{"x-content-digest": ""}',
        '{"x-tag": ""}',
        '{"x-relay-anything": 1}',
        json.dumps({"large": "x" * (16384 - len('{"large": ""}') + 1)}),
    ],
)
async def test_bad_headers_are_refused_under_the_constraints_name(connection: Connection, headers: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError) as caught:
        async with connection.transaction():
            await connection.execute("SELECT relay.emit('order', '1', 'Changed', '{}', headers => $1)", headers)
    assert caught.value.constraint_name == "outbox_headers_are_flat_small_and_not_ours"
