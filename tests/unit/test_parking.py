"""What becomes of a page: pure decisions."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.message import Row
from relay.outbox.parking import is_done, retry_delay_s, settle, unsendable, waves
from relay.outbox.pause import Pauses
from relay.outbox.routing import routing_key
from relay.rabbitmq.contract import Confirmed, Nacked, Outcome, Refused, Returned, Unknown

TEMPLATE = Row(
    id=1,
    aggregate_type="order",
    aggregate_id="1",
    seq=1,
    event_type="Paid",
    content_type="application/json",
    headers={},
    routing_key=None,
    created_at=datetime.now(UTC),
    body=b"{}",
)


NOTHING = Pauses()
ORDER_A = Pauses(aggregates=frozenset({("order", "a")}))


def rows(*aggregates: str | None) -> list[Row]:
    return [TEMPLATE._replace(id=i, aggregate_id=a, seq=None if a is None else i) for i, a in enumerate(aggregates, 1)]


OUTCOMES: st.SearchStrategy[Outcome] = st.sampled_from(
    [Confirmed(), Confirmed(), Confirmed(), Returned("NO_ROUTE"), Nacked(), Refused("too_large", "x"), Unknown("cut")]
)


def test_a_refused_row_parks_its_later_rows_even_those_that_were_confirmed() -> None:
    page = rows("a", "b", "a", "b")
    settlement = settle(page, [Nacked(), Confirmed(), Confirmed(), Confirmed()], frozenset(), NOTHING)
    assert [(p.row.id, p.reason) for p in settlement.parked] == [(1, "nacked"), (3, "behind")]
    assert [r.id for r in settlement.confirmed] == [2, 4]


def test_rows_of_a_blocked_aggregate_wait_behind_it() -> None:
    settlement = settle(rows("a", "b"), [None, Confirmed()], {("order", "a")}, NOTHING)
    assert [(p.row.id, p.reason) for p in settlement.parked] == [(1, "behind")]


def test_an_event_without_an_aggregate_is_parked_alone() -> None:
    settlement = settle(rows(None, None), [Returned("NO_ROUTE"), Confirmed()], frozenset(), NOTHING)
    assert [p.row.id for p in settlement.parked] == [1]
    assert [r.id for r in settlement.confirmed] == [2]


def test_nothing_behind_an_unknown_row_is_settled() -> None:
    settlement = settle(rows("a", "b", "c"), [Confirmed(), Unknown("cut"), Confirmed()], frozenset(), NOTHING)
    assert settlement.settled == 1


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), OUTCOMES), max_size=30),
    st.sets(st.sampled_from(["a", "b"])),
)
def test_every_settled_row_is_confirmed_or_parked_and_no_confirmed_row_follows_a_parked_one(
    page: list[tuple[str | None, Outcome]], blocked_ids: set[str]
) -> None:
    read = rows(*(aggregate for aggregate, _ in page))
    blocked = {("order", name) for name in blocked_ids}
    outcomes = [None if row.aggregate in blocked else outcome for row, (_, outcome) in zip(read, page, strict=True)]
    settlement = settle(read, outcomes, blocked, NOTHING)
    confirmed, parked = [r.id for r in settlement.confirmed], [p.row.id for p in settlement.parked]
    assert sorted(confirmed + parked) == [r.id for r in read[: settlement.settled]]
    for head in settlement.parked:
        if head.row.aggregate is not None:
            assert not [r for r in settlement.confirmed if r.aggregate == head.row.aggregate and r.id > head.row.id]


@pytest.mark.parametrize(
    "pauses",
    [
        ORDER_A,
        Pauses(aggregate_types=frozenset({"order"})),
        Pauses(event_types=frozenset({"Paid"})),
    ],
)
def test_a_pause_holds_an_aggregate_a_type_of_aggregates_or_a_type_of_events(pauses: Pauses) -> None:
    (row,) = rows("a")
    assert pauses.hold(row)
    other = row._replace(aggregate_type="invoice", event_type="Sent")
    assert not pauses.hold(other)
    assert not NOTHING.hold(row)
    assert not Pauses(shards=frozenset({0})).hold(row)  # a matter of the whole shard, not of a row


def test_an_event_without_an_aggregate_can_be_paused_by_its_type() -> None:
    (row,) = rows(None)
    assert Pauses(event_types=frozenset({"Paid"})).hold(row)
    assert not ORDER_A.hold(row)


def test_a_paused_row_is_parked_and_what_is_behind_it_waits_whatever_its_own_type() -> None:
    page = rows("a", "b", "a", None)
    page[2] = page[2]._replace(event_type="Sent")
    pauses = Pauses(event_types=frozenset({"Paid"}))
    assert unsendable(page, frozenset(), pauses) == {0, 1, 2, 3}
    settlement = settle(page, [None] * 4, frozenset(), pauses)
    assert [(p.row.id, p.reason) for p in settlement.parked] == [
        (1, "paused"),
        (2, "paused"),
        (3, "behind"),
        (4, "paused"),
    ]
    assert [p.is_head for p in settlement.parked] == [True, True, False, True]


def test_rows_before_the_first_paused_one_are_sent() -> None:
    page = rows("a", "b", "a")
    page[2] = page[2]._replace(event_type="Sent")
    pauses = Pauses(event_types=frozenset({"Sent"}))
    assert unsendable(page, {("order", "b")}, pauses) == {1, 2}
    settlement = settle(page, [Confirmed(), None, None], {("order", "b")}, pauses)
    assert [r.id for r in settlement.confirmed] == [1]
    assert [(p.row.id, p.reason) for p in settlement.parked] == [(2, "behind"), (3, "paused")]


@pytest.mark.parametrize(
    ("outcome", "done", "done_as_tombstone"),
    [
        (Confirmed(), True, True),
        (Returned("NO_ROUTE"), False, True),
        (Refused("unencodable", "its routing key is too long"), False, True),
        (Refused("too_large", "its headers are"), False, True),
        (Refused("refused", "it closed the channel"), False, False),
        (Refused("unconfirmed", "its queue hangs"), False, False),
        (Nacked(), False, False),
        (None, False, False),
    ],
)
def test_a_tombstone_that_nobody_is_bound_for_or_could_ever_have_got_is_done(
    outcome: Outcome | None, done: bool, done_as_tombstone: bool
) -> None:
    assert is_done(TEMPLATE, outcome) == done
    assert is_done(TEMPLATE._replace(is_tombstone=True), outcome) == done_as_tombstone


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.sampled_from(["Paid", "Sent"])), max_size=30),
    st.sampled_from([NOTHING, ORDER_A, Pauses(event_types=frozenset({"Sent"}))]),
    st.sets(st.sampled_from(["a", "b"])),
)
def test_what_is_not_sent_is_parked_and_what_is_sent_and_confirmed_is_not(
    page: list[tuple[str | None, str]], pauses: Pauses, blocked_ids: set[str]
) -> None:
    kinds = [kind for _, kind in page]
    read = [r._replace(event_type=k) for r, k in zip(rows(*(a for a, _ in page)), kinds, strict=True)]
    blocked = {("order", name) for name in blocked_ids}
    unsent = unsendable(read, blocked, pauses)
    outcomes = [None if i in unsent else Confirmed() for i in range(len(read))]
    settlement = settle(read, outcomes, blocked, pauses)
    assert [p.row.id for p in settlement.parked] == [read[i].id for i in sorted(unsent)]
    assert not [r for r in settlement.confirmed if pauses.hold(r)]


@given(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=30))
def test_strict_waves_hold_an_aggregate_once_and_keep_its_order(aggregates: list[str | None]) -> None:
    read = rows(*aggregates)
    found = waves(read)
    assert sorted(i for wave in found for i in wave) == list(range(len(read)))
    sent: dict[str, list[int]] = {}
    for wave in found:
        names = [read[i].aggregate_id for i in wave if read[i].aggregate_id is not None]
        assert len(names) == len(set(names))
        for i in wave:
            if (name := read[i].aggregate_id) is not None:
                sent.setdefault(name, []).append(i)
    assert all(positions == sorted(positions) for positions in sent.values())


@pytest.mark.parametrize(("attempts", "expected"), [(1, 1.0), (2, 2.0), (5, 16.0), (9, 60.0), (5000, 60.0)])
def test_the_delay_doubles_up_to_the_longest(attempts: int, expected: float) -> None:
    assert retry_delay_s(attempts, first_s=1, longest_s=60) == expected


def test_a_rows_own_routing_key_wins_over_the_template() -> None:
    assert routing_key(TEMPLATE, "{aggregate_type}.{event_type}") == "order.Paid"
    assert routing_key(TEMPLATE._replace(routing_key="x.y"), "{aggregate_type}") == "x.y"
    assert (
        routing_key(
            TEMPLATE._replace(aggregate_type=None, aggregate_id=None, seq=None),
            "{aggregate_type}.{event_type}",
        )
        == "Paid"
    )
