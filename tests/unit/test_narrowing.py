"""How a batch is narrowed down to what fails in it: how many transactions that costs, and that nothing gets lost on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from hypothesis import given
from hypothesis import strategies as st

from relay.inbox.charges import Suspects
from relay.inbox.handlers import Inbox
from relay.inbox.narrowing import Narrowing
from relay.inbox.sequencer import Arrival
from relay.inbox.store import Due, Stranger
from relay.inbox.work import Batch, Rules
from relay.settings import InboxSettings
from tests.unit.test_sequencer import event

RULES = Rules(consumer="shop", inbox=Inbox("shop"), settings=InboxSettings())


def batch(*counts: int, due: int = 0) -> Batch:
    """Aggregates 0, 1, 2 ... with so many events each, in the order in which a broker mixes them; and held messages."""
    tag = 0
    arrivals = []
    for seq in range(1, max(counts, default=0) + 1):
        for aggregate, count in enumerate(counts):
            if seq <= count:
                tag += 1
                arrivals.append(Arrival(event=event(seq, aggregate=str(aggregate)), tag=tag))
    return Batch(arrivals=arrivals, due=[_due(aggregate) for aggregate in range(due)])


def _due(aggregate: int) -> Due:
    return Due(
        held_id=aggregate,
        source="shop",
        aggregate_type="order",
        aggregate_id=f"d{aggregate}",
        seq=1,
        message_id=f"d{aggregate}/1",
    )


class Trial:
    """Tries what a Narrowing says, as an Applier does, with a batch handler that fails over some aggregates."""

    def __init__(
        self, whole: Batch, poison: Collection[str], *, dear: bool = False, suspects: Suspects | None = None
    ) -> None:
        self.failed = self.succeeded = 0
        self.done: list[Arrival | Due] = []
        narrowing = Narrowing(whole, RULES, suspects or Suspects())
        while (part := narrowing.next()) is not None:
            if any(_aggregate(one) in poison for one in _events(part)):
                self.failed += 1
                narrowing.failed(part, [*part.arrivals, *map(_loaded, part.due)], dear=dear)
            else:
                self.succeeded += 1
                self.done += _events(part)
        self.apart = [{_aggregate(one) for one in _events(b)} for b in narrowing.apart]
        self.done += [one for b in narrowing.apart for one in _events(b)]


def _events(part: Batch) -> list[Arrival | Due]:
    return [*part.arrivals, *part.due]


def _aggregate(one: Arrival | Due) -> str:
    return str(one.aggregate_id if isinstance(one, Due) else one.event.aggregate_id)


def _loaded(due: Due) -> Arrival:
    return Arrival(event=event(due.seq, aggregate=str(due.aggregate_id)), held_id=due.held_id)


def test_one_of_a_thousand_is_found_by_the_logarithm_of_a_thousand_failures() -> None:
    for poison in ("0", "500", "999"):
        trial = Trial(batch(*[1] * 1000), {poison})
        assert trial.failed <= 11
        assert trial.succeeded <= 11
        assert {poison} in trial.apart
        assert len(trial.apart) <= 2


def test_a_failure_that_costs_the_connection_is_found_by_three() -> None:
    trial = Trial(batch(*[1] * 1000), {"700"}, dear=True)
    assert trial.failed == 2
    assert trial.succeeded <= 31
    assert {"700"} in trial.apart
    assert len(trial.apart) <= 32


def test_where_everything_fails_it_costs_a_quarter_more_and_not_twice_as_much() -> None:
    trial = Trial(batch(*[1] * 500), {str(i) for i in range(500)})
    assert trial.failed <= 126
    assert len(trial.apart) == 500


def test_an_aggregate_alone_is_not_divided() -> None:
    trial = Trial(batch(100), {"0"})
    assert (trial.failed, trial.succeeded, trial.apart) == (1, 0, [{"0"}])


def test_a_handler_that_names_its_event_costs_one_failure_for_each_and_after_four_nothing_is_tried_as_a_whole() -> None:
    whole = batch(*[2] * 20)
    narrowing = Narrowing(whole, RULES, Suspects())
    for expected in (20, 19, 18, 17):
        part = narrowing.next()
        assert part is not None
        assert len({_aggregate(a) for a in part.arrivals}) == expected
        narrowing.failed(part, part.arrivals[:1], dear=False)
    assert narrowing.next() is None
    assert len(narrowing.apart) == 20


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=40),
    st.integers(0, 5),
    st.sets(st.integers(0, 45), max_size=6),
    st.booleans(),
    st.sets(st.integers(0, 40), max_size=40),
)
def test_nothing_is_lost_or_done_twice_or_out_of_order_and_what_fails_is_apart(
    counts: list[int], due: int, poison: set[int], dear: bool, company: set[int]
) -> None:
    whole = batch(*counts, due=due)
    suspects = Suspects()
    suspects.accuse_one_of([("shop", f"{i}/1") for i in company], 40)
    failing = {str(i) for i in poison} | {f"d{i}" for i in poison if i % 2}
    trial = Trial(whole, failing, dear=dear, suspects=suspects)
    assert Counter(map(id, trial.done)) == Counter(map(id, _events(whole)))
    present = failing & {_aggregate(one) for one in _events(whole)}
    assert all({name} in trial.apart for name in present)
    order: dict[str, list[int | None]] = {}
    for one in trial.done:
        if isinstance(one, Arrival):
            order.setdefault(_aggregate(one), []).append(one.event.seq)
    assert all(seqs == list(range(1, len(seqs) + 1)) for seqs in order.values())


def test_suspects_are_tried_after_the_rest_those_together_in_parts_and_those_alone_apart() -> None:
    whole = batch(*[1] * 200)
    suspects = Suspects()
    suspects.accuse(("shop", "7/1"))
    suspects.accuse_one_of([("shop", f"{i}/1") for i in range(100, 200)], 100)
    suspects.accuse_one_of([("shop", f"{i}/1") for i in range(150, 160)], 10)
    narrowing = Narrowing(whole, RULES, suspects)
    parts = [part.arrivals for part in iter(narrowing.next, None)]
    assert len(parts[0]) == 200 - 1 - 100
    assert {len(part) for part in parts[1:]} <= {4, 2}
    assert sum(map(len, parts[1:])) == 90
    alone = {_aggregate(a) for part in narrowing.apart for a in part.arrivals}
    assert alone == {"7", *map(str, range(150, 160))}


def test_a_message_that_breaks_every_connection_is_alone_in_the_third_session() -> None:
    """What an Applier remembers from one session to the next, for a call of a thousand aggregates."""
    whole, suspects = batch(*[1] * 1000), Suspects()

    def session() -> int:
        """Aggregates in the call that breaks; 0: it is apart, alone."""
        narrowing = Narrowing(whole, RULES, suspects)
        while (part := narrowing.next()) is not None:
            names = [a.message for a in part.arrivals]
            if ("shop", "321/1") in names:
                suspects.accuse_one_of(names, len(names))
                return len(names)
            for name in names:
                suspects.clear(name)
        assert any(_aggregate(a) == "321" for single in narrowing.apart for a in single.arrivals)
        return 0

    assert [session(), session(), session()] == [1000, 32, 0]


def test_strangers_and_controls_stay_with_the_rest() -> None:
    """They are done once, however often the events are divided."""
    stranger = Stranger(
        reason="foreign", detail="", message_id=None, exchange="", routing_key="", properties="{}", body=b""
    )
    events = batch(1, 1, 1, 1)
    whole = Batch(arrivals=events.arrivals, strangers=[stranger])
    narrowing = Narrowing(whole, RULES, Suspects())
    first = narrowing.next()
    assert first is whole
    assert narrowing.refused(first)
    rest = narrowing.next()
    assert rest is not None
    assert (list(rest.strangers), list(rest.arrivals)) == ([stranger], [])
    assert not narrowing.refused(rest)
    others = list(iter(narrowing.next, None))
    assert [len(part.arrivals) for part in others] == [2, 2]
    assert not any(part.strangers for part in others)
