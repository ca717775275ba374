"""Pieces of the time axis. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from math import inf

Span = tuple[float, float]


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same time, in order and without overlap."""
    result: list[Span] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def common(window: Span, spans: Sequence[Span]) -> list[Span]:
    """What of them lies in the window."""
    cut = ((max(start, window[0]), min(end, window[1])) for start, end in spans)
    return [(start, end) for start, end in cut if start < end]


class Spans:
    """Built once, then asked how much of a time they cover. Only the last may have no end."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._spans = merged(spans)
        self._before = [0.0, *accumulate(end - start for start, end in self._spans)]

    def between(self, start: float, end: float) -> float:
        """Seconds of that time which they cover."""
        return self._until(end) - self._until(start)

    def __contains__(self, moment: float) -> bool:
        number = bisect_right(self._spans, (moment, inf)) - 1
        return number >= 0 and moment <= self._spans[number][1]

    def __iter__(self) -> Iterator[Span]:
        return iter(self._spans)

    def _until(self, moment: float) -> float:
        number = bisect_right(self._spans, (moment, inf)) - 1
        if number < 0:
            return 0.0
        start, end = self._spans[number]
        return self._before[number] + min(moment, end) - start
