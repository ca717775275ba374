"""Empties the slots of the ring in which every row is published and old. Nothing that is still needed is ever removed.

The rule is checked in the database, under the lock of the slot (relay.outbox_empty_slot): no row unpublished, parked, young,
or still to be read by an unfinished replay. Here is only the patience: a slot that is needed, or in use, is looked at again later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import asyncpg
import structlog

from relay.failpoints import Point, reached
from relay.postgres.connect import Connection
from relay.postgres.errors import postgres_errors
from relay.postgres.queries import query

log = structlog.get_logger()

_EVERY_S = 60.0
"""Time between two looks: a few index look-ups for each slot."""

_PATIENCE_S = 1800.0
"""Longest time between two attempts at a slot: two days of the ring are left for it at least, with the default retention."""

_LEAST_S = 3600.0
"""No slot is touched in the hour after it was filled, however short the retention: the clock may have been set back a little."""

_SCAN_TIMEOUT_S = 6 * 3600.0
_EMPTY_TIMEOUT = "5s"
"""For all that is done under the lock. What takes longer is given up, and everybody may read the log again."""


@dataclass(slots=True)
class _Attempt:
    """What is known of a slot from before."""

    not_before: float = 0.0  # by the event loop's clock
    failures: int = 0
    told: str | None = None  # the reason that was logged last
    seen: str | None = None  # the snapshot of a scan that found every row published and old
    rows: int = 0  # that it found


class Retention:
    """Looks after the ring of one log, on a connection that it opens for each look. `run` is a service, see relay.services."""

    def __init__(self, connect: Callable[[], AbstractAsyncContextManager[Connection]], *, retention_s: float) -> None:
        self._connect = connect
        self._kept_s = max(retention_s, _LEAST_S)
        self._attempts: dict[int, _Attempt] = {}
        self._marks_are_swept = False

    async def run(self) -> None:
        """Sweep at once, and then every minute. Raises PostgresError; calling it again is always right."""
        while True:
            await self.sweep()
            await asyncio.sleep(_EVERY_S)

    async def sweep(self) -> list[int]:
        """Look at every slot that is old enough; empty those that can be. Returns them."""
        async with self._connect() as connection:
            with postgres_errors():
                found = await connection.fetch(query("old_slots"), self._kept_s)
                emptied = [slot["slot"] for slot in found if await self._consider(connection, slot)]
                if emptied or not self._marks_are_swept:
                    await connection.execute(query("forget_tombstones"))
                    self._marks_are_swept = True
        return emptied

    async def _consider(self, connection: Connection, slot: asyncpg.Record) -> bool:
        number = slot["slot"]
        attempt = self._attempts.setdefault(number, _Attempt())
        if slot["needed"] is not None:
            self._keep(number, slot["needed"], attempt)
            return False
        if slot["young_for_s"] > 0:
            self._keep(number, "young", attempt)
            return False
        if asyncio.get_running_loop().time() < attempt.not_before:
            return False
        self._wait(attempt, min(_EVERY_S * 2**attempt.failures, _PATIENCE_S))  # also if it ends in an error
        attempt.failures = min(attempt.failures + 1, 20)
        reason = await self._scan(connection, number, attempt) or await self._empty(connection, number, attempt)
        if reason is not None:
            self._keep(number, reason, attempt)
            return False
        reached(Point.SLOT_EMPTIED)
        log.info("slot_emptied", slot=number, rows=attempt.rows, bytes=slot["bytes"])
        del self._attempts[number]
        return True

    async def _scan(self, connection: Connection, slot: int, attempt: _Attempt) -> str | None:
        """See that every row is published and old, or say why the slot must be kept. Once it is so, it stays so."""
        if attempt.seen is not None:
            return None
        await connection.execute(query("set_session"), "enable_seqscan", "on")
        found = await connection.fetchrow(query("scan_slot"), slot, self._kept_s, timeout=_SCAN_TIMEOUT_S)
        await connection.execute(query("set_session"), "enable_seqscan", "off")
        assert found is not None  # noqa: S101 - an aggregate is one row
        if not found["published"]:
            return "unpublished"
        if found["young_for_s"] > 0:  # imported with another time than its neighbours
            self._wait(attempt, min(found["young_for_s"], _PATIENCE_S))
            return "young"
        attempt.seen, attempt.rows = found["seen"], found["rows"]
        reached(Point.SLOT_SCANNED)
        return None

    async def _empty(self, connection: Connection, slot: int, attempt: _Attempt) -> str | None:
        await connection.execute(query("set_session"), "statement_timeout", _EMPTY_TIMEOUT)
        reason: str | None = await connection.fetchval(query("empty_slot"), slot, attempt.seen)
        await connection.execute(query("set_session"), "statement_timeout", "0")
        if reason != "locked":
            attempt.seen = None  # what the scan found is not all there is
        return reason

    def _wait(self, attempt: _Attempt, delay_s: float) -> None:
        attempt.not_before = asyncio.get_running_loop().time() + delay_s

    def _keep(self, slot: int, reason: str, attempt: _Attempt) -> None:
        if reason != attempt.told:
            attempt.told = reason
            log.info("slot_kept", slot=slot, reason=_REASONS[reason])


_REASONS = {
    "current": "producers fill it again",
    "unpublished": "a row in it is not published yet",
    "parked": "a row in it is parked",
    "replay": "an unfinished replay is still to read it: resume it, or abandon it",
    "young": "a row in it is younger than outbox.retention_s",
    "locked": "another session holds a lock on it",
    "arriving": "a row was inserted into it just now",
}
