"""What a measurement gives, and the arithmetic on it: percentiles, medians over rounds, ratios within a round. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from relay.errors import RelayError

Key = tuple[str, str]
"""(stage, variant): what a result is a measurement of. Stable names, since they are the keys of the JSON report."""


class MeasurementFailed(RelayError):
    """A stage did not do what it measured (a row unconfirmed, an event applied twice), or one of its processes ended."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Percentiles of some delays, in milliseconds."""

    samples: int
    p50_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Latency:
        """From the delays themselves, in seconds. Raises MeasurementFailed when there are none."""
        ordered = sorted(seconds)
        if not ordered:
            raise MeasurementFailed("no delay was measured at all")
        p50, p99, p999 = (percentile(ordered, share) * 1000 for share in (0.5, 0.99, 0.999))
        return cls(len(ordered), p50, p99, p999, ordered[-1] * 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One measurement, verified: in one round, of one stage in one variant."""

    stage: str
    variant: str
    events: int  # that the seconds are for
    seconds: float  # wall clock
    latency: Latency | None = None
    cpu_us: Mapping[str, float | None] = field(default_factory=dict)  # per event, by process; None: not to be had here
    rss_mib: Mapping[str, float | None] = field(default_factory=dict)  # highest resident memory of our processes
    more: Mapping[str, float] = field(default_factory=dict)  # what only this stage has, see its docstring

    @property
    def key(self) -> Key:
        """What it is a measurement of."""
        return (self.stage, self.variant)

    @property
    def rate(self) -> float:
        """Events per second."""
        return self.events / self.seconds


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some rounds, and the lowest and highest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Ratio:
    """One stage beside what bounds it, both of the same round."""

    name: str  # stable, for the JSON report
    told: str  # for people
    above: Key
    below: Key
    figure: str = "rate"  # or "seconds", or the name of something in `more`

    def of(self, rounds: Sequence[Mapping[Key, Result]]) -> Spread | None:
        """The spread of the ratios of those rounds that have both; None if none has."""
        found = [
            value
            for results in rounds
            if self.above in results and self.below in results
            if (value := ratio(self._figure(results[self.above]), self._figure(results[self.below]))) is not None
        ]
        return Spread.of(found) if found else None

    def _figure(self, result: Result) -> float:
        if self.figure == "rate":
            return result.rate
        return result.seconds if self.figure == "seconds" else result.more[self.figure]


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest of the values that at least this share of them does not exceed (nearest rank: always one of them)."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def ratio(above: float, below: float) -> float | None:
    """The quotient; None where there is nothing to compare with."""
    return above / below if below else None


def medians(values: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The median by name over rounds; None where it was not to be had in every one of them."""
    names = dict.fromkeys(name for one in values for name in one)
    found: dict[str, float | None] = {}
    for name in names:
        known = [value for one in values if (value := one.get(name)) is not None]
        found[name] = statistics.median(known) if len(known) == len(values) else None
    return found


def median_latency(values: Sequence[Latency]) -> Latency:
    """The median of each percentile over rounds; the samples of all, and the worst of the maxima."""
    return Latency(
        sum(v.samples for v in values),
        statistics.median(v.p50_ms for v in values),
        statistics.median(v.p99_ms for v in values),
        statistics.median(v.p999_ms for v in values),
        max(v.max_ms for v in values),
    )
