"""How it is done without relay: plain asyncpg and aio-pika, as in many a tutorial and many a service. Nothing here is a straw
man's bug: each function does what its name says, and is right as long as nothing happens at the wrong moment.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeAlias

import aio_pika
import asyncpg
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from asyncpg.pool import PoolConnectionProxy

QUEUE = "orders"
TABLES = """
CREATE TABLE orders (id text PRIMARY KEY);  -- the producer's
CREATE TABLE ledger (at bigint GENERATED ALWAYS AS IDENTITY, order_id text, what text, message_id text);  -- the consumer's
CREATE TABLE price (product text PRIMARY KEY, cents bigint);  -- the consumer's
"""

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"
Handle: TypeAlias = Callable[[AbstractIncomingMessage], Awaitable[None]]


# Producers.


async def publish(channel: AbstractChannel, order: str, what: str, message_id: str | None = None) -> None:
    """An event as a persistent message, confirmed by the broker."""
    body = json.dumps({"order": order, "what": what}).encode()
    message = aio_pika.Message(body, message_id=message_id, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
    await channel.default_exchange.publish(message, routing_key=QUEUE)


async def commit_then_publish(
    db: Connection, channel: AbstractChannel, order: str, between: Callable[[], None] = lambda: None
) -> None:
    """Never tells of an order that is not there."""
    async with db.transaction():
        await db.execute("INSERT INTO orders VALUES ($1)", order)
    between()
    await publish(channel, order, "OrderCreated")


async def publish_then_commit(
    db: Connection, channel: AbstractChannel, order: str, between: Callable[[], None] = lambda: None
) -> None:
    """Never forgets to tell of an order."""
    async with db.transaction():
        await db.execute("INSERT INTO orders VALUES ($1)", order)
        await publish(channel, order, "OrderCreated")
        between()


class RetryingPublisher:
    """Loses nothing when the connection does: what failed is kept, and sent again as soon as there is time for it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: AbstractConnection | None = None
        self._channel: AbstractChannel | None = None
        self._failed: list[tuple[str, str]] = []

    async def connect(self) -> AbstractChannel:
        """A channel: the one there is, or a new one on a new connection."""
        if self._channel is None:
            self._connection = await aio_pika.connect(self._url)
            self._channel = await self._connection.channel()
        return self._channel

    async def publish(self, order: str, what: str) -> None:
        """Confirmed, or kept for `publish_failed`."""
        try:
            await publish(await self.connect(), order, what)
        except Exception:  # noqa: BLE001 - of a line that was cut, aiormq says sometimes no more than this
            self._channel = None
            self._failed.append((order, what))

    async def publish_failed(self) -> None:
        """The retry."""
        failed, self._failed = self._failed, []
        for order, what in failed:
            await self.publish(order, what)

    async def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            await self._connection.close()


# Consumers.


@asynccontextmanager
async def channel(url: str) -> AsyncIterator[AbstractChannel]:
    """A channel of a connection of its own, with the queue declared."""
    async with await aio_pika.connect(url) as connection:
        opened = await connection.channel()
        await opened.declare_queue(QUEUE, durable=True)
        yield opened


@asynccontextmanager
async def consumer(url: str, handle: Handle) -> AsyncIterator[None]:
    """One consumer, one message at a time; what is not acknowledged when it ends is delivered to another."""
    async with channel(url) as opened:
        await opened.set_qos(prefetch_count=1)
        await (await opened.get_queue(QUEUE)).consume(handle)
        yield


def order_and_event(message: AbstractIncomingMessage) -> tuple[str, str]:
    """What a message says."""
    content = json.loads(message.body)
    return content["order"], content["what"]


async def apply(db: Pool, message: AbstractIncomingMessage) -> None:
    """The effect."""
    await db.execute(
        "INSERT INTO ledger (order_id, what, message_id) VALUES ($1, $2, $3)",
        *order_and_event(message),
        message.message_id,
    )


async def is_applied(db: Pool, order: str, what: str) -> bool:
    """Whether it was."""
    return bool(await db.fetchval("SELECT EXISTS (SELECT FROM ledger WHERE order_id = $1 AND what = $2)", order, what))


async def is_known(db: Pool, message: AbstractIncomingMessage) -> bool:
    """Whether a message with this id was applied."""
    return bool(await db.fetchval("SELECT EXISTS (SELECT FROM ledger WHERE message_id = $1)", message.message_id))


async def set_price(db: Pool, message: AbstractIncomingMessage) -> None:
    """The newest message wins."""
    product, cents = order_and_event(message)
    await db.execute(
        "INSERT INTO price VALUES ($1, $2) ON CONFLICT (product) DO UPDATE SET cents = excluded.cents",
        product,
        int(cents),
    )


async def settle_or_reject(db: Pool, message: AbstractIncomingMessage, *, requeue: bool) -> None:
    """Applies a payment only if its order is there; if not, the broker gets it back, to deliver it again or to drop it."""
    order, what = order_and_event(message)
    if what == "OrderPaid" and not await is_applied(db, order, "OrderCreated"):
        await message.reject(requeue=requeue)
        return
    await apply(db, message)
    await message.ack()
