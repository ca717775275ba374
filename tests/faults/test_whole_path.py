"""Every committed event has exactly one effect, in order, whatever is killed on the way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractIncomingMessage

from relay.inbox import Inbox
from relay.postgres.errors import FAILURES
from relay.sandbox import Postgres, RabbitMQ
from relay.settings import Settings
from tests.faults.shop import (
    CONSUMER_TABLES,
    PRODUCER_TABLES,
    applied_count,
    declare_queue,
    effects_inbox,
    judge,
    keep_booking,
)
from tests.harness.audit import EXCHANGE
from tests.harness.outbox import RelayProcess, connected, insert, outbox_running, settings_for, until

KILLS = 20
RECOVERY_S = 90.0
"""Longest time from the end of all faults to the last effect; measured: 5 to 15 s, most of it the broker's own start."""


async def prepare(database: str, consumer_database: str) -> None:
    """The services' own tables."""
    async with connected(database) as db:
        await db.execute(PRODUCER_TABLES)
    async with connected(consumer_database) as db:
        await db.execute(CONSUMER_TABLES)


async def declare_witness(broker: str) -> None:
    """A queue of an independent witness, which takes everything and is not read until the end."""
    connection = await aio_pika.connect(broker)
    async with connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
        witness = await channel.declare_queue("witness", durable=True, arguments={"x-queue-type": "quorum"})
        await witness.bind(exchange, "#")


@asynccontextmanager
async def consumers(inbox: Inbox, settings: Settings, count: int) -> AsyncIterator[None]:
    """Competing consumers on one queue, each with connections of its own."""
    stop = asyncio.Event()
    tasks = [asyncio.create_task(inbox.run(settings, stop=stop)) for _ in range(count)]
    try:
        yield
    finally:
        stop.set()
        async with asyncio.timeout(60):
            await asyncio.gather(*tasks)


async def copies_at_the_broker(broker: str) -> int:
    """How many messages the broker accepted more than once: shows that a kill fell between confirm and checkpoint."""
    ids: list[str | None] = []
    all_there = asyncio.Event()
    connection = await aio_pika.connect(broker)
    async with connection:
        channel = await connection.channel()
        queue = await channel.get_queue("witness")

        async def take(message: AbstractIncomingMessage) -> None:
            ids.append(message.message_id)
            if len(ids) == queue.declaration_result.message_count:
                all_there.set()

        await queue.consume(take, no_ack=True)  # one by one takes longer than all the kills
        async with asyncio.timeout(60):
            await all_there.wait()
        assert await queue.get(no_ack=True, fail=False) is None
    return len(ids) - len(set(ids))


async def everything_applied(database: str, consumer_database: str) -> bool:
    async with connected(database) as db:
        committed = await db.fetchval("SELECT count(*) FROM txn_log")
    return bool(await applied_count(consumer_database) >= committed)


async def owner_epoch(database: str) -> int:
    """How often the log has been taken over; -1 while the database does not answer."""
    try:
        async with connected(database) as db:
            return int(await db.fetchval("SELECT epoch FROM relay.outbox_cursor"))
    except FAILURES:
        return -1


async def has_new_owner(database: str, before: int) -> bool:
    return await owner_epoch(database) > before


async def kill_relays(settings: Settings, database: str, seed: int, kills: int) -> None:
    """Start a relay, wait until it owns the log, let it work for a random time, kill -9."""
    dice = random.Random(seed)
    for _ in range(kills):
        before = await owner_epoch(database)
        relay = await RelayProcess.start(settings)
        with suppress(TimeoutError):  # the database is down: killed while it waits, which is a point as good as others
            await until(partial(has_new_owner, database, before), timeout_s=8, every_s=0.1)
        await asyncio.sleep(0.1 + dice.random())  # the random point of the kill
        await relay.kill()
        assert relay.process.returncode == -9


