"""Traps of the AMQP client on the publishing side (RELIABILITY 3, A to G, I, J): see the table in test_library_traps.py.

A test named `today_...` pins what the library does. When it fails after an upgrade, its message says what that means for us.
The others hold whatever the library does: those that take a `kind` on both ways to publish, also where the fast lane cannot fall
into the trap. What is the fast lane's alone is in test_library_traps_fast_publisher.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import aiormq
import aiormq.exceptions
import pytest
import structlog
from aiormq import spec
from aiormq.abc import AbstractChannel
from pamqp import decode, encode

from relay.errors import BrokerUnavailable, RelayError
from relay.message import Message
from relay.rabbitmq import session
from relay.rabbitmq.contract import Confirmed, Nacked, Outcome, Refused, Returned, Unknown
from relay.rabbitmq.fast_publisher import FastPublisher
from relay.rabbitmq.session import broker_errors
from relay.rabbitmq.stock_publisher import StockPublisher
from relay.settings import DaemonSettings
from relay.supervisor import supervise
from tests.harness.loop_clock import loop_clock
from tests.harness.stub_broker import FRAME_MAX, Line, Published, StubBroker, silence, stub_broker

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
MEGABYTE = b"x" * 1_000_000


def message(name: str, **changes: Any) -> Message:
    given: dict[str, Any] = {
        "message_id": name,
        "event_type": "Paid",
        "source": "shop",
        "content_type": "application/json",
        "occurred_at": NOON,
        "routing_key": "order.Paid",
        "headers": {"x-sequence": 1},
        "body": b"{}",
    }
    return Message(**(given | changes))


def messages(n: int) -> list[Message]:
    return [message(f"m{i}") for i in range(n)]


Kind = type[StockPublisher] | type[FastPublisher]


@pytest.fixture(params=[StockPublisher, FastPublisher], ids=["stock", "fast"])
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@asynccontextmanager
async def publisher_to(
    broker: StubBroker, kind: Kind = StockPublisher, *, confirm_timeout_s: float = 5, **settings: Any
) -> AsyncIterator[StockPublisher | FastPublisher]:
    publisher = await kind.open(broker.settings(**settings), confirm_timeout_s=confirm_timeout_s, name="traps")
    try:
        yield publisher
    finally:
        await publisher.close()


@asynccontextmanager
async def library_channel(broker: StubBroker) -> AsyncIterator[AbstractChannel]:
    """A confirm channel of aiormq, without any of ours around it."""
    connection = await aiormq.connect(broker.url)
    try:
        yield await connection.channel(publisher_confirms=True, on_return_raises=True)
    finally:
        broker.last.cut()
        await connection.close()


def publish(channel: AbstractChannel, name: str, content: bytes = b"x", **more: Any) -> asyncio.Task[Any]:
    properties = spec.Basic.Properties(message_id=name)
    return asyncio.ensure_future(
        channel.basic_publish(content, exchange="e", routing_key="k", mandatory=True, properties=properties, **more)
    )


async def settle(*tasks: asyncio.Task[Any], timeout_s: float = 5) -> list[Any]:
    async with asyncio.timeout(timeout_s):
        return await asyncio.gather(*tasks, return_exceptions=True)


async def turns(n: int = 20) -> None:
    """For what happens inside this loop. Bytes may take longer, also to a local socket."""
    for _ in range(n):
        await asyncio.sleep(0)


async def until(question: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not question():  # noqa: ASYNC110 - the library announces nothing
            await asyncio.sleep(0.001)


def seen(n: int) -> Callable[[Line], bool]:
    return lambda line: len(line.published) >= n


# --- A: one delivery tag too many, and every answer is taken for the next message's


class TestA:
    async def test_today_aiormq_takes_its_tag_back_when_a_message_cannot_be_encoded(self) -> None:
        """Else drop nothing, pin an older aiormq: nacking B would confirm it."""
        async with stub_broker(silence) as broker, library_channel(broker) as channel:
            (refused,) = await settle(publish(channel, "A" * 256))
            assert isinstance(refused, TypeError)
            b, c = publish(channel, "B"), publish(channel, "C")
            await broker.last.until(seen(2))
            broker.last.nack(1)
            broker.last.ack(2)
            outcome_b, outcome_c = await settle(b, c)
            assert isinstance(outcome_b, aiormq.exceptions.DeliveryError), "a nacked message is confirmed"
            assert isinstance(outcome_c, spec.Basic.Ack)

    async def test_today_aiormq_takes_its_tag_back_when_a_publish_is_cancelled_before_it_is_written(self) -> None:
        async with stub_broker(silence) as broker:
            connection = await aiormq.connect(broker.url)
            stalled = await connection.channel(publisher_confirms=True)
            channel = await connection.channel(publisher_confirms=True)
            broker.last.stop_reading()
            big = [publish(stalled, "big", MEGABYTE * 8)]
            await turns()
            for tag in range(
                connection.write_queue.maxsize
            ):  # fill the queue to the writer, which waits for the socket
                await channel.basic_ack(tag, wait=False)
            a = publish(channel, "A")
            await turns()
            a.cancel()
            await settle(a)
            b, c = publish(channel, "B"), publish(channel, "C")
            broker.last.read_on()
            await broker.last.until(seen(3))
            assert [m.message_id for m in broker.last.published] == ["big", "B", "C"], (
                "A was written: nothing is proved"
            )
            broker.last.nack(1, channel=2)
            broker.last.ack(2, channel=2)
            outcome_b, outcome_c = await settle(b, c)
            assert isinstance(outcome_b, aiormq.exceptions.DeliveryError), "a nacked message is confirmed"
            assert isinstance(outcome_c, spec.Basic.Ack)
            broker.last.cut()
            await settle(*big)
            await connection.close()

    async def test_a_cancelled_batch_is_the_last_one_of_its_session(self, kind: Kind) -> None:
        async with stub_broker(silence) as broker, publisher_to(broker, kind) as publisher:
            publishing = asyncio.create_task(publisher.publish(messages(3)))
            await broker.last.until(seen(3))
            publishing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await publishing
            broker.last.ack(3, multiple=True)
            assert [type(o) for o in await publisher.publish(messages(2))] == [Unknown, Unknown]
            await broker.last.until(lambda line: line.ended)
            assert len(broker.last.published) == 3

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("message_id", "m" * 256),
            ("event_type", "\ud800"),
            ("routing_key", "k" * 256),
            ("occurred_at", datetime(1, 1, 1, tzinfo=UTC)),
            ("headers", {"x": 2**63}),
            ("headers", {"x": -(2**63) - 1}),
            ("headers", {"x": "y" * FRAME_MAX}),
            ("headers", {"x": object()}),
        ],
        ids=lambda value: str(value)[:20],
    )
    async def test_what_cannot_be_encoded_is_refused_before_the_library_sees_it(
        self, kind: Kind, monkeypatch: pytest.MonkeyPatch, field: str, value: object
    ) -> None:
        """So that no tag can be lost, with any library: here one that counts on at each message it fails on.

        Else the nack of B would be taken for the bad one's, and B for confirmed.
        """
        forgetful(monkeypatch)
        async with stub_broker(nacks_the_second) as broker, publisher_to(broker, kind) as publisher:
            batch = [message("bad", **{field: value}), message("B"), message("C"), message("D")]
            outcomes = await publisher.publish(batch)
            assert [type(o) for o in outcomes] == [Refused, Confirmed, Nacked, Confirmed]
            assert publisher.lost is None

    async def test_a_message_that_fails_in_the_library_all_the_same_ends_the_session_without_a_false_confirm(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Used on, it would be told of D's ack as C's, which the broker has refused."""
        forgetful(monkeypatch)
        monkeypatch.setattr("relay.rabbitmq.stock_publisher.unsendable", lambda _message: None)
        async with stub_broker(nacks_the_second) as broker, publisher_to(broker) as publisher:
            batch = [message("bad", message_id="m" * 256), message("B"), message("C"), message("D")]
            outcomes = await publisher.publish(batch)
            assert [type(o) for o in outcomes] == [Refused, Unknown, Unknown, Unknown]
            assert isinstance(publisher.lost, BrokerUnavailable)
            assert not publisher.message_is_suspect, "it was found already: no need to look for it one by one"

    @pytest.mark.parametrize("answer", [None, True, spec.Basic.Nack(1)], ids=["nothing", "true", "a nack"])
    async def test_only_an_ack_confirms(self, monkeypatch: pytest.MonkeyPatch, answer: object) -> None:
        """aio-pika once answered with a bool; and without confirms aiormq answers nothing, at once."""

        async def basic_publish(*_: Any, **__: Any) -> object:
            return answer

        async with stub_broker() as broker, publisher_to(broker) as publisher:
            monkeypatch.setattr(aiormq.Channel, "basic_publish", basic_publish)
            outcomes = await publisher.publish(messages(2))
            assert [type(o) for o in outcomes] == [Unknown, Unknown]
            assert isinstance(publisher.lost, BrokerUnavailable)


