"""What receiving costs in Python: CPU us a message of splitting, of reading properties, and of the whole way of both consumers.

    python -m tests.bench.consumer_cost [--messages 20000] [--rounds 5] [--body 256] [--queue quorum|classic] [--pure]

The whole way (receive, read, acknowledge each batch) needs a broker: RELAY_TEST_RABBITMQ_URL (a virtual host `consumer_cost` is
made and deleted), or a private one. Rounds alternate between the consumers, and the medians are told.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from pamqp import body, commands, frame, header

from relay.rabbitmq.fast_consumer import FastConsumer, _delivery
from relay.rabbitmq.queues import InboxQueue
from relay.rabbitmq.session import close, connect
from relay.rabbitmq.stock_consumer import StockConsumer
from relay.rabbitmq.transport import SplitTransport
from relay.rabbitmq.wire.frames import Content, Sink, Splitter
from relay.rabbitmq.wire.properties import read
from relay.sandbox import find_rabbitmq
from relay.settings import RabbitmqSettings

QUEUE = "consumer_cost"
BATCH = 500
PREFETCH = 1000

PROPERTIES = commands.Basic.Properties(
    content_type="application/json",
    headers={
        "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "x-content-digest": "sha256:" + "ab" * 32,
        "x-aggregate-type": "order",
        "x-aggregate-id": "order-4711",
        "x-sequence": 2**40,
    },
    delivery_mode=2,
    message_id="5a3c6f0e-64a8-5d5e-9b0c-3b1a7d1e2f40",
    timestamp=datetime(2026, 1, 2, tzinfo=UTC),
    message_type="OrderPaid",
    app_id="shop",
)
"""A relay's, with a header of the producer's own."""


def on_the_wire(method: Any, octets: bytes, channel: int) -> bytes:
    """A message, published or delivered."""
    frames = [method, header.ContentHeader(0, len(octets), PROPERTIES), body.ContentBody(octets)]
    return b"".join(frame.marshal(each, channel) for each in frames)


def cost_us(run: Callable[[], object], messages: int, *, rounds: int) -> float:
    """Least CPU of several rounds: whatever else runs only adds to it."""
    costs = []
    for _ in range(rounds):
        started = time.process_time()
        run()
        costs.append((time.process_time() - started) / messages * 1e6)
    return min(costs)


def pure(messages: int, octets: bytes, rounds: int) -> None:
    """Each step by itself, without a socket."""
    method = commands.Basic.Deliver("ctag1.0123456789abcdef", 2**33, False, "relay.events", "order.OrderPaid")
    stream = on_the_wire(method, octets, 1) * messages
    taken: list[Content] = []

    def split(piece: int) -> None:
        taken.clear()
        splitter = Splitter()
        splitter.register(1, Sink(taken.append, max_body=2**24))
        for start in range(0, len(stream), piece):
            splitter.feed(stream[start : start + piece])
        assert len(taken) == messages

    told = {
        "split, 256 KiB at once": lambda: split(256 * 1024),
        "split, 1460 B at once": lambda: split(1460),
        "read the properties": lambda: [read(block) for _, block, _ in taken],
        "make the delivery of it": lambda: [_delivery(*content) for content in taken],
    }
    for name, run in told.items():
        print(f"{name:<32}{cost_us(run, messages, rounds=rounds):8.2f} us CPU a message")


async def fill(settings: RabbitmqSettings, messages: int, octets: bytes, kind: str) -> None:
    """Into a queue of the kind, straight to the socket."""
    transport = SplitTransport()
    session = await connect(settings, name="bench", transport=transport)
    try:
        channel = await (await session.channel(publisher_confirms=False)).get_underlay_channel()
        await channel.queue_declare(QUEUE, durable=True, arguments={"x-queue-type": kind})
        publish = on_the_wire(commands.Basic.Publish(exchange="", routing_key=QUEUE), octets, channel.number)
        for start in range(0, messages, BATCH):
            transport.writer.write(publish * min(BATCH, messages - start))
            await transport.writer.drain()
        while (await channel.queue_declare(QUEUE, passive=True)).message_count != messages:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    finally:
        await close(session)


async def whole_us(
    kind: type[StockConsumer] | type[FastConsumer], settings: RabbitmqSettings, messages: int
) -> tuple[float, float]:
    """(CPU us a message of this process, messages a second)."""
    queue = InboxQueue(name=QUEUE, bindings=(), delivery_limit=50)
    consumer = await kind.open(settings, queue, prefetch=PREFETCH, name="bench")
    try:
        cpu, wall = time.process_time(), time.perf_counter()
        left = messages
        while left:
            deliveries = await consumer.receive(BATCH)
            left -= len(deliveries)
            await consumer.acknowledge(deliveries[-1].tag)
        return (time.process_time() - cpu) / messages * 1e6, messages / (time.perf_counter() - wall)
    finally:
        await consumer.close()


async def compared(
    url: str, messages: int, octets: bytes, rounds: int, kind: str
) -> dict[str, list[tuple[float, float]]]:
    """What each round of each consumer cost."""
    settings = RabbitmqSettings(url=url, declare_topology=False)
    kinds: dict[str, type[StockConsumer] | type[FastConsumer]] = {"fast": FastConsumer, "stock": StockConsumer}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, implementation in kinds.items():
            await fill(settings, messages, octets, kind)
            found[name].append(await whole_us(implementation, settings, messages))
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--body", type=int, default=256, help="bytes of each body")
    parser.add_argument("--queue", choices=("quorum", "classic"), default="quorum")
    parser.add_argument("--pure", action="store_true", help="without a broker")
    given = parser.parse_args()
    octets = b"x" * given.body
    pure(given.messages, octets, given.rounds)
    if given.pure:
        return
    with find_rabbitmq() as broker:
        url = broker.create_vhost(QUEUE)
        try:
            report(asyncio.run(compared(url, given.messages, octets, given.rounds, given.queue)))
        finally:
            broker.delete_vhost(QUEUE)


def report(found: dict[str, list[tuple[float, float]]]) -> None:
    """Medians of the rounds."""
    for name, rounds in found.items():
        cpu, rate = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"receive and acknowledge, {name:<7}{cpu:8.2f} us CPU a message {rate:10,.0f} messages/s")


if __name__ == "__main__":
    main()
