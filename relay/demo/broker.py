"""The demo's own connections to RabbitMQ: plain, and begun anew whenever the broker went away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aio_pika import ExchangeType
from aio_pika.abc import AbstractChannel, AbstractQueue

from relay.errors import BrokerError
from relay.rabbitmq.session import Session, broker_errors, close, connect
from relay.settings import RabbitmqSettings

EVENTS = "relay.events"
"""What relay publishes to."""

DIRECT = "shop.direct"
"""What the shop itself publishes to, for the comparison: the dual write, without an outbox."""

RETRY_S = 0.25

Work = Callable[[Session], Awaitable[None]]


async def reconnecting(settings: RabbitmqSettings, name: str, work: Work) -> None:
    """Run `work` on a connection, and again on a new one whenever it or the connection ends. Ends by cancellation."""
    while True:
        with contextlib.suppress(BrokerError):
            async with session(settings, name) as opened:
                await _until_lost(opened, work)
        await asyncio.sleep(RETRY_S)


@asynccontextmanager
async def session(settings: RabbitmqSettings, name: str) -> AsyncIterator[Session]:
    """One connection, closed at the end. Raises BrokerError for whatever goes wrong on it."""
    opened = await connect(settings, name=name)
    try:
        with broker_errors(name):
            yield opened
    finally:
        await close(opened)


async def declare_exchanges(channel: AbstractChannel) -> None:
    """Both exchanges."""
    for name in (EVENTS, DIRECT):
        await channel.declare_exchange(name, ExchangeType.TOPIC, durable=True)


async def declare_queue(channel: AbstractChannel, name: str, *exchanges: str) -> AbstractQueue:
    """A quorum queue that gets every message of the exchanges."""
    queue = await channel.declare_queue(name, durable=True, arguments={"x-queue-type": "quorum"})
    for exchange in exchanges:
        await queue.bind(exchange, "#")
    return queue


async def _until_lost(opened: Session, work: Work) -> None:
    task = asyncio.ensure_future(work(opened))
    try:
        await asyncio.wait([task, opened.closing], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