def nacks_the_second(line: Line, published: Published) -> None:
    (line.nack if published.tag == 2 else line.ack)(published.tag)


def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """aiormq 6.9.2's counter: it is one ahead after a message that was not written."""
    original = aiormq.Channel.basic_publish

    async def basic_publish(self: aiormq.Channel, body: bytes, **more: Any) -> Any:
        before = self.delivery_tag
        try:
            return await original(self, body, **more)
        except BaseException:
            if self.delivery_tag == before:
                self.delivery_tag += 1
            raise

    monkeypatch.setattr(aiormq.Channel, "basic_publish", basic_publish)


# --- B: a returned message is told by its id


class TestB:
    async def test_today_aiormq_takes_one_of_two_messages_with_one_id_for_the_other(self) -> None:
        """If this fails, the ids of a batch need not be distinct any more."""
        async with stub_broker(silence) as broker, library_channel(broker) as channel:
            unroutable, routable = publish(channel, "same"), publish(channel, "same")
            await broker.last.until(seen(2))
            broker.last.give_back(broker.last.published[0])
            broker.last.ack(1)
            broker.last.ack(2)
            first, second = await settle(unroutable, routable)
            assert isinstance(first, spec.Basic.Ack)
            assert isinstance(second, aiormq.exceptions.PublishError)

    async def test_two_calls_at_once_cannot_have_a_message_id_in_common(self, kind: Kind) -> None:
        async with stub_broker(silence) as broker, publisher_to(broker, kind) as publisher:
            first = asyncio.create_task(publisher.publish([message("same"), message("other")]))
            await broker.last.until(seen(2))
            with pytest.raises(ValueError, match="same message_id"):
                await publisher.publish([message("same")])
            broker.last.ack(2, multiple=True)
            assert await first == [Confirmed(), Confirmed()]
            again = asyncio.create_task(publisher.publish([message("same")]))  # one after the other they may
            await broker.last.until(seen(3))
            broker.last.ack(3)
            assert await again == [Confirmed()]

    async def test_returns_and_acks_reach_the_message_they_are_about(self, kind: Kind) -> None:
        def every_third_comes_back(line: Line, published: Published) -> None:
            if published.tag % 3 == 0:
                line.give_back(published)
            line.ack(published.tag)

        async with stub_broker(every_third_comes_back) as broker, publisher_to(broker, kind) as publisher:
            outcomes = await publisher.publish([message(f"m{n}", body=b"x" * n) for n in range(600)])
        assert [isinstance(o, Returned) for o in outcomes] == [n % 3 == 2 for n in range(600)]
        assert outcomes[2] == Returned("NO_ROUTE order.Paid")
        assert {type(o) for o in outcomes} == {Returned, Confirmed}


