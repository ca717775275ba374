"""Reads retained rows by their place in the sequence, to send them again: what can be sent, and what is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from relay.control import Range
from relay.message import Aggregate, Row
from relay.outbox.reader import to_row
from relay.postgres.connect import Connection
from relay.postgres.errors import postgres_errors
from relay.postgres.queries import query

PORTION = 500
"""Numbers looked up by one statement."""

PORTION_BYTES = 8 * 1024 * 1024
"""Most bytes of content fetched by one statement (its first row always fits)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a retained row is, and how large."""

    shard: int
    id: int
    size: int


@dataclass(frozen=True, slots=True)
class Known:
    """What exists of some ranges, published or not."""

    ranges: list[Range]  # cut to numbers that exist
    unknown: list[Range]  # of aggregates that nobody ever wrote to
    beyond: list[Range]  # cut to numbers that have not been given out


@dataclass(slots=True)
class Survey:
    """What the log says to some ranges. Numbers that are neither sendable nor gone will be published in their own time."""

    sendable: list[Place] = field(default_factory=list)  # published and not parked, in the order asked for
    gone: list[Range] = field(default_factory=list)  # were published, and are not retained any more


class Retained:
    """The log, asked by aggregate and number, over a connection that nobody else uses. Raises PostgresError."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def known(self, ranges: Iterable[Range], *, numbers: int) -> Known:
        """What exists of these ranges, `numbers` of them at most."""
        wanted = list(ranges)
        last = await self._last_numbers({r.aggregate for r in wanted})
        known: list[Range] = []
        beyond = [
            replace(r, from_seq=max(r.from_seq, last[r.aggregate] + 1))
            for r in wanted
            if r.to_seq > last.get(r.aggregate, r.to_seq)
        ]
        for r in wanted:
            to_seq = min(r.to_seq, last.get(r.aggregate, 0), r.from_seq + numbers - 1)
            if to_seq >= r.from_seq and numbers > 0:
                known.append(replace(r, to_seq=to_seq))
                numbers -= len(known[-1])
        return Known(known, [r for r in wanted if r.aggregate not in last], beyond)

    async def survey(self, ranges: Sequence[Range]) -> Survey:
        """What the log still has of ranges that `known` returned, PORTION numbers of them at most."""
        with postgres_errors():
            records = await self._connection.fetch(
                query("retained_numbers"),
                [r.aggregate_type for r in ranges],
                [r.aggregate_id for r in ranges],
                [r.from_seq for r in ranges],
                [r.to_seq for r in ranges],
            )
        present: list[set[int]] = [set() for _ in ranges]
        places: dict[int, Place] = {}
        for r in records:
            present[r["n"] - 1].add(r["seq"])
            if r["published"]:
                places[r["id"]] = Place(r["shard"], r["id"], r["size"])
        gone = [hole for r, found in zip(ranges, present, strict=True) for hole in holes(r, found)]
        return Survey(list(places.values()), gone)

    async def rows(self, places: Sequence[Place]) -> list[Row]:
        """The contents, in this order; what has been emptied meanwhile is left out."""
        with postgres_errors():
            records = await self._connection.fetch(
                query("retained_rows"), [p.shard for p in places], [p.id for p in places]
            )
        return [to_row(r) for r in records]

    async def _last_numbers(self, aggregates: set[Aggregate]) -> dict[Aggregate, int]:
        keys = sorted(aggregates)
        with postgres_errors():
            records = await self._connection.fetch(query("last_numbers"), [k[0] for k in keys], [k[1] for k in keys])
        return {(r["aggregate_type"], r["aggregate_id"]): r["last_seq"] for r in records}


class Rate:
    """At most so many rows a second: live traffic goes first."""

    def __init__(self, rows_per_s: float) -> None:
        self._rows_per_s = rows_per_s
        self._clock = asyncio.get_running_loop().time
        self._free_at = self._clock()

    async def take(self, rows: int) -> None:
        """Wait until so many rows may be sent."""
        now = self._clock()
        self._free_at = max(self._free_at, now) + rows / self._rows_per_s
        await asyncio.sleep(max(0.0, self._free_at - rows / self._rows_per_s - now))


def holes(wanted: Range, present: Iterable[int]) -> Iterator[Range]:
    """The parts of a range that are not present, in order."""
    start = wanted.from_seq
    for seq in sorted(present):
        if seq > start:
            yield replace(wanted, from_seq=start, to_seq=seq - 1)
        start = seq + 1
    if start <= wanted.to_seq:
        yield replace(wanted, from_seq=start)


def portions(ranges: Iterable[Range], numbers: int = PORTION) -> Iterator[list[Range]]:
    """The same ranges, cut so that each portion has at most so many numbers."""
    portion: list[Range] = []
    left = numbers
    for r in ranges:
        rest = r
        while len(rest) > left:
            portion.append(replace(rest, to_seq=rest.from_seq + left - 1))
            rest = replace(rest, from_seq=rest.from_seq + left)
            yield portion
            portion, left = [], numbers
        portion.append(rest)
        left -= len(rest)
        if left == 0:
            yield portion
            portion, left = [], numbers
    if portion:
        yield portion


def by_size(places: Sequence[Place], rows: int, size: int = PORTION_BYTES) -> Iterator[list[Place]]:
    """The same places, so many rows and bytes at a time."""
    portion: list[Place] = []
    total = 0
    for place in places:
        if portion and (len(portion) == rows or total + place.size > size):
            yield portion
            portion, total = [], 0
        portion.append(place)
        total += place.size
    if portion:
        yield portion
