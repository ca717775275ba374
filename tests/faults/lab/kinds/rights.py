"""What the daemons may do in PostgreSQL is taken from them while they work: privileges, and the password.

A running daemon waits until it may again; one that starts meanwhile ends, and its supervisor starts it again. A fault has
bitten as often as a daemon's log says that it was refused.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from tests.faults.lab.daemons import Daemon
from tests.faults.lab.fault import Broken, fault
from tests.faults.lab.stage import Stage

NOTICED_S = 15.0
HEALED_S = 30.0

RELAYS = (
    ("REVOKE relay_daemon FROM lab_relay", "GRANT relay_daemon TO lab_relay"),
    ("REVOKE UPDATE ON relay.outbox_cursor FROM relay_daemon", "GRANT UPDATE ON relay.outbox_cursor TO relay_daemon"),
    ("REVOKE SELECT ON relay.outbox FROM relay_daemon", "GRANT SELECT ON relay.outbox TO relay_daemon"),
)
"""How rights are taken and given back."""

CONSUMERS = (
    ("REVOKE relay_consumer FROM lab_consumer", "GRANT relay_consumer TO lab_consumer"),
    (
        "REVOKE UPDATE ON relay.inbox_aggregate FROM relay_consumer",
        "GRANT UPDATE ON relay.inbox_aggregate TO relay_consumer",
    ),
    (
        "REVOKE SELECT ON relay.inbox_aggregate FROM relay_consumer",
        "GRANT SELECT ON relay.inbox_aggregate TO relay_consumer",
    ),
)

END_SESSIONS = """
WITH meant AS MATERIALIZED (SELECT pid FROM pg_stat_activity WHERE usename = $1)
SELECT pid FROM meant WHERE pg_terminate_backend(pid)
"""

Ask = Callable[..., Awaitable[Sequence[Any]]]
"""stage.producer_sql or stage.consumer_sql."""


@fault("relay's privileges in PostgreSQL revoked", rows=(35,), touches=("relay", "producer-db", "relay-pg"))
async def relays_rights(stage: Stage, dice: random.Random) -> int:
    """All of them, or the one to move the cursor, or the one to read the log."""
    return await _without(
        stage, stage.producer_sql, *dice.choice(RELAYS), stage.relays, "permission denied", dice.uniform(0.5, 5)
    )


@fault("consumers' privileges in PostgreSQL revoked", rows=(35,), touches=("consumer", "consumer-db", "consumer-pg"))
async def consumers_rights(stage: Stage, dice: random.Random) -> int:
    """All of them, or the one to move cursors, or the one to read them."""
    return await _without(
        stage, stage.consumer_sql, *dice.choice(CONSUMERS), stage.consumers, "permission denied", dice.uniform(0.5, 5)
    )


@fault("relay's password in PostgreSQL changed", rows=(40,), touches=("relay", "producer-db", "relay-pg"))
async def relays_password(stage: Stage, dice: random.Random) -> int:
    """Somebody rotated it and forgot the relay, whose sessions then end. In the end it is what it was."""
    return await _without_password(stage, stage.producer_sql, "lab_relay", stage.relays, dice.uniform(0.5, 5))


@fault("consumers' password in PostgreSQL changed", rows=(40,), touches=("consumer", "consumer-db", "consumer-pg"))
async def consumers_password(stage: Stage, dice: random.Random) -> int:
    """The same on the other side."""
    return await _without_password(stage, stage.consumer_sql, "lab_consumer", stage.consumers, dice.uniform(0.5, 5))


async def _without_password(stage: Stage, ask: Ask, role: str, daemons: Sequence[Daemon], lasts_s: float) -> int:
    (row,) = await ask("SELECT rolpassword FROM pg_authid WHERE rolname = $1", role)
    back = f"ALTER ROLE {role} PASSWORD '{row['rolpassword']}'"  # a verifier, which PostgreSQL takes as it is
    refused = "password authentication failed"
    bites = await _without(
        stage, ask, f"ALTER ROLE {role} PASSWORD 'rotated'", back, daemons, refused, lasts_s, ends=role
    )
    forbid_leaks(stage.password, daemons)
    return bites


def forbid_leaks(password: str, daemons: Sequence[Daemon]) -> None:
    """Raises Broken when one of them has ever written the password to its log."""
    leaky = [daemon.name for daemon in daemons if password in daemon.log_since(0)]
    if leaky:
        raise Broken(f"the password is in the log of {', '.join(leaky)}")


async def _without(
    stage: Stage,
    ask: Ask,
    take: str,
    give: str,
    daemons: Sequence[Daemon],
    refusal: str,
    lasts_s: float,
    *,
    ends: str | None = None,
) -> int:
    """Refusals in the daemons' logs between `take` and `give`, which comes so long after the second of them.

    `ends`: the role whose sessions end, so that it logs in again.
    """
    marks = [daemon.log_mark() for daemon in daemons]

    def refusals() -> int:
        return sum(d.log_since(mark).count(refusal) for d, mark in zip(daemons, marks, strict=True))

    async def refused() -> bool:
        return refusals() >= 2

    async def given() -> bool:
        await ask(give)
        return True

    try:
        await ask(take)
        if ends is not None:
            await ask(END_SESSIONS, ends)
        if await stage.until(refused, timeout_s=NOTICED_S):
            await asyncio.sleep(lasts_s)
        return refusals()
    finally:
        if not await stage.until(given, timeout_s=HEALED_S):
            raise TimeoutError(f"could not be healed: {give.partition(' PASSWORD ')[0]}")
