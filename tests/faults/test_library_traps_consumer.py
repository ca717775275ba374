"""Traps of the AMQP client on the consuming side, and of opening and closing (RELIABILITY 3, D, G, H, K, L, P).

See the table in test_library_traps.py. A test named `today_...` pins what the library does; its text says what it means for us
when it fails after an upgrade. The others hold whatever the library does.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aio_pika
import aiormq
import pytest
from aiormq.abc import DeliveredMessage
from pamqp import frame
from pamqp.exceptions import UnmarshalingException

from relay.errors import BrokerError, BrokerUnavailable, UnreadableMessage
from relay.message import Delivery, NotAnEvent, to_event
from relay.rabbitmq import fast_consumer, session, subscription
from relay.rabbitmq.contract import Consumer
from relay.rabbitmq.fast_consumer import FastConsumer
from relay.rabbitmq.queues import InboxQueue
from relay.rabbitmq.stock_consumer import StockConsumer
from relay.rabbitmq.stock_publisher import StockPublisher
from tests.harness.loop_clock import loop_clock
from tests.harness.stub_broker import StubBroker, props, stub_broker

QUEUE = InboxQueue(name="traps", bindings=("order.#",), delivery_limit=5)


Kind = type[StockConsumer] | type[FastConsumer]


@pytest.fixture(params=[StockConsumer, FastConsumer], ids=["stock", "fast"])
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@asynccontextmanager
async def consumer_of(
    broker: StubBroker, kind: Kind = StockConsumer, **settings: Any
) -> AsyncIterator[StockConsumer | FastConsumer]:
    consumer = await kind.open(broker.settings(**settings), QUEUE, prefetch=5000, name="traps")
    try:
        yield consumer
    finally:
        await consumer.close()


async def received(consumer: Consumer, n: int) -> list[Delivery]:
    found: list[Delivery] = []
    async with asyncio.timeout(5):
        while len(found) < n:
            found += await consumer.receive(100)
    return found


async def until(question: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not question():  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0.001)


# --- D: a dead connection that looks like a cancellation


class TestD:
    async def test_a_consumer_whose_connection_died_gets_a_broker_error_and_nobody_is_cancelled(
        self, kind: Kind
    ) -> None:
        async with stub_broker() as broker, consumer_of(broker, kind) as consumer:
            broker.last.say_nothing_more()
            with loop_clock() as clock:
                async with asyncio.TaskGroup() as group:
                    beside = group.create_task(asyncio.Event().wait())
                    receiving = group.create_task(told(consumer.receive(1)))
                    await clock.until(receiving.done, at_most_s=60)
                    assert isinstance(receiving.result(), BrokerUnavailable)
                    assert not beside.done(), "the group took the dead connection for a cancellation"
                    beside.cancel()
            with pytest.raises(BrokerError):
                await consumer.acknowledge(1)

    @pytest.mark.parametrize("step", ["Queue.Declare", "Basic.Consume"])
    async def test_a_connection_that_dies_while_it_is_being_set_up_is_a_broker_error(
        self, kind: Kind, step: str
    ) -> None:
        async with stub_broker() as broker:
            broker.on_connect = lambda line: setattr(line, "ignores", frozenset((step,)))
            opening = asyncio.create_task(
                kind.open(broker.settings(connect_timeout_s=300), QUEUE, prefetch=1, name="traps")
            )
            await until(lambda: bool(broker.lines) and step in broker.last.seen)
            with loop_clock() as clock:
                await clock.until(opening.done, at_most_s=60)
            with pytest.raises(BrokerUnavailable):
                await opening
            assert broker.client_sockets() == 0


async def told(call: Awaitable[object]) -> BaseException | None:
    """What a call ends with, as a value: a group would otherwise end with it."""
    try:
        await call
    except BrokerError as exc:
        return exc
    return None


# --- G: queues inside the library


class TestG:
    async def test_a_consumer_that_nobody_asks_takes_its_whole_prefetch_and_stalls_nothing(self, kind: Kind) -> None:
        """aiormq's queues hold ten frames: whoever stops taking them stalls the connection, heartbeats and all."""
        async with stub_broker() as broker, consumer_of(broker, kind) as consumer:
            for tag in range(1, 2001):
                broker.last.deliver(tag, b"x")
            broker.last.close_connection(320, "CONNECTION_FORCED")
            await until(lambda: consumer._lost is not None)
            assert len(consumer._buffer) == 2000
            with pytest.raises(BrokerUnavailable, match="CONNECTION_FORCED"):
                await consumer.receive(1)


