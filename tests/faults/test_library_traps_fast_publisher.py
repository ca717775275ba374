"""The traps of the publishing side (see the table in test_library_traps.py) that are the fast lane's alone, against a broker that
does what a test says. What it has in common with the stock publisher is in test_library_traps_publisher.py.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from relay.errors import BrokerUnavailable, RelayError
from relay.rabbitmq import fast_publisher
from relay.rabbitmq.contract import Confirmed, Nacked, Outcome, Refused, Returned, Unknown
from relay.rabbitmq.fast_publisher import FastPublisher
from relay.rabbitmq.wire.ledger import Batch
from tests.faults.test_library_traps_publisher import MEGABYTE, message, messages, seen, turns, until
from tests.harness.loop_clock import LoopClock, loop_clock
from tests.harness.stub_broker import Line, Published, StubBroker, silence, stub_broker


@asynccontextmanager
async def publisher_to(
    broker: StubBroker, *, confirm_timeout_s: float = 5, **settings: Any
) -> AsyncIterator[FastPublisher]:
    publisher = await FastPublisher.open(broker.settings(**settings), confirm_timeout_s=confirm_timeout_s, name="traps")
    try:
        yield publisher
    finally:
        await publisher.close()


def kinds(outcomes: list[Outcome]) -> list[type[Outcome]]:
    return [type(outcome) for outcome in outcomes]


def names(line: Line) -> list[str]:
    return [published.message_id for published in line.published]


async def test_a_broker_may_send_larger_frames_than_is_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes back is in frames of the broker's frame_max: refused as garbled, one such message would end each session."""
    monkeypatch.setattr("tests.harness.stub_broker.FRAME_MAX", 4 * 1024 * 1024)

    def give_back(line: Line, published: Published) -> None:
        line.give_back(published)
        line.ack(published.tag)

    async with stub_broker(give_back) as broker, publisher_to(broker) as publisher:
        (outcome,) = await publisher.publish([message("m0")._replace(body=b"1" * (3 * 1024 * 1024))])
        assert isinstance(outcome, Returned)
        assert publisher.lost is None


async def alarm(broker: StubBroker, publisher: FastPublisher, clock: LoopClock, *, lasts_s: float) -> None:
    """Have one, and its end."""
    broker.last.block()
    await until(lambda: publisher._transport.blocked)
    await clock.forward(lasts_s)
    broker.last.unblock()
    await until(lambda: not publisher._transport.blocked)


# --- several calls at once


async def test_a_second_call_is_written_before_the_first_is_answered_and_behind_it() -> None:
    async with stub_broker(silence) as broker, publisher_to(broker) as publisher:
        first = asyncio.create_task(publisher.publish(messages(600)))
        second = asyncio.create_task(publisher.publish([message(f"n{n}") for n in range(3)]))
        await broker.last.until(seen(603))
        assert names(broker.last) == [f"m{n}" for n in range(600)] + ["n0", "n1", "n2"]
        broker.last.ack(603)  # the last one alone, then the rest of its call
        broker.last.ack(601)
        broker.last.ack(602)
        assert await second == [Confirmed()] * 3
        assert not first.done()
        broker.last.ack(600, multiple=True)
        assert await first == [Confirmed()] * 600


async def test_each_call_has_the_outcomes_of_its_own_messages() -> None:
    async with stub_broker(silence) as broker, publisher_to(broker) as publisher:
        calls = [asyncio.create_task(publisher.publish([message(f"{c}{n}") for n in range(3)])) for c in "abc"]
        await broker.last.until(seen(9))
        line = broker.last
        line.give_back(line.published[4])
        line.nack(2, multiple=True)
        line.ack(9, multiple=True)
        assert [kinds(await call) for call in calls] == [
            [Nacked, Nacked, Confirmed],
            [Confirmed, Returned, Confirmed],
            [Confirmed] * 3,
        ]


@pytest.mark.parametrize("which", [0, 1, 2])
async def test_cancelling_one_call_ends_the_session_and_with_it_the_others(
    which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_publisher, "IN_FLIGHT", 2)  # so that the second waits for room, and the third for its turn
    async with stub_broker(silence) as broker, publisher_to(broker) as publisher:
        calls = [asyncio.create_task(publisher.publish([message(f"{c}{n}") for n in range(2)])) for c in "abc"]
        await broker.last.until(seen(2))
        calls.pop(which).cancel()
        async with asyncio.timeout(2):
            assert [kinds(await call) for call in calls] == [[Unknown, Unknown]] * 2
        assert isinstance(publisher.lost, BrokerUnavailable)
        assert not publisher.message_is_suspect


