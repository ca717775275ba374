"""Several appliers: a batch is divided by what order is kept for, all parts are at work at the same time, all end before it returns."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from relay.control import Mark, Marks
from relay.errors import PostgresUnavailable
from relay.inbox.appliers import Appliers, divided
from relay.inbox.apply import Applier
from relay.inbox.handlers import Inbox
from relay.inbox.sequencer import Arrival
from relay.inbox.stats import Stats
from relay.inbox.store import Due, Stranger
from relay.inbox.work import Batch, Rules
from relay.message import Event
from relay.settings import InboxSettings

MARKS = Marks(source="shop", marks=(Mark("order", "1", 1),))


def rules(**settings: Any) -> Rules:
    return Rules(consumer="c", inbox=Inbox("c"), settings=InboxSettings.model_validate(settings))


def arrival(tag: int, name: str | None, seq: int | None, *, message_id: str = "", source: str = "shop") -> Arrival:
    event = Event(
        source=source,
        aggregate_type="order",
        aggregate_id=name,
        seq=seq,
        event_type="T",
        message_id=message_id or f"{name}/{seq}",
        content_type="",
    )
    return Arrival(event=event, tag=tag)


def due(held_id: int, name: str) -> Due:
    return Due(held_id=held_id, source="shop", aggregate_type="order", aggregate_id=name, seq=9, message_id=f"{name}/9")


def stranger() -> Stranger:
    return Stranger(
        reason="foreign", detail="", message_id=None, exchange="", routing_key="", properties="{}", body=b""
    )


def test_an_aggregate_is_in_one_part_in_its_order_with_what_is_held_of_it() -> None:
    arrivals = [arrival(tag, str(tag % 50), tag // 50 + 1) for tag in range(500)]
    batch = Batch(arrivals=arrivals, due=[due(i, str(i)) for i in range(50)])
    parts = divided(batch, rules(), 4)
    where: dict[str | None, int] = {}
    for position, part in enumerate(parts):
        tags = [a.tag or 0 for a in part.arrivals]
        assert tags == sorted(tags)
        for one in part.arrivals:
            assert where.setdefault(one.event.aggregate_id, position) == position
        assert all(where[d.aggregate_id] == position for d in part.due)
    assert sum(len(part.arrivals) for part in parts) == 500
    assert sum(len(part.due) for part in parts) == 50
    assert all(len(part.arrivals) > 50 for part in parts)


def test_copies_of_a_message_without_order_are_in_one_part() -> None:
    arrivals = [arrival(tag, None, None, message_id=f"m{tag % 20}") for tag in range(100)]
    for settings in ({}, {"policy": "none"}):
        for part in divided(Batch(arrivals=arrivals), rules(**settings), 4):
            assert all(len([a for a in part.arrivals if a.message == b.message]) == 5 for b in part.arrivals)


def test_events_of_policy_none_are_divided_by_their_message() -> None:
    arrivals = [arrival(seq, "1", seq) for seq in range(1, 101)]
    assert all(part.arrivals for part in divided(Batch(arrivals=arrivals), rules(policies={"order": "none"}), 4))
    assert [len(p.arrivals) for p in divided(Batch(arrivals=arrivals), rules(), 4) if p.arrivals] == [100]


def test_the_division_is_the_same_in_every_process() -> None:
    """Literal: it does not depend on the seed of Python's hashes."""
    parts = divided(Batch(arrivals=[arrival(i, str(i), 1) for i in range(8)]), rules(), 3)
    assert [[a.tag for a in part.arrivals] for part in parts] == [[0, 1, 3], [4, 5, 7], [2, 6]]


def test_what_is_no_event_is_quarantined_by_the_first_and_controls_are_in_no_part() -> None:
    first, second = divided(Batch(strangers=[stranger()], controls=[MARKS]), rules(), 2)
    assert (len(first.strangers), bool(second)) == (1, False)
    assert not first.controls


class Scripted:
    """An Applier that commits what it is given, when it is let."""

    def __init__(self, journal: list[str], name: str, error: Exception | None = None) -> None:
        self.journal = journal
        self.name = name
        self.error = error
        self.go = asyncio.Event()
        self.done = Stats()
        self.left_due = False
        self.collided = False
        self.worked_s = 0.0

    async def apply(self, batch: Batch) -> Stats:
        self.done = Stats()
        what = "controls" if batch.controls else "part"
        self.journal.append(f"{self.name} begins {what}")
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.journal.append(f"{self.name} cancelled")
            raise
        if self.error is not None:
            raise self.error
        self.journal.append(f"{self.name} ends {what}")
        self.done = Stats(applied=len(batch.arrivals), control=len(batch.controls))
        return self.done


