"""PostgreSQL goes away: whole servers in all three ways, and single sessions by pg_terminate_backend.

A server fault has bitten when sessions of a daemon ended by it and others of the same name took their place: that the daemon
noticed, and came back, is both in the number.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

from relay.sandbox.postgres import SandboxPostgres
from tests.faults.lab.fault import fault
from tests.faults.lab.stage import Stage

OWNER = ("relay lease 0", "relay reader 0", "relay marks")
"""Sessions that a relay keeps open while it owns the log; those of its standby are called `relay lease 0` as well."""

CONSUMERS = ("relay inbox effects", "relay gaps effects")
"""Sessions that a consumer keeps open."""

RETURN_S = 20.0
"""Longest until a daemon has a session again: the server's own recovery included."""

PRODUCER_SERVER = ("producer-db", "relay-pg")
CONSUMER_SERVER = ("consumer-db", "consumer-pg")

SESSIONS = """
SELECT pid, backend_start FROM pg_stat_activity WHERE datname = current_database() AND application_name = ANY ($1::text[])
"""

TERMINATE = """
WITH meant AS MATERIALIZED (
  SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = ANY ($1::text[])
)
SELECT pid FROM meant WHERE pg_terminate_backend(pid)
"""
"""Materialized: the conditions of one WHERE are evaluated in any order, and the last one would end everybody's session."""

TERMINATE_OWNER = """
WITH meant AS MATERIALIZED (
  SELECT pid FROM pg_locks
  WHERE locktype = 'advisory' AND granted AND classid = 727003 AND objid = 0 AND objsubid = 2
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
)
SELECT pid FROM meant WHERE pg_terminate_backend(pid)
"""
"""The session that holds the lock of the log: it also is the one that listens."""

Ask = Callable[..., Awaitable[Sequence[Any]]]
"""stage.producer_sql or stage.consumer_sql."""

Session = tuple[int, Any]
"""(process id, when it began): process ids come again."""


@fault("producers' PostgreSQL restarted fast", rows=(13,), touches=PRODUCER_SERVER)
async def producers_fast(stage: Stage, dice: random.Random) -> int:
    """Open transactions are rolled back, every session is told so."""
    return await _producers_without_server(stage, lambda: stage.producer_postgres.restart("fast"))


@fault("producers' PostgreSQL restarted at once", rows=(13,), touches=PRODUCER_SERVER, smoke=True)
async def producers_immediate(stage: Stage, dice: random.Random) -> int:
    """As in a crash: what comes next is recovery from the log."""
    return await _producers_without_server(stage, lambda: stage.producer_postgres.restart("immediate"))


@fault("producers' PostgreSQL killed", rows=(13,), touches=PRODUCER_SERVER)
async def producers_killed(stage: Stage, dice: random.Random) -> int:
    """kill -9 of the postmaster and whatever it leaves behind; down for up to three seconds."""
    down_s = dice.uniform(0.1, 3)
    return await _producers_without_server(stage, lambda: _killed(stage.producer_postgres, down_s))


@fault("consumers' PostgreSQL restarted", rows=(13,), touches=CONSUMER_SERVER)
async def consumers_restarted(stage: Stage, dice: random.Random) -> int:
    """Fast or immediate, in the middle of a batch: it is rolled back, or committed and not acknowledged."""
    mode: Literal["fast", "immediate"] = dice.choice(("fast", "immediate"))
    return await _replaced(
        stage,
        stage.consumer_sql,
        CONSUMERS,
        lambda: asyncio.to_thread(stage.consumer_postgres.restart, mode),
    )


@fault("consumers' PostgreSQL killed", rows=(13, 21), touches=CONSUMER_SERVER)
async def consumers_killed(stage: Stage, dice: random.Random) -> int:
    """kill -9 of the postmaster and whatever it leaves behind; down for up to three seconds."""
    down_s = dice.uniform(0.1, 3)
    return await _replaced(
        stage,
        stage.consumer_sql,
        CONSUMERS,
        lambda: asyncio.to_thread(_killed, stage.consumer_postgres, down_s),
    )


@fault("owner's session terminated", rows=(14, 15), touches=("relay-pg",), smoke=True)
async def owner_terminated(stage: Stage, dice: random.Random) -> int:
    """The lock of the log is free, and nobody listens: up to three times, now and then just when the next owner has taken it."""
    return await _owners_ended(stage, dice, lambda: stage.producer_sql(TERMINATE_OWNER))


