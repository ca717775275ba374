"""A consumer's queue is purged with 10 000 messages in it, under load: everything heals without anybody's doing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aio_pika
import pytest

from relay.daemon import Outbox
from relay.outbox.marks import Pace
from relay.rabbitmq.queues import InboxQueue, ensure_queue
from relay.rabbitmq.session import close, connect
from relay.settings import Settings
from tests.faults.shop import CONSUMER_TABLES, PRODUCER_TABLES, effects_inbox, judge, keep_booking
from tests.harness.outbox import connected, settings_for, until

PURGED = 10_000
QUIET = 50
"""Aggregates that nobody writes to any more: only marks tell that something of them is missing."""

FILL = """
WITH booked AS (
  SELECT 'fill-' || n AS token, $1 || n % $2 AS aggregate, n % 100 + 1 AS amount FROM generate_series(1, $3::integer) n ORDER BY n
), noted AS (
  INSERT INTO txn_log SELECT token, aggregate, amount FROM booked
)
INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload)
SELECT 'account', aggregate, 'Booked', jsonb_build_object('token', token, 'amount', amount) FROM booked
"""


@pytest.mark.timeout(1200)  # on an idle machine it is over in 10 s; with a tenth of a processor in 180 s
@pytest.mark.parametrize(
    ("pace", "alert_s", "stalled_s"),
    [
        pytest.param(Pace(interval_s=0.5, sweep_s=5), 1.0, 100.0, id="quick"),
        pytest.param(Pace(), 5.0, 200.0, id="defaults", marks=pytest.mark.soak),
    ],
)
async def test_a_purged_queue_heals_under_load(
    database: str, consumer_database: str, broker: str, pace: Pace, alert_s: float, stalled_s: float
) -> None:
    settings = settings_for(database, broker)
    inbox = settings_for(
        consumer_database,
        broker,
        inbox__gap_alert_after_s=alert_s,
        inbox__consumer="effects",
        inbox__batch=100,
        inbox__prefetch=200,
        daemon__log_level="error",
    )
    await prepare(database, consumer_database, inbox)
    stop = asyncio.Event()
    async with relay(settings, pace):
        producers = [
            asyncio.create_task(keep_booking(database, n, stop, aggregates=200, pause_s=0.05)) for n in range(2)
        ]
        async with connected(database) as db:
            await db.execute(FILL.replace("$1", "'quiet'").replace("$2", str(QUIET)).replace("$3", "1000"))
            await db.execute(
                FILL.replace("fill-", "more-").replace("$1", "'a'").replace("$2", "200").replace("$3", str(PURGED))
            )
        await until(lambda: has_messages(broker, PURGED + 1000), timeout_s=stalled_s)
        purged = await purge(broker)
        started = time.monotonic()
        before = await committed(database)
        async with consumers(inbox, 2):
            await all_applied(consumer_database, before, stalled_s=stalled_s)
            healed_s = time.monotonic() - started
            stop.set()
            await asyncio.gather(*producers)
            after = await committed(database)
            await all_applied(consumer_database, after, stalled_s=stalled_s)
            await until(lambda: nothing_is_missing(consumer_database), timeout_s=stalled_s, every_s=0.5)
    verdict = await judge(database, consumer_database)
    print(
        f"\n{purged} messages purged, {len(after) - len(before)} committed meanwhile; all that was lost was applied "
        f"{healed_s:.1f} s after the purge (alert after {alert_s:g} s, sweep of marks every {pace.sweep_s:g} s)"
    )
    assert verdict.holds, verdict
    assert purged >= PURGED
    assert len(after) > len(before), "inconclusive: nothing was written meanwhile"


async def prepare(database: str, consumer_database: str, inbox: Settings) -> None:
    """The services' own tables, and the consumer's queue, which nobody reads yet."""
    async with connected(database) as db:
        await db.execute(PRODUCER_TABLES)
    async with connected(consumer_database) as db:
        await db.execute(CONSUMER_TABLES)
    session = await connect(inbox.rabbitmq, name="test")
    queue = InboxQueue(name="effects", bindings=("#",), delivery_limit=inbox.inbox.delivery_limit)
    await ensure_queue(session, inbox.rabbitmq, queue)
    await close(session)


@asynccontextmanager
async def relay(settings: Settings, pace: Pace) -> AsyncIterator[None]:
    outbox = Outbox(settings, marks_pace=pace)
    task = asyncio.create_task(outbox.run())
    try:
        yield
    finally:
        outbox.stop.set()
        async with asyncio.timeout(60):
            await task


@asynccontextmanager
async def consumers(settings: Settings, count: int) -> AsyncIterator[None]:
    stop = asyncio.Event()
    tasks = [asyncio.create_task(effects_inbox().run(settings, stop=stop)) for _ in range(count)]
    try:
        yield
    finally:
        stop.set()
        async with asyncio.timeout(60):
            await asyncio.gather(*tasks)


async def has_messages(broker: str, count: int) -> bool:
    connection = await aio_pika.connect(broker)
    async with connection:
        queue = await (await connection.channel()).declare_queue("effects", passive=True)
        return (queue.declaration_result.message_count or 0) >= count


async def purge(broker: str) -> int:
    """How many messages are gone."""
    connection = await aio_pika.connect(broker)
    async with connection:
        return (await (await (await connection.channel()).get_queue("effects")).purge()).message_count or 0


async def committed(database: str) -> set[str]:
    async with connected(database) as db:
        return {r["token"] for r in await db.fetch("SELECT token FROM txn_log")}


async def all_applied(consumer_database: str, tokens: set[str], *, stalled_s: float) -> None:
    """Wait until all of these are, at most `stalled_s` seconds for another one: how long all take is a matter of the machine."""
    left = tokens

    async def fewer() -> bool:
        nonlocal left
        async with connected(consumer_database) as db:
            left = wanted - {r["token"] for r in await db.fetch("SELECT token FROM effect")}
        return len(left) < len(wanted)

    while wanted := left:
        await until(fewer, timeout_s=stalled_s, every_s=0.5)


async def nothing_is_missing(consumer_database: str) -> Any:
    async with connected(consumer_database) as db:
        return await db.fetchval(
            "SELECT NOT EXISTS (SELECT FROM relay.inbox_gap) AND NOT EXISTS (SELECT FROM relay.inbox_held)"
        )
