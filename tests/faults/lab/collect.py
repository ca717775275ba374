"""Reads from the two databases and the broker what a run has left behind."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from relay.postgres.connect import Connection
from tests.faults.lab.daemons import Daemon
from tests.faults.lab.evidence import Committed, Effect, Leftovers
from tests.faults.lab.stage import Stage
from tests.faults.lab.witness import BINDINGS
from tests.faults.lab.workload import AGGREGATES

UNWITNESSED = frozenset(AGGREGATES) - {binding.partition(".")[0] for binding in BINDINGS}

_PARKED = "SELECT count(*) FROM relay.outbox_parked"
_UNREAD = """
SELECT count(*) FROM relay.outbox o, relay.outbox_cursor c
WHERE o.shard = c.shard AND NOT relay.outbox_is_read(o.xid, o.id, c.snapshot, c.window_snapshot, c.after_id)
"""
_HELD = "SELECT count(*) FROM relay.inbox_held"
_GAPS = "SELECT count(*) FROM relay.inbox_gap"
# By content: what was quarantined and not acknowledged comes again, and is written down again.
_QUARANTINE = "SELECT count(DISTINCT body) FROM relay.inbox_quarantine WHERE (reason = 'conflict') = $1"

_COMPLAINT = re.compile(
    r"Traceback \(most recent|never retrieved|was never awaited|Task was destroyed|^Fatal Python|Segmentation fault"
)
_LIBRARIES = ("aiormq", "aio_pika")
"""They log the end of a connection with a traceback: that is their word for it, not a defect."""

_ASYNCPGS_OWN = "unexpected connection_lost() call"
"""Of a connect that was given up by its time-out when the socket broke: a future inside asyncpg that nobody can retrieve from outside."""

RIGHTS_MISSING = 4
"""Exit code of a daemon that is started while its rights or its password are taken away: a supervisor starts it again."""


async def committed(producer: Connection) -> list[Committed]:
    """All events, as the producers' own table tells of them."""
    rows = await producer.fetch(
        "SELECT token, kind, aggregate, seq, sha, amount, extract(epoch FROM committed_at)::float8 AS at FROM txn_log"
    )
    return [
        Committed(
            token=r["token"],
            key=(r["kind"], r["aggregate"]),
            seq=r["seq"],
            sha=r["sha"],
            amount=r["amount"],
            at=r["at"],
        )
        for r in rows
    ]


async def applied(consumer: Connection) -> list[Effect]:
    """All effects, in the order of their aggregates' positions."""
    rows = await consumer.fetch(
        "SELECT *, extract(epoch FROM applied_at)::float8 AS at FROM effect ORDER BY kind, aggregate, position, id"
    )
    return [
        Effect(
            token=r["token"],
            key=(r["kind"], r["aggregate"]),
            seq=r["seq"],
            position=r["position"],
            message_id=r["message_id"],
            sha=r["sha"],
            amount=r["amount"],
            at=r["at"],
        )
        for r in rows
    ]


async def balances(consumer: Connection) -> dict[tuple[str, str], tuple[int, int]]:
    """(applied, balance) of every aggregate, as the handler has kept them."""
    rows = await consumer.fetch("SELECT * FROM account")
    return {(r["kind"], r["aggregate"]): (r["applied"], r["balance"]) for r in rows}


async def leftovers(producer: Connection, consumer: Connection, queues: Mapping[str, int]) -> Leftovers:
    """What is not done; `queues`: messages in each."""
    return Leftovers(
        parked=await producer.fetchval(_PARKED),
        unread=await producer.fetchval(_UNREAD),
        held=await consumer.fetchval(_HELD),
        gaps=await consumer.fetchval(_GAPS),
        conflicts=await consumer.fetchval(_QUARANTINE, True),
        strangers=await consumer.fetchval(_QUARANTINE, False),
        queued=queues.get("effects", 0),
        dead=queues.get("effects.dead", 0),
    )


async def lengths(stage: Stage) -> dict[str, int]:
    """Messages in every queue, ready and unacknowledged. Asks the queues: the management's figures are seconds old."""
    listed = await asyncio.to_thread(stage.broker.ctl, "list_queues", "--formatter", "json", "name", "messages")
    found: list[dict[str, Any]] = json.loads(listed)
    return {row["name"]: int(row["messages"]) for row in found}


def log_lines(daemons: Sequence[Daemon]) -> Iterator[tuple[str, str]]:
    """(name of the daemon, line) of all that they have written."""
    for daemon in daemons:
        for line in daemon.log_since(0).splitlines():
            yield daemon.name, line


def is_complaint(line: str) -> bool:
    """True for what no daemon should ever write: an exception that nobody expected, told by itself or inside a line of the log."""
    if not _COMPLAINT.search(line) or _ASYNCPGS_OWN in line:
        return False
    if line.startswith("{"):
        with suppress(ValueError):
            told = json.loads(line)
            return "never retrieved" in told.get("event", "") or not str(told.get("logger", "")).startswith(_LIBRARIES)
    return True


def exits(daemons: Sequence[Daemon]) -> list[str]:
    """Processes that ended though nobody had asked them to."""
    return [
        f"{daemon.name} ended by itself with exit code {code}"
        for daemon in daemons
        for _, code in daemon.unasked
        if code != RIGHTS_MISSING
    ]
