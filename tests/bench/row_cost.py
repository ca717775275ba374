"""What a row costs on its way through the relay, step by step, in microseconds of CPU of this process.

    python -m tests.bench.row_cost [--rows 20000] [--rounds 5] [--body 256] [--aggregates 1000] [--headers] [--queue quorum|classic]
        [--stock] [--pure] [--profile]

The log is a real one, read by the reader (its own statements, asyncpg's decoding included); every following step is run alone over
the same rows. `drain` is the whole of it, by the daemon: it needs a broker. Servers are RELAY_TEST_POSTGRES_DSN and
RELAY_TEST_RABBITMQ_URL, or private ones; --pure leaves the broker out. Told is the least of the rounds for a step, since whatever else
runs only adds to it, and the median for the drain. --stock publishes by aio-pika; --profile tells where a drain's time goes.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import aio_pika
import asyncpg

from relay.daemon import Outbox
from relay.message import Message, Row
from relay.outbox.cursor import Page, Position, Snapshot
from relay.outbox.parking import settle, unsendable
from relay.outbox.pause import Pauses
from relay.outbox.reader import Reader, to_rows
from relay.outbox.recent import Recent
from relay.outbox.routing import route
from relay.postgres.connect import connection
from relay.postgres.migrate import migrate
from relay.postgres.planning import Planning
from relay.postgres.queries import query
from relay.rabbitmq.contract import Confirmed
from relay.rabbitmq.wire.encoding import Encoder
from relay.sandbox import find_postgres, find_rabbitmq
from relay.settings import Settings, load_settings

NAME = "row_cost"
PAGE = 1000

FILL = """
INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload, headers)
SELECT 'order', 'order-' || n % $2::integer, CASE n % 3 WHEN 0 THEN 'OrderPaid' ELSE 'OrderPlaced' END,
       jsonb_build_object('text', repeat('x', greatest(0, $3::integer - 12))),
       CASE WHEN $4::boolean THEN jsonb_build_object('tenant', 'acme', 'traceparent', '00-' || md5(n::text) || '-00f067aa0ba902b7-01') END
