"""Inboxes that run in this process and are waited for by their counts, and a broker's queue that is filled by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aio_pika
from aio_pika.abc import AbstractIncomingMessage

from relay.daemon import Outbox
from relay.inbox import Inbox, Stats
from relay.settings import Settings
from tests.harness.audit import Audit, audit
from tests.harness.outbox import until

DEADLINE_S = 30.0


@dataclass
class Consumers:
    """Competing consumers, and what they have committed together."""

    total: Stats = field(default_factory=Stats)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: list[asyncio.Task[Stats]] = field(default_factory=list)

    def committed(self, stats: Stats) -> None:
        """For `on_commit`."""
        self.total += stats
        self._changed.set()

    async def until(self, condition: Callable[[Stats], bool]) -> None:
        """Wait for commits until the counts say so. Raises what ended a consumer."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not condition(self.total):
                    for task in self._tasks:
                        if task.done():
                            task.result()
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"not reached: {self.total}") from None


@asynccontextmanager
async def consuming(inbox: Inbox, settings: Settings, *, count: int = 1) -> AsyncIterator[Consumers]:
    """So many consumers on one queue, subscribed; stopped gracefully at the end, which must not fail."""
    stop = asyncio.Event()
    consumers = Consumers()
    consumers._tasks = [
        asyncio.create_task(inbox.run(settings, stop=stop, on_commit=consumers.committed)) for _ in range(count)
    ]
    for task in consumers._tasks:
        task.add_done_callback(lambda _: consumers._changed.set())
    try:
        await until_subscribed(settings, inbox.name, count)
        yield consumers
    finally:
        stop.set()
        await asyncio.gather(*consumers._tasks, return_exceptions=True)
    for task in consumers._tasks:
        task.result()


async def until_subscribed(settings: Settings, queue: str, count: int = 1) -> None:
    """Wait until so many consumers are on the queue."""

    async def asked() -> bool:
        async with await aio_pika.connect(settings.rabbitmq.url.get_secret_value()) as connection:
            try:
                declared = await (await connection.channel()).declare_queue(queue, passive=True)
            except aio_pika.exceptions.ChannelNotFoundEntity:
                return False
            return declared.declaration_result.consumer_count == count

    await until(asked)


class ByHand:
    """Stands between relay and the consumer's queue, and delivers what relay published as the test wants it."""

    def __init__(self, witness: Audit, queue: str) -> None:
        self._witness = witness
        self._queue = queue

    async def published(self, settings: Settings, count: int) -> Sequence[AbstractIncomingMessage]:
        """Let relay publish all that is committed, and have it: so many messages, in its order."""
        await Outbox(settings).run(drain=True)
        return await self._witness.wait_for(count)

    async def deliver(self, *messages: AbstractIncomingMessage) -> None:
        """Put them into the consumer's queue, in this order; a message may be given twice."""
        for message in messages:
            await self._witness.channel.default_exchange.publish(message, routing_key=self._queue)


@asynccontextmanager
async def by_hand(broker: str, queue: str) -> AsyncIterator[ByHand]:
    """For a consumer whose queue nothing else fills: give it `UNBOUND` as its inbox.bindings."""
    async with audit(broker) as witness:
        yield ByHand(witness, queue)


UNBOUND = ("only.by.hand",)
"""A binding that no event matches."""
