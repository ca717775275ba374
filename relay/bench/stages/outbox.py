"""Inserting, reading, publishing, and the relay that does the last two."""

from __future__ import annotations

from relay.bench.figures import MeasurementFailed, Result
from relay.bench.measure import Bench, declare_bound_queue, require_in_log, require_in_queue, require_published
from relay.bench.workload import Workload

_ONE_BY_ONE = 10
"""Of so many events one is inserted in a transaction of its own: an fsync each takes long enough."""


async def insert(bench: Bench, load: Workload, way: str) -> Result:
    """Events into an empty outbox, on one connection."""
    events = load.events if way != "one" else max(1, load.events // _ONE_BY_ONE)
    async with bench.servers.fresh() as settings:
        result = await bench.play(
            settings,
            "insert",
            stage="insert",
            variant=way,
            process="producers",
            served=events,
            way=way,
            events=events,
            rows_each=1 if way == "one" else load.rows_each,
            aggregates=load.aggregates,
            fill=load.fill,
        )
        await require_in_log(settings, events)
    _require(result, events)
    return result


async def read(bench: Bench, load: Workload) -> Result:
    """Ceiling: the relay's reader without publishing."""
    async with bench.servers.fresh(load) as settings:
        result = await bench.play(settings, "read", stage="read", variant="reader", process="relay", served=load.events)
    _require(result, load.events)
    return result


async def publish(bench: Bench, load: Workload, kind: str) -> Result:
    """Ceiling: the same messages (200 000 at most) through the same publisher, without the database."""
    events = load.ceiling_events
    async with bench.servers.fresh(load) as settings:
        await declare_bound_queue(settings, kind)
        result = await bench.play(
            settings, "publish", stage="publish", variant=kind, process="relay", served=events, events=events
        )
        await require_in_queue(settings, events)
    _require(result, events)
    return result


async def drain(bench: Bench, load: Workload, kind: str) -> Result:
    """The relay with `--drain`, confirmed into one bound queue that nobody consumes. `whole_s`: from its start to its end."""
    async with bench.servers.fresh(load) as settings:
        await declare_bound_queue(settings, kind)
        result = await bench.play(
            settings, "relay", stage="drain", variant=kind, process="relay", served=load.events, drain=True
        )
        await require_published(settings, load.events)
    _require(result, load.events)
    return result


def _require(result: Result, events: int) -> None:
    if result.events != events:
        raise MeasurementFailed(f"{result.stage} {result.variant}: {result.events} events of {events}")
