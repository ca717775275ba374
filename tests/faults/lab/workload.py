"""Producers that do everything a careless application does inside its transactions, and keep an account of it.

What was really committed, the table txn_log tells in the end: a row of it is written in the same transaction as the event,
and relay never touches it. So a COMMIT whose answer got lost is no riddle.
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, field

import asyncpg

from relay.postgres.connect import Connection
from tests.faults.lab.effects import digest
from tests.faults.lab.history import History

TABLES = """
CREATE TABLE txn_log (
  token text PRIMARY KEY, kind text NOT NULL, aggregate text NOT NULL, seq bigint NOT NULL, amount bigint NOT NULL, sha text NOT NULL,
  committed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
"""

GRANTS = "GRANT INSERT ON txn_log TO lab_producer"

INSERT = """
INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload) VALUES ($1, $2, 'Booked', $3) RETURNING seq
"""

LOG = """
INSERT INTO txn_log (token, kind, aggregate, seq, amount, sha)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::text[])
"""

AGGREGATES = {"account": 200, "lonely": 5, "poison": 5}
SHARES = {"account": 0.92, "lonely": 0.04, "poison": 0.04}
HOT = 5
"""Accounts that one booking in four goes to."""

UNDONE = 0.15
SAVEPOINT_UNDONE = 0.1
CUT_AT_COMMIT = 0.01
"""The client's socket is cut while its COMMIT is on the way: its outcome is unknown to the client."""
LONG, LONG_S = 0.004, (2.0, 6.0)
"""Transactions that are held open, and for how long."""
LARGE, LARGE_BYTES = 0.002, 300_000
PATIENCE_S = 20.0
"""Longest that a producer waits for one transaction, as a careful application would."""


class OutcomeUnknown(ConnectionError):
    """A transaction failed at its COMMIT: it may have been committed."""


_FAILURES = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Booking:
    """One event to be."""

    kind: str
    aggregate: str
    token: str
    amount: int
    padding: str

    @property
    def payload(self) -> str:
        """The event's content."""
        return json.dumps({"token": self.token, "amount": self.amount, "padding": self.padding})

    @property
    def sha(self) -> str:
        """What the consumer will compute of it."""
        return digest(self.token, self.amount, self.padding)


@dataclass(slots=True)
class Workload:
    """`producers` connections, together about `rate` events a second, until `stop` is set."""

    dsn: str
    history: History
    seed: int
    rate: float
    producers: int = 4
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    outcomes: dict[str, int] = field(default_factory=lambda: {"ok": 0, "undone": 0, "unknown": 0, "failed": 0})
    tokens: set[str] = field(default_factory=set)  # of every event that was ever inserted, committed or not
    known: dict[str, set[str]] = field(default_factory=lambda: {"ok": set(), "undone": set()})
    """Tokens by what the client knows of their transaction's end; of the others only txn_log can tell."""
    _open: asyncio.Event = field(default_factory=asyncio.Event)

    def hold(self) -> None:
        """Producers begin no further transaction."""
        self._open.clear()

    def release(self) -> None:
        """They go on."""
        self._open.set()

    async def run(self) -> None:
        """Until `stop` is set, over restarts of the database."""
        self.release()
        async with asyncio.TaskGroup() as group:
            for number in range(self.producers):
                group.create_task(_Producer(self, number).run())


