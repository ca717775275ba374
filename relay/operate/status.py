"""`relay status`: how both sides are doing, from one look at the database, and whether anything needs a person.

The figures are counted where they are small or bounded: a backlog beyond COUNTED rows is told as "more than".
"""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg

from relay.operate.look import Look, Unread

COUNTED = 100_000
"""Rows of a backlog that are counted: a second's worth of reading would be a million."""

LOOKED_AT = 10_000
"""Aggregates with stored events that are looked at for what is stranded: a tenth of a second. A running inbox walks through all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """Rows that wait, counted up to COUNTED."""

    rows: int
    more: bool  # there are more than `rows`
    oldest: datetime | None
    age_s: float | None  # of the oldest


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkedFigures:
    """Rows that could not be published, and what waits behind them."""

    rows: int = 0
    aggregates: int = 0  # a row without an aggregate counts as one
    stuck: int = 0  # rows that wait for an operator; one an aggregate
    retrying: int = 0
    paused: int = 0
    oldest: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStatus:
    """One shard of the outbox."""

    shard: int
    source: str | None  # None: no relay has ever run
    owner: str | None
    owner_alive: bool  # its session holds the shard's lock
    standbys: int
    backlog: Backlog
    published: int
    rate: float  # messages a second, lately
    checkpoint_at: datetime
    last_error: str | None
    last_error_at: datetime | None
    parked: ParkedFigures
    retained_since: datetime | None  # insertion of the oldest row that can be replayed


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """What an operator has paused."""

    scope: str
    what: str  # order/42, order, OrderPaid, 0
    paused_at: datetime
    who: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfinishedReplay:
    """A replay that is running, or was interrupted."""

    id: int
    to_queue: str | None
    sent: int
    total: int
    started_at: datetime
    updated_at: datetime
    running: bool  # a process holds its lock: it is sending
    who: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxStatus:
    """The producer's side."""

    shards: tuple[ShardStatus, ...]
    pauses: tuple[Pause, ...]
    replays: tuple[UnfinishedReplay, ...]
    retained_bytes: int  # of the log with its indexes


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldFigures:
    """Messages that are held."""

    rows: int = 0
    aggregates: int = 0
    early: int = 0
    behind: int = 0
    failed: int = 0
    stuck: int = 0
    oldest: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GapFigures:
    """Aggregates of which something is missing."""

    open: int = 0
    stuck: int = 0
    oldest: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerStatus:
    """One consumer's inbox."""

    consumer: str
    running: int  # its daemons that are connected
    applied: int
    rate: float  # events a second, lately
    owner: str | None  # which daemon wrote these figures last
    updated_at: datetime | None
    last_error: str | None
    last_error_at: datetime | None
    held: HeldFigures
    gaps: GapFigures
    quarantine: dict[str, int]  # by reason; what nobody has dismissed
    stored: Backlog | None  # store mode: events that wait for their taker
    taker_failed: int  # of them: given back by their taker, and first of their aggregate
    stranded: int  # aggregates of which no taker sees that they have stored events


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that does not heal by itself, in words, and the command that goes on from here."""

    text: str
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Both sides of one database."""

    database: str
    at: datetime
    outbox: OutboxStatus | None
    inbox: tuple[ConsumerStatus, ...]
    problems: tuple[Problem, ...]


async def status(look: Look) -> Status:
    """Everything that `relay status` tells."""
    outbox = await _outbox(look) if look.outbox else None
    inbox = await _inbox(look) if look.inbox else ()
    return Status(
        database=look.database, at=look.now, outbox=outbox, inbox=inbox, problems=tuple(problems(outbox, inbox))
    )


async def pauses(look: Look) -> tuple[Pause, ...]:
    """What is paused, the longest first."""
    return tuple(_pause(r) for r in await look.fetch("see_pauses"))


def problems(outbox: OutboxStatus | None, inbox: tuple[ConsumerStatus, ...]) -> list[Problem]:
    """What needs a person; empty when all is well, or heals by itself."""
    found = [] if outbox is None else _outbox_problems(outbox)
    for consumer in inbox:
        found += _consumer_problems(consumer)
    return found


def resume(pause: Pause) -> str:
    """The command that ends a pause."""
    option = {"aggregate": "", "aggregate_type": "--type ", "event_type": "--event-type ", "shard": "--shard "}[
        pause.scope
    ]
    what = pause.what.replace("*", r"\*") if pause.scope == "aggregate" else pause.what
    return f"relay resume {option}{shlex.quote(what)}"


async def _outbox(look: Look) -> OutboxStatus:
    parked = {r["shard"]: r for r in await look.fetch("see_parked")}
    retained = {r["shard"]: r for r in await look.fetch("see_retained")}
    shards = []
    for r in await look.fetch("see_shards"):
        unread = Unread.of(r)
        count = await look.one(
            "see_backlog", r["shard"], unread.xmax, unread.late, unread.window, unread.after_id, COUNTED + 1
        )
        shards.append(
            ShardStatus(
                shard=r["shard"],
                source=r["source"],
                owner=r["owner"],
                owner_alive=r["owner_pid"] is not None,
                standbys=r["standbys"],
                backlog=_backlog(look, count["rows"], count["oldest"]) if count else _backlog(look, 0, None),
                published=r["published"],
                rate=round(r["rate"], 1),
                checkpoint_at=r["updated_at"],
                last_error=r["last_error"],
                last_error_at=r["last_error_at"],
                parked=ParkedFigures(**_without(parked.get(r["shard"]), "shard")),
                retained_since=retained[r["shard"]]["created_at"] if r["shard"] in retained else None,
            )
        )
    return OutboxStatus(
        shards=tuple(shards),
        pauses=await pauses(look),
        replays=tuple(_replay(r) for r in await look.fetch("see_replays")),
        retained_bytes=next((r["bytes"] for r in retained.values()), 0),
    )