async def test_a_call_that_never_had_its_turn_is_unknown_and_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_publisher, "IN_FLIGHT", 2)
    async with stub_broker(silence) as broker, publisher_to(broker, confirm_timeout_s=0.2) as publisher:
        first, second = await asyncio.gather(
            publisher.publish([message("a"), message("b")]), publisher.publish([message("c")])
        )
        assert first == [Unknown("2 messages were not confirmed within 0.2 s", timed_out=True)] * 2
        assert second == [Unknown("2 messages were not confirmed within 0.2 s")]


async def test_the_time_for_the_answers_counts_from_a_calls_own_last_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_publisher, "IN_FLIGHT", 2)
    monkeypatch.setattr(fast_publisher, "_WRITE", 2)
    async with stub_broker(silence) as broker, publisher_to(broker, confirm_timeout_s=10) as publisher:
        with loop_clock() as clock:
            publishing = asyncio.create_task(publisher.publish(messages(6)))
            for written in (2, 4):
                await broker.last.until(seen(written))
                await clock.forward(8)
                broker.last.ack(written, multiple=True)
            await broker.last.until(seen(6))
            await clock.forward(8)
            assert publisher.lost is None
            await clock.until(publishing.done, at_most_s=4)
            assert kinds(publishing.result()) == [Confirmed] * 4 + [Unknown] * 2


async def test_while_a_long_call_is_written_everybody_else_has_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_publisher, "_WRITE", 10)
    async with stub_broker(silence) as broker, publisher_to(broker) as publisher:
        publishing = asyncio.create_task(publisher.publish(messages(100)))
        await turns(3)
        assert 0 < publisher._ledger.unanswered < 100
        await broker.last.until(seen(100))
        broker.last.ack(0, multiple=True)
        assert await publishing == [Confirmed()] * 100


# --- G: what is in flight is ours to bound


class TestG:
    async def test_it_is_bounded_in_messages_over_all_calls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fast_publisher, "IN_FLIGHT", 600)
        async with stub_broker(silence) as broker, publisher_to(broker, confirm_timeout_s=30) as publisher:
            calls = [asyncio.create_task(publisher.publish([message(f"{c}{n}") for n in range(500)])) for c in "abc"]
            await broker.last.until(seen(500))
            await asyncio.sleep(0.05)  # long enough for more, if more were sent
            assert len(broker.last.published) == 500
            broker.last.ack(400, multiple=True)
            await broker.last.until(seen(1000))
            await asyncio.sleep(0.05)
            assert len(broker.last.published) == 1000
            broker.last.cut()
            outcomes = [outcome for call in calls for outcome in await call]
            assert kinds(outcomes) == [Confirmed] * 400 + [Unknown] * 1100

    async def test_it_is_bounded_in_bytes_over_all_calls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fast_publisher, "IN_FLIGHT_BYTES", 3_500_000)
        async with stub_broker(silence) as broker, publisher_to(broker, confirm_timeout_s=30) as publisher:
            calls = [
                asyncio.create_task(publisher.publish([message(f"{c}{n}", body=MEGABYTE) for n in range(2)]))
                for c in "abc"
            ]
            await broker.last.until(seen(3))
            await asyncio.sleep(0.05)
            assert len(broker.last.published) == 3
            broker.last.ack(1)
            await broker.last.until(seen(4))
            await asyncio.sleep(0.05)
            assert names(broker.last) == ["a0", "a1", "b0", "b1"]
            broker.last.cut()
            assert [kinds(await call) for call in calls] == [[Confirmed, Unknown], [Unknown] * 2, [Unknown] * 2]

    async def test_a_message_that_is_larger_than_the_bound_goes_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fast_publisher, "IN_FLIGHT_BYTES", 500_000)
        async with stub_broker() as broker, publisher_to(broker) as publisher:
            assert await publisher.publish([message(f"m{n}", body=MEGABYTE) for n in range(3)]) == [Confirmed()] * 3

    async def test_what_a_call_needed_is_gone_when_it_ends_without_the_garbage_collector(self) -> None:
        async with stub_broker() as broker, publisher_to(broker) as publisher:
            gc.collect()
            gc.disable()
            try:
                await publisher.publish(messages(300))
                assert not any(isinstance(thing, Batch) for thing in gc.get_objects())
            finally:
                gc.enable()


