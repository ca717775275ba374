"""What is sent: how many events, of which size, over how many aggregates, how fast."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass, replace

ROWS_EACH = 500
"""Rows a statement, and messages a transaction of the bare statements: what a page or a batch roughly is."""

_STATEMENT_BYTES = 8 * 1024 * 1024
_LARGE_BYTES = 4096
_TOTAL_BYTES = 256 * 1024 * 1024
"""Most payload in one stage where payloads are large: of those, fewer tell as much."""

_CEILING_EVENTS = 200_000
"""Most messages of the raw publishing stage, which holds all of them in memory."""

_FRAME = len('{"fill": ""}')


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One load. `events` are those of the stages without a rate; one with a rate has `rate * seconds`."""

    events: int
    aggregates: int
    payload_bytes: int
    seconds: float = 5.0  # of each stage with a rate
    live_rate: int = 5000  # transactions a second, live relay
    live_rows: int = 1  # events in each of them
    rates: tuple[int, ...] = (1000, 10_000)  # events a second, end to end
    producers: int = 8  # connections that insert at the same time
    samples: int = 20  # asleep: how many events, one by one
    interval_s: float = 1.0  # between two of them

    def bounded(self) -> Workload:
        """The same, with fewer events (100 at least) where payloads are large."""
        if self.payload_bytes < _LARGE_BYTES:
            return self
        return replace(self, events=min(self.events, max(100, _TOTAL_BYTES // self.payload_bytes)))

    @property
    def ceiling_events(self) -> int:
        """Events that the raw publishing stage publishes."""
        return min(self.events, _CEILING_EVENTS)

    @property
    def rows_each(self) -> int:
        """Rows in one statement: 500, fewer where they are large."""
        return max(1, min(ROWS_EACH, _STATEMENT_BYTES // self.payload_bytes))

    @property
    def fill(self) -> str:
        """The text that makes a payload `payload_bytes` long; letters by chance, which no storage can compress away."""
        dice = random.Random(1)  # noqa: S311 - no secret
        return "".join(dice.choices(string.ascii_letters + string.digits + "+/", k=max(0, self.payload_bytes - _FRAME)))

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.events:,} events of {self.payload_bytes:,} bytes, {self.aggregates:,} aggregates"
