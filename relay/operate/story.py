"""`relay show order/42`: one aggregate's whole story, on whichever sides this database holds."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg

from relay.operate.audit_look import Act, act_of
from relay.operate.look import Look, by_id
from relay.operate.rows import SeenRow, seen_rows
from relay.operate.status import Pause, pauses


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxStory:
    """The producer's side of an aggregate."""

    source: str | None
    last_seq: int  # the counter: number of its latest event
    first_retained: int | None  # None: nothing of it is retained
    parked: int  # its parked rows, all of them
    rows: tuple[SeenRow, ...]  # the newest, and the first of the parked ones, by number


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldMessage:
    """A message that a consumer holds."""

    id: int
    seq: int
    event_type: str
    message_id: str
    reason: str  # early, behind, failed
    state: str  # waiting, retrying, stuck
    attempts: int
    error: str | None  # None also for a role that may not read it
    held_at: datetime
    next_attempt_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEvent:
    """An event in store mode that waits for its taker."""

    id: int
    seq: int
    event_type: str
    message_id: str
    attempts: int
    error: str | None
    stored_at: datetime
    next_take_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Numbers that exist and have not come."""

    to_seq: int
    missing_from: int
    missing_to: int
    missing: int
    found_by: str
    noticed_at: datetime
    state: str
    asks: int
    next_ask_at: datetime | None
    detail: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class InboxStory:
    """One consumer's side of an aggregate, for one source."""

    consumer: str
    source: str
    last_seq: int | None  # applied through; None: it has no cursor yet
    blocked: bool  # the next message is held because its handler failed
    held_total: int
    held: tuple[HeldMessage, ...]  # the first ones
    stored_total: int
    stored: tuple[StoredEvent, ...]  # the first ones
    gap: Gap | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantinedMessage:
    """A message that was put aside."""

    id: int
    consumer: str
    source: str | None
    seq: int | None
    reason: str
    detail: str
    message_id: str | None
    received_at: datetime
    dismissed_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """One aggregate's whole story."""

    database: str
    at: datetime
    aggregate_type: str
    aggregate_id: str
    outbox: OutboxStory | None
    inbox: tuple[InboxStory, ...]
    quarantine: tuple[QuarantinedMessage, ...]  # the newest first
    pauses: tuple[Pause, ...]  # those that apply to it
    acts: tuple[Act, ...]  # of operators, the newest first
    errors_readable: bool


async def story(look: Look, aggregate_type: str, aggregate_id: str, *, limit: int) -> Story | None:
    """The story, each table of it bounded by `limit`; None when nothing at all is known of the aggregate."""
    name = (aggregate_type, aggregate_id)
    outbox = await _outbox(look, name, limit)
    inbox = await _inbox(look, name, limit)
    quarantine = await look.fetch("see_quarantine_of", *name, limit)
    acts = await look.fetch("see_acts_on", *name, limit)
    applying = [p for p in await pauses(look) if _applies(p, name, outbox)]
    known = outbox or inbox or quarantine or any(p.scope == "aggregate" for p in applying)
    if not known and not any("all" not in act_of(r).selection for r in acts):
        return None
    return Story(
        database=look.database,
        at=look.now,
        aggregate_type=aggregate_type,
        aggregate_id=aggregate_id,
        outbox=outbox,
        inbox=inbox,
        quarantine=tuple(QuarantinedMessage(**r) for r in quarantine),
        pauses=tuple(applying),
        acts=tuple(act_of(r) for r in acts if not (r["side"] == "outbox" and outbox is None)),
        errors_readable=look.errors,
    )


async def similar(look: Look, aggregate_type: str, aggregate_id: str, *, limit: int = 5) -> list[tuple[str, str]]:
    """Aggregates that are named alike, for somebody who mistyped one."""
    for prefix in (aggregate_id, aggregate_id[:-1]):
        found = await look.fetch("see_similar", aggregate_type, aggregate_id, prefix, limit) if prefix else []
        if found:
            return [(r["aggregate_type"], r["aggregate_id"]) for r in found]
    return []


async def _outbox(look: Look, name: tuple[str, str], limit: int) -> OutboxStory | None:
    counter = await look.one("see_counter", *name)
    if counter is None:
        return None
    rows: list[SeenRow] = []
    by_shard: dict[int, list[int]] = {}
    for r in await look.fetch("see_rows_of", *name, limit, limit):
        by_shard.setdefault(r["shard"], []).append(r["id"])
    for shard, row_ids in by_shard.items():
        rows += await seen_rows(look, shard, row_ids)
    shards = {r["shard"]: r["source"] for r in await look.fetch("see_shards")}
    return OutboxStory(
        source=next((source for source in shards.values() if source), None),
        last_seq=counter["last_seq"],
        first_retained=counter["first_retained"],
        parked=counter["parked"],
        rows=tuple(sorted(rows, key=lambda row: row.seq or 0)),
    )


async def _inbox(look: Look, name: tuple[str, str], limit: int) -> tuple[InboxStory, ...]:
    cursors = {(r["consumer"], r["source"]): r for r in await look.fetch("see_cursors", *name)}
    held = _grouped(await look.fetch("see_held_of", *name, limit))
    stored = _grouped(await look.fetch("see_stored_of", *name, limit))
    gaps = {(r["consumer"], r["source"]): r for r in await look.fetch("see_gaps_of", *name)}
    held_errors = await _errors(look, "see_held_errors", held)
    stored_errors = await _errors(look, "see_stored_errors", stored)
    found = []
    for key in sorted({*cursors, *held, *stored, *gaps}):
        cursor, gap = cursors.get(key), gaps.get(key)
        found.append(
            InboxStory(
                consumer=key[0],
                source=key[1],
                last_seq=cursor["last_seq"] if cursor else None,
                blocked=bool(cursor and cursor["blocked"]),
                held_total=held[key][0]["total"] if key in held else 0,
                held=tuple(
                    HeldMessage(**_of(r, HeldMessage), error=held_errors.get(r["id"])) for r in held.get(key, ())
                ),
                stored_total=stored[key][0]["total"] if key in stored else 0,
                stored=tuple(
                    StoredEvent(**_of(r, StoredEvent), error=stored_errors.get(r["id"])) for r in stored.get(key, ())
                ),
                gap=Gap(**_of(gap, Gap)) if gap else None,
            )
        )
    return tuple(found)


async def _errors(look: Look, block: str, groups: dict[tuple[str, str], list[asyncpg.Record]]) -> dict[int, Any]:
    row_ids = [r["id"] for group in groups.values() for r in group]
    return by_id(await look.fetch(block, row_ids), "error") if look.errors and row_ids else {}


def _grouped(records: list[asyncpg.Record]) -> dict[tuple[str, str], list[asyncpg.Record]]:
    groups: dict[tuple[str, str], list[asyncpg.Record]] = {}
    for r in records:
        groups.setdefault((r["consumer"], r["source"]), []).append(r)
    return groups


def _of(record: asyncpg.Record, kind: type[Any]) -> dict[str, Any]:
    """The record's columns that the value has, without the error, which comes from elsewhere."""
    return {name: record[name] for name in kind.__dataclass_fields__ if name != "error"}


def _applies(pause: Pause, name: tuple[str, str], outbox: OutboxStory | None) -> bool:
    rows = outbox.rows if outbox else ()
    match pause.scope:
        case "aggregate":
            return pause.what == f"{name[0]}/{name[1]}"
        case "aggregate_type":
            return pause.what == name[0]
        case "event_type":
            return any(row.event_type == pause.what for row in rows)
        case _:
            return any(str(row.shard) == pause.what for row in rows)
