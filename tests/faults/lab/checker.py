"""Evidence -> Verdict. What was committed, what the broker accepted and what was applied must be the same, in the same order.

Pure, one pass over each list: half a million events take seconds. Every way of being wrong belongs to one check, so that a
finding names its cause: a doubled effect is not also one out of order, nor a lost one. Two causes are two findings.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType

from tests.faults.lab.course import Course, percentile
from tests.faults.lab.evidence import Committed, Effect, Evidence, Key, Witnessed
from tests.faults.lab.pace import Wait, held_up, recovered, unfair, waited
from tests.faults.lab.spans import Spans
from tests.faults.lab.usage import grown, judged_lives, lives, silent
from tests.faults.lab.verdict import Check, Figures, Limits, Outcome, Verdict

__all__ = ["Verdict", "judge"]

EXAMPLES = 5
EXAMPLE_LENGTH = 400
"""Characters: a traceback in a log line is not the report's whole page."""

EVERY_RUN = frozenset(
    {
        *(
            "no loss",
            "no phantom",
            "exactly one effect",
            "order",
            "numbers",
            "content",
            "message id",
            "cursor",
            "single writer",
        ),
        *(
            "quiet copies",
            "leftovers",
            "settled",
            "recovery",
            "waiting",
            "held up",
            "growth",
            "complaints",
            "exits",
            "promises",
        ),
        *("known outcomes", "producers"),
    }
)
"""Checks that every run of a minute or more with faults can and must put to the test; `fairness` too if a confined fault is among them."""

Wrong = tuple[str, float | None]
"""What is wrong, in words, and the moment that it was wrong at; None: at no moment that a fault could be named for."""


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
    books = Books.of(evidence)
    waits = _waits(books)
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


@dataclass(slots=True)
class Books:
    """The evidence by token and by aggregate."""

    committed: dict[str, Committed]
    numbers: dict[Key, list[int]]  # that were committed
    applied: dict[str, Effect] = field(default_factory=dict)  # token -> its first effect
    again: list[Effect] = field(default_factory=list)  # effects of a token beyond its first
    effects: dict[Key, list[Effect]] = field(default_factory=dict)  # in the order of their positions
    published: dict[str, Witnessed] = field(default_factory=dict)  # token -> the first message of it
    copies: list[Witnessed] = field(default_factory=list)  # messages of a token beyond its first
    out_of_turn: list[tuple[Witnessed, int]] = field(default_factory=list)  # first published after that number

    @classmethod
    def of(cls, evidence: Evidence) -> Books:
        books = cls(committed={c.token: c for c in evidence.committed}, numbers={})
        for event in evidence.committed:
            books.numbers.setdefault(event.key, []).append(event.seq)
        for effect in sorted(evidence.effects, key=lambda effect: effect.position):
            books.effects.setdefault(effect.key, []).append(effect)
            if effect.token in books.applied:
                books.again.append(effect)
            else:
                books.applied[effect.token] = effect
        highest: dict[Key, int] = {}
        for message in evidence.witnessed:
            if message.token in books.published:
                books.copies.append(message)
            else:
                books.published[message.token] = message
                before = highest.get(message.key, 0)
                if message.seq < before:
                    books.out_of_turn.append((message, before))
                else:
                    highest[message.key] = message.seq
        return books


def _waits(books: Books) -> list[Wait]:
    """In the order of the commits."""
    applied = ((event, books.applied.get(token)) for token, event in books.committed.items())
    return sorted(((event, effect) for event, effect in applied if effect is not None), key=lambda wait: wait[0].at)


