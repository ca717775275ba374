"""A consumer that joins late starts at the producer's counters: what they count is before its time, what comes after is applied.

The order matters, and `relay inbox seed` keeps it: first the queue and its bindings, then the counters. So every event after the
counters is in the queue, and what of the queue is not after them is dropped as a duplicate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace

import asyncpg

from relay.errors import ConfigError, PostgresUnavailable
from relay.message import TOMBSTONE
from relay.operate.audit import Operator, record
from relay.operate.counters import Counter, Portions
from relay.operate.inbox_acts import lock_first_stored
from relay.operate.selection import Selection
from relay.postgres.connect import Connection
from relay.postgres.errors import postgres_errors
from relay.postgres.queries import query

_TIMEOUT_S = 600.0
_LOCK_WAIT_MS = 45_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What seeding would find among a consumer's cursors."""

    missing: int = 0
    at_zero: int = 0  # the aggregate is known, nothing of it was applied
    same: int = 0  # at the producer's counter already
    elsewhere: int = 0  # left alone, unless forced

    def __add__(self, other: Compared) -> Compared:
        return Compared(
            missing=self.missing + other.missing,
            at_zero=self.at_zero + other.at_zero,
            same=self.same + other.same,
            elsewhere=self.elsewhere + other.elsewhere,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeded:
    """What seeding did."""

    source: str
    aggregates: int = 0  # counters that there were
    created: int = 0  # cursors that did not exist
    moved: int = 0  # cursors that existed
    set_aside: int = 0  # held messages from before, now in the quarantine

    @property
    def left_alone(self) -> int:
        """Cursors that count already, or are there."""
        return self.aggregates - self.created - self.moved


async def compare(connection: Connection, consumer: str, source: str, counters: Sequence[Counter]) -> Compared:
    """Compare a portion of counters with a consumer's cursors; changes nothing, locks nothing."""
    with postgres_errors():
        found = await connection.fetchrow(
            query("compare_seed"), consumer, source, *_columns(counters), timeout=_TIMEOUT_S
        )
    return Compared(**found) if found is not None else Compared()


async def seed(
    connection: Connection,
    *,
    consumer: str,
    source: str,
    counters: Portions,
    force: bool,
    operator: Operator,
    selection: Selection,
    also: Mapping[str, object],
    is_complete: bool = True,
) -> Seeded:
    """Put the consumer's cursors at the counters and note that it starts there: all in one transaction, with its record.

    Only cursors that are missing or still at 0; with `force` those that count already as well, forward and backward.
    `also`: what was asked for beside the filters, for the record. `is_complete`: these are all counters that were wanted, so that the consumer may start from now.
    """
    done = Seeded(source=source)
    with _told_of_locks(), postgres_errors():
        async with connection.transaction(isolation="read_committed"):
            await connection.execute(query("limit_lock_wait"), str(_LOCK_WAIT_MS))
            async with aclosing(counters):
                async for portion in counters:
                    done = await _portion(connection, consumer, done, portion, force=force)
            if is_complete:
                await connection.execute(query("record_seed"), consumer, source, done.aggregates)
            exact = selection.exact()
            await record(
                connection,
                operator=operator,
                side="inbox",
                act="seed",
                selection=replace(selection, consumer=consumer, source=source),
                rows=done.created + done.moved,
                aggregates=[] if exact is None else [exact],
                also=dict(also) | ({"force": True} if force else {}),
            )
            await connection.execute(query("notify_inbox"), consumer)
    return done


async def source_for(connection: Connection, consumer: str, aggregate: tuple[str, str], named: str | None) -> str:
    """Whose aggregate is meant: the source that was named, or the only one that the consumer knows. Raises ConfigError."""
    if named is not None:
        return named
    with postgres_errors():
        known = [r["source"] for r in await connection.fetch(query("seeded_sources"), consumer, *aggregate)]
    if len(known) != 1:
        which = (
            f"the consumer {consumer!r} knows {', '.join(known)}"
            if known
            else f"the consumer {consumer!r} knows none yet"
        )
        raise ConfigError(f"name the source of {'/'.join(aggregate)} with --source: {which}")
    return str(known[0])


async def _portion(
    connection: Connection, consumer: str, done: Seeded, counters: Sequence[Counter], *, force: bool
) -> Seeded:
    """The cursors first, which locks them; then, in a later snapshot, what is held for those that existed."""
    found = await connection.fetch(
        query("seed_cursors"), consumer, done.source, *_columns(counters), force, timeout=_TIMEOUT_S
    )
    created = sum(r["last_seq"] for r in found if r["aggregate_id"] is None)
    moved = [Counter(**r) for r in found if r["aggregate_id"] is not None]
    set_aside = 0
    if moved:
        set_aside = await connection.fetchval(
            query("seed_held"), consumer, done.source, *_columns(moved), TOMBSTONE, timeout=_TIMEOUT_S
        )
        await _drop_stored(connection, consumer, done.source, moved)
    return replace(
        done,
        aggregates=done.aggregates + len(counters),
        created=done.created + created,
        moved=done.moved + len(moved),
        set_aside=done.set_aside + set_aside,
    )


async def _drop_stored(connection: Connection, consumer: str, source: str, moved: Sequence[Counter]) -> None:
    """Under the lock that keeps takers away, like every deletion of stored messages."""
    rows = await connection.fetch(query("seed_stored"), consumer, source, *_columns(moved), timeout=_TIMEOUT_S)
    if ids := [r["id"] for r in rows]:
        await lock_first_stored(connection, consumer, ids)
        await connection.execute(query("drop_stored"), consumer, ids, timeout=_TIMEOUT_S)


@contextmanager
def _told_of_locks() -> Iterator[None]:
    """Within it, a running inbox that is in the way is named as what it is."""
    try:
        yield
    except PostgresUnavailable as exc:
        if exc.sqlstate not in (asyncpg.LockNotAvailableError.sqlstate, asyncpg.DeadlockDetectedError.sqlstate):
            raise
        raise PostgresUnavailable(
            "a running inbox is at work on these aggregates: nothing was changed. Try again, or stop the inbox meanwhile.",
            sqlstate=exc.sqlstate,
        ) from exc


def _columns(counters: Sequence[Counter]) -> tuple[list[str], list[str], list[int]]:
    return (
        [c.aggregate_type for c in counters],
        [c.aggregate_id for c in counters],
        [c.last_seq for c in counters],
    )
