"""The outbox: raw reading of the log, and the relay itself, in a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from relay.bench.figures import MeasurementFailed
from relay.bench.parent import Meter, Parent
from relay.bench.stamps import now_ns, stamp_of
from relay.daemon import Outbox
from relay.message import Message
from relay.outbox.cursor import Page, Position, Snapshot
from relay.outbox.reader import Reader
from relay.postgres.connect import Connection, connection
from relay.postgres.planning import Planning
from relay.rabbitmq.contract import Confirmed, Outcome, Publisher
from relay.settings import Settings

_BEGINNING = Position(Snapshot.parse("1:1:"))  # what a new relay.outbox_cursor says


async def read(settings: Settings, _: Mapping[str, Any], parent: Parent) -> None:
    """Read the whole log with the relay's reader, in the relay's pages, and do nothing with it."""
    meter, rows = Meter(), 0
    async with connection(settings.postgres, application="relay bench") as opened:
        await parent.go()
        with meter:
            async for page in pages(settings, opened):
                rows += len(page.rows)
    parent.tell_measured(meter, events=rows)


async def pages(settings: Settings, opened: Connection) -> AsyncIterator[Page]:
    """The log from its beginning, as the relay reads it."""
    reader = Reader(
        opened,
        shard=0,
        page_rows=settings.outbox.page_rows,
        page_bytes=settings.outbox.page_bytes,
        planning=Planning(opened),
    )
    position = _BEGINNING
    while True:
        page = await reader.read(position)
        yield page
        if page.complete:
            return
        position = position.after(page)


async def relay(settings: Settings, spec: Mapping[str, Any], parent: Parent) -> None:
    """The outbox daemon.

    With `drain` until nothing is left: measured from when the broker is connected to the last confirm, and as a whole. Else until it is told `stop`; `count` asks how many are confirmed and how often it
    fell asleep. `stamps`: tell for every stamped event when its confirm was in hand.
    """
    watched = _Watched(settings, stamps=bool(spec.get("stamps")))
    if not spec["drain"]:
        await _live(watched, parent)
        return
    await parent.go()
    whole = Meter()
    with whole:
        await watched.run(drain=True)
    parent.tell_measured(watched.meter, events=watched.confirmed, whole_s=whole.seconds)


async def _live(watched: _Watched, parent: Parent) -> None:
    async with asyncio.TaskGroup() as group:
        running = group.create_task(watched.run())
        await _until_asleep(watched)
        meter = Meter()
        await parent.go()
        meter.start()
        while (word := await parent.word()) != "stop":
            if word == "count":
                parent.tell(confirmed=watched.confirmed, sleeps=watched.sleeps)
        meter.stop()
        watched.stop.set()
        await running
    parent.tell_measured(meter, events=watched.confirmed, sleeps=watched.sleeps, stamps=list(watched.stamps.items()))


async def _until_asleep(watched: _Watched) -> None:
    """Connected, and nothing to do: what is measured begins with an awakening, as it does in life."""
    await watched.started.wait()
    progress = watched.progress[0]
    while not progress.sleeps:
        progress.changed.clear()
        await progress.changed.wait()


class _Watched(Outbox):
    """The daemon as it is, with somebody who looks at what its publisher answers."""

    def __init__(self, settings: Settings, *, stamps: bool) -> None:
        super().__init__(settings)
        self.meter = Meter()  # from the connected broker to the last confirm
        self.confirmed = 0
        self.stamps: dict[int, int] = {}
        self._stamping = stamps

    @property
    def sleeps(self) -> int:
        """How often it fell asleep."""
        return self.progress[0].sleeps

    def saw(self, messages: Sequence[Message], outcomes: Sequence[Outcome]) -> None:
        """Outcomes are in hand. Raises MeasurementFailed for any that is not a confirm."""
        for outcome in outcomes:
            if not isinstance(outcome, Confirmed):
                raise MeasurementFailed(f"a message was not confirmed: {outcome}")
        self.confirmed += len(outcomes)
        self.meter.stop()
        if self._stamping:
            now = now_ns()
            self.stamps.update((at, now) for m in messages if (at := stamp_of(m.body)))

    @asynccontextmanager
    async def _publisher(self, shard: int) -> AsyncIterator[Publisher]:
        async with Outbox._publisher(self, shard) as publisher:
            if not self.confirmed:  # not a later session, nor one that only tries a parked row
                self.meter.start()
            yield _Seen(publisher, self)


class _Seen:
    """A publisher, and somebody who sees what it answers."""

    def __init__(self, inner: Publisher, watched: _Watched) -> None:
        self._inner = inner
        self._watched = watched

    async def publish(self, messages: Sequence[Message]) -> list[Outcome]:
        outcomes = await self._inner.publish(messages)
        self._watched.saw(messages, outcomes)
        return outcomes

    @property
    def lost(self) -> BaseException | None:
        return self._inner.lost

    async def wait_lost(self) -> None:
        await self._inner.wait_lost()

    @property
    def message_is_suspect(self) -> bool:
        return self._inner.message_is_suspect

    async def close(self) -> None:
        await self._inner.close()
