"""From probes to figures. Pure: the caller brings the clock.

Every tenth event is a probe: it carries its number and the moment of its insertion, and its arrival is timed. Numbers are given in
the order of insertion and arrive in it, so the last probe's number says how far the relay has come.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

PROBE_EVERY = 10
CAUGHT_UP = 400
"""Events of backlog at which a burst counts as drained: what is on its way at the usual pace anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What one side did in so many seconds; latencies in milliseconds, from the INSERT to a consumer's hand."""

    side: str
    second: float  # since the start of the load, at the window's end
    held: bool  # a transaction held xmin
    rate: float  # events a second that arrived
    backlog: int  # committed, not arrived
    p50_ms: float | None  # None: too few probes that no burst was in the way of
    p99_ms: float | None
    insert_ms: float | None  # median of the producer's statements
    relay_cpu: float  # cores
    dead_rows: int
    table_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """A lot at once: how fast the relay drains when the input does not limit it."""

    side: str
    second: float  # since the start of the load, when it was inserted
    held: bool
    events: int  # that arrived until it was drained, the usual pace's among them
    seconds: float

    @property
    def rate(self) -> float:
        """Events a second while draining."""
        return self.events / self.seconds


class Meter:
    """Counts of one side."""

    _FEWEST = 20  # probes for a percentile

    def __init__(self, side: str) -> None:
        self.side = side
        self.inserted = 0  # the highest number that is committed
        self.arrived = 0  # the highest probe's number that arrived
        self.bursts: list[Burst] = []
        self._latencies: list[float] = []
        self._inserts: list[float] = []
        self._before = (0.0, 0)
        self._burst: tuple[float, int, int, bool] | None = None  # began, arrived then, highest number, held

    @property
    def backlog(self) -> int:
        """Committed and not arrived; probes tell it in tens."""
        return max(self.inserted - self.arrived - PROBE_EVERY + 1, 0)

    @property
    def bursting(self) -> bool:
        """Until the last burst is drained."""
        return self._burst is not None

    def insert(self, highest: int, seconds: float) -> None:
        """The producer committed a statement."""
        self.inserted = highest
        self._inserts.append(seconds)

    def burst(self, now: float, highest: int, *, held: bool) -> None:
        """The producer is about to insert a lot, up to this number."""
        self._burst = (now, self.arrived, highest, held)

    def arrive(self, now: float, number: int, latency_s: float, *, quiet: bool) -> None:
        """A probe arrived; `quiet`: no burst of either side is being drained."""
        self.arrived = max(self.arrived, number)
        if quiet:
            self._latencies.append(latency_s)
        if self._burst is not None:
            began, before, highest, held = self._burst
            if self.arrived >= highest and self.backlog <= CAUGHT_UP:
                self._burst = None
                self.bursts.append(
                    Burst(side=self.side, second=began, held=held, events=self.arrived - before, seconds=now - began)
                )

    def window(self, now: float, *, held: bool, relay_cpu: float, dead_rows: int, table_bytes: int) -> Window:
        """What came since the last one."""
        then, count = self._before
        self._before = (now, self.arrived)
        latencies, self._latencies = sorted(self._latencies), []
        inserts, self._inserts = self._inserts, []
        enough = len(latencies) >= self._FEWEST
        return Window(
            side=self.side,
            second=now,
            held=held,
            rate=(self.arrived - count) / max(now - then, 1e-9),
            backlog=self.backlog,
            p50_ms=1000 * percentile(latencies, 0.5) if enough else None,
            p99_ms=1000 * percentile(latencies, 0.99) if enough else None,
            insert_ms=1000 * percentile(sorted(inserts), 0.5) if inserts else None,
            relay_cpu=relay_cpu,
            dead_rows=dead_rows,
            table_bytes=table_bytes,
        )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that this share of them does not exceed (nearest rank)."""
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def minute(found: Sequence[Window], side: str, number: int) -> list[Window]:
    """The windows that end within the number-th minute, from 1."""
    return [w for w in found if w.side == side and 60 * (number - 1) < w.second <= 60 * number]
