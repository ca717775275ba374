"""The consumer seam on a split stream: deliveries are taken off it before aiormq, and read when they are asked for, in bulk.

A message that no client library can read does not end the connection here: it becomes a Delivery with a `fault`.
"""

from __future__ import annotations

import asyncio
from types import MappingProxyType

from aiormq.abc import AbstractChannel, DeliveredMessage

from relay.errors import BrokerUnavailable, UnreadableMessage
from relay.message import Delivery
from relay.rabbitmq.queues import Queue, ensure_queue
from relay.rabbitmq.session import Session, broker_errors, close, connect
from relay.rabbitmq.subscription import Subscription
from relay.rabbitmq.transport import SplitTransport
from relay.rabbitmq.wire.frames import Content, FrameError, Sink
from relay.rabbitmq.wire.methods import deliver
from relay.rabbitmq.wire.properties import Malformed, read
from relay.settings import RabbitmqSettings

MAX_BODY_BYTES = 128 * 1024 * 1024
"""Largest body that is kept in memory, eight times a relay's largest and RabbitMQ 3's default for any. A larger one is for the
queue of dead letters, whole: it is an UnreadableMessage."""


class FastConsumer(Subscription[Content]):
    """Implements `relay.rabbitmq.contract.Consumer`. One channel on a connection of its own."""

    def __init__(self, session: Session, channel: AbstractChannel, transport: SplitTransport) -> None:
        super().__init__(session, channel)
        self._transport = transport
        transport.register(channel.number, Sink(self._buffer.append, max_body=MAX_BODY_BYTES))
        transport.after_data = self._on_data
        transport.lost.add_done_callback(self._on_lost)

    @classmethod
    async def open(cls, settings: RabbitmqSettings, queue: Queue, *, prefetch: int, name: str) -> FastConsumer:
        """Connect, see to the queue, subscribe with the prefetch. Raises BrokerRefused or BrokerUnavailable."""
        transport = SplitTransport()
        session = await connect(settings, name=name, transport=transport)
        try:
            await ensure_queue(session, settings, queue)
            with broker_errors(f"consuming from the queue {queue.name!r}"):
                async with asyncio.timeout(settings.connect_timeout_s):
                    channel = await (await session.channel(publisher_confirms=False)).get_underlay_channel()
                    consumer = cls(session, channel, transport)
                    await channel.basic_qos(prefetch_count=prefetch)
                    await channel.basic_consume(queue.name, consumer._on_stray)
        except BaseException:
            await close(session)
            raise
        return consumer

    async def receive(self, limit: int) -> list[Delivery]:
        """See the contract."""
        contents = await self._next(limit, _size)
        try:
            return [_delivery(*content) for content in contents]
        except FrameError as exc:
            error = BrokerUnavailable(f"what RabbitMQ sent cannot be followed: {exc}")
            self._end(error)
            raise error from exc
        except UnreadableMessage as exc:
            self._end(exc)
            raise

    def _on_data(self) -> None:
        if self._buffer:
            self._changed.set()

    def _on_lost(self, _: object) -> None:
        """Only what aiormq cannot know: all other ends it tells, by `closing`, in the broker's own words."""
        if self._transport.broken is not None:
            self._end(self._transport.broken)

    async def _on_stray(self, _: DeliveredMessage) -> None:
        """A delivery that aiormq was given: the sink is gone, and with it the order of what we hand out."""
        self._end(BrokerUnavailable("a message was delivered after its channel had ended"))


def _size(content: Content) -> int:
    body = content[2]
    return 0 if body is None else len(body)


def _delivery(method: bytes, block: bytes, body: bytes | None) -> Delivery:
    """Total but for what is not to be handed out at all. Raises FrameError and UnreadableMessage."""
    tag, redelivered, exchange, routing_key = deliver(method)
    if body is None:
        raise UnreadableMessage(
            f"a message in the queue is larger than {MAX_BODY_BYTES} bytes (routing key {routing_key!r})"
        )
    try:
        told = read(block)
    except Malformed as exc:
        unread = MappingProxyType({"unread": block})
        return Delivery(
            tag, redelivered, exchange, routing_key, None, None, None, None, None, {}, body, unread, fault=str(exc)
        )
    message_id, event_type, source, content_type, occurred_at, headers, others = told
    return Delivery(
        tag,
        redelivered,
        exchange,
        routing_key,
        message_id,
        event_type,
        source,
        content_type,
        occurred_at,
        headers,
        body,
        others,
    )
