"""An independent witness: a queue bound to the same exchange, read with plain aio-pika."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractExchange, AbstractIncomingMessage, AbstractQueue

EXCHANGE = "relay.events"


class Audit:
    """What the broker really accepted, in its order."""

    def __init__(self, channel: AbstractChannel, exchange: AbstractExchange, queue: AbstractQueue) -> None:
        self.channel = channel
        self.exchange = exchange
        self.queue = queue
        self.messages: list[AbstractIncomingMessage] = []
        self._ids: set[str | None] = set()  # theirs: to make it anew for each message is quadratic
        self._more = asyncio.Condition()

    async def _take(self, message: AbstractIncomingMessage) -> None:
        async with self._more:
            self.messages.append(message)
            self._ids.add(message.message_id)
            self._more.notify_all()

    async def wait_for(self, count: int, *, timeout_s: float = 30) -> list[AbstractIncomingMessage]:
        """The first `count` messages, waiting for them."""
        async with asyncio.timeout(timeout_s), self._more:
            await self._more.wait_for(lambda: len(self.messages) >= count)
        return self.messages[:count]

    async def wait_for_distinct(self, count: int, *, timeout_s: float = 60) -> None:
        """Wait until `count` different messages have arrived."""
        async with asyncio.timeout(timeout_s), self._more:
            await self._more.wait_for(lambda: len(self._ids) >= count)

    def sequences(self, *, first_only: bool = True) -> dict[str, list[int]]:
        """Sequence numbers by aggregate, in the order of arrival; repeated messages left out if `first_only`."""
        seen: set[str | None] = set()
        found: dict[str, list[int]] = defaultdict(list)
        for message in self.messages:
            if (first_only and message.message_id in seen) or "x-sequence" not in message.headers:
                continue
            seen.add(message.message_id)
            sequence = message.headers["x-sequence"]
            assert isinstance(sequence, int)
            kind, name = str(message.headers["x-aggregate-type"]), str(message.headers["x-aggregate-id"])
            found[f"{kind}/{name}"].append(sequence)
        return dict(found)


@asynccontextmanager
async def audit(url: str, *bindings: str, queue: str = "audit") -> AsyncIterator[Audit]:
    """A bound durable queue and everything that arrives in it. Without bindings: everything."""
    connection = await aio_pika.connect(url)
    try:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=5000)
        exchange = await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
        declared = await channel.declare_queue(queue, durable=True)
        for binding in bindings or ("#",):
            await declared.bind(exchange, binding)
        witness = Audit(channel, exchange, declared)
        await declared.consume(witness._take, no_ack=True)
        yield witness
    finally:
        await connection.close()
