"""How long events had to wait, and because of what: recovery from faults, quiet times, and faults that are somebody else's. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence, Set

from tests.faults.lab.burden import Burdens, may_hold
from tests.faults.lab.course import Course, percentile
from tests.faults.lab.evidence import Committed, Effect, Key, Struck
from tests.faults.lab.spans import common

Wait = tuple[Committed, Effect]
"""An event and its first effect."""

Found = tuple[str, float | None]


def recovered(course: Course) -> Iterator[Found]:
    """Disturbances after which it took longer than the bound until everything was applied that had been committed before."""
    for each in course.disturbances:
        if each.recovery_s > each.bound_s:
            last = max(each.faults, key=lambda fault: fault.healed)
            others = len(each.faults) - 1
            company = f" and {others} that overlapped" if others else ""
            yield (
                f"after {last.kind!r}{company} it took {each.recovery_s:.1f} s, at most {each.bound_s:g} s are allowed",
                each.healed,
            )


def waited(course: Course, waits: Sequence[Wait]) -> Iterator[Found]:
    """Events that waited too long while nothing was wrong."""
    allowed = course.limits.quiet_wait_s
    for event, effect in waits:
        if effect.at - event.at > allowed:
            quiet = course.quiet_between(event.at, effect.at)
            if quiet > allowed:
                yield (
                    f"{_told(event, effect)} waited for {effect.at - event.at:.1f} s, {quiet:.1f} s of them without a fault",
                    event.at,
                )


def held_up(course: Course, waits: Sequence[Wait]) -> Iterator[Found]:
    """Events that waited for longer than the faults explain, however closely these followed each other.

    Recovery is measured for faults that follow closely as if they were one: what stands still all through a long chain of short
    ones would have recovered in time after the last. What `waited` finds is left to it.
    """
    burdens, quiet_s = Burdens(course), course.limits.quiet_wait_s
    for event, effect in waits:
        wait = effect.at - event.at
        if wait > quiet_s and course.quiet_between(event.at, effect.at) <= quiet_s:
            burden = burdens.of(event.key)
            on_s = burden.on_s(event.at, effect.at)
            if wait > on_s + quiet_s:  # else no bound is needed
                slowest_s = burden.slowest_s(event.at, effect.at)
                if wait > on_s + slowest_s + quiet_s:
                    why = f"faults were on for {on_s:.1f} s of them, and recovery from the slowest may take {slowest_s:g} s"
                    yield f"{_told(event, effect)} waited for {wait:.1f} s, but {why}", event.at


def unfair(course: Course, waits: Sequence[Wait], slow: Sequence[Wait]) -> Iterator[Found]:
    """One for all others together and one for each other aggregate, for each confined fault that allows a comparison.

    The words are empty if they were as fast as ever. `waits`: all, in the order of the commits; `slow`: of those, the ones that took long.
    """
    limits, usual = course.limits, course.latencies_in(course.surely_quiet())
    usual_s = percentile(usual, 0.99) or 0.0
    allowed_s = min(max(limits.fair_factor * usual_s, limits.fair_s), limits.quiet_wait_s)
    longest_s = min(max(limits.fair_factor * max(usual, default=0.0), limits.fair_wait_s), limits.quiet_wait_s)
    keys = {event.key for event, _ in waits}
    for victim in sorted({fault.confined_to for fault in course.struck if fault.confined_to is not None}):
        innocent = {key for key in keys if not may_hold(victim, key)}
        others = _without(victim, course, [wait for wait in waits if wait[0].key in innocent])
        for fault in course.struck:
            if fault.confined_to != victim:
                continue
            spans = common((fault.begun, fault.healed), others.surely_quiet())
            latencies = others.latencies_in(spans)
            if len(latencies) >= limits.fair_events:
                p99 = percentile(latencies, 0.99) or 0.0
                words = (
                    f"{fault.kind!r} concerned {victim!r} alone, but 99 % of the {len(latencies)} others took up to {p99:.2f} s"
                    f" (usually {usual_s:.2f} s, {allowed_s:.2f} s are allowed)"
                )
                yield words if p99 > allowed_s else "", fault.begun
            if spans:
                stood = _longest_waits(fault, innocent, others, slow)
                for key in sorted(innocent):
                    words = (
                        f"{fault.kind!r} concerned {victim!r} alone, but {key[0]}/{key[1]} waited for {stood[key]:.1f} s while no other"
                        f" fault could hold it up ({longest_s:.1f} s are allowed)"
                    )
                    yield words if stood[key] > longest_s else "", fault.begun


def _longest_waits(fault: Struck, innocent: Set[Key], others: Course, slow: Sequence[Wait]) -> dict[Key, float]:
    """Of each other aggregate, as far as the wait fell into this fault or went on from it, and no other fault explains it."""
    longest: dict[Key, float] = defaultdict(float)
    for event, effect in slow:
        if event.at < fault.healed and effect.at > fault.begun and event.key in innocent:
            wait = others.quiet_between(max(event.at, fault.begun), effect.at)
            longest[event.key] = max(longest[event.key], wait)
    return longest


def _without(victim: str, course: Course, waits: Sequence[Wait]) -> Course:
    """The same run as these others should have seen it: without the faults that are confined to the victim."""
    return Course(
        [fault for fault in course.struck if fault.confined_to != victim],
        [(event.at, effect.at) for event, effect in waits],
        course.began,
        course.recovery_s,
        course.limits,
    )


def _told(event: Committed, effect: Effect) -> str:
    return f"{event.key[0]}/{event.key[1]} number {event.seq} (token {event.token}, message {effect.message_id})"
