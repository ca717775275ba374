"""The size of a batch follows the handlers' speed: about a second a transaction."""

from __future__ import annotations

from relay.inbox.pace import Pace


def sizes(pace: Pace, message_s: float, batches: int) -> list[int]:
    """The sizes of full batches with handlers that take so long."""
    found = []
    for _ in range(batches):
        found.append(pace.limit)
        pace.took(pace.limit, pace.limit * message_s)
    return found


def test_fast_handlers_get_the_whole_batch_after_a_few_small_ones() -> None:
    assert sizes(Pace(500), 0.0001, 6) == [32, 64, 128, 256, 500, 500]


def test_slow_handlers_get_small_batches_down_to_a_single_message() -> None:
    assert sizes(Pace(500), 0.05, 3) == [32, 16, 16]
    assert sizes(Pace(500), 0.2, 3) == [32, 5, 5]
    assert sizes(Pace(500), 30, 3) == [32, 1, 1]


def test_handlers_that_become_slow_make_one_batch_that_lasts_long_not_one_after_the_other() -> None:
    pace = Pace(2000)
    sizes(pace, 0.0001, 10)
    assert pace.limit == 2000
    assert sizes(pace, 0.1, 3) == [2000, 10, 10]


def test_what_a_batch_costs_whatever_its_size_does_not_keep_it_small() -> None:
    pace, once_s = Pace(500), 0.45
    for limit in (32, 64, 128, 256, 500):
        assert pace.limit == limit
        pace.took(limit, once_s + limit * 0.0001)


def test_it_stays_between_one_message_and_the_setting() -> None:
    assert Pace(3).limit == 3
    assert sizes(Pace(1), 0.001, 2) == sizes(Pace(1), 60, 2) == [1, 1]


def test_a_batch_that_was_not_full_says_nothing_about_larger_ones_unless_it_was_slow() -> None:
    pace = Pace(500)
    pace.took(1, 0.2)
    assert pace.limit == 32
    pace.took(8, 1.6)
    assert pace.limit == 4


def test_it_recovers_when_the_handlers_do() -> None:
    pace = Pace(64)
    sizes(pace, 30, 10)
    assert pace.limit == 1
    assert sizes(pace, 0.001, 8) == [1, 2, 4, 8, 16, 32, 64, 64]
