"""The laboratory in small: one process, shared servers, one fault that is told as a story; the same tables, the same checker.

For what must be over in a second: mutants of the product, each of which one story kills. Gaps are not repaired in a scene: repair
would heal what many mutants break, and so hide them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel

from relay.daemon import Outbox
from relay.rabbitmq.queues import InboxQueue, ensure_queue
from relay.rabbitmq.session import close, connect
from relay.settings import Settings
from tests.faults.lab import collect, cursor_log, effects, workload
from tests.faults.lab.amqp_proxy import AmqpProxy
from tests.faults.lab.checker import Verdict, judge
from tests.faults.lab.evidence import Evidence
from tests.faults.lab.postgres_proxy import PostgresProxy
from tests.faults.lab.stage import with_port
from tests.faults.lab.verdict import Limits
from tests.faults.lab.witness import Witness
from tests.faults.lab.workload import Booking
from tests.harness.outbox import connected, settings_for, until

SETTLE_S = 6.0
"""Longest time until everything is applied. With nothing wrong it is a fraction of a second, and more on a machine that is busy:
whoever expects nothing wrong has more patience."""

_LIMITS = Limits(quiet_wait_s=120, margin_s=1e6)
"""A story holds events up by itself, and tells no fault to the checker: how long one waits, or that one is sent again, proves nothing here."""


@dataclass
class Scene:
    """One producer's database, one consumer's, one virtual host; proxies in front of the broker and the consumer's database."""

    producer_dsn: str
    consumer_dsn: str
    url: str
    broker: AmqpProxy  # what the relay connects through
    consumer_pg: PostgresProxy
    witness: Witness
    consumer_port: int
    relay_port: int
    tokens: set[str] = field(default_factory=set)
    expected_conflicts: int = 0
    settle_s: float = SETTLE_S
    began: float = field(default_factory=time.time)
    _counter: int = 0
    _dice: random.Random = field(default_factory=lambda: random.Random(0))

    def relay_settings(self, *, through_proxy: bool = True, **flags: Any) -> Settings:
        """Quick, and without repair."""
        url = with_port(self.url, self.relay_port) if through_proxy else self.url
        return settings_for(
            self.producer_dsn,
            url,
            **{
                "outbox__repair": False,
                "outbox__poll_interval_s": 60,  # nobody is woken by chance
                "outbox__standby_interval_s": 0.05,
                "outbox__retry_first_s": 0.1,
                "outbox__retry_max_s": 0.2,
                "daemon__backoff_first_s": 0.05,
                "daemon__backoff_max_s": 0.2,
                "daemon__log_level": "error",
            }
            | flags,
        )

    @property
    def consumer_settings(self) -> Settings:
        """The same for the consumer."""
        return settings_for(
            with_port(self.consumer_dsn, self.consumer_port),
            self.url,
            inbox__consumer="effects",
            inbox__repair=False,
            inbox__retry_first_s=0.1,
            daemon__backoff_first_s=0.05,
            daemon__backoff_max_s=0.2,
            daemon__log_level="error",
        )

    def booking(self, aggregate: str) -> Booking:
        """The next event of an aggregate (`account/a1`)."""
        self._counter += 1
        kind, _, name = aggregate.partition("/")
        token = f"scene-{self._counter}"
        self.tokens.add(token)
        return Booking(kind=kind, aggregate=name, token=token, amount=self._dice.randint(1, 1000), padding="x")

    async def book(self, *aggregates: str, connection: Any = None) -> None:
        """An event of each, in one transaction, or in the transaction of `connection`, which is the caller's to end."""
        if connection is not None:
            await workload.write(connection, [self.booking(aggregate) for aggregate in aggregates])
            return
        async with connected(self.producer_dsn) as own, own.transaction():
            await workload.write(own, [self.booking(aggregate) for aggregate in aggregates])

    async def book_long_ago(self, aggregate: str, slot: int, connection: Any) -> None:
        """An event as it was written six days ago, in the caller's transaction."""
        booking = self.booking(aggregate)
        insert = (
            "INSERT INTO relay.outbox (slot, created_at, aggregate_type, aggregate_id, event_type, payload)"
            " VALUES ($1, now() - interval '6 days', $2, $3, 'Booked', $4) RETURNING seq"
        )
        seq = await connection.fetchval(insert, slot, booking.kind, booking.aggregate, booking.payload)
        await workload.log(connection, [(booking, seq)])

    @asynccontextmanager
    async def relay(self, settings: Settings | None = None) -> AsyncIterator[Outbox]:
        """The outbox daemon, stopped at the end. What ends it before is the verdict's matter: a mutant may well fail."""
        outbox = Outbox(settings or self.relay_settings())
        async with _running(outbox.run(), outbox.stop):
            yield outbox

    @asynccontextmanager
    async def consumer(self) -> AsyncIterator[None]:
        """The inbox daemon with the laboratory's handler."""
        stop = asyncio.Event()
        async with _running(effects.inbox.run(self.consumer_settings, stop=stop), stop):
            yield

    async def declare(self, *bindings: str) -> None:
        """The consumer's queue, before any consumer is there."""
        settings = self.consumer_settings
        session = await connect(settings.rabbitmq, name="scene")
        try:
            await ensure_queue(
                session,
                settings.rabbitmq,
                InboxQueue(name="effects", bindings=bindings, delivery_limit=settings.inbox.delivery_limit),
            )
        finally:
            await close(session)

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[AbstractChannel]:
        """Straight to the broker."""
        connection = await aio_pika.connect(self.url)
        async with connection:
            yield await connection.channel()

    async def waiting(self, queue: str = "effects") -> int:
        """Messages that are ready in a queue."""
        async with self.channel() as channel:
            return (await channel.declare_queue(queue, passive=True)).declaration_result.message_count or 0

    async def applied(self) -> int:
        """Effects so far."""
        async with connected(self.consumer_dsn) as db:
            return int(await db.fetchval("SELECT count(*) FROM effect"))

    async def all_applied(self) -> None:
        """Wait for it within the story: what was committed so far."""
        async with connected(self.producer_dsn) as db:
            expected = await db.fetchval("SELECT count(*) FROM txn_log")

        async def done() -> bool:
            return await self.applied() >= int(expected)

        await until(done, timeout_s=self.settle_s)

    async def verdict(self) -> Verdict:
        """Wait until all is applied, or can be expected to be, and judge."""
        ended = time.time()
        settled = None
        with contextlib.suppress(TimeoutError):
            await until(self._is_settled, timeout_s=self.settle_s, every_s=0.05)
            settled = time.time()
        async with connected(self.producer_dsn) as producer, connected(self.consumer_dsn) as consumer:
            committed = await collect.committed(producer)
            return judge(
                Evidence(
                    seed=0,
                    profile="scene",
                    began=self.began,
                    ended=ended,
                    settled=settled,
                    committed=committed,
                    undone=frozenset(self.tokens - {c.token for c in committed}),
                    effects=await collect.applied(consumer),
                    balances=await collect.balances(consumer),
                    witnessed=self.witness.messages,
                    unwitnessed_types=collect.UNWITNESSED,
                    leftovers=await collect.leftovers(producer, consumer, {"effects": await self.waiting()}),
                    expected_conflicts=self.expected_conflicts,
                    stale_checkpoints=await cursor_log.stale(producer),
                ),
                limits=_LIMITS,
            )

    async def _is_settled(self) -> bool:
        async with connected(self.producer_dsn) as producer, connected(self.consumer_dsn) as consumer:
            committed = await producer.fetchval("SELECT count(*) FROM txn_log")
            left = await collect.leftovers(producer, consumer, {"effects": await self.waiting()})
        if any((left.parked, left.unread, left.held, left.gaps, left.queued)):
            return False
        audited = {m.token for m in self.witness.messages}
        return bool(await self.applied() >= committed and left.conflicts >= self.expected_conflicts and audited)


