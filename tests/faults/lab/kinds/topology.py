"""What the broker has is taken away by an operator: exchange, queue, messages, bindings.

What is counted is what the broker answered, what relay's tables tell of it, and what its daemons logged.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from tests.faults.lab.broker_operator import (
    QUEUE,
    all_at_work,
    api,
    channel_to,
    close_connections,
    count_logged,
    log_marks,
    nobody_consuming,
    require,
    wait,
)
from tests.faults.lab.fault import fault
from tests.faults.lab.stage import BROKER_USERS, Stage

WHOLE = ("broker", "relay-amqp", "consumer-amqp")
CONSUMER_USER = BROKER_USERS[1]
EXCHANGE, AUDIT, AUDITED = "relay.events", "audit", "account.#"
HEALED_BY_MARKS_S = 30.0
"""What the broker lost is missed by marks (swept every 5 s), asked for, and sent again."""

NO_EXCHANGE = re.compile(r"NOT_FOUND - no exchange 'relay\.events'")
NO_QUEUE = re.compile(r"RabbitMQ cancelled the consumer|NOT_FOUND - no queue 'effects'")

UNROUTABLE = """
SELECT count(*) AS n FROM relay.outbox_parked WHERE reason = 'unroutable' AND aggregate_type = 'lonely' AND parked_at >= $1
"""
BOOKED_SINCE = (
    "SELECT aggregate, min(seq) AS seq FROM txn_log WHERE kind = 'account' AND committed_at >= $1 GROUP BY aggregate"
)
MISSED = """
SELECT count(*) AS n FROM relay.inbox_gap g JOIN unnest($1::text[], $2::bigint[]) AS b (aggregate, seq) ON b.aggregate = g.aggregate_id
WHERE g.aggregate_type = 'account' AND g.to_seq >= b.seq AND g.noticed_at >= $3
"""
"""What was missed before does not count, nor gaps that end before what was booked since then."""


@fault(
    "exchange deleted",
    rows=(11,),
    touches=("relay", "consumer", "consumer-db", "consumer-pg", *WHOLE),
    recovery_s=HEALED_BY_MARKS_S,
    loses=True,
)
async def exchange_deleted(stage: Stage, _: random.Random) -> int:
    """With all its bindings. The relay declares it again, each consumer's next session binds its queue again.

    The audit queue must be bound before the consumers': it would not witness what they get. So consumers are only sent into
    their next session when it is.
    """
    await all_at_work(stage)
    marks, returned = log_marks(stage.relays), stage.relay_amqp.seen["return"]
    try:
        async with channel_to(stage) as channel:
            await channel.exchange_delete(EXCHANGE)
        await wait(stage, lambda: _exchange_exists(stage), timeout_s=15)
    finally:
        async with channel_to(stage) as channel:
            await channel.exchange_declare(EXCHANGE, exchange_type="topic", durable=True)
            await channel.queue_bind(AUDIT, EXCHANGE, AUDITED)
        await close_connections(stage, CONSUMER_USER)
    await require(stage, lambda: _is_bound(stage, AUDITED), "no consumer has bound its queue again", 15)
    return count_logged(NO_EXCHANGE, stage.relays, marks) + stage.relay_amqp.seen["return"] - returned


@fault("queue deleted", rows=(11, 41), touches=("consumer", *WHOLE), recovery_s=HEALED_BY_MARKS_S, loses=True)
async def queue_deleted(stage: Stage, dice: random.Random) -> int:
    """With all that is in it. Consumers are told, and declare it again; until it is bound, events go to the audit only."""
    await all_at_work(stage)
    marks = log_marks(stage.consumers)
    await asyncio.sleep(dice.uniform(0, 0.5))
    async with channel_to(stage) as channel:
        await channel.queue_delete(QUEUE)
    await require(stage, lambda: _is_bound(stage, AUDITED), "no consumer has declared its queue again", 15)
    await wait(stage, lambda: count_logged(NO_QUEUE, stage.consumers, marks) > 0, timeout_s=5)
    return count_logged(NO_QUEUE, stage.consumers, marks)


@fault("queue purged", rows=(41, 26), touches=("consumer", *WHOLE), recovery_s=HEALED_BY_MARKS_S, loses=True)
async def queue_purged(stage: Stage, dice: random.Random) -> int:
    """Confirmed events are thrown away. Bitten as often as the broker says that it has thrown away."""
    wanted = dice.randint(1, 200)
    async with nobody_consuming(stage), channel_to(stage) as channel:

        async def filled() -> bool:
            return ((await channel.queue_declare(QUEUE, passive=True)).message_count or 0) >= wanted

        await wait(stage, filled, timeout_s=15)
        purged = (await channel.queue_purge(QUEUE)).message_count
    return purged or 0


@fault("route of one type unbound", rows=(10,), touches=("broker", "consumer", "consumer-amqp"), confined_to="lonely")
async def lonely_unbound(stage: Stage, dice: random.Random) -> int:
    """No queue is bound for these events: the broker returns them, they are parked, and go out when it is bound again."""
    most, began = 0, datetime.now(UTC)  # the servers' clock is ours
    async with _unbound(stage, "lonely.#"):

        async def parked() -> bool:
            nonlocal most
            most = max(most, int((await stage.producer_sql(UNROUTABLE, began))[0]["n"]))
            return most > 0

        await stage.until(parked, timeout_s=15)
        await asyncio.sleep(dice.uniform(0.5, 3))
        await stage.until(parked, timeout_s=1)
    return most


@fault(
    "route unbound for the consumer only",
    rows=(41, 26),
    touches=("broker", "consumer", "consumer-amqp"),
    recovery_s=HEALED_BY_MARKS_S,
    loses=True,
)
async def account_unbound(stage: Stage, dice: random.Random) -> int:
    """The audit queue still gets these events, so the broker confirms them: nobody but the marks tells the consumer.

    Bitten as often as it noticed that it misses something of an aggregate.
    """
    began = datetime.now(UTC)
    booked: list[Any] = []

    async def is_booked() -> bool:
        booked[:] = await stage.producer_sql(BOOKED_SINCE, began)
        return bool(booked)

    async with _unbound(stage, AUDITED):
        published = stage.relay_amqp.seen["publish"]
        await wait(stage, lambda: stage.relay_amqp.seen["publish"] > published + 20, timeout_s=15)
        await asyncio.sleep(dice.uniform(0, 2))
        await stage.until(is_booked, timeout_s=15)
    most, first = 0, ([row["aggregate"] for row in booked], [row["seq"] for row in booked])

    async def missed() -> bool:
        nonlocal most
        most = max(most, int((await stage.consumer_sql(MISSED, *first, began))[0]["n"]))
        return most > 0

    await stage.until(missed, timeout_s=12)
    return most


@asynccontextmanager
async def _unbound(stage: Stage, pattern: str) -> AsyncIterator[None]:
    """Within it the consumers' queue gets nothing of that kind; a consumer's next session would bind it again by itself."""
    async with channel_to(stage) as channel:
        await channel.queue_unbind(QUEUE, EXCHANGE, pattern)
    try:
        yield
    finally:
        async with channel_to(stage) as channel:
            await channel.queue_bind(QUEUE, EXCHANGE, pattern)


async def _exchange_exists(stage: Stage) -> bool:
    return bool(await api(stage, "GET", f"/api/exchanges/%2F/{EXCHANGE}"))


async def _is_bound(stage: Stage, pattern: str) -> bool:
    """Whether the consumers' queue gets these events."""
    found: list[dict[str, Any]] = json.loads(
        await api(stage, "GET", f"/api/exchanges/%2F/{EXCHANGE}/bindings/source") or b"[]"
    )
    return any(one["destination"] == QUEUE and one["routing_key"] == pattern for one in found)
