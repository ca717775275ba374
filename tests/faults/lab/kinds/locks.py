"""Somebody else's transactions in relay's way: tables and rows locked, snapshots held, a notification queue that fills up.

A lock has bitten when sessions were seen waiting for it: so nobody else may have those processes stopped meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import asyncpg

from relay.postgres.connect import Connection
from tests.faults.lab.fault import fault
from tests.faults.lab.stage import Stage

Open = Callable[[], AbstractAsyncContextManager[Connection]]
"""stage.producer or stage.consumer."""

LOCK_WAIT_S = 15.0
"""Longest that we wait for a lock ourselves: some producers' transactions last six seconds, and everybody waits behind us."""

COMMAND_TIMEOUT_S = 10.0
"""Of the daemons in the laboratory: longer locks end their sessions."""

FLOW_S = 15.0
"""Longest that we wait for an effect, after which nothing shows that events flow in spite of a fault."""

WAITING = """
SELECT pid, application_name FROM pg_stat_activity WHERE datname = current_database() AND $1 = ANY (pg_blocking_pids(pid))
"""

HOTTEST = """
SELECT aggregate_id FROM relay.outbox_aggregate WHERE aggregate_type = 'account' ORDER BY last_seq DESC LIMIT 1
"""

HELD_BACK = "SELECT FROM pg_stat_activity WHERE pid = $1 AND age(backend_xmin) > 50"
"""A row if this session is what keeps that many later transactions from being forgotten."""

NOTIFY = """
SELECT pg_notify('relay_outbox', CASE WHEN length($2) < 100 THEN $2 ELSE $2 || i END) FROM generate_series(1, $1::int) AS i
"""
"""Equal notifications of one transaction are one notification: the long ones are made different."""

USAGE = "SELECT pg_notification_queue_usage()"

NOTIFIED_AT_ONCE = 200
LONGEST_PAYLOAD = 7900
"""Bytes: nearly a page of the notification queue each."""


@fault("outbox locked", rows=(38,), touches=("producer-db", "relay-pg"))
async def outbox_locked(stage: Stage, dice: random.Random) -> int:
    """As VACUUM FULL would: producers and the reader wait, in half of the cases longer than the relay's command timeout."""
    seconds = dice.choice((dice.uniform(3, 7), dice.uniform(COMMAND_TIMEOUT_S + 1, COMMAND_TIMEOUT_S + 4)))
    return await _waiting_for(
        stage.producer, "LOCK TABLE relay.outbox IN ACCESS EXCLUSIVE MODE", seconds, only="relay "
    )


@fault("cursor of the log locked", rows=(38,), touches=("producer-db", "relay-pg"))
async def cursor_locked(stage: Stage, dice: random.Random) -> int:
    """No checkpoint, no new owner; in half of the cases for longer than the command timeout."""
    seconds = dice.choice((dice.uniform(3, 7), dice.uniform(COMMAND_TIMEOUT_S + 1, COMMAND_TIMEOUT_S + 4)))
    return await _waiting_for(stage.producer, "SELECT FROM relay.outbox_cursor FOR UPDATE", seconds, only="relay ")


@fault("inbox's cursors locked", rows=(38,), touches=("consumer", "consumer-db", "consumer-pg"))
async def inbox_locked(stage: Stage, dice: random.Random) -> int:
    """Longer than the consumers' command timeout, which what looks for gaps has; the pipeline itself waits, however long."""
    seconds = dice.uniform(COMMAND_TIMEOUT_S + 1, COMMAND_TIMEOUT_S + 4)
    return await _waiting_for(
        stage.consumer, "LOCK TABLE relay.inbox_aggregate IN ACCESS EXCLUSIVE MODE", seconds, only="relay "
    )


@fault("service's own table locked", rows=(25, 38), touches=("consumer", "consumer-db", "consumer-pg"))
async def service_locked(stage: Stage, dice: random.Random) -> int:
    """Every handler waits for it, all that are called meanwhile take longer than they may, and are held and tried again."""
    return await _waiting_for(
        stage.consumer, "LOCK TABLE account IN ACCESS EXCLUSIVE MODE", dice.uniform(4, 9), only="relay inbox"
    )


