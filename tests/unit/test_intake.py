"""The intake receives and understands ahead of the batch at work: bounded, in the broker's order, and without outliving its session."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise

import pytest

from relay.control import Gone, Mark, Marks, Range, gone_message, marks_message
from relay.errors import BrokerUnavailable
from relay.inbox import intake
from relay.inbox.intake import Intake
from relay.inbox.overlap import Overlap
from relay.inbox.sequencer import Arrival
from relay.message import Delivery, Row, to_event, to_message
from relay.rabbitmq import subscription
from tests.harness.deliveries import delivered

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


class Broker:
    """Delivers what it is given; `asked` are the limits it was asked with."""

    def __init__(self, deliveries: Sequence[Delivery] = ()) -> None:
        self.waiting = list(deliveries)
        self.more = asyncio.Event()
        self.lost: BrokerUnavailable | None = None
        self.asked: list[int] = []
        self.acknowledged: list[int] = []

    def deliver(self, *deliveries: Delivery) -> None:
        self.waiting += deliveries
        self.more.set()

    def end(self) -> None:
        self.lost = BrokerUnavailable("cut")
        self.more.set()

    async def receive(self, limit: int) -> list[Delivery]:
        self.asked.append(limit)
        while not self.waiting and self.lost is None:
            self.more.clear()
            await self.more.wait()
        if self.lost is not None:
            raise self.lost
        taken, self.waiting = self.waiting[:limit], self.waiting[limit:]
        return taken

    def next_ready(self) -> Delivery | None:
        if self.lost is not None or not self.waiting:
            return None
        return self.waiting.pop(0)

    async def acknowledge(self, tag: int) -> None:
        self.acknowledged.append(tag)

    async def close(self) -> None:
        self.end()


def event(tag: int, *, body: bytes = b"{}") -> Delivery:
    row = Row(tag, "order", "1", tag, "T", "application/json", {}, None, NOON, body)
    return delivered(to_message(row, source="shop", routing_key="order.T"), tag)


async def all_idle() -> None:
    """Until every task waits for something from outside."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_what_comes_is_taken_in_order_each_kind_in_its_place() -> None:
    marks = delivered(marks_message(Marks(source="shop", marks=(Mark("order", "1", 3),)), routing_key="k", at=NOON), 2)
    gone = delivered(
        gone_message(Gone(source="shop", reason="unknown", ranges=(Range("a", "1", 1, 2),)), reply_to="q", at=NOON), 5
    )
    foreign = event(3)._replace(headers={})
    broker = Broker([event(1), marks, foreign, event(4), gone])
    async with Intake(broker, ahead=10).running() as ready:
        await ready.wait()
        taken = ready.take(10)
    assert [a.tag for a in taken.batch.arrivals] == [1, 4]
    assert [s.reason for s in taken.batch.strangers] == ["foreign"]
    assert [type(c) for c in taken.batch.controls] == [Marks, Gone]
    assert (taken.received, taken.tag) == (5, 5)


async def test_the_next_batch_is_understood_while_nobody_asks_for_it_up_to_what_was_agreed() -> None:
    broker = Broker([event(tag) for tag in range(1, 11)])
    async with Intake(broker, ahead=4).running() as ready:
        await all_idle()
        assert len(broker.waiting) == 6
        await ready.wait()
        first = ready.take(3)
        await all_idle()
        assert len(broker.waiting) == 3
        second = ready.take(100)
    assert [a.tag for a in first.batch.arrivals] == [1, 2, 3]
    assert [a.tag for a in second.batch.arrivals] == [4, 5, 6, 7]
    assert (first.tag, second.tag) == (3, 7)


async def test_a_batch_is_topped_up_with_what_comes_before_it_is_taken() -> None:
    broker = Broker([event(1)])
    async with Intake(broker, ahead=10).running() as ready:
        await ready.wait()
        broker.deliver(event(2), event(3))
        await all_idle()
        assert ready.take(10).received == 3


async def test_large_messages_are_bounded_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is received while so many bytes wait, and no batch has more, unless one message has."""
    for module in (intake, subscription):
        monkeypatch.setattr(module, "BATCH_BYTES", 100)
    monkeypatch.setattr(intake, "_BESIDE_BYTES", 0)
    monkeypatch.setattr(intake, "_PORTION", 1)
    broker = Broker([event(tag, body=b"x" * 60) for tag in range(1, 6)] + [event(6, body=b"x" * 500)])
    sizes: list[int] = []
    async with Intake(broker, ahead=10).running() as ready:
        await all_idle()
        assert len(broker.waiting) == 4
        while sum(sizes) < 6:
            await ready.wait()
            sizes.append(ready.take(10).received)
    assert sizes == [1, 1, 1, 1, 1, 1]


async def test_others_have_their_turn_between_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that has more at once does not keep PostgreSQL's answers waiting for a whole batch."""
    monkeypatch.setattr(intake, "_PORTION", 2)
    broker = Broker([event(tag) for tag in range(1, 9)])
    async with Intake(broker, ahead=8).running():
        left = [8]
        while broker.waiting:
            await asyncio.sleep(0)
            left.append(len(broker.waiting))
    assert max(before - after for before, after in pairwise(left)) == 2


