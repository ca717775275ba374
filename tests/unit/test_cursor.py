"""The cursor's arithmetic."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.message import Row
from relay.outbox.cursor import Page, Position, Snapshot


def row(row_id: int) -> Row:
    return Row(
        id=row_id,
        aggregate_type="order",
        aggregate_id="1",
        seq=row_id,
        event_type="E",
        content_type="application/json",
        headers={},
        routing_key=None,
        created_at=datetime.now(UTC),
        body=b"{}",
    )


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    xmin = draw(st.integers(1, 1000))
    xmax = draw(st.integers(xmin, xmin + 50))
    xip = draw(st.sets(st.integers(xmin, xmax - 1), max_size=10)) if xmax > xmin else set()
    return Snapshot(xmin, xmax, tuple(sorted(xip)))


@given(snapshots())
def test_a_snapshot_survives_postgresqls_text_form(snapshot: Snapshot) -> None:
    assert Snapshot.parse(str(snapshot)) == snapshot


@given(snapshots(), st.integers(1, 1100))
def test_a_transaction_is_unseen_exactly_when_the_readers_predicate_finds_it(snapshot: Snapshot, xid: int) -> None:
    found_by_reader = xid >= snapshot.xmax or xid in snapshot.xip
    assert snapshot.sees(xid) is not found_by_reader


@pytest.mark.parametrize("text", ["", "1:2", "2:1:", "0:1:", "1:5:7", "a:b:", "1:1:1", "-1:4:"])
def test_what_is_not_a_snapshot_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Snapshot.parse(text)


def test_a_complete_page_closes_its_window_and_a_full_one_keeps_it() -> None:
    start, seen = Snapshot(1, 1), Snapshot(5, 9, (6,))
    full = Page([row(3), row(4)], seen, complete=False)
    inside = Position(start).after(full)
    assert inside == Position(start, seen, 4)
    assert inside.after(Page([row(8)], seen, complete=True)) == Position(seen)


def test_an_empty_window_still_moves_the_snapshot() -> None:
    page = Page([], Snapshot(5, 9), complete=True)
    assert page.empty
    assert Position(Snapshot(1, 1)).after(page) == Position(Snapshot(5, 9))


def test_a_position_inside_a_page_repeats_nothing_before_it() -> None:
    page = Page([row(3), row(4)], Snapshot(5, 9), complete=True)
    assert Position(Snapshot(1, 1)).within(page, 3) == Position(Snapshot(1, 1), Snapshot(5, 9), 3)
