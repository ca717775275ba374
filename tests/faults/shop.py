"""A load whose every effect can be checked: producers that log their own commits, a consumer whose effects count themselves."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass

import asyncpg

from relay.inbox import Event, Inbox
from relay.rabbitmq.queues import InboxQueue, ensure_queue
from relay.rabbitmq.session import close, connect
from relay.settings import Settings
from tests.harness.outbox import connected

PRODUCER_TABLES = "CREATE TABLE txn_log (token text PRIMARY KEY, aggregate text NOT NULL, amount bigint NOT NULL)"

# No unique constraint on the effects: it would hide the duplicates that the check looks for.
CONSUMER_TABLES = """
CREATE TABLE effect (aggregate text, position bigint, seq bigint, token text, amount bigint);
CREATE TABLE account (aggregate text PRIMARY KEY, applied bigint NOT NULL, balance bigint NOT NULL);
"""

# The position is taken under the row lock of the account, so it is the order in which the effects were committed.
APPLY = """
WITH moved AS (
  INSERT INTO account AS a (aggregate, applied, balance) VALUES ($1, 1, $4)
  ON CONFLICT (aggregate) DO UPDATE SET applied = a.applied + 1, balance = a.balance + excluded.balance
  RETURNING applied
)
INSERT INTO effect (aggregate, position, seq, token, amount) SELECT $1, applied, $2, $3, $4 FROM moved
"""


def effects_inbox(name: str = "effects", *, poison: str | None = None) -> Inbox:
    """An inbox that records what it applies, and fails for ever on the events of the `poison` aggregate."""
    inbox = Inbox(name)

    @inbox.on("Booked")
    async def book(event: Event, tx: asyncpg.Connection[asyncpg.Record]) -> None:
        if event.aggregate_id == poison:
            raise RuntimeError("poison")
        content = event.json()
        await tx.execute(APPLY, event.aggregate_id, event.seq, content["token"], content["amount"])

    return inbox


async def declare_queue(settings: Settings, name: str = "effects") -> None:
    """The consumer's queue as the inbox would declare it, which nobody reads yet."""
    session = await connect(settings.rabbitmq, name="test")
    try:
        queue = InboxQueue(name=name, bindings=settings.inbox.bindings, delivery_limit=settings.inbox.delivery_limit)
        await ensure_queue(session, settings.rabbitmq, queue)
    finally:
        await close(session)


async def book(connection: asyncpg.Connection[asyncpg.Record], aggregate: str, token: str, amount: int) -> None:
    """One event, and the producer's own note of it, in the caller's transaction."""
    await connection.execute("INSERT INTO txn_log VALUES ($1, $2, $3)", token, aggregate, amount)
    await connection.execute(
        "INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload) VALUES ('account', $1, 'Booked', $2)",
        aggregate,
        json.dumps({"token": token, "amount": amount}),
    )


async def keep_booking(dsn: str, number: int, stop: asyncio.Event, *, aggregates: int, pause_s: float) -> int:
    """Transactions until `stop`, over restarts of the database; returns how many were rolled back on purpose."""
    dice, counter, undone = random.Random(number), 0, 0
    while not stop.is_set():
        try:
            async with connected(dsn) as connection:
                while not stop.is_set():
                    names = sorted(dice.sample(range(aggregates), dice.randint(1, 3)))
                    transaction = connection.transaction()
                    await transaction.start()
                    for name in names:
                        counter += 1
                        await book(connection, f"a{name}", f"{number}-{counter}", dice.randint(1, 100))
                    if dice.random() < 0.15:
                        await transaction.rollback()
                        undone += 1
                    else:
                        await transaction.commit()
                    await asyncio.sleep(dice.random() * pause_s)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
            # The database restarts: whether the transaction was committed, its own txn_log row will tell.
            await asyncio.sleep(0.1)
    return undone


@dataclass(frozen=True)
class Verdict:
    """What the tables say."""

    committed: int
    lost: int
    phantom: int
    doubled: int
    disordered: int
    wrong_balances: int

    @property
    def holds(self) -> bool:
        return not (self.lost or self.phantom or self.doubled or self.disordered or self.wrong_balances)


async def judge(producer_dsn: str, consumer_dsn: str, *, without: str | None = None) -> Verdict:
    """Compare what producers committed with what was applied; `without`: an aggregate that is held on purpose."""
    async with connected(producer_dsn) as db:
        committed = {
            r["token"]: r for r in await db.fetch("SELECT * FROM txn_log WHERE aggregate IS DISTINCT FROM $1", without)
        }
    async with connected(consumer_dsn) as db:
        effects = await db.fetch("SELECT * FROM effect ORDER BY aggregate, position")
        accounts = {r["aggregate"]: r for r in await db.fetch("SELECT * FROM account")}
    applied = [r["token"] for r in effects]
    sums: dict[str, int] = {}
    for r in committed.values():
        sums[r["aggregate"]] = sums.get(r["aggregate"], 0) + r["amount"]
    return Verdict(
        committed=len(committed),
        lost=len(committed.keys() - set(applied)),
        phantom=len(set(applied) - committed.keys()),
        doubled=len(applied) - len(set(applied)),
        disordered=sum(r["seq"] != r["position"] for r in effects),
        wrong_balances=sum(accounts[a]["balance"] != total if a in accounts else True for a, total in sums.items()),
    )


async def applied_count(consumer_dsn: str) -> int:
    """How many effects there are."""
    async with connected(consumer_dsn) as db:
        count = await db.fetchval("SELECT count(*) FROM effect")
    assert isinstance(count, int)
    return count
