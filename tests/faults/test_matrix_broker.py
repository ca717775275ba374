"""Rows 12, 39, 41 and 42 of the fault matrix: what RabbitMQ does to those who are slow, come too early, or trust it for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import aio_pika
import pytest
from structlog.testing import capture_logs

from relay.inbox import Event
from relay.postgres.connect import Connection
from relay.sandbox import RabbitMQ, SandboxRabbitMQ
from tests.faults.own_servers import own_broker
from tests.harness.audit import EXCHANGE, audit
from tests.harness.outbox import connected, insert, until
from tests.harness.pair import Pair, pair, record
from tests.harness.program import environment, relay

__all__ = ["own_broker", "pair"]


# --- 12: the exchange is missing


async def test_without_its_exchange_a_relay_that_may_not_declare_waits_says_so_and_goes_on(
    database: str, broker: str, tmp_path: Path
) -> None:
    """Row 12. Nothing is marked meanwhile, and `relay status` shows the reason."""
    environ = environment(database, broker, rabbitmq_declare_topology="false", outbox_repair="false")
    async with connected(database) as db, relay(tmp_path, environ, "run") as program:
        await insert(db, "order/1", count=3)
        await program.says("BrokerRefused", "the exchange 'relay.events' does not exist", times=3)
        cursor = await db.fetchrow("SELECT published, last_error FROM relay.outbox_cursor")
        assert cursor is not None
        assert cursor["published"] == 0
        assert "the exchange 'relay.events' does not exist" in cursor["last_error"]
        async with audit(broker) as witness:  # declares it
            declared = time.monotonic()
            await witness.wait_for_distinct(3)
            recovered_s = time.monotonic() - declared
        assert (await program.stop())[0] == 0
    assert witness.sequences() == {"order/1": [1, 2, 3]}
    print(f"row 12: published {recovered_s:.2f} s after the exchange was declared")


# --- 41: what was confirmed and is lost all the same


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param({"message-ttl": 1}, id="ttl"),
        pytest.param({"max-length": 2, "overflow": "drop-head"}, id="drop-head"),
    ],
)
async def test_what_the_broker_drops_after_its_confirm_is_missed_and_healed(
    pair: Pair, rabbitmq: RabbitMQ, policy: dict[str, object]
) -> None:
    """Row 41. The service has made its queue itself, so RabbitMQ's own defaults hold: what is dropped is gone, also the last one."""
    vhost = quote(urlsplit(pair.url).path[1:], safe="")
    async with pair.channel() as channel:
        exchange = await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
        declared = await channel.declare_queue("billing", durable=True)
        await declared.bind(exchange, "#")
        marks = await channel.declare_exchange("relay.events.marks", aio_pika.ExchangeType.TOPIC, durable=True)
        await declared.bind(marks, "#")
    pair.with_inbox(rabbitmq__declare_topology=False)
    definition: dict[str, object] = {"pattern": "^billing$", "definition": policy, "apply-to": "queues"}
    await asyncio.to_thread(rabbitmq.management().request, "PUT", f"/api/policies/{vhost}/lossy", definition)
    for n in range(5):
        await pair.emit(f"order/{n}", 2)
    await pair.publish()
    assert await pair.db.fetchval("SELECT published FROM relay.outbox_cursor") == 10, "they were not confirmed"

    async def dropped() -> bool:
        async with pair.channel() as channel:
            left = (await channel.declare_queue("billing", passive=True)).declaration_result.message_count
        return left is not None and left <= 2

    await until(dropped)
    await asyncio.to_thread(rabbitmq.management().request, "DELETE", f"/api/policies/{vhost}/lossy")
    began = time.monotonic()
    async with pair.both():
        for n in range(5):
            await pair.applied(str(n), [1, 2])
        healed_s = time.monotonic() - began
        await pair.no_gap()
    print(f"row 41, {policy}: healed {healed_s:.1f} s after relay and consumer were started")


# --- 42 and 39: those who are too slow for the broker


@pytest.fixture
async def impatient(own_broker: SandboxRabbitMQ) -> AsyncIterator[SandboxRabbitMQ]:
    """A broker that closes the channel of who has not acknowledged for two seconds, instead of thirty minutes."""

    async def tell(timeout_ms: int, tick_ms: int) -> None:
        terms = f"application:set_env(rabbit, consumer_timeout, {timeout_ms}), application:set_env(rabbit, channel_tick_interval, {tick_ms})."
        await asyncio.to_thread(own_broker.ctl, "eval", terms)

    await tell(2000, 500)
    try:
        yield own_broker
    finally:
        await tell(1_800_000, 60_000)


async def test_a_handler_that_is_slower_than_consumer_timeout_has_its_effect_once(
    impatient: SandboxRabbitMQ, pair: Pair
) -> None:
    """Row 42. The broker closes the channel while the handler works; its late acknowledgement goes nowhere, and harms nobody."""
    calls: list[int] = []

    async def slow(event: Event, tx: Connection) -> None:
        calls.append(event.seq or 0)
        await record(event, tx)
        if len(calls) == 1:
            await asyncio.sleep(4)  # the slowness is the fault

    with capture_logs() as logged:
        async with pair.relay(), pair.inbox(slow):
            await pair.emit("order/1", 3)
            await pair.applied("1", [1, 2, 3])
            began = time.monotonic()
            await pair.emit("order/1", 2)
            await pair.applied("1", [1, 2, 3, 4, 5])
            resubscribed_s = time.monotonic() - began
    ended = [line["reason"] for line in logged if line["event"] == "session_failed"]
    assert ended, "inconclusive: the broker was patient"
    assert "delivery acknowledgement on channel" in impatient.log.read_text(errors="replace")
    assert calls.count(1) == 1
    print(f"row 42: {ended}; the next events were applied {resubscribed_s:.2f} s later")


@pytest.mark.soak
async def test_a_handler_that_stops_the_event_loop_for_longer_than_the_heartbeats_has_its_effect_once(
    pair: Pair,
) -> None:
    """Row 39. Nothing at all moves in the consumer, heartbeats included, until the broker has cut it off."""
    stalled: list[float] = []

    async def stall(event: Event, tx: Connection) -> None:
        await record(event, tx)
        if not stalled:
            began = time.monotonic()
            time.sleep(30)  # noqa: ASYNC251 - that is the fault
            stalled.append(time.monotonic() - began)

    pair.with_inbox(rabbitmq__heartbeat_s=5, handler_timeout_s=60)
    async with pair.relay():
        await pair.emit("order/1", 5)
        with capture_logs() as logged:
            async with pair.inbox(stall):
                await pair.applied("1", [1, 2, 3, 4, 5], timeout_s=60)
                began = time.monotonic()
                await pair.emit("order/1")
                await pair.applied("1", [1, 2, 3, 4, 5, 6], timeout_s=30)
                recovered_s = time.monotonic() - began
    assert any(line["event"] == "session_failed" for line in logged), "inconclusive: nobody was cut off"
    print(f"row 39: {stalled[0]:.0f} s without a sign of life; the next event was applied {recovered_s:.2f} s after it")
