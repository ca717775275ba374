"""When the log is read again. Pure: times are given, by any clock.

To look costs about 0.2 ms of PostgreSQL, which the producers need, however few rows are found; and what is published in small pieces
costs the broker up to twice as much a message. So at the end of the log the next page may gather: for as long as the last one is in
flight, and under load for `gather_s`, however soon the broker answers.
"""

from __future__ import annotations

import math

from relay.outbox.cursor import Page

_LOAD = 2500
"""Rows a second at which latency is not all that counts any more: a look each 3 ms (a confirm comes back by then) finds eight of them."""

_MEMORY_S = 0.1
"""Over so long, about, the rate is taken: a transaction of a hundred events is no load."""

_TICK_S = 1e-6
"""Two reads are never nearer to each other, though a coarse clock may say so."""

_PATIENCE_FIRST_S = 0.005
_PATIENCE_LAST_S = 0.08
"""How long to wait for an answer before the next look; one that finds nothing doubles it, since what is in flight may stay there for
long (an alarm, a queue that hangs)."""


class Pace:
    """The time of the next read."""

    def __init__(self, gather_s: float) -> None:
        self._gather_s = gather_s
        self._patience_s = _PATIENCE_FIRST_S
        self._due_at = 0.0
        self._rate = 0.0  # rows a second, lately
        self._rated_at = 0.0
        self.gathers = False
        """True under load: an answer is no reason to read sooner."""

    def saw(self, page: Page, now: float) -> None:
        """Learn from what was just read."""
        rows = len(page.rows)
        since_s = max(now - self._rated_at, _TICK_S)
        kept = math.exp(-since_s / _MEMORY_S)
        self._rate = self._rate * kept + rows / since_s * (1 - kept)  # they came in all of that time, not now
        self._rated_at = now
        self._patience_s = _PATIENCE_FIRST_S if rows else min(_PATIENCE_LAST_S, self._patience_s * 2)
        self.gathers = page.complete and rows > 0 and self._rate >= _LOAD and self._gather_s > 0
        self._due_at = now
        if page.complete:
            self._due_at += self._gather_s if self.gathers else self._patience_s

    def due_s(self, now: float) -> float:
        """Seconds until the next read, 0 or less when it is due. Without `gathers` it is due as soon as nothing is in flight."""
        return self._due_at - now
