"""The sequencer: any permutation and duplication of a stream gives its effects exactly once, in order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from relay.inbox.sequencer import Arrival, Cursor, Line, Policy, Reason, Refusal, is_ordered, key_of
from relay.message import TOMBSTONE, Event, content_digest


def event(seq: int | None, content: bytes = b"", *, aggregate: str = "1", event_type: str = "T") -> Event:
    return Event(
        source="shop",
        aggregate_type="order",
        aggregate_id=None if seq is None else aggregate,
        seq=seq,
        event_type=event_type,
        message_id=f"{aggregate}/{seq}",
        content_type="",
        body=content,
        digest=content_digest(event_type, "", content),
    )


def arrival(seq: int, content: bytes = b"", **kwargs: str) -> Arrival:
    return Arrival(event=event(seq, content, **kwargs), tag=seq)


def held(seq: int, held_id: int = 1) -> Arrival:
    return Arrival(event=event(seq), held_id=held_id)


def tombstone(seq: int) -> Arrival:
    return Arrival(event=event(seq, event_type=TOMBSTONE), tag=seq)


def offered(line: Line, *arrivals: Arrival) -> list[Refusal | None]:
    return [line.offer(a) for a in arrivals]


def drained(line: Line) -> list[int | None]:
    done = []
    while (a := line.next()) is not None:
        line.applied(a)
        done.append(a.event.seq)
    return done


def left(line: Line) -> list[tuple[int | None, Reason]]:
    return [(a.event.seq, reason) for a, reason in line.left()]


def at(seq: int, content: bytes = b"", *, blocked: bool = False) -> Cursor:
    return Cursor(seq, event(seq, content).digest if seq else None, blocked)


def test_events_are_applied_in_the_order_of_their_numbers_whatever_the_order_of_arrival() -> None:
    line = Line(at(0), "sequence")
    assert offered(line, arrival(3), arrival(1), arrival(2)) == [None, None, None]
    assert drained(line) == [1, 2, 3]
    assert line.cursor == at(3)
    assert left(line) == []


def test_an_event_whose_predecessor_is_missing_is_early() -> None:
    line = Line(at(1), "sequence")
    line.offer(arrival(3))
    assert drained(line) == []
    assert left(line) == [(3, "early")]
    assert not line.follows


def test_what_was_applied_or_kept_already_is_a_duplicate() -> None:
    line = Line(at(2), "sequence")
    assert offered(line, arrival(1), arrival(2), arrival(4), arrival(4)) == [
        Refusal.DUPLICATE,
        Refusal.DUPLICATE,
        None,
        Refusal.DUPLICATE,
    ]


def test_the_same_number_with_other_content_is_a_conflict() -> None:
    line = Line(at(2, b"a"), "sequence")
    assert offered(line, arrival(2, b"b"), arrival(4, b"a"), arrival(4, b"b")) == [
        Refusal.CONFLICT,
        None,
        Refusal.CONFLICT,
    ]


def test_a_tombstone_is_never_a_conflict_and_takes_the_place_of_what_has_its_number() -> None:
    line = Line(at(1, b"a"), "sequence")
    assert offered(line, tombstone(1), arrival(2, b"x"), tombstone(2)) == [Refusal.DUPLICATE, None, Refusal.DUPLICATE]
    taken = line.next()
    assert taken is not None
    assert taken.event.is_tombstone
    line.applied(taken)
    assert line.cursor == Cursor(2, None)
    assert line.offer(arrival(2, b"x")) is Refusal.DUPLICATE


def test_after_a_failure_the_rest_of_the_aggregate_is_behind() -> None:
    line = Line(at(0), "sequence")
    offered(line, arrival(1), arrival(2), arrival(3))
    first = line.next()
    assert first is not None
    line.failed(first)
    assert line.next() is None
    assert left(line) == [(1, "failed"), (2, "behind"), (3, "behind")]
    assert line.cursor == Cursor(0, None, blocked=True)


def test_a_blocked_aggregate_holds_everything_but_the_message_that_blocks_it() -> None:
    line = Line(at(1, blocked=True), "sequence")
    offered(line, arrival(2), arrival(3))
    assert drained(line) == []
    assert left(line) == [(2, "behind"), (3, "behind")]

    retried = Line(at(1, blocked=True), "sequence")
    retried.offer(held(2))
    assert drained(retried) == [2]
    assert not retried.cursor.blocked
    assert retried.follows
    assert retried.clears_held


def test_a_tombstone_releases_the_aggregate_that_waits_for_a_failed_message() -> None:
    line = Line(at(1, blocked=True), "sequence")
    offered(line, tombstone(2), arrival(3))
    assert drained(line) == [2, 3]
    assert line.clears_held


def test_latest_drops_what_is_stale_and_takes_any_newer_one() -> None:
    line = Line(at(1), "latest")
    assert line.offer(arrival(5)) is None
    assert drained(line) == [5]
    assert offered(line, arrival(3), arrival(5), arrival(5, b"x")) == [
        Refusal.STALE,
        Refusal.DUPLICATE,
        Refusal.CONFLICT,
    ]
    assert line.cursor == at(5)


def test_latest_is_not_blocked_by_a_failure_and_forgets_it_when_a_newer_one_is_applied() -> None:
    line = Line(at(1), "latest")
    line.offer(arrival(2))
    failing = line.next()
    assert failing is not None
    line.failed(failing)
    assert left(line) == [(2, "failed")]
    line.offer(arrival(3))
    assert drained(line) == [3]
    assert left(line) == []


def test_events_without_a_number_and_under_policy_none_have_no_order() -> None:
    assert not is_ordered(event(None), "sequence")
    assert not is_ordered(event(1), "none")
    assert is_ordered(event(1), "latest")


@dataclass
class Tables:
    """inbox_aggregate and inbox_held in memory, and the effects."""

    policy: Policy = "sequence"
    cursors: dict[str, Cursor] = field(default_factory=dict)
    held: dict[str, dict[int, Event]] = field(default_factory=dict)
    effects: dict[str, list[int]] = field(default_factory=dict)

    def apply(self, batch: Iterable[Event]) -> None:
        """One transaction, as relay.inbox.work does it."""
        lines: dict[str, Line] = {}
        for e in batch:
            key = key_of(e)
            assert key is not None
            line = lines.setdefault(key[2], Line(self.cursors.get(key[2], Cursor()), self.policy))
            assert line.offer(Arrival(event=e, tag=1)) is not Refusal.CONFLICT
            self._drain(key[2], line)
        for name, line in lines.items():
            while line.follows and (successor := self.held.get(name, {}).get(line.cursor.last_seq + 1)) is not None:
                line.offer(Arrival(event=successor, held_id=1))
                self._drain(name, line)
            self._write(name, line)

    def _drain(self, name: str, line: Line) -> None:
        while (a := line.next()) is not None:
            line.applied(a)
            assert a.event.seq is not None
            self.effects.setdefault(name, []).append(a.event.seq)

    def _write(self, name: str, line: Line) -> None:
        self.cursors[name] = line.cursor
        table = self.held.setdefault(name, {})
        if line.clears_held:
            for seq in [seq for seq in table if seq <= line.cursor.last_seq]:
                del table[seq]
        for a, reason in line.left():
            assert reason == "early"
            assert a.event.seq is not None
            table.setdefault(a.event.seq, a.event)


@st.composite
def streams(draw: st.DrawFn) -> tuple[dict[str, int], list[list[Event]]]:
    """Streams of some aggregates, shuffled, with duplicates, cut into batches."""
    lengths = draw(st.dictionaries(st.sampled_from("abc"), st.integers(1, 8), min_size=1))
    events = [event(seq, aggregate=name) for name, n in lengths.items() for seq in range(1, n + 1)]
    again = draw(st.lists(st.sampled_from(events), max_size=10))
    shuffled = draw(st.permutations(events + again))
    cuts = sorted(draw(st.sets(st.integers(0, len(shuffled)), max_size=6)) | {0, len(shuffled)})
    return lengths, [list(shuffled[a:b]) for a, b in pairwise(cuts)]


@given(streams())
@settings(deadline=None)
def test_any_permutation_and_duplication_in_any_batches_is_applied_once_and_in_order(
    case: tuple[dict[str, int], list[list[Event]]],
) -> None:
    lengths, batches = case
    tables = Tables()
    for batch in batches:
        tables.apply(batch)
    assert tables.effects == {name: list(range(1, n + 1)) for name, n in lengths.items()}
    assert not any(tables.held.values())


@given(streams())
@settings(deadline=None)
def test_latest_ends_at_the_newest_and_never_goes_back(case: tuple[dict[str, int], list[list[Event]]]) -> None:
    lengths, batches = case
    tables = Tables(policy="latest")
    for batch in batches:
        tables.apply(batch)
    for name, n in lengths.items():
        assert tables.effects[name] == sorted(set(tables.effects[name]))
        assert tables.effects[name][-1] == n
