"""The inbox daemon: receive -> understand -> apply -> acknowledge after the commit, in crash-only sessions."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import structlog

from relay.errors import PostgresError, PostgresUnavailable, RelayError, UnreadableMessage
from relay.failpoints import Point, reached
from relay.inbox.appliers import Appliers
from relay.inbox.apply import Applier
from relay.inbox.charges import Suspects
from relay.inbox.database import Database
from relay.inbox.figures import Figures
from relay.inbox.handlers import Inbox
from relay.inbox.healing import Healing
from relay.inbox.intake import Intake, Taken
from relay.inbox.overlap import Overlap
from relay.inbox.pace import Pace
from relay.inbox.start import Start
from relay.inbox.stats import Stats
from relay.inbox.work import Rules
from relay.postgres.errors import postgres_errors
from relay.rabbitmq.contract import Consumer
from relay.rabbitmq.lanes import open_consumer
from relay.rabbitmq.queues import InboxQueue
from relay.services import beside
from relay.settings import Settings
from relay.supervisor import WRONG_AT_START, supervise, until_stopped

log = structlog.get_logger()

LOOK_INTERVAL_S = 10.0
"""Longest time between two looks for held messages that are due: another consumer may have left them, or an operator.
As often it is looked for held messages that wait although their turn has come."""

_IDLE_RETRY_S = 0.5
"""Least time between two retry passes when the first found nothing to do: somebody else is at it."""

_AHEAD = 2
"""Batches that are understood while one is at work, as far as the prefetch lets them come: one of the largest. With one of smaller ones,
the processor rested through the end of each transaction."""

_PURGE_INTERVAL_S = 60.0

OnCommit = Callable[[Stats], None]


async def run(
    inbox: Inbox, settings: Settings, *, stop: asyncio.Event | None = None, on_commit: OnCommit | None = None
) -> Stats:
    """Apply events with the handlers of `inbox` until `stop` is set; return what was done in all.

    With `inbox.mode = "store"` they are written into relay.inbox instead, and `inbox` is only the consumer's name.

    Reconnects by itself. After `stop` the batch in hand is finished and acknowledged, within `daemon.shutdown_grace_s`.
    `on_commit` is called after each committed batch with its counts, before the acknowledgement. Installs no signal
    handlers. Cancelling it rolls back what is not committed. Raises what waiting does not heal: SchemaError,
    PoolerError, ConfigError, at its start also PrivilegeError and PostgresRefused, and whatever `on_commit` raises.
    """
    daemon = _Daemon(inbox, settings, stop or asyncio.Event(), on_commit or (lambda _: None))
    await supervise(
        daemon.look, name="start", settings=settings.daemon, stop=daemon.stop, log=log, fatal=WRONG_AT_START
    )
    async with beside({"gaps": daemon.healing.run}, settings=settings.daemon, log=log):
        await supervise(daemon.session, name="inbox", settings=settings.daemon, stop=daemon.stop, log=log)
    return daemon.total


class _Daemon:
    def __init__(self, inbox: Inbox, settings: Settings, stop: asyncio.Event, on_commit: OnCommit) -> None:
        self.stop = stop
        self.total = Stats()
        self._settings = settings
        self._on_commit = on_commit
        self._start = Start(inbox, settings.inbox)
        self._rules = Rules(consumer=self._start.consumer, inbox=self._start.inbox, settings=settings.inbox)
        self._figures = Figures(self._rules.consumer, asyncio.get_running_loop().time)
        self._queue = InboxQueue(
            name=settings.inbox.queue or self._rules.consumer,
            bindings=settings.inbox.bindings,
            delivery_limit=settings.inbox.delivery_limit,
        )
        self.healing = Healing(
            settings, consumer=self._rules.consumer, queue=self._queue.name, policy=self._rules.policy
        )
        self._suspects = Suspects()
        self._overlap = Overlap()
        self._careful = 0  # messages still to be received one at a time, see _consume

    async def look(self) -> None:
        """Whether the database is there, has the schema and what the settings name, and lets us write."""
        await self._until_stopped(self._look())

    async def session(self) -> None:
        """One session, ended by `stop` (within the grace period) or by an error."""
        try:
            await self._until_stopped(self._session())
        except RelayError as exc:
            self._figures.failed(exc)
            raise

    async def _until_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        grace_s = self._settings.daemon.shutdown_grace_s
        await until_stopped(work, stop=self.stop, grace_s=grace_s, log=log)

    async def _look(self) -> None:
        async with self._database() as database:
            await Applier(database, self._rules).probe()
            with postgres_errors():
                await self._start.check(await database.connection())
                await self._figures.write(await database.connection())

    async def _session(self) -> None:
        """PostgreSQL first: while it cannot be written to, no message is taken, so none wears out its delivery limit."""
        async with AsyncExitStack() as stack:
            databases = [
                await stack.enter_async_context(self._database()) for _ in range(self._settings.inbox.appliers)
            ]
            applier = self._applier(databases)
            await applier.probe()
            while not self.stop.is_set():
                await self._consume(databases, applier)
            await self._figures.tell(await databases[0].connection())
        log.info("inbox_stopped", consumer=self._rules.consumer, applied=self.total.applied)

    def _applier(self, databases: Sequence[Database]) -> Applier | Appliers:
        """One for each database; what is known against messages is known to all of them."""
        appliers = [Applier(database, self._rules, self._suspects, self._overlap) for database in databases]
        return appliers[0] if len(appliers) == 1 else Appliers(appliers, self._rules)

    async def _consume(self, databases: Sequence[Database], applier: Applier | Appliers) -> None:
        """Until `stop`, or until what had to be received one at a time has been.

        A message that the client library cannot decode ends the connection, and so counts as a delivery of all that was
        on its way with it. The window it was in is therefore received one at a time: then only it comes nearer to the
        delivery limit, where the broker moves it to the queue for dead letters.
        """
        prefetch, limit = (1, self._careful) if self._careful else (self._settings.inbox.prefetch, None)
        try:
            async with self._consumer(prefetch) as consumer:
                log.info("inbox_started", consumer=self._rules.consumer, queue=self._queue.name, prefetch=prefetch)
                intake = Intake(consumer, ahead=_AHEAD * self._settings.inbox.most_in_batch, overlap=self._overlap)
                loop = _Loop(
                    self._settings, consumer, intake, databases, applier, self._figures, self.stop, self._count, limit
                )
                await loop.run()
        except UnreadableMessage:
            self._careful = self._settings.inbox.prefetch
            raise

    def _count(self, stats: Stats) -> None:
        self.total += stats
        if stats.early or stats.behind or stats.control:
            self.healing.expect()
        self._figures.count(stats)
        self._careful = max(0, self._careful - stats.received)
        self._on_commit(stats)

    @asynccontextmanager
    async def _database(self) -> AsyncIterator[Database]:
        consumer = self._rules.consumer
        database = Database(self._settings.postgres, application=f"relay inbox {consumer}", consumer=consumer)
        try:
            yield database
        except asyncio.CancelledError:
            database.discard()
            raise
        finally:
            await database.close()

    @asynccontextmanager
    async def _consumer(self, prefetch: int) -> AsyncIterator[Consumer]:
        consumer = await open_consumer(
            self._settings.rabbitmq,
            self._queue,
            prefetch=prefetch,
            name=f"relay inbox {self._rules.consumer} {socket.gethostname()}:{os.getpid()}",
        )
        try:
            yield consumer
        finally:
            await consumer.close()


class _Loop:
    """One session's loop. While a batch is applied, the next is received and understood, and the consumer buffers more."""

    def __init__(
        self,
        settings: Settings,
        consumer: Consumer,
        intake: Intake,
        databases: Sequence[Database],
        applier: Applier | Appliers,
        figures: Figures,
        stop: asyncio.Event,
        count: Callable[[Stats], None],
        limit: int | None = None,
    ) -> None:
        self._settings = settings
        self._consumer = consumer
        self._intake = intake
        self._databases = databases
        self._database = databases[0]
        self._applier = applier
        self._figures = figures
        self._stop = stop
        self._count = count
        self._clock = asyncio.get_running_loop().time
        self._left = limit
        self._pace = Pace(settings.inbox.most_in_batch)
        self._retry_at = 0.0
        self._sweep_at = 0.0
        self._purge_at = self._clock()

    async def run(self) -> None:
        """Until `stop`, or `limit` messages. Raises BrokerError or PostgresError when the session has ended."""
        async with self._intake.running():
            await self._run()

    async def _run(self) -> None:
        intake = self._intake
        with _waiting(self._stop.wait(), *(database.lost.wait() for database in self._databases)) as ending:
            receiving = asyncio.create_task(intake.wait())
            operated = asyncio.create_task(self._database.operated.wait())
            try:
                while not self._stop.is_set() and (self._left is None or self._left > 0):
                    await asyncio.wait(
                        [receiving, operated, *ending],
                        timeout=max(0.0, min(self._retry_at - self._clock(), self._figures.due_in_s)),
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                    if any(database.lost.is_set() for database in self._databases):
                        raise PostgresUnavailable("the connection to PostgreSQL broke")
                    if receiving.done() and not self._stop.is_set():
                        receiving.result()
                        await self._deliver(intake.take(self._pace.limit))
                        receiving = asyncio.create_task(intake.wait())
                    if operated.done():
                        self._database.operated.clear()
                        self._retry_at = self._sweep_at = 0.0
                        operated = asyncio.create_task(self._database.operated.wait())
                    await self._housekeeping()
            finally:
                receiving.cancel()
                operated.cancel()
                await asyncio.gather(receiving, operated, return_exceptions=True)

    async def _deliver(self, taken: Taken) -> None:
        """Apply, then acknowledge: a crash in between means a redelivery, which the cursors recognise."""
        reached(Point.RECEIVED)
        try:
            stats = await self._applier.apply(taken.batch)
        except PostgresError:
            self._count_done()
            raise
        self._pace.took(taken.received, self._applier.worked_s)
        self._count(stats + Stats(received=taken.received, batches=1))
        await self._consumer.acknowledge(taken.tag)
        reached(Point.ACKNOWLEDGED)
        if self._left is not None:
            self._left -= taken.received
        if stats.failed or self._applier.left_due:
            self._retry_at = min(self._retry_at, self._clock() + await self._due_in_s())

    def _count_done(self) -> None:
        """What is committed counts, though its deliveries come again: as duplicates."""
        if self._applier.done != Stats():
            self._count(replace(self._applier.done, batches=1))

    async def _housekeeping(self) -> None:
        """Retry what is due, forget what is old, tell how it goes; mostly a comparison with the clock."""
        if self._stop.is_set():
            return
        if self._clock() >= self._sweep_at:
            if await self._applier.sweep():
                self._retry_at = self._clock()
            self._sweep_at = self._clock() + LOOK_INTERVAL_S
        if self._clock() >= self._retry_at:
            try:
                did = await self._applier.retry_due(self._pace.limit) != Stats()
            finally:
                self._count_done()
            self._retry_at = self._clock() + max(await self._due_in_s(), 0.0 if did else _IDLE_RETRY_S)
        if self._clock() >= self._purge_at:
            await self._applier.purge_seen()
            self._purge_at = self._clock() + _PURGE_INTERVAL_S
        if self._figures.due_in_s <= 0:
            await self._figures.tell(await self._database.connection())

    async def _due_in_s(self) -> float:
        """Seconds until the earliest held message is due, by the database's clock, or until the next look."""
        due_s = await self._applier.next_due_s()
        return LOOK_INTERVAL_S if due_s is None else min(max(due_s, 0.0), LOOK_INTERVAL_S)


@contextmanager
def _waiting(*things: Awaitable[object]) -> Iterator[tuple[asyncio.Future[Any], ...]]:
    futures = tuple(asyncio.ensure_future(thing) for thing in things)
    try:
        yield futures
    finally:
        for future in futures:
            future.cancel()
