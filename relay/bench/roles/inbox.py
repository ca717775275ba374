"""The inbox: the daemon itself with handlers of several kinds, and the bare statements that bound one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from relay.bench.parent import Meter, Parent
from relay.bench.stamps import now_ns, stamp_of
from relay.bench.workload import ROWS_EACH
from relay.inbox import Event, Inbox, Stats
from relay.inbox.database import PLANS
from relay.postgres.connect import Connection, connection
from relay.postgres.queries import query
from relay.settings import Settings


async def statements(settings: Settings, spec: Mapping[str, Any], parent: Parent) -> None:
    """The statement of the one-by-one handler, bare: one after the other on one connection with the inbox's settings, 500 a transaction."""
    meter, events, aggregates = Meter(), spec["events"], spec["aggregates"]
    async with connection(settings.postgres, application="relay bench", plans=PLANS) as opened:
        sql = query("bench_effect")
        await parent.go()
        with meter:
            for first in range(0, events, ROWS_EACH):
                async with opened.transaction():
                    for n in range(first, min(events, first + ROWS_EACH)):
                        await opened.execute(sql, str(n % aggregates), n // aggregates + 1)
    parent.tell_measured(meter, events=events)


async def apply(settings: Settings, spec: Mapping[str, Any], parent: Parent) -> None:
    """The inbox daemon with a `handler` of a kind: empty, statement, batch, or stamp (notes when an event was committed).

    With `deliveries` until so many were received and `events` applied; the first committed batch only starts the clock, so
    that connecting is not measured (unless it is the only one). Else until it is told `stop`; `count` asks how many are applied.
    """
    watch = _Watch(spec.get("deliveries"), spec["events"])
    inbox = Inbox("bench")
    HANDLERS[spec["handler"]](inbox, watch)
    if spec.get("deliveries") is not None:
        await parent.go()
        watch.meter.start()
        await inbox.run(settings, stop=watch.stop, on_commit=watch.committed)
        parent.tell_measured(watch.meter, events=watch.applied - watch.first)
        return
    async with asyncio.TaskGroup() as group:
        running = group.create_task(inbox.run(settings, stop=watch.stop, on_commit=watch.committed))
        await parent.go()
        watch.meter.start()
        while (word := await parent.word()) != "stop":
            if word == "count":
                parent.tell(applied=watch.applied)
        watch.meter.stop()
        watch.stop.set()
        await running
    parent.tell_measured(watch.meter, events=watch.applied, stamps=list(watch.stamps.items()))


class _Watch:
    """What was committed so far, and when enough is."""

    def __init__(self, deliveries: int | None, events: int) -> None:
        self.stop = asyncio.Event()
        self.meter = Meter()
        self.applied = self.first = 0
        self.handled: set[int] = set()  # stamps of the batch in hand
        self.stamps: dict[int, int] = {}
        self._received = 0
        self._deliveries = deliveries
        self._events = events

    def committed(self, stats: Stats) -> None:
        """After each committed batch."""
        self._received += stats.received
        self.applied += stats.applied
        if self._deliveries is None:
            now = now_ns()
            self.stamps.update((at, now) for at in self.handled)
            self.handled.clear()
            return
        self.meter.stop()
        if not self.first and 0 < self.applied < self._events:
            self.meter.start()
            self.first = self.applied
        if self._received >= self._deliveries and self.applied >= self._events:
            self.stop.set()


def _empty(inbox: Inbox, _: _Watch) -> None:
    @inbox.on("Measured")
    async def handle(event: Event, tx: Connection) -> None:
        """Nothing: the inbox's own cost."""


def _statement(inbox: Inbox, _: _Watch) -> None:
    sql = query("bench_effect")

    @inbox.on("Measured")
    async def handle(event: Event, tx: Connection) -> None:
        await tx.execute(sql, event.aggregate_id, event.seq)


def _batch(inbox: Inbox, _: _Watch) -> None:
    sql = query("bench_effects")

    @inbox.on_batch("Measured")
    async def handle(events: Sequence[Event], tx: Connection) -> None:
        await tx.execute(sql, [event.aggregate_id for event in events], [event.seq for event in events])


def _stamp(inbox: Inbox, watch: _Watch) -> None:
    @inbox.on("Measured")
    async def handle(event: Event, _: Connection) -> None:
        if (at := stamp_of(event.body)) is not None:
            watch.handled.add(at)


HANDLERS: Mapping[str, Callable[[Inbox, _Watch], None]] = {
    "empty": _empty,
    "statement": _statement,
    "batch": _batch,
    "stamp": _stamp,
}