# --- C: a time-out that is not kept


class TestC:
    async def test_today_aiormq_keeps_its_time_out_while_the_socket_takes_nothing_and_lets_go_of_its_lock(self) -> None:
        """If this fails, only our own time-out stands between a stalled broker and a publisher that hangs for ever."""
        async with stub_broker(silence) as broker, library_channel(broker) as channel:
            broker.last.stop_reading()
            first = publish(channel, "A", MEGABYTE * 8, timeout=0.1)
            await turns()
            second = publish(channel, "B", timeout=0.1)
            outcomes = await settle(first, second, timeout_s=2)
            assert [type(o) for o in outcomes] == [TimeoutError, TimeoutError]

    @pytest.mark.parametrize("size", [2, 8_000_000], ids=["before the answer", "while it is written"])
    async def test_a_batch_ends_with_the_confirm_time_out_whatever_it_waits_for(self, kind: Kind, size: int) -> None:
        async with stub_broker(silence) as broker, publisher_to(broker, kind, confirm_timeout_s=0.2) as publisher:
            broker.last.stop_reading()
            async with asyncio.timeout(2):
                outcomes = await publisher.publish([message(f"m{n}", body=b"x" * size) for n in range(3)])
            # The fast lane does not blame what it could not even write.
            late = 1 if kind is FastPublisher and size > 2 else 3
            assert [o.timed_out for o in outcomes if isinstance(o, Unknown)] == [True] * late + [False] * (3 - late)
            assert {o.detail for o in outcomes if isinstance(o, Unknown)} == {str(publisher.lost)}
            assert not broker.last.published, "it was read: nothing is proved"

    async def test_a_kernel_that_ends_a_blocked_session_with_full_sockets_blames_no_message(
        self, kind: Kind, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """TCP_USER_TIMEOUT counts a broker with an alarm, which reads nothing, as dead. It is a reconnect, and no more than that."""
        monkeypatch.setattr(session, "_USER_TIMEOUT_MS", 1000)
        async with stub_broker(silence) as broker, publisher_to(broker, kind, confirm_timeout_s=60) as publisher:
            broker.last.block()
            async with asyncio.timeout(10):
                outcomes = await publisher.publish([message(f"m{n}", body=MEGABYTE * 8) for n in range(3)])
            assert [isinstance(o, Unknown) and not o.timed_out for o in outcomes] == [True] * 3
            assert "Connection timed out" in str(publisher.lost)
            assert not publisher.message_is_suspect

    async def test_a_library_that_swallows_every_cancellation_for_a_while_cannot_confirm_late(self) -> None:
        """An answer after the time-out changes nothing: the session is over, and its messages are published again."""
        async with stub_broker(silence) as broker, publisher_to(broker, confirm_timeout_s=0.1) as publisher:
            outcomes = await publisher.publish(messages(2))
            broker.last.ack(2, multiple=True)
            await turns()
            assert {type(o) for o in outcomes} == {Unknown}
            assert [type(o) for o in await publisher.publish(messages(2))] == [Unknown, Unknown]


# --- D: a dead connection that looks like a cancellation


class TestD:
    async def test_today_aiormq_ends_waiting_calls_with_a_cancellation_that_nobody_asked_for(self) -> None:
        """If this fails, `broker_errors` and `StockPublisher._outcome` need not tell the two apart any more."""
        told: list[int] = []

        async def waiting(channel: AbstractChannel) -> None:
            try:
                await channel.basic_publish(b"x", exchange="e", routing_key="k")
            except asyncio.CancelledError:
                task = asyncio.current_task()
                assert task is not None
                told.append(task.cancelling())
                raise

        async with stub_broker(silence) as broker, library_channel(broker) as channel:
            with loop_clock() as clock:
                task = asyncio.create_task(waiting(channel))
                await broker.last.until(seen(1))
                await clock.until(task.done, at_most_s=300, step_s=5)
                assert task.cancelled()
                assert told == [0]

    async def test_messages_in_flight_are_unknown_and_nobody_else_is_cancelled(self, kind: Kind) -> None:
        async with stub_broker(silence) as broker, publisher_to(broker, kind, confirm_timeout_s=600) as publisher:
            with loop_clock() as clock:
                async with asyncio.TaskGroup() as group:
                    publishing = group.create_task(publisher.publish(messages(3)))
                    beside = group.create_task(asyncio.Event().wait())
                    await broker.last.until(seen(3))
                    await clock.until(publishing.done, at_most_s=60)
                    outcomes = publishing.result()
                    assert not beside.done(), "the group took the dead connection for a cancellation"
                    beside.cancel()
                assert {type(o) for o in outcomes} == {Unknown}
                assert all("no heartbeat" in o.detail for o in outcomes if isinstance(o, Unknown))
                async with asyncio.timeout(1):
                    await publisher.wait_lost()

    async def test_looking_at_a_queue_ends_with_a_broker_error(self) -> None:
        async with stub_broker(silence) as broker, publisher_to(broker, confirm_timeout_s=600) as publisher:
            assert isinstance(publisher, StockPublisher)
            broker.last.say_nothing_more()
            with loop_clock() as clock:
                looking = asyncio.create_task(publisher.messages_in("q"))
                await clock.until(looking.done, at_most_s=60)
                with pytest.raises(BrokerUnavailable, match="no heartbeat"):
                    looking.result()

    async def test_a_real_cancellation_stays_one(self) -> None:
        async def waiting() -> None:
            with broker_errors("waiting"):
                await asyncio.Event().wait()

        task = asyncio.create_task(waiting())
        await turns(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


# --- E: heartbeats


class TestE:
    @pytest.mark.parametrize("asked", ["", "?heartbeat=60", "?heartbeat=0"])
    async def test_the_heartbeat_that_is_negotiated_is_the_settings_whatever_url_and_broker_say(
        self, kind: Kind, asked: str
    ) -> None:
        async with stub_broker() as broker:
            url = broker.url + asked
            publisher = await kind.open(
                broker.settings(heartbeat_s=7).model_copy(update={"url": type(broker.settings().url)(url)}),
                confirm_timeout_s=1,
                name="traps",
            )
            assert broker.last.tuned is not None
            assert broker.last.tuned.heartbeat == 7
            await publisher.close()

    @pytest.mark.parametrize("heartbeat_s", [5, 10])
    async def test_a_silent_connection_is_lost_within_the_bound_and_its_socket_is_closed(
        self, kind: Kind, heartbeat_s: int
    ) -> None:
        async with stub_broker() as broker, publisher_to(broker, kind, heartbeat_s=heartbeat_s) as publisher:
            broker.last.say_nothing_more()
            with loop_clock() as clock:
                lost = asyncio.create_task(publisher.wait_lost())
                took_s = await clock.until(lost.done, at_most_s=600)
            grace_s = 3 * (heartbeat_s + 1)
            assert grace_s <= took_s <= grace_s + heartbeat_s / 2 + 2
            assert isinstance(publisher.lost, BrokerUnavailable)
            await broker.last.until(lambda line: line.ended)

    async def test_a_connection_that_beats_lives(self, kind: Kind) -> None:
        async with stub_broker() as broker, publisher_to(broker, kind, heartbeat_s=5) as publisher:
            with loop_clock() as clock:
                for _ in range(12):
                    broker.last.beat()
                    await clock.forward(5)
                assert publisher.lost is None
                assert await publisher.publish([message("m")]) == [Confirmed()]


# --- F: a broker with an alarm


class TestF:
    async def test_today_aiormq_tells_of_an_alarm_only_through_ready(self) -> None:
        """If this fails, `StockPublisher._is_blocked` looks at nothing: every late message would be blamed for the alarm."""
        async with stub_broker() as broker, library_channel(broker) as channel:
            broker.last.block()
            await until(lambda: would_wait(channel.connection.ready()))
            broker.last.unblock()
            await until(lambda: not would_wait(channel.connection.ready()))

    @pytest.mark.parametrize("alarm", [True, False])
    async def test_being_late_is_no_messages_fault_while_the_broker_takes_nothing(
        self, kind: Kind, alarm: bool
    ) -> None:
        async with stub_broker(silence) as broker, publisher_to(broker, kind, confirm_timeout_s=0.2) as publisher:
            if alarm:
                broker.last.block()
                await until(lambda: knows_of_the_alarm(publisher))
            outcomes = await publisher.publish(messages(2))
            assert [o.timed_out for o in outcomes if isinstance(o, Unknown)] == [not alarm] * 2
            assert not publisher.message_is_suspect

    async def test_an_alarm_that_ends_in_time_costs_nothing(self, kind: Kind) -> None:
        async with stub_broker() as broker, publisher_to(broker, kind) as publisher:
            broker.last.block()
            await until(lambda: knows_of_the_alarm(publisher))
            publishing = asyncio.create_task(publisher.publish(messages(20)))
            await turns()
            assert not publishing.done()
            broker.last.unblock()
            assert await publishing == [Confirmed()] * 20
            assert len(broker.lines) == 1

    async def test_closing_is_bounded_although_the_goodbye_is_not_read(
        self, kind: Kind, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(session, "CLOSE_TIMEOUT_S", 0.2)
        async with stub_broker(silence) as broker:
            publisher = await kind.open(broker.settings(), confirm_timeout_s=30, name="traps")
            broker.last.block()
            publishing = asyncio.create_task(publisher.publish([message("m", body=MEGABYTE * 8)]))
            await turns()
            async with asyncio.timeout(2):
                await publisher.close()
                assert [type(o) for o in await publishing] == [Unknown]

    async def test_opening_gives_up_in_time_on_a_connection_that_is_blocked_from_the_start(
        self, kind: Kind, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(session, "CLOSE_TIMEOUT_S", 0.1)
        async with stub_broker() as broker:
            broker.on_connect = lambda line: line.grant_and_block()
            async with asyncio.timeout(2):
                with pytest.raises(BrokerUnavailable, match="no answer in time"):
                    await kind.open(broker.settings(connect_timeout_s=0.2), confirm_timeout_s=1, name="traps")

    async def test_a_broker_that_confirms_nothing_for_ten_minutes_sees_no_storm_of_connections(
        self, kind: Kind
    ) -> None:
        stop = asyncio.Event()

        async def publishing(broker: StubBroker) -> None:
            publisher = await kind.open(broker.settings(), confirm_timeout_s=30, name="traps")
            try:
                await publisher.publish(messages(1))
                assert isinstance(publisher.lost, RelayError)
                raise publisher.lost
            finally:
                await publisher.close()

        async with stub_broker(lambda line, _: line.block()) as broker:
            with loop_clock() as clock:
                settings = DaemonSettings()
                running = asyncio.create_task(
                    supervise(lambda: publishing(broker), name="traps", settings=settings, stop=stop, log=_quiet())
                )
                await clock.forward(600, step_s=2)
                assert 2 <= len(broker.lines) <= 600 / 20
                assert broker.client_sockets() <= 1, "sockets are left behind"
                running.cancel()
                await settle(running)


def knows_of_the_alarm(publisher: StockPublisher | FastPublisher) -> bool:
    return publisher._is_blocked() if isinstance(publisher, StockPublisher) else publisher._transport.blocked


def would_wait(call: Coroutine[Any, Any, None]) -> bool:
    try:
        call.send(None)
    except StopIteration:
        return False
    call.close()
    return True


def _quiet() -> Any:
    return structlog.wrap_logger(structlog.ReturnLogger())


# --- G: queues inside the library


class TestG:
    async def test_today_aiormqs_queues_are_bounded_so_that_what_is_in_flight_must_be_ours_to_bound(self) -> None:
        async with stub_broker() as broker, library_channel(broker) as channel:
            assert channel.connection.write_queue.maxsize == 10
            assert channel.frames.maxsize == 10

    async def test_no_more_than_a_window_is_in_flight_at_a_broker_that_does_not_confirm(self) -> None:
        async with stub_broker(silence) as broker, publisher_to(broker, confirm_timeout_s=30) as publisher:
            publishing = asyncio.create_task(publisher.publish(messages(1200)))
            await broker.last.until(seen(500))
            await asyncio.sleep(0.05)  # long enough for more, if more were sent
            assert len(broker.last.published) == 500
            broker.last.ack(500, multiple=True)
            await broker.last.until(seen(1000))
            broker.last.cut()
            outcomes = await publishing
            assert [type(o) for o in outcomes] == [Confirmed] * 500 + [Unknown] * 700
            assert len(broker.last.published) == 1000

    async def test_looking_at_the_session_costs_nothing_that_stays(self) -> None:
        """aiormq makes a future for each look at `closing` and keeps it until the connection ends: 1 kB a look, for ever."""
        async with stub_broker() as broker, publisher_to(broker) as publisher:
            await publisher.publish(messages(1))
            before = watchers(publisher)
            for _ in range(100):
                assert publisher.lost is None
                await publisher.publish(messages(1))
            assert watchers(publisher) == before

    async def test_a_channel_that_ends_alone_ends_the_session(self, kind: Kind) -> None:
        async with stub_broker() as broker, publisher_to(broker, kind) as publisher:
            lost = asyncio.create_task(publisher.wait_lost())
            await turns()
            broker.last.close_channel(504, "CHANNEL_ERROR")
            await settle(lost)
            assert isinstance(publisher.lost, BrokerUnavailable)
            assert [type(o) for o in await publisher.publish(messages(1))] == [Unknown]


def watchers(publisher: StockPublisher | FastPublisher) -> int:
    """Futures that hang on the end of the connection: inside the library, where they pile up."""
    assert isinstance(publisher, StockPublisher)
    assert publisher._session.transport is not None
    return len(publisher._session.transport.connection._closing._callbacks or ())  # type: ignore[attr-defined]


# --- I: what is encoded is not what was given


class TestI:
    def test_today_pamqp_rounds_a_float_cuts_a_name_and_refuses_what_does_not_fit(self) -> None:
        """If this fails, the table's constraint `headers_are_valid` and `unsendable` may be wider."""
        assert decode.field_table(encode.field_table({"f": 0.1}))[1]["f"] != 0.1
        (name,) = decode.field_table(encode.field_table({"n" * 129: "x"}))[1]
        assert name == "n" * 128
        for number in (2**63, -(2**63) - 1):
            with pytest.raises(TypeError):
                encode.field_table({"n": number})

    @pytest.mark.parametrize(
        "headers",
        [{"f": 0.5}, {"n" * 129: "x"}, {"ä" * 65: 1}, {"d": Decimal(1)}, {"t": {"a": 1}}, {"a": [1]}, {"none": None}],
        ids=lambda headers: f"{type(next(iter(headers.values()))).__name__} {len(next(iter(headers)))}",
    )
    async def test_a_header_that_would_not_arrive_as_it_is_is_refused(
        self, kind: Kind, headers: dict[str, Any]
    ) -> None:
        async with stub_broker() as broker, publisher_to(broker, kind) as publisher:
            outcomes = await publisher.publish([message("a"), message("b", headers=headers), message("c")])
            assert [type(o) for o in outcomes] == [Confirmed, Refused, Confirmed]
            assert [m.message_id for m in broker.last.published] == ["a", "c"]

    async def test_every_header_that_is_sent_arrives_as_it_is(self, kind: Kind) -> None:
        numbers = [0, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1]
        headers: dict[str, Any] = {f"n{n}": n for n in numbers} | {f"m{n}": -n for n in numbers}
        headers |= {"least": -(2**63), "yes": True, "no": False, "empty": "", "text": "é\0\n", "n" * 128: "long"}
        async with stub_broker() as broker, publisher_to(broker, kind) as publisher:
            assert await publisher.publish([message("m", headers=headers)]) == [Confirmed()]
            (arrived,) = broker.last.published
            assert arrived.properties.headers == headers
            assert {name: type(value) for name, value in arrived.properties.headers.items()} == {
                name: type(value) for name, value in headers.items()
            }


# --- J: one answer for many messages


class TestJ:
    async def test_a_multiple_answer_is_for_all_up_to_its_tag_and_for_no_other(self, kind: Kind) -> None:
        async with stub_broker(silence) as broker, publisher_to(broker, kind) as publisher:
            publishing = asyncio.create_task(publisher.publish(messages(10)))
            await broker.last.until(seen(10))
            line = broker.last
            line.ack(2)
            line.ack(4, multiple=True)
            line.nack(6, multiple=True)
            line.give_back(line.published[7])  # the eighth
            line.ack(9, multiple=True)
            line.ack(10)
            expected: list[type[Outcome]] = [Confirmed] * 4 + [Nacked] * 2 + [Confirmed, Returned, Confirmed, Confirmed]
            assert [type(o) for o in await publishing] == expected

    @pytest.mark.parametrize("multiple", [True, False])
    async def test_an_ack_of_a_tag_that_was_never_given_confirms_nothing(self, multiple: bool) -> None:
        """Today aiormq drops it. Had it confirmed everything up to it, all three would be Confirmed."""
        async with stub_broker(silence) as broker, publisher_to(broker, confirm_timeout_s=0.2) as publisher:
            publishing = asyncio.create_task(publisher.publish(messages(3)))
            await broker.last.until(seen(3))
            broker.last.ack(99, multiple=multiple)
            assert [type(o) for o in await publishing] == [Unknown] * 3

    async def test_an_ack_that_comes_twice_confirms_nobody_else(self, kind: Kind) -> None:
        async with stub_broker(silence) as broker, publisher_to(broker, kind, confirm_timeout_s=0.2) as publisher:
            publishing = asyncio.create_task(publisher.publish(messages(2)))
            await broker.last.until(seen(2))
            broker.last.ack(1)
            broker.last.ack(1)
            broker.last.ack(1, multiple=True)
            assert [type(o) for o in await publishing] == [Confirmed, Unknown]
