"""The consumer seam on a split stream: deliveries are taken off it before aiormq, and read when they are asked for, in bulk.

A message that no client library can read does not end the connection here: it becomes a Delivery with a `fault`.
What is delivered and not acknowledged is bounded in bytes, not only by the prefetch: see relay.rabbitmq.backpressure.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from functools import partial
from operator import itemgetter
from sys import getsizeof
from types import MappingProxyType
from typing import Any

from aiormq.abc import AbstractChannel, DeliveredMessage

from relay.errors import BrokerError, BrokerUnavailable, UnreadableMessage
from relay.message import Delivery
from relay.rabbitmq.backpressure import HELD_BYTES, Backpressure
from relay.rabbitmq.queues import Queue, ensure_queue
from relay.rabbitmq.session import Session, broker_errors, close, connect
from relay.rabbitmq.subscription import Subscription
from relay.rabbitmq.transport import SplitTransport
from relay.rabbitmq.wire.frames import Content, FrameError, Sink
from relay.rabbitmq.wire.methods import deliver
from relay.rabbitmq.wire.properties import Malformed, by_layout, step_by_step
from relay.settings import RabbitmqSettings

MAX_BODY_BYTES = 128 * 1024 * 1024
"""Largest body that is kept in memory, eight times a relay's largest and RabbitMQ 3's default for any. A larger one is for the
queue of dead letters, whole: it is an UnreadableMessage."""

_BLOCK_FACTOR = 32
"""Bytes of memory for a byte of a property block, when it has been read: 30.6 in the worst of some twenty shapes of tables in tables
(CPython 3.11). The usual one takes a sixth of that."""

_FLAT_FACTOR = 12
"""The same once it has been read and no tables were in it: for headers that share their names with other messages, at most 32 of them
(see relay.rabbitmq.wire.layouts), and for the text that is kept in the quarantine, six times at most. 22 headers of one sign each take
14.7 times, but of so few bytes that _OBJECTS_BYTES has room for the rest. Of headers with names of their own what they take is added up."""

_HEADER_BYTES = 32
"""Of a header beside its name and its value: their shares of what the allocator rounds up."""

_FLAT = frozenset((str, int, bool, float, type(None)))

_OBJECTS_BYTES = 2048
"""What a message takes beside its body and its properties: its method, its names, the objects that hold them."""

_told = partial(tuple.__new__, Delivery)
"""A Delivery of a tuple of all its fields: half of the time that its constructor takes, which is a function of Python's."""

_COUNTED = itemgetter(0)
_Sized = tuple[int, Content]
"""(bytes that it counts for, message)"""


