"""All that can be wrong with what was committed, published and applied: each way by a comparison of its own. Pure, one pass each."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

from tests.faults.lab.books import Books
from tests.faults.lab.course import Course
from tests.faults.lab.evidence import Committed, Effect, Evidence, Key, Witnessed
from tests.faults.lab.spans import Spans
from tests.faults.lab.verdict import Limits

Wrong = tuple[str, float | None]
"""What is wrong, in words, and the moment that it was wrong at; None: at no moment that a fault could be named for."""


Both = tuple[tuple[str, Sequence[tuple[Effect | Witnessed, Committed | None]]], ...]


def name(it: Committed | Effect | Witnessed) -> str:
    """An event, for a reader who wants to find it in the tables."""
    message = "" if isinstance(it, Committed) else f", message {it.message_id}"
    return f"{it.key[0]}/{it.key[1]} number {it.seq} (token {it.token}{message})"


def lost(books: Books) -> Iterator[Wrong]:
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
            yield f"{name(event)} was never applied; {seen}{over}", event.at


def phantoms(evidence: Evidence, books: Books) -> Iterator[Wrong]:
    both: Both = (("applied", books.effects_of), ("published", books.messages_of))
    for what, found in both:
        for it, event in found:
            if event is None:
                why = "its transaction was rolled back" if it.token in evidence.undone else "nobody committed it"
                yield f"{name(it)} was {what}, but {why}", it.at


def repeated(evidence: Evidence, books: Books) -> Iterator[Wrong]:
    for effect in books.again:
        first = books.applied[effect.token].position
        yield f"{name(effect)} was applied again, at position {effect.position} after {first}", effect.at
    holders: dict[tuple[Key, int], Effect] = {}
    for effect in books.applied.values():
        holder = holders.setdefault((effect.key, effect.seq), effect)
        if holder is not effect:
            yield f"{name(effect)} was applied, and so was token {holder.token} under that number", effect.at
    for key in sorted(evidence.balances.keys() | books.effects.keys()):
        effects = books.effects.get(key, ())
        applied, balance = evidence.balances.get(key, (0, 0))
        total = sum(effect.amount for effect in effects)
        if (applied, balance) != (len(effects), total):
            kept = f"{applied} events and a balance of {balance}"
            yield f"{key[0]}/{key[1]} has {kept}, its {len(effects)} effects add up to {total}", None


def disordered(books: Books) -> Iterator[Wrong]:
    for key, effects in books.effects.items():
        highest = 0
        for place, effect in enumerate(effects, start=1):
            if effect.position != place:
                yield (
                    f"{name(effect)} has position {effect.position}, but is effect {place} of its aggregate",
                    effect.at,
                )
                break  # all after it are shifted
            event = books.committed.get(effect.token)
            if event is None or event.key != key or books.applied[effect.token] is not effect:
                continue  # a phantom, altered, or a repetition
            if event.seq < highest:
                yield f"{name(effect)} was applied after number {highest}", effect.at
            else:
                highest = event.seq


def misnumbered(books: Books) -> Iterator[Wrong]:
    for key, numbers in books.numbers.items():
        if len(numbers) != max(numbers) or len(set(numbers)) != len(numbers):
            for place, number in enumerate(sorted(numbers), start=1):
                if number != place:
                    yield f"{key[0]}/{key[1]}: where number {place} should be, {number} was committed", None
                    break  # all after it are shifted


def altered(books: Books) -> Iterator[Wrong]:
    for effect, event in books.effects_of:
        if event is None:
            continue
        if effect.sha != event.sha or effect.amount != event.amount:
            yield (
                f"{name(effect)} was applied with another content (amount {effect.amount}, was {event.amount})",
                effect.at,
            )
        elif effect.key != event.key or effect.seq != event.seq:
            yield f"{name(effect)} was applied, but it was committed as {name(event)}", effect.at
    for message, event in books.messages_of:
        if event is not None and (message.key != event.key or message.seq != event.seq):
            yield f"{name(message)} was published, but it was committed as {name(event)}", message.at


def misnamed(books: Books) -> Iterator[Wrong]:
    ids: dict[str, str] = {}
    owners: dict[str, str] = {}
    both: Both = (("published", books.messages_of), ("applied", books.effects_of))
    for where, found in both:
        for it, event in found:
            if event is not None:
                known = ids.setdefault(it.token, it.message_id)
                owner = owners.setdefault(it.message_id, it.token)
                if known != it.message_id:
                    yield f"{name(it)} was {where}, but it is message {known} too", it.at
                elif owner != it.token:
                    yield f"{name(it)} was {where}, but token {owner} has that message id too", it.at


def never_published(evidence: Evidence, books: Books) -> Iterator[Wrong]:
    """Rows that the cursor has not passed, and those that are parked, are honest: as many are let off."""
    missing = [
        event
        for token, event in books.committed.items()
        if token not in books.published and event.key[0] not in evidence.unwitnessed_types
    ]
    for event in missing[evidence.leftovers.unread + evidence.leftovers.parked :]:
        yield f"{name(event)} was passed by the cursor, but the broker never had it", event.at


def out_of_turn(books: Books) -> Iterator[Wrong]:
    for message, before in books.out_of_turn:
        yield f"{name(message)} was first published after number {before}", message.at


def quiet_copies(evidence: Evidence, books: Books, course: Course) -> tuple[int, list[Wrong]]:
    """Messages that came in quiet times, and what is wrong with them: without a fault there is no reason to send anything again."""
    quiet = Spans(course.surely_quiet())
    times = sorted(message.at for message in evidence.witnessed)
    examined = sum(bisect_right(times, end) - bisect_left(times, start) for start, end in quiet)
    wrongs: list[Wrong] = [
        (f"{name(message)} was published again", message.at) for message in books.copies if message.at in quiet
    ]
    wrongs += [
        (f"{name(message)} was first published after number {before}", message.at)
        for message, before in books.out_of_turn
        if message.at in quiet
    ]
    return examined, wrongs


def failed(evidence: Evidence, limits: Limits) -> Iterator[Wrong]:
    failed, tried = evidence.transactions.get("failed", 0), sum(evidence.transactions.values())
    if failed > limits.failed_share * tried:
        yield f"{failed} of {tried} transactions failed ({100 * failed / tried:.1f} %)", None


def expected_leftovers(evidence: Evidence) -> dict[str, tuple[int, int]]:
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


def left(evidence: Evidence) -> Iterator[Wrong]:
    for what, (found, expected) in expected_leftovers(evidence).items():
        if found != expected:
            yield f"{what}: {found}, expected {expected}", None


def unsettled(evidence: Evidence) -> Iterator[Wrong]:
    if evidence.settled is None:
        yield "something was not applied when the time for it was over", None
