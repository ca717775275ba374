"""Rows of the outbox's log as operators see them, with what became of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from relay.operate.look import Look

SHOWN_BYTES = 65_536
"""Of each content, at most so many bytes are fetched for showing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenRow:
    """A row of the log.

    State: waiting (to be published), published, skipped (a tombstone took its place), or parked: retrying, stuck, paused,
    behind (another row of its aggregate).
    """

    id: int
    shard: int
    aggregate_type: str | None
    aggregate_id: str | None
    seq: int | None
    event_type: str | None  # None: no longer retained
    size: int | None
    created_at: datetime | None
    retained: bool
    state: str
    reason: str | None  # of a parked row: why it blocks
    detail: str | None
    attempts: int | None
    parked_at: datetime | None
    next_attempt_at: datetime | None
    tombstone: str | None  # skip, purge: an operator took it out of the sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a row or message contains, as far as it is shown."""

    text: str | None  # None: it is not UTF-8
    hex: str | None
    cut: bool  # there is more


async def seen_rows(look: Look, shard: int, ids: Sequence[int]) -> tuple[SeenRow, ...]:
    """Rows by id, in order. What neither the log nor the parked rows nor the marks know is left out."""
    return tuple(SeenRow(**r) for r in await look.fetch("see_listed", shard, list(ids)))


async def contents(look: Look, shard: int, ids: Sequence[int]) -> dict[int, Content]:
    """The contents of retained rows by id. Needs relay_operator."""
    return shown(await look.fetch("see_contents", shard, list(ids), SHOWN_BYTES + 1))


def shown(records: Iterable[Any]) -> dict[int, Content]:
    """{id: content} of records with an id and a body."""
    return {r["id"]: _content(r["body"]) for r in records}


def _content(body: bytes) -> Content:
    cut = len(body) > SHOWN_BYTES
    kept = body[:SHOWN_BYTES]
    try:
        return Content(text=kept.decode("utf-8", "ignore" if cut else "strict"), hex=None, cut=cut)
    except UnicodeDecodeError:
        return Content(text=None, hex=kept.hex(), cut=cut)
