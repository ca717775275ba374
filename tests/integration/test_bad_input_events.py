"""Producers that hand over what cannot be stored: refused with a reason, nothing half written, and the next good event flows."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from relay.errors import InputError
from relay.producer import NewEvent
from relay.producer import asyncpg as producer
from tests.harness.audit import audit
from tests.harness.outbox import connected, insert, outbox_running, settings_for

NUL, SURROGATE = "a\0b", "a\ud800b"
FIELDS = ("aggregate_type", "aggregate_id", "event_type", "payload", "content_type", "headers", "routing_key")
GOOD: dict[str, Any] = {"aggregate_type": "order", "aggregate_id": "1", "event_type": "Changed", "payload": {}}

INSERT = """
    INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload, content_type, headers, routing_key)
    VALUES ($1, $2, $3, $4, $5, $6, $7)
"""


def spoiled(field: str, text: str) -> dict[str, Any]:
    """A good event with one text in it that cannot be stored."""
    value: Any = {"payload": {"a": [text]}, "headers": {"a": text}}.get(field, text)
    return GOOD | {field: value}


async def flows_after(database: str, broker: str) -> None:
    """Of all that was tried nothing is there; a good event gets the first number and arrives."""
    async with audit(broker) as witness, connected(database) as connection:
        assert await connection.fetchval("SELECT count(*) FROM relay.outbox") == 0
        assert await connection.fetchval("SELECT count(*) FROM relay.outbox_aggregate") == 0
        async with outbox_running(settings_for(database, broker)):
            await insert(connection, "order/1")
            await witness.wait_for(1)
        assert witness.sequences() == {"order/1": [1]}


@pytest.mark.parametrize("text", [NUL, SURROGATE], ids=["nul", "surrogate"])
async def test_no_field_of_a_plain_insert_takes_them(database: str, broker: str, text: str) -> None:
    async with connected(database) as connection:
        for field in FIELDS:
            event = spoiled(field, text)
            values = [event.get(name) for name in FIELDS]
            # As an application would: json.dumps escapes both, and PostgreSQL refuses the escapes.
            values = [json.dumps(v) if isinstance(v, dict) else v for v in values]
            with pytest.raises((asyncpg.PostgresError, asyncpg.DataError, UnicodeEncodeError)):
                await connection.execute(INSERT, *values)
            assert await connection.fetchval("SELECT 1") == 1  # the connection is still good
    await flows_after(database, broker)


@pytest.mark.parametrize(
    "sql",
    [
        r"""'order', '1', 'Changed', '"\u0000"', NULL""",
        r"""'order', '1', 'Changed', '"\ud800"', NULL""",
        r"""'order', '1', 'Changed', '{"\u0000": 1}', NULL""",
        r"""'order', '1', 'Changed', '{}', '{"a": "\u0000"}'""",
        r"""'order', '1', 'Changed', '{}', '{"a": "\udfff"}'""",
        r"""'order', E'a\x00b', 'Changed', '{}', NULL""",
        r"""'order', E'\xff', 'Changed', '{}', NULL""",
        r"""E'\u0000', '1', 'Changed', '{}', NULL""",
        r"""'order', '1', E'\ud800', '{}', NULL""",
        r"""'order', chr(0), 'Changed', '{}', NULL""",
        r"""'order', convert_from('\xeda080', 'UTF8'), 'Changed', '{}', NULL""",
    ],
)
async def test_no_spelling_of_sql_gets_them_in(database: str, broker: str, sql: str) -> None:
    async with connected(database) as connection:
        with pytest.raises(asyncpg.PostgresError):
            await connection.execute(
                f"INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload, headers) VALUES ({sql})"
            )
        with pytest.raises(asyncpg.PostgresError):
            await connection.execute(f"SELECT relay.emit({sql})")
    await flows_after(database, broker)


async def test_a_body_may_hold_any_bytes(database: str, broker: str) -> None:
    body = b"\0\xff\xed\xa0\x80" + bytes(range(256))
    async with audit(broker) as witness, connected(database) as connection:
        async with outbox_running(settings_for(database, broker)):
            await connection.execute(
                "INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, body) VALUES ('order', '1', 'X', $1)",
                body,
            )
            (message,) = await witness.wait_for(1)
        assert message.body == body


@pytest.mark.parametrize("text", [NUL, SURROGATE], ids=["nul", "surrogate"])
@pytest.mark.parametrize("field", FIELDS)
async def test_the_python_helper_names_the_field(database: str, broker: str, field: str, text: str) -> None:
    async with connected(database) as connection:
        async with connection.transaction():
            with pytest.raises(InputError) as caught:
                await producer.emit(connection, NewEvent(**spoiled(field, text)))
            assert await connection.fetchval("SELECT 1") == 1  # the caller's transaction is not spoiled
    assert str(caught.value).startswith(f"{field}: ")
    assert str(caught.value).isprintable()
    if field == "payload":
        await flows_after(database, broker)


async def _emit(dsn: str, folder: Path, content: bytes) -> tuple[int, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RELAY_", "PG"))}
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "relay", "emit"],
        env=clean | {"RELAY_POSTGRES_DSN": dsn, "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=folder,
        input=content,
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        *(
            (json.dumps(spoiled(field, text)).encode(), f"line 2: {field}: ")
            for field in ("aggregate_id", "payload")
            for text in (NUL, SURROGATE)
        ),
        (json.dumps(spoiled("headers", NUL)).encode(), "line 2: headers: "),
        (b'{"event_type": "a\xff"}', "line 2: is not valid UTF-8"),
        (b'{"event_type": "a\0"}', "line 2: is not valid JSON"),
        (b'{"event_type": "a\xed\xa0\x80"}', "line 2: is not valid UTF-8"),
        (b'{"event_type": "\\u001b[2J", "payload": 1}', "line 2: event_type: "),
        (b'{"\\u001b[2J": 1}', "line 2: unknown key "),
        (
            b'{"event_type": "Changed", "aggregate_type": "order", "aggregate_id": "\\u001b[2J\\n", "seq": 7, "payload": 1}',
            "line 2: PostgreSQL refused the event: relay.outbox: seq 7 was given for order/",
        ),
    ],
)
async def test_relay_emit_names_the_line_and_ends_with_6(
    database: str, broker: str, tmp_path: Path, line: bytes, told: str
) -> None:
    good = json.dumps(GOOD).encode()
    code, said = await _emit(database, tmp_path, good + b"\n" + line + b"\n" + good + b"\n")
    assert code == 6, said
    assert told in said
    assert "nothing from line 1 on is written" in said
    assert not [c for c in said if not c.isprintable() and c != "\n"]
    await flows_after(database, broker)


async def test_what_only_the_wire_refuses_is_parked_and_holds_only_its_aggregate(database: str, broker: str) -> None:
    """A routing key of 255 bytes of control characters, and one that an unfinished template would make: both travel or park."""
    async with audit(broker, "order.#") as witness, connected(database) as connection:
        async with outbox_running(settings_for(database, broker)):
            for aggregate, key in (("1", "\x01" * 255), ("2", "a\x1b[2J\r\n"), ("3", "ä" * 127), ("4", None)):
                await connection.execute(INSERT, "order", aggregate, "Changed", "{}", None, None, key)
            await witness.wait_for(1)
            async with asyncio.timeout(20):
                while await connection.fetchval("SELECT count(*) FROM relay.outbox_parked") != 3:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            await insert(connection, "order/4")
            await witness.wait_for(2)
        assert witness.sequences() == {"order/4": [1, 2]}
        assert {r["reason"] for r in await connection.fetch("SELECT reason FROM relay.outbox_parked")} == {"unroutable"}