async def _inbox(look: Look) -> tuple[ConsumerStatus, ...]:
    progress = {r["consumer"]: r for r in await look.fetch("see_consumers")}
    held = {r["consumer"]: r for r in await look.fetch("see_held_counts")}
    gaps = {r["consumer"]: r for r in await look.fetch("see_gap_counts")}
    quarantine: dict[str, dict[str, int]] = {}
    for r in await look.fetch("see_quarantine_counts"):
        quarantine.setdefault(r["consumer"], {})[r["reason"]] = r["messages"]
    counted = await look.fetch("see_stored_counts", COUNTED + 1)
    more = sum(r["rows"] for r in counted) > COUNTED
    stored = {r["consumer"]: r for r in counted}
    given_back = {r["consumer"]: r["rows"] for r in await look.fetch("see_given_back")}
    stranded = Counter(r["consumer"] for r in await look.fetch("see_stranded", LOOKED_AT))
    found = []
    for name in sorted({*progress, *held, *gaps, *quarantine, *stored, *given_back, *stranded}):
        waiting = stored.get(name)
        found.append(
            ConsumerStatus(
                consumer=name,
                **_progress(progress.get(name)),
                held=HeldFigures(**_without(held.get(name), "consumer")),
                gaps=GapFigures(**_without(gaps.get(name), "consumer")),
                quarantine=quarantine.get(name, {}),
                stored=_backlog(look, waiting["rows"], waiting["oldest"], more=more) if waiting else None,
                taker_failed=given_back.get(name, 0),
                stranded=stranded[name],
            )
        )
    return tuple(found)


def _outbox_problems(outbox: OutboxStatus) -> list[Problem]:
    found = []
    for s in outbox.shards:
        if s.parked.stuck:
            found.append(
                Problem(text=f"{_count(s.parked.stuck, 'aggregate')} stuck in the outbox", command="relay stuck")
            )
        if not s.owner_alive and (s.backlog.rows or s.parked.rows):
            rows = "rows wait" if s.backlog.rows else "parked rows wait"
            found.append(Problem(text=f"{rows}, and no relay publishes shard {s.shard}", command="relay run"))
    if outbox.pauses:
        command = resume(outbox.pauses[0]) if len(outbox.pauses) == 1 else "relay resume --all"
        found.append(Problem(text=f"{_count(len(outbox.pauses), 'pause')} in effect", command=command))
    for replay in outbox.replays:
        if not replay.running:
            found.append(
                Problem(
                    text=f"replay {replay.id} was interrupted at {replay.sent} of {replay.total} rows",
                    command=f"relay replay --resume {replay.id}",
                )
            )
    return found


def _consumer_problems(c: ConsumerStatus) -> list[Problem]:
    stuck = c.held.stuck + c.gaps.stuck
    found = []
    if stuck:
        found.append(
            Problem(text=f"{_count(stuck, 'aggregate')} stuck in the inbox of {c.consumer}", command="relay stuck")
        )
    if not c.running and c.held.rows:
        found.append(
            Problem(text=f"messages are held, and no consumer {c.consumer} is running", command="relay inbox run")
        )
    if c.quarantine:
        n = sum(c.quarantine.values())
        found.append(
            Problem(text=f"{_count(n, 'message')} in quarantine at {c.consumer}", command="relay inbox quarantine")
        )
    if c.taker_failed:
        found.append(
            Problem(
                text=f"{_count(c.taker_failed, 'event')} given back by the taker of {c.consumer}", command="relay stuck"
            )
        )
    if c.stranded and not c.running:
        found.append(
            Problem(
                text=f"no taker sees the stored events of {_count(c.stranded, 'aggregate')} of {c.consumer}: its inbox mends that",
                command="relay inbox run",
            )
        )
    return found


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _backlog(look: Look, rows: int, oldest: datetime | None, *, more: bool = False) -> Backlog:
    return Backlog(rows=min(rows, COUNTED), more=more or rows > COUNTED, oldest=oldest, age_s=look.age_s(oldest))


def _progress(r: asyncpg.Record | None) -> dict[str, Any]:
    """A consumer's own figures; zeros for one that never wrote any."""
    names = ("owner", "updated_at", "last_error", "last_error_at")
    if r is None:
        return {"running": 0, "applied": 0, "rate": 0.0} | dict.fromkeys(names)
    figures = {"running": r["running"], "applied": r["applied"] or 0, "rate": round(r["rate"], 1)}
    return figures | {name: r[name] for name in names}


def _without(record: asyncpg.Record | None, column: str) -> dict[str, Any]:
    """The record's other columns; none without a record."""
    return {} if record is None else {name: value for name, value in record.items() if name != column}


def _pause(r: asyncpg.Record) -> Pause:
    what = {
        "aggregate": f"{r['aggregate_type']}/{r['aggregate_id']}",
        "aggregate_type": r["aggregate_type"],
        "event_type": r["event_type"],
        "shard": str(r["shard"]),
    }[r["scope"]]
    return Pause(scope=r["scope"], what=what, paused_at=r["paused_at"], who=r["who"], why=r["why"])


def _replay(r: asyncpg.Record) -> UnfinishedReplay:
    return UnfinishedReplay(
        id=r["id"],
        to_queue=r["to_queue"],
        sent=r["sent"],
        total=r["total"],
        started_at=r["started_at"],
        updated_at=r["updated_at"],
        running=r["running"],
        who=r["who"],
    )