class Pair:
    """Two appliers a and b, and a batch with something for each."""

    def __init__(self, error: Exception | None = None) -> None:
        self.journal: list[str] = []
        self.a, self.b = Scripted(self.journal, "a"), Scripted(self.journal, "b", error)
        self.appliers = Appliers([cast("Applier", self.a), cast("Applier", self.b)], rules())
        self.batch = Batch(arrivals=[arrival(tag, str(tag), 1) for tag in range(20)], controls=[MARKS])

    async def begin(self) -> asyncio.Task[Stats]:
        task = asyncio.create_task(self.appliers.apply(self.batch))
        for _ in range(5):
            await asyncio.sleep(0)
        assert sorted(self.journal) == ["a begins part", "b begins part"]
        return task


async def test_all_parts_are_at_work_at_the_same_time_and_controls_are_heeded_after_the_last() -> None:
    pair = Pair()
    task = await pair.begin()
    pair.b.go.set()
    await asyncio.sleep(0.001)
    assert not task.done()
    pair.a.go.set()
    assert await task == Stats(applied=20, control=1) == pair.appliers.done
    assert pair.journal[2:] == ["b ends part", "a ends part", "a begins controls", "a ends controls"]


async def test_a_batch_lasts_as_long_as_its_longest_part_and_its_controls() -> None:
    pair = Pair()
    pair.a.go.set()
    pair.b.go.set()
    pair.a.worked_s, pair.b.worked_s = 0.25, 2.0
    await pair.appliers.apply(Batch(arrivals=pair.batch.arrivals))
    assert pair.appliers.worked_s == 2
    await pair.appliers.apply(pair.batch)
    assert pair.appliers.worked_s == 2.25
    await pair.appliers.apply(Batch(controls=[MARKS]))
    assert pair.appliers.worked_s == 0.25


async def test_a_part_that_fails_leaves_the_others_to_their_work_and_then_all_has_failed() -> None:
    pair = Pair(PostgresUnavailable("no"))
    task = await pair.begin()
    pair.b.go.set()
    await asyncio.sleep(0.001)
    assert not task.done()
    pair.a.go.set()
    with pytest.raises(PostgresUnavailable, match="no"):
        await task
    assert pair.journal[2:] == ["a ends part"]  # no controls
    assert 0 < pair.appliers.done.applied < 20


async def test_cancelled_it_cancels_every_part() -> None:
    pair = Pair()
    task = await pair.begin()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(pair.journal[2:]) == ["a cancelled", "b cancelled"]


async def test_a_part_without_anything_is_not_begun() -> None:
    pair = Pair()
    pair.a.go.set()
    pair.b.go.set()
    one = Batch(arrivals=[arrival(1, "0", 1)])
    assert await pair.appliers.apply(one) == Stats(applied=1)
    assert len(pair.journal) == 2


async def test_after_collisions_batches_are_not_divided_for_longer_and_longer() -> None:
    """How many appliers were at work on each batch, while parts collide, and when they do so no more."""
    pair = Pair()
    pair.a.go.set()
    pair.b.go.set()

    async def at_work() -> int:
        pair.journal.clear()
        await pair.appliers.apply(Batch(arrivals=pair.batch.arrivals))
        return sum("begins" in line for line in pair.journal)

    pair.b.collided = True
    assert [await at_work() for _ in range(11)] == [2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 2]
    pair.b.collided = False
    assert [await at_work() for _ in range(12)] == [1] * 8 + [2] * 4
    for _ in range(3):
        await at_work()
    pair.b.collided = True
    assert [await at_work() for _ in range(3)] == [2, 1, 2]


async def test_batches_are_divided_again_after_a_bounded_number_of_others() -> None:
    pair = Pair()
    pair.a.go.set()
    pair.b.go.set()
    pair.a.collided = True
    longest = alone = 0
    for _ in range(400):
        pair.journal.clear()
        await pair.appliers.apply(Batch(arrivals=pair.batch.arrivals))
        alone = alone + 1 if len(pair.journal) == 2 else 0
        longest = max(longest, alone)
    assert longest == 64
