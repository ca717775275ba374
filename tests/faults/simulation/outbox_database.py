"""The producer's database, as DESIGN.md section 3 describes it: an append-only log, snapshots, counters, a cursor, two advisory locks."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from relay.message import Row
from tests.faults.simulation.clock import VirtualLoop
from tests.faults.simulation.outbox_parked import ParkedRows
from tests.faults.simulation.server import Server, Session

CREATED_AT = datetime(2026, 1, 1, tzinfo=UTC)
Place = tuple[str, str]


class Record(dict[str, Any]):
    """A row of an answer, as asyncpg gives it: columns by name, and by their places."""

    def __getitem__(self, column: str | slice) -> Any:
        return (*self.values(),)[column] if isinstance(column, slice) else super().__getitem__(column)


@dataclass(frozen=True, slots=True)
class LogRow:
    """A row of relay.outbox, of a transaction that may still be in progress."""

    id: int
    xid: int
    place: Place
    seq: int
    record: dict[str, Any]  # as a statement returns it


@dataclass(frozen=True, slots=True)
class Cursor:
    """The row of relay.outbox_cursor. Snapshots as PostgreSQL writes them."""

    epoch: int = 0
    snapshot: str = "1:1:"
    window: str | None = None
    after_id: int = 0
    high_id: int = 0


class Snapshot:
    """A pg_snapshot, read again from its text: independent of relay's own class."""

    def __init__(self, text: str) -> None:
        _, xmax, xip = text.split(":")
        self.xmax = int(xmax)
        self.xip = frozenset(int(xid) for xid in xip.split(",") if xid)

    def sees(self, xid: int) -> bool:
        """Whether the transaction had ended when the snapshot was taken."""
        return xid < self.xmax and xid not in self.xip


class ProducerTransaction:
    """A transaction of the application. It holds the counters of its aggregates, and the barrier, to its end."""

    def __init__(self, database: OutboxDatabase) -> None:
        self._database = database
        self.xid = database.begin_xid()  # taken early: long before the first event, perhaps
        self.rows: list[LogRow] = []
        self.counters: dict[Place, int] = {}  # as they were
        self.holds_barrier = False
        self.is_over = False
        self._notifies = False

    def insert(self, place: Place, event_type: str) -> LogRow | None:
        """INSERT INTO relay.outbox. None: another transaction holds the counter, and this one would have to wait."""
        db = self._database
        if db.counter_owner.get(place, self) is not self:
            return None
        db.counter_owner[place] = self
        self.counters.setdefault(place, db.counters.get(place, 0))
        seq = db.counters[place] = db.counters.get(place, 0) + 1
        db.last_id += 1
        row = db.new_row(db.last_id, self.xid, place, seq, event_type)
        self.rows.append(row)
        if not self.holds_barrier:
            if db.try_barrier(self):
                self.holds_barrier = True
            else:
                self._notifies = True
        return row

    def commit(self) -> None:
        """All its events are there at one moment; a relay that was asleep is told."""
        db = self._database
        db.log.extend(self.rows)
        db.log.sort(key=lambda row: row.id)
        self._end()
        if self._notifies:
            db.notify("relay_outbox", "0")

    def roll_back(self) -> None:
        """Nothing was; only ids are used up."""
        self._database.counters |= self.counters
        self._end()

    def _end(self) -> None:
        db = self._database
        self.is_over = True
        for place in self.counters:
            del db.counter_owner[place]
        db.barrier.discard(self)
        db.end_xid(self.xid)


