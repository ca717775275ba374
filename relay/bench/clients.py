"""Where the benchmark opens a publisher or a consumer: the one that the daemons would, by the same setting."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from relay.rabbitmq.contract import Consumer, Publisher
from relay.rabbitmq.lanes import open_consumer, open_publisher
from relay.rabbitmq.queues import InboxQueue
from relay.settings import Settings

_NAME = "relay bench"


@asynccontextmanager
async def publishing(settings: Settings) -> AsyncIterator[Publisher]:
    """A publisher to the exchange of the settings."""
    publisher = await open_publisher(settings.rabbitmq, confirm_timeout_s=settings.outbox.confirm_timeout_s, name=_NAME)
    try:
        yield publisher
    finally:
        await publisher.close()


@asynccontextmanager
async def consuming(settings: Settings) -> AsyncIterator[Consumer]:
    """A consumer of the inbox's queue, with the inbox's prefetch."""
    consumer = await open_consumer(
        settings.rabbitmq, inbox_queue(settings), prefetch=settings.inbox.prefetch, name=_NAME
    )
    try:
        yield consumer
    finally:
        await consumer.close()


def inbox_queue(settings: Settings) -> InboxQueue:
    """The queue of the benchmark's inbox."""
    inbox = settings.inbox
    return InboxQueue(name=inbox.queue or "bench", bindings=inbox.bindings, delivery_limit=inbox.delivery_limit)