@fault("hottest account locked by a long transaction", rows=(20, 38), touches=("producers", "producer-db"))
async def account_locked(stage: Stage, dice: random.Random) -> int:
    """A producer books on it, dawdles, and rolls back: who books on the same account waits, and its number is given out again."""
    async with stage.producer() as connection:
        aggregate = await connection.fetchval(HOTTEST)
    phantom = json.dumps({"token": f"phantom-{dice.getrandbits(64)}", "amount": 1, "padding": ""})
    statement = """
    INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload) VALUES ('account', $1, 'Booked', $2)
    """
    return await _waiting_for(stage.producer, statement, dice.uniform(4, 8), aggregate, phantom)


@fault("xmin held back in the producers' database", rows=(18,), touches=("producer-db",))
async def xmin_held(stage: Stage, dice: random.Random) -> int:
    """A report that has been forgotten: REPEATABLE READ, with a transaction id, idle."""
    async with stage.producer() as connection:
        return await _flow_in_spite_of(stage, connection, dice.uniform(8, 12))


@fault("xmin held back in another database of the cluster", rows=(18,), touches=("producer-db",))
async def xmin_held_elsewhere(stage: Stage, dice: random.Random) -> int:
    """Transaction ids are the cluster's: whoever compares with the oldest running one stands still now."""
    connection = await asyncpg.connect(stage.producer_postgres.dsn("postgres"), timeout=LOCK_WAIT_S)
    try:
        return await _flow_in_spite_of(stage, connection, dice.uniform(8, 12))
    finally:
        connection.terminate()


@fault("notification queue filling up", rows=(37,), touches=("producer-db",))
async def notified_en_masse(stage: Stage, dice: random.Random) -> int:
    """A listener idle in a transaction, so that the queue cannot be emptied, and thousands of notifications on relay's channel.

    Some say what a producer would say, most are longer than anything that relay knows. Each sender's COMMIT takes the lock that
    producers' notifications need. Bites: effects applied meanwhile, if the queue got fuller.
    """
    applied = stage.applied

    async def flows() -> bool:
        return stage.applied > applied  # not at once where another fault holds up the broker meanwhile

    async with stage.producer() as sleeper, stage.producer() as sender:
        before = await sender.fetchval(USAGE)
        await sleeper.execute("LISTEN relay_outbox")
        try:
            async with sleeper.transaction():
                await sleeper.execute("SELECT 1")
                until = _clock() + dice.uniform(4, 8)
                while _clock() < until:
                    await sender.execute(
                        NOTIFY, NOTIFIED_AT_ONCE, dice.choice(("0", "1", "operate", "x" * LONGEST_PAYLOAD))
                    )
                    await asyncio.sleep(dice.uniform(0, 0.05))
                fuller = await sender.fetchval(USAGE) > before
                await stage.until(flows, timeout_s=FLOW_S)
                meanwhile = stage.applied - applied
        finally:
            await sleeper.execute("UNLISTEN *")
    return max(0, meanwhile) if fuller else 0


async def _waiting_for(open_: Open, statement: str, seconds: float, *arguments: Any, only: str = "") -> int:
    """Hold for so long what the statement locks, and roll back. How many sessions, of such names, were seen waiting for it."""
    async with open_() as holder, open_() as looking:
        waiting: set[tuple[int, str]] = set()
        transaction = holder.transaction()
        await transaction.start()
        try:
            await holder.execute("SELECT set_config('lock_timeout', $1, true)", f"{LOCK_WAIT_S:g}s")
            await holder.execute(statement, *arguments)
            until = _clock() + seconds
            while _clock() < until:
                rows = await looking.fetch(WAITING, holder.get_server_pid())
                waiting |= {(row["pid"], row["application_name"]) for row in rows}
                await asyncio.sleep(0.1)
        finally:
            await transaction.rollback()
    return sum(name.startswith(only) for _, name in waiting)


async def _flow_in_spite_of(stage: Stage, connection: Connection, seconds: float) -> int:
    """Effects applied while the snapshot was held; 0 if it did not hold anything back."""
    applied = stage.applied
    async with connection.transaction(isolation="repeatable_read"):
        await connection.execute("SELECT pg_current_xact_id()")
        await asyncio.sleep(seconds)
        grown = await stage.producer_sql(HELD_BACK, connection.get_server_pid())
    return max(0, stage.applied - applied) if grown else 0


def _clock() -> float:
    return asyncio.get_running_loop().time()
