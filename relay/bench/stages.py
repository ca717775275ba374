"""The stages, each on a fresh database and virtual host, each returning figures and nothing else."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from relay.bench.workload import Workload
from relay.daemon import Outbox
from relay.inbox import Inbox
from relay.inbox.stats import Stats
from relay.message import Event
from relay.postgres.connect import Connection, connection
from relay.postgres.queries import query
from relay.rabbitmq.queues import InboxQueue, ensure_queue
from relay.rabbitmq.session import close, connect
from relay.rabbitmq.topology import exchange
from relay.settings import Settings

LATENCY_SAMPLES = 100


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the report."""

    stage: str
    events: int
    seconds: float  # wall clock
    note: str = ""
    p50_ms: float | None = None
    p99_ms: float | None = None

    @property
    def rate(self) -> float:
        """Events per second."""
        return self.events / self.seconds


async def insert(settings: Settings, workload: Workload) -> Result:
    """Fill the outbox: one statement per 500 events, each a transaction of its own."""
    async with connection(settings.postgres, application="relay bench") as opened:
        started = time.perf_counter()
        for _ in range(0, workload.events, 500):
            await opened.execute(query("bench_insert"), 500, workload.aggregates, workload.payload_bytes)
        return Result(
            "outbox insert", workload.events, time.perf_counter() - started, "one connection, 500 rows a statement"
        )


async def drain(settings: Settings, workload: Workload, *, queue_type: str) -> Result:
    """`relay run --drain` over what `insert` left, into a bound queue that nobody consumes."""
    async with _bound_queue(settings, queue_type):
        started = time.perf_counter()
        await Outbox(settings).run(drain=True)
        return Result(
            "relay drain", workload.events, time.perf_counter() - started, f"confirmed, into one {queue_type} queue"
        )


async def apply(settings: Settings, workload: Workload, *, statements: bool) -> Result:
    """`relay inbox run` over what the outbox put into its queue; with `statements`, one INSERT for each message."""
    inbox = Inbox("bench")

    @inbox.on("Measured")
    async def handle(event: Event, tx: Connection) -> None:
        if statements:
            await tx.execute(query("bench_effect"), event.aggregate_id, event.seq)

    async with connection(settings.postgres, application="relay bench") as opened:
        await opened.execute(query("bench_effects"))
    await _fill_queue(settings, workload)
    finished, stop = 0, asyncio.Event()

    def count(stats: Stats) -> None:
        nonlocal finished
        finished += stats.applied
        if finished >= workload.events:
            stop.set()

    started = time.perf_counter()
    await inbox.run(settings, stop=stop, on_commit=count)
    note = "one statement a message" if statements else "an empty handler"
    return Result("inbox apply", workload.events, time.perf_counter() - started, note)


async def wake(settings: Settings) -> Result:
    """One event at a time while the relay is asleep: from the producer's INSERT to the handler's commit."""
    inbox = Inbox("bench")
    committed = asyncio.Event()

    @inbox.on("Measured")
    async def handle(event: Event, tx: Connection) -> None:
        """Nothing to do: the commit is what is measured."""

    def count(stats: Stats) -> None:
        if stats.applied:
            committed.set()

    outbox, stop = Outbox(settings), asyncio.Event()
    delays: list[float] = []
    async with asyncio.TaskGroup() as group, connection(settings.postgres, application="relay bench") as producer:
        group.create_task(outbox.run())
        group.create_task(inbox.run(settings, stop=stop, on_commit=count))
        started = time.perf_counter()
        for sample in range(LATENCY_SAMPLES + 1):
            await _asleep(outbox, sample + 1)
            committed.clear()
            begun = time.perf_counter()
            await producer.execute(query("bench_insert"), 1, 1, 256)
            await committed.wait()
            delays.append(time.perf_counter() - begun)
        seconds = time.perf_counter() - started
        outbox.stop.set()
        stop.set()
    ordered = sorted(d * 1000 for d in delays[1:])  # the first one also waits for the inbox to connect
    return Result(
        "asleep to handler commit",
        LATENCY_SAMPLES,
        seconds,
        "one event at a time",
        p50_ms=statistics.median(ordered),
        p99_ms=ordered[int(len(ordered) * 0.99) - 1],
    )


async def _asleep(outbox: Outbox, times: int) -> None:
    """Wait until the relay has fallen asleep that many times."""
    await outbox.started.wait()
    progress = outbox.progress[0]
    while progress.sleeps < times:
        progress.changed.clear()
        if progress.sleeps < times:
            await progress.changed.wait()


async def _fill_queue(settings: Settings, workload: Workload) -> None:
    """Declare the inbox's queue as it would itself, and let the relay fill it."""
    broker = await connect(settings.rabbitmq, name="relay bench")
    try:
        inbox = settings.inbox
        await ensure_queue(
            broker,
            settings.rabbitmq,
            InboxQueue(name="bench", bindings=inbox.bindings, delivery_limit=inbox.delivery_limit),
        )
    finally:
        await close(broker)
    await insert(settings, workload)
    await Outbox(settings).run(drain=True)


@asynccontextmanager
async def _bound_queue(settings: Settings, queue_type: str) -> AsyncIterator[None]:
    broker = await connect(settings.rabbitmq, name="relay bench")
    try:
        channel = await broker.channel()
        target = await exchange(channel, settings.rabbitmq)
        queue = await channel.declare_queue("bench", durable=True, arguments={"x-queue-type": queue_type})
        await queue.bind(target, "#")
        yield
    finally:
        await close(broker)
