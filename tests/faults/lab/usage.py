"""What the daemons used while they lived: growth that does not stop, and bounds that nothing may ever cross. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tests.faults.lab.evidence import Process, Sample
from tests.faults.lab.verdict import MB, Allowance, Limits

Life = Sequence[tuple[float, Process]]
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
    """How many processes lived long enough for their growth to be told."""
    return sum(_is_long(life, limits) for life in lives(samples).values())


def grown(samples: Sequence[Sample], limits: Limits) -> Iterator[tuple[str, float | None]]:
    """Processes that used more than they may, or more and more."""
    for (name, pid), life in lives(samples).items():
        for resource, unit in RESOURCES.items():
            allowance: Allowance = getattr(limits, resource)
            seen = [(at, value) for at, process in life if (value := getattr(process, resource)) is not None]
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


def _is_long(life: Life, limits: Limits) -> bool:
    return life[-1][0] - life[0][0] >= limits.lifetime_s
