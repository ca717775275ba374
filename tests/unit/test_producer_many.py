from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import InputError
from relay.producer import NewEvent
from relay.producer.many import STATEMENT_EVENTS, STATEMENT_SIZE, Many


def event(aggregate: str | None = "order/1", **fields: Any) -> NewEvent:
    kind, _, name = (aggregate or "").partition("/")
    place = {} if aggregate is None else {"aggregate_type": kind, "aggregate_id": name}
    content = {} if "body" in fields else {"payload": 0}
    return NewEvent(event_type="Changed", **{**place, **content, **fields})


def inserted(many: Many, *, at_once: bool = False) -> list[tuple[Any, ...]]:
    """The rows in the order in which they reach the database."""
    return [row for columns in many.statements(at_once=at_once) for row in zip(*columns, strict=True)]


AGGREGATES = st.sampled_from(["order/1", "order/2", "bill/1", "order/10", "order/é", None])


@given(st.lists(AGGREGATES, max_size=30))
def test_aggregates_come_in_one_order_whatever_the_list_and_each_keeps_its_own(given_: list[str | None]) -> None:
    rows = inserted(Many(event(aggregate, payload=n) for n, aggregate in enumerate(given_)))
    told = [(row[0], row[1], int(row[3])) for row in rows]
    assert len(told) == len(given_)
    assert told == sorted(told, key=lambda t: (t[0] or "", t[1] or "", t[2])), "sorted, and by place within each"


@given(st.lists(AGGREGATES, max_size=30), st.booleans())
def test_what_the_database_returns_comes_back_in_the_order_given(given_: list[str | None], at_once: bool) -> None:
    many = Many(event(aggregate, payload=n) for n, aggregate in enumerate(given_))
    assert many.as_given([int(row[3]) for row in inserted(many, at_once=at_once)]) == list(range(len(given_)))


def test_an_answer_that_is_too_short_is_an_error_not_a_shift() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Many([event(), event()]).as_given([1])


def test_a_statement_is_bounded_in_events() -> None:
    sizes = [len(c[0]) for c in Many([event()] * (2 * STATEMENT_EVENTS + 1)).statements(at_once=False)]
    assert sizes == [STATEMENT_EVENTS, STATEMENT_EVENTS, 1]


@pytest.mark.parametrize("field", ["body", "payload", "headers"])
def test_a_statement_is_bounded_in_size(field: str) -> None:
    half = STATEMENT_SIZE // 2
    fields: dict[str, dict[str, Any]] = {
        "body": {"body": bytes(half)},
        "payload": {"payload": "x" * (half - 2)},
        "headers": {"headers": {"a": "x" * 16_000}, "body": bytes(half - 16_009)},
    }
    sizes = [len(c[0]) for c in Many([event(**fields[field])] * 5).statements(at_once=False)]
    assert sizes == [2, 2, 1]


def test_an_event_larger_than_a_statement_has_one_of_its_own() -> None:
    events = [event(), event(body=bytes(STATEMENT_SIZE + 1)), event()]
    assert [len(c[0]) for c in Many(events).statements(at_once=False)] == [1, 1, 1]


def test_at_once_is_one_statement_whatever_its_size() -> None:
    assert [len(c[0]) for c in Many([event()] * 2500).statements(at_once=True)] == [2500]


def test_no_events_are_no_statement() -> None:
    many = Many([])
    assert list(many.statements(at_once=True)) == list(many.statements(at_once=False)) == []
    assert many.as_given([]) == []


def test_what_is_not_an_event_is_named_by_its_place() -> None:
    with pytest.raises(InputError, match=r"^events\[2\]: emit takes a NewEvent, not a dict"):
        Many([event(), event(), {}])  # type: ignore[list-item]


def test_an_event_that_cannot_be_made_is_named_by_its_place() -> None:
    def made() -> Iterator[NewEvent]:
        for payload in (1, 2, float("nan")):
            yield event(payload=payload)

    with pytest.raises(InputError, match=r"^events\[2\]: payload: .*NaN"):
        Many(made())


@pytest.mark.parametrize(
    ("given_", "says"),
    [(event(), "not a NewEvent; for one event use emit"), (None, "not a NoneType"), (7, "not a int")],
)
def test_what_is_not_many_is_refused(given_: Any, says: str) -> None:
    with pytest.raises(InputError, match=f"takes an iterable of NewEvent, {says}"):
        Many(given_)
