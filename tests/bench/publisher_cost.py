"""What publishing costs in Python: CPU us a message of encoding, of the accounting of confirms, and of the whole way of both publishers.

    python -m tests.bench.publisher_cost [--messages 20000] [--rounds 5] [--body 256] [--queue quorum|classic]

The whole way needs a broker: RELAY_TEST_RABBITMQ_URL (a virtual host `publisher_cost` is made and deleted), or a private one.
Rounds alternate between the publishers, and the medians are told; rates of a shared machine are worth little, CPU is steadier.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import random
import statistics
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import aio_pika

from relay.message import Message
from relay.rabbitmq.contract import Confirmed, Publisher
from relay.rabbitmq.fast_publisher import FastPublisher
from relay.rabbitmq.stock_publisher import StockPublisher
from relay.rabbitmq.topology import queues
from relay.rabbitmq.wire.encoding import Encoder
from relay.rabbitmq.wire.ledger import Batch, Ledger
from relay.sandbox import find_rabbitmq
from relay.settings import RabbitmqSettings

QUEUE = "publisher_cost"
PAGE = 1000
CONFIRMS = 100 * 256  # messages whose confirms are accounted for without a broker
IN_FLIGHT = 4  # pages; the stock publisher lets them wait for each other


def message(number: int, body: bytes) -> Message:
    """Texts made anew for each, as rows from PostgreSQL have them."""
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    return Message(
        message_id=str(uuid.uuid4()),
        event_type="".join(["Order", "Paid"]),
        source="".join(["sh", "op"]),
        content_type="".join(["application/", "json"]),
        occurred_at=datetime(2026, 1, 2, tzinfo=UTC) + timedelta(microseconds=977 * number),
        routing_key="".join(["publisher", "_cost"]),
        headers={
            "traceparent": f"00-{number:032x}-00f067aa0ba902b7-01",
            "x-content-digest": f"sha256:{digest}",
            "x-aggregate-type": "".join(["or", "der"]),
            "x-aggregate-id": f"order-{number}",
            "x-sequence": number + 1,
        },
        body=body,
    )


def cost_us(run: Callable[[], object], messages: int, *, rounds: int) -> float:
    """Least CPU of several rounds: whatever else runs only adds to it."""
    costs = []
    for _ in range(rounds):
        started = time.process_time()
        run()
        costs.append((time.process_time() - started) / messages * 1e6)
    return min(costs)


def encoding_us(messages: list[Message], rounds: int) -> float:
    """Of `Encoder.encode`."""
    encode = Encoder(channel=1, exchange="", max_payload=131064).encode
    return cost_us(lambda: [encode(m) for m in messages], len(messages), rounds=rounds)


def accounting_us(confirms: list[tuple[int, bool]], count: int, rounds: int) -> float:
    """Of the ledger, for batches of 256 and these confirms, and of the list of outcomes."""
    ids = [str(n) for n in range(256)]
    outcome = Confirmed()

    def run() -> None:
        ledger, done = Ledger(), list[Batch]()
        for _ in range(count // 256):
            ledger.write(ids, 256 * 600, done.append)
        for tag, multiple in confirms:
            ledger.confirm(tag, multiple, True)
        outcomes: list[Any] = []
        for batch in done:
            assert batch.all_acked
            outcomes += [outcome] * len(batch.ids)
        assert len(outcomes) == count

    return cost_us(run, count, rounds=rounds)


def patterns(count: int) -> dict[str, list[tuple[int, bool]]]:
    """Confirms as brokers send them: a quorum queue many at once, a busy one with singles out of order between them."""
    singles = [(tag, False) for tag in range(1, count + 1)]
    swapped = singles[:]
    order = random.Random(7)
    for start in range(0, count, 64):
        part = swapped[start : start + 64]
        order.shuffle(part)
        swapped[start : start + 64] = part
    return {
        "multiple, each for 32": [(tag, True) for tag in range(32, count + 1, 32)],
        "multiple, each for 4": [(tag, True) for tag in range(4, count + 1, 4)],
        "one by one": singles,
        "one by one, out of order": swapped,
    }


async def whole_us(publisher: Publisher, messages: list[Message]) -> tuple[float, float]:
    """(CPU us a message of this process, messages a second), pages overlapping."""
    pages = [messages[start : start + PAGE] for start in range(0, len(messages), PAGE)]
    running: list[asyncio.Task[Any]] = []
    cpu, wall = time.process_time(), time.perf_counter()
    for page in pages:
        if len(running) == IN_FLIGHT:
            outcomes = await running.pop(0)
            assert all(isinstance(outcome, Confirmed) for outcome in outcomes)
        running.append(asyncio.create_task(publisher.publish(page)))
    for task in running:
        assert all(isinstance(outcome, Confirmed) for outcome in await task)
    wall = time.perf_counter() - wall
    return (time.process_time() - cpu) / len(messages) * 1e6, len(messages) / wall


Opener = Callable[..., Awaitable[Publisher]]
OPENERS: dict[str, Opener] = {"fast": FastPublisher.open, "stock": StockPublisher.open}


async def publishers(url: str, messages: list[Message], rounds: int, kind: str) -> dict[str, list[tuple[float, float]]]:
    """What each round of each publisher cost."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in OPENERS}
    connection = await aio_pika.connect(url)
    channel = await connection.channel()
    queue = await channel.declare_queue(QUEUE, durable=True, arguments={"x-queue-type": kind})
    try:
        for _ in range(rounds):
            for name, opener in OPENERS.items():
                settings = RabbitmqSettings(url=url)
                publisher = await opener(settings, confirm_timeout_s=60, name="bench", target=queues)
                try:
                    found[name].append(await whole_us(publisher, messages))
                finally:
                    await publisher.close()
                await queue.purge()
    finally:
        await queue.delete(if_unused=False, if_empty=False)
        await connection.close()
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
    messages = [message(n, b"x" * given.body) for n in range(given.messages)]
    print(f"encode                           {encoding_us(messages, given.rounds):8.2f} us CPU a message")
    for name, confirms in patterns(CONFIRMS).items():
        print(f"confirms {name:<24}{accounting_us(confirms, CONFIRMS, given.rounds):8.2f}")
    if given.pure:
        return
    with find_rabbitmq() as broker:
        url = broker.create_vhost(QUEUE)
        try:
            report(asyncio.run(publishers(url, messages, given.rounds, given.queue)))
        finally:
            broker.delete_vhost(QUEUE)


def report(found: dict[str, list[tuple[float, float]]]) -> None:
    """Medians of the rounds."""
    for name, rounds in found.items():
        cpu, rate = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"publish and confirm, {name:<12}{cpu:8.2f} us CPU a message {rate:10,.0f} messages/s")


if __name__ == "__main__":
    main()
