"""The outbox daemon's wiring, top to bottom: settings -> connections -> owner of the shard -> read, publish, checkpoint."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog

from relay.errors import ConfigError, RelayError, SchemaError
from relay.outbox.lease import Ownership, wait_for_ownership
from relay.outbox.marks import MarksService, Pace
from relay.outbox.progress import Failure, Progress
from relay.outbox.reader import Reader
from relay.outbox.repair import Repair
from relay.outbox.retention import Retention
from relay.outbox.shard import Shard
from relay.outbox.store import Store
from relay.outbox.wakeup import Wakeup
from relay.postgres.connect import Connection, connection
from relay.postgres.errors import postgres_errors
from relay.postgres.migrate import require_current
from relay.postgres.planning import Planning
from relay.postgres.queries import query
from relay.rabbitmq.contract import Publisher
from relay.rabbitmq.lanes import open_publisher
from relay.services import Service, beside
from relay.settings import Settings
from relay.supervisor import WRONG_AT_START, supervise, until_stopped

log = structlog.get_logger()


@dataclass(slots=True)
class Outbox:
    """The outbox daemon as an object, for a program that embeds it; `relay run` is this and signals.

    `stop` ends it: what is in flight is confirmed and checkpointed within `daemon.shutdown_grace_s`.
    """

    settings: Settings
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    progress: dict[int, Progress] = field(default_factory=dict)  # by shard, complete once `started` is set
    started: asyncio.Event = field(default_factory=asyncio.Event)
    parked: int = 0  # rows left parked when it ended
    marks_pace: Pace = field(default_factory=Pace)  # how often inboxes are told how far it has published
    retention: Retention = field(init=False)  # remembers over sessions which slots to leave alone for a while

    def __post_init__(self) -> None:
        self.retention = Retention(
            lambda: connection(self.settings.postgres, application="relay retention"),
            retention_s=self.settings.outbox.retention_s,
        )

    @property
    def paused(self) -> bool:
        """True when an operator paused a shard: what is not published of it was not even read."""
        return any(progress.shard_is_paused for progress in self.progress.values())

    async def run(self, *, drain: bool = False) -> None:
        """Publish until `stop` is set; with `drain`, until nothing is left. Raises RelayError for what waiting does not heal."""
        source = self.settings.source
        if source is None:
            raise ConfigError(
                'the setting source is missing: the name under which this outbox is published, for example source = "shop"'
            )
        shards = await self._shards()
        self.progress = {shard: Progress() for shard in shards}
        self.started.set()
        with _one_error():
            async with asyncio.TaskGroup() as group:
                for shard in shards:
                    group.create_task(self._supervised(shard, source, drain), name=f"shard-{shard}")

    async def _shards(self) -> list[int]:
        """The shards of the log. The server may still be starting: the supervisor's patience covers that too."""
        found: list[int] = []

        async def look() -> None:
            async with connection(self.settings.postgres, application="relay start") as opened:
                await require_current(opened)
                with postgres_errors():
                    await opened.execute(query("probe_outbox"))
                    found.extend(r["shard"] for r in await opened.fetch(query("list_shards")))
                if not found:
                    raise SchemaError(
                        "relay.outbox_cursor is empty: nobody would publish anything. Restore its row, see README, Restore."
                    )

        async def patiently() -> None:
            await self._until_stopped(look())

        await supervise(
            patiently, name="start", settings=self.settings.daemon, stop=self.stop, log=log, fatal=WRONG_AT_START
        )
        return found

    async def _supervised(self, shard: int, source: str, drain: bool) -> None:
        async def session() -> None:
            try:
                await self._until_stopped(self._session(shard, source, drain))
            except RelayError as exc:
                at = asyncio.get_running_loop().time()
                self.progress[shard].failure = Failure(f"{type(exc).__name__}: {exc}", at)
                raise

        await supervise(session, name=f"shard-{shard}", settings=self.settings.daemon, stop=self.stop, log=log)

    async def _until_stopped(self, session: Coroutine[Any, Any, None]) -> None:
        await until_stopped(session, stop=self.stop, grace_s=self.settings.daemon.shutdown_grace_s, log=log)

    async def _session(self, shard: int, source: str, drain: bool) -> None:
        settings = self.settings.outbox
        async with self._connection("lease", shard) as lease:
            ownership = await wait_for_ownership(
                lease, shard=shard, source=source, interval_s=settings.standby_interval_s, stop=self.stop
            )
            if ownership is None:
                return
            wakeup = Wakeup(lease, shard=shard)
            await wakeup.listen()
            async with (
                beside({} if drain else self._services(ownership, source), settings=self.settings.daemon, log=log),
                self._connection("reader", shard) as reading,
            ):
                # One session for both: a position is written to the server that it was read from, whatever became of the other one.
                planning = Planning(reading)
                store = Store(reading, shard=shard, epoch=ownership.epoch, settings=settings, planning=planning)
                await self._tell_failure(store, shard)  # before the broker is asked: it may be down for long
                async with self._publisher(shard) as publisher, _waker(wakeup, self.stop, publisher):
                    reader = self._reader(shard, reading, planning)
                    pipeline = self._pipeline(ownership, reader, store, publisher, wakeup, source)
                    self.parked = await pipeline.run(drain=drain)
                if drain and shard == 0:
                    await self._sweep_once()
        log.info(
            "drained" if drain else "stopped", shard=shard, published=self.progress[shard].published, parked=self.parked
        )

    async def _sweep_once(self) -> None:
        """For a log that is only ever drained, by a timer: its slots are to be emptied as well."""
        try:
            await self.retention.sweep()
        except RelayError as exc:
            log.warning("service_failed", service="retention", error=type(exc).__name__, reason=str(exc))

    async def _tell_failure(self, store: Store, shard: int) -> None:
        """Write down what ended the session before, for `relay status`."""
        failure = self.progress[shard].failure
        if failure is not None:
            await store.note_failure(failure.error, asyncio.get_running_loop().time() - failure.at)
            self.progress[shard].failure = None

    def _services(self, ownership: Ownership, source: str) -> dict[str, Service]:
        """What the owner of a shard does beside publishing, by name: see relay.services."""
        services: dict[str, Service] = {}
        if ownership.shard == 0:  # the ring is the whole log's, not a shard's
            services["retention"] = self.retention.run
        if self.settings.outbox.repair:
            recent = self.progress[ownership.shard].recent
            services["repair"] = Repair(self.settings, source=source).run
            services["marks"] = MarksService(
                self.settings, shard=ownership.shard, source=source, recent=recent, pace=self.marks_pace
            ).run
        return services

    def _reader(self, shard: int, reading: Connection, planning: Planning) -> Reader:
        limits = self.settings.outbox
        return Reader(reading, shard=shard, page_rows=limits.page_rows, page_bytes=limits.page_bytes, planning=planning)

    def _pipeline(
        self,
        ownership: Ownership,
        reader: Reader,
        store: Store,
        publisher: Publisher,
        wakeup: Wakeup,
        source: str,
    ) -> Shard:
        return Shard(
            ownership=ownership,
            reader=reader,
            store=store,
            publisher=publisher,
            probe=lambda: self._publisher(ownership.shard),
            wakeup=wakeup,
            settings=self.settings.outbox,
            source=source,
            progress=self.progress[ownership.shard],
            stop=self.stop,
        )

    def _connection(self, role: str, shard: int) -> AbstractAsyncContextManager[Connection]:
        return connection(self.settings.postgres, application=f"relay {role} {shard}")

    @asynccontextmanager
    async def _publisher(self, shard: int) -> AsyncIterator[Publisher]:
        publisher = await open_publisher(
            self.settings.rabbitmq,
            confirm_timeout_s=self.settings.outbox.confirm_timeout_s,
            name=f"relay {self.settings.source} shard {shard} {socket.gethostname()}:{os.getpid()}",
        )
        try:
            yield publisher
        finally:
            await publisher.close()


@asynccontextmanager
async def _waker(wakeup: Wakeup, stop: asyncio.Event, publisher: Publisher) -> AsyncIterator[None]:
    """Within it, a sleeping shard gets up when it is told to stop, and when the broker goes away."""

    async def wake_after(event: Callable[[], Coroutine[Any, Any, object]]) -> None:
        # Called here and not by the caller: a session that ends at once cancels this before its first step.
        await event()
        wakeup.interrupt()

    tasks = [asyncio.create_task(wake_after(stop.wait)), asyncio.create_task(wake_after(publisher.wait_lost))]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def _one_error() -> Iterator[None]:
    """A group of shards fails with the first error, told as itself: it names what to do."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from group
