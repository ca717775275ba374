"""The publisher seam on stock aio-pika: every message a task, confirms pipelined."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aio_pika
import aiormq.exceptions
from aio_pika.abc import AbstractChannel, AbstractExchange
from pamqp.commands import Basic

from relay.errors import BrokerRefused, BrokerUnavailable
from relay.message import Message
from relay.rabbitmq.blame import blames_the_message
from relay.rabbitmq.contract import Confirmed, Nacked, Outcome, Refused, Returned, Unknown
from relay.rabbitmq.refusals import unsendable
from relay.rabbitmq.session import Session, broker_errors, close, connect, reply_text
from relay.rabbitmq.topology import exchange
from relay.settings import RabbitmqSettings

_IN_FLIGHT = 500
"""Messages sent and not yet confirmed. aiormq scans all of them for each multiple ack, so more is slower (PERFORMANCE A)."""


class StockPublisher:
    """Implements `relay.rabbitmq.contract.Publisher`. One channel on a connection of its own."""

    def __init__(
        self, session: Session, channel_closing: asyncio.Future[Any], target: AbstractExchange, confirm_timeout_s: float
    ) -> None:
        self._session = session
        # Asked for once: aiormq makes a new future for each look at `closing`, and keeps it until the connection ends.
        self._watched = (session.closing, channel_closing)
        self._target = target
        self._confirm_timeout_s = confirm_timeout_s
        self._lost: BaseException | None = None
        self._in_flight: set[str] = set()
        self._turn = asyncio.Lock()  # fair: calls take turns in the order in which they were begun

    @classmethod
    async def open(
        cls,
        settings: RabbitmqSettings,
        *,
        confirm_timeout_s: float,
        name: str,
        target: Callable[[AbstractChannel, RabbitmqSettings], Awaitable[AbstractExchange]] = exchange,
    ) -> StockPublisher:
        """Connect, open a confirm channel, see to the exchange. Raises BrokerRefused or BrokerUnavailable.

        `target` says which exchange: relay's own by default; `relay.rabbitmq.topology.queues` to publish to queues by name.
        """
        session = await connect(settings, name=name)
        try:
            with broker_errors("opening a channel"):
                async with asyncio.timeout(settings.connect_timeout_s):
                    # aio-pika's default would report a returned message as a success.
                    channel = await session.channel(publisher_confirms=True, on_return_raises=True)
            publishing_to = await target(channel, settings)
            closing = (await channel.get_underlay_channel()).closing
        except BaseException:
            await close(session)
            raise
        return cls(session, closing, publishing_to, confirm_timeout_s)

    @property
    def lost(self) -> BaseException | None:
        """Why the session ended, None while it is usable."""
        if self._lost is None and any(closing.done() for closing in self._watched):
            self._lost = BrokerUnavailable("the connection to RabbitMQ has ended")
        return self._lost

    async def wait_lost(self) -> None:
        """See the contract."""
        await asyncio.wait(self._watched, return_when=asyncio.FIRST_COMPLETED)

    @property
    def message_is_suspect(self) -> bool:
        """See the contract."""
        return self._lost is not None and blames_the_message(self._lost)

    async def publish(self, messages: Sequence[Message]) -> list[Outcome]:
        """See the contract: a call waits until the one before it has ended.

        aiormq attributes a returned message by its id, so the ids in flight must be distinct.
        """
        ids = {message.message_id for message in messages}
        if len(ids) != len(messages):
            raise ValueError("two messages of one batch have the same message_id")
        if not self._in_flight.isdisjoint(ids):
            raise ValueError("a message with the same message_id is being published")
        if (lost := self.lost) is not None:
            return [Unknown(str(lost))] * len(messages)
        outcomes: list[Outcome] = []
        self._in_flight |= ids
        try:
            async with self._turn:
                for start in range(0, len(messages), _IN_FLIGHT):
                    outcomes += await self._publish_window(messages[start : start + _IN_FLIGHT])
        except asyncio.CancelledError:
            self._end(BrokerUnavailable("publishing was cancelled"))
            raise
        finally:
            self._in_flight -= ids
        return outcomes

    async def messages_in(self, queue: str) -> int | None:
        """How many messages wait in a queue; None if there is none, or it cannot be looked at. Raises BrokerUnavailable.

        On a channel of its own, which is all that a refusal ends.
        """
        try:
            with broker_errors(f"looking at the queue {queue!r}"):
                async with asyncio.timeout(self._confirm_timeout_s):
                    channel = await self._session.channel(publisher_confirms=False)
                    underlay = await channel.get_underlay_channel()
                    found = (await underlay.queue_declare(queue, passive=True)).message_count
                    await channel.close()
        except BrokerRefused:
            return None
        return found

    async def close(self) -> None:
        """See the contract."""
        await close(self._session)

    async def _publish_window(self, messages: Sequence[Message]) -> list[Outcome]:
        """Tasks start in order and queue on the channel's lock in order, so the messages are written in order."""
        if (lost := self.lost) is not None:
            return [Unknown(str(lost))] * len(messages)
        tasks = [asyncio.create_task(self._publish_one(message)) for message in messages]
        try:
            _, late = await asyncio.wait(tasks, timeout=self._confirm_timeout_s)
        except asyncio.CancelledError:
            self._end(BrokerUnavailable("publishing was cancelled"))
            await _discard(tasks)
            raise
        blocked = bool(late) and self._is_blocked()
        if late:
            self._end(
                BrokerUnavailable(f"{len(late)} messages were not confirmed within {self._confirm_timeout_s:g} s")
            )
            await _discard(list(late))
        return [self._outcome(task, len(messages), late=task in late and not blocked) for task in tasks]

    def _is_blocked(self) -> bool:
        """True while the broker has an alarm and takes nothing: then being late is no message's fault.

        aiormq tells it only through `ready()`, which returns at once on a free connection and would wait on a blocked one.
        """
        if self._session.transport is None:
            return False
        ready = self._session.transport.connection.ready()
        try:
            ready.send(None)
        except StopIteration:
            return False
        ready.close()
        return True

    async def _publish_one(self, message: Message) -> Outcome:
        if (refused := unsendable(message)) is not None:
            return refused
        try:
            answer = await self._target.publish(_amqp(message), message.routing_key, mandatory=True)
        except aiormq.exceptions.PublishError as exc:
            return Returned(reply_text(exc))
        except aiormq.exceptions.DeliveryError:
            return Nacked()
        except (ValueError, TypeError, OverflowError, struct.error) as exc:
            # pamqp cannot encode what `unsendable` let through. aiormq 7.2.4 takes its tag back; one that does not would
            # take the answer to each later message for another's (RELIABILITY 3-A), so this channel is not used again.
            self._end(BrokerUnavailable("a message could not be encoded"))
            return Refused("unencodable", f"{type(exc).__name__}: {exc}"[:300])
        if isinstance(answer, Basic.Ack):
            return Confirmed()
        self._end(BrokerUnavailable(f"a publish was answered with {type(answer).__name__}, which is no confirm"))
        return Unknown(str(self._lost))

    def _outcome(self, task: asyncio.Task[Outcome], in_flight: int, *, late: bool) -> Outcome:
        """A task that ended with an exception, or as if cancelled (the heartbeat died), has no answer from the broker."""
        if task.cancelled():
            self._end(self._lost or BrokerUnavailable("the connection died (no heartbeat)"))
            return Unknown(str(self._lost), timed_out=late)
        exc = task.exception()
        if exc is None:
            return task.result()
        if in_flight == 1 and blames_the_message(exc):
            self._end(exc)
            return Refused("refused", reply_text(exc))
        self._end(exc)
        return Unknown(reply_text(exc))

    def _end(self, cause: BaseException) -> None:
        """A session that failed once is never used again: cut it, so that nothing waits on it any more."""
        if self._lost is None:
            self._lost = cause
        self._session.abort()


async def _discard(tasks: Sequence[asyncio.Task[Outcome]]) -> None:
    """End the tasks of a session that is cut already; what they raise is the session's end told again."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _amqp(message: Message) -> aio_pika.Message:
    return aio_pika.Message(
        message.body,
        message_id=message.message_id,
        type=message.event_type,
        app_id=message.source,
        timestamp=message.occurred_at,
        content_type=message.content_type,
        headers=dict(message.headers),
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,  # aio-pika's default is not
    )
