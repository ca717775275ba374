"""The service's own code fails, for one aggregate of the type `poison`: handlers that raise, and that hang."""

from __future__ import annotations

import asyncio
import random

from tests.faults.lab.fault import fault
from tests.faults.lab.stage import Stage

BITTEN_S = 20.0
"""Longest wait for the first failure: until the aggregate has an event at all, and until its handler was called."""

AGGREGATES = "SELECT aggregate_id FROM relay.outbox_aggregate WHERE aggregate_type = 'poison' ORDER BY aggregate_id"

FAILED = """
SELECT coalesce(max(attempts), 0) AS attempts FROM relay.inbox_held
WHERE aggregate_type = 'poison' AND aggregate_id = $1 AND reason = 'failed' AND error LIKE $2
"""


@fault("handler raises", rows=(24,), touches=("consumer",), confined_to="poison", smoke=True)
async def raises(stage: Stage, dice: random.Random) -> int:
    """For every event of an aggregate, for some seconds. Bites: failed attempts, of which there must have been two."""
    return await _suffering(stage, dice, "INSERT INTO poison VALUES ($1)", "DELETE FROM poison", "%Poisoned%")


@fault("handler hangs", rows=(25,), touches=("consumer",))
async def hangs(stage: Stage, dice: random.Random) -> int:
    """Longer than it may, every time. Bites: attempts that were ended by the time-out.

    Only its own aggregate is held, but every attempt costs its consumer the whole time-out, and whatever that consumer has in
    hand waits as long: this is not confined.
    """
    return await _suffering(stage, dice, "INSERT INTO hang VALUES ($1, 60)", "DELETE FROM hang", "%longer than%")


async def _suffering(stage: Stage, dice: random.Random, infect: str, cure: str, error: str) -> int:
    """Attempts at one event that failed with such an error, as far as they were seen."""
    victim = dice.choice([row["aggregate_id"] for row in await stage.producer_sql(AGGREGATES)])
    attempts = 0

    async def failed_twice() -> bool:
        nonlocal attempts
        (row,) = await stage.consumer_sql(FAILED, victim, error)
        attempts = max(attempts, row["attempts"])
        return bool(attempts >= 2)

    async def cured() -> bool:
        await stage.consumer_sql(cure)
        return True

    try:
        await stage.consumer_sql(infect, victim)
        bitten = await stage.until(failed_twice, timeout_s=BITTEN_S)
        await asyncio.sleep(dice.uniform(1, 4))
        await stage.until(failed_twice, timeout_s=0.1)
    finally:
        if not await stage.until(cured, timeout_s=BITTEN_S):
            raise TimeoutError(f"could not be healed: {cure}")
    return attempts if bitten else 0
