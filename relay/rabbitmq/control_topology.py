"""Where control messages travel: the exchanges for repair and marks, and the queue in which a relay is asked.

relay.repair           direct exchange; an inbox publishes under the name of the source that it misses something of
relay.repair.<source>  the queue of that source's relay: bounded, and what is not read within a minute is asked again anyway
<events>.marks         topic exchange beside the one of the events; queues are bound to it with the same patterns

None of it is needed for events to flow.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from aio_pika.abc import AbstractChannel, AbstractExchange, ExchangeType
from aiormq.abc import AbstractChannel as Underlay

from relay.rabbitmq.session import broker_errors
from relay.settings import RabbitmqSettings

REPAIR_EXCHANGE = "relay.repair"

_REQUESTS = 1000
"""Longest queue of requests; the oldest are dropped first, and asked again by whoever still misses something."""

_REQUEST_TTL_MS = 60_000
"""A request that is older than this has been asked again since."""


def marks_exchange_name(settings: RabbitmqSettings) -> str:
    """The exchange for marks beside the one for events."""
    return f"{settings.exchange}.marks"


async def marks_exchange(channel: AbstractChannel, settings: RabbitmqSettings) -> AbstractExchange:
    """A target for StockPublisher.open: marks go out under the routing keys of events. Raises BrokerRefused."""
    return await _exchange(channel, settings, marks_exchange_name(settings), ExchangeType.TOPIC)


async def repair_exchange(channel: AbstractChannel, settings: RabbitmqSettings) -> AbstractExchange:
    """A target for StockPublisher.open: a request goes out under the name of its source. Raises BrokerRefused."""
    return await _exchange(channel, settings, REPAIR_EXCHANGE, ExchangeType.DIRECT)


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairQueue:
    """The queue in which the relay of a source is asked to send something again."""

    source: str

    @property
    def name(self) -> str:
        """Its name at the broker."""
        return f"relay.repair.{self.source}"

    @property
    def arguments(self) -> dict[str, Any]:
        """Replicated, since it must be there when a node is not; bounded in length and age, since nobody may be reading."""
        return {
            "x-queue-type": "quorum",
            "x-max-length": _REQUESTS,
            "x-overflow": "drop-head",
            "x-message-ttl": _REQUEST_TTL_MS,
        }

    async def declare(self, channel: AbstractChannel, underlay: Underlay, settings: RabbitmqSettings) -> None:
        """The queue and its binding. Raises BrokerRefused."""
        await repair_exchange(channel, settings)
        with broker_errors(f"declaring the queue {self.name!r}"):
            await underlay.queue_declare(self.name, durable=True, arguments=self.arguments)
            await underlay.queue_bind(self.name, REPAIR_EXCHANGE, self.source)


async def _exchange(
    channel: AbstractChannel, settings: RabbitmqSettings, name: str, kind: ExchangeType
) -> AbstractExchange:
    with broker_errors(f"declaring the exchange {name!r}"):
        async with asyncio.timeout(settings.connect_timeout_s):
            return await channel.declare_exchange(name, kind, durable=True, passive=not settings.declare_topology)
