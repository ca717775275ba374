"""Strikes faults, one after the other and two at once, in an order that the seed decides.

All kinds are dealt like a deck of cards, shuffled anew each time it is through, so that none is forgotten; between two
beginnings passes a random time (a Poisson process). Two faults overlap only if they break different things: what a fault
did could not be told otherwise. Before some of them everybody is given time to recover, so that their own recovery, and what it
is like without any fault, can be measured.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tests.faults.lab.evidence import Struck
from tests.faults.lab.fault import Broken, Fault
from tests.faults.lab.profile import Profile
from tests.faults.lab.sampler import LOOK_S
from tests.faults.lab.stage import Stage

LONGEST_S = 120.0
"""A fault that is not over by then has failed: it is cancelled, and heals on its way out."""

CALM_S = 40.0
ATTEMPTS = 3
"""What has not bitten (and did not fail) is tried again: between two restarts there may be nothing to bite. The third time the run is inconclusive."""

Tell = Callable[[str], None]


@dataclass(slots=True)
class Nemesis:
    """All faults of one run."""

    stage: Stage
    faults: Sequence[Fault]
    profile: Profile
    seed: int
    tell: Tell
    struck: list[Struck] = field(default_factory=list)
    _running: dict[asyncio.Task[None], Fault] = field(default_factory=dict)

    async def run(self) -> None:
        """Until the time is over and every kind has had its turn; everything is healed then."""
        dice = random.Random(f"{self.seed} nemesis")
        clock = asyncio.get_running_loop().time
        until = clock() + self.profile.seconds
        try:
            for number, fault in enumerate(_deck(self.faults, dice)):
                if number >= len(self.faults) and clock() >= until:
                    break
                if dice.random() < self.profile.alone:
                    await self._calm()
                await self._room_for(fault)
                task = asyncio.create_task(self._strike(fault, random.Random(f"{self.seed} {number} {fault.kind}")))
                self._running[task] = fault
                await asyncio.sleep(dice.expovariate(1 / self.profile.gap_s))
            await self._ended(0)
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def _room_for(self, fault: Fault) -> None:
        while len(self._running) >= self.profile.at_once or any(
            f.touches & fault.touches for f in self._running.values()
        ):
            await self._ended(len(self._running) - 1)

    async def _calm(self) -> None:
        """No fault is on, and all that was committed by then is applied; no longer than CALM_S, the checker will tell."""
        await self._ended(0)
        await asyncio.sleep(2 * LOOK_S)  # two looks of the sampler
        committed = self.stage.committed

        async def caught_up() -> bool:
            return self.stage.applied >= committed

        await self.stage.until(caught_up, timeout_s=CALM_S)

    async def _ended(self, left: int) -> None:
        """Wait until at most so many are going on."""
        while len(self._running) > left:
            done, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                del self._running[task]
                task.result()

    async def _strike(self, fault: Fault, dice: random.Random) -> None:
        begun = time.time()
        self.tell(f"+ {fault.kind}")
        attempt, bites, failure, broken = 0, 0, None, None
        for attempt in range(ATTEMPTS):
            self.stage.history.record("fault_begun", kind=fault.kind, attempt=attempt)
            try:
                async with asyncio.timeout(LONGEST_S):
                    bites = await fault.act(self.stage, dice)
            except Broken as exc:
                broken = str(exc)
            except Exception as exc:  # noqa: BLE001 - whatever it is: the run proves nothing about this fault
                failure = f"{type(exc).__name__}: {exc}"
            self.stage.history.record("fault_healed", kind=fault.kind, bites=bites, failure=failure, broken=broken)
            if bites or failure or broken:
                break
        healed = time.time()
        self.struck.append(
            Struck(
                kind=fault.kind,
                begun=begun,
                healed=healed,
                bites=bites,
                confined_to=fault.confined_to,
                failure=failure,
                broken=broken,
                note=f"bit only at attempt {attempt + 1}" if attempt and bites else "",
            )
        )
        outcome = f"BROKEN {broken}" if broken else f"bitten {bites} times" if bites else f"NOT BITTEN {failure or ''}"
        self.tell(f"- {fault.kind}: {healed - begun:.1f} s, {outcome}")


def _deck(faults: Sequence[Fault], dice: random.Random) -> Iterator[Fault]:
    """For ever."""
    while True:
        cards = list(faults)
        dice.shuffle(cards)
        yield from cards