def _checks(evidence: Evidence, books: Books, course: Course, waits: Sequence[Wait]) -> Iterator[Check]:
    def check(name: str, claim: str, examined: int, wrongs: Iterable[Wrong]) -> Check:
        return _check(name, claim, examined, wrongs, course.situation)

    limits = course.limits
    long_s = min(limits.quiet_wait_s, limits.fair_wait_s)
    slow = [wait for wait in waits if wait[1].at - wait[0].at > long_s]
    events, effects, messages = len(evidence.committed), len(evidence.effects), len(evidence.witnessed)
    yield check("no loss", "every committed event has an effect", events, _lost(books))
    yield check(
        "no phantom",
        "whatever was published or applied had been committed",
        effects + messages,
        _phantoms(evidence, books),
    )
    yield check(
        "exactly one effect",
        "no event is applied twice, no number is used by two events, and every balance is the sum of its effects",
        effects + len(evidence.balances),
        _repeated(evidence, books),
    )
    yield check("order", "effects of an aggregate happen in the order of its numbers", effects, _disordered(books))
    yield check("numbers", "committed events of an aggregate are numbered 1, 2, 3 ...", events, _misnumbered(books))
    yield check(
        "content",
        "what is published and applied is what was committed",
        effects + messages,
        _altered(evidence, books),
    )
    yield check(
        "message id",
        "an event has one message id, at the broker and at its effect, and no other event has it",
        effects + messages,
        _misnamed(evidence, books),
    )
    yield check(
        "cursor",
        "the broker has every event that the relay's cursor has passed",
        sum(event.key[0] not in evidence.unwitnessed_types for event in evidence.committed),
        _never_published(evidence, books),
    )
    stale = f"{evidence.stale_checkpoints} checkpoints were written by a session that had lost the log to another owner"
    yield check(
        "single writer",
        "only the owner of the log moves its cursor",
        evidence.cursor_writes,
        [(stale, None)] if evidence.stale_checkpoints else (),
    )
    if evidence.strict:
        yield check("first publication", "events are first published in order", messages, _out_of_turn(books))
    quiet_messages, quiet_wrongs = _quiet_copies(evidence, books, course)
    yield check(
        "quiet copies",
        "while no fault is on or being recovered from, events are published once and in order",
        quiet_messages,
        quiet_wrongs,
    )
    yield check("leftovers", "nothing is left over", len(_expected_leftovers(evidence)), _left(evidence))
    yield check("settled", "everything is applied in the time that recovery may take", 1, _unsettled(evidence))
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
        _failed(evidence, limits),
    )


def _doubts(evidence: Evidence, course: Course, kinds_needed: int) -> Iterator[Check]:
    def doubt(name: str, claim: str, examined: int, wrongs: Iterable[Wrong]) -> Check:
        return _check(name, claim, examined, wrongs, course.situation)

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
    wrongs = ((f"{name!r} had nothing to look at", None) for name in idle)
    claim = "the checks that this profile promises had something to look at"
    if must_examine:
        yield _check("examined", claim, len(must_examine), wrongs, course.situation)


def _outcome(checks: Iterable[Check], doubts: Iterable[Check]) -> Outcome:
    if any(check.count for check in checks):
        return "failed"
    return "inconclusive" if any(doubt.count for doubt in doubts) else "passed"


def _check(name: str, claim: str, examined: int, wrongs: Iterable[Wrong], situation: Callable[[float], str]) -> Check:
    rest = iter(wrongs)
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


def _name(it: Committed | Effect | Witnessed) -> str:
    """An event, for a reader who wants to find it in the tables."""
    message = "" if isinstance(it, Committed) else f", message {it.message_id}"
    return f"{it.key[0]}/{it.key[1]} number {it.seq} (token {it.token}{message})"


def _lost(books: Books) -> Iterator[Wrong]:
    highest = {key: max(effect.seq for effect in effects) for key, effects in books.effects.items()}
    for token, event in books.committed.items():
        if token not in books.applied:
            message = books.published.get(token)
            seen = (
                f"the broker had it as message {message.message_id}"
                if message
                else "the broker was not seen to have it"
            )
            later = highest.get(event.key, 0)
            over = f", and number {later} was applied without it" if later > event.seq else ""
            yield f"{_name(event)} was never applied; {seen}{over}", event.at


def _phantoms(evidence: Evidence, books: Books) -> Iterator[Wrong]:
    for what, found in (("applied", evidence.effects), ("published", evidence.witnessed)):
        for it in found:
            if it.token not in books.committed:
                why = "its transaction was rolled back" if it.token in evidence.undone else "nobody committed it"
                yield f"{_name(it)} was {what}, but {why}", it.at


def _repeated(evidence: Evidence, books: Books) -> Iterator[Wrong]:
    for effect in books.again:
        first = books.applied[effect.token].position
        yield f"{_name(effect)} was applied again, at position {effect.position} after {first}", effect.at
    holders: dict[tuple[Key, int], Effect] = {}
    for effect in books.applied.values():
        holder = holders.setdefault((effect.key, effect.seq), effect)
        if holder is not effect:
            yield f"{_name(effect)} was applied, and so was token {holder.token} under that number", effect.at
    for key in sorted(evidence.balances.keys() | books.effects.keys()):
        effects = books.effects.get(key, ())
        applied, balance = evidence.balances.get(key, (0, 0))
        total = sum(effect.amount for effect in effects)
        if (applied, balance) != (len(effects), total):
            kept = f"{applied} events and a balance of {balance}"
            yield f"{key[0]}/{key[1]} has {kept}, its {len(effects)} effects add up to {total}", None


def _disordered(books: Books) -> Iterator[Wrong]:
    for key, effects in books.effects.items():
        highest = 0
        for place, effect in enumerate(effects, start=1):
            if effect.position != place:
                yield (
                    f"{_name(effect)} has position {effect.position}, but is effect {place} of its aggregate",
                    effect.at,
                )
                break  # all after it are shifted
            event = books.committed.get(effect.token)
            if event is None or event.key != key or books.applied[effect.token] is not effect:
                continue  # a phantom, altered, or a repetition
            if event.seq < highest:
                yield f"{_name(effect)} was applied after number {highest}", effect.at
            else:
                highest = event.seq


