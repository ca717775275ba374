"""The inbox's statements find their rows by key: on tables that are empty, large, and never analysed."""

from __future__ import annotations

from typing import Any

import pytest

from relay.postgres.connect import connect
from relay.postgres.queries import query
from relay.settings import PostgresSettings

IDS = [str(i) for i in range(200)]
KEYS: tuple[list[Any], ...] = (["s"], ["t"], IDS, [])
MIXED = (["s", "s"], ["t", "u"], IDS, [1, 2] * 100)
STATEMENTS: dict[str, tuple[Any, ...]] = {
    "lock_cursors": ("c", *KEYS),
    "lines_with_held": ("c", *KEYS),
    "write_cursors": ("c", *KEYS, [2] * 200, [b""] * 200, []),
    "held_successors": ("c", "s", "t", IDS, [1] * 200, 64, 1_000_000),
    "make_successors_due": ("c", "s", "t", IDS, [1] * 200),
    "release_waiting": ("c", "", "", "", 2000),
    "let_first_lead": ("c", "", "", "", "", 2000),
    "held_by_id": ("c", [1] * 200),
    "delete_held_through": ("c", "s", "t", IDS, [1] * 200, IDS, [1] * 200, [b""] * 200, "relay.tombstone"),
    "due_held": ("c", 100, 1_000_000),
    "next_due": ("c",),
}
VARIANTS = [*STATEMENTS.items(), ("lock_cursors", ("c", *MIXED)), ("lines_with_held", ("c", *MIXED))]


@pytest.mark.parametrize("rows", [0, 20_000])
@pytest.mark.parametrize(("name", "values"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "")
async def test_no_statement_of_a_batch_scans_a_table(
    name: str, values: tuple[Any, ...], rows: int, database: str
) -> None:
    connection = await connect(PostgresSettings.model_validate({"dsn": database}), application="plans")
    try:
        await connection.execute(
            "INSERT INTO relay.inbox_aggregate (consumer, source, aggregate_type, aggregate_id, last_seq) "
            f"SELECT 'c', 's', 't', i, 1 FROM generate_series(1, {rows}) i"
        )
        await connection.execute(
            "INSERT INTO relay.inbox_held (consumer, source, aggregate_type, aggregate_id, seq, message_id, event_type, content_type, "
            f"body, digest, reason, state) SELECT 'c', 's', 't', i, 3, i, 'T', '', '', '', 'early', 'waiting' FROM generate_series(1, {rows}) i"
        )
        await connection.execute(
            "INSERT INTO relay.inbox (consumer, source, aggregate_type, aggregate_id, seq, message_id, event_type, content_type, headers, "
            f"body) SELECT 'c', 's', 't', i, 3, i, 'T', '', '{{}}', '' FROM generate_series(1, {rows}) i"
        )
        plan = "\n".join(r[0] for r in await connection.fetch("EXPLAIN " + query(name), *values))
        assert "Seq Scan" not in plan, plan
        if name in (
            "lines_with_held",
            "held_successors",
            "make_successors_due",
            "release_waiting",
            "delete_held_through",
        ):
            assert "inbox_held_by_aggregate" in plan, plan
        if name == "let_first_lead":
            assert "inbox_by_aggregate" in plan, plan
        if name in ("lock_cursors", "release_waiting"):
            assert "inbox_aggregate_pkey" in plan, plan
    finally:
        await connection.close()
