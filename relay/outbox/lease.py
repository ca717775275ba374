"""Who owns a shard: a session lock on a dedicated connection, and an epoch that fences every write of an owner that does not know it is over."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass

import structlog

from relay.errors import ConfigError, PostgresUnavailable
from relay.failpoints import Point, reached
from relay.outbox.cursor import Position, Snapshot
from relay.postgres.connect import Connection
from relay.postgres.errors import postgres_errors
from relay.postgres.queries import query
from relay.supervisor import wait_for

log = structlog.get_logger()

OWNER_LOCK = 727003
"""First key of the ownership lock; the second is the shard."""


_LOCK_TIMEOUT = "5s"
"""While the log's lock is waited for, every producer waits behind it: give up soon, and try again in the next session."""

_REBASE_TIMEOUT_S = 24 * 3600.0
"""Re-basing rewrites the log once after a restore, as fast as PostgreSQL can (measured: 70 000 rows/s); cut short it would begin again."""


@dataclass(frozen=True, slots=True)
class Ownership:
    """A shard that is ours, and where its log has been read to."""

    shard: int
    epoch: int
    position: Position
    high_id: int


async def wait_for_ownership(
    connection: Connection, *, shard: int, source: str, interval_s: float, stop: asyncio.Event
) -> Ownership | None:
    """Become the owner; None if `stop` was set first.

    Tries every `interval_s` seconds instead of waiting inside the lock: a waiting statement would hold a snapshot, and
    with it back the cluster's xmin, for as long as this process is the standby.
    """
    announced = False
    while not stop.is_set():
        with postgres_errors():
            if await connection.fetchval(query("try_owner_lock"), OWNER_LOCK, shard):
                return await _take(connection, shard, source)
        if not announced:
            log.info("standby", shard=shard, reason="another relay owns the shard")
            announced = True
        await wait_for(stop, interval_s)
    return None


async def _take(connection: Connection, shard: int, source: str) -> Ownership:
    """Raise the epoch, check that the cursor belongs to this log and this cluster, re-base it if it was restored."""
    owner = f"{socket.gethostname()}:{os.getpid()}"
    async with connection.transaction():
        await connection.execute(query("lock_cursor"), shard)
        cursor = await connection.fetchrow(query("take_ownership"), shard, owner)
        if cursor is None:
            raise PostgresUnavailable(f"shard {shard} has no cursor any more")
        if cursor["source"] not in (None, source):
            raise ConfigError(
                f"this outbox has been published as source {cursor['source']!r}, the setting says {source!r}: consumers would take "
                "every event for a new one. Set source back, or change relay.outbox_cursor.source if you really mean it."
            )
        restored = cursor["cluster_id"] not in (None, cursor["current_cluster_id"]) or cursor["from_the_future"]
        if restored:
            position = await _rebase(connection, shard, cursor["epoch"], cursor["current_cluster_id"])
        else:
            await connection.execute(query("name_source"), shard, cursor["epoch"], source, cursor["current_cluster_id"])
            window = cursor["window_snapshot"]
            position = Position(
                Snapshot.parse(cursor["snapshot"]), window and Snapshot.parse(window), cursor["after_id"]
            )
    if restored:
        reached(Point.REBASED)
    reached(Point.OWNED)
    log.info("owner", shard=shard, epoch=cursor["epoch"])
    return Ownership(shard, cursor["epoch"], position, cursor["high_id"])


async def _rebase(connection: Connection, shard: int, epoch: int, cluster_id: int) -> Position:
    """After a restore the transaction ids in the log are another cluster's: give the unpublished rows one of this cluster's."""
    await connection.execute(query("set_session"), "lock_timeout", _LOCK_TIMEOUT)
    await connection.execute(query("lock_log"))
    rewritten = await connection.execute(query("rebase"), shard, timeout=_REBASE_TIMEOUT_S)
    await connection.execute(query("renumber"), shard, timeout=_REBASE_TIMEOUT_S)
    snapshot = await connection.fetchval(query("rebase_cursor"), shard, epoch, cluster_id)
    await connection.execute(query("advance_ids"))
    reached(Point.REBASING)
    log.warning(
        "rebased", shard=shard, rows=int(rewritten.split()[-1]), reason="the log was restored into another cluster"
    )
    return Position(Snapshot.parse(snapshot))