FROM generate_series(1, $1::integer) AS n
"""
REWIND = "UPDATE relay.outbox_cursor SET snapshot = '1:1:', window_snapshot = NULL, after_id = 0"

Step = Callable[[], object]


def least_us(step: Step, rows: int, rounds: int) -> float:
    """CPU us a row."""
    costs = []
    for _ in range(rounds):
        started = time.process_time()
        step()
        costs.append(time.process_time() - started)
    return min(costs) / rows * 1e6


async def read(settings: Settings) -> tuple[list[Page], float]:
    """The whole log in pages, and what reading it cost."""
    async with connection(settings.postgres, application=NAME) as opened:
        reader = Reader(
            opened, shard=0, page_rows=PAGE, page_bytes=settings.outbox.page_bytes, planning=Planning(opened)
        )
        pages: list[Page] = []
        position = Position(Snapshot(1, 1))
        started = time.process_time()
        while not (page := await reader.read(position)).empty:
            pages.append(page)
            position = position.after(page)
        return pages, (time.process_time() - started) * 1e6


async def first_page(settings: Settings) -> list[asyncpg.Record]:
    """As it comes from PostgreSQL."""
    async with connection(settings.postgres, application=NAME) as opened:
        snapshot = await opened.fetchval("SELECT pg_current_snapshot()::text")
        return await opened.fetch(query("next_page"), 0, "1", PAGE, settings.outbox.page_bytes, [], 0, snapshot)


def steps(rows: Sequence[Row], records: Sequence[asyncpg.Record], rounds: int) -> dict[str, float]:
    """What each step costs after reading, alone."""
    encode = Encoder(channel=1, exchange="relay.events", max_payload=131064).encode
    confirmed = [Confirmed()] * PAGE
    recent = Recent()
    recent.wanted = True
    pages = [rows[start : start + PAGE] for start in range(0, len(rows), PAGE)]

    def messages() -> list[Message]:
        return [route(row, source="shop", template="{aggregate_type}.{event_type}") for row in rows]

    def note() -> None:
        for page in pages:
            recent.note(page)

    routed = messages()
    told: dict[str, Step] = {
        "a record as a row (part of reading)": lambda: [to_rows(records) for _ in pages],
        "the row's message": messages,
        "its frames": lambda: [encode(message) for message in routed],
        "its page, begun and settled": lambda: [
            (unsendable(page, frozenset(), Pauses()), settle(page, confirmed[: len(page)], frozenset(), Pauses()))
            for page in pages
        ],
        "noted for the marks": note,
    }
    return {name: least_us(step, len(rows), rounds) for name, step in told.items()}


async def drain(settings: Settings, rows: int, *, profile: bool) -> tuple[float, float]:
    """(CPU us a row, rows a second) of `relay run --drain` in this process, connecting and all."""
    async with connection(settings.postgres, application=NAME) as opened:
        await opened.execute(REWIND)
    daemon = Outbox(settings)
    watched = cProfile.Profile() if profile else None
    wall, cpu = time.perf_counter(), time.process_time()
    if watched is not None:
        watched.enable()
    await daemon.run(drain=True)
    if watched is not None:
        watched.disable()
        pstats.Stats(watched).sort_stats("tottime").print_stats(30)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if (done := daemon.progress[0].published) != rows:
        raise SystemExit(f"{done} of {rows} rows were published")
    return cpu / rows * 1e6, rows / wall


async def drains(settings: Settings, given: argparse.Namespace) -> list[tuple[float, float]]:
    """Rounds of `drain`, each into an empty queue."""
    broker = await aio_pika.connect(settings.rabbitmq.url.get_secret_value())
    try:
        channel = await broker.channel()
        target = await channel.declare_exchange("relay.events", aio_pika.ExchangeType.TOPIC, durable=True)
        queue = await channel.declare_queue(NAME, durable=True, arguments={"x-queue-type": given.queue})
        await queue.bind(target, "#")
        found = []
        for _ in range(given.rounds):
            found.append(await drain(settings, given.rows, profile=given.profile))
            await queue.purge()
        return found
    finally:
        await broker.close()


async def fill(dsn: str, given: argparse.Namespace) -> None:
    """The log."""
    db = await asyncpg.connect(dsn)
    try:
        await migrate(db)
        await db.execute(FILL, given.rows, given.aggregates, given.body, given.headers)
        await db.execute("VACUUM ANALYZE relay.outbox")
    finally:
        await db.close()


def settings_for(dsn: str, url: str, client: str) -> Settings:
    """The defaults, but for what a benchmark must say."""
    flags: dict[str, Any] = {"source": "shop", "postgres.dsn": dsn, "rabbitmq.url": url, "daemon.log_level": "warning"}
    return load_settings(environ={}, flags=flags | {"outbox.repair": False, "rabbitmq.client": client})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--body", type=int, default=256, help="bytes of each payload")
    parser.add_argument("--aggregates", type=int, default=1000)
    parser.add_argument(
        "--headers", action="store_true", help="with two headers of the producer's, one of them always another"
    )
    parser.add_argument("--queue", choices=("quorum", "classic"), default="quorum")
    parser.add_argument("--stock", action="store_true", help="by aio-pika")
    parser.add_argument("--pure", action="store_true", help="without a broker")
    parser.add_argument("--profile", action="store_true", help="of each drain; it makes everything slower")
    given = parser.parse_args()
    with find_postgres(fsync=True) as postgres:
        dsn = postgres.create_database(NAME)
        try:
            asyncio.run(fill(dsn, given))
            settings = settings_for(dsn, "amqp://localhost", "fast")
            costs = []
            for _ in range(given.rounds):
                pages, cost = asyncio.run(read(settings))
                costs.append(cost / given.rows)
            rows = [row for page in pages for row in page.rows]
            table = {"reading": min(costs)} | steps(rows, asyncio.run(first_page(settings)), given.rounds)
            for name, cost in table.items():
                print(f"{name:<40}{cost:8.2f} us")
            alone = sum(table.values()) - table["a record as a row (part of reading)"]
            print(f"{'all of it, without confirms':<40}{alone:8.2f} us")
            if given.pure:
                return
            with find_rabbitmq() as broker:
                url = broker.create_vhost(NAME)
                try:
                    found = asyncio.run(drains(settings_for(dsn, url, "stock" if given.stock else "fast"), given))
                finally:
                    broker.delete_vhost(NAME)
            cpu, rate = (statistics.median(column) for column in zip(*found, strict=True))
            print(f"{'drain':<40}{cpu:8.2f} us   {rate:,.0f} rows/s into a {given.queue} queue")
        finally:
            postgres.drop_database(NAME)


if __name__ == "__main__":
    main()
