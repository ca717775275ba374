"""What the consumers have in common, whoever reads the messages: a buffer bounded by the prefetch, the end told once, acks, goodbye."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from aiormq.abc import AbstractChannel

from relay.errors import BrokerError, BrokerUnavailable
from relay.rabbitmq.session import CLOSE_TIMEOUT_S, Session, broker_errors, close, translated

ACK_TIMEOUT_S = 10.0
"""Longest wait for room in aiormq's write queue; a broker that takes nothing for so long has ended the session."""

BATCH_BYTES = 32 * 1024 * 1024
"""Most bytes that `receive` hands out at once, and that are put into one transaction (the first message always fits): they
are copied several times on their way. Half of what a fast consumer holds: while one batch is applied, the next is received."""

T = TypeVar("T")


class Subscription(Generic[T]):
    """All of `relay.rabbitmq.contract.Consumer` but `receive`: T is a delivery as it is buffered."""

    def __init__(self, session: Session, channel: AbstractChannel) -> None:
        self._session = session
        self._channel = channel
        self._buffer: deque[T] = deque()
        self._changed = asyncio.Event()
        self._lost: BrokerError | None = None
        self._watched = (session.closing, channel.closing)
        for closing in self._watched:
            closing.add_done_callback(self._on_closing)
        channel.on_consumer_cancel_callbacks.add(self._on_cancelled)

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
        try:
            if alive:
                await self._flush()
        finally:  # whoever insists on our end cancels the flush of a broker that does not answer; the socket has to go all the same
            try:
                await close(self._session)
            finally:
                for closing in self._watched:
                    closing.cancel()

    async def _next(self, limit: int, size_of: Callable[[T], int]) -> list[T]:
        """What `receive` is to hand out: something, `limit` at most. Raises BrokerError when the session has ended."""
        while self._lost is None and not self._buffer:
            self._changed.clear()
            await self._changed.wait()
        if self._lost is not None:
            raise self._lost
        return taken(self._buffer, limit, size_of)

    async def _flush(self) -> None:
        """Close the channel by its handshake: closing the connection at once would throw away acks not written yet."""
        try:
            with broker_errors("closing"):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._channel.close()
        except BrokerError:
            return  # the unwritten acks are lost, and their messages delivered again

    def _on_cancelled(self, _: object) -> None:
        self._end(BrokerUnavailable("RabbitMQ cancelled the consumer: the queue was deleted or its leader is gone"))

    def _on_closing(self, closing: asyncio.Future[Any]) -> None:
        """A heartbeat that died arrives as CancelledError, either as the future's state or as its exception."""
        cause = None if closing.cancelled() else closing.exception()
        error = None if cause is None else self._told(cause)
        self._end(error or BrokerUnavailable("consuming: the connection to RabbitMQ has ended"))

    def _told(self, cause: BaseException) -> BrokerError | None:
        """In relay's words, what the connection or the channel ended with."""
        return translated(cause, "consuming")

    def _end(self, error: BrokerError) -> None:
        if self._lost is None:
            self._lost = error
        self._changed.set()


def taken(buffer: deque[T], limit: int, size_of: Callable[[T], int]) -> list[T]:
    """Take from the front: at most `limit` deliveries, and BATCH_BYTES."""
    found = [buffer.popleft() for _ in range(min(limit, len(buffer)))]
    total = sum(map(size_of, found))
    while total > BATCH_BYTES and len(found) > 1:
        total -= size_of(found[-1])
        buffer.appendleft(found.pop())
    return found
