"""The split stream on a real broker, and on one that does what no real broker does on demand (FASTLANE 5)."""

from __future__ import annotations

import asyncio
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import aio_pika
import aiormq
import pytest
from aiormq.abc import AbstractChannel, DeliveredMessage
from pydantic import SecretStr
from yarl import URL

from relay.errors import BrokerError, BrokerUnavailable
from relay.message import Delivery, NotAnEvent, to_event
from relay.rabbitmq.fast_consumer import FastConsumer
from relay.rabbitmq.queues import InboxQueue
from relay.rabbitmq.session import Session, close, connect
from relay.rabbitmq.transport import SplitTransport, _Protocol
from relay.rabbitmq.wire.frames import Content, Sink
from relay.rabbitmq.wire.methods import deliver
from relay.settings import RabbitmqSettings
from tests.faults.certificates import OPENSSL
from tests.harness.loop_clock import loop_clock
from tests.harness.stub_broker import stub_broker
from tests.integration.test_bad_input_messages import CAN_BE_READ, CANNOT_BE_READ, RawPublisher, message, short, table

QUEUE = InboxQueue(name="split", bindings=("order.#",), delivery_limit=50)
DEADLINE_S = 10


@asynccontextmanager
async def consumer_of(settings: RabbitmqSettings, prefetch: int = 1000) -> AsyncIterator[FastConsumer]:
    consumer = await FastConsumer.open(settings, QUEUE, prefetch=prefetch, name="split")
    try:
        yield consumer
    finally:
        await consumer.close()


def to(url: str) -> RabbitmqSettings:
    return RabbitmqSettings(url=SecretStr(url))


@asynccontextmanager
async def split_session(settings: RabbitmqSettings) -> AsyncIterator[tuple[SplitTransport, Session, AbstractChannel]]:
    """A connection whose stream is split, and a channel on it."""
    transport = SplitTransport()
    session = await connect(settings, name="split", transport=transport)
    try:
        yield transport, session, await channel_on(session)
    finally:
        await close(session)


async def channel_on(session: Session) -> AbstractChannel:
    return await (await session.channel(publisher_confirms=False)).get_underlay_channel()


async def past_the_sink(_: DeliveredMessage) -> None:
    raise AssertionError("a delivery went to aiormq")


async def received(consumer: FastConsumer, n: int) -> list[Delivery]:
    found: list[Delivery] = []
    async with asyncio.timeout(DEADLINE_S):
        while len(found) < n:
            found += await consumer.receive(100)
    return found


async def until(question: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not question():  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0.005)


# --- what others put into a queue


async def test_whatever_a_stranger_sends_is_handed_out_and_the_connection_stays(broker: str) -> None:
    """Half of it ends the connection of a consumer that reads with aiormq."""
    strange = {**CANNOT_BE_READ, **CAN_BE_READ}
    async with consumer_of(to(broker)) as consumer:
        async with RawPublisher.connect(broker) as raw:
            for flags, values, key in strange.values():
                await raw.publish(flags, values, routing_key=key)
        found = await received(consumer, len(strange))
        for delivery in found:
            with pytest.raises(NotAnEvent):
                to_event(delivery)
        assert [delivery.body for delivery in found] == [b"x"] * len(strange)
        faults = {name for name, delivery in zip(strange, found, strict=True) if delivery.fault is not None}
        assert faults == {"message id not UTF-8", "type not UTF-8"}
        keys = {name: delivery.routing_key for name, delivery in zip(strange, found, strict=True)}
        assert keys["routing key not UTF-8"] == "order.\\xff\\xfe"
        await consumer.acknowledge(found[-1].tag)
    async with consumer_of(to(broker)) as consumer:
        await publish(broker, b"next")
        assert [delivery.body for delivery in await received(consumer, 1)] == [b"next"]


async def publish(url: str, *bodies: bytes) -> None:
    connection = await aio_pika.connect(url)
    try:
        exchange = await (await connection.channel()).get_exchange("relay.events")
        for body in bodies:
            await exchange.publish(aio_pika.Message(body), "order.X")
    finally:
        await connection.close()


