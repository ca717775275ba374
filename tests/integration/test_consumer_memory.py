"""What a fast consumer holds is bounded in bytes: it stops reading its socket, and loses neither a message nor the connection by that.

The stock one is bounded by its prefetch alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiormq
import pytest
from pydantic import SecretStr

from relay.errors import BrokerError
from relay.inbox import Event, Inbox
from relay.message import Delivery
from relay.postgres.connect import Connection
from relay.rabbitmq import fast_consumer
from relay.rabbitmq.backpressure import Backpressure
from relay.rabbitmq.fast_consumer import FastConsumer
from relay.rabbitmq.queues import InboxQueue
from relay.settings import RabbitmqSettings
from tests.harness.loop_clock import loop_clock
from tests.harness.stub_broker import stub_broker
from tests.integration.inbox_harness import record, stream, world

QUEUE = InboxQueue(name="heavy", bindings=("order.#",), delivery_limit=50)
DEADLINE_S = 20
MIB = 2**20


class Watched(Backpressure):
    """Remembers the most that was held, by any that was made."""

    most = 0
    made: list[Watched]

    def __init__(self, pause: Callable[[], object], resume: Callable[[], object], *, bound: int) -> None:
        super().__init__(pause, resume, bound=bound)
        type(self).made.append(self)

    def hold(self, size: int, largest: int) -> None:
        super().hold(size, largest)
        self.most = max(self.most, self.held)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    Watched.made = []
    monkeypatch.setattr(fast_consumer, "Backpressure", Watched)
    return Watched.made


def bound(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(fast_consumer, "HELD_BYTES", size)


async def open_consumer(url: str, *, prefetch: int = 1000, heartbeat_s: int = 10) -> FastConsumer:
    settings = RabbitmqSettings(url=SecretStr(url), heartbeat_s=heartbeat_s)
    return await FastConsumer.open(settings, QUEUE, prefetch=prefetch, name="memory test")


async def publish(url: str, *bodies: bytes) -> None:
    connection = await aiormq.connect(url)
    try:
        channel = await connection.channel()
        for body in bodies:
            await channel.basic_publish(body, exchange="relay.events", routing_key="order.X")
    finally:
        await connection.close()


def bodies(n: int, size: int) -> list[bytes]:
    return [number.to_bytes(4) * (size // 4) for number in range(n)]


async def until(question: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not question():  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0.005)


async def received(consumer: FastConsumer, n: int) -> list[Delivery]:
    """So many, each acknowledged as soon as it is there."""
    found: list[Delivery] = []
    async with asyncio.timeout(DEADLINE_S):
        while len(found) < n:
            found += await consumer.receive(10)
            await consumer.acknowledge(found[-1].tag)
    return found


async def test_with_a_slow_handler_large_messages_wait_at_the_broker_and_each_is_applied_once(
    database: str, broker: str, monkeypatch: pytest.MonkeyPatch, watched: list[Watched]
) -> None:
    """64 MiB wait, prefetch and batch would let them all in; 8 MiB are held, and the message or two that were on their way."""
    bound(monkeypatch, 8 * MIB)
    inbox = Inbox("shop")

    @inbox.on("T")
    async def slow(event: Event, tx: Connection) -> None:
        if event.seq == 1:
            await until(lambda: watched[-1].is_holding_back)
        await record(event, tx)

    async with world(database, broker, batch=500, prefetch=1000) as w, w.running(inbox):
        await w.publish(stream("1", 64, body=bytes(MIB)))
        await w.until(lambda total: total.applied == 64)
        assert await w.effects() == list(range(1, 65))
        (held,) = watched
        assert held.times >= 1
        assert 8 * MIB < held.most < 11 * MIB
    assert await w.queue_is_empty()


async def test_a_connection_that_is_held_back_for_long_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a heartbeat of 5 s aiormq gives up on a connection that brings nothing for 18 s."""
    bound(monkeypatch, MIB)
    async with stub_broker() as broker:
        consumer = await FastConsumer.open(broker.settings(heartbeat_s=5), QUEUE, prefetch=1000, name="memory test")
        for tag in range(1, 513):
            broker.last.deliver(tag, bytes(64 * 1024))
        await until(lambda: consumer.backpressure.is_holding_back)
        with loop_clock() as clock:
            await clock.forward(60)
        assert consumer._lost is None
        assert consumer.backpressure.times == 1
        assert consumer.backpressure.held < 16 * MIB + 256 * 4096  # 1, a piece, and 61 times a twentieth of 4
        assert len(await received(consumer, 512)) == 512
        assert (consumer.backpressure.held, consumer.backpressure.is_holding_back) == (0, False)
        await consumer.close()


@pytest.mark.soak
async def test_a_real_broker_keeps_a_connection_that_is_held_back_for_long(
    broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same in real time. RabbitMQ ends a connection that takes nothing for 30 s (its send time-out), and counts a delivery."""
    bound(monkeypatch, MIB)
    consumer = await open_consumer(broker, heartbeat_s=5)
    await publish(broker, *bodies(64, MIB))
    await until(lambda: consumer.backpressure.is_holding_back)
    await asyncio.sleep(75)
    assert consumer.backpressure.is_holding_back
    assert consumer.backpressure.held < 26 * MIB  # 1, two messages, and 75 times a twentieth of 2 and 4
    found = await received(consumer, 64)
    assert [delivery.body for delivery in found] == bodies(64, MIB)
    assert not any(delivery.redelivered for delivery in found)
    await consumer.close()


async def test_stopping_while_held_back_is_prompt_and_loses_nothing(
    broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to the goodbye is behind what was not read."""
    bound(monkeypatch, MIB)
    sent = bodies(24, MIB // 2)
    consumer = await open_consumer(broker)
    await publish(broker, *sent)
    await until(lambda: consumer.backpressure.is_holding_back)
    first = await consumer.receive(1)
    await consumer.acknowledge(first[-1].tag)
    await until(lambda: consumer.backpressure.is_holding_back)
    async with asyncio.timeout(2):
        await consumer.close()
    with pytest.raises(BrokerError):
        await consumer.receive(1)
    again = await open_consumer(broker)
    assert [delivery.body for delivery in await received(again, 23)] == sent[1:]
    await again.close()


async def test_that_the_queue_is_gone_is_noticed_when_what_was_held_back_is_read(
    broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound(monkeypatch, MIB)
    consumer = await open_consumer(broker)
    await publish(broker, *bodies(16, MIB // 2))
    await until(lambda: consumer.backpressure.is_holding_back)
    connection = await aiormq.connect(broker)
    await (await connection.channel()).queue_delete(QUEUE.name)
    await connection.close()
    with pytest.raises(BrokerError, match="cancelled the consumer"):
        await received(consumer, 1000)
    await consumer.close()
