"""The relays that are compared, and one run of one of them: fill, publish, look at the queue, count."""

from __future__ import annotations

import asyncio
import time

from relay.postgres.connect import Connection
from relay.postgres.migrate import migrate
from relay.sandbox import Postgres, RabbitMQ
from tests.bench import textbook
from tests.bench.peers.contenders import (
    FASTSTREAM,
    FASTSTREAM_FILL,
    NO_ORDER,
    NODE,
    NODE_FILL,
    OUR_FILL,
    TXOUTBOX,
    TXOUTBOX_FILL,
    Contender,
)
from tests.bench.peers.figures import Run
from tests.bench.peers.install import Installed
from tests.bench.peers.place import Failed, Place, bound_queue, channel, connected, depth, place
from tests.bench.peers.watch import watched

AGGREGATES = 500
PAYLOAD_BYTES = 256
SETTLE_S = 0.5
"""How long the queue is looked at after the last message: a contender that publishes some twice is seen."""

CONTENDERS = (
    Contender(
        name="relay",
        side="outbox",
        how="relay run --drain, defaults",
        order="per aggregate, in the order of commits",
        safety="confirmed and mandatory; at least once; what is refused is parked with its aggregate",
        arguments=("relay", "run", "--drain"),
        fill=OUR_FILL,
        ends=True,
    ),
    Contender(
        name="textbook, gathered",
        side="outbox",
        how="SKIP LOCKED, gather over 500 confirms, one UPDATE",
        order="of ids, one worker, as long as nothing is refused; not of commits",
        safety="confirmed and mandatory; at least once; one bad message stops all",
        arguments=("tests.bench.textbook", "--way", "gathered", "--drain"),
        fill=textbook.FILL,
        ends=True,
    ),
    Contender(
        name="textbook, each awaited",
        side="outbox",
        how="SKIP LOCKED, one confirm after the other, one UPDATE for 500",
        order="of ids, one worker; not of commits",
        safety="confirmed and mandatory; at least once; one bad message stops all",
        arguments=("tests.bench.textbook", "--way", "each", "--drain"),
        fill=textbook.FILL,
        ends=True,
    ),
    Contender(
        name="txoutbox 0.2.2",
        side="outbox",
        how="PostgresStorage (strict ordering, delete on ack), batch 500, concurrency 500, aio-pika",
        order="per key, in the order of ids; not of commits",
        safety="confirmed and mandatory; at least once, by leases; dead letters after 10 attempts",
        packages=TXOUTBOX,
        driver="txoutbox_outbox.py",
        fill=TXOUTBOX_FILL,
    ),
    Contender(
        name="faststream-outbox 0.19.0",
        side="outbox",
        how="relay to RabbitBroker, 50 workers, fetch 500, terminal flush 100, asyncpg",
        order=NO_ORDER,
        safety="confirmed and mandatory; at least once, by leases; dropped after 10 attempts unless a DLQ table is given",
        packages=FASTSTREAM,
        driver="faststream_outbox_relay.py",
        fill=FASTSTREAM_FILL,
    ),
    Contender(
        name="pg-transactional-outbox 0.5.7, replication",
        side="outbox",
        how="logical replication, 20 messages at once, amqplib confirm channel",
        order=NO_ORDER + " (its mutex keeps order, several times slower)",
        safety="confirmed and mandatory; at least once; needs wal_level = logical and a slot",
        packages=NODE,
        driver="pg_transactional_outbox.mjs",
        arguments=(
            "replication",
        ),  # its polling listener was tried: five times slower with 3 000 rows waiting, worse with more
        fill=NODE_FILL,
    ),
)


async def run(
    postgres: Postgres,
    rabbitmq: RabbitMQ,
    contender: Contender,
    installed: Installed | None,
    *,
    queue_type: str,
    events: int,
    number: int,
) -> Run:
    """One run, verified: exactly so many messages are in the queue at the end. Raises Failed or Stalled."""
    events = min(events, contender.most or events)
    async with place(postgres, rabbitmq, f"outbox_{queue_type}_{number}") as here, channel(here.url) as opened:
        await bound_queue(opened, queue_type)
        async with connected(here.dsn) as db:
            await _fill(db, here, contender, installed, events)
        started = time.perf_counter()
        async with here.running(contender, installed) as program:
            seen = await watched(lambda: depth(opened), events, alive=program.alive)
            wall_s = time.perf_counter() - started
            await asyncio.sleep(SETTLE_S)
        await asyncio.sleep(SETTLE_S)
        found = await depth(opened)
        if found != events:
            raise Failed(f"{contender.name}: {events:,} were committed, {found:,} messages are in the queue")
    return Run(
        contender=contender.name,
        queue_type=queue_type,
        round=number,
        events=events,
        rate=seen.rate,
        wall_s=wall_s,
        cpu_us=1e6 * program.cpu_s / events,
    )


async def _fill(db: Connection, here: Place, contender: Contender, installed: Installed | None, events: int) -> None:
    """Its tables, the events in statements of 500, then quiet: nothing of this is to be paid for by the run."""
    if installed is not None:
        await here.prepare(contender, installed)
    elif contender.ours:
        await migrate(db)
    else:
        await db.execute(textbook.SCHEMA)
    for first in range(0, events, 500):
        await db.execute(contender.fill, min(500, events - first), AGGREGATES, PAYLOAD_BYTES)
    await db.execute("VACUUM ANALYZE")
    await db.execute("CHECKPOINT")