async def test_an_event_that_aio_pika_publishes_its_own_way_is_read(broker: str) -> None:
    """It always adds a priority, and encodes a small number in few bits."""
    sent = message(seq=5)
    async with consumer_of(to(broker)) as consumer:
        connection = await aio_pika.connect(broker)
        exchange = await (await connection.channel()).get_exchange("relay.events")
        await exchange.publish(
            aio_pika.Message(
                sent.body,
                message_id=sent.message_id,
                type=sent.event_type,
                app_id=sent.source,
                content_type=sent.content_type,
                headers=dict(sent.headers),
                timestamp=datetime(2026, 1, 2, tzinfo=UTC),
            ),
            "order.T",
        )
        await connection.close()
        (delivery,) = await received(consumer, 1)
        assert delivery.others == {"delivery_mode": 1, "priority": 0}
        assert to_event(delivery).seq == 5


async def test_a_message_whose_headers_fill_a_frame_is_read_again_when_it_is_delivered_again(broker: str) -> None:
    """The queue adds a header of its own then, and its frame exceeds what was negotiated: refused, it would come for ever."""
    largest = 131072 - 8
    text = largest - len(struct.pack(">HHQH", 60, 0, 0, 0)) - 4 - len(short(b"k") + b"S") - 4
    values = table(short(b"k") + b"S" + table(b"v" * text))
    async with consumer_of(to(broker)) as consumer:
        async with RawPublisher.connect(broker) as raw:
            await raw.publish(RawPublisher.HEADERS, values)
        (first,) = await received(consumer, 1)
        assert dict(first.headers) == {"k": "v" * text}
    async with consumer_of(to(broker)) as consumer:
        (again,) = await received(consumer, 1)
        assert (again.redelivered, again.headers["x-delivery-count"], len(again.headers["k"])) == (True, 1, text)
        await consumer.acknowledge(again.tag)


# --- beside aiormq on one connection


async def test_bodies_of_any_size_are_delivered_whole_and_what_was_asked_for_goes_to_who_asked(broker: str) -> None:
    sizes = [0, 1, 131_063, 131_064, 131_065, 262_129, 1_000_000]
    got: list[Content] = []
    async with split_session(to(broker)) as (transport, _, channel):
        transport.register(channel.number, Sink(got.append, max_body=2**21))
        queue = (await channel.queue_declare("", exclusive=True)).queue
        assert queue is not None
        await channel.basic_publish(b"g" * 300_000, routing_key=queue)
        answer = await channel.basic_get(queue, no_ack=True)
        assert (answer.body, got) == (b"g" * 300_000, [])
        await channel.basic_consume(queue, past_the_sink, no_ack=True)
        for size in sizes:
            await channel.basic_publish(bytes(size), routing_key=queue)
        await until(lambda: len(got) == len(sizes))
        assert [len(body or b"") for _, _, body in got] == sizes
        assert [deliver(method)[0] for method, _, _ in got] == list(range(2, len(sizes) + 2))  # the first was got


async def test_a_channel_s_number_that_is_given_out_again_does_not_lead_to_the_old_sink(broker: str) -> None:
    old: list[Content] = []
    new: list[DeliveredMessage] = []

    async def take(delivered: DeliveredMessage) -> None:
        new.append(delivered)

    async with split_session(to(broker)) as (transport, session, channel):
        transport.register(channel.number, Sink(old.append, max_body=100))
        with pytest.raises(Exception, match="NOT_FOUND"):
            await channel.queue_declare("nowhere", passive=True)
        second = await channel_on(session)
        assert second.number == channel.number
        queue = (await second.queue_declare("", exclusive=True)).queue
        assert queue is not None
        await second.basic_consume(queue, take, no_ack=True)
        await second.basic_publish(b"x", routing_key=queue)
        await until(lambda: bool(new))
        assert old == []


# --- the end of a connection


