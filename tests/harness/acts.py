"""Operators' acts as a test does them: as the command line does, without the question."""

from __future__ import annotations

import json
from typing import Any

from relay.operate.act import PLANS, Act, Done, perform
from relay.operate.audit import Operator
from relay.postgres.connect import Connection, close, connect
from relay.settings import Settings

TESTER = Operator(who="tester@here", why="it is a test")


async def act_on(settings: Settings, act: Act) -> Done:
    """Count and do, on a connection of its own."""
    connection = await connect(settings.postgres, application="relay act", plans=PLANS)
    try:
        return await perform(connection, act, await act.plan(connection), TESTER)
    finally:
        await close(connection)


async def audits(db: Any) -> list[tuple[str, str, dict[str, Any], int, list[str]]]:
    """(side, act, selection, rows, aggregates) of every record, oldest first."""
    records = await db.fetch(
        "SELECT a.side, a.act, a.selection::text, a.rows, ARRAY(SELECT t.aggregate_type || '/' || t.aggregate_id FROM relay.audit_aggregate t"
        " WHERE t.audit_id = a.id ORDER BY 1) AS touched FROM relay.audit a ORDER BY a.id"
    )
    return [(r["side"], r["act"], json.loads(r["selection"]), r["rows"], r["touched"]) for r in records]


async def contents(db: Connection, *tables: str) -> dict[str, list[str]]:
    """Everything that is in tables of relay, to compare."""
    return {
        table: [r[0] for r in await db.fetch(f"SELECT t::text FROM relay.{table} t ORDER BY 1")] for table in tables
    }