class FastConsumer(Subscription[_Sized]):
    """Implements `relay.rabbitmq.contract.Consumer`. One channel on a connection of its own.

    A delivery counts from its last byte until its acknowledgement: its body, 2 KiB, and 32 times its property block, mostly 12 times
    once it has been handed out: see `_size_read`. While that is
    more than HELD_BYTES in all, the socket is not read but for a little now and then: see Backpressure for the exact bound.
    """

    def __init__(self, session: Session, channel: AbstractChannel, transport: SplitTransport) -> None:
        super().__init__(session, channel)
        self._transport = transport
        self.backpressure = Backpressure(transport.pause, transport.resume, bound=HELD_BYTES)
        self._handed_out: deque[tuple[int, int]] = deque()  # (tag, bytes), until it is acknowledged
        self._arrived: list[Content] = []  # with the piece of the stream that is being split
        self._sink = Sink(self._arrived.append, max_body=MAX_BODY_BYTES)
        transport.register(channel.number, self._sink)
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
        return [self._hand_out(size, content) for size, content in await self._next(limit, _COUNTED)]

    def next_ready(self) -> Delivery | None:
        """See the contract."""
        if not self._buffer or self._lost is not None:
            return None
        return self._hand_out(*self._buffer.popleft())

    async def acknowledge(self, tag: int) -> None:
        """See the contract."""
        await super().acknowledge(tag)
        released = 0
        while self._handed_out and self._handed_out[0][0] <= tag:
            released += self._handed_out.popleft()[1]
        self.backpressure.release(released)

    def _hand_out(self, size: int, content: Content) -> Delivery:
        """Read it, and count it for what it turned out to be. What is not to be handed out at all ends the session. Raises BrokerError."""
        try:
            delivery, has_layout = _delivery(*content)
        except FrameError as exc:
            error = BrokerUnavailable(f"what RabbitMQ sent cannot be followed: {exc}")
            self._end(error)
            raise error from exc
        except UnreadableMessage as exc:
            self._end(exc)
            raise
        left = _size_read(size, content[1], delivery.headers, names_are_shared=has_layout)
        if left < size:
            self.backpressure.release(size - left)
        self._handed_out.append((delivery.tag, left))
        return delivery

    def _on_data(self, received: int) -> None:
        """Counts a piece's messages together: a call for each would cost as much as all the rest of it."""
        if self._arrived:
            sizes = list(map(_size, self._arrived))
            self._buffer.extend(zip(sizes, self._arrived, strict=True))
            self.backpressure.hold(sum(sizes), max([len(body or b"") for _, _, body in self._arrived]))
            self._arrived.clear()
        if self._buffer:
            self._changed.set()
        self.backpressure.settle(received)

    def _end(self, error: BrokerError) -> None:
        """Nothing that comes is handed out any more: it is thrown away, so that the broker's answer to our goodbye can be read."""
        super()._end(error)
        self._sink.on_delivery, self._sink.max_body = _throw_away, 0
        self.backpressure.end()

    def _on_lost(self, _: object) -> None:
        """Only what aiormq cannot know: all other ends it tells, by `closing`, in the broker's own words."""
        if self._transport.broken is not None:
            self._end(self._transport.broken)

    async def _on_stray(self, _: DeliveredMessage) -> None:
        """A delivery that aiormq was given: the sink is gone, and with it the order of what we hand out."""
        self._end(BrokerUnavailable("a message was delivered after its channel had ended"))


def _throw_away(_: Content) -> None:
    """It is not acknowledged: the broker delivers it again."""


def _size(content: Content) -> int:
    """The memory it takes, whether it has been read or not."""
    _, block, body = content
    return (0 if body is None else len(body)) + _BLOCK_FACTOR * len(block) + _OBJECTS_BYTES


def _size_read(size: int, block: bytes, headers: Mapping[str, Any], *, names_are_shared: bool) -> int:
    """Of a message with this `_size`, now that its properties have been read: less, unless there are tables or octets among them."""
    now = _FLAT_FACTOR * len(block)
    if not names_are_shared:
        if not _FLAT.issuperset(map(type, headers.values())):
            return size
        taken = sum(map(getsizeof, headers)) + sum(map(getsizeof, headers.values())) + _HEADER_BYTES * len(headers)
        now = max(now, getsizeof(headers) + taken)
    return size - max(0, _BLOCK_FACTOR * len(block) - now)


def _delivery(method: bytes, block: bytes, body: bytes | None) -> tuple[Delivery, bool]:
    """With whether it was read by its layout. Total but for what is not to be handed out at all.

    Raises FrameError and UnreadableMessage.
    """
    tag, redelivered, exchange, routing_key = deliver(method)
    if body is None:
        raise UnreadableMessage(
            f"a message in the queue is larger than {MAX_BODY_BYTES} bytes (routing key {routing_key!r})"
        )
    try:
        told = (known := by_layout(block)) or step_by_step(block)
    except Malformed as exc:
        unread = MappingProxyType({"unread": block})
        return Delivery(
            tag, redelivered, exchange, routing_key, None, None, None, None, None, {}, body, unread, fault=str(exc)
        ), False
    message_id, event_type, source, content_type, occurred_at, headers, others = told
    delivery = _told(
        (
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
            None,
        )
    )
    return delivery, known is not None