async def test_steady_messages_keep_a_connection_alive_without_a_heartbeat_and_silence_does_not() -> None:
    """A broker that sends messages sends no heartbeats beside them, and aiormq sees no message: it would give up."""
    async with stub_broker() as broker, consumer_of(broker.settings(heartbeat_s=5)) as consumer:
        with loop_clock() as clock:
            for tag in range(1, 101):
                broker.last.deliver(tag, b"x")
                await clock.forward(0.6)
            assert len(await received(consumer, 100)) == 100
            assert consumer._lost is None
            receiving = asyncio.create_task(consumer.receive(1))
            took_s = await clock.until(receiving.done, at_most_s=60)
            assert 5 < took_s <= 4 * (5 + 1) + 2
            with pytest.raises(BrokerUnavailable):
                await receiving


@pytest.mark.soak
async def test_steady_messages_from_a_real_broker_keep_a_connection_alive(broker: str) -> None:
    """The same in real time. At a heartbeat of 5 s aiormq gives up after 22 s (FASTLANE 9)."""
    settings = RabbitmqSettings(url=SecretStr(broker), heartbeat_s=5)
    async with consumer_of(settings) as consumer:
        connection = await aio_pika.connect(broker)
        exchange = await (await connection.channel()).get_exchange("relay.events")
        ends = asyncio.get_running_loop().time() + 60
        while asyncio.get_running_loop().time() < ends:
            await exchange.publish(aio_pika.Message(b"x"), "order.X")
            deliveries = await consumer.receive(100)
            await consumer.acknowledge(deliveries[-1].tag)
        await connection.close()


async def test_a_stream_that_cannot_be_followed_ends_the_consumer_and_says_so() -> None:
    async with stub_broker() as broker, consumer_of(broker.settings()) as consumer:
        broker.last.deliver(1, b"x")
        broker.last._write(b"\x02\0\x01\xff\xff\xff\xff")
        await until(lambda: consumer._lost is not None)
        with pytest.raises(BrokerUnavailable, match="cannot be followed: a frame of 4294967295 bytes"):
            await consumer.receive(1)
        await until(lambda: broker.client_sockets() == 0)


async def test_a_method_that_cannot_be_read_ends_the_consumer_and_says_so() -> None:
    async with stub_broker() as broker, consumer_of(broker.settings()) as consumer:
        broker.last._write(struct.pack(">BHI", 1, consumer._channel.number, 5) + b"\0\x3c\0\x3c\x09\xce")
        broker.last._send_content(consumer._channel.number, b"\0\0", b"x")
        async with asyncio.timeout(DEADLINE_S):
            with pytest.raises(BrokerUnavailable, match=r"cannot be followed: a basic\.deliver that is too short"):
                await consumer.receive(1)
        with pytest.raises(BrokerUnavailable, match="cannot be followed"):
            await consumer.acknowledge(1)


