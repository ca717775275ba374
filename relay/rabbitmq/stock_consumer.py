"""The consumer seam on stock aiormq: deliveries are buffered here as they come, bounded by the prefetch.

aiormq's DeliveredMessage is taken from the underlay channel: aio-pika's IncomingMessage raises for a delivery mode it does
not know, in a task where nobody sees it, and the message would occupy a prefetch slot for ever (RELIABILITY 3-H).
"""

from __future__ import annotations

import asyncio
from collections import deque
from datetime import UTC, datetime
from typing import Any

from aiormq.abc import AbstractChannel, DeliveredMessage

from relay.errors import BrokerError, BrokerUnavailable
from relay.message import Delivery
from relay.rabbitmq.queues import Queue, ensure_queue
from relay.rabbitmq.session import CLOSE_TIMEOUT_S, Session, broker_errors, close, connect, translated, unreadable
from relay.settings import RabbitmqSettings

ACK_TIMEOUT_S = 10.0
"""Longest wait for room in aiormq's write queue; a broker that takes nothing for so long has ended the session."""

BATCH_BYTES = 64 * 1024 * 1024
"""Most bytes of bodies that `receive` hands out at once (the first message always fits): RabbitMQ bounds what is on its way
by count only, and a batch is copied several times on its way into a transaction."""


class StockConsumer:
    """Implements `relay.rabbitmq.contract.Consumer`. One channel on a connection of its own."""

    def __init__(self, session: Session, channel: AbstractChannel) -> None:
        self._session = session
        self._channel = channel
        self._buffer: deque[Delivery] = deque()
        self._changed = asyncio.Event()
        self._lost: BrokerError | None = None
        self._watched = (session.closing, channel.closing)
        for closing in self._watched:
            closing.add_done_callback(self._on_closing)
        channel.on_consumer_cancel_callbacks.add(self._on_cancelled)

    @classmethod
    async def open(cls, settings: RabbitmqSettings, queue: Queue, *, prefetch: int, name: str) -> StockConsumer:
        """Connect, see to the queue, subscribe with the prefetch. Raises BrokerRefused or BrokerUnavailable."""
        session = await connect(settings, name=name)
        try:
            await ensure_queue(session, settings, queue)
            with broker_errors(f"consuming from the queue {queue.name!r}"):
                async with asyncio.timeout(settings.connect_timeout_s):
                    channel = await (await session.channel(publisher_confirms=False)).get_underlay_channel()
                    consumer = cls(session, channel)
                    await channel.basic_qos(prefetch_count=prefetch)
                    await channel.basic_consume(queue.name, consumer._on_message)
        except BaseException:
            await close(session)
            raise
        return consumer

    async def receive(self, limit: int) -> list[Delivery]:
        """See the contract."""
        while self._lost is None and not self._buffer:
            self._changed.clear()
            await self._changed.wait()
        if self._lost is not None:
            raise self._lost
        return _taken(self._buffer, limit)

    async def acknowledge(self, tag: int) -> None:
        """See the contract. Written in the background: an ack that gets lost means a redelivery, which is harmless."""
        if self._lost is not None:
            raise self._lost
        with broker_errors("acknowledging"):
            async with asyncio.timeout(ACK_TIMEOUT_S):
                await self._channel.basic_ack(tag, multiple=True, wait=False)

    async def close(self) -> None:
        """See the contract."""
        alive = self._lost is None
        self._end(BrokerUnavailable("the consumer was closed"))
        if alive:
            await self._flush()
        await close(self._session)
        for closing in self._watched:
            closing.cancel()

    async def _flush(self) -> None:
        """Close the channel by its handshake: closing the connection at once would throw away acks not written yet."""
        try:
            with broker_errors("closing"):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._channel.close()
        except BrokerError:
            return  # the unwritten acks are lost, and their messages delivered again

    async def _on_message(self, message: DeliveredMessage) -> None:
        """For each delivery aiormq starts a task, in order; without an await in it they also run in order."""
        self._buffer.append(_delivery(message))
        self._changed.set()

    def _on_cancelled(self, _: object) -> None:
        self._end(BrokerUnavailable("RabbitMQ cancelled the consumer: the queue was deleted or its leader is gone"))

    def _on_closing(self, closing: asyncio.Future[Any]) -> None:
        """A heartbeat that died arrives as CancelledError, either as the future's state or as its exception."""
        cause = None if closing.cancelled() else closing.exception()
        error = None if cause is None else unreadable(cause) or translated(cause, "consuming")
        self._end(error or BrokerUnavailable("consuming: the connection to RabbitMQ has ended"))

    def _end(self, error: BrokerError) -> None:
        if self._lost is None:
            self._lost = error
        self._changed.set()


def _taken(buffer: deque[Delivery], limit: int) -> list[Delivery]:
    """Take from the front: at most `limit` deliveries, and BATCH_BYTES."""
    taken: list[Delivery] = []
    total = 0
    while buffer and len(taken) < limit:
        total += len(buffer[0].body)
        if taken and total > BATCH_BYTES:
            break
        taken.append(buffer.popleft())
    return taken


_OTHERS = (
    "content_encoding",
    "delivery_mode",
    "priority",
    "correlation_id",
    "reply_to",
    "expiration",
    "user_id",
)


def _delivery(message: DeliveredMessage) -> Delivery:
    """Total: whatever aiormq could decode becomes a Delivery, so that it reaches the quarantine and not a log."""
    properties = message.header.properties
    return Delivery(
        tag=message.delivery_tag or 0,
        redelivered=bool(message.redelivered),
        exchange=message.exchange or "",
        routing_key=message.routing_key or "",
        message_id=_text(properties.message_id),
        event_type=_text(properties.message_type),
        source=_text(properties.app_id),
        content_type=_text(properties.content_type),
        occurred_at=_instant(properties.timestamp),
        headers=properties.headers if isinstance(properties.headers, dict) else {},
        body=bytes(message.body),
        others={name: getattr(properties, name) for name in _OTHERS},
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _instant(value: object) -> datetime | None:
    if not isinstance(value, datetime):
        return None
    return value if value.tzinfo is not None else value.replace(tzinfo=UTC)
