"""`relay list`: rows of the outbox by filters, page by page.

How rows are found depends on what is asked for: parked, skipped and waiting rows by the tables that name them, one aggregate's by
its index. Everything else is looked for in the log itself, piece by piece, so that no statement is long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg

from relay.errors import ConfigError
from relay.operate.look import Look, Unread, containing, ids, patterns
from relay.operate.rows import SeenRow, seen_rows
from relay.operate.selection import Selection
from relay.operate.status import COUNTED

_PIECE = 50_000
"""Ids in one piece of the log, about 50 ms of looking."""

_PARKED_STATES = {
    "parked": ["waiting", "retrying", "stuck", "paused"],
    "behind": ["waiting"],
    "retrying": ["retrying"],
    "stuck": ["stuck"],
    "paused": ["paused"],
}
_TOP = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A page of rows, in the order that was asked for."""

    database: str
    at: datetime
    rows: tuple[SeenRow, ...]
    next_after: int | None  # --after of the next page; None: there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Which page: behind `after` (a row id), in this order."""

    after: int | None
    newest_first: bool
    limit: int

    @property
    def bounds(self) -> tuple[int, int]:
        """Ids of the page lie above the first and up to the second."""
        if self.after is None:
            return 0, _TOP
        return (0, self.after - 1) if self.newest_first else (self.after, _TOP)


async def listing(look: Look, selection: Selection, page: Page) -> Listing:
    """The page. Raises ConfigError for filters that contradict each other."""
    _require_sense(selection)
    rows: list[SeenRow] = []
    for shard in await look.fetch("see_shards"):
        found = await _ids(look, selection, page, shard)
        rows += await seen_rows(look, shard["shard"], found)
    rows.sort(key=lambda row: row.id, reverse=page.newest_first)
    more = len(rows) > page.limit
    shown = tuple(rows[: page.limit])
    return Listing(database=look.database, at=look.now, rows=shown, next_after=shown[-1].id if more else None)


def _require_sense(selection: Selection) -> None:
    parked = selection.cause is not None or selection.error is not None
    if parked and selection.state in ("waiting", "published", "skipped"):
        raise ConfigError(
            f"--state {selection.state} goes with neither --cause nor --error: only parked rows have a cause"
        )


async def _ids(look: Look, selection: Selection, page: Page, shard: asyncpg.Record) -> Sequence[int]:
    """The ids of a page and one more, if there is one: then there is a next page."""
    state = selection.state
    if selection.cause or selection.error or state in _PARKED_STATES:
        states = _PARKED_STATES[state or "parked"]
        more: list[Any] = [selection.cause, states, containing(selection.error)]
        return await _found(look, "see_ids_parked", shard, page, page.bounds, selection, *more)
    if state == "skipped":
        return await _found(look, "see_ids_skipped", shard, page, page.bounds, selection)
    if state == "waiting":
        return await _waiting(look, selection, page, shard)
    published = state == "published"
    if (exact := selection.exact()) is not None:
        arguments = _arguments(shard, page, page.bounds, selection, names=exact)
        return [r["id"] for r in await look.fetch("see_ids_of_aggregate", *arguments, published)]
    if selection.ids is not None:
        return await _found(look, "see_ids_in_log", shard, page, page.bounds, selection, published)
    return await _walk(look, selection, page, shard, published=published)


async def _waiting(look: Look, selection: Selection, page: Page, shard: asyncpg.Record) -> Sequence[int]:
    unread = Unread.of(shard)
    return await _found(look, "see_ids_waiting", shard, page, page.bounds, selection, COUNTED, unread.xmax, unread.late)


async def _walk(look: Look, selection: Selection, page: Page, shard: asyncpg.Record, *, published: bool) -> list[int]:
    """Through the log, piece by piece, until the page is full or the log ends. Jumps over ids that are not there."""
    low, high = page.bounds
    found: list[int] = []
    while len(found) <= page.limit and low < high:
        edge = await look.one(
            *(
                ("see_previous_id", shard["shard"], high)
                if page.newest_first
                else ("see_next_id", shard["shard"], low + 1)
            )
        )
        if edge is None:
            break
        bounds = (
            (max(low, edge["id"] - _PIECE), edge["id"])
            if page.newest_first
            else (edge["id"] - 1, min(high, edge["id"] + _PIECE))
        )
        found += await _found(look, "see_ids_in_log", shard, page, bounds, selection, published)
        low, high = (low, bounds[0]) if page.newest_first else (bounds[1], high)
    return found[: page.limit + 1]


async def _found(
    look: Look, block: str, shard: asyncpg.Record, page: Page, bounds: tuple[int, int], selection: Selection, *more: Any
) -> list[int]:
    arguments = _arguments(shard, page, bounds, selection, names=patterns(selection))
    return [r["id"] for r in await look.fetch(block, *arguments, *more)]


def _arguments(
    shard: asyncpg.Record,
    page: Page,
    bounds: tuple[int, int],
    selection: Selection,
    *,
    names: tuple[str | None, str | None],
) -> list[Any]:
    return [
        shard["shard"],
        *bounds,
        page.newest_first,
        page.limit + 1,
        *names,
        selection.aggregate_type,
        selection.event_type,
        selection.older_than_s,
        selection.since,
        selection.until,
        selection.from_seq,
        selection.to_seq,
        ids(selection),
    ]
