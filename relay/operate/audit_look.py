"""`relay audit`: what operators did."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg

from relay.operate.look import Look, containing


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """One act, as it was recorded in its own transaction."""

    id: int
    at: datetime
    who: str
    login: str  # the database role
    side: str
    act: str
    selection: dict[str, Any]  # the filters, as given
    why: str
    rows: int


async def acts(
    look: Look,
    *,
    aggregate: tuple[str, str] | None,
    side: str | None,
    act: str | None,
    who: str | None,
    since: datetime | None,
    until: datetime | None,
    after_id: int | None,
    limit: int,
) -> tuple[Act, ...]:
    """What was done, the newest first; of an aggregate also what was done to everything."""
    kind, name = aggregate or (None, None)
    before = 2**63 - 1 if after_id is None else after_id
    found = await look.fetch("see_acts", kind, name, side, act, containing(who), since, until, before, limit)
    return tuple(act_of(r) for r in found)


async def any_act(look: Look) -> bool:
    """True when anything at all was done."""
    nothing = dict.fromkeys(("aggregate", "side", "act", "who", "since", "until", "after_id"))
    return bool(await acts(look, **nothing, limit=1))


def act_of(record: asyncpg.Record) -> Act:
    """From a record of relay.audit whose selection is text."""
    return Act(**{**record, "selection": json.loads(record["selection"])})
