"""The consumer of the laboratory: a service whose effects count themselves, so that nothing wrong with them can hide.

No unique constraint on the effects: it would hide the duplicates that the checker looks for. The position is taken under the
row lock of the account, so it is the order in which the effects were committed. The balance is not idempotent.
"""

from __future__ import annotations

import asyncio
import hashlib

from relay.inbox import Event, Inbox
from relay.postgres.connect import Connection

TABLES = """
CREATE TABLE effect (
  id bigint GENERATED ALWAYS AS IDENTITY, token text, kind text, aggregate text, seq bigint, position bigint,
  message_id text, sha text, amount bigint, applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE account (kind text, aggregate text, applied bigint NOT NULL, balance bigint NOT NULL, PRIMARY KEY (kind, aggregate));
CREATE TABLE poison (aggregate text PRIMARY KEY);
CREATE TABLE hang (aggregate text PRIMARY KEY, seconds float8 NOT NULL);
"""

GRANTS = "GRANT SELECT, INSERT, UPDATE ON effect, account, poison, hang TO lab_consumer"

APPLY = """
WITH moved AS (
  INSERT INTO account AS a (kind, aggregate, applied, balance) VALUES ($1, $2, 1, $5)
  ON CONFLICT (kind, aggregate) DO UPDATE SET applied = a.applied + 1, balance = a.balance + excluded.balance
  RETURNING applied
)
INSERT INTO effect (token, kind, aggregate, seq, position, message_id, sha, amount)
SELECT $4, $1, $2, $3, applied, $6, $7, $5 FROM moved
"""

inbox = Inbox("effects")


class Poisoned(Exception):
    """What the handler raises for an aggregate of the table poison."""


@inbox.on("Booked")
async def book(event: Event, tx: Connection) -> None:
    """Write down that it was done; fail or hang first, if a fault says so."""
    kind, aggregate = event.aggregate_type or "", event.aggregate_id or ""
    if kind == "poison":
        await _suffer(aggregate, tx)
    content = event.json()
    token, amount = content["token"], content["amount"]
    sha = digest(token, amount, content["padding"])
    await tx.execute(APPLY, kind, aggregate, event.seq, token, amount, event.message_id, sha)


def digest(token: str, amount: int, padding: str) -> str:
    """What producer and consumer compute of the same content, each for itself."""
    return hashlib.sha256(f"{token}|{amount}|{padding}".encode()).hexdigest()


async def _suffer(aggregate: str, tx: Connection) -> None:
    if await tx.fetchval("SELECT true FROM poison WHERE aggregate = $1", aggregate):
        raise Poisoned(aggregate)
    seconds = await tx.fetchval("SELECT seconds FROM hang WHERE aggregate = $1", aggregate)
    if seconds is not None:
        await asyncio.sleep(seconds)
