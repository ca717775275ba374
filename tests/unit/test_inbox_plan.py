"""The plan of calls: each event once, in the order of its aggregate, in as few calls as that allows, none above its limit."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from relay.inbox.handlers import Grouped, Handler
from relay.inbox.plan import Call, Ready, calls
from relay.inbox.sequencer import Arrival
from relay.message import Event
from relay.postgres.connect import Connection
from tests.unit.test_sequencer import event


async def many(events: Sequence[Event], tx: Connection) -> None: ...


async def single(event: Event, tx: Connection) -> None: ...


async def other(event: Event, tx: Connection) -> None: ...


def handlers(limit: int = 1000) -> dict[str, Handler | Grouped]:
    """By a letter: capital ones take many events in one call."""
    return {name: Grouped(many, limit) for name in "ABCD"} | {"s": single, "o": other}


def ready(text: str, known: dict[str, Handler | Grouped] | None = None) -> list[Ready]:
    """`1A 2B -C`: aggregate 1 for handler A, aggregate 2 for handler B, no aggregate for handler C."""
    known = known or handlers()
    found: list[Ready] = []
    numbers: dict[str, int] = {}
    for word in text.split():
        aggregate, handler = word[0], word[1]
        numbers[aggregate] = numbers.get(aggregate, 0) + 1
        key = None if aggregate == "-" else ("shop", "order", aggregate)
        found.append((known[handler], key, Arrival(event=event(numbers[aggregate], aggregate=aggregate))))
    return found


def planned(text: str, limit: int = 1000) -> list[str]:
    """The calls, as handler and events: `A 1/1 1/2`."""
    known = handlers(limit)
    letters = {id(handler): letter for letter, handler in known.items()}
    return [
        " ".join((letters[id(call.handler)], *(a.event.message_id for a in call.arrivals)))
        for call in calls(ready(text, known))
    ]


def test_events_of_one_handler_come_in_one_call_in_the_order_of_application() -> None:
    assert planned("1A 2A 1A -A 3A") == ["A 1/1 2/1 1/2 -/1 3/1"]
    assert planned("") == []


def test_a_limit_divides_a_call() -> None:
    assert planned("1A 2A 1A 2A 1A", limit=2) == ["A 1/1 2/1", "A 1/2 2/2", "A 1/3"]


def test_a_one_by_one_handler_is_called_one_by_one() -> None:
    assert planned("1s 2s 1s") == ["s 1/1", "s 2/1", "s 1/2"]
    assert planned("1A 1s 2s 2A 1A") == ["s 2/1", "A 1/1 2/2", "s 1/2", "A 1/3"]


def test_a_later_handler_waits_for_all_that_come_to_it_later() -> None:
    """Aggregates at different places of the same story: each handler is called once."""
    assert planned("1C 2B 2C 3A 3B 3C") == ["A 3/1", "B 2/1 3/2", "C 1/1 2/2 3/3"]
    assert planned("1A 1B 2B") == ["A 1/1", "B 1/2 2/1"]


def test_aggregates_that_contradict_each_other_cost_one_call_more() -> None:
    assert len(planned("1A 1B 2B 2A")) == 3


SEQUENCES = st.lists(st.tuples(st.sampled_from("1234-"), st.sampled_from("ABCDso")).map("".join), max_size=40)


@given(SEQUENCES.map(" ".join), st.integers(1, 9))
def test_each_event_once_in_the_order_of_its_aggregate_and_no_call_above_its_limit(text: str, limit: int) -> None:
    given = ready(text, handlers(limit))
    made = list(calls(given))
    assert sorted(id(a) for call in made for a in call.arrivals) == sorted(id(a) for _, _, a in given)
    assert all(1 <= len(call.arrivals) <= _most(call) for call in made)
    handler_of = {id(a): handler for handler, _, a in given}
    order: dict[str, list[int | None]] = {}
    for call in made:
        for arrival in call.arrivals:
            assert handler_of[id(arrival)] is call.handler
            if arrival.event.aggregate_id != "-":
                order.setdefault(str(arrival.event.aggregate_id), []).append(arrival.event.seq)
    assert all(numbers == sorted(numbers, key=lambda seq: seq or 0) for numbers in order.values())
    place = {id(a): place for place, (_, _, a) in enumerate(given)}
    for call in made:
        assert [place[id(a)] for a in call.arrivals] == sorted(place[id(a)] for a in call.arrivals)


def _most(call: Call) -> int:
    return call.handler.limit if isinstance(call.handler, Grouped) else 1


@given(st.lists(st.tuples(st.sampled_from("1234567"), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=8))
def test_a_handler_is_called_once_if_all_aggregates_have_the_handlers_in_the_same_order(
    paths: list[tuple[str, int, int]],
) -> None:
    """Each aggregate goes through a part of A B C D."""
    by_aggregate = {aggregate: "ABCD"[min(a, b) : max(a, b) + 1] for aggregate, a, b in paths}
    text = " ".join(aggregate + handler for aggregate, path in by_aggregate.items() for handler in path)
    assert sorted(call.split()[0] for call in planned(text)) == sorted(set("".join(by_aggregate.values())))


def test_where_aggregates_contradict_each_other_there_are_still_few_calls() -> None:
    """500 events of 200 aggregates for four handlers, at random. In the order of arrival these are some 375 calls; with what
    comes n-th of its aggregate in the n-th stage, some 23."""
    dice = random.Random(1)
    text = [(chr(200 + dice.randrange(200)), dice.choice("ABCD")) for _ in range(500)]
    assert len(planned(" ".join(map("".join, text)))) <= 16