# --- A: tags


class TestA:
    async def test_refused_messages_have_their_own_places_also_in_a_session_that_ends(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fast_publisher, "IN_FLIGHT", 2)
        monkeypatch.setattr(fast_publisher, "_WRITE", 2)
        async with stub_broker(silence) as broker, publisher_to(broker) as publisher:
            bad = {0, 2, 3, 5}
            batch = [message(f"m{n}", routing_key="k" * 256 if n in bad else "k") for n in range(9)]
            publishing = asyncio.create_task(publisher.publish(batch))
            await broker.last.until(seen(2))
            assert names(broker.last) == ["m1", "m4"]
            broker.last.ack(1)
            broker.last.nack(2)
            await broker.last.until(seen(4))
            broker.last.cut()
            assert kinds(await publishing) == [Refused, Confirmed, Refused, Refused, Nacked, Refused] + [Unknown] * 3

    async def test_nothing_is_published_through_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("aiormq.Channel.basic_publish", None)
        async with stub_broker() as broker, publisher_to(broker) as publisher:
            assert await publisher.publish(messages(2)) == [Confirmed()] * 2


# --- B: a returned message is told by its id


class TestB:
    async def test_a_return_counts_although_the_session_ends_before_its_ack(self) -> None:
        async with stub_broker(silence) as broker, publisher_to(broker) as publisher:
            publishing = asyncio.create_task(publisher.publish(messages(2)))
            await broker.last.until(seen(2))
            broker.last.give_back(broker.last.published[1])
            await until(lambda: bool(publisher._ledger._open[0].returned))
            broker.last.cut()
            assert kinds(await publishing) == [Unknown, Returned]

    @pytest.mark.parametrize("changes", [{"message_id": "stranger"}, {"message_id": None}], ids=str)
    async def test_a_return_that_nobody_in_flight_accounts_for_ends_the_session(self, changes: dict[str, Any]) -> None:
        """Whoever it belongs to would be confirmed by the ack that follows."""
        async with stub_broker(silence) as broker, publisher_to(broker) as publisher:
            publishing = asyncio.create_task(publisher.publish(messages(2)))
            await broker.last.until(seen(2))
            given_back = broker.last.published[0]
            given_back.properties.message_id = changes["message_id"]
            broker.last.give_back(given_back)
            broker.last.ack(2, multiple=True)
            assert kinds(await publishing) == [Unknown, Unknown]
            assert "answered wrongly" in str(publisher.lost)
            assert "not in flight" in str(publisher.lost)


# --- E: heartbeats


class TestE:
    async def test_a_connection_on_which_only_confirms_come_lives(self) -> None:
        """None of them reaches aiormq, whose watchdog would take the connection for dead."""
        async with stub_broker() as broker, publisher_to(broker, heartbeat_s=5) as publisher:
            with loop_clock() as clock:
                for n in range(30):
                    assert await publisher.publish([message(f"m{n}")]) == [Confirmed()]
                    await clock.forward(2)
                assert publisher.lost is None


# --- F: a broker with an alarm


class TestF:
    async def test_the_time_for_the_answers_stands_still_during_an_alarm(self) -> None:
        """One that ends just before the time-out leaves the broker all of the time that it had."""
        async with stub_broker(silence) as broker, publisher_to(broker, confirm_timeout_s=10) as publisher:
            with loop_clock() as clock:
                publishing = asyncio.create_task(publisher.publish(messages(2)))
                await broker.last.until(seen(2))
                await alarm(broker, publisher, clock, lasts_s=9.5)
                await clock.forward(9)
                broker.last.ack(2, multiple=True)
                assert await publishing == [Confirmed()] * 2

    async def test_what_is_written_during_an_alarm_has_all_of_the_time_after_it(self) -> None:
        async with stub_broker(silence) as broker, publisher_to(broker, confirm_timeout_s=10) as publisher:
            with loop_clock() as clock:
                broker.last.block()
                await until(lambda: publisher._transport.blocked)
                publishing = asyncio.create_task(publisher.publish(messages(2)))
                await clock.forward(9.5)
                broker.last.unblock()
                await broker.last.until(seen(2))
                await clock.forward(9)
                broker.last.ack(2, multiple=True)
                assert await publishing == [Confirmed()] * 2

    async def test_a_queue_that_hangs_is_found_although_alarms_come_and_go(self) -> None:
        async with stub_broker(silence) as broker, publisher_to(broker, confirm_timeout_s=10) as publisher:
            with loop_clock() as clock:
                publishing = asyncio.create_task(publisher.publish(messages(2)))
                await broker.last.until(seen(2))
                for _ in range(3):
                    await clock.forward(3)
                    await alarm(broker, publisher, clock, lasts_s=9)
                    assert not publishing.done()
                await clock.forward(1.5)
                async with asyncio.timeout(1):
                    assert [isinstance(o, Unknown) and o.timed_out for o in await publishing] == [True] * 2


