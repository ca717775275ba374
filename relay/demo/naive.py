"""The naive consumer: what textbooks show. Apply each delivery, commit, acknowledge; two of them, for speed.

It loses nothing that is delivered to it, and it trusts the broker with the rest: that a message comes once, and in order.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field

from aio_pika.abc import AbstractIncomingMessage

from relay.demo.billing import book
from relay.demo.broker import reconnecting
from relay.postgres.connect import connection
from relay.rabbitmq.session import Session
from relay.settings import PostgresSettings, RabbitmqSettings

INSTANCES = 2
PREFETCH = 20


@dataclass(slots=True)
class Naive:
    """Competing consumers of one queue that book into one database."""

    queue: str
    postgres: PostgresSettings
    rabbitmq: RabbitmqSettings
    deliveries: int = 0
    repeated: int = 0  # deliveries of an event that had been delivered before
    overtaken: int = 0  # first deliveries of an event after a later one of its order
    _seen: set[str] = field(default_factory=set)
    _highest: dict[int, int] = field(default_factory=dict)

    async def run(self) -> None:
        """All instances. Ends by cancellation."""
        async with asyncio.TaskGroup() as group:
            for number in range(INSTANCES):
                group.create_task(reconnecting(self.rabbitmq, f"demo {self.queue} {number}", self._consume))

    async def _consume(self, session: Session) -> None:
        channel = await session.channel(publisher_confirms=False)
        await channel.set_qos(prefetch_count=PREFETCH)
        queue = await channel.get_queue(self.queue, ensure=False)
        incoming: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
        async with connection(self.postgres, application=f"demo {self.queue}") as tx:
            await queue.consume(incoming.put)
            while True:
                message = await incoming.get()
                order = json.loads(message.body)
                self._count(order["token"], order["order"], order["step"])
                async with tx.transaction():
                    await book(message.type or "", order, tx)
                await message.ack()

    def _count(self, token: str, order: int, step: int) -> None:
        self.deliveries += 1
        if token in self._seen:
            self.repeated += 1
            return
        self._seen.add(token)
        highest = self._highest.get(order, 0)
        self.overtaken += step < highest
        self._highest[order] = max(highest, step)