class OutboxDatabase(Server):
    """Answers what relay/outbox asks."""

    def __init__(self, loop: VirtualLoop, dice: random.Random) -> None:
        super().__init__(loop, dice)
        self.log: list[LogRow] = []  # committed, by id
        self.counters: dict[Place, int] = {}
        self.counter_owner: dict[Place, ProducerTransaction] = {}
        self.last_id = 0
        self.barrier: set[ProducerTransaction] = set()  # who holds S(0) shared
        self.tables["cursor"][0] = Cursor()
        self.parked = ParkedRows(self)
        self.answer(
            try_owner_lock=self.try_session_lock,
            set_session=lambda *_: None,
            try_wake_lock=self._try_wake_lock,
            release_wake_lock=self.unlock,
            lock_cursor=self._lock_cursor,
            take_ownership=self._take_ownership,
            name_source=lambda *_: None,
            note_failure=lambda *_: None,
            open_window=self._open_window,
            open_window_with_late=self._open_window,
            next_page=self._next_page,
            checkpoint=self._checkpoint,
            fence=self._fence,
        )

    # --- producers

    def new_row(self, row_id: int, xid: int, place: Place, seq: int, event_type: str) -> LogRow:
        """A row as the trigger leaves it."""
        row = Row(
            id=row_id,
            aggregate_type=place[0],
            aggregate_id=place[1],
            seq=seq,
            event_type=event_type,
            content_type="application/json",
            headers={},
            routing_key=None,
            created_at=CREATED_AT,
            body=b"{}",
        )
        record = row._asdict() | {"headers": None, "size": 2}
        return LogRow(row_id, xid, place, seq, record)

    def try_barrier(self, producer: ProducerTransaction) -> bool:
        """pg_try_advisory_xact_lock_shared(S): refused while a relay sleeps."""
        if (727002, 0) in self.session_locks:
            return False
        self.barrier.add(producer)
        return True

    def snapshot(self) -> str:
        """pg_current_snapshot(): xmax is the latest completed id + 1, so what runs at or above it is in no list."""
        xmax = self.latest_completed + 1
        xip = sorted(xid for xid in self.running if xid < xmax)
        return f"{xip[0] if xip else xmax}:{xmax}:{','.join(map(str, xip))}"

    @property
    def cursor(self) -> Cursor:
        """As it is committed."""
        cursor: Cursor = self.tables["cursor"][0]
        return cursor

    # --- reading

    def _open_window(
        self, _session: Session, _shard: int, xmax: str, limit: int, most_bytes: int, late: list[str] | None = None
    ) -> list[Record]:
        at, xip = int(xmax), frozenset(map(int, late or ()))
        new = [row for row in self.log if row.xid >= at or row.xid in xip]
        snapshot = self.snapshot()
        page = self._page(new, limit, most_bytes)
        return [Record({"snapshot": snapshot} | r) for r in page] or [Record(snapshot=snapshot, id=None)]

    def _next_page(
        self,
        _session: Session,
        _shard: int,
        xmax: str,
        limit: int,
        most_bytes: int,
        xip: list[str],
        after_id: int,
        window: str,
    ) -> list[Record]:
        at, late, seen = int(xmax), frozenset(map(int, xip)), Snapshot(window)
        new = [
            row for row in self.log if row.id > after_id and (row.xid >= at or row.xid in late) and seen.sees(row.xid)
        ]
        return self._page(new, limit, most_bytes)

    @staticmethod
    def _page(rows: list[LogRow], limit: int, most_bytes: int) -> list[Record]:
        page, size = [], 0
        found = rows[:limit]
        for row in found:
            if size >= most_bytes:
                break
            columns = (
                (n, v) if n != "created_at" else ("created_s", int(v.timestamp())) for n, v in row.record.items()
            )
            page.append(Record({"is_last": row is found[-1]} | dict(columns)))
            size += row.record["size"]
        return page

    # --- the owner

    def _try_wake_lock(self, session: Session, lock: int, shard: int) -> bool:
        return not self.barrier and self.try_session_lock(session, lock, shard)

    async def _lock_cursor(self, session: Session, _shard: int) -> None:
        await self.lock(session, "cursor")

    async def _take_ownership(self, session: Session, _shard: int, _owner: str) -> list[dict[str, Any]]:
        await self.lock(session, "cursor")
        cursor = self.read(session, "cursor")[0]
        cursor = replace(cursor, epoch=cursor.epoch + 1)
        self.write(session, "cursor", 0, cursor)
        session.process.epoch = cursor.epoch
        return [
            {
                "epoch": cursor.epoch,
                "source": None,
                "cluster_id": 1,
                "current_cluster_id": 1,
                "from_the_future": False,
                "high_id": cursor.high_id,
                "after_id": cursor.after_id,
                "snapshot": cursor.snapshot,
                "window_snapshot": cursor.window,
            }
        ]

    async def _owned(self, session: Session, epoch: int) -> Cursor | None:
        await self.lock(session, "cursor")
        cursor: Cursor = self.read(session, "cursor")[0]
        session.was_refused = cursor.epoch != epoch
        return None if session.was_refused else cursor

    async def _checkpoint(
        self,
        session: Session,
        shard: int,
        epoch: int,
        snapshot: str,
        window: str | None,
        after_id: int,
        high_id: int,
        _confirmed: int,
        _rate: float,
    ) -> int | None:
        if (cursor := await self._owned(session, epoch)) is None:
            return None
        moved = Cursor(cursor.epoch, snapshot, window, after_id, max(cursor.high_id, high_id))
        self.write(session, "cursor", 0, moved)
        return shard

    async def _fence(self, session: Session, shard: int, epoch: int, high_id: int, _confirmed: int) -> int | None:
        if (cursor := await self._owned(session, epoch)) is None:
            return None
        self.write(session, "cursor", 0, replace(cursor, high_id=max(cursor.high_id, high_id)))
        return shard
