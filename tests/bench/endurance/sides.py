"""The two that are compared, and what each is given: a table in the same database, an exchange on the same broker, a process."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from relay.postgres.connect import Connection
from relay.postgres.migrate import migrate
from tests.bench import textbook

ROOT = Path(__file__).parents[3]

# $1 and $2 the first and the last number, $3 aggregates, $4 filling in bytes, $5 every how many-th is a probe
_EVENTS = """
SELECT 'bench', (n % $3::bigint)::text, CASE WHEN n % $5::bigint = 0 THEN 'Probe' ELSE 'Measured' END,
       jsonb_build_object('n', n, 'at', extract(epoch FROM clock_timestamp()), 'fill', repeat('x', $4::int))
FROM generate_series($1::bigint, $2::bigint) AS n
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One relay under test."""

    name: str
    exchange: str
    insert: str
    command: tuple[str, ...]
    names: Mapping[str, str]  # environment: which variable takes the database's address, which the broker's
    tables: str  # condition on pg_stat_user_tables

    def environment(self, dsn: str, url: str) -> dict[str, str]:
        """Ours without any setting of relay's, and the addresses."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RELAY_", "PG"))}
        given = {"dsn": dsn, "url": url}
        return clean | {name: given.get(value, value) for name, value in self.names.items()} | {"PYTHONPATH": str(ROOT)}


RELAY = Side(
    name="relay",
    exchange="relay.events",
    insert="INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload)" + _EVENTS,
    command=(sys.executable, "-m", "relay", "run"),
    names={
        "RELAY_SOURCE": "bench",
        "RELAY_POSTGRES_DSN": "dsn",
        "RELAY_RABBITMQ_URL": "url",
        "RELAY_DAEMON_LOG_LEVEL": "warning",
    },
    tables="schemaname = 'relay'",
)
TEXTBOOK = Side(
    name="textbook",
    exchange=textbook.EXCHANGE,
    insert="INSERT INTO textbook_outbox (aggregate_type, aggregate_id, event_type, payload)" + _EVENTS,
    command=(sys.executable, "-m", "tests.bench.textbook", "--way", "gathered"),
    names={"TEXTBOOK_DSN": "dsn", "TEXTBOOK_URL": "url"},
    tables="relname = 'textbook_outbox'",
)
SIDES = (RELAY, TEXTBOOK)


async def prepare(db: Connection) -> None:
    """Both schemas into one database."""
    await migrate(db)
    await db.execute(textbook.SCHEMA)


async def sizes(db: Connection, side: Side) -> tuple[int, int]:
    """(dead rows as PostgreSQL counts them, bytes of the tables with their indexes)."""
    row = await db.fetchrow(
        "SELECT coalesce(sum(n_dead_tup), 0)::bigint, coalesce(sum(pg_total_relation_size(relid)), 0)::bigint "
        f"FROM pg_stat_user_tables WHERE {side.tables}"
    )
    assert row is not None
    return row[0], row[1]
