"""The service's own code fails: handlers that raise, that hang, and that take their process with them.

All of it happens to one aggregate of the type `poison`; everything else must go on as if nothing were.
"""

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


@fault("handler hangs", rows=(25,), touches=("consumer",), confined_to="poison")
async def hangs(stage: Stage, dice: random.Random) -> int:
    """Longer than it may, every time. Bites: attempts that were ended by the time-out."""
    return await _suffering(stage, dice, "INSERT INTO hang VALUES ($1, 60)", "DELETE FROM hang", "%")


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
