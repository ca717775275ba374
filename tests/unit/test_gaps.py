"""What a gap needs, decided without a database."""

from __future__ import annotations

from dataclasses import replace

import pytest

from relay.control import Gone, Mark, Marks, Range
from relay.inbox.gaps import LONGEST_DELAY_S, Gap, Need, beyond, newest, stuck_details
from relay.inbox.healing import _Outstanding

KEY = ("shop", "order", "42")
GAP = Gap(
    key=KEY,
    to_seq=10,
    is_stuck=False,
    asks=0,
    asked_from=None,
    asked_to=None,
    last_seq=4,
    held_to=4,
    top_is_held=False,
)


@pytest.mark.parametrize(
    ("last_seq", "held_to", "first"),
    [(4, 4, 5), (4, 7, 8), (10, 10, 11), (12, 10, 13), (4, 10, 11), (4, 13, 11)],
)
def test_the_first_missing_number_follows_what_is_applied_and_what_is_held(
    last_seq: int, held_to: int, first: int
) -> None:
    gap = replace(GAP, last_seq=last_seq, held_to=held_to)
    assert gap.first_missing == first
    assert (gap.need is Need.CLOSE) == (first > 10)


@pytest.mark.parametrize(("last_seq", "held", "first"), [(4, False, 10), (4, True, 11), (10, False, 11)])
def test_of_the_newest_state_only_the_newest_is_missing(last_seq: int, held: bool, first: int) -> None:
    assert replace(GAP, latest=True, last_seq=last_seq, top_is_held=held).first_missing == first


def test_the_rest_is_asked_for_at_once_when_all_that_was_asked_for_has_come() -> None:
    asked = replace(GAP, asks=2, asked_from=5, asked_to=7)
    assert [replace(asked, last_seq=n).need for n in (4, 6, 7, 10)] == [Need.WAIT, Need.WAIT, Need.ASK, Need.CLOSE]
    assert [replace(asked, last_seq=n).is_coming for n in (4, 5, 6)] == [False, True, True]


def test_a_stuck_one_waits_until_something_of_what_is_gone_comes_after_all() -> None:
    stuck = replace(GAP, is_stuck=True, asks=3, asked_from=5, asked_to=7)
    assert [replace(stuck, last_seq=n).need for n in (4, 5, 10)] == [Need.WAIT, Need.ASK, Need.CLOSE]


def test_the_time_between_two_requests_doubles_up_to_a_limit() -> None:
    assert [replace(GAP, asks=n).delay_s(5) for n in (0, 1, 2, 3)] == [5, 10, 20, 40]
    assert replace(GAP, asks=10_000).delay_s(5) == LONGEST_DELAY_S


def test_what_is_late_may_still_come_while_others_do_and_not_for_ever() -> None:
    asked = _Outstanding(numbers=1, first=5, since=100.0, until=105.0)
    assert asked.is_due(104.0, flowed_at=0.0, stalled_s=3.0)
    assert not asked.is_due(106.0, flowed_at=102.0, stalled_s=3.0)
    assert asked.is_due(106.0, flowed_at=104.0, stalled_s=3.0)
    assert not asked.is_due(161.0, flowed_at=160.5, stalled_s=3.0)


def test_the_highest_mark_of_an_aggregate_counts_and_none_of_an_unordered_type() -> None:
    told = [
        Marks(source="shop", marks=(Mark("order", "42", 7), Mark("note", "1", 3), Mark("order", "42", 5))),
        Marks(source="shop", marks=(Mark("order", "42", 6),)),
    ]
    assert newest(told, is_ordered=lambda kind: kind != "note") == {KEY: 7}


@pytest.mark.parametrize(
    ("ranges", "stuck_at"),
    [
        ([(5, 5)], 5),
        ([(1, 7)], 5),
        ([(1, 100)], 5),
        ([(6, 8)], None),  # it does not hold anything up yet
        ([(1, 4)], None),  # has come meanwhile
        ([(11, 12)], None),
        ([(6, 8), (5, 5)], 5),
    ],
)
def test_a_gap_is_stuck_when_its_first_missing_number_is_gone(
    ranges: list[tuple[int, int]], stuck_at: int | None
) -> None:
    gone = Gone(source="shop", reason="not_retained", ranges=tuple(Range("order", "42", *r) for r in ranges))
    found = stuck_details([gone], [GAP])
    assert (found[KEY][0] if found else None) == stuck_at


def test_the_answer_of_another_source_or_about_what_is_not_missing_changes_nothing() -> None:
    answers = [
        Gone(source="other", reason="not_retained", ranges=(Range("order", "42", 1, 9),)),
        Gone(source="shop", reason="not_retained", ranges=(Range("order", "43", 1, 9),)),
    ]
    assert stuck_details(answers, [GAP]) == {}


def test_what_is_said_names_the_numbers_and_what_to_do() -> None:
    gone = Gone(source="shop", reason="not_retained", ranges=(Range("order", "42", 1, 7),))
    assert stuck_details([gone], [GAP])[KEY][1] == (
        "numbers 5 to 7 are not retained by source shop any more; to go on without: "
        "relay inbox skip order/42 --through 7, or seed the aggregate"
    )


@pytest.mark.parametrize(
    ("asks", "asked_from", "before", "now", "dies"),
    [
        (3, 5, 1, 2, True),
        (2, 5, 1, 2, False),  # it may be on its way still
        (3, 4, 1, 2, False),  # something has come
        (3, 5, 1, 1, False),  # old dead letters: the relay does not answer
        (3, 5, 1, None, False),  # not to be seen
        (3, 5, None, 7, False),
    ],
)
def test_what_is_sent_in_vain_dies_when_the_dead_letters_grow(
    asks: int, asked_from: int, before: int | None, now: int | None, dies: bool
) -> None:
    assert replace(GAP, asks=asks, asked_from=asked_from, dead_letters=before).dies(now) is dies


def test_only_what_was_never_given_out_is_beyond() -> None:
    answers = [
        Gone(source="shop", reason="not_retained", ranges=(Range("order", "42", 1, 4),)),
        Gone(source="shop", reason="beyond", ranges=(Range("order", "42", 5, 100),)),
    ]
    details = stuck_details(answers, [GAP])
    assert beyond(answers, details) == {KEY: 5}
    assert beyond(answers[:1], details) == {}