@fault("reader's session terminated", rows=(13, 15), touches=("relay-pg",))
async def reader_terminated(stage: Stage, dice: random.Random) -> int:
    """In the middle of a page or of a checkpoint; the lock is still held, and has to be given up."""
    return await _owners_ended(stage, dice, lambda: stage.producer_sql(TERMINATE, ["relay reader 0"]))


@fault("sessions of the relay's services terminated", rows=(13,), touches=("relay-pg",), needs_repair=True)
async def services_terminated(stage: Stage, dice: random.Random) -> int:
    """Marks, repair and retention lose their sessions again and again; the pipeline must not notice."""
    services = ["relay marks", "relay repair", "relay retention"]
    return await _again_and_again(stage, dice, stage.producer_sql, services)


@fault("sessions of the consumers terminated", rows=(13, 25), touches=("consumer-pg",))
async def consumers_terminated(stage: Stage, dice: random.Random) -> int:
    """In the middle of handlers, between COMMIT and acknowledgement, while waiting for a cursor: wherever they are."""
    return await _again_and_again(stage, dice, stage.consumer_sql, list(CONSUMERS))


async def _producers_without_server(stage: Stage, break_and_heal: Callable[[], None]) -> int:
    """The sessions of the owner that were lost, if somebody has taken the log anew afterwards."""
    epoch = await _owned(stage)
    lost = await _replaced(stage, stage.producer_sql, OWNER, lambda: asyncio.to_thread(break_and_heal))
    return lost if await stage.until(lambda: _is_after(stage, epoch), timeout_s=RETURN_S) else 0


async def _owners_ended(stage: Stage, dice: random.Random, terminate: Callable[[], Awaitable[Sequence[Any]]]) -> int:
    """Sessions terminated, each followed by a new ownership."""
    bites = 0
    for _ in range(dice.randint(1, 3)):
        epoch = await _owned(stage)
        ended = len(await terminate())
        if await stage.until(lambda since=epoch: _is_after(stage, since), timeout_s=RETURN_S):  # type: ignore[misc]
            bites += ended
        await asyncio.sleep(dice.choice((0.0, dice.uniform(0, 1))))
    return bites


async def _again_and_again(stage: Stage, dice: random.Random, ask: Ask, names: list[str]) -> int:
    """Sessions terminated within some seconds, if there are sessions of these names again in the end."""
    before: set[Session] = set()
    ended: set[int] = set()
    until = time.monotonic() + dice.uniform(3, 8)
    while time.monotonic() < until:
        before |= await _sessions(ask, names)
        ended |= {row["pid"] for row in await ask(TERMINATE, names)}
        await asyncio.sleep(dice.uniform(0.05, 1))
    back = await stage.until(lambda: _are_new(ask, names, before), timeout_s=RETURN_S)
    return len(ended) if back else 0


async def _replaced(stage: Stage, ask: Ask, names: Sequence[str], strike: Callable[[], Awaitable[None]]) -> int:
    """How many sessions of these names were lost by the strike, if there are others afterwards."""
    await stage.until(lambda: _are_new(ask, names, set()), timeout_s=RETURN_S)
    before = await _sessions(ask, names)
    await strike()
    if not await stage.until(lambda: _are_new(ask, names, before), timeout_s=RETURN_S):
        return 0
    return len(before - await _sessions(ask, names))


async def _sessions(ask: Ask, names: Sequence[str]) -> set[Session]:
    return {(row["pid"], row["backend_start"]) for row in await ask(SESSIONS, list(names))}


async def _are_new(ask: Ask, names: Sequence[str], before: set[Session]) -> bool:
    return bool(await _sessions(ask, names) - before)


async def _owned(stage: Stage) -> int:
    """The epoch, as soon as somebody owns the log and reads it."""
    await stage.until(lambda: _are_new(stage.producer_sql, ["relay reader 0"], set()), timeout_s=RETURN_S)
    return await stage.epoch()


async def _is_after(stage: Stage, epoch: int) -> bool:
    return await stage.epoch() > epoch


def _killed(server: SandboxPostgres, down_s: float) -> None:
    """Blocks, so that a cancelled fault heals as well: it runs in a thread to its end."""
    server.kill9()
    time.sleep(down_s)
    server.start_again()