# --- H: what a stranger can put into a queue


def short(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def table(entries: bytes) -> bytes:
    return struct.pack(">I", len(entries)) + entries


def nested(depth: int) -> bytes:
    value = table(b"")
    for _ in range(depth):
        value = table(b"\x01kF" + value)
    return value


HEADERS, DELIVERY_MODE, TIMESTAMP, MESSAGE_ID = 0x2000, 0x1000, 0x0040, 0x0080

UNREADABLE: dict[str, bytes] = {
    "a header's name that is not UTF-8": props(HEADERS, table(b"\x02\xff\xfet\x01")),
    "a header of an unknown type": props(HEADERS, table(b"\x01kZ\x01")),
    "a header's time out of range": props(HEADERS, table(b"\x01tT" + b"\xff" * 8)),
    "a table longer than its frame": props(HEADERS, struct.pack(">I", 500) + b"\x01kt\x01"),
    "tables nested 2000": props(HEADERS, nested(2000)),
    "a timestamp in microseconds": props(TIMESTAMP, struct.pack(">Q", 1_700_000_000_000_000)),
    "a negative timestamp": props(TIMESTAMP, struct.pack(">q", -5)),
    "a message id that is not UTF-8": props(MESSAGE_ID, short(b"\xff\xfe")),
}
READABLE: dict[str, bytes] = {
    "delivery mode 7": props(DELIVERY_MODE, b"\x07"),
    "delivery mode 0": props(DELIVERY_MODE, b"\x00"),
    "a timestamp in milliseconds": props(TIMESTAMP, struct.pack(">Q", 1_700_000_000_000)),
    "a header's text that is not UTF-8": props(HEADERS, table(b"\x01kS" + table(b"\xff"))),
    "a header twice": props(HEADERS, table(b"\x01kt\x01" * 2)),
    "nothing": props(0, b""),
}


class TestH:
    @pytest.mark.parametrize("name", UNREADABLE)
    def test_today_pamqp_cannot_read_it(self, name: str) -> None:
        """If this fails, the case moves to READABLE; when all have moved, `UnreadableMessage` and its one-by-one may go."""
        payload = struct.pack(">HHQ", 60, 0, 1) + UNREADABLE[name]
        with pytest.raises((UnmarshalingException, RecursionError)):
            frame.unmarshal(struct.pack(">BHI", 2, 1, len(payload)) + payload + b"\xce")

    @pytest.mark.parametrize("name", UNREADABLE)
    async def test_a_message_that_cannot_be_read_is_named_as_what_ended_the_session(self, name: str) -> None:
        """Which is how the inbox knows to take one at a time, until the delivery limit sets it aside."""
        async with stub_broker() as broker, consumer_of(broker) as consumer:
            broker.last.deliver(1, b"x", UNREADABLE[name])
            async with asyncio.timeout(5):
                with pytest.raises(UnreadableMessage, match="cannot be decoded"):
                    await consumer.receive(1)
            await until(lambda: broker.client_sockets() == 0)

    @pytest.mark.parametrize("name", UNREADABLE)
    async def test_on_the_fast_lane_it_is_handed_out_like_any_other_and_the_connection_stays(self, name: str) -> None:
        async with stub_broker() as broker, consumer_of(broker, FastConsumer) as consumer:
            broker.last.deliver(1, b"x", UNREADABLE[name])
            broker.last.deliver(2, b"y")
            first, second = await received(consumer, 2)
            assert (first.tag, first.body, second.body) == (1, b"x", b"y")
            with pytest.raises(NotAnEvent):
                to_event(first)
            await consumer.acknowledge(2)
            await broker.last.until(lambda line: line.acknowledged == [(2, True)])

    @pytest.mark.parametrize("way", ["receive", "next_ready"])
    async def test_on_the_fast_lane_a_body_too_large_for_memory_is_what_cannot_be_read(
        self, way: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Acknowledged it would be lost: so the delivery limit sets it aside, as it does on stock what aiormq cannot read."""
        monkeypatch.setattr(fast_consumer, "MAX_BODY_BYTES", 1000)
        async with stub_broker() as broker, consumer_of(broker, FastConsumer) as consumer:
            broker.last.deliver(1, b"x" * 1000)
            assert [d.body for d in await received(consumer, 1)] == [b"x" * 1000]
            broker.last.deliver(2, b"x" * 1001)
            asked = consumer.receive(1) if way == "receive" else until(lambda: consumer.next_ready() is not None)
            async with asyncio.timeout(5):
                with pytest.raises(UnreadableMessage, match="larger than 1000 bytes"):
                    await asked
            broker.last.deliver(3, b"x")
            assert consumer.next_ready() is None
            with pytest.raises(UnreadableMessage):
                await consumer.acknowledge(2)

    async def test_nothing_is_ready_any_more_once_the_session_has_ended(self, kind: Kind) -> None:
        async with stub_broker() as broker, consumer_of(broker, kind) as consumer:
            broker.last.deliver(1, b"x")
            broker.last.deliver(2, b"y")
            await until(lambda: len(consumer._buffer) == 2)
            first = consumer.next_ready()
            assert first is not None
            assert first.tag == 1
            broker.last.cut()
            await until(lambda: consumer._lost is not None)
            assert consumer.next_ready() is None

    async def test_everything_that_can_be_read_is_handed_out_and_can_be_acknowledged(self, kind: Kind) -> None:
        """Nothing fails in a task where nobody sees it and keeps its place in the prefetch for ever."""
        async with stub_broker() as broker, consumer_of(broker, kind) as consumer:
            for tag, properties in enumerate(READABLE.values(), 1):
                broker.last.deliver(tag, b"x", properties)
            found = await received(consumer, len(READABLE))
            assert [d.tag for d in found] == list(range(1, len(READABLE) + 1))
            assert [d.others["delivery_mode"] for d in found[:2]] == [7, 0]
            await consumer.acknowledge(found[-1].tag)
            await broker.last.until(lambda line: line.acknowledged == [(len(READABLE), True)])

    async def test_today_aio_pikas_own_message_fails_on_a_delivery_mode_it_does_not_know(self) -> None:
        """If this fails, the consumer may use aio-pika's messages; today it must take aiormq's."""
        kept: list[DeliveredMessage] = []
        async with stub_broker() as broker:
            connection = await aiormq.connect(broker.url)
            channel = await connection.channel(publisher_confirms=False)
            await channel.basic_consume("q", kept.append)  # type: ignore[arg-type]
            broker.last.deliver(1, b"x", READABLE["delivery mode 7"])
            await until(lambda: bool(kept))
            with pytest.raises(ValueError, match="7 is not a valid DeliveryMode"):
                aio_pika.IncomingMessage(kept[0])
            await connection.close()


# --- K: what the robust layer would do for us, and does not


class TestK:
    async def test_a_consumer_that_the_broker_cancelled_has_ended(self, kind: Kind) -> None:
        """A queue that was deleted, or whose leader is gone: aio-pika's robust layer did not always notice."""
        async with stub_broker() as broker, consumer_of(broker, kind) as consumer:
            broker.last.cancel_consumer()
            async with asyncio.timeout(5):
                with pytest.raises(BrokerUnavailable, match="cancelled the consumer"):
                    await consumer.receive(1)

    async def test_nothing_that_was_received_and_not_taken_outlives_its_session(self, kind: Kind) -> None:
        """It could not be acknowledged any more, and comes again: handed out it would be handled twice."""
        async with stub_broker() as broker, consumer_of(broker, kind) as consumer:
            broker.last.deliver(1, b"x")
            await until(lambda: len(consumer._buffer) == 1)
            broker.last.cut()
            await until(lambda: consumer._lost is not None)
            with pytest.raises(BrokerUnavailable):
                await consumer.receive(1)


# --- L: one task for each delivery; and what a call that is cut short leaves behind


class TestL:
    async def test_today_aiormq_lets_a_later_delivery_overtake_in_a_callback_that_waits(self) -> None:
        """If this fails, deliveries are handled one after the other, and `_on_message` may wait."""
        order: list[bytes] = []
        second = asyncio.Event()

        async def waits(delivered: DeliveredMessage) -> None:
            if delivered.body == b"1":
                await second.wait()
            order.append(delivered.body)
            second.set()

        async with stub_broker() as broker:
            connection = await aiormq.connect(broker.url)
            channel = await connection.channel(publisher_confirms=False)
            await channel.basic_consume("q", waits)
            broker.last.deliver(1, b"1")
            broker.last.deliver(2, b"2")
            await until(lambda: len(order) == 2)
            assert order == [b"2", b"1"]
            await connection.close()

    async def test_deliveries_of_all_sizes_come_out_in_the_order_they_came_in(self, kind: Kind) -> None:
        sizes = [0, 1, 70_000, 3, 0, 131_000, 1, 1, 9000, 0] * 30
        async with stub_broker() as broker, consumer_of(broker, kind) as consumer:
            for tag, size in enumerate(sizes, 1):
                broker.last.deliver(tag, bytes(size))
            found = await received(consumer, len(sizes))
            assert [(d.tag, len(d.body)) for d in found] == list(enumerate(sizes, 1))

    @pytest.mark.parametrize("way", ["time-out", "cancelled"])
    @pytest.mark.parametrize(
        "step",
        ["Connection.StartOk", "Connection.Open", "Channel.Open", "Confirm.Select", "Exchange.Declare"],
    )
    async def test_a_session_that_is_given_up_at_any_step_of_its_opening_leaves_no_socket(
        self, step: str, way: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(session, "CLOSE_TIMEOUT_S", 0.05)
        async with stub_broker() as broker:
            broker.on_connect = lambda line: setattr(line, "ignores", frozenset((step,)))
            given_s = 0.1 if way == "time-out" else 60
            opening = asyncio.create_task(
                StockPublisher.open(broker.settings(connect_timeout_s=given_s), confirm_timeout_s=1, name="traps")
            )
            await until(lambda: bool(broker.lines) and step in broker.last.seen)
            if way == "cancelled":
                opening.cancel()
            async with asyncio.timeout(5):
                with pytest.raises(BrokerUnavailable if way == "time-out" else asyncio.CancelledError):
                    await opening
            await until(lambda: broker.client_sockets() == 0)

    async def test_closing_is_bounded_at_a_broker_that_answers_nothing_any_more(
        self, kind: Kind, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(session, "CLOSE_TIMEOUT_S", 0.1)
        monkeypatch.setattr(subscription, "CLOSE_TIMEOUT_S", 0.1)
        async with stub_broker() as broker:
            consumer = await kind.open(broker.settings(), QUEUE, prefetch=1, name="traps")
            broker.last.stop_reading()
            async with asyncio.timeout(2):
                await consumer.close()
            assert broker.client_sockets() == 0

    @pytest.mark.parametrize("step", ["Channel.Close", "Connection.Close"])
    async def test_a_goodbye_that_is_cancelled_at_any_step_leaves_no_socket(self, kind: Kind, step: str) -> None:
        """A session whose end is insisted on is cancelled again after a second, in the middle of what it says to a slow broker."""
        async with stub_broker() as broker:
            consumer = await kind.open(broker.settings(), QUEUE, prefetch=1, name="traps")
            broker.last.ignores = frozenset((step,))
            before = broker.last.seen.count(step)
            closing = asyncio.create_task(consumer.close())
            await until(lambda: broker.last.seen.count(step) > before)
            closing.cancel()
            async with asyncio.timeout(2):
                with pytest.raises(asyncio.CancelledError):
                    await closing
            assert broker.client_sockets() == 0


# --- P: the kernel's part


class TestP:
    async def test_the_kernel_gives_up_a_broker_that_acknowledges_nothing(self, kind: Kind) -> None:
        async with stub_broker() as broker, consumer_of(broker, kind) as consumer:
            writer = consumer._session._remembered.writer
            assert writer is not None
            found: socket.socket = writer.get_extra_info("socket")
            assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert 5_000 <= found.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 30_000
            assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1

    async def test_what_a_platform_does_not_have_is_left_out(self, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
        """macOS has no TCP_USER_TIMEOUT."""
        monkeypatch.delattr(socket, "TCP_USER_TIMEOUT")
        async with stub_broker() as broker, consumer_of(broker, kind):
            assert broker.client_sockets() == 1
