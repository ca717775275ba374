"""`relay stuck`: every blocked aggregate on both sides, and why; one by one, or by cause."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg

from relay.errors import PrivilegeError
from relay.operate.look import Look, containing, ids, patterns
from relay.operate.selection import Selection
from relay.operate.status import LOOKED_AT, Pause, pauses


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocked:
    """The row that blocks an aggregate (or, without an aggregate, only itself)."""

    side: str  # outbox, inbox
    kind: str  # parked, held, gap, stored, quarantine
    id: int | None  # of the row in the table of its kind; a gap has none
    consumer: str | None
    source: str | None
    aggregate_type: str | None
    aggregate_id: str | None
    seq: int | None  # of a gap: the first number behind the cursor
    event_type: str | None
    cause: str
    state: str  # waiting, retrying, stuck, paused
    detail: str | None  # what the broker or the handler said; None also for a role that may not read it
    since: datetime
    age_s: float
    attempts: int
    next_attempt_at: datetime | None
    behind: int  # rows that wait behind it


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """What has the same cause, and the same class of error (inbox) or the same words of the broker (outbox)."""

    side: str
    consumer: str | None
    cause: str
    detail: str | None  # the first line of one of them
    details: int  # how many different ones there are
    aggregates: int
    rows: int  # with those that wait behind
    stuck: int  # aggregates that wait for an operator
    since: datetime  # of the oldest
    age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stuck:
    """What is blocked. `total` counts all that the filters select, not only what is shown."""

    database: str
    at: datetime
    total: int
    blocked: tuple[Blocked, ...]
    causes: tuple[Cause, ...]
    pauses: tuple[Pause, ...]
    errors_readable: bool  # False: this role may not read what handlers said


async def stuck(look: Look, selection: Selection, *, by_cause: bool, limit: int) -> Stuck:
    """What is blocked, the longest first. Raises PrivilegeError for a filter by error with a role that may not read errors."""
    stranded = [r["id"] for r in await look.fetch("see_stranded", LOOKED_AT)] if look.inbox else []
    found = await look.fetch("see_stuck", *await _arguments(look, selection), by_cause, limit, stranded)
    entries = () if by_cause else tuple(Blocked(**_fields(look, r, Blocked)) for r in found)
    causes = tuple(Cause(**_fields(look, r, Cause)) for r in found) if by_cause else ()
    return Stuck(
        database=look.database,
        at=look.now,
        total=found[0]["total"] if found else 0,
        blocked=entries,
        causes=causes,
        pauses=await pauses(look),
        errors_readable=look.errors,
    )


async def blocked_in_all(look: Look) -> int:
    """How much is blocked, whatever the filters."""
    return (await stuck(look, Selection(), by_cause=False, limit=1)).total


async def _arguments(look: Look, selection: Selection) -> list[Any]:
    pattern = containing(selection.error)
    if pattern is not None and look.inbox and not look.errors:
        raise PrivilegeError(
            f"role {look.role} may not read what handlers' errors say: leave --error out, or log in as a member of relay_operator"
        )
    said = await look.fetch("see_errors", pattern) if look.errors else []
    return [
        *patterns(selection),
        selection.aggregate_type,
        selection.event_type,
        selection.cause,
        selection.state,
        pattern,
        selection.older_than_s,
        selection.since,
        selection.until,
        selection.from_seq,
        selection.to_seq,
        ids(selection),
        selection.source,
        selection.consumer,
        json.dumps({f"{r['kind']}/{r['id']}": r["error"] for r in said}),
    ]


def _fields(look: Look, record: asyncpg.Record, kind: type[Blocked | Cause]) -> dict[str, Any]:
    """The record's columns that the value has, and the age."""
    names = kind.__dataclass_fields__
    return {name: record[name] for name in names if name != "age_s"} | {"age_s": look.age_s(record["since"]) or 0.0}
