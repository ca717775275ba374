"""Producers: how fast events can be inserted, and inserting at a given rate."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from relay.bench.parent import Meter, Parent
from relay.bench.stamps import now_ns, stamp
from relay.postgres.connect import Connection, connection
from relay.postgres.queries import query
from relay.producer import NewEvent
from relay.producer.asyncpg import emit_many
from relay.settings import Settings

_HEAD_START_S = 0.05

_PLANS = {"plan_cache_mode": "force_generic_plan"}
"""For the statement of `produce`, as PostgreSQL would do by itself for a prepared one of VALUES: generate_series, which it takes for a thousand rows,
has it planned anew in each transaction, a sixth of the server's part that no producer would pay."""


async def insert(settings: Settings, spec: Mapping[str, Any], parent: Parent) -> None:
    """`events` on one connection as fast as they go: `way` is one (row a transaction), statement or emit_many."""
    meter = Meter()
    async with connection(settings.postgres, application="relay bench producer", plans={}) as opened:
        put = _WAYS[spec["way"]](opened, spec)
        rows = spec["rows_each"]
        await parent.go()
        with meter:
            for first in range(0, spec["events"], rows):
                await put(first, min(rows, spec["events"] - first))
    parent.tell_measured(meter, events=spec["events"])


Put = Callable[[int, int], Awaitable[object]]


def _statement(opened: Connection, spec: Mapping[str, Any]) -> Put:
    return lambda first, rows: opened.execute(query("bench_insert"), first, rows, spec["aggregates"], spec["fill"])


def _emit_many(opened: Connection, spec: Mapping[str, Any]) -> Put:
    """As a program would: the events are made, checked and encoded as well."""
    payload = {"fill": spec["fill"]}

    async def put(first: int, rows: int) -> None:
        async with opened.transaction():
            await emit_many(
                opened,
                [
                    NewEvent(
                        event_type="Measured",
                        aggregate_type="bench",
                        aggregate_id=str(n % spec["aggregates"]),
                        payload=payload,
                    )
                    for n in range(first, first + rows)
                ],
            )

    return put


_WAYS: Mapping[str, Callable[[Connection, Mapping[str, Any]], Put]] = {
    "one": _statement,
    "statement": _statement,
    "emit_many": _emit_many,
}


@dataclass(slots=True)
class _Book:
    """What the producers of this process did."""

    stamps: dict[int, int] = field(default_factory=dict)  # stamp -> when its commit was in hand, ns
    busy_s: float = 0.0  # sum over transactions
    late_s: float = 0.0  # the latest begin of a transaction, behind its time


async def produce(settings: Settings, spec: Mapping[str, Any], parent: Parent) -> None:
    """`transactions` at their times, whatever became of those before (open loop), over `connections` of this process.

    `per_s` transactions a second of this process, each one UPDATE and `rows_each` events of one aggregate. Of several
    processes each has an `index` of `processes`: its transactions and its connections are its own.
    """
    book, meter = _Book(), Meter()
    turns = iter(range(spec["transactions"]))
    async with AsyncExitStack() as stack:
        connections = [
            await stack.enter_async_context(
                connection(settings.postgres, application="relay bench producer", plans=_PLANS)
            )
            for _ in range(spec["connections"])
        ]
        await parent.go()
        begin = time.perf_counter() + _HEAD_START_S
        with meter:
            async with asyncio.TaskGroup() as group:
                for number, opened in enumerate(connections):
                    name = spec["index"] * len(connections) + number
                    group.create_task(_producer(opened, spec, turns, begin, name, book))
    parent.tell_measured(
        meter,
        events=spec["transactions"] * spec["rows_each"],
        busy_s=book.busy_s,
        late_s=book.late_s,
        stamps=list(book.stamps.items()),
    )


async def _producer(
    opened: Connection, spec: Mapping[str, Any], turns: Iterator[int], begin: float, name: int, book: _Book
) -> None:
    sql, fill, rows = query("bench_produce"), spec["fill"], spec["rows_each"]
    for turn in turns:
        due = begin + turn / spec["per_s"]
        if (early := due - time.perf_counter()) > 0:
            await asyncio.sleep(early)
        account = (turn * spec["processes"] + spec["index"]) % spec["aggregates"]
        started = time.perf_counter()
        at = stamp(name)
        await opened.execute(sql, account, rows, at, fill)
        book.stamps[at] = now_ns()
        book.busy_s += time.perf_counter() - started
        book.late_s = max(book.late_s, started - due)


def shares(total: int, parts: int) -> list[int]:
    """`total` in `parts` as equal as whole numbers can be."""
    whole, rest = divmod(total, parts)
    return [whole + (part < rest) for part in itertools.islice(itertools.count(), parts)]
