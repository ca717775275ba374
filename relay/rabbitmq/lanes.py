"""Which way messages take to and from RabbitMQ: the fast lane, or stock aio-pika behind the same seam (`rabbitmq.client`)."""

from __future__ import annotations

from relay.rabbitmq.contract import Consumer, Publisher
from relay.rabbitmq.fast_consumer import FastConsumer
from relay.rabbitmq.fast_publisher import FastPublisher
from relay.rabbitmq.queues import Queue
from relay.rabbitmq.stock_consumer import StockConsumer
from relay.rabbitmq.stock_publisher import StockPublisher
from relay.settings import RabbitmqSettings


async def open_publisher(settings: RabbitmqSettings, *, confirm_timeout_s: float, name: str) -> Publisher:
    """A publisher to relay's exchange, on a connection of its own. Raises BrokerRefused or BrokerUnavailable."""
    lane = FastPublisher if settings.client == "fast" else StockPublisher
    return await lane.open(settings, confirm_timeout_s=confirm_timeout_s, name=name)


async def open_consumer(settings: RabbitmqSettings, queue: Queue, *, prefetch: int, name: str) -> Consumer:
    """A consumer of a queue, which is declared if settings say so. Raises BrokerRefused or BrokerUnavailable."""
    lane = FastConsumer if settings.client == "fast" else StockConsumer
    return await lane.open(settings, queue, prefetch=prefetch, name=name)
