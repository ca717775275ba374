"""When the log is read again: soon while latency is all that counts, in larger pieces under load, at once while there is a backlog."""

from __future__ import annotations

import pytest

from relay.outbox.cursor import Page, Snapshot
from relay.outbox.pace import Pace
from tests.unit.test_parking import rows

NOW = 100.0
GATHER_S = 0.02


def page(size: int, *, complete: bool = True) -> Page:
    return Page(rows(*"a" * size), Snapshot(9, 9), complete)


def after(*pages: Page, gather_s: float = GATHER_S) -> tuple[float, bool]:
    """(seconds until the next read, whether it gathers), when these were read."""
    pace = Pace(gather_s)
    for each in pages:
        pace.saw(each, NOW)
    return round(pace.due_s(NOW), 6), pace.gathers


def test_at_first_the_log_is_read_at_once() -> None:
    assert Pace(GATHER_S).due_s(NOW) <= 0


@pytest.mark.parametrize("size", [1, 500])
def test_a_backlog_is_read_on_at_once(size: int) -> None:
    assert after(page(size, complete=False)) == (0, False)


def test_a_few_rows_at_the_end_of_the_log_are_waited_for_only_until_they_are_confirmed() -> None:
    assert after(page(7)) == (0.005, False)


def test_many_rows_at_the_end_of_the_log_let_the_next_gather_however_soon_they_are_confirmed() -> None:
    assert after(page(8)) == (GATHER_S, True)


def test_without_gathering_many_rows_are_like_few() -> None:
    assert after(page(100), gather_s=0) == (0.005, False)


def test_when_the_load_is_over_nothing_gathers() -> None:
    assert after(page(100), page(1)) == (0.005, False)
    assert after(page(100), page(0)) == (0.01, False)


def test_looks_that_find_nothing_become_rarer_and_something_found_ends_that() -> None:
    assert [after(*[page(0)] * looks)[0] for looks in (1, 2, 3, 4, 5)] == [0.01, 0.02, 0.04, 0.08, 0.08]
    assert after(*[page(0)] * 5, page(1)) == (0.005, False)


def test_the_time_is_counted_from_the_read() -> None:
    pace = Pace(GATHER_S)
    pace.saw(page(100), NOW)
    assert pace.due_s(NOW + 0.015) == pytest.approx(0.005)
    assert pace.due_s(NOW + 0.03) < 0
