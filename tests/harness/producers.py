"""Producers that do everything a careless application does inside its transactions."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, field

import asyncpg

AGGREGATES = 20


@dataclass
class Ledger:
    """What the producers know to be committed and rolled back, by the token in each event's payload."""

    committed: dict[str, tuple[str, int]] = field(default_factory=dict)  # token -> (aggregate, seq)
    rolled_back: set[str] = field(default_factory=set)

    def expected(self) -> dict[str, int]:
        """The last sequence number of every aggregate."""
        last: dict[str, int] = {}
        for aggregate, seq in self.committed.values():
            last[aggregate] = max(last.get(aggregate, 0), seq)
        return last


async def insert_event(connection: asyncpg.Connection[asyncpg.Record], aggregate: str, token: str) -> int:
    """One event with a token in its payload; returns its sequence number."""
    kind, _, name = aggregate.partition("/")
    seq = await connection.fetchval(
        "INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload) VALUES ($1, $2, 'Changed', $3) RETURNING seq",
        kind,
        name,
        json.dumps({"token": token}),
    )
    assert isinstance(seq, int)
    return seq


async def hostile_producer(dsn: str, number: int, ledger: Ledger, stop: asyncio.Event) -> None:
    """Early transaction ids, sleeps inside transactions, savepoints, rollbacks; several aggregates a transaction."""
    dice = random.Random(number)
    connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(dsn)
    counter = 0
    try:
        while not stop.is_set():
            transaction = connection.transaction()
            await transaction.start()
            mine: dict[str, tuple[str, int]] = {}
            if dice.random() < 0.3:
                await connection.execute(
                    "SELECT pg_current_xact_id()"
                )  # its id is older than everything it will insert
            if dice.random() < 0.2:
                await asyncio.sleep(dice.random() * 0.02)
            for aggregate in sorted(
                {dice.randrange(AGGREGATES) for _ in range(dice.randint(1, 3))}
            ):  # sorted: no dead-lock
                name = f"order/{aggregate:02}"
                for _ in range(dice.randint(1, 2)):
                    counter += 1
                    token = f"{number}-{counter}"
                    mine[token] = (name, await insert_event(connection, name, token))
                if dice.random() < 0.2:
                    counter += 1
                    await _undone_in_savepoint(connection, name, f"{number}-{counter}", ledger)
                if dice.random() < 0.1:
                    await asyncio.sleep(dice.random() * 0.05)
            if dice.random() < 0.15:
                await transaction.rollback()
                ledger.rolled_back.update(mine)
            else:
                await transaction.commit()
                ledger.committed.update(mine)
            if dice.random() < 0.5:
                await asyncio.sleep(dice.random() * 0.03)
    finally:
        await connection.close()


async def _undone_in_savepoint(
    connection: asyncpg.Connection[asyncpg.Record], aggregate: str, token: str, ledger: Ledger
) -> None:
    savepoint = connection.transaction()
    await savepoint.start()
    await insert_event(connection, aggregate, token)
    await savepoint.rollback()
    ledger.rolled_back.add(token)
