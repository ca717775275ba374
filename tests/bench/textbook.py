"""The relay that everybody writes first, written well: what ours is compared with.

A table with `sent_at`, a partial index over what is not sent, `SELECT ... FOR UPDATE SKIP LOCKED LIMIT n`, publish with confirms
(persistent and mandatory: a returned message raises), one UPDATE for the batch, COMMIT. asyncpg and aio-pika, prepared statements,
no sleep while there is work. Two ways to publish a batch:

    each       await the confirm of one message before the next is sent: messages leave in the order of ids, one at a time
    gathered   `asyncio.gather` over the batch: as fast as aio-pika is, in the order of ids as long as nobody refuses

What neither gives: order of commits (an id that commits late is sent behind a higher one of its aggregate, or by another
worker), isolation of a message that cannot be published (the batch is rolled back and begun again, for ever), flat cost while a
session holds xmin (each UPDATE leaves a dead row, and a dead entry of the partial index that every SELECT steps over).

A process of its own: `TEXTBOOK_DSN=... TEXTBOOK_URL=... python -m tests.bench.textbook --way gathered [--drain]`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

import aio_pika
import asyncpg
from aio_pika.abc import AbstractExchange

from relay.postgres.connect import Connection

Way = Literal["each", "gathered"]

EXCHANGE = "textbook.events"
BATCH = 500
IDLE_S = 0.02
"""Between two looks at an empty table: what "polling often" means to a reasonable person."""

SCHEMA = """
CREATE TABLE textbook_outbox (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    aggregate_type text NOT NULL,
    aggregate_id text NOT NULL,
    event_type text NOT NULL,
    payload jsonb NOT NULL,
    message_id uuid NOT NULL DEFAULT gen_random_uuid(),
    created_at timestamptz NOT NULL DEFAULT now(),
    sent_at timestamptz
);
CREATE INDEX textbook_outbox_unsent ON textbook_outbox (id) WHERE sent_at IS NULL;
"""
# The same events as the statement bench_insert of sql/queries/bench.sql makes.
FILL = """
INSERT INTO textbook_outbox (aggregate_type, aggregate_id, event_type, payload)
SELECT 'bench', (i % $2::bigint)::text, 'Measured', jsonb_build_object('fill', repeat('x', greatest($3::int - 12, 0)))
FROM generate_series(1, $1::bigint) AS i
"""
TAKE = """
SELECT id, aggregate_type, aggregate_id, event_type, payload::text AS payload, message_id, created_at
FROM textbook_outbox WHERE sent_at IS NULL ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED
"""
SENT = "UPDATE textbook_outbox SET sent_at = now() WHERE id = ANY($1::bigint[])"


class Textbook:
    """One worker: a database connection, a confirm channel."""

    def __init__(self, db: Connection, exchange: AbstractExchange, *, way: Way, batch: int = BATCH) -> None:
        self._db = db
        self._exchange = exchange
        self._publish_all = WAYS[way]
        self._batch = batch
        self.stop = asyncio.Event()
        self.sent = 0

    async def run(self, *, drain: bool = False) -> None:
        """Publish until `stop` is set; with `drain`, until nothing is left."""
        while not self.stop.is_set():
            count = await self.round()
            if count == 0 and drain:
                return
            if count < self._batch:
                await self._idle()

    async def round(self) -> int:
        """One batch, in one transaction; the number of its messages."""
        async with self._db.transaction():
            rows = await self._db.fetch(TAKE, self._batch)
            if rows:
                await self._publish_all(self._publish, rows)
                await self._db.execute(SENT, [row["id"] for row in rows])
        self.sent += len(rows)
        return len(rows)

    async def _publish(self, row: asyncpg.Record) -> None:
        message = aio_pika.Message(
            row["payload"].encode(),
            content_type="application/json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=str(row["message_id"]),
            type=row["event_type"],
            timestamp=row["created_at"],
            headers={"x-aggregate-type": row["aggregate_type"], "x-aggregate-id": row["aggregate_id"]},
        )
        await self._exchange.publish(message, f"{row['aggregate_type']}.{row['event_type']}", mandatory=True)

    async def _idle(self) -> None:
        try:
            await asyncio.wait_for(self.stop.wait(), IDLE_S)
        except TimeoutError:
            return


async def _each(publish: Callable[[asyncpg.Record], Awaitable[None]], rows: Sequence[asyncpg.Record]) -> None:
    for row in rows:
        await publish(row)


async def _gathered(publish: Callable[[asyncpg.Record], Awaitable[None]], rows: Sequence[asyncpg.Record]) -> None:
    await asyncio.gather(*(publish(row) for row in rows))


WAYS = {"each": _each, "gathered": _gathered}


async def run(dsn: str, url: str, *, way: Way, batch: int, drain: bool) -> int:
    """Connect, run until a signal (or, with `drain`, until nothing is left); the number of messages sent."""
    db: Connection = await asyncpg.connect(dsn)
    broker = await aio_pika.connect(url)
    try:
        channel = await broker.channel(publisher_confirms=True, on_return_raises=True)
        exchange = await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
        textbook = Textbook(db, exchange, way=way, batch=batch)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, textbook.stop.set)
        await textbook.run(drain=drain)
        return textbook.sent
    finally:
        await broker.close()
        await db.close()


def main() -> None:
    """The process; the addresses are in the environment, where `ps` does not show their passwords."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=sorted(WAYS), default="gathered")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--drain", action="store_true", help="end when nothing is left")
    given = parser.parse_args()
    dsn, url = os.environ["TEXTBOOK_DSN"], os.environ["TEXTBOOK_URL"]
    asyncio.run(run(dsn, url, way=given.way, batch=given.batch, drain=given.drain))


if __name__ == "__main__":
    main()
