"""What the inbox's benchmarks share: a database, deliveries without a broker, and the real daemon between them."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import structlog
from pydantic import SecretStr

from relay.inbox import Inbox, Stats
from relay.inbox.consumer import _Daemon
from relay.message import Delivery, Event, Row, to_message
from relay.postgres.connect import Connection
from relay.postgres.migrate import migrate
from relay.rabbitmq.contract import Consumer
from relay.sandbox import find_postgres
from relay.settings import InboxSettings, PostgresSettings, Settings
from relay.supervisor import supervise
from tests.harness.deliveries import delivered

CONSUMER = "bench"
EFFECTS = "CREATE TABLE effect (id bigint GENERATED ALWAYS AS IDENTITY, aggregate text, seq bigint, event_type text)"
INSERT = "INSERT INTO effect (aggregate, seq, event_type) VALUES ($1, $2, $3)"
INSERT_MANY = (
    "INSERT INTO effect (aggregate, seq, event_type) SELECT * FROM unnest($1::text[], $2::bigint[], $3::text[])"
)


@contextmanager
def database() -> Iterator[str]:
    """The DSN of a fresh database with relay's schema and a table for effects, never analysed by autovacuum."""
    with find_postgres() as server:
        name = f"relay_bench_{secrets.token_hex(4)}"
        dsn = server.create_database(name)
        try:
            asyncio.run(_prepare(dsn))
            yield dsn
        finally:
            server.drop_database(name)


async def _prepare(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await migrate(connection)
        await connection.execute(EFFECTS)
        for table in ("relay.inbox_aggregate", "relay.inbox_held", "relay.inbox_seen", "effect"):
            await connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
    finally:
        await connection.close()


def set_based() -> Inbox:
    """A batch handler: one statement a call."""
    inbox = Inbox(CONSUMER)

    @inbox.on_batch("Changed")
    async def record(events: Sequence[Event], tx: Connection) -> None:
        await tx.execute(
            INSERT_MANY, [e.aggregate_id for e in events], [e.seq for e in events], [e.event_type for e in events]
        )

    return inbox


def one_by_one() -> Inbox:
    """A handler with one statement a message."""
    inbox = Inbox(CONSUMER)

    @inbox.on("Changed")
    async def record(event: Event, tx: Connection) -> None:
        await tx.execute(INSERT, event.aggregate_id, event.seq, event.event_type)

    return inbox


def deliveries(
    n: int, *, aggregates: int, first_seq: int = 1, duplicates: float = 0.0, swaps: float = 0.0, seed: int = 1
) -> list[Delivery]:
    """`n` events of 256 bytes, round the aggregates; then parts of them repeated, and neighbours of one aggregate swapped."""
    dice = random.Random(seed)
    places = [(i % aggregates, first_seq + i // aggregates) for i in range(n)]
    for i in range(n - aggregates):
        if dice.random() < swaps:
            places[i], places[i + aggregates] = places[i + aggregates], places[i]
    for _ in range(int(n * duplicates)):
        i = dice.randrange(n)
        places.insert(min(i + dice.randrange(1, 1000), len(places)), places[i])
    return [_delivery(tag, *place) for tag, place in enumerate(places, start=1)]


_BODY = b'{"text": "' + b"x" * 244 + b'"}'
_NOW = datetime(2026, 1, 1, tzinfo=UTC)
_TRACE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


def _delivery(tag: int, aggregate: int, seq: int) -> Delivery:
    row = Row(tag, "order", f"order-{aggregate}", seq, "Changed", "application/json", _TRACE, None, _NOW, _BODY)
    message = to_message(row, source="shop", routing_key="order.Changed")
    return delivered(message, tag)


class Feed:
    """A Consumer with everything at hand, as far as the prefetch allows; `stop` is set when all is acknowledged."""

    def __init__(self, deliveries: Sequence[Delivery], *, prefetch: int, stop: asyncio.Event) -> None:
        self._deliveries = deliveries
        self._prefetch = prefetch
        self._stop = stop
        self._next = 0
        self._acknowledged = 0
        self._changed = asyncio.Event()

    async def receive(self, limit: int) -> list[Delivery]:
        """See the contract."""
        while (most := min(limit, self._acknowledged + self._prefetch - self._next)) <= 0 or self._next == len(
            self._deliveries
        ):
            self._changed.clear()
            await self._changed.wait()
        taken = [*self._deliveries[self._next : self._next + most]]
        self._next += len(taken)
        return taken

    def next_ready(self) -> Delivery | None:
        """See the contract."""
        if self._next == min(len(self._deliveries), self._acknowledged + self._prefetch):
            return None
        self._next += 1
        return self._deliveries[self._next - 1]

    async def acknowledge(self, tag: int) -> None:
        """See the contract. Tags are 1, 2, 3 ..."""
        self._acknowledged = tag
        self._changed.set()
        if tag == len(self._deliveries):
            self._stop.set()

    async def close(self) -> None:
        """Nothing to close."""


class FedDaemon(_Daemon):
    """relay's own, but for where its deliveries come from."""

    feed: Feed

    @asynccontextmanager
    async def _consumer(self, prefetch: int) -> AsyncIterator[Consumer]:
        yield self.feed


def settings(dsn: str, **inbox: object) -> Settings:
    """Settings for a run."""
    return Settings(
        postgres=PostgresSettings(dsn=SecretStr(dsn)),
        inbox=InboxSettings.model_validate({"repair": False, **inbox}),
    )


async def applied(inbox: Inbox, configured: Settings, events: Sequence[Delivery]) -> Stats:
    """Apply all of it with the real daemon; returns when everything is acknowledged."""
    stop = asyncio.Event()
    daemon = FedDaemon(inbox, configured, stop, lambda _: None)
    daemon.feed = Feed(events, prefetch=configured.inbox.prefetch, stop=stop)
    await supervise(daemon.session, name="bench", settings=configured.daemon, stop=stop, log=structlog.get_logger())
    return daemon.total


def backends_cpu_s(server_pids: Sequence[int]) -> float:
    """CPU seconds of PostgreSQL's backends, where they run on this machine; 0 elsewhere."""
    total = 0.0
    for pid in server_pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total
