"""Trying parked rows again: it does not spin, and leaves live traffic its share of the time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import structlog

from relay.errors import BrokerUnavailable
from relay.message import SEQUENCE, TOMBSTONE, Message, Row
from relay.outbox.blocked import Blocked
from relay.outbox.pause import Pauses
from relay.outbox.progress import Progress
from relay.outbox.retry import Retry
from relay.outbox.routing import route
from relay.outbox.store import Due, Store
from relay.rabbitmq.contract import Confirmed, Nacked, Outcome, Publisher, Refused, Unknown
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

    async def next_attempts_s(self, _suspects: Sequence[int]) -> tuple[float | None, float | None]:
        return -1.0, None

    async def due(self, aggregates: int, _suspects: Sequence[int]) -> list[Due]:
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


def a_retry(
    table: Table,
    publisher: object,
    *,
    probe: Any = no_probe,
    clock: Clock | None = None,
    progress: Progress | None = None,
) -> Retry:
    store = cast("Store", table)
    blocked = Blocked(store=store, shard=0)
    retry = Retry(
        store=store,
        blocked=blocked,
        publisher=cast("Publisher", publisher),
        probe=probe,
        message=lambda row: route(row, source="s", template="{event_type}"),
        settings=OutboxSettings(),
        progress=progress or Progress(),
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
    table = Table([Due(row, 1) for row in rows(*(f"a{n}" for n in range(10)))])
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
    table = Table([Due(row, 1) for row in rows("a")])
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
    table = Table([Due(row, 1) for row in rows("a")])
    retry = a_retry(table, Slow(clock, 0.1), clock=clock)
    await retry.look()
    retry.saw_traffic()
    await retry.step()
    assert retry.within(60) == pytest.approx(0.8)  # not zero: that would be spinning


class Parked(Table):
    """Rows that leave when they are published; `alone` are tried alone, and wait long when they are refused again."""

    def __init__(self, due: list[Due], *, alone: Sequence[int] = ()) -> None:
        super().__init__(due)
        self.alone = set(alone)
        self.delayed: set[int] = set()

    def _due(self, suspects: Sequence[int], *, alone: bool) -> list[Due]:
        found = [d for d in self.rows if d.row.id not in self.delayed]
        return [d for d in found if (d.row.id in self.alone or d.row.id in suspects) == alone]

    async def next_attempts_s(self, suspects: Sequence[int]) -> tuple[float | None, float | None]:
        together, alone = (self._due(suspects, alone=alone) for alone in (False, True))
        return -1.0 if together else None, -1.0 if alone else None

    async def due(self, aggregates: int, suspects: Sequence[int]) -> list[Due]:
        self.asked += 1
        return self._due(suspects, alone=False)[:aggregates]

    async def due_alone(self, suspects: Sequence[int]) -> Due | None:
        self.asked += 1
        return next(iter(self._due(suspects, alone=True)), None)

    async def unpark(self, published: Sequence[Row], refused: Any) -> tuple[dict[int, bool], dict[Any, bool]]:
        gone = {row.id: True for row in published}
        self.rows = [d for d in self.rows if d.row.id not in gone]
        self.delayed |= {parked.row.id for parked, _ in refused}
        return gone, {parked.row.aggregate: True for parked, _ in refused}


class Broker:
    """Opens publishers that close over one poisonous row, as the contract says it. Tells what was sent alone, and what in all."""

    def __init__(self, poison: int | None = None) -> None:
        self.poison = poison
        self.alone: list[int] = []
        self.sent: list[Message] = []
        self.may_open = asyncio.Event()
        self.may_open.set()

    @asynccontextmanager
    async def probe(self) -> AsyncIterator[Publisher]:
        publisher = self.open()
        await self.may_open.wait()
        yield cast("Publisher", publisher)
        self.alone += publisher.sent

    def open(self) -> Poisoned:
        return Poisoned(self)


class Poisoned:
    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.lost: Exception | None = None
        self.sent: list[int] = []

    @property
    def message_is_suspect(self) -> bool:
        return self.lost is not None

    async def publish(self, messages: Sequence[Message]) -> list[Outcome]:
        ids = [cast("int", m.headers[SEQUENCE]) for m in messages]
        self.sent += ids
        self.broker.sent += messages
        if self.broker.poison not in ids:
            return [Confirmed() for _ in messages]
        self.lost = RuntimeError("the channel was closed")
        return [Unknown("gone")] * len(messages) if len(messages) > 1 else [Refused("refused", "too large")]


async def test_many_rows_to_be_tried_alone_do_not_make_it_spin() -> None:
    table = Parked([Due(row, 1) for row in rows(*(f"a{n}" for n in range(11)))], alone=range(1, 12))
    retry = a_retry(table, Hanging())
    await retry.look()
    for _ in range(50):
        await retry.step()
        await asyncio.sleep(0)
    assert table.asked == 2  # whether there is one to be tried alone, and which, once its connection is open
    assert retry.within(60) > 5  # its answer wakes the shard
    await retry.close()


async def test_others_do_not_wait_for_what_is_tried_alone() -> None:
    table = Parked([Due(row, 1) for row in rows(*(f"a{n}" for n in range(40)))], alone=range(1, 40))
    broker = Broker()
    retry = a_retry(table, broker.open())
    await retry.look()
    await retry.step()
    assert [m.headers[SEQUENCE] for m in broker.sent] == [40]
    await retry.close()


async def test_a_row_that_was_skipped_while_the_connection_was_being_opened_is_not_sent_as_it_was() -> None:
    skipped, gone = rows("a", "b")
    table = Parked([Due(skipped, 1), Due(gone, 1)], alone=[1, 2])
    broker = Broker()
    broker.may_open.clear()
    retry = a_retry(table, Hanging(), probe=broker.probe)
    await retry.look()
    await retry.step()
    table.rows = [Due(skipped._replace(is_tombstone=True, body=b""), 1)]
    broker.may_open.set()
    await _steps(retry)
    assert [(m.event_type, m.body) for m in broker.sent] == [(TOMBSTONE, b"")]


async def test_when_nothing_is_left_to_be_tried_alone_the_open_connection_is_closed_unused() -> None:
    table = Parked([Due(row, 1) for row in rows("a")], alone=[1])
    broker = Broker()
    broker.may_open.clear()
    retry = a_retry(table, Hanging(), probe=broker.probe)
    await retry.look()
    await retry.step()
    table.rows = []
    broker.may_open.set()
    await _steps(retry)
    assert broker.sent == []
    assert not retry.busy


@pytest.mark.parametrize("place", [1, 3])
async def test_suspects_are_tried_alone_until_the_one_that_closes_the_channel_is_found(place: int) -> None:
    table = Parked([Due(row, 1) for row in rows(*(f"a{n}" for n in range(100)))])
    broker = Broker(poison=place)
    progress = Progress()
    first = a_retry(table, broker.open(), probe=broker.probe, progress=progress)
    await first.look()
    await first.step()
    assert len(progress.suspects) == 20
    second = a_retry(table, broker.open(), probe=broker.probe, progress=progress)
    await second.look()
    await _steps(second)
    assert broker.alone == list(range(1, place + 1))
    assert [d.row.id for d in table.rows] == [place]
    assert progress.suspects == {}


async def test_what_was_late_stays_suspect_when_another_row_is_found_that_closes_the_channel() -> None:
    """Sent together again, it would hold up the whole shard for another confirm time-out."""
    table = Parked([Due(row, 1) for row in rows("a", "b", "c")])
    broker = Broker(poison=1)
    progress = Progress(suspects={1: "closed", 2: "closed", 3: "late"})
    retry = a_retry(table, broker.open(), probe=broker.probe, progress=progress)
    await retry.look()
    await _steps(retry)
    assert broker.alone == [1, 3]


class Full:
    """A publisher whose queue is said to be full."""

    lost = None
    message_is_suspect = False

    def __init__(self) -> None:
        self.sent: list[int] = []

    async def publish(self, messages: Sequence[Message]) -> list[Outcome]:
        self.sent += [cast("int", m.headers[SEQUENCE]) for m in messages]
        return [Nacked() for _ in messages]

    @asynccontextmanager
    async def probe(self) -> AsyncIterator[Publisher]:
        yield cast("Publisher", self)


class Refusing:
    """Instead of a publisher: the broker takes no further connection."""

    async def __aenter__(self) -> Publisher:
        raise BrokerUnavailable("connection limit")

    async def __aexit__(self, *_: object) -> None:
        return None


async def test_a_session_that_refuses_what_is_taken_on_a_new_channel_ends() -> None:
    table = Parked([Due(row, 2) for row in rows("a", "b")])
    session, broker = Full(), Broker()
    retry = a_retry(table, session, probe=broker.probe)
    await retry.look()
    with pytest.raises(BrokerUnavailable, match="nack"):
        await _steps(retry)
    assert (session.sent, broker.alone) == ([1, 2], [1])
    assert [d.row.id for d in table.rows] == [2], "what was taken is parked no more"


async def test_a_row_that_is_refused_there_as_well_waits_for_its_next_attempt() -> None:
    table = Parked([Due(row, 2) for row in rows("a", "b")])
    session, elsewhere = Full(), Full()
    retry = a_retry(table, session, probe=elsewhere.probe)
    await retry.look()
    await _steps(retry)
    assert (session.sent, elsewhere.sent) == ([1, 2], [1])
    assert table.delayed == {1, 2}


async def test_a_doubt_that_cannot_be_settled_is_dropped_and_the_row_is_tried_in_the_session_again() -> None:
    table = Parked([Due(row, 2) for row in rows("a")])
    session = Full()
    retry = a_retry(table, session, probe=Refusing)
    await retry.look()
    await _steps(retry)
    assert session.sent == [1, 1]
    assert table.delayed == {1}


async def test_what_hangs_and_waits_to_be_tried_alone_does_not_hold_up_what_is_said_to_be_full() -> None:
    table = Parked([Due(row, 2) for row in rows("a", "b")], alone=[1])
    session = Full()
    retry = a_retry(table, session)  # its answer to the first one never comes
    await retry.look()
    await _steps(retry)
    assert session.sent == [2]
    assert table.delayed == {2}
    await retry.close()


async def _steps(retry: Retry) -> None:
    for _ in range(50):
        await retry.step()
        await asyncio.sleep(0)


class Slowly(Table):
    """A look at it takes a second."""

    def __init__(self, clock: Clock) -> None:
        super().__init__([Due(row, 1) for row in rows("a")])
        self.clock = clock
        self.looks = 0
        self.paused: frozenset[int] = frozenset()

    async def pauses(self) -> Pauses:
        return Pauses(shards=self.paused)

    async def blocked(self) -> dict[Any, tuple[int, int]]:
        self.clock.now += 1.0
        self.looks += 1
        return await super().blocked()


async def test_acts_are_looked_at_at_once_and_however_many_there_are_take_a_sixth_of_the_time(clock: Clock) -> None:
    table = Slowly(clock)
    blocked = Blocked(store=cast("Store", table), shard=0)
    blocked._clock = clock.time
    await blocked.look()
    clock.now += 6
    await blocked.heed()
    assert blocked.look_at <= clock.now  # the first one
    table.looks, begun = 0, clock.now
    while clock.now - begun < 100:
        await blocked.heed()
        if clock.now >= blocked.look_at:
            await blocked.look()
        clock.now += 0.01
    assert 15 <= table.looks <= 18


async def test_a_pause_is_known_at_once_though_a_look_is_not_yet_due_again(clock: Clock) -> None:
    table = Slowly(clock)
    blocked = Blocked(store=cast("Store", table), shard=0)
    blocked._clock = clock.time
    await blocked.look()
    table.paused = frozenset({0})
    await blocked.heed()
    assert blocked.shard_is_paused
    assert clock.now < blocked.look_at <= clock.now + 5
    assert blocked.may_change_unseen