@pytest.mark.parametrize("competing", [pytest.param(1, marks=pytest.mark.soak), 4])
async def test_20_kills_two_broker_restarts_and_a_database_restart_cost_nothing(
    database: str, consumer_database: str, broker: str, postgres: Postgres, rabbitmq: RabbitMQ, competing: int
) -> None:
    settings = settings_for(
        database,
        broker,
        outbox__page_rows=100,
        outbox__checkpoint_interval_s=1,  # so that kills fall between a confirm and its checkpoint
        outbox__standby_interval_s=0.2,
        daemon__log_level="error",
    )
    inbox_settings = settings_for(consumer_database, broker, inbox__bindings=("account.#",), daemon__log_level="error")
    await prepare(database, consumer_database)
    await declare_witness(broker)
    stop = asyncio.Event()
    async with consumers(effects_inbox(), inbox_settings, competing):
        producers = [
            asyncio.create_task(keep_booking(database, n, stop, aggregates=50, pause_s=0.01)) for n in range(4)
        ]
        killing = asyncio.create_task(kill_relays(settings, database, competing, KILLS))
        for restart in (rabbitmq.restart, rabbitmq.start_again, postgres.restart):
            await asyncio.sleep(2)  # load between the faults
            if restart == rabbitmq.start_again:
                await asyncio.to_thread(rabbitmq.kill9)
            await asyncio.to_thread(restart)
        await killing
        stop.set()
        undone = sum(await asyncio.gather(*producers))
        last = await RelayProcess.start(settings)
        try:
            await until(lambda: everything_applied(database, consumer_database), timeout_s=RECOVERY_S, every_s=0.2)
        finally:
            await last.terminate()
    verdict = await judge(database, consumer_database)
    assert verdict.holds, verdict
    assert verdict.committed > 1000
    assert undone > 0
    assert await copies_at_the_broker(broker) > 0, "inconclusive: no kill fell between confirm and checkpoint"


async def test_a_poison_handler_and_an_unroutable_type_hold_only_their_own_aggregates(
    database: str, consumer_database: str, broker: str
) -> None:
    settings = settings_for(database, broker, daemon__log_level="error")
    inbox_settings = settings_for(
        consumer_database, broker, inbox__bindings=("account.#",), inbox__retry_first_s=300, daemon__log_level="error"
    )
    await prepare(database, consumer_database)
    await declare_queue(inbox_settings)  # bound before the relay starts: only the ghosts are to be unroutable
    stop = asyncio.Event()
    async with consumers(effects_inbox(poison="a7"), inbox_settings, 1), outbox_running(settings):
        producers = [
            asyncio.create_task(keep_booking(database, n, stop, aggregates=20, pause_s=0.005)) for n in range(4)
        ]
        async with connected(database) as db:
            await insert(db, "ghost/1", count=5)
            await asyncio.sleep(3)  # load
            stop.set()
            await asyncio.gather(*producers)
            poisoned = await db.fetchval("SELECT count(*) FROM txn_log WHERE aggregate = 'a7'")
            rest = await db.fetchval("SELECT count(*) FROM txn_log WHERE aggregate <> 'a7'")

            async def rest_applied() -> bool:
                return bool(await applied_count(consumer_database) == rest)

            await until(rest_applied)
            async with connected(consumer_database) as consumer:

                async def all_held() -> Any:
                    return await consumer.fetchval("SELECT count(*) = $1 FROM relay.inbox_held", poisoned)

                await until(all_held)
                held = await consumer.fetch(
                    "SELECT DISTINCT aggregate_id, reason FROM relay.inbox_held ORDER BY reason"
                )
            parked = await db.fetch("SELECT DISTINCT aggregate_type, aggregate_id FROM relay.outbox_parked")
    assert [tuple(r) for r in held] == [("a7", "behind"), ("a7", "failed")]
    assert [tuple(r) for r in parked] == [("ghost", "1")]
    verdict = await judge(database, consumer_database, without="a7")
    assert verdict.holds, verdict
    assert poisoned > 5
