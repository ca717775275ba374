"""The record of replays (relay.outbox_replay): begun, resumed, abandoned, listed; one process at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

import asyncpg

from relay.errors import ConfigError, NothingSelected
from relay.message import Aggregate
from relay.operate.audit import Operator, record
from relay.operate.retained import Count
from relay.operate.selection import Selection
from relay.postgres.connect import Connection
from relay.postgres.errors import postgres_errors
from relay.postgres.queries import query
from relay.settings import Settings

REPLAY_LOCK = 727011
"""First key of the lock that the process sending a replay holds; the second is the replay's number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A replay and how far it got."""

    id: int
    selection: Selection
    to_queue: str | None  # None: to everyone, through the exchange
    after_id: int  # all of the selection up to here has been sent and confirmed
    last_id: int  # nothing above it belongs to the replay: it was published later
    total: int  # rows of the selection when it began
    sent: int
    state: str  # unfinished, done, abandoned
    started_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A replay as `relay replay --list` shows it."""

    replay: Replay
    who: str
    why: str
    is_running: bool  # a process is sending it right now


async def source_of(connection: Connection, settings: Settings) -> str:
    """The name under which the log is published: it is part of every message id, so only the one that was used is right.

    Raises ConfigError where the settings say another, or the log was restored and no relay ran since; NothingSelected
    where nothing was ever published.
    """
    with postgres_errors():
        found = await connection.fetchrow(query("replay_source"))
    source: str | None = None if found is None else found["source"]
    if found is None or source is None:
        raise NothingSelected("no relay has published anything of this log yet: there is nothing to send again")
    if settings.source not in (None, source):
        raise ConfigError(
            f"this log is published as source {source!r}, the setting says {settings.source!r}: is postgres.dsn the right one?"
        )
    if not found["is_of_this_cluster"]:
        raise ConfigError(
            "the log was restored from another server, and no relay has run on it since: start `relay run` first"
        )
    return source


async def begin(
    connection: Connection, *, selection: Selection, count: Count, to_queue: str | None, operator: Operator
) -> Replay:
    """Note a new replay of what was counted, and who wanted it."""
    with postgres_errors():
        async with connection.transaction():
            audit_id = await _record(connection, operator, "replay", selection, count.rows, to_queue=to_queue)
            replay_id: int = await connection.fetchval(
                query("begin_replay"),
                audit_id,
                json.dumps(selection.as_json()),
                to_queue,
                count.first_id - 1,
                count.last_id,
                count.rows,
            )
    return await find(connection, replay_id)


async def resume(connection: Connection, to_resume: Replay, *, operator: Operator) -> None:
    """Note who goes on with a replay."""
    with postgres_errors():
        async with connection.transaction():
            why = operator.why or f"resume of replay {to_resume.id}"
            left = max(0, to_resume.total - to_resume.sent)
            await _record(
                connection,
                Operator(who=operator.who, why=why),
                "replay",
                to_resume.selection,
                left,
                resumes=to_resume.id,
            )


async def abandon(connection: Connection, to_abandon: Replay, *, operator: Operator) -> None:
    """Give a replay up: what it has not sent is not sent. A process that is at it stops after the page in hand."""
    with postgres_errors():
        async with connection.transaction():
            if await connection.fetchval(query("abandon_replay"), to_abandon.id) is None:
                raise ConfigError(f"replay {to_abandon.id} has ended meanwhile: there is nothing to give up")
            why = operator.why or f"replay {to_abandon.id} was given up"
            left = max(0, to_abandon.total - to_abandon.sent)
            await _record(
                connection,
                Operator(who=operator.who, why=why),
                "abandon",
                to_abandon.selection,
                left,
                replay=to_abandon.id,
            )


async def find(connection: Connection, replay_id: int | None) -> Replay:
    """The replay of this number; None: the newest that is unfinished. Raises NothingSelected."""
    with postgres_errors():
        found = await connection.fetchrow(query("get_replay"), replay_id)
    if found is None:
        raise NothingSelected(
            "no replay is unfinished"
            if replay_id is None
            else f"there is no replay {replay_id}; see relay replay --list"
        )
    return _replay(found)


async def find_unfinished(connection: Connection, replay_id: int | None) -> Replay:
    """The same; raises ConfigError for one that has ended."""
    found = await find(connection, replay_id)
    if found.state != "unfinished":
        raise ConfigError(f"replay {found.id} is {found.state}: it cannot be resumed or given up; begin a new one")
    return found


async def listed(connection: Connection, *, rows: int) -> list[Listed]:
    """The newest replays, newest first."""
    with postgres_errors():
        found = await connection.fetch(query("list_replays"), rows, REPLAY_LOCK)
    return [Listed(replay=_replay(r), who=r["who"], why=r["why"], is_running=r["is_running"]) for r in found]


async def got_to(connection: Connection, replay_id: int, *, after_id: int, rows: int, state: str) -> int | None:
    """Note that a page was sent and confirmed; returns the rows sent so far. None: it has ended, or is further already."""
    with postgres_errors():
        sent: int | None = await connection.fetchval(query("replay_got_to"), replay_id, after_id, rows, state)
    return sent


async def try_lock(connection: Connection, replay_id: int) -> bool:
    """True when this session is the one that sends the replay."""
    with postgres_errors():
        return bool(await connection.fetchval(query("try_replay_lock"), REPLAY_LOCK, replay_id))


async def _record(
    connection: Connection, operator: Operator, act: str, selection: Selection, rows: int, **also: object
) -> int:
    exact = selection.exact()
    aggregates: list[Aggregate] = [] if exact is None else [exact]
    return await record(
        connection,
        operator=operator,
        side="outbox",
        act=act,
        selection=selection,
        rows=rows,
        aggregates=aggregates,
        also=also,
    )


def _replay(found: asyncpg.Record) -> Replay:
    values = {f.name: found[f.name] for f in fields(Replay)}
    return Replay(**values | {"selection": selection_from(json.loads(found["selection"]))})


def selection_from(told: dict[str, Any]) -> Selection:
    """The inverse of `Selection.as_json`."""
    values = dict(told)
    everything = bool(values.pop("all", False))
    for name in ("since", "until"):
        if values.get(name) is not None:
            values[name] = datetime.fromisoformat(values[name])
    if values.get("ids") is not None:
        values["ids"] = tuple(values["ids"])
    return Selection(**values, everything=everything)
