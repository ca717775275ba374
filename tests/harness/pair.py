"""A producer and a consumer in two databases, and a queue between them from which messages can be lost on purpose."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aio_pika
import aio_pika.exceptions
import pytest
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue

from relay.daemon import Outbox
from relay.inbox import Event, Inbox
from relay.message import Row, to_message
from relay.outbox.marks import Pace
from relay.rabbitmq.queues import InboxQueue, ensure_queue
from relay.rabbitmq.session import close, connect
from relay.settings import Settings
from tests.harness.outbox import connected, insert, settings_for, until

QUICK = Pace(interval_s=0.1, sweep_s=0.3)
"""Marks often enough that no test waits for them."""

RARE = Pace(interval_s=3600, sweep_s=3600)


@pytest.fixture
async def pair(database: str, consumer_database: str, broker: str) -> AsyncIterator[Pair]:
    """Both sides; the consumer `billing` records what it applies. Gaps are noticed after 0.3 s."""
    async with connected(database) as db, connected(consumer_database) as consumer_db:
        await consumer_db.execute(
            "CREATE TABLE effect (id bigint GENERATED ALWAYS AS IDENTITY, aggregate text, seq bigint, event_type text)"
        )
        yield Pair(
            producer=settings_for(database, broker),
            consumer=settings_for(consumer_database, broker, inbox__gap_alert_after_s=0.3, inbox__retry_first_s=0.1),
            url=broker,
            db=db,
            consumer_db=consumer_db,
        )


@dataclass
class Pair:
    """One producer (source `shop`) and one consumer (`billing`)."""

    producer: Settings
    consumer: Settings
    url: str
    db: Any
    consumer_db: Any

    def with_inbox(self, **values: Any) -> None:
        """Other settings of the inbox, and of its broker (`rabbitmq__...`)."""
        broker = {name.removeprefix("rabbitmq__"): values.pop(name) for name in list(values) if "__" in name}
        self.consumer = self.consumer.model_copy(
            update={
                "inbox": self.consumer.inbox.model_copy(update=values),
                "rabbitmq": self.consumer.rabbitmq.model_copy(update=broker),
            }
        )

    async def emit(self, aggregate: str, count: int = 1, **more: Any) -> None:
        """Events of one aggregate (`order/1`)."""
        await insert(self.db, aggregate, count=count, **more)

    async def declare(self, *, marks: bool = True) -> None:
        """The queue, as the inbox would declare it; without marks it is not bound to them, and the inbox will not do it."""
        session = await connect(self.consumer.rabbitmq, name="test")
        try:
            await ensure_queue(
                session,
                self.consumer.rabbitmq,
                InboxQueue(name="billing", bindings=("#",), delivery_limit=self.consumer.inbox.delivery_limit),
            )
            if not marks:
                channel = await session.channel()
                await (await channel.get_underlay_channel()).queue_unbind("billing", "relay.events.marks", "#")
                self.with_inbox(rabbitmq__declare_topology=False)
        finally:
            await close(session)

    async def publish(self) -> None:
        """Everything committed goes to the broker, without any mark."""
        async with asyncio.timeout(30):
            await Outbox(self.producer).run(drain=True)

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[AbstractChannel]:
        connection = await aio_pika.connect(self.url)
        async with connection:
            yield await connection.channel()

    async def lose(self, *numbers: tuple[str, int]) -> None:
        """Drop these messages (aggregate id, number) from the queue; all others stay."""
        lost = 0
        async with self.channel() as channel:
            messages = await taken(await channel.get_queue("billing"))
            for message in messages:
                headers = message.headers
                if (headers.get("x-aggregate-id"), headers.get("x-sequence")) in numbers:
                    await message.ack()
                    lost += 1
                else:
                    await message.nack(requeue=True)
        assert lost == len(numbers), f"{lost} of {numbers} were in the queue"

    async def purge(self) -> int:
        """Empty the queue; returns how many messages are gone."""
        async with self.channel() as channel:
            answer = await (await channel.get_queue("billing")).purge()
        assert answer.message_count is not None
        return answer.message_count

    async def send(self, body: bytes, *, exchange: str = "", key: str = "billing", **properties: Any) -> None:
        """Any message to any place."""
        async with self.channel() as channel:
            target = await channel.get_exchange(exchange, ensure=False) if exchange else channel.default_exchange
            await target.publish(aio_pika.Message(body, **properties), key)

    async def send_row(self, row: Row) -> None:
        """A row's message, straight to the queue."""
        m = to_message(row, source="shop", routing_key="billing")
        await self.send(
            m.body,
            message_id=m.message_id,
            type=m.event_type,
            app_id=m.source,
            content_type=m.content_type,
            headers=dict(m.headers),
        )

    @asynccontextmanager
    async def relay(self, pace: Pace = QUICK) -> AsyncIterator[Outbox]:
        """The relay, running."""
        outbox = Outbox(self.producer, marks_pace=pace)
        task = asyncio.create_task(outbox.run())
        try:
            yield outbox
        finally:
            outbox.stop.set()
            async with asyncio.timeout(60):
                await task

    @asynccontextmanager
    async def inbox(
        self, handler: Callable[[Event, Any], Awaitable[None]] | None = None, consumers: int = 1
    ) -> AsyncIterator[None]:
        """The consumer, running; with several, they compete."""
        inbox = Inbox("billing")
        inbox.on("Changed", "Paid")(handler or record)
        stop = asyncio.Event()
        tasks = [asyncio.create_task(inbox.run(self.consumer, stop=stop)) for _ in range(consumers)]
        try:
            yield
        finally:
            stop.set()
            async with asyncio.timeout(60):
                await asyncio.gather(*tasks)

    @asynccontextmanager
    async def both(self, pace: Pace = QUICK) -> AsyncIterator[None]:
        """Relay and consumer, running; whatever the consumer asks for is heard, if this relay may be asked at all."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.relay(pace))
            if self.producer.outbox.repair and self.producer.rabbitmq.declare_topology:
                await self.listening()
            await stack.enter_async_context(self.inbox())
            yield

    async def listening(self) -> None:
        """Wait until the relay takes requests, so that their queue is bound as well: before that, a request goes nowhere."""
        connection = await aio_pika.connect(self.url)
        async with connection:

            async def look() -> bool:
                channel = await connection.channel()
                try:
                    queue = await channel.get_queue("relay.repair.shop")
                except aio_pika.exceptions.ChannelClosed:  # there is none, and such a question costs its channel
                    return False
                await channel.close()
                return bool(queue.declaration_result.consumer_count)

            await until(look)

    async def effects(self, aggregate: str) -> list[int]:
        rows = await self.consumer_db.fetch("SELECT seq FROM effect WHERE aggregate = $1 ORDER BY id", aggregate)
        return [r["seq"] for r in rows]

    async def applied(self, aggregate: str, numbers: Sequence[int], *, timeout_s: float = 20) -> None:
        """Wait until exactly these were applied, in this order."""
        await self.effects_of(aggregate, len(numbers), timeout_s=timeout_s)
        assert await self.effects(aggregate) == list(numbers)

    async def effects_of(self, aggregate: str, count: int, *, timeout_s: float = 20) -> None:
        """Wait until so many were applied."""
        try:
            await until(self._has(aggregate, count), timeout_s=timeout_s)
        except TimeoutError:
            raise AssertionError(f"{aggregate}: {await self.effects(aggregate)}, gaps {await self.gaps()}") from None

    def _has(self, aggregate: str, count: int) -> Callable[[], Awaitable[bool]]:
        async def enough() -> bool:
            return len(await self.effects(aggregate)) >= count

        return enough

    async def gaps(self) -> list[dict[str, Any]]:
        return [dict(r) for r in await self.consumer_db.fetch("SELECT * FROM relay.inbox_gap ORDER BY aggregate_id")]

    async def gap(self, condition: str, *, timeout_s: float = 20) -> dict[str, Any]:
        """Wait for a gap of which this is true (SQL)."""

        async def found() -> Any:
            return await self.consumer_db.fetchrow(f"SELECT * FROM relay.inbox_gap WHERE {condition}")

        try:
            return dict(await until(found, timeout_s=timeout_s))
        except TimeoutError:
            raise AssertionError(f"no gap with {condition}: {await self.gaps()}") from None

    async def missed(self, *early: tuple[str, int]) -> None:
        """Wait until these (aggregate id, number) are all that is held as early, and let the consumer miss their predecessors now.

        So a test need not lower `gap_alert_after_s`, which is also the time until it is asked again.
        """

        async def held() -> bool:
            return await self.held() == [(aggregate, seq, "early") for aggregate, seq in early]

        await until(held)
        await self.consumer_db.execute(
            "WITH old AS (UPDATE relay.inbox_held SET held_at = held_at - interval '1 day' RETURNING consumer) "
            "SELECT pg_notify('relay_inbox_operate', old.consumer) FROM old"
        )

    async def no_gap(self) -> None:
        """Wait until nothing is missing."""

        async def none() -> Any:
            return not await self.gaps()

        try:
            await until(none, timeout_s=20)
        except TimeoutError:
            raise AssertionError(f"still missing: {await self.gaps()}") from None

    async def held(self) -> list[tuple[str, int, str]]:
        rows = await self.consumer_db.fetch(
            "SELECT aggregate_id, seq, reason FROM relay.inbox_held ORDER BY aggregate_id, seq"
        )
        return [tuple(r.values()) for r in rows]


async def record(event: Event, tx: Any) -> None:
    """The effect of an event: a row."""
    await tx.execute(
        "INSERT INTO effect (aggregate, seq, event_type) VALUES ($1, $2, $3)",
        event.aggregate_id,
        event.seq,
        event.event_type,
    )


async def taken(queue: AbstractQueue) -> list[AbstractIncomingMessage]:
    """All that is in a queue, not acknowledged."""
    messages = []
    while (message := await queue.get(fail=False)) is not None:
        messages.append(message)
    return messages
