"""`relay inbox held`, `gaps` and `quarantine`: what an inbox keeps aside, by filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg

from relay.errors import PrivilegeError
from relay.operate.look import Look, by_id, containing, ids, patterns
from relay.operate.rows import SHOWN_BYTES, Content, shown
from relay.operate.selection import Selection

_TOP = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A held message."""

    id: int
    consumer: str
    source: str
    aggregate_type: str | None
    aggregate_id: str | None
    seq: int | None
    event_type: str
    message_id: str
    reason: str  # early, behind, failed
    state: str  # waiting, retrying, stuck
    attempts: int
    error: str | None  # None also for a role that may not read it
    held_at: datetime
    next_attempt_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """An aggregate of which something is missing."""

    consumer: str
    source: str
    aggregate_type: str
    aggregate_id: str
    last_seq: int  # applied through
    missing_from: int  # the first missing numbers
    missing_to: int
    missing: int  # all in all
    to_seq: int  # the highest number that is known to exist
    held: int  # messages that wait for the missing ones
    found_by: str  # successor, mark
    noticed_at: datetime
    state: str  # open: the producer is asked for it; stuck: it has it no longer
    asks: int
    next_ask_at: datetime | None
    detail: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """A message that was put aside and is kept."""

    id: int
    consumer: str
    reason: str
    detail: str
    message_id: str | None
    exchange: str
    routing_key: str
    received_at: datetime
    source: str | None
    aggregate_type: str | None
    aggregate_id: str | None
    seq: int | None
    dismissed_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantinedContent:
    """What a message in quarantine contains, and its properties as JSON text."""

    body: Content
    properties: str


async def held(look: Look, selection: Selection, *, after_id: int, limit: int) -> tuple[Held, ...]:
    """Held messages, the first held first, behind an id."""
    only = None
    if selection.error is not None:
        if not look.errors:
            raise PrivilegeError(
                f"role {look.role} may not read what handlers' errors say: leave --error out, or log in as a member of relay_operator"
            )
        said = await look.fetch("see_errors", containing(selection.error))
        only = [r["id"] for r in said if r["kind"] == "held"]
    found = await look.fetch("see_held", *_arguments(selection), after_id, limit, only)
    errors = by_id(await look.fetch("see_held_errors", [r["id"] for r in found]), "error") if look.errors else {}
    return tuple(Held(**r, error=errors.get(r["id"])) for r in found)


async def held_total(look: Look) -> int:
    """How many messages are held, of whomever."""
    return sum(r["rows"] for r in await look.fetch("see_held_counts"))


async def quarantine_total(look: Look) -> int:
    """How many messages in quarantine nobody has dismissed."""
    return sum(r["messages"] for r in await look.fetch("see_quarantine_counts"))


async def held_contents(look: Look, row_ids: Sequence[int]) -> dict[int, Content]:
    """Contents of held messages by id. Needs relay_operator."""
    return shown(await look.fetch("see_held_contents", list(row_ids), SHOWN_BYTES + 1))


async def gaps(look: Look, selection: Selection, *, limit: int) -> tuple[int, tuple[Missing, ...]]:
    """(how many there are, the longest known of them)."""
    found = await look.fetch("see_gaps", *_arguments(selection), 0, limit)
    names = Missing.__dataclass_fields__
    return found[0]["total"] if found else 0, tuple(Missing(**{n: r[n] for n in names}) for r in found)


async def quarantine(look: Look, selection: Selection, *, after_id: int | None, limit: int) -> tuple[Quarantined, ...]:
    """Messages in quarantine, the newest first, before an id."""
    before = _TOP if after_id is None else after_id
    found = await look.fetch("see_quarantine", *_arguments(selection), before, limit, containing(selection.error))
    return tuple(Quarantined(**r) for r in found)


async def quarantine_contents(look: Look, row_ids: Sequence[int]) -> dict[int, QuarantinedContent]:
    """Contents of messages in quarantine by id. Needs relay_operator."""
    records: list[asyncpg.Record] = await look.fetch("see_quarantine_contents", list(row_ids), SHOWN_BYTES + 1)
    bodies = shown(records)
    return {r["id"]: QuarantinedContent(body=bodies[r["id"]], properties=r["properties"]) for r in records}


def _arguments(selection: Selection) -> list[Any]:
    return [
        *patterns(selection),
        selection.aggregate_type,
        selection.event_type,
        selection.cause,
        selection.state,
        selection.older_than_s,
        selection.since,
        selection.until,
        selection.from_seq,
        selection.to_seq,
        ids(selection),
        selection.source,
        selection.consumer,
    ]
