"""The retained log, as a replay reads it: how much a selection holds, its rows page by page, and what is no longer there.

Only what has been published already, as far as the persisted cursor knows, and is not parked: everything else is still on
its way, and whoever waits for it gets it from the relay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from relay.message import Row
from relay.operate.selection import Selection
from relay.outbox.reader import to_row
from relay.postgres.connect import Connection
from relay.postgres.errors import postgres_errors
from relay.postgres.queries import query

COUNT_PLANS = {"plan_cache_mode": "force_custom_plan", "jit": "off"}
"""Session settings for counting: all of a log is counted fastest by reading it from end to end, in parallel."""

_COUNT_TIMEOUT_S = 3600.0
_LOOK_ROWS = 5000
"""Rows of the log that are looked at for one page, a few ms: a sparse selection takes many short steps, not one long statement."""

_RANGES = 20
"""Ranges of missing numbers that are told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeCount:
    """What a selection holds of one event type."""

    event_type: str
    rows: int
    first_id: int
    last_id: int
    first_at: datetime
    last_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """What was asked for by name or time and is not in the log any more."""

    numbers: tuple[tuple[int, int], ...] = ()  # of the one aggregate, inclusive
    ids: tuple[int, ...] = ()
    before: datetime | None = None  # the log begins here, later than the time that was asked for

    def __bool__(self) -> bool:
        return bool(self.numbers or self.ids or self.before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """What a selection holds, all in all and by event type."""

    types: tuple[TypeCount, ...]
    missing: Missing

    @property
    def rows(self) -> int:
        """Rows that would be sent."""
        return sum(t.rows for t in self.types)

    @property
    def first_id(self) -> int:
        """The first row's id."""
        return min(t.first_id for t in self.types)

    @property
    def last_id(self) -> int:
        """The last row's id."""
        return max(t.last_id for t in self.types)

    @property
    def first_at(self) -> datetime:
        """When the oldest row was inserted."""
        return min(t.first_at for t in self.types)

    @property
    def last_at(self) -> datetime:
        """When the newest row was inserted."""
        return max(t.last_at for t in self.types)


@dataclass(frozen=True, slots=True)
class Place:
    """How far a selection has been read: all up to this id, and of one aggregate, up to this number."""

    after_id: int
    after_seq: int = 0


@dataclass(frozen=True, slots=True)
class RetainedPage:
    """Some rows of a selection by id, and the place behind them."""

    rows: Sequence[Row]
    place: Place
    is_last: bool  # nothing of the selection is behind it


class Retained:
    """The retained log over one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def count(self, selection: Selection) -> Count:
        """Count what has been published and is retained of a selection. Takes as long as reading it does."""
        with postgres_errors():
            records = await self._connection.fetch(
                query("count_replay"), *_filters(selection), timeout=_COUNT_TIMEOUT_S
            )
        return Count(types=tuple(TypeCount(**r) for r in records), missing=await self._missing(selection))

    async def page(
        self, selection: Selection, place: Place, *, last_id: int, page_rows: int, page_bytes: int
    ) -> RetainedPage:
        """The rows behind `place`, up to `last_id`. May be empty and yet not the last: then nothing near was selected."""
        look = max(_LOOK_ROWS, page_rows)
        after_seq = max(place.after_seq, (selection.from_seq or 1) - 1)
        with postgres_errors():
            records = await self._connection.fetch(
                query("replay_page"),
                _way(selection),
                place.after_id,
                last_id,
                after_seq,
                look,
                page_rows,
                page_bytes,
                *_filters(selection),
            )
        found = [r for r in records if r["id"] is not None]
        rows = [to_row(r) for r in found]
        if found and (len(found) == page_rows or found[0]["page_rows"] > len(found)):
            return RetainedPage(rows, Place(rows[-1].id, rows[-1].seq or 0), is_last=False)
        reached = records[0]
        behind = Place(reached["reached_id"] or place.after_id, reached["reached_seq"] or place.after_seq)
        return RetainedPage(rows, behind, is_last=reached["looked"] < look)

    async def backlog_s(self) -> float:
        """Age in seconds of the oldest row that waits to be published the first time; 0 when none does."""
        with postgres_errors():
            age_s: float | None = await self._connection.fetchval(query("live_backlog"), _LOOK_ROWS)
        return max(0.0, age_s or 0.0)

    async def _missing(self, selection: Selection) -> Missing:
        with postgres_errors():
            if (exact := selection.exact()) is not None and selection.ids is None:
                ranges = await self._connection.fetch(
                    query("missing_numbers"), *exact, selection.from_seq, selection.to_seq, _RANGES
                )
                return Missing(numbers=tuple((r["from_seq"], r["to_seq"]) for r in ranges))
            if selection.ids is not None:
                gone = await self._connection.fetch(query("missing_ids"), list(selection.ids))
                return Missing(ids=tuple(r["id"] for r in gone))
            if selection.since is not None:
                begins: datetime | None = await self._connection.fetchval(query("log_begins"))
                return Missing(before=begins if begins is not None and begins > selection.since else None)
        return Missing()


def _way(selection: Selection) -> str:
    """How the rows of a selection are found: each by its id, along an aggregate's index, or along the log."""
    if selection.ids is not None:
        return "ids"
    return "log" if selection.exact() is None else "aggregate"


def _filters(selection: Selection) -> tuple[Any, ...]:
    exact = selection.exact()
    pattern = None if exact is not None else selection.parts()
    return (
        *(exact or (None, None)),
        *(pattern or (None, None)),
        selection.aggregate_type,
        selection.event_type,
        selection.since,
        selection.until,
        selection.from_seq,
        selection.to_seq,
        None if selection.ids is None else list(selection.ids),
    )
