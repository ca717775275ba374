"""The inbox's tables, asked set-wise inside one batch transaction. Nothing here commits."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import asyncpg

from relay.inbox import storable
from relay.inbox.failures import MOVED, CommitFailed
from relay.inbox.sequencer import Arrival, Cursor, Key, Reason
from relay.message import TOMBSTONE, Delivery, Event
from relay.postgres import arrays
from relay.postgres.connect import Connection
from relay.postgres.queries import query

PORTION_BYTES = 32 * 1024 * 1024
"""Most bytes of bodies sent or fetched by one statement (its first row always fits)."""

LOCK_TIMEOUT_S = 600.0
"""Longest wait for the cursors that a competing consumer has locked: for as long as its handlers are at work. The time-out of
other statements would end our session for that, again and again. A competitor that is gone is noticed by the server."""

_LOCK_ROUNDS = 10
_NEW = Cursor()
_cursor = partial(tuple.__new__, Cursor)
"""A Cursor of a tuple: half of the time that its constructor takes, which is a function of Python's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """A message to hold, or how one that is held already fared."""

    arrival: Arrival
    reason: Reason
    attempts: int = 0
    error: str | None = None
    delay_s: float | None = None  # to the next attempt; None: it waits for its predecessor, or is stuck

    @property
    def state(self) -> str:
        """As in relay.inbox_held."""
        if self.delay_s is not None:
            return "retrying"
        return "stuck" if self.reason == "failed" else "waiting"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stranger:
    """A delivery that is not an event of ours, or contradicts one."""

    reason: str  # foreign, malformed, conflict
    detail: str
    message_id: str | None
    exchange: str
    routing_key: str
    properties: str  # JSON
    body: bytes

    @classmethod
    def of_delivery(cls, delivery: Delivery, reason: str, detail: str) -> Stranger:
        """From a delivery that does not keep the wire contract."""
        return cls(
            reason=reason,
            detail=detail,
            message_id=delivery.message_id,
            exchange=delivery.exchange,
            routing_key=delivery.routing_key,
            properties=storable.properties_of_delivery(delivery),
            body=delivery.body,
        )

    @classmethod
    def of_conflict(cls, arrival: Arrival) -> Stranger:
        """From an event whose number was used for other content."""
        event = arrival.event
        return cls(
            reason="conflict",
            detail=f"{event.aggregate_type}/{event.aggregate_id} seq {event.seq} was received before with other content",
            message_id=event.message_id,
            exchange=arrival.exchange,
            routing_key=arrival.routing_key,
            properties=storable.properties_of_event(event),
            body=event.body,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """A number that was used for two contents: what an alarm may say about it."""

    source: str
    aggregate_type: str | None
    aggregate_id: str | None
    seq: int | None
    message_id: str  # of the one in the quarantine


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """A held message whose time to be tried has come."""

    held_id: int
    source: str
    aggregate_type: str | None
    aggregate_id: str | None
    seq: int | None
    message_id: str


Columns = tuple[list[str], list[str], str, list[int]]
"""Keys as `columns` makes them."""

Patiently = Callable[[Awaitable[list[asyncpg.Record]]], Awaitable[list[asyncpg.Record]]]
"""How a statement that waits for locks is waited for: `relay.inbox.database.Database.patiently`."""


class GivenUp(Exception):
    """Copies of messages were applied although tombstones are held in their places: the transaction must be redone with those."""

    def __init__(self, held_ids: Sequence[int]) -> None:
        super().__init__(f"{len(held_ids)} given up")
        self.held_ids = held_ids


class Store:
    """The statements of one transaction of one consumer. Those that wait for another consumer's have a time-out of their own."""

    def __init__(
        self,
        connection: Connection,
        consumer: str,
        *,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
        patiently: Patiently | None = None,
    ) -> None:
        self._connection = connection
        self._consumer = consumer
        self._lock_timeout_s = lock_timeout_s
        self._patiently = patiently
        self._told: tuple[list[Key], Columns] = ([], columns([]))  # the last keys: mostly they come again
        self._tids: dict[Key, str] = {}  # where the rows of the cursors are that were locked
        self.locked_in: str | None = None  # the transaction in which cursors were locked; None: none were
        self.written_in: str | None = None  # in which they were written

    async def transaction_id(self) -> str:
        """The transaction we are in."""
        return str(await self._connection.fetchval(query("transaction_id")))

    async def lock_cursors(self, keys: Iterable[Key], *, is_new: bool = False) -> dict[Key, Cursor]:
        """The cursors of these aggregates, created where missing, all locked until the end of the transaction.

        In the order in which they are locked. Whether anything is held of them is not known yet.
        `is_new`: it seems that the first does not exist. That spares it, alone, a round trip; several are locked first in any case: who
        created one and then waited for the lock of another would be waited for by its owner, who is to create the first.
        """
        wanted = sorted(set(keys))
        if not wanted:
            return {}
        if is_new and len(wanted) == 1 and (created := await self._create(wanted)):
            return created
        cursors: dict[Key, Cursor] = {}
        missing = wanted
        for _ in range(_LOCK_ROUNDS):
            found = await self._lock(missing)
            if len(found) == len(wanted):
                return found
            cursors |= found
            if missing := [key for key in missing if key not in found]:
                created = await self._create(missing)
                cursors |= created
                missing = [key for key in missing if key not in created]
            if not missing:
                return {key: cursors[key] for key in wanted}
        raise asyncpg.SerializationError(f"the cursors of {len(missing)} aggregates come and go")

    async def _lock(self, keys: list[Key]) -> dict[Key, Cursor]:
        """Those that exist."""
        rows = await self._fetch_locking("lock_cursors", *self._columns(keys))
        self._locked(rows)
        found: dict[Key, Cursor] = {}
        for place, last_seq, digest, blocked, tid, _ in rows:
            key = keys[place - 1]
            found[key] = _cursor((last_seq, digest, blocked, True))
            self._tids[key] = tid
        return found

    async def _create(self, keys: Sequence[Key]) -> dict[Key, Cursor]:
        """Those that did not exist: what another consumer inserted meanwhile has to be locked like the rest."""
        rows = await self._fetch_locking("create_cursors", *columns(keys))
        self._locked(rows)
        created = {(source, aggregate_type, name): tid for source, aggregate_type, name, tid, _ in rows}
        self._tids |= created
        return dict.fromkeys(created, _NEW)

    def _locked(self, rows: Sequence[asyncpg.Record]) -> None:
        """Note the transaction, which comes with the first row if with any."""
        if rows and self.locked_in is None:
            self.locked_in = rows[0][-1]

    async def _fetch_locking(self, block: str, *arguments: object) -> list[asyncpg.Record]:
        """A statement that may wait for another consumer's transaction."""
        fetching = self._connection.fetch(query(block), self._consumer, *arguments, timeout=self._lock_timeout_s)
        return await (fetching if self._patiently is None else self._patiently(fetching))

    async def looked_for_held(self, cursors: Mapping[Key, Cursor]) -> dict[Key, Cursor]:
        """Cursors that are locked, so that nobody else adds to what is held; and now it is known of which anything is."""
        if not cursors:
            return {}
        keys = list(cursors)
        rows = await self._connection.fetch(query("lines_with_held"), self._consumer, *self._columns(keys))
        held = {keys[place - 1] for (place,) in rows}
        return {key: cursor._replace(has_held=key in held) for key, cursor in cursors.items()}

    def _columns(self, keys: list[Key]) -> Columns:
        """`columns`, made once for the statements of a batch that are about the same aggregates."""
        if keys != self._told[0]:
            self._told = (keys, columns(keys))
        return self._told[1]

    async def insert_seen(self, events: Iterable[Event]) -> set[tuple[str, str]]:
        """Remember the ids of events without order; return those (source, message id) that are new."""
        names = sorted({(event.message_id, event.source) for event in events})
        if not names:
            return set()
        ids, sources = [name[0] for name in names], [name[1] for name in names]
        rows = await self._fetch_locking("insert_seen", sources, ids)
        return {(r["source"], r["message_id"]) for r in rows}

    async def successors(self, cursors: Mapping[Key, Cursor], portion: int) -> list[Arrival]:
        """What is held without a gap after these cursors, in order, at most `portion` an aggregate and PORTION_BYTES in all.

        Empty only if no cursor has a held successor.
        """
        found: list[Arrival] = []
        for (source, aggregate_type), ids in sorted(_grouped(cursors).items()):
            last = [cursors[source, aggregate_type, i].last_seq for i in ids]
            rows = await self._connection.fetch(
                query("held_successors"), self._consumer, source, aggregate_type, ids, last, portion, PORTION_BYTES
            )
            found += map(_arrival, rows)
        return found

    async def lock_due(self, due: Sequence[Due]) -> list[Arrival]:
        """Those of the due messages that are still due, locked, oldest first."""
        if not due:
            return []
        rows = await self._connection.fetch(query("lock_due_held"), self._consumer, [d.held_id for d in due])
        return sorted(map(_arrival, rows), key=lambda a: a.event.seq or 0)

    async def write_cursors(self, cursors: Mapping[Key, Cursor], *, look: bool) -> list[Key]:
        """Write cursors that were locked by this Store. `look`: if anything is held of some, write none, and return those.

        Raises CommitFailed when their rows are not where they were locked: a handler, or a trigger, has changed them.
        """
        if not cursors:
            return []
        keys, values = list(cursors), list(cursors.values())
        row = await self._connection.fetchrow(
            query("write_cursors"),
            self._consumer,
            *self._columns(keys),
            arrays.texts([self._tids[key] for key in keys]),
            arrays.numbers([c.last_seq for c in values]),
            arrays.octets([c.last_digest for c in values]),
            [place for place, c in enumerate(values, start=1) if c.blocked],
            look,
        )
        if row is None:
            raise AssertionError("write_cursors gives one row")
        self.written_in, held, written = row["transaction_id"], row["held"], row["written"]
        if not held and written != len(keys) and self.written_in == self.locked_in:
            raise CommitFailed(MOVED)
        return [keys[place - 1] for place in held]

    async def delete_held_through(
        self, cursors: Mapping[Key, Cursor], applied: Mapping[Key, Mapping[int, bytes]]
    ) -> list[Conflict]:
        """Delete what is held up to these cursors. What is not what was applied under its number goes to the quarantine.

        Raises GivenUp when something was applied that an operator had given up while it was held.
        """
        conflicts: list[Conflict] = []
        given_up: list[int] = []
        for (source, aggregate_type), ids in sorted(_grouped(cursors).items()):
            keys: list[Key] = [(source, aggregate_type, i) for i in ids]
            known = [(key[2], seq, digest) for key in keys for seq, digest in applied.get(key, {}).items()]
            rows = await self._connection.fetch(
                query("delete_held_through"),
                self._consumer,
                source,
                aggregate_type,
                ids,
                [cursors[key].last_seq for key in keys],
                [k[0] for k in known],
                [k[1] for k in known],
                [k[2] for k in known],
                TOMBSTONE,
            )
            given_up += [row["id"] for row in rows if row["given_up"]]
            conflicts += [
                Conflict(
                    source=row["source"],
                    aggregate_type=row["aggregate_type"],
                    aggregate_id=row["aggregate_id"],
                    seq=row["seq"],
                    message_id=row["message_id"],
                )
                for row in rows
                if not row["given_up"]
            ]
        if given_up:
            raise GivenUp(given_up)
        return conflicts

    async def held(self, held_ids: Sequence[int]) -> list[Arrival]:
        """These held messages, in order, as far as they are still held."""
        if not held_ids:
            return []
        return [_arrival(r) for r in await self._connection.fetch(query("held_by_id"), self._consumer, held_ids)]

    async def delete_held(self, held_ids: Sequence[int]) -> None:
        """Delete held messages that have been applied."""
        if held_ids:
            await self._connection.execute(query("delete_held"), held_ids)

    async def hold(self, holds: Sequence[Hold]) -> tuple[list[Arrival], list[Arrival]]:
        """Hold messages. Returns those that were held already: (with the same content, with other content)."""
        fresh = [hold for hold in holds if hold.arrival.held_id is None]
        known = [hold for hold in holds if hold.arrival.held_id is not None]
        if known:
            await self._update_held(known)
        inserted: set[tuple[object, ...]] = set()
        for portion in _portions(fresh, lambda hold: len(hold.arrival.event.body)):
            inserted |= await self._insert_held(portion)
        same: list[Arrival] = []
        other: list[Arrival] = []
        for hold in fresh:
            if _name(hold.arrival.event) in inserted:
                continue
            held_id = await self._held_as(hold.arrival.event)
            if held_id is None:
                other.append(hold.arrival)
            elif (
                hold.reason == "failed" and held_id
            ):  # held early before, and its redelivered copy failed: the failure counts
                await self._update_held([replace(hold, arrival=hold.arrival._replace(held_id=held_id))])
            else:
                same.append(hold.arrival)
        return same, other

    async def make_successors_due(self, cursors: Mapping[Key, Cursor]) -> list[Key]:
        """Let the retry timer try what is held right after these cursors, all of it; return those that have something."""
        found: list[Key] = []
        for (source, aggregate_type), ids in sorted(_grouped(cursors).items()):
            last = [cursors[source, aggregate_type, i].last_seq for i in ids]
            rows = await self._connection.fetch(
                query("make_successors_due"), self._consumer, source, aggregate_type, ids, last
            )
            found += [(source, aggregate_type, row["aggregate_id"]) for row in rows]
        return found

    async def quarantine(self, strangers: Sequence[Stranger]) -> None:
        """Keep whole what cannot be applied."""
        for portion in _portions(strangers, lambda stranger: len(stranger.body)):
            await self._connection.execute(
                query("insert_quarantine"),
                self._consumer,
                [s.reason for s in portion],
                [storable.text(s.detail) for s in portion],
                [storable.optional(s.message_id) for s in portion],
                [storable.text(s.exchange) for s in portion],
                [storable.text(s.routing_key) for s in portion],
                [s.properties for s in portion],
                [s.body for s in portion],
            )

    async def _insert_held(self, holds: Sequence[Hold]) -> set[tuple[object, ...]]:
        events = [hold.arrival.event for hold in holds]
        rows = await self._connection.fetch(
            query("insert_held"),
            self._consumer,
            [e.source for e in events],
            [e.aggregate_type for e in events],
            [e.aggregate_id for e in events],
            [e.seq for e in events],
            [e.message_id for e in events],
            [e.event_type for e in events],
            [storable.text(e.content_type) for e in events],
            [storable.headers(e.headers) for e in events],
            [e.body for e in events],
            [e.digest for e in events],
            [e.occurred_at for e in events],
            [hold.reason for hold in holds],
            [hold.state for hold in holds],
            [hold.attempts for hold in holds],
            [storable.optional(hold.error) for hold in holds],
            [hold.delay_s for hold in holds],
        )
        return {tuple(row.values()) for row in rows}

    async def _update_held(self, holds: Sequence[Hold]) -> None:
        await self._connection.execute(
            query("update_held"),
            [hold.arrival.held_id for hold in holds],
            [hold.reason for hold in holds],
            [hold.state for hold in holds],
            [hold.attempts for hold in holds],
            [storable.optional(hold.error) for hold in holds],
            [hold.delay_s for hold in holds],
        )

    async def _held_as(self, event: Event) -> int | None:
        """The row (0: not known) that holds the same event already; None if another content is held under its number.

        A tombstone takes the place of what is held instead of contradicting it.
        """
        if event.seq is None:
            return 0  # without order, the message id is all the identity there is
        row = await self._connection.fetchrow(
            query("held_digest"), self._consumer, event.source, event.aggregate_type, event.aggregate_id, event.seq
        )
        if row is None:
            return 0
        held_id: int = row["id"]
        if row["digest"] == event.digest or row["event_type"] == TOMBSTONE:
            return held_id
        if not event.is_tombstone:
            return None
        await self._connection.execute(
            query("replace_held"),
            held_id,
            event.message_id,
            event.event_type,
            storable.text(event.content_type),
            storable.headers(event.headers),
            event.body,
            event.digest,
        )
        return held_id


async def due_held(connection: Connection, consumer: str, rows: int) -> list[Due]:
    """The held messages whose time has come, not locked."""
    found = await connection.fetch(query("due_held"), consumer, rows, PORTION_BYTES)
    return [
        Due(
            held_id=r["id"],
            source=r["source"],
            aggregate_type=r["aggregate_type"],
            aggregate_id=r["aggregate_id"],
            seq=r["seq"],
            message_id=r["message_id"],
        )
        for r in found
    ]


async def next_due_s(connection: Connection, consumer: str) -> float | None:
    """Seconds until the next held message is due, by the database's clock; None if none is."""
    seconds: float | None = await connection.fetchval(query("next_due"), consumer)
    return seconds


async def release_waiting(
    connection: Connection, consumer: str, *, after: Key | None, aggregates: int
) -> tuple[int, Key | None]:
    """Make due what waits although its turn has come, looking at so many aggregates. Returns how many, and where to go on."""
    source, aggregate_type, aggregate_id = after or ("", "", "")
    row = await connection.fetchrow(
        query("release_waiting"), consumer, aggregate_id, aggregate_type, source, aggregates, timeout=LOCK_TIMEOUT_S
    )
    if row is None:
        return 0, None
    end: Key = (row["source"], row["aggregate_type"], row["aggregate_id"])
    return row["released"], None if row["aggregate_id"] is None else end


async def purge_seen(connection: Connection, consumer: str, *, retention_s: float, rows: int) -> None:
    """Forget ids that are older than the retention, at most `rows`."""
    await connection.execute(query("purge_seen"), consumer, retention_s, rows)


async def probe(connection: Connection, consumer: str) -> None:
    """Raise what writing would raise (privileges, read-only server), and write nothing."""
    attempt = connection.transaction()
    await attempt.start()
    try:
        await connection.execute(query("probe_inbox"), consumer)
    finally:
        if not connection.is_closed():
            await attempt.rollback()


_T = TypeVar("_T")


def _arrival(row: asyncpg.Record) -> Arrival:
    event = Event(
        source=row["source"],
        aggregate_type=row["aggregate_type"],
        aggregate_id=row["aggregate_id"],
        seq=row["seq"],
        event_type=row["event_type"],
        message_id=row["message_id"],
        content_type=row["content_type"],
        headers=json.loads(row["headers"]),
        occurred_at=row["occurred_at"],
        body=row["body"],
        digest=row["digest"],
    )
    return Arrival(event=event, held_id=row["id"], attempts=row["attempts"])


def _name(event: Event) -> tuple[object, ...]:
    return (event.source, event.aggregate_type, event.aggregate_id, event.seq, event.message_id)


def columns(keys: Sequence[Key]) -> Columns:
    """Keys as statements take them: sources and aggregate types of the pairs that occur, ids, and which pair is whose."""
    pairs = {pair: number for number, pair in enumerate(dict.fromkeys([key[:2] for key in keys]), start=1)}
    return (
        [pair[0] for pair in pairs],
        [pair[1] for pair in pairs],
        arrays.texts([key[2] for key in keys]),
        [pairs[key[:2]] for key in keys] if len(pairs) > 1 else [],
    )


def _grouped(keys: Iterable[Key]) -> dict[tuple[str, str], list[str]]:
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for source, aggregate_type, aggregate_id in keys:
        groups[source, aggregate_type].append(aggregate_id)
    return groups


def _portions(items: Sequence[_T], size: Callable[[_T], int]) -> Iterator[list[_T]]:
    portion: list[_T] = []
    total = 0
    for item in items:
        if portion and total + size(item) > PORTION_BYTES:
            yield portion
            portion, total = [], 0
        portion.append(item)
        total += size(item)
    if portion:
        yield portion