def _misnumbered(books: Books) -> Iterator[Wrong]:
    for key, numbers in books.numbers.items():
        if len(numbers) != max(numbers) or len(set(numbers)) != len(numbers):
            for place, number in enumerate(sorted(numbers), start=1):
                if number != place:
                    yield f"{key[0]}/{key[1]}: where number {place} should be, {number} was committed", None
                    break  # all after it are shifted


def _altered(evidence: Evidence, books: Books) -> Iterator[Wrong]:
    for effect in evidence.effects:
        event = books.committed.get(effect.token)
        if event is None:
            continue
        if effect.sha != event.sha or effect.amount != event.amount:
            yield (
                f"{_name(effect)} was applied with another content (amount {effect.amount}, was {event.amount})",
                effect.at,
            )
        elif effect.key != event.key or effect.seq != event.seq:
            yield f"{_name(effect)} was applied, but it was committed as {_name(event)}", effect.at
    for message in evidence.witnessed:
        event = books.committed.get(message.token)
        if event is not None and (message.key != event.key or message.seq != event.seq):
            yield f"{_name(message)} was published, but it was committed as {_name(event)}", message.at


def _misnamed(evidence: Evidence, books: Books) -> Iterator[Wrong]:
    ids: dict[str, str] = {}
    owners: dict[str, str] = {}
    for where, found in (("published", evidence.witnessed), ("applied", evidence.effects)):
        for it in found:
            if it.token in books.committed:
                known = ids.setdefault(it.token, it.message_id)
                owner = owners.setdefault(it.message_id, it.token)
                if known != it.message_id:
                    yield f"{_name(it)} was {where}, but it is message {known} too", it.at
                elif owner != it.token:
                    yield f"{_name(it)} was {where}, but token {owner} has that message id too", it.at


def _never_published(evidence: Evidence, books: Books) -> Iterator[Wrong]:
    """Rows that the cursor has not passed, and those that are parked, are honest: as many are let off."""
    missing = [
        event
        for token, event in books.committed.items()
        if token not in books.published and event.key[0] not in evidence.unwitnessed_types
    ]
    for event in missing[evidence.leftovers.unread + evidence.leftovers.parked :]:
        yield f"{_name(event)} was passed by the cursor, but the broker never had it", event.at


def _out_of_turn(books: Books) -> Iterator[Wrong]:
    for message, before in books.out_of_turn:
        yield f"{_name(message)} was first published after number {before}", message.at


def _quiet_copies(evidence: Evidence, books: Books, course: Course) -> tuple[int, list[Wrong]]:
    """Messages that came in quiet times, and what is wrong with them: without a fault there is no reason to send anything again."""
    quiet = Spans(course.surely_quiet())
    times = sorted(message.at for message in evidence.witnessed)
    examined = sum(bisect_right(times, end) - bisect_left(times, start) for start, end in quiet)
    wrongs: list[Wrong] = [
        (f"{_name(message)} was published again", message.at) for message in books.copies if message.at in quiet
    ]
    wrongs += [
        (f"{_name(message)} was first published after number {before}", message.at)
        for message, before in books.out_of_turn
        if message.at in quiet
    ]
    return examined, wrongs


def _failed(evidence: Evidence, limits: Limits) -> Iterator[Wrong]:
    failed, tried = evidence.transactions.get("failed", 0), sum(evidence.transactions.values())
    if failed > limits.failed_share * tried:
        yield f"{failed} of {tried} transactions failed ({100 * failed / tried:.1f} %)", None


def _expected_leftovers(evidence: Evidence) -> dict[str, tuple[int, int]]:
    """What it is -> (how many there are, how many are expected)."""
    left = evidence.leftovers
    return {
        "rows parked": (left.parked, 0),
        "messages held in the inbox": (left.held, 0),
        "gaps": (left.gaps, 0),
        "rows that the cursor has not passed": (left.unread, 0),
        "messages in the consumer's queue": (left.queued, 0),
        "dead letters": (left.dead, 0),
        "conflicts in quarantine": (left.conflicts, evidence.expected_conflicts),
        "strangers in quarantine": (left.strangers, evidence.expected_strangers),
    }


def _left(evidence: Evidence) -> Iterator[Wrong]:
    for what, (found, expected) in _expected_leftovers(evidence).items():
        if found != expected:
            yield f"{what}: {found}, expected {expected}", None


def _unsettled(evidence: Evidence) -> Iterator[Wrong]:
    if evidence.settled is None:
        yield "something was not applied when the time for it was over", None


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
