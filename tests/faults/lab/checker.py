"""Evidence -> Verdict. What was committed, what the broker accepted and what was applied must be the same, in the same order.

Pure, one pass over each list: half a million events take seconds. Every way of being wrong belongs to one check, so that a
finding names its cause: a doubled effect is not also one out of order, nor a lost one. Two causes are two findings.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from types import MappingProxyType

from tests.faults.lab import wrongs
from tests.faults.lab.books import Books
from tests.faults.lab.course import Course, percentile
from tests.faults.lab.evidence import Evidence
from tests.faults.lab.pace import Wait, held_up, recovered, unfair, waited
from tests.faults.lab.usage import grown, judged_lives, lives, silent
from tests.faults.lab.verdict import Check, Figures, Limits, Outcome, Verdict
from tests.faults.lab.wrongs import Wrong

__all__ = ["EVERY_RUN", "Verdict", "judge"]

EXAMPLES = 5
EXAMPLE_LENGTH = 400
"""Characters: a traceback in a log line is not the report's whole page."""

EVERY_RUN = frozenset(
    {
        *("no loss", "no phantom", "exactly one effect", "order", "numbers", "content", "message id", "cursor"),
        *("single writer", "quiet copies", "leftovers", "settled", "recovery", "waiting", "held up", "growth"),
        *("complaints", "exits", "promises", "known outcomes", "producers"),
    }
)
"""Checks that every run of a minute or more with faults can and must put to the test; `fairness` too if a confined fault is among them."""


