"""An inbox under test: publishes events as a relay would, runs the inbox in this process, waits for counts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import aiormq
import asyncpg
from aiormq import spec
from pydantic import SecretStr

from relay.inbox import Event, Inbox, Stats
from relay.message import TOMBSTONE, Row, to_message
from relay.postgres.connect import Connection
from relay.settings import DaemonSettings, InboxSettings, PostgresSettings, RabbitmqSettings, Settings

DEADLINE_S = 40.0
SOURCE = "shop"


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One event to publish."""

    seq: int | None
    aggregate: str = "1"
    event_type: str = "T"
    aggregate_type: str = "order"
    body: bytes = b"{}"
    id: int = 0


def stream(aggregate: str, n: int, **more: Any) -> list[Sent]:
    return [Sent(seq=seq, aggregate=aggregate, **more) for seq in range(1, n + 1)]


def tombstone(seq: int, aggregate: str = "1") -> Sent:
    return Sent(seq=seq, aggregate=aggregate, event_type=TOMBSTONE, body=b"")


@dataclass
class World:
    """One consumer `shop`: its settings, its database, its broker, what happened so far."""

    settings: Settings
    url: str
    db: Connection
    dsn: str
    total: Stats = field(default_factory=Stats)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    errors: list[BaseException] = field(default_factory=list)

    def committed(self, stats: Stats) -> None:
        self.total += stats
        self._notify = asyncio.ensure_future(self._announce())

    async def _announce(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def until(self, condition: Callable[[Stats], bool]) -> None:
        """Wait until the counts say so."""
        async with self.changed:
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await self.changed.wait_for(lambda: condition(self.total) or bool(self.errors))
            except TimeoutError:
                raise AssertionError(f"not reached: {self.total}") from None
        if self.errors:
            raise self.errors[0]

    async def publish(self, events: Sequence[Sent]) -> None:
        """Publish as the relay does, in this order."""
        async with self.channel() as channel:
            for sent in events:
                row = Row(
                    id=sent.id,
                    aggregate_type=sent.aggregate_type,
                    aggregate_id=None if sent.seq is None else sent.aggregate,
                    seq=sent.seq,
                    event_type=sent.event_type,
                    content_type="application/json",
                    headers={"traceparent": "00-x"},
                    routing_key=None,
                    created_at=datetime.now(UTC),
                    body=sent.body,
                )
                m = to_message(row, source=SOURCE, routing_key=f"{sent.aggregate_type}.{sent.event_type}")
                properties = spec.Basic.Properties(
                    message_id=m.message_id,
                    message_type=m.event_type,
                    app_id=m.source,
                    content_type=m.content_type,
                    timestamp=m.occurred_at,
                    headers=dict(m.headers),
                    delivery_mode=2,
                )
                await channel.basic_publish(
                    m.body, exchange="relay.events", routing_key=m.routing_key, properties=properties
                )

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[aiormq.abc.AbstractChannel]:
        connection = await aiormq.connect(self.url)
        try:
            yield await connection.channel(publisher_confirms=True)
        finally:
            await connection.close()

    async def effects(self, aggregate: str = "1") -> list[int]:
        """What the handler `record` did, in order."""
        return [
            r["seq"] for r in await self.db.fetch("SELECT seq FROM effect WHERE aggregate = $1 ORDER BY id", aggregate)
        ]

    async def held(self) -> list[tuple[int | None, str, str, int]]:
        rows = await self.db.fetch(
            "SELECT seq, reason, state, attempts FROM relay.inbox_held ORDER BY aggregate_id, seq"
        )
        return [tuple(r.values()) for r in rows]

    async def quarantine(self) -> list[str]:
        return [r["reason"] for r in await self.db.fetch("SELECT reason FROM relay.inbox_quarantine ORDER BY id")]

    @asynccontextmanager
    async def running(
        self, inbox: Inbox, *, consumers: int = 1, settings: Settings | None = None
    ) -> AsyncIterator[None]:
        """The inbox, running; stopped gracefully at the end, which must not fail."""
        stop = asyncio.Event()
        tasks = [
            asyncio.create_task(inbox.run(settings or self.settings, stop=stop, on_commit=self.committed))
            for _ in range(consumers)
        ]
        for task in tasks:
            task.add_done_callback(self._on_end)
        try:
            await eventually(lambda: self.are_subscribed(consumers))
            yield
        finally:
            stop.set()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            task.result()

    def _on_end(self, task: asyncio.Task[Stats]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.errors.append(error)
            self._notify = asyncio.ensure_future(self._announce())

    async def are_subscribed(self, n: int) -> bool:
        """Whether so many consumers are on the queue. Raises what ended one of them."""
        if self.errors:
            raise self.errors[0]
        try:
            async with self.channel() as channel:
                answer = await channel.queue_declare("shop", passive=True)
                return answer.consumer_count == n
        except aiormq.exceptions.AMQPError:
            return False

    async def queue_is_empty(self) -> bool:
        """Nothing ready and, since no consumer is left, nothing unacknowledged either."""
        async with self.channel() as channel:
            answer = await channel.queue_declare("shop", passive=True)
            return answer.message_count == 0


async def eventually(check: Callable[[], Awaitable[object]]) -> None:
    """Wait until a look at a server, which announces nothing, says yes."""
    async with asyncio.timeout(DEADLINE_S):
        while not await check():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def record(event: Event, tx: Connection) -> None:
    """The effect of an event: a row."""
    await tx.execute(
        "INSERT INTO effect (aggregate, seq, event_type) VALUES ($1, $2, $3)",
        event.aggregate_id,
        event.seq,
        event.event_type,
    )


def recording(name: str = "shop") -> Inbox:
    inbox = Inbox(name)
    inbox.on("T", "U")(record)
    return inbox


@asynccontextmanager
async def world(
    database: str, broker: str, *, client: Literal["fast", "stock"] = "fast", **inbox: Any
) -> AsyncIterator[World]:
    connection = await asyncpg.connect(database)
    await connection.execute(
        "CREATE TABLE effect (id bigint GENERATED ALWAYS AS IDENTITY, aggregate text, seq bigint, event_type text);"
    )
    values: dict[str, Any] = {"retry_first_s": 0.05, "retry_max_s": 0.1, "batch": 50, "prefetch": 100} | inbox
    settings = Settings(
        postgres=PostgresSettings(dsn=SecretStr(database)),
        rabbitmq=RabbitmqSettings(url=SecretStr(broker), client=client),
        inbox=InboxSettings(**values),
        daemon=DaemonSettings(backoff_first_s=0.05, backoff_max_s=0.2),
    )
    try:
        yield World(settings=settings, url=broker, db=connection, dsn=database)
    finally:
        await connection.close()
