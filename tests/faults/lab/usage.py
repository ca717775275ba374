"""What the daemons used while they lived: growth that does not stop, and bounds that nothing may ever cross. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median

from tests.faults.lab.evidence import Process, Sample
from tests.faults.lab.verdict import MB, Allowance, Limits

Life = Sequence[tuple[float, Process]]
Found = tuple[str, float | None]
RESOURCES = {"descriptors": 1, "connections": 1, "tasks": 1, "rss": MB}
"""What is looked at -> the unit it is told in."""


def lives(samples: Sequence[Sample]) -> Mapping[tuple[str, int], Life]:
    """(name, pid) -> what was seen of it, in the order of time."""
    found: dict[tuple[str, int], list[tuple[float, Process]]] = {}
    for sample in samples:
        for name, process in sample.processes.items():
            found.setdefault((name, process.pid), []).append((sample.at, process))
    return found


def judged_lives(samples: Sequence[Sample], limits: Limits) -> int:
    """How many processes lived long enough for their growth to be told, by themselves or together with others."""
    alone = sum(_is_long(life, limits) for life in lives(samples).values())
    return alone + sum(len(short) for _, short in _short_lives(samples, limits))


def grown(samples: Sequence[Sample], limits: Limits) -> Iterator[Found]:
    """Processes that used more than they may, or more and more."""
    for (name, pid), life in lives(samples).items():
        for resource, unit in RESOURCES.items():
            allowance: Allowance = getattr(limits, resource)
            seen = _seen(life, resource)
            label = f"{name} (pid {pid}): {resource}{' in MB' if unit == MB else ''}"
            if not seen:
                continue
            at, most = max(seen, key=lambda each: each[1])
            if most > allowance.most:
                yield f"{label} reached {most // unit}, at most {allowance.most // unit} are allowed", at
            elif _is_long(life, limits):
                quarter = (life[-1][0] - life[0][0]) / 4
                early = [value for at, value in seen if at <= life[0][0] + quarter]
                late = [value for at, value in seen if at >= life[-1][0] - quarter]
                if early and late and min(late) > max(early) + allowance.growth:
                    first, last = max(early) // unit, min(late) // unit
                    yield (
                        f"{label} grew from {first} in the first quarter of its life to at least {last} in the last",
                        None,
                    )
    yield from _grown_in_short_lives(samples, limits)


def silent(samples: Sequence[Sample], limits: Limits) -> Iterator[Found]:
    """Processes that never told how many tasks they had: a leak of tasks would not be seen."""
    for (name, pid), life in lives(samples).items():
        if _length(life) >= limits.short_life_s and not _seen(life, "tasks"):
            yield f"{name} (pid {pid}) did not tell its tasks once in {_length(life):.0f} s", life[0][0]


def _grown_in_short_lives(samples: Sequence[Sample], limits: Limits) -> Iterator[Found]:
    """Lives that are cut short by faults: a leak is in each of them, from one look to the next.

    The median of the steps: that a standby becomes the owner, or has a backlog for a while, is a step or two.
    """
    for name, short in _short_lives(samples, limits):
        for resource, unit in RESOURCES.items():
            steps = [
                (more - less) / (later - sooner)
                for life in short
                for (sooner, less), (later, more) in pairwise(_seen(life, resource))
                if sooner >= life[0][0] + limits.warm_up_s
            ]
            rate = median(steps) if steps else 0.0
            if rate * limits.lifetime_s > getattr(limits, resource).growth:
                label = f"{name}: {resource}{' in MB' if unit == MB else ''}"
                yield f"{label} grew by {rate / unit:.1f} a second in {len(short)} lives of less than a minute", None


def _short_lives(samples: Sequence[Sample], limits: Limits) -> Iterator[tuple[str, list[Life]]]:
    """By name, of those that together were looked at for as long as a long life."""
    short: dict[str, list[Life]] = {}
    for (name, _), life in lives(samples).items():
        if limits.short_life_s <= _length(life) < limits.lifetime_s:
            short.setdefault(name, []).append(life)
    for name, found in short.items():
        if sum(_length(life) - limits.warm_up_s for life in found) >= limits.lifetime_s:
            yield name, found


def _seen(life: Life, resource: str) -> list[tuple[float, int]]:
    return [(at, value) for at, process in life if (value := getattr(process, resource)) is not None]


def _length(life: Life) -> float:
    return life[-1][0] - life[0][0]


def _is_long(life: Life, limits: Limits) -> bool:
    return _length(life) >= limits.lifetime_s
