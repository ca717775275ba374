"""The inbox's queue: declared so that the broker never drops an event silently, or only looked for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import structlog
from aio_pika.abc import AbstractChannel
from aiormq.abc import AbstractChannel as Underlay

from relay.errors import BrokerRefused
from relay.rabbitmq.control_topology import marks_exchange, marks_exchange_name
from relay.rabbitmq.session import Session, broker_errors
from relay.rabbitmq.topology import NOT_FOUND, PRECONDITION_FAILED, exchange
from relay.settings import RabbitmqSettings

log = structlog.get_logger()

DEAD_EXCHANGE = "relay.dead"
"""Where the broker puts a message that was delivered `delivery_limit` times: direct, routing key = name of the queue."""

_DEAD_DELIVERY_LIMIT = 1_000_000
"""RabbitMQ 4 drops a message after 20 deliveries where no limit is set; an operator who looks at dead letters and puts them
back must not lose them that way. (-1, for none, is refused by RabbitMQ 3.)"""

_ACCESS_REFUSED = 403


class Queue(Protocol):
    """A queue that relay reads, and knows how to declare."""

    @property
    def name(self) -> str:
        """Its name at the broker."""
        ...

    async def declare(self, channel: AbstractChannel, underlay: Underlay, settings: RabbitmqSettings) -> None:
        """Declare it and what it needs. Raises BrokerRefused."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class InboxQueue:
    """The queue of one consumer, and what it receives."""

    name: str
    bindings: tuple[str, ...]  # routing-key patterns on rabbitmq.exchange
    delivery_limit: int  # deliveries after which a message is dead-lettered

    @property
    def dead(self) -> str:
        """Name of the queue that keeps what was dead-lettered."""
        return f"{self.name}.dead"

    @property
    def arguments(self) -> dict[str, Any]:
        """Quorum, bounded deliveries, and dead-lettering that waits for the dead-letter queue's confirm.

        At-least-once dead-lettering needs `reject-publish`; without a length limit that never rejects anything.
        """
        return {
            "x-queue-type": "quorum",
            "x-delivery-limit": self.delivery_limit,
            "x-dead-letter-exchange": DEAD_EXCHANGE,
            "x-dead-letter-routing-key": self.name,
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        }

    async def declare(self, channel: AbstractChannel, underlay: Underlay, settings: RabbitmqSettings) -> None:
        """The queue, its dead letters and its bindings. Raises BrokerRefused, which says what to do."""
        await _declare(channel, underlay, settings, self)


async def ensure_queue(connection: Session, settings: RabbitmqSettings, queue: Queue) -> None:
    """Declare the queue and what it needs; with `declare_topology` off, only look whether it exists.

    Works on channels of its own. Raises BrokerRefused, which says what to do, or BrokerUnavailable.
    """
    with broker_errors(f"preparing the queue {queue.name!r}"):
        async with asyncio.timeout(settings.connect_timeout_s):
            channel = await connection.channel(publisher_confirms=False)
            underlay = await channel.get_underlay_channel()
            if settings.declare_topology:
                await queue.declare(channel, underlay, settings)
            else:
                await _look(underlay, queue)
            await channel.close()
    if settings.declare_topology and isinstance(queue, InboxQueue):
        await _bind_marks(connection, settings, queue)


async def _declare(channel: AbstractChannel, underlay: Underlay, settings: RabbitmqSettings, queue: InboxQueue) -> None:
    await exchange(channel, settings)
    await _explained(
        lambda: underlay.exchange_declare(DEAD_EXCHANGE, exchange_type="direct", durable=True),
        "exchange",
        DEAD_EXCHANGE,
    )
    dead: dict[str, Any] = {"x-queue-type": "quorum", "x-delivery-limit": _DEAD_DELIVERY_LIMIT}
    await _explained(lambda: underlay.queue_declare(queue.dead, durable=True, arguments=dead), "queue", queue.dead)
    await underlay.queue_bind(queue.dead, DEAD_EXCHANGE, queue.name)
    await _explained(
        lambda: underlay.queue_declare(queue.name, durable=True, arguments=queue.arguments), "queue", queue.name
    )
    for pattern in queue.bindings:
        await underlay.queue_bind(queue.name, settings.exchange, pattern)


async def _bind_marks(connection: Session, settings: RabbitmqSettings, queue: InboxQueue) -> None:
    """Marks arrive where the events do. Without them events are still consumed: a refusal is told, and no more than that."""
    try:
        with broker_errors(f"binding the queue {queue.name!r} to {marks_exchange_name(settings)!r}"):
            async with asyncio.timeout(settings.connect_timeout_s):
                channel = await connection.channel(publisher_confirms=False)
                await marks_exchange(channel, settings)
                underlay = await channel.get_underlay_channel()
                for pattern in queue.bindings:
                    await underlay.queue_bind(queue.name, marks_exchange_name(settings), pattern)
                await channel.close()
    except BrokerRefused as exc:
        log.warning(
            "marks_unavailable",
            queue=queue.name,
            reason=str(exc),
            effect="an event that is lost without a successor is not missed until the next one of its aggregate",
        )


async def _look(underlay: Underlay, queue: Queue) -> None:
    await _explained(lambda: underlay.queue_declare(queue.name, passive=True), "queue", queue.name)


async def _explained(declare: Callable[[], Awaitable[object]], kind: str, name: str) -> None:
    try:
        with broker_errors(f"declaring the {kind} {name!r}"):
            await declare()
    except BrokerRefused as exc:
        if (advice := _advice(exc.reply_code, kind, name)) is None:
            raise
        raise BrokerRefused(f"{advice} ({exc})", reply_code=exc.reply_code) from exc


def _advice(code: int | None, kind: str, name: str) -> str | None:
    if code == PRECONDITION_FAILED:
        return (
            f"the {kind} {name!r} exists with other arguments: when it is empty delete it and let relay declare it, or set "
            "inbox.queue to another name, or rabbitmq.declare_topology = false to use it as it is"
        )
    if code == NOT_FOUND:
        return f"the {kind} {name!r} does not exist: create it, or set rabbitmq.declare_topology = true"
    if code == _ACCESS_REFUSED:
        return (
            f"no permission to declare the {kind} {name!r}: grant configure, or set rabbitmq.declare_topology = false"
        )
    return None