async def test_the_end_of_the_session_is_told_at_once_also_when_something_is_ready() -> None:
    """It could not be acknowledged any more, and is delivered again."""
    broker = Broker([event(1)])
    async with Intake(broker, ahead=10).running() as ready:
        await ready.wait()
        broker.end()
        await all_idle()
        with pytest.raises(BrokerUnavailable, match="cut"):
            await ready.wait()


async def test_who_waits_is_told_of_the_end() -> None:
    broker = Broker()
    async with Intake(broker, ahead=10).running() as ready:
        waiting = asyncio.create_task(ready.wait())
        await all_idle()
        broker.end()
        with pytest.raises(BrokerUnavailable, match="cut"):
            await waiting


async def test_nothing_is_received_after_the_end() -> None:
    broker = Broker()
    async with Intake(broker, ahead=10).running() as ready:
        await all_idle()
    broker.deliver(event(1))
    await all_idle()
    assert broker.waiting == [event(1)]
    with pytest.raises(BrokerUnavailable, match="stopped"):
        await ready.wait()


async def one_call(overlap: Overlap) -> None:
    overlap.begins()
    await asyncio.sleep(0)


async def test_while_handlers_are_called_one_by_one_each_call_brings_one_and_the_portions_rest() -> None:
    broker, overlap = Broker([event(1)]), Overlap()
    async with Intake(broker, ahead=10, overlap=overlap).running() as ready:
        await ready.wait()
        assert ready.take(1).tag == 1
        await all_idle()
        with overlap.calls():
            broker.waiting += [event(tag) for tag in range(2, 8)]  # unannounced: the intake waits for the first of them
            await one_call(overlap)
            await one_call(overlap)
            assert [delivery.tag for delivery in broker.waiting] == [4, 5, 6, 7]
            broker.more.set()
            await all_idle()  # now it has seen the rest, and rests itself
            broker.deliver(event(8), event(9))
            await all_idle()
            assert [delivery.tag for delivery in broker.waiting] == [8, 9]
            await one_call(overlap)
            assert [delivery.tag for delivery in broker.waiting] == [9]
        await all_idle()
        assert [a.tag for a in ready.take(10).batch.arrivals] == [2, 3, 4, 5, 6, 7, 8, 9]


async def test_small_messages_count_for_more_than_their_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a batch of them would be more than half of what the consumer may hold, and the next could not come meanwhile."""
    for module in (intake, subscription):
        monkeypatch.setattr(module, "BATCH_BYTES", 3 * (4096 + 2))
    async with Intake(Broker([event(tag) for tag in range(1, 8)]), ahead=10).running() as ready:
        await ready.wait()
        assert ready.take(10).received == 3


async def test_steps_keep_to_what_was_agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "BATCH_BYTES", 100)
    monkeypatch.setattr(intake, "_BESIDE_BYTES", 0)
    for body, fits in (b"{}", 4), (b"x" * 60, 2):
        broker, overlap = Broker([]), Overlap()
        async with Intake(broker, ahead=4, overlap=overlap).running() as ready:
            await all_idle()
            broker.waiting += [event(tag, body=body) for tag in range(1, 11)]
            with overlap.calls():
                for _ in range(10):
                    await one_call(overlap)
            assert len(broker.waiting) == 10 - fits
            await ready.wait()
            assert ready.take(10).received == fits


async def test_what_a_step_fails_with_ends_the_session_and_nothing_after_it_is_handed_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An acknowledgement covers all before it: of what is lost here, too."""
    broker, overlap = Broker([event(1)]), Overlap()

    def understood(delivery: Delivery) -> Arrival:
        if delivery.tag == 2:
            raise ZeroDivisionError
        return Arrival(to_event(delivery), delivery.tag)

    monkeypatch.setattr(intake, "_understood", understood)
    async with Intake(broker, ahead=10, overlap=overlap).running() as ready:
        await all_idle()
        with overlap.calls():
            broker.waiting.append(event(2))
            await one_call(overlap)
            broker.deliver(event(3))
        await all_idle()
        with pytest.raises(ZeroDivisionError):
            await ready.wait()
        assert ready.take(10).tag == 1


async def test_the_end_of_the_session_between_calls_is_told_when_they_are_over() -> None:
    broker, overlap = Broker([event(1)]), Overlap()
    async with Intake(broker, ahead=10, overlap=overlap).running() as ready:
        await ready.wait()
        with overlap.calls():
            broker.end()
            await one_call(overlap)
        await all_idle()
        with pytest.raises(BrokerUnavailable, match="cut"):
            await ready.wait()