@pytest.mark.parametrize("who", ["sink", "after data", "blocked"])
async def test_what_a_callback_raises_cuts_the_connection_and_is_told(
    who: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("not to be lost")

    async with stub_broker() as broker, split_session(broker.settings()) as (transport, session, channel):
        sink = Sink(fails if who == "sink" else list[object]().append, max_body=100)
        transport.register(channel.number, sink)
        await channel.basic_consume("q", past_the_sink)
        if who == "after data":
            transport.after_data = fails
        if who == "blocked":
            transport.notify_blocked(fails)
            broker.last.block()
        closing = session.closing
        broker.last.deliver(1, b"x")
        async with asyncio.timeout(DEADLINE_S):
            reason = await transport.lost
            await asyncio.wait([closing])
        assert "not to be lost" in str(reason)
        assert isinstance(reason.__cause__, ZeroDivisionError)
        assert reason is transport.broken
        closing.exception()
    assert "Fatal error" not in caplog.text


async def test_nothing_more_is_taken_of_a_stream_that_was_cut() -> None:
    """With TLS what was read together is given on piece by piece, whatever became of the first."""
    got: list[Content] = []
    async with stub_broker() as broker, split_session(broker.settings()) as (transport, _, channel):
        transport.register(channel.number, Sink(got.append, max_body=100))
        protocol = transport.writer.transport.get_protocol()
        assert isinstance(protocol, asyncio.Protocol)
        protocol.data_received(b"HTTP/1.1 ")
        method = struct.pack(">HHB", 60, 60, 0) + bytes(9) + b"\0\0"
        head = struct.pack(">HHQH", 60, 0, 0, 0)
        for kind, payload in ((1, method), (2, head)):
            protocol.data_received(struct.pack(">BHI", kind, channel.number, len(payload)) + payload + b"\xce")
        await transport.lost
        assert got == []


async def test_a_stream_is_cut_on_any_event_loop() -> None:
    """uvloop's transports are no asyncio.WriteTransport: not cut, a session would last until its heartbeat or its confirms ran out."""

    class Foreign(asyncio.BaseTransport):
        cut = 0

        def abort(self) -> None:
            self.cut += 1

    socket = Foreign()
    owner, loop = SplitTransport(), asyncio.get_running_loop()
    protocol = _Protocol(owner, asyncio.StreamReader(loop=loop), loop)
    protocol.connection_made(socket)
    protocol.data_received(b"HTTP/1.1 400 Bad Request\r\n")
    assert socket.cut == 1
    assert owner.broken is not None


async def test_a_socket_that_uvloop_has_let_go_of_is_told_as_an_unavailable_broker() -> None:
    """Where asyncio's sockets raise, there is none."""

    class Ended(aiormq.TransportFactory):
        async def create(self, url: URL, **_: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            return MagicMock(), MagicMock(**{"get_extra_info.return_value": None})

    with pytest.raises(BrokerUnavailable, match="ended as soon as it was open"):
        await connect(RabbitmqSettings(), name="gone", transport=Ended())


async def test_cutting_the_session_is_told_at_once() -> None:
    async with stub_broker() as broker, split_session(broker.settings()) as (transport, session, _):
        closing = session.closing
        session.abort()
        async with asyncio.timeout(1):
            assert isinstance(await transport.lost, BrokerUnavailable)
            await asyncio.wait([closing])
        assert transport.broken is None
        closing.exception()
        await until(lambda: broker.client_sockets() == 0)


async def test_an_alarm_is_noticed_and_its_end() -> None:
    heard: list[bool] = []
    async with stub_broker() as broker, split_session(broker.settings()) as (transport, _, _):
        transport.notify_blocked(heard.append)
        broker.last.block()
        await until(lambda: transport.blocked)
        broker.last.unblock()
        await until(lambda: not transport.blocked)
        assert heard == [True, False]


# --- TLS


def certified(folder: Path) -> ssl.SSLContext:
    """A server's side of TLS, with a certificate that is its own authority."""
    assert OPENSSL is not None
    asked = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    named = ["-subj", "/CN=split", "-addext", "subjectAltName=IP:127.0.0.1"]
    out = ["-keyout", str(folder / "key"), "-out", str(folder / "certificate")]
    subprocess.run([OPENSSL, *asked, *named, *out], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "certificate", folder / "key")
    return context


@asynccontextmanager
async def tls_in_front_of(url: str, context: ssl.SSLContext) -> AsyncIterator[URL]:
    """A proxy that ends TLS."""
    behind = URL(url)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(65536):
                writer.write(piece)
                await writer.drain()
        except ConnectionError:
            pass  # one end is gone: the other is cut
        finally:
            writer.transport.abort()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_broker = await asyncio.open_connection(behind.host, behind.port)
        await asyncio.gather(pump(reader, to_broker[1]), pump(to_broker[0], writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield behind.with_scheme("amqps").with_port(server.sockets[0].getsockname()[1])
    finally:
        server.close()
        await server.wait_closed()


@pytest.mark.skipif(
    OPENSSL is None, reason="certificates are made with the openssl program, which this machine has not"
)
async def test_the_stream_is_split_behind_tls_and_a_stranger_s_certificate_is_refused(
    broker: str, tmp_path: Path
) -> None:
    async with tls_in_front_of(broker, certified(tmp_path)) as url:
        trusting = to(str(url.update_query(cafile=str(tmp_path / "certificate"))))
        async with consumer_of(trusting) as consumer:
            await publish(broker, b"x" * 300_000)
            assert [len(delivery.body) for delivery in await received(consumer, 1)] == [300_000]
        with pytest.raises(BrokerError, match="certificate"):
            await FastConsumer.open(to(str(url)), QUEUE, prefetch=1, name="split")
