"""What every implementation of relay.rabbitmq.contract.Consumer keeps to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiormq
import pytest
from pydantic import SecretStr

from relay.errors import BrokerError, BrokerRefused
from relay.message import Delivery
from relay.rabbitmq.contract import Consumer
from relay.rabbitmq.fast_consumer import FastConsumer
from relay.rabbitmq.queues import InboxQueue
from relay.rabbitmq.stock_consumer import StockConsumer
from relay.settings import RabbitmqSettings

QUEUE = InboxQueue(name="contract", bindings=("order.#",), delivery_limit=50)
DEADLINE_S = 20

Open = Callable[..., Awaitable[Consumer]]


IMPLEMENTATIONS: dict[str, type[StockConsumer | FastConsumer]] = {"stock": StockConsumer, "fast": FastConsumer}


@pytest.fixture(params=IMPLEMENTATIONS)
def open_consumer(request: pytest.FixtureRequest) -> Open:
    implementation = IMPLEMENTATIONS[request.param]

    def opening(
        url: str, *, prefetch: int = 100, queue: InboxQueue = QUEUE, declare: bool = True
    ) -> Awaitable[Consumer]:
        settings = RabbitmqSettings(url=SecretStr(url), declare_topology=declare)
        return implementation.open(settings, queue, prefetch=prefetch, name="contract test")

    return opening


@asynccontextmanager
async def closing(opening: Awaitable[Consumer]) -> AsyncIterator[Consumer]:
    consumer = await opening
    try:
        yield consumer
    finally:
        await consumer.close()


@asynccontextmanager
async def channel_to(url: str) -> AsyncIterator[aiormq.abc.AbstractChannel]:
    connection = await aiormq.connect(url)
    try:
        yield await connection.channel(publisher_confirms=True)
    finally:
        await connection.close()


async def publish(url: str, *bodies: bytes) -> None:
    async with channel_to(url) as channel:
        for body in bodies:
            await channel.basic_publish(body, exchange="relay.events", routing_key="order.X", mandatory=True)


async def received(consumer: Consumer, n: int, limit: int = 100) -> list[Delivery]:
    found: list[Delivery] = []
    async with asyncio.timeout(DEADLINE_S):
        while len(found) < n:
            batch = await consumer.receive(limit)
            assert 1 <= len(batch) <= limit
            found += batch
    return found


def numbered(n: int) -> list[bytes]:
    return [str(i).encode() for i in range(n)]


async def depth(url: str, queue: str) -> int:
    async with channel_to(url) as channel:
        answer = await channel.queue_declare(queue, passive=True)
        assert answer.message_count is not None
        return answer.message_count


async def test_deliveries_come_in_the_broker_s_order_and_at_most_limit_at_a_time(
    broker: str, open_consumer: Open
) -> None:
    async with closing(open_consumer(broker)) as consumer:
        await publish(broker, *numbered(50))
        found = await received(consumer, 50, limit=7)
        assert [d.body for d in found] == numbered(50)
        assert [d.tag for d in found] == sorted(d.tag for d in found)
        assert {d.exchange for d in found} == {"relay.events"}
        assert not any(d.redelivered for d in found)


async def test_what_is_taken_without_waiting_is_next_in_the_same_sequence(broker: str, open_consumer: Open) -> None:
    async with closing(open_consumer(broker)) as consumer:
        assert consumer.next_ready() is None
        await publish(broker, *numbered(50))
        found = await received(consumer, 1, limit=1)
        while len(found) < 50:
            one = consumer.next_ready()
            found += [one] if one is not None else await consumer.receive(1)
            found += await consumer.receive(3) if len(found) % 7 == 0 else []
        assert [d.body for d in found] == numbered(50)
        assert [d.tag for d in found] == sorted(d.tag for d in found)
        assert consumer.next_ready() is None
        await consumer.acknowledge(found[-2].tag)
    assert await depth(broker, QUEUE.name) == 1


async def test_no_more_than_the_prefetch_is_delivered_without_an_acknowledgement(
    broker: str, open_consumer: Open
) -> None:
    async with closing(open_consumer(broker, prefetch=10)) as consumer:
        await publish(broker, *numbered(30))
        first = await received(consumer, 10)
        assert len(first) == 10
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await consumer.receive(100)
        await consumer.acknowledge(first[-1].tag)
        assert [d.body for d in await received(consumer, 10)] == numbered(20)[10:]


async def test_an_acknowledgement_covers_all_up_to_its_tag_and_the_rest_is_delivered_again(
    broker: str, open_consumer: Open
) -> None:
    async with closing(open_consumer(broker)) as consumer:
        await publish(broker, *numbered(10))
        found = await received(consumer, 10)
        await consumer.acknowledge(found[5].tag)
    async with closing(open_consumer(broker)) as consumer:
        again = await received(consumer, 4)
        assert [d.body for d in again] == numbered(10)[6:]
        assert all(d.redelivered for d in again)


async def test_cancelling_receive_loses_nothing(broker: str, open_consumer: Open) -> None:
    async with closing(open_consumer(broker)) as consumer:
        for _ in range(20):
            waiting = asyncio.create_task(consumer.receive(100))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await publish(broker, *numbered(5))
        assert [d.body for d in await received(consumer, 5)] == numbered(5)


async def test_a_deleted_queue_ends_the_session_with_a_broker_error(broker: str, open_consumer: Open) -> None:
    async with closing(open_consumer(broker)) as consumer:
        waiting = asyncio.create_task(consumer.receive(1))
        async with channel_to(broker) as channel:
            await channel.queue_delete(QUEUE.name)
        with pytest.raises(BrokerError):
            async with asyncio.timeout(DEADLINE_S):
                await waiting
        with pytest.raises(BrokerError):
            await consumer.acknowledge(1)


async def test_an_impossible_acknowledgement_ends_the_session_with_a_broker_error(
    broker: str, open_consumer: Open
) -> None:
    async with closing(open_consumer(broker)) as consumer:
        await consumer.acknowledge(4711)
        with pytest.raises(BrokerError):
            async with asyncio.timeout(DEADLINE_S):
                await consumer.receive(1)


async def test_closing_ends_a_waiting_receive_and_is_safe_twice(broker: str, open_consumer: Open) -> None:
    consumer = await open_consumer(broker)
    waiting = asyncio.create_task(consumer.receive(1))
    await asyncio.sleep(0)
    await consumer.close()
    await consumer.close()
    with pytest.raises(BrokerError):
        await waiting


async def test_a_queue_with_other_arguments_is_refused_with_advice(broker: str, open_consumer: Open) -> None:
    async with channel_to(broker) as channel:
        await channel.queue_declare(QUEUE.name, durable=True)
    with pytest.raises(BrokerRefused, match="exists with other arguments: when it is empty delete it"):
        await open_consumer(broker)


async def test_with_declare_topology_off_the_queue_is_only_looked_for(broker: str, open_consumer: Open) -> None:
    with pytest.raises(BrokerRefused, match=r"does not exist: create it, or set rabbitmq\.declare_topology"):
        await open_consumer(broker, declare=False)
    async with channel_to(broker) as channel:
        await channel.queue_declare(QUEUE.name, durable=True)
    async with closing(open_consumer(broker, declare=False)):
        pass


async def test_a_message_that_is_returned_too_often_is_kept_in_the_dead_letter_queue(
    broker: str, open_consumer: Open
) -> None:
    queue = InboxQueue(name="limited", bindings=("order.#",), delivery_limit=2)
    async with closing(open_consumer(broker, queue=queue)):
        pass
    await publish(broker, b"killer")
    for _ in range(3):
        async with closing(open_consumer(broker, queue=queue)) as consumer:
            await received(consumer, 1)
    async with asyncio.timeout(DEADLINE_S):
        while await depth(broker, queue.dead) != 1:  # noqa: ASYNC110 - the broker announces nothing
            await asyncio.sleep(0.05)