# --- how a session ends, and who is to blame


ENDS: dict[str, tuple[Callable[[Line], None], str, bool]] = {
    "a message that is too large": (lambda line: line.close_channel(406, "message size too large"), "too large", True),
    "a routing key that may not be used": (
        lambda line: line.close_channel(403, "access to topic 'x' in exchange 'y' refused"),
        "access to topic",
        True,
    ),
    "an exchange that is gone": (lambda line: line.close_channel(404, "no exchange 'y'"), "no exchange", False),
    "a channel's own error": (lambda line: line.close_channel(504, "CHANNEL_ERROR"), "CHANNEL_ERROR", False),
    "a frame that is too large": (lambda line: line.close_connection(501, "FRAME_ERROR"), "FRAME_ERROR", True),
    "an operator": (lambda line: line.close_connection(320, "by an operator"), "by an operator", False),
    "a reset": (Line.cut, "", False),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("in_flight", [1, 2])
async def test_only_a_message_that_is_alone_in_flight_can_be_the_one_to_blame(end: str, in_flight: int) -> None:
    act, told, blames = ENDS[end]
    async with stub_broker(silence) as broker, publisher_to(broker) as publisher:
        first = asyncio.create_task(publisher.publish([message("a"), message("b")]))
        second = asyncio.create_task(publisher.publish([message("c")]))
        await broker.last.until(seen(3))
        broker.last.ack(3 - in_flight, multiple=True)
        act(broker.last)
        outcomes = [*await first, *await second]
        last = Refused if blames and in_flight == 1 else Unknown
        assert kinds(outcomes) == [Confirmed] * (3 - in_flight) + [Unknown] * (in_flight - 1) + [last]
        assert publisher.message_is_suspect == blames
        assert told in str(publisher.lost)
        assert isinstance(outcomes[-1], Refused | Unknown)
        assert told in outcomes[-1].detail
        assert isinstance(publisher.lost, RelayError)


@pytest.mark.parametrize("end", ENDS)
async def test_an_end_is_noticed_while_nothing_is_published(end: str) -> None:
    async with stub_broker() as broker, publisher_to(broker) as publisher:
        await publisher.publish(messages(1))
        lost = asyncio.create_task(publisher.wait_lost())
        await turns()
        assert not lost.done()
        ENDS[end][0](broker.last)
        async with asyncio.timeout(5):
            await lost
        assert kinds(await publisher.publish(messages(1))) == [Unknown]
        await broker.last.until(lambda line: line.ended)


async def test_a_stream_that_cannot_be_followed_ends_the_session() -> None:
    async with stub_broker(silence) as broker, publisher_to(broker) as publisher:
        publishing = asyncio.create_task(publisher.publish(messages(1)))
        await broker.last.until(seen(1))
        broker.last._write(b"\x01\x00\x01\x00\x00\x00\x04abcd?")
        assert kinds(await publishing) == [Unknown]
        assert "cannot be followed" in str(publisher.lost)


# --- J: one answer for many messages


class TestJ:
    @pytest.mark.parametrize("multiple", [True, False])
    async def test_an_ack_of_a_tag_that_was_never_given_confirms_nothing_and_ends_the_session(
        self, multiple: bool
    ) -> None:
        async with stub_broker(silence) as broker, publisher_to(broker) as publisher:
            publishing = asyncio.create_task(publisher.publish(messages(3)))
            await broker.last.until(seen(3))
            broker.last.ack(99, multiple=multiple)
            broker.last.ack(3, multiple=True)
            assert kinds(await publishing) == [Unknown] * 3
            assert "answered wrongly" in str(publisher.lost)
