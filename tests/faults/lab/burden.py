"""Which faults could hold an aggregate up, for how long they were on, and how long the slowest may take to recover from. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate

from tests.faults.lab.course import Course
from tests.faults.lab.evidence import Key, Struck
from tests.faults.lab.spans import Spans


def may_hold(confined_to: str | None, key: Key) -> bool:
    """Whether a fault that is confined to this (a type, `type/id`, or nothing) may hold that aggregate up."""
    return confined_to in (None, key[0], f"{key[0]}/{key[1]}")


class Burdens:
    """By aggregate; aggregates that the same faults may hold up share one."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._confined = {fault.confined_to for fault in course.struck}
        self._by_scope: dict[tuple[str | None, ...], Burden] = {}

    def of(self, key: Key) -> Burden:
        """All faults that could hold it up."""
        scope = tuple(each for each in (None, key[0], f"{key[0]}/{key[1]}") if each in self._confined)
        if scope not in self._by_scope:
            faults = (fault for fault in self._course.struck if fault.confined_to in scope)
            self._by_scope[scope] = Burden(faults, self._course)
        return self._by_scope[scope]


class Burden:
    """Some faults."""

    def __init__(self, faults: Iterable[Struck], course: Course) -> None:
        ordered = sorted(faults, key=lambda fault: fault.begun)
        self._on = Spans((fault.begun, fault.healed) for fault in ordered)
        self._begun = [fault.begun for fault in ordered]
        self._bounds = [course.bound_s(fault) for fault in ordered]
        self._over = [fault.healed + course.bound_s(fault) for fault in ordered]
        self._all_over = list(accumulate(self._over, max))  # this one and all before it

    def on_s(self, start: float, end: float) -> float:
        """Seconds of that time during which one was on."""
        return self._on.between(start, end)

    def slowest_s(self, start: float, end: float) -> float:
        """The largest bound of those that were on then, or could still be recovered from; 0 if there are none."""
        first, after = bisect_left(self._all_over, start), bisect_left(self._begun, end)
        return max((self._bounds[i] for i in range(first, after) if self._over[i] >= start), default=0.0)
