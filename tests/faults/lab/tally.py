"""The evidence, condensed to what a page can show: faults by kind, latencies by time, memory by process. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tests.faults.lab.charts import Line, Point, thinned
from tests.faults.lab.course import percentile
from tests.faults.lab.evidence import Evidence
from tests.faults.lab.usage import lives
from tests.faults.lab.verdict import MB, Verdict

BUCKET_S = 5.0
MOST_BUCKETS = 360
MOST_POINTS = 700
"""About as many as the drawing has room for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """All faults of one kind."""

    kind: str
    times: int
    bites: int
    toothless: int  # times that it did not bite, or could not be injected
    on_s: float  # in all
    confined_to: str | None
    alone_s: float | None  # the worst recovery when no other fault overlapped; None: others always did
    company_s: float | None  # the worst recovery with others, measured from the last heal of all
    bound_s: float | None  # of one that is alone; None: nothing was measured


def by_kind(evidence: Evidence, verdict: Verdict) -> list[Kind]:
    """In the order of their names."""
    kinds = []
    for kind in sorted({fault.kind for fault in evidence.struck}):
        faults = [fault for fault in evidence.struck if fault.kind == kind]
        after = [recovery for recovery in verdict.recoveries if recovery.kind == kind]
        kinds.append(
            Kind(
                kind=kind,
                times=len(faults),
                bites=sum(fault.bites for fault in faults),
                toothless=sum(not fault.bites or fault.failure is not None for fault in faults),
                on_s=sum(fault.healed - fault.begun for fault in faults),
                confined_to=faults[0].confined_to,
                alone_s=max((each.seconds for each in after if each.alone), default=None),
                company_s=max((each.seconds for each in after if not each.alone), default=None),
                bound_s=next((each.own_bound_s for each in after), None),
            )
        )
    return kinds


def latency_lines(evidence: Evidence, end: float) -> list[Line]:
    """p50 and p99 of the events committed in each bucket; an interruption where none was."""
    width = max(BUCKET_S, (end - evidence.began) / MOST_BUCKETS)
    committed = {event.token: event.at for event in evidence.committed}
    buckets: dict[int, list[float]] = {}
    for effect in evidence.effects:
        if (at := committed.pop(effect.token, None)) is not None:  # its first effect
            buckets.setdefault(math.floor((at - evidence.began) / width), []).append(max(effect.at - at, 0.001))
    lines = []
    for name, share, look in (("99 %", 0.99, "c1"), ("50 %", 0.50, "c0")):
        runs: list[list[Point]] = []
        before: int | None = None
        for number in sorted(buckets):
            if before is None or number != before + 1:
                runs.append([])
            before = number
            runs[-1].append((evidence.began + (number + 0.5) * width, percentile(buckets[number], share) or 0.0))
        lines.append(Line(name=name, runs=runs, look=look))
    return lines


def backlog_line(evidence: Evidence) -> Line:
    """Committed, not yet applied."""
    points = [(sample.at, float(max(sample.committed - sample.applied, 0))) for sample in evidence.samples]
    return Line(name="backlog", runs=[thinned(points, MOST_POINTS)], look="c0")


def memory_lines(evidence: Evidence) -> list[Line]:
    """MB of every daemon; interrupted where it was started anew."""
    runs: dict[str, list[Sequence[Point]]] = {}
    share = max(1, len(lives(evidence.samples)))
    for (name, _), life in lives(evidence.samples).items():
        points = [(at, process.rss / MB) for at, process in life]
        runs.setdefault(name, []).append(thinned(points, max(MOST_POINTS * 4 // share, 20)))
    return [Line(name=name, runs=runs[name], look=f"c{i % 6}") for i, name in enumerate(sorted(runs))]
