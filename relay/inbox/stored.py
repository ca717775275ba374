"""Store mode: what would be handed to a handler is written into relay.inbox instead, in the transaction that moves the cursors.

A service in any language takes it from there, in its own transaction: `SELECT * FROM relay.inbox_take(100)`.
"""

from __future__ import annotations

from collections.abc import Sequence

from relay.failpoints import Point, reached
from relay.inbox import storable
from relay.inbox.sequencer import Key, key_of
from relay.inbox.store import LOCK_TIMEOUT_S, PORTION_BYTES
from relay.message import Event
from relay.postgres.connect import Connection
from relay.postgres.queries import query


class Stored:
    """What one transaction stores: set-wise, in the order in which it was added, with one notification for all of it.

    Nothing here commits. One message cannot fail by itself, so nothing of this needs a savepoint.
    """

    def __init__(self, connection: Connection, consumer: str) -> None:
        self._connection = connection
        self._consumer = consumer
        self._waiting: list[Event] = []
        self._bytes = 0
        self._lowest: dict[Key, int] = {}  # number of each aggregate that this transaction has stored something of
        self._any = False

    async def add(self, event: Event) -> None:
        """Store an event. Held successors of a whole night may follow in one transaction: their bodies do not all wait here."""
        self._waiting.append(event)
        self._bytes += len(event.body)
        if self._bytes >= PORTION_BYTES:
            await self._insert()

    async def write(self) -> None:
        """Write what is left; takers are woken by the commit."""
        await self._insert()
        if self._any:
            await self._connection.execute(query("notify_stored"), self._consumer)
            reached(Point.STORED)

    async def _insert(self) -> None:
        events, self._waiting, self._bytes = self._waiting, [], 0
        if events:
            await self._connection.execute(query("store_events"), *self._arrays(events))
            self._any = True

    def _arrays(self, events: Sequence[Event]) -> tuple[object, ...]:
        return (
            self._consumer,
            [e.source for e in events],
            [e.aggregate_type for e in events],
            [e.aggregate_id for e in events],
            [e.seq for e in events],
            [e.event_type for e in events],
            [e.message_id for e in events],
            [storable.text(e.content_type) for e in events],
            [storable.headers(e.headers) for e in events],
            [e.occurred_at for e in events],
            [e.body for e in events],
            [self._is_first(e) for e in events],
        )

    def _is_first(self, event: Event) -> bool:
        key = key_of(event)
        if key is None or event.seq is None:
            return True
        if key in self._lowest and self._lowest[key] < event.seq:
            return False
        self._lowest[key] = event.seq  # by policy none a lower number may come later
        return True


Place = tuple[str, str, str, str]
"""Aggregate id, aggregate type, source, consumer: how the table's index is ordered."""


async def let_first_lead(
    connection: Connection, consumer: str, *, after: Place | None, aggregates: int
) -> tuple[list[str], Place | None]:
    """Mend aggregates that no taker would look at, walking through so many. Returns their names, and where to go on."""
    rows = await connection.fetch(
        query("let_first_lead"), consumer, *(after or ("", "", "", "")), aggregates, timeout=LOCK_TIMEOUT_S
    )
    mended = [f"{r['aggregate_type']}/{r['aggregate_id']}" for r in rows if r["id"] is not None]
    if mended:
        await connection.execute(query("notify_stored"), consumer)
    ends = [(r["aggregate_id"], r["aggregate_type"], r["source"], r["consumer"]) for r in rows if r["id"] is None]
    return mended, ends[0] if ends else None


async def probe(connection: Connection, consumer: str) -> None:
    """Raise what storing would raise (privileges, read-only server): nothing is stored."""
    await connection.execute(query("store_events"), consumer, *([] for _ in range(11)))
    await let_first_lead(connection, consumer, after=None, aggregates=0)