@asynccontextmanager
async def scene(producer_dsn: str, consumer_dsn: str, url: str) -> AsyncIterator[Scene]:
    """Everything but the daemons, which a story starts."""
    async with AsyncExitStack() as stack:
        async with connected(producer_dsn) as db:
            await db.execute(workload.TABLES + cursor_log.TABLES)
        async with connected(consumer_dsn) as db:
            await db.execute(effects.TABLES)
        broker, database = AmqpProxy(_port(url)), PostgresProxy(_port(consumer_dsn))
        ports = []
        for proxy in (broker, database):
            stack.push_async_callback(proxy.close)
            ports.append(await proxy.start())
        witness = Witness(url)
        watching = asyncio.create_task(witness.run())
        stack.push_async_callback(_cancelled, watching)
        async with asyncio.timeout(30):
            await witness.ready.wait()
        yield Scene(
            producer_dsn=producer_dsn,
            consumer_dsn=consumer_dsn,
            url=url,
            broker=broker,
            consumer_pg=database,
            witness=witness,
            relay_port=ports[0],
            consumer_port=ports[1],
        )


@asynccontextmanager
async def _running(work: Any, stop: asyncio.Event) -> AsyncIterator[None]:
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        stop.set()
        await asyncio.wait([task], timeout=20)
        await _cancelled(task)


async def _cancelled(task: asyncio.Future[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _port(address: str) -> int:
    return int(address.rpartition("@")[2].partition("/")[0].rpartition(":")[2])
