"""The exchange that a relay publishes to: declared, or only looked for."""

from __future__ import annotations

import asyncio

from aio_pika.abc import AbstractChannel, AbstractExchange, ExchangeType

from relay.errors import BrokerRefused
from relay.rabbitmq.session import broker_errors, close, connect
from relay.settings import RabbitmqSettings

PRECONDITION_FAILED = 406
NOT_FOUND = 404


async def exchange(channel: AbstractChannel, settings: RabbitmqSettings) -> AbstractExchange:
    """The durable topic exchange, declared if `declare_topology` says so. Raises BrokerRefused, which says what to do."""
    name = settings.exchange
    try:
        with broker_errors(f"declaring the exchange {name!r}"):
            async with asyncio.timeout(settings.connect_timeout_s):
                return await channel.declare_exchange(
                    name, ExchangeType.TOPIC, durable=True, passive=not settings.declare_topology
                )
    except BrokerRefused as exc:
        if exc.reply_code == PRECONDITION_FAILED:
            raise BrokerRefused(
                f"the exchange {name!r} exists with another type or durability: delete it, or set rabbitmq.exchange "
                "to another name, or rabbitmq.declare_topology = false to use it as it is",
                reply_code=exc.reply_code,
            ) from exc
        if exc.reply_code == NOT_FOUND:
            raise BrokerRefused(
                f"the exchange {name!r} does not exist: create it, or set rabbitmq.declare_topology = true",
                reply_code=exc.reply_code,
            ) from exc
        raise


async def queues(channel: AbstractChannel, _: RabbitmqSettings) -> AbstractExchange:
    """The default exchange: a routing key is the name of the one queue that receives the message."""
    return channel.default_exchange


async def require_queue(settings: RabbitmqSettings, name: str) -> None:
    """Raise BrokerRefused unless the queue exists: looked for on a connection of its own, which a refusal would end."""
    session = await connect(settings, name="relay, a look")
    try:
        with broker_errors(f"looking for the queue {name!r}"):
            async with asyncio.timeout(settings.connect_timeout_s):
                channel = await session.channel(publisher_confirms=False)
                await (await channel.get_underlay_channel()).queue_declare(name, passive=True)
    except BrokerRefused as exc:
        if exc.reply_code == NOT_FOUND:
            raise BrokerRefused(
                f"the queue {name!r} does not exist on this broker: check its name, and the virtual host in rabbitmq.url",
                reply_code=exc.reply_code,
            ) from exc
        raise
    finally:
        await close(session)
