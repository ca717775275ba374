"""How long events had to wait, and because of what: recovery from faults, quiet times, and faults that are somebody else's. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from tests.faults.lab.course import Course, Span, percentile
from tests.faults.lab.evidence import Committed, Effect, Evidence, Struck


def recovered(course: Course) -> Iterator[tuple[str, float | None]]:
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


def waited(
    course: Course, events: Collection[Committed], applied: Mapping[str, Effect]
) -> Iterator[tuple[str, float | None]]:
    """Events that waited too long while nothing was wrong."""
    allowed = course.limits.quiet_wait_s
    for event in events:
        effect = applied.get(event.token)
        if effect is not None and effect.at - event.at > allowed:
            quiet = course.quiet_between(event.at, effect.at)
            if quiet > allowed:
                name = f"{event.key[0]}/{event.key[1]} number {event.seq} (token {event.token}, message {effect.message_id})"
                yield f"{name} waited for {effect.at - event.at:.1f} s, {quiet:.1f} s of them without a fault", event.at


def unfair(
    evidence: Evidence, course: Course, events: Collection[Committed], applied: Mapping[str, Effect]
) -> Iterator[tuple[str, float | None]]:
    """One for each confined fault that allows a comparison; its words are empty if the others were as fast as ever."""
    limits = course.limits
    for victim in sorted({fault.confined_to for fault in evidence.struck if fault.confined_to is not None}):
        others = _without(victim, evidence.struck, course, events, applied)
        usual = percentile(others.latencies_in(course.surely_quiet()), 0.99) or 0.0
        allowed = max(limits.fair_factor * usual, limits.fair_s)
        for fault in evidence.struck:
            if fault.confined_to == victim:
                latencies = others.latencies_in(_common((fault.begun, fault.healed), others.surely_quiet()))
                if len(latencies) >= limits.fair_events:
                    p99 = percentile(latencies, 0.99) or 0.0
                    words = (
                        f"{fault.kind!r} concerned {victim!r} alone, but 99 % of the {len(latencies)} others took up to {p99:.2f} s"
                        f" (usually {usual:.2f} s, {allowed:.2f} s are allowed)"
                    )
                    yield words if p99 > allowed else "", fault.begun


def _without(
    victim: str, struck: Sequence[Struck], course: Course, events: Collection[Committed], applied: Mapping[str, Effect]
) -> Course:
    """The same run as the other aggregate types should have seen it: without the faults that are confined to the victim."""
    waits = (
        (event.at, effect.at)
        for event in events
        if event.key[0] != victim and (effect := applied.get(event.token)) is not None
    )
    return Course(
        [fault for fault in struck if fault.confined_to != victim],
        waits,
        course.began,
        course.recovery_s,
        course.limits,
    )


def _common(window: Span, spans: Sequence[Span]) -> list[Span]:
    cut = ((max(start, window[0]), min(end, window[1])) for start, end in spans)
    return [(start, end) for start, end in cut if start < end]
