"""When what was going on: which fault was on, when its recovery was over, when it was quiet, how late events were then. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from tests.faults.lab.evidence import Struck
from tests.faults.lab.spans import Span, Spans
from tests.faults.lab.verdict import Limits, Recovery


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of all do not exceed; None of nothing."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """One fault, or several that overlap: which of them is to blame for what, nobody could tell."""

    faults: tuple[Struck, ...]
    begun: float
    healed: float  # the last of them
    bound_s: float  # for the recovery, the longest of theirs
    recovered: float  # everything is applied that was committed before `healed`
    calm: float  # and so is what had queued up meanwhile; at the latest when the bound is over

    @property
    def recovery_s(self) -> float:
        """From the last heal."""
        return self.recovered - self.healed


@dataclass(slots=True)
class Course:
    """The faults, and the events by the time of their commit. Built once, then asked."""

    struck: Sequence[Struck]
    waits: Iterable[Span]  # (committed, applied) of every event that has an effect
    began: float
    recovery_s: Mapping[str, float]  # kind -> its bound
    limits: Limits
    committed: list[float] = field(init=False)  # sorted
    latencies: list[float] = field(init=False)  # of the same events
    disturbances: list[Disturbance] = field(init=False)
    quiet: list[Span] = field(init=False)  # between the disturbances
    _applied_by: list[float] = field(init=False)  # when this event and all before it were
    _quiet_time: Spans = field(init=False)

    def __post_init__(self) -> None:
        waits = sorted(self.waits)
        self.committed = [committed for committed, _ in waits]
        self.latencies = [max(0.0, applied - committed) for committed, applied in waits]
        self._applied_by = list(accumulate((applied for _, applied in waits), max))
        self.disturbances = list(self._disturbances())
        self.quiet = list(self._quiet())
        self._quiet_time = Spans(self.quiet)

    def caught_up(self, moment: float) -> float:
        """When everything was applied that had been committed by `moment`."""
        number = bisect_right(self.committed, moment)
        return max(moment, self._applied_by[number - 1]) if number else moment

    def latencies_in(self, spans: Iterable[Span]) -> list[float]:
        """Of the events committed in the spans."""
        return [
            latency
            for start, end in spans
            for latency in self.latencies[bisect_left(self.committed, start) : bisect_right(self.committed, end)]
        ]

    def surely_quiet(self) -> list[Span]:
        """The quiet, with a margin on both sides."""
        margin = self.limits.margin_s
        trimmed = ((start + margin, end - margin) for start, end in self.quiet)
        return [(start, end) for start, end in trimmed if start < end]

    def quiet_between(self, start: float, end: float) -> float:
        """How many seconds of this time were quiet."""
        return self._quiet_time.between(start, end)

    def recoveries(self) -> tuple[Recovery, ...]:
        """One for each fault."""
        return tuple(
            Recovery(
                kind=fault.kind,
                begun=fault.begun,
                healed=fault.healed,
                seconds=each.recovery_s,
                bound_s=each.bound_s,
                own_bound_s=self.bound_s(fault),
                alone=len(each.faults) == 1,
            )
            for each in self.disturbances
            for fault in each.faults
        )

    def bound_s(self, fault: Struck) -> float:
        """How long its recovery may take."""
        return self.recovery_s.get(fault.kind, self.limits.recovery_s)

    def situation(self, moment: float) -> str:
        """Which fault was on, in words."""
        if not self.struck:
            return "no fault was struck"
        if on := sorted({fault.kind for fault in self.struck if fault.begun <= moment <= fault.healed}):
            return f"while {' and '.join(map(repr, on))} {'was' if len(on) == 1 else 'were'} on"
        if before := [fault for fault in self.struck if fault.healed < moment]:
            last = max(before, key=lambda fault: fault.healed)
            return f"{moment - last.healed:.1f} s after {last.kind!r} was healed"
        return "before the first fault"

    def _disturbances(self) -> Iterator[Disturbance]:
        """A fault that begins before the last one's recovery is over delays it: the two are one.

        But only within the bound. What takes longer must not hide behind the next fault.
        """
        together: list[Struck] = []
        for fault in sorted(self.struck, key=lambda fault: (fault.begun, fault.healed)):
            if together and fault.begun > self._disturbance(together).calm:
                yield self._disturbance(together)
                together = []
            together.append(fault)
        if together:
            yield self._disturbance(together)

    def _disturbance(self, faults: Sequence[Struck]) -> Disturbance:
        healed = max(fault.healed for fault in faults)
        bound_s = max(map(self.bound_s, faults))
        calm = healed
        while (reached := self.caught_up(calm)) - calm > self.limits.calm_s and reached < healed + bound_s:
            calm = reached
        return Disturbance(
            faults=tuple(faults),
            begun=min(fault.begun for fault in faults),
            healed=healed,
            bound_s=bound_s,
            recovered=self.caught_up(healed),
            calm=min(reached, healed + bound_s),
        )

    def _quiet(self) -> Iterator[Span]:
        start = self.began
        for each in self.disturbances:
            if start < each.begun:
                yield start, each.begun
            start = each.calm
        yield start, math.inf
