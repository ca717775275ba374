"""Medians, ratios, the table. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of one contender, verified."""

    contender: str
    queue_type: str
    round: int
    events: int
    rate: float  # events a second, see watch.py
    wall_s: float  # from the start of its process to the last event, start-up included
    cpu_us: float  # CPU of its own processes per event, start-up included
    in_order: bool | None = None  # inbox: every aggregate's effects are in the order of its numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the table: medians over the rounds."""

    contender: str
    queue_type: str
    events: int
    rate: float
    lowest: float
    highest: float
    cpu_us: float
    ours: Mapping[str, float]  # how many times as fast each of ours is, by name: ratio of the medians
    in_order: bool | None = None


def lines(runs: Sequence[Run], *, ours: Sequence[str]) -> list[Line]:
    """The fastest first, by queue type."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.queue_type, run.contender), []).append(run)
    medians = {key: statistics.median(run.rate for run in found) for key, found in groups.items()}
    result = []
    for (queue_type, name), found in groups.items():
        rate = medians[queue_type, name]
        result.append(
            Line(
                contender=name,
                queue_type=queue_type,
                events=found[0].events,
                rate=rate,
                lowest=min(run.rate for run in found),
                highest=max(run.rate for run in found),
                cpu_us=statistics.median(run.cpu_us for run in found),
                ours={own: medians[queue_type, own] / rate for own in ours if (queue_type, own) in medians},
                in_order=None if found[0].in_order is None else all(run.in_order for run in found),
            )
        )
    return sorted(result, key=lambda line: (line.queue_type, -line.rate))


def fastest_peer(found: Sequence[Line], queue_type: str, *, ours: Sequence[str]) -> Line | None:
    """The one that counts: the fastest of the others."""
    peers = [line for line in found if line.queue_type == queue_type and line.contender not in ours]
    return max(peers, key=lambda line: line.rate, default=None)


def table(found: Sequence[Line], *, ours: Sequence[str]) -> str:
    """For people, as Markdown."""
    ordered = any(line.in_order is not None for line in found)
    heads = ["queue", "who", "events", "events/s", "lowest to highest", "CPU µs/event", *(f"{own} is" for own in ours)]
    heads += ["in order"] if ordered else []
    rows = [heads, ["---"] * 2 + ["---:"] * (4 + len(ours)) + (["---"] if ordered else [])]
    for line in found:
        cells = [line.queue_type, line.contender, f"{line.events:,}", f"{line.rate:,.0f}"]
        cells += [f"{line.lowest:,.0f} to {line.highest:,.0f}", f"{line.cpu_us:.0f}"]
        cells += [f"{line.ours[own]:.1f} x" if own in line.ours else "" for own in ours]
        cells += [{True: "yes", False: "no", None: ""}[line.in_order]] if ordered else []
        rows.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def as_json(
    runs: Sequence[Run], found: Sequence[Line], *, ours: Sequence[str], about: Mapping[str, Any]
) -> dict[str, Any]:
    """All that was measured."""
    peers = {kind: fastest_peer(found, kind, ours=ours) for kind in sorted({line.queue_type for line in found})}
    return {
        **about,
        "fastest_peer": {kind: asdict(line) for kind, line in peers.items() if line is not None},
        "lines": [asdict(line) for line in found],
        "runs": [asdict(run) for run in runs],
    }
