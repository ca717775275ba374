"""Which refusals of a full queue are doubted: few enough to cost nothing, soon enough to heal, and none left out."""

from __future__ import annotations

from collections.abc import Sequence

from relay.outbox.doubt import Doubts
from relay.outbox.store import Due
from tests.unit.test_parking import rows


def nacked(*keys: str, attempts: int = 2) -> list[tuple[Due, str]]:
    """Heads that were nacked now, and `attempts` times before."""
    return [(Due(row, attempts), key) for row, key in zip(rows(*keys), keys, strict=True)]


def doubted_keys(doubts: Doubts, heads: Sequence[tuple[Due, str]], times: Sequence[float]) -> list[str]:
    chosen = [doubts.choose(heads, now) for now in times]
    return [key for d in chosen for head, key in heads if head is d]


def test_a_queue_that_is_full_for_a_moment_is_believed() -> None:
    doubts = Doubts()
    assert doubts.choose(nacked("a", attempts=0), 0) is None
    assert doubts.choose(nacked("a", attempts=1), 1) is None
    assert doubts.choose(nacked("a", attempts=2), 3) is not None


def test_nothing_nacked_is_nothing_to_doubt() -> None:
    assert Doubts().choose([], 0) is None


def test_a_full_queue_is_doubted_every_ten_seconds_however_many_wait_for_it() -> None:
    doubts = Doubts()
    asked = [now for now in range(100) if doubts.choose(nacked(*["a"] * 20), now)]
    assert asked == list(range(0, 100, 10))


def test_many_full_queues_are_doubted_once_a_second_in_all() -> None:
    doubts = Doubts()
    heads = nacked(*(f"k{n}" for n in range(100)))
    assert sum(doubts.choose(heads, n / 10) is not None for n in range(600)) == 60


def test_of_queues_that_are_refused_together_each_has_its_turn() -> None:
    """Their rows may be due at the same moments for ever: the first one must not take every turn."""
    assert doubted_keys(Doubts(), nacked("a", "b", "c"), range(0, 600, 100)) == ["a", "b", "c"] * 2


def test_the_keys_that_are_remembered_are_bounded() -> None:
    doubts = Doubts()
    for n in range(3000):
        assert doubts.choose(nacked(f"k{n}"), n)
    assert len(doubts._doubted) == 1000
    assert doubts.choose(nacked("k2999"), 3000) is None


def test_sessions_that_are_always_found_wrong_end_more_and_more_seldom() -> None:
    """A queue that is emptied as slowly as it is filled lets in new channels only, for as long as that lasts."""
    doubts = Doubts()
    ended: list[int] = []
    for now in range(2 * 3600):
        if doubts.choose(nacked("a"), now):
            doubts.found_wrong(now)
            ended.append(now)
    assert ended == [0, 10, 30, 70, 150, 310, 630, 1270, 2230, 3190, 4150, 5110, 6070, 7030]


def test_after_a_quiet_time_the_first_one_is_believed_at_once_again() -> None:
    doubts = Doubts()
    for now in (0, 10, 30, 70):
        assert doubts.choose(nacked("a"), now)
        doubts.found_wrong(now)
    assert doubts.choose(nacked("a"), 1000)
    doubts.found_wrong(1000)
    assert doubts.choose(nacked("a"), 1010)
