"""The consumer seam on stock aiormq: deliveries are buffered here as they come, bounded by the prefetch.

aiormq's DeliveredMessage is taken from the underlay channel: aio-pika's IncomingMessage raises for a delivery mode it does
not know, in a task where nobody sees it, and the message would occupy a prefetch slot for ever (RELIABILITY 3-H).

Memory is bounded by the prefetch alone: so many of the largest messages that anybody may publish, with properties that take up to
32 times their size on the wire. Only the fast consumer, which reads the socket itself, has a bound in bytes.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from aiormq.abc import DeliveredMessage

from relay.errors import BrokerError
from relay.message import Delivery
from relay.rabbitmq.queues import Queue, ensure_queue
from relay.rabbitmq.session import broker_errors, close, connect, unreadable
from relay.rabbitmq.subscription import Subscription
from relay.settings import RabbitmqSettings


class StockConsumer(Subscription[Delivery]):
    """Implements `relay.rabbitmq.contract.Consumer`. One channel on a connection of its own."""

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
        return await self._next(limit, _size)

    def next_ready(self) -> Delivery | None:
        """See the contract."""
        return self._buffer.popleft() if self._buffer and self._lost is None else None

    async def _on_message(self, message: DeliveredMessage) -> None:
        """For each delivery aiormq starts a task, in order; without an await in it they also run in order."""
        self._buffer.append(_delivery(message))
        self._changed.set()

    def _told(self, cause: BaseException) -> BrokerError | None:
        """Also when it is a message that aiormq cannot decode."""
        return unreadable(cause) or super()._told(cause)


def _size(delivery: Delivery) -> int:
    return len(delivery.body)


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