def judge(
    evidence: Evidence,
    *,
    kinds_needed: int = 0,
    bounds: Mapping[str, float] = MappingProxyType({}),
    must_examine: frozenset[str] = frozenset(),
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> Verdict:
    """Compare everything.

    `bounds`: the longest recovery of each kind of fault, in seconds. `must_examine`: names of checks that must have had something to
    look at; see EVERY_RUN.
    """
    with _without_collector():
        return _judged(evidence, kinds_needed, bounds, must_examine, limits)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Nothing here makes cycles, and the collector would walk over millions of objects again and again (a fifth of the time)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _judged(
    evidence: Evidence, kinds_needed: int, bounds: Mapping[str, float], must_examine: frozenset[str], limits: Limits
) -> Verdict:
    books = Books.of(evidence)
    waits = books.waits()
    course = Course(evidence.struck, [(e.at, effect.at) for e, effect in waits], evidence.began, bounds, limits)
    checks = tuple(_checks(evidence, books, course, waits))
    doubts = (*_doubts(evidence, course, kinds_needed), *_examined(checks, must_examine, course))
    return Verdict(
        outcome=_outcome(checks, doubts),
        checks=checks,
        doubts=doubts,
        recoveries=course.recoveries(),
        figures=_figures(evidence, books, course),
    )


def _checks(evidence: Evidence, books: Books, course: Course, waits: Sequence[Wait]) -> Iterator[Check]:
    def check(name: str, claim: str, examined: int, found: Iterable[Wrong]) -> Check:
        return _check(name, claim, examined, found, course.situation)

    limits = course.limits
    long_s = min(limits.quiet_wait_s, limits.fair_wait_s)
    slow = [wait for wait in waits if wait[1].at - wait[0].at > long_s]
    events, effects, messages = len(evidence.committed), len(evidence.effects), len(evidence.witnessed)
    yield check("no loss", "every committed event has an effect", events, wrongs.lost(books))
    yield check(
        "no phantom",
        "whatever was published or applied had been committed",
        effects + messages,
        wrongs.phantoms(evidence, books),
    )
    yield check(
        "exactly one effect",
        "no event is applied twice, no number is used by two events, and every balance is the sum of its effects",
        effects + len(evidence.balances),
        wrongs.repeated(evidence, books),
    )
    yield check(
        "order", "effects of an aggregate happen in the order of its numbers", effects, wrongs.disordered(books)
    )
    yield check(
        "numbers", "committed events of an aggregate are numbered 1, 2, 3 ...", events, wrongs.misnumbered(books)
    )
    yield check(
        "content",
        "what is published and applied is what was committed",
        effects + messages,
        wrongs.altered(books),
    )
    yield check(
        "message id",
        "an event has one message id, at the broker and at its effect, and no other event has it",
        effects + messages,
        wrongs.misnamed(books),
    )
    yield check(
        "cursor",
        "the broker has every event that the relay's cursor has passed",
        sum(event.key[0] not in evidence.unwitnessed_types for event in evidence.committed),
        wrongs.never_published(evidence, books),
    )
    stale = f"{evidence.stale_checkpoints} checkpoints were written by a session that had lost the log to another owner"
    yield check(
        "single writer",
        "only the owner of the log moves its cursor",
        evidence.cursor_writes,
        [(stale, None)] if evidence.stale_checkpoints else (),
    )
    if evidence.strict:
        yield check("first publication", "events are first published in order", messages, wrongs.out_of_turn(books))
    quiet_messages, quiet_wrongs = wrongs.quiet_copies(evidence, books, course)
    yield check(
        "quiet copies",
        "while no fault is on or being recovered from, events are published once and in order",
        quiet_messages,
        quiet_wrongs,
    )
    yield check("leftovers", "nothing is left over", len(wrongs.expected_leftovers(evidence)), wrongs.left(evidence))
    yield check("settled", "everything is applied in the time that recovery may take", 1, wrongs.unsettled(evidence))
    yield check(
        "recovery",
        "after a fault everything is applied within its bound",
        len(course.disturbances),
        recovered(course),
    )
    yield check(
        "waiting",
        f"no event waits longer than {limits.quiet_wait_s:g} s while no fault is on or being recovered from",
        len(course.committed),
        waited(course, slow),
    )
    yield check(
        "held up",
        f"no event waits longer than faults are on meanwhile, the longest of their bounds and {limits.quiet_wait_s:g} s",
        len(course.committed),
        held_up(course, slow),
    )
    fair = list(unfair(course, waits, slow))
    yield check(
        "fairness",
        "a fault of one aggregate type, or of one aggregate, does not slow down the others, nor any one of them",
        len(fair),
        [(words, moment) for words, moment in fair if words],
    )
    yield check(
        "growth",
        "processes do not use more and more memory, descriptors, connections or tasks",
        judged_lives(evidence.samples, limits),
        grown(evidence.samples, limits),
    )
    yield check(
        "complaints",
        "no daemon writes a traceback or a warning of asyncio's",
        evidence.log_lines,
        ((line, None) for line in evidence.complaints),
    )
    yield check(
        "exits",
        "no daemon ends without a fault or a stop that explains it",
        len(lives(evidence.samples)),
        ((end, None) for end in evidence.exits),
    )
    yield check(
        "promises",
        "no fault has itself seen a promise broken",
        len(evidence.struck),
        ((f"{f.kind!r} saw: {f.broken}", f.healed) for f in evidence.struck if f.broken is not None),
    )
    known = sum(evidence.transactions.get(end, 0) for end in ("ok", "undone"))
    yield check(
        "known outcomes",
        "what a producer knows to be committed is, and what it knows to be rolled back is not",
        known,
        ((f"the outcome of token {token} is another than its producer was told", None) for token in evidence.mistaken),
    )
    yield check(
        "producers",
        f"no more than {100 * limits.failed_share:g} % of the producers' transactions fail",
        sum(evidence.transactions.values()),
        wrongs.failed(evidence, limits),
    )


def _doubts(evidence: Evidence, course: Course, kinds_needed: int) -> Iterator[Check]:
    def doubt(name: str, claim: str, examined: int, found: Iterable[Wrong]) -> Check:
        return _check(name, claim, examined, found, course.situation)

    struck = evidence.struck
    kinds = sorted({fault.kind for fault in struck if fault.bites or fault.broken})
    yield doubt("load", "something was committed", 1, () if evidence.committed else [("no event was committed", None)])
    yield doubt(
        "injected",
        "every fault could be injected",
        len(struck),
        ((f"{f.kind!r} could not be injected: {f.failure}", f.begun) for f in struck if f.failure is not None),
    )
    yield doubt(
        "bitten",
        "every fault was seen to bite",
        len(struck),
        (
            (f"nothing shows that {f.kind!r} did anything", f.begun)
            for f in struck
            if f.bites + (f.failure is not None) + (f.broken is not None) == 0
        ),
    )
    few = f"{len(kinds)} kinds of fault have bitten, {kinds_needed} were asked for: {', '.join(kinds) or 'none'}"
    yield doubt("kinds", "enough kinds of fault have bitten", 1, [(few, None)] if len(kinds) < kinds_needed else ())
    yield doubt(
        "tasks told",
        "every daemon tells its tasks",
        len(lives(evidence.samples)),
        silent(evidence.samples, course.limits),
    )


def _examined(checks: Iterable[Check], must_examine: frozenset[str], course: Course) -> Iterator[Check]:
    """A claim that was never put to the test is not shown to hold."""
    idle = sorted(must_examine - {check.name for check in checks if check.examined})
    found = ((f"{name!r} had nothing to look at", None) for name in idle)
    claim = "the checks that this profile promises had something to look at"
    if must_examine:
        yield _check("examined", claim, len(must_examine), found, course.situation)


def _outcome(checks: Iterable[Check], doubts: Iterable[Check]) -> Outcome:
    if any(check.count for check in checks):
        return "failed"
    return "inconclusive" if any(doubt.count for doubt in doubts) else "passed"


def _check(name: str, claim: str, examined: int, found: Iterable[Wrong], situation: Callable[[float], str]) -> Check:
    rest = iter(found)
    first = list(islice(rest, EXAMPLES))
    return Check(
        name=name,
        claim=claim,
        examined=examined,
        count=len(first) + sum(1 for _ in rest),
        examples=tuple(
            words[:EXAMPLE_LENGTH] + (f" [{situation(moment)}]" if moment is not None else "")
            for words, moment in first
        ),
    )


def _figures(evidence: Evidence, books: Books, course: Course) -> Figures:
    load_s = max(evidence.ended - evidence.began, 0.0)
    quiet = course.latencies_in(course.surely_quiet())
    return Figures(
        events=len(evidence.committed),
        undone=len(evidence.undone),
        transactions=evidence.transactions.get("ok", 0),
        effects=len(evidence.effects),
        disturbances=len(course.disturbances),
        alone=sum(len(each.faults) == 1 for each in course.disturbances),
        copies=len(books.copies),
        out_of_turn=len(books.out_of_turn),
        load_s=load_s,
        settle_s=None if evidence.settled is None else max(evidence.settled - evidence.ended, 0.0),
        events_per_s=len(evidence.committed) / load_s if load_s else 0.0,
        quiet_p50_s=percentile(quiet, 0.50),
        quiet_p99_s=percentile(quiet, 0.99),
        longest_s=max(course.latencies, default=None),
        struck=len(evidence.struck),
        kinds=len({fault.kind for fault in evidence.struck if fault.bites}),
        worst_recovery_s=max((each.recovery_s for each in course.disturbances), default=None),
    )