class _Producer:
    def __init__(self, workload: Workload, number: int) -> None:
        self._workload = workload
        self._number = number
        self._dice = random.Random()
        self._counter = 0
        self._clock = asyncio.get_running_loop().time
        self._due = self._clock()

    async def run(self) -> None:
        stop = self._workload.stop
        while not stop.is_set():
            connection: Connection | None = None
            try:
                connection = await asyncpg.connect(self._workload.dsn, timeout=5, command_timeout=PATIENCE_S)
                while not stop.is_set():
                    await self._one(connection)
            except _FAILURES as exc:
                self._workload.history.record("producer_failed", producer=self._number, error=type(exc).__name__)
                await asyncio.sleep(0.2)  # as an application's pool would, before it connects again
            finally:
                if connection is not None:
                    connection.terminate()

    async def _one(self, connection: Connection) -> None:
        """One transaction, and the time until the next is due."""
        workload = self._workload
        await workload._open.wait()
        # Dice of its own for each transaction: one that was cut short must not change all that follow.
        self._dice = random.Random(f"{workload.seed} producer {self._number} transaction {self._counter}")
        bookings = self._bookings()
        workload.tokens.update(booking.token for booking in bookings)
        outcome = "failed"
        try:
            async with asyncio.timeout(PATIENCE_S):
                outcome = await self._transaction(connection, bookings)
        except _FAILURES as exc:
            outcome = "unknown" if isinstance(exc, OutcomeUnknown) else "failed"
            raise
        finally:
            workload.outcomes[outcome] += 1
        self._due = max(self._due + len(bookings) * workload.producers / workload.rate, self._clock() - 1)
        await asyncio.sleep(max(0.0, self._due - self._clock()))

    async def _transaction(self, connection: Connection, bookings: list[Booking]) -> str:
        dice = self._dice
        transaction = connection.transaction()
        await transaction.start()
        if dice.random() < 0.1:
            await connection.execute("SELECT pg_current_xact_id()")  # older than all that it will insert
        kept: list[tuple[Booking, int]] = []
        for booking in bookings:
            if dice.random() < SAVEPOINT_UNDONE:
                savepoint = connection.transaction()
                await savepoint.start()
                await _insert(connection, booking)
                await savepoint.rollback()
            else:
                kept.append((booking, await _insert(connection, booking)))
            if dice.random() < 0.05:
                await asyncio.sleep(dice.uniform(0, 0.1))
        if dice.random() < LONG:
            await asyncio.sleep(dice.uniform(*LONG_S))
        await log(connection, kept)
        tokens = {booking.token for booking, _ in kept}
        if dice.random() < UNDONE:
            await transaction.rollback()
            self._workload.known["undone"] |= tokens
            return "undone"
        if dice.random() < CUT_AT_COMMIT:
            committing = asyncio.create_task(transaction.commit())
            await asyncio.sleep(0)  # written, not answered
            connection.terminate()
            await asyncio.gather(committing, return_exceptions=True)
            raise OutcomeUnknown("cut while its COMMIT was on the way")
        try:
            await transaction.commit()
        except _FAILURES as exc:
            raise OutcomeUnknown(f"{type(exc).__name__} at COMMIT") from exc
        self._workload.known["ok"] |= tokens
        return "ok"

    def _bookings(self) -> list[Booking]:
        """Of one transaction: 1 to 5 events, aggregates sorted so that no two producers wait for each other."""
        dice = self._dice
        self._counter += 1
        chosen = sorted(self._aggregate() for _ in range(dice.choice((1, 1, 2, 3, 5))))
        return [
            Booking(
                kind=kind,
                aggregate=aggregate,
                token=f"{self._number}-{self._counter}-{i}",
                amount=dice.randint(1, 1000),
                padding="x" * (LARGE_BYTES if dice.random() < LARGE else dice.randrange(0, 600)),
            )
            for i, (kind, aggregate) in enumerate(chosen)
        ]

    def _aggregate(self) -> tuple[str, str]:
        dice = self._dice
        (kind,) = dice.choices(list(SHARES), list(SHARES.values()))
        number = dice.randrange(HOT if kind == "account" and dice.random() < 0.25 else AGGREGATES[kind])
        return kind, f"{kind[0]}{number}"


async def _insert(connection: Connection, booking: Booking) -> int:
    seq = await connection.fetchval(INSERT, booking.kind, booking.aggregate, booking.payload)
    assert isinstance(seq, int)
    return seq


async def log(connection: Connection, kept: list[tuple[Booking, int]]) -> None:
    """The producer's own account of events and their numbers, in the transaction of the events."""
    if kept:
        columns = [(b.token, b.kind, b.aggregate, seq, b.amount, b.sha) for b, seq in kept]
        await connection.execute(LOG, *map(list, zip(*columns, strict=True)))


async def write(connection: Connection, bookings: list[Booking]) -> None:
    """Events and the account of them, in the caller's transaction."""
    await log(connection, [(booking, await _insert(connection, booking)) for booking in bookings])
