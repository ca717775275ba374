"""Reads from the two databases and the broker what a run has left behind."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from tests.faults.lab.daemons import Daemon
from tests.faults.lab.evidence import Committed, Effect, Leftovers
from tests.faults.lab.stage import Stage
from tests.faults.lab.witness import BINDINGS
from tests.faults.lab.workload import AGGREGATES

UNWITNESSED = frozenset(AGGREGATES) - {binding.partition(".")[0] for binding in BINDINGS}

_PARKED = "SELECT count(*) AS n FROM relay.outbox_parked"
_UNREAD = """
SELECT count(*) AS n FROM relay.outbox o, relay.outbox_cursor c
WHERE o.shard = c.shard AND NOT relay.outbox_is_read(o.xid, o.id, c.snapshot, c.window_snapshot, c.after_id)
"""
_HELD = "SELECT count(*) AS n FROM relay.inbox_held"
_GAPS = "SELECT count(*) AS n FROM relay.inbox_gap"
_QUARANTINE = "SELECT count(*) AS n FROM relay.inbox_quarantine WHERE (reason = 'conflict') = $1"

_COMPLAINT = re.compile(
    r"^Traceback |never retrieved|was never awaited|Task was destroyed|^Fatal Python|Segmentation fault"
)


async def committed(stage: Stage) -> list[Committed]:
    """All events, as the producers' own table tells of them."""
    rows = await stage.producer_sql(
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


async def applied(stage: Stage) -> list[Effect]:
    """All effects, in the order of their aggregates' positions."""
    rows = await stage.consumer_sql(
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


async def balances(stage: Stage) -> dict[tuple[str, str], tuple[int, int]]:
    """(applied, balance) of every aggregate, as the handler has kept them."""
    rows = await stage.consumer_sql("SELECT * FROM account")
    return {(r["kind"], r["aggregate"]): (r["applied"], r["balance"]) for r in rows}


async def leftovers(stage: Stage) -> Leftovers:
    """What is not done."""

    async def producers(statement: str) -> int:
        return int((await stage.producer_sql(statement))[0]["n"])

    async def consumers(statement: str, *arguments: object) -> int:
        return int((await stage.consumer_sql(statement, *arguments))[0]["n"])

    queues = await lengths(stage)
    return Leftovers(
        parked=await producers(_PARKED),
        unread=await producers(_UNREAD),
        held=await consumers(_HELD),
        gaps=await consumers(_GAPS),
        conflicts=await consumers(_QUARANTINE, True),
        strangers=await consumers(_QUARANTINE, False),
        queued=queues.get("effects", 0),
        dead=queues.get("effects.dead", 0),
    )


async def lengths(stage: Stage) -> dict[str, int]:
    """Messages in every queue, ready and unacknowledged. Asks the queues: the management's figures are seconds old."""
    listed = await asyncio.to_thread(stage.broker.ctl, "list_queues", "--formatter", "json", "name", "messages")
    found: list[dict[str, Any]] = json.loads(listed)
    return {row["name"]: int(row["messages"]) for row in found}


def complaints(daemons: tuple[Daemon, ...]) -> list[str]:
    """Lines of the logs that no daemon should ever write."""
    return [
        f"{daemon.name}: {line}"
        for daemon in daemons
        for line in daemon.log_since(0).splitlines()
        if _COMPLAINT.search(line)
    ]
