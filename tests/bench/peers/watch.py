"""How fast it goes, seen from outside and in the same way for everybody: the depth of the queue, or the effects in the table.

Start-up (an interpreter's imports, connections, the first look at the table) is left out for all: the clock runs from the first
look at which something had arrived to the first at which all had. What had arrived at the first look is not counted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

LOOK_S = 0.01
STALLED_S = 60.0

Count = Callable[[], Awaitable[int]]


class Stalled(Exception):
    """Nothing more arrived for a minute."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What was measured of one run."""

    events: int  # that the clock ran for
    seconds: float

    @property
    def rate(self) -> float:
        """Events a second."""
        return self.events / self.seconds


class Watch:
    """Looks at a count that grows to `events`. Pure but for the looking: `look` can be fed by a test."""

    def __init__(self, events: int) -> None:
        self._events = events
        self._first: tuple[float, int] | None = None
        self._last: tuple[float, int] = (0.0, 0)

    def look(self, now: float, count: int) -> Seen | None:
        """One look; what was seen, as soon as all have arrived. Raises Stalled."""
        if count > 0 and self._first is None:
            self._first = (now, count)
        if count > self._last[1] or self._last == (0.0, 0):
            self._last = (now, count)
        elif now - self._last[0] > STALLED_S:
            raise Stalled(f"{count:,} of {self._events:,} arrived, then nothing for {STALLED_S:.0f} s")
        if count < self._events or self._first is None:
            return None
        began, before = self._first
        if before >= self._events:
            raise Stalled(f"all {self._events:,} had arrived at the first look: too few to measure")
        return Seen(self._events - before, now - began)


async def watched(count: Count, events: int, *, alive: Callable[[], bool]) -> Seen:
    """Look until all have arrived. Raises Stalled, also when nobody is there any more who could bring the rest."""
    watch = Watch(events)
    while True:
        running = alive()
        found = await count()
        if (seen := watch.look(time.perf_counter(), found)) is not None:
            return seen
        if not running:
            raise Stalled(f"the process ended, and {found:,} of {events:,} had arrived")
        await asyncio.sleep(LOOK_S)
