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


def after(*pages: Page, gather_s: float = GATHER_S, each_s: float = 0.004) -> tuple[float, bool]:
    """(seconds until the next read, whether it gathers), when these were read, one after the other."""
    pace, now = Pace(gather_s), NOW
    for each in pages:
        now += each_s
        pace.saw(each, now)
    return round(pace.due_s(now), 6), pace.gathers


def test_at_first_the_log_is_read_at_once() -> None:
    assert Pace(GATHER_S).due_s(NOW) <= 0


@pytest.mark.parametrize("size", [1, 500])
def test_a_backlog_is_read_on_at_once(size: int) -> None:
    assert after(*[page(size, complete=False)] * 50) == (0, False)


def test_a_page_at_the_end_of_the_log_is_waited_for_only_until_it_is_confirmed() -> None:
    assert after(page(1)) == (0.005, False)


def test_under_load_the_next_page_gathers_however_soon_the_last_is_confirmed() -> None:
    """5 000 rows a second, until it is known; and with the larger pages that follow from it."""
    assert after(*[page(20)] * 50) == (GATHER_S, True)
    assert after(*[page(100)] * 50, each_s=GATHER_S) == (GATHER_S, True)


@pytest.mark.parametrize(("size", "each_s"), [(1, 0.001), (8, 0.004), (100, 0.05), (400, 0.2), (200, 1)])
def test_up_to_two_thousand_rows_a_second_nothing_gathers_in_whatever_pieces_they_are_committed(
    size: int, each_s: float
) -> None:
    assert after(*[page(size)] * 50, each_s=each_s) == (0.005, False)


def test_a_clock_that_stands_still_between_two_reads_is_no_infinite_load() -> None:
    assert after(page(100), *[page(1)] * 50, each_s=0) == (0.005, False)


def test_without_gathering_the_load_does_not_matter() -> None:
    assert after(*[page(20)] * 50, gather_s=0) == (0.005, False)


def test_when_the_load_is_over_nothing_gathers() -> None:
    assert after(*[page(20)] * 50, page(0)) == (0.01, False)
    assert after(*[page(20)] * 50, *[page(1)] * 50) == (0.005, False)


def test_looks_that_find_nothing_become_rarer_and_something_found_ends_that() -> None:
    assert [after(*[page(0)] * looks)[0] for looks in (1, 2, 3, 4, 5)] == [0.01, 0.02, 0.04, 0.08, 0.08]
    assert after(*[page(0)] * 5, page(1)) == (0.005, False)


def test_the_time_is_counted_from_the_read() -> None:
    pace = Pace(GATHER_S)
    for number in range(50):
        pace.saw(page(100), NOW + number * GATHER_S)
    last = NOW + 49 * GATHER_S
    assert pace.due_s(last + 0.015) == pytest.approx(0.005)
    assert pace.due_s(last + 0.03) < 0
