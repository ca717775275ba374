"""Trying parked rows again: it does not spin, and leaves live traffic its share of the time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import structlog

from relay.message import Message, Row
from relay.outbox.blocked import Blocked
from relay.outbox.pause import Pauses
from relay.outbox.progress import Progress
from relay.outbox.retry import Retry
from relay.outbox.routing import route
from relay.outbox.store import Due, Store
from relay.rabbitmq.contract import Confirmed, Outcome, Publisher
from relay.settings import OutboxSettings
from tests.unit.test_parking import rows


class Table:
    """Parked rows that are due and never leave: counts how often it is asked."""

    def __init__(self, due: list[Due]) -> None:
        self.rows = due
        self.asked = 0
        self.portions: list[int] = []  # how many aggregates were asked for, each time

    async def pauses(self) -> Pauses:
        return Pauses()

    async def blocked(self) -> dict[Any, tuple[int, int]]:
        return {d.row.aggregate: (1, 0) for d in self.rows}

    async def reconcile(self, _pauses: Pauses) -> bool:
        return False

    async def next_attempt_s(self) -> float:
        return -1.0

    async def due(self, aggregates: int) -> list[Due]:
        self.asked += 1
        self.portions.append(aggregates)
        return self.rows

    async def unpark(self, published: Sequence[Row], _refused: object) -> tuple[dict[int, bool], dict[Any, bool]]:
        return {}, {row.aggregate: True for row in published}  # they never leave


class Hanging:
    """A publisher that never answers."""

    lost = None
    message_is_suspect = False

    async def publish(self, messages: Sequence[Message]) -> list[Outcome]:
        await asyncio.Event().wait()
        raise AssertionError


class Clock:
    """The event loop's clock, as the test sets it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now


class Slow:
    """A publisher that confirms everything, and takes its time for it."""

    lost = None
    message_is_suspect = False

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock = clock
        self.seconds = seconds
        self.spent = 0.0

    async def publish(self, messages: Sequence[Message]) -> list[Outcome]:
        self.clock.now += self.seconds
        self.spent += self.seconds
        return [Confirmed() for _ in messages]


@asynccontextmanager
async def no_probe() -> AsyncIterator[Publisher]:
    yield cast("Publisher", Hanging())


def a_retry(table: Table, publisher: object, *, probe: Any = no_probe, clock: Clock | None = None) -> Retry:
    store = cast("Store", table)
    blocked = Blocked(store=store, shard=0)
    retry = Retry(
        store=store,
        blocked=blocked,
        publisher=cast("Publisher", publisher),
        probe=probe,
        message=lambda row: route(row, source="s", template="{event_type}"),
        settings=OutboxSettings(),
        progress=Progress(),
        wake=lambda: None,
        log=structlog.get_logger(),
    )
    if clock is not None:
        retry._clock = blocked._clock = clock.time
    return retry


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize(("portion_s", "page_s"), [(0.1, 0.2), (0.5, 0.05), (0.01, 0.2)])
async def test_beside_live_traffic_retries_take_at_most_a_ninth_of_the_time(
    clock: Clock, portion_s: float, page_s: float
) -> None:
    table = Table([Due(row, 1, alone=False) for row in rows(*(f"a{n}" for n in range(10)))])
    publisher = Slow(clock, portion_s)
    retry = a_retry(table, publisher, clock=clock)
    await retry.look()
    begun = clock.now
    while clock.now - begun < 100:  # as the shard does: a page of new rows, then what is due
        clock.now += page_s
        retry.saw_traffic()
        await retry.step()
    share = publisher.spent / (clock.now - begun)
    assert share <= 1 / 9 + 0.01
    assert share >= 0.4 * min(1 / 9, portion_s / (portion_s + page_s)), "retries starved"


async def test_with_nothing_beside_it_a_retry_has_all_the_time_in_larger_portions(clock: Clock) -> None:
    table = Table([Due(row, 1, alone=False) for row in rows("a")])
    retry = a_retry(table, Slow(clock, 0.1), clock=clock)
    await retry.look()
    retry.saw_traffic()
    await retry.step()
    await retry.step()  # its share of the second is used up
    assert len(table.portions) == 1
    clock.now += 1.01  # no traffic for a second
    assert retry.within(60) == 0
    for _ in range(5):
        await retry.step()
    beside, *alone = table.portions
    assert len(alone) == 5
    assert alone[0] > beside


async def test_a_shard_without_anything_else_to_do_sleeps_until_the_next_portion_may_begin(clock: Clock) -> None:
    table = Table([Due(row, 1, alone=False) for row in rows("a")])
    retry = a_retry(table, Slow(clock, 0.1), clock=clock)
    await retry.look()
    retry.saw_traffic()
    await retry.step()
    assert retry.within(60) == pytest.approx(0.8)  # not zero: that would be spinning


async def test_more_suspects_than_are_tried_alone_at_once_do_not_make_it_spin() -> None:
    table = Table([Due(row, 1, alone=True) for row in rows(*(f"a{n}" for n in range(11)))])

    @asynccontextmanager
    async def probe() -> AsyncIterator[Publisher]:
        yield cast("Publisher", Hanging())

    retry = a_retry(table, Hanging(), probe=probe)
    await retry.look()
    for _ in range(50):
        await retry.step()
    assert table.asked == 2  # once to begin, once to see that the eleventh must wait
    assert retry.within(60) > 0.5
    await retry.close()
