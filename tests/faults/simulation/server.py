"""What both model databases have in common with PostgreSQL: transactions at READ COMMITTED, row locks, session locks, NOTIFY."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

import asyncpg

from relay.postgres.queries import query
from tests.faults.simulation.clock import VirtualLoop

Rows = dict[Any, Any]
Statement = Callable[..., Any]


class Transaction:
    """What a transaction has written, and locked. Others see it once it is committed."""

    def __init__(self, xid: int) -> None:
        self.xid = xid
        self.writes: dict[str, Rows] = {}
        self.locks: list[Hashable] = []
        self.waits_for: Transaction | None = None
        self.is_aborted = False
        self.savepoints: list[dict[str, Rows]] = []
        self.notifications: list[tuple[str, str]] = []


class Session:
    """A backend: the server's end of a connection."""

    def __init__(self, process: Any, role: str, listener: Callable[[str, str], None], pid: int) -> None:
        self.process = process
        self.pid = pid
        self.role = role
        self.tx: Transaction | None = None
        self.locks: set[Hashable] = set()  # advisory, for as long as the session lives
        self.channels: set[str] = set()
        self.listener = listener
        self.is_over = False
        self.was_refused = False  # told that its epoch is over


class Server:
    """Tables of immutable rows. `statements`: what answers each of relay's named statements."""

    def __init__(self, loop: VirtualLoop, dice: random.Random) -> None:
        self.loop = loop
        self.dice = dice
        self.tables: dict[str, Rows] = defaultdict(dict)
        self.statements: dict[str, Statement] = {}
        self.sessions: list[Session] = []
        self.pids = 0
        self.next_xid = 1000
        self.running: set[int] = set()
        self.latest_completed = 999
        self._row_locks: dict[Hashable, Transaction] = {}
        self._released: list[asyncio.Future[None]] = []
        self.session_locks: dict[Hashable, Session] = {}
        self.before_commit: Callable[[Session, Transaction], None] = lambda _session, _tx: None
        self.after_commit: Callable[[Session, Transaction], None] = lambda _session, _tx: None

    def answer(self, **statements: Statement) -> None:
        """Register what answers named statements."""
        for name, statement in statements.items():
            self.statements[query(name)] = statement

    # --- transactions

    def begin_xid(self) -> int:
        """A transaction id, given out; it is in progress until `end_xid`."""
        xid = self.next_xid
        self.next_xid += 1
        self.running.add(xid)
        return xid

    def end_xid(self, xid: int) -> None:
        """Committed or rolled back."""
        self.running.discard(xid)
        self.latest_completed = max(self.latest_completed, xid)

    def begin(self, session: Session) -> None:
        """BEGIN; the transaction id is given out here already, which is early, and allowed."""
        session.tx = Transaction(self.begin_xid())

    def commit(self, session: Session) -> None:
        """COMMIT: all of it at one moment."""
        tx = session.tx
        if tx is None:
            return
        if tx.is_aborted:
            self.rollback(session)
            return
        self.before_commit(session, tx)
        for table, rows in tx.writes.items():
            committed = self.tables[table]
            for key, row in rows.items():
                if row is None:
                    committed.pop(key, None)
                else:
                    committed[key] = row
        self._end(session, tx)
        self.after_commit(session, tx)
        for channel, payload in tx.notifications:
            self.notify(channel, payload)

    def rollback(self, session: Session) -> None:
        """ROLLBACK, also of a session that has died."""
        if session.tx is not None:
            self._end(session, session.tx)

    def _end(self, session: Session, tx: Transaction) -> None:
        session.tx = None
        for key in tx.locks:
            del self._row_locks[key]
        self.end_xid(tx.xid)
        if tx.locks and self._released:
            released, self._released = self._released, []
            for future in released:
                if not future.done():
                    future.set_result(None)

    def savepoint(self, tx: Transaction) -> None:
        """SAVEPOINT."""
        tx.savepoints.append({table: dict(rows) for table, rows in tx.writes.items()})

    def rollback_to(self, tx: Transaction) -> None:
        """ROLLBACK TO the last savepoint, which is then gone."""
        tx.writes = tx.savepoints.pop()
        tx.is_aborted = False

    # --- rows

    def read(self, session: Session, table: str) -> Rows:
        """What a statement of this session sees: what is committed now, and its own writes. Not to be changed."""
        committed = self.tables[table]
        if session.tx is None or not (own := session.tx.writes.get(table)):
            return committed
        merged = {**committed, **own}
        return {key: row for key, row in merged.items() if row is not None}

    def write(self, session: Session, table: str, key: Any, row: Any) -> None:
        """Insert, update, or delete (None). Outside a transaction it is committed at once."""
        if session.tx is None:
            self.begin(session)
            self._put(session, table, key, row)
            self.commit(session)
        else:
            self._put(session, table, key, row)

    def _put(self, session: Session, table: str, key: Any, row: Any) -> None:
        if session.tx is not None:
            session.tx.writes.setdefault(table, {})[key] = row

    def is_free(self, session: Session, key: Hashable) -> bool:
        """True when no other transaction has locked a row (SKIP LOCKED)."""
        owner = self._row_locks.get(key)
        return owner is None or owner is session.tx

    async def lock(self, session: Session, key: Hashable) -> None:
        """Lock a row to the end of the transaction; outside of one: only wait until it is free. Raises DeadlockDetectedError."""
        tx = session.tx
        while (owner := self._row_locks.get(key)) is not None and owner is not tx:
            await self._wait(tx, owner)
            if session.is_over or session.tx is not tx:
                raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
        if tx is not None and owner is None:
            self._row_locks[key] = tx
            tx.locks.append(key)

    async def _wait(self, tx: Transaction | None, owner: Transaction) -> None:
        other: Transaction | None = owner
        while other is not None:
            other = other.waits_for
            if other is not None and other is tx:
                raise asyncpg.DeadlockDetectedError("deadlock detected")
        future: asyncio.Future[None] = self.loop.create_future()
        self._released.append(future)
        if tx is not None:
            tx.waits_for = owner
        try:
            await future
        finally:
            if tx is not None:
                tx.waits_for = None

    # --- sessions

    def ended(self, session: Session) -> None:
        """The backend is gone: its transaction is rolled back, its locks are free."""
        session.is_over = True
        self.rollback(session)
        for key in session.locks:
            del self.session_locks[key]
        session.locks.clear()
        if session in self.sessions:
            self.sessions.remove(session)

    def try_session_lock(self, session: Session, *key: Hashable) -> bool:
        """pg_try_advisory_lock."""
        if self.session_locks.setdefault(key, session) is not session:
            return False
        session.locks.add(key)
        return True

    def unlock(self, session: Session, *key: Hashable) -> bool:
        """pg_advisory_unlock."""
        if self.session_locks.get(key) is not session:
            return False
        del self.session_locks[key]
        session.locks.discard(key)
        return True

    def notify(self, channel: str, payload: str) -> None:
        """NOTIFY, of a transaction that has just committed."""
        for session in self.sessions:
            if channel in session.channels:
                self.loop.call_later(0.0005, session.listener, channel, payload)
