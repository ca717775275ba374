"""Messages that no relay would send: handled or put into quarantine, acknowledged, and the next good event flows.

What aiormq cannot even read (`CANNOT_BE_READ`) goes into quarantine as well on the fast lane. On stock it ends the connection
that it is delivered on: there the broker sets such a message aside at the delivery limit, and nothing else with it.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from urllib.parse import unquote, urlsplit

import aio_pika
import pytest
from aiormq import spec
from pamqp import commands, frame
from structlog.testing import capture_logs

from relay.inbox import Event, Inbox
from relay.message import Message, Row, to_message
from relay.postgres.connect import Connection
from tests.integration.inbox_harness import SOURCE, Sent, World, eventually, record, recording, stream, world

EXCHANGE = "relay.events"
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def message(seq: int | None = 1, aggregate: str = "x", body: bytes = b"{}", event_type: str = "T") -> Message:
    row = Row(
        id=seq or 1,
        aggregate_type="order",
        aggregate_id=None if seq is None else aggregate,
        seq=seq,
        event_type=event_type,
        content_type="application/json",
        headers={},
        routing_key=None,
        created_at=NOON,
        body=body,
    )
    return to_message(row, source=SOURCE, routing_key="order.T")


def properties(m: Message, **changes: Any) -> spec.Basic.Properties:
    values: dict[str, Any] = {
        "message_id": m.message_id,
        "message_type": m.event_type,
        "app_id": m.source,
        "content_type": m.content_type,
        "timestamp": m.occurred_at,
        "headers": dict(m.headers),
        "delivery_mode": 2,
    }
    return spec.Basic.Properties(**(values | changes))


def with_headers(**changes: Any) -> spec.Basic.Properties:
    """A good message's properties with headers changed; None: left out."""
    headers = dict(message().headers) | {name.replace("_", "-"): value for name, value in changes.items()}
    return properties(message(), headers={name: value for name, value in headers.items() if value is not None})


async def send(w: World, *messages: tuple[bytes, spec.Basic.Properties]) -> None:
    async with w.channel() as channel:
        for body, props in messages:
            await channel.basic_publish(body, exchange=EXCHANGE, routing_key="order.T", properties=props)


async def last_good_event_flows(w: World, aggregate: str = "last") -> None:
    await w.publish([Sent(seq=1, aggregate=aggregate)])
    await eventually(lambda: w.effects(aggregate))


def nested(depth: int) -> Any:
    value: Any = {"deepest": True}
    for level in range(depth):
        value = {"k": value} if level % 2 else [value]
    return value


FOREIGN: dict[str, spec.Basic.Properties] = {
    "nothing at all": spec.Basic.Properties(),
    "no headers": spec.Basic.Properties(message_id="1", message_type="T", app_id="other", content_type="text/plain"),
    "other headers": spec.Basic.Properties(headers={"a": 1, "traceparent": "00-x"}),
    "an aggregate only": spec.Basic.Properties(headers={"x-aggregate-type": "order", "x-aggregate-id": "1"}),
    "huge headers": spec.Basic.Properties(headers={f"h{i}": "v" * 100 for i in range(900)}),
    "nested tables and arrays": spec.Basic.Properties(headers={"a": nested(30), "b": [1, [2, {"c": [None, True]}]]}),
    "deeply nested": spec.Basic.Properties(headers={"a": nested(120)}),
    "every type": spec.Basic.Properties(
        headers={
            "decimal": Decimal("123.45"),
            "float": 0.5,
            "bytes": bytearray(b"\0\xff"),
            "time": NOON,
            "none": None,
            "min": -(2**63),
            "empty": "",
            "nul": "a\0b",
            "": True,
        }
    ),
}
MALFORMED: dict[str, spec.Basic.Properties] = {
    "no aggregate type": with_headers(x_aggregate_type=None),
    "no aggregate id": with_headers(x_aggregate_id=None),
    "no sequence": with_headers(x_sequence=None),
    "no digest": with_headers(x_content_digest=None),
    "aggregate type a number": with_headers(x_aggregate_type=1),
    "aggregate type empty": with_headers(x_aggregate_type=""),
    "aggregate type too long": with_headers(x_aggregate_type="x" * 101),
    "aggregate type with NUL": with_headers(x_aggregate_type="a\0b"),
    "aggregate id a table": with_headers(x_aggregate_id={"a": nested(30)}),
    "aggregate id too long": with_headers(x_aggregate_id="ä" * 257),
    "aggregate id true": with_headers(x_aggregate_id=True),
    "aggregate id bytes": with_headers(x_aggregate_id=bytearray(b"1")),
    "aggregate id with NUL": with_headers(x_aggregate_id="a\0b"),
    "sequence a text": with_headers(x_sequence="1"),
    "sequence zero": with_headers(x_sequence=0),
    "sequence negative": with_headers(x_sequence=-1),
    "sequence 2^63 as 64 bits": with_headers(x_sequence=-(2**63)),
    "sequence true": with_headers(x_sequence=True),
    "sequence a float": with_headers(x_sequence=1.0),
    "sequence a decimal": with_headers(x_sequence=Decimal(1)),
    "sequence an array": with_headers(x_sequence=[1]),
    "sequence a time": with_headers(x_sequence=NOON),
    "digest of something else": with_headers(x_content_digest="sha256:" + "00" * 32),
    "digest not hexadecimal": with_headers(x_content_digest="sha256:xyz"),
    "digest of another kind": with_headers(x_content_digest="md5:00"),
    "digest a number": with_headers(x_content_digest=1),
    "no type": properties(message(), message_type=None),
    "no app id": properties(message(), app_id=None),
    "another type": properties(message(), message_type="U"),
    "another content type": properties(message(), content_type="text/plain"),
    "message id with NUL": properties(message(), message_id="a\0b"),
}


async def test_whatever_is_not_an_event_is_quarantined_whole_and_everything_else_flows(
    database: str, broker: str
) -> None:
    async with world(database, broker) as w, w.running(recording()):
        strange = {**FOREIGN, **MALFORMED}
        good = iter(stream("good", len(strange)))
        for name, props in strange.items():
            # The good messages' body, so that only what the name says is wrong; a foreign one's body is its name.
            await send(w, (name.encode() if name in FOREIGN else b"{}", props))
            await w.publish([next(good)])
        await w.until(lambda s: s.applied == len(strange) and s.quarantined == len(strange))
        assert await w.effects("good") == list(range(1, len(strange) + 1))
        rows = await w.db.fetch("SELECT reason, detail, body FROM relay.inbox_quarantine ORDER BY id")
        found = {name: row["reason"] for name, row in zip(strange, rows, strict=True)}
        assert found == dict.fromkeys(FOREIGN, "foreign") | dict.fromkeys(MALFORMED, "malformed")
        assert [row["body"] for row in rows[: len(FOREIGN)]] == [name.encode() for name in FOREIGN]
        assert all(row["detail"].isprintable() for row in rows)
        assert await w.held() == []
    assert await w.queue_is_empty()


async def test_many_strangers_at_once_are_one_batch_among_the_good(database: str, broker: str) -> None:
    async with world(database, broker) as w:
        async with w.running(recording()):
            pass
        foreign = [(b"x", spec.Basic.Properties()) for _ in range(200)]
        await send(w, *foreign[:100])
        await w.publish(stream("a", 50))
        await send(w, *foreign[100:])
        await w.publish(stream("b", 50))
        async with w.running(recording()):
            await w.until(lambda s: s.quarantined == 200 and s.applied == 100)
        assert await w.queue_is_empty()


async def test_the_quarantine_keeps_enough_to_put_a_message_back(database: str, broker: str) -> None:
    """A publisher forgot our headers: an operator adds them to what the row holds, and the event is applied."""
    m = message(aggregate="back", body=b'{"n": 1}')
    sent = properties(
        m,
        headers={"traceparent": "00-x", "n": 2**40, "yes": True, "table": {"a": [1, "b"]}},
        content_encoding="identity",
        priority=3,
        correlation_id="c-1",
        reply_to="answers",
        expiration="600000",
        user_id=urlsplit(broker).username,
    )
    async with world(database, broker) as w, w.running(recording()):
        await send(w, (m.body, sent))
        await w.until(lambda s: s.quarantined == 1)
        row = await w.db.fetchrow("SELECT * FROM relay.inbox_quarantine")
        assert row is not None
        kept = json.loads(row["properties"])
        assert kept == {
            "message_id": m.message_id,
            "type": "T",
            "app_id": SOURCE,
            "content_type": "application/json",
            "content_encoding": "identity",
            "delivery_mode": 2,
            "priority": 3,
            "correlation_id": "c-1",
            "reply_to": "answers",
            "expiration": "600000",
            "user_id": urlsplit(broker).username,
            "timestamp": NOON.isoformat(),
            "redelivered": False,
            "headers": {"traceparent": "00-x", "n": 2**40, "yes": True, "table": {"a": [1, "b"]}},
        }
        assert (row["exchange"], row["routing_key"], row["body"]) == (EXCHANGE, "order.T", m.body)
        again = {name: kept[name] for name in kept if name not in ("type", "redelivered", "timestamp")}
        back = spec.Basic.Properties(
            **(again | {"headers": kept["headers"] | dict(m.headers)}),
            message_type=kept["type"],
            timestamp=datetime.fromisoformat(kept["timestamp"]),
        )
        async with w.channel() as channel:
            await channel.basic_publish(
                row["body"], exchange=row["exchange"], routing_key=row["routing_key"], properties=back
            )
        await w.until(lambda s: s.applied == 1)
        assert await w.effects("back") == [1]


async def test_properties_that_mean_nothing_to_us_change_nothing(database: str, broker: str) -> None:
    props: list[dict[str, Any]] = [
        {"priority": 9},
        {"expiration": "600000"},
        {"reply_to": "answers", "correlation_id": "x" * 255},
        {"content_encoding": "gzip"},
        {"delivery_mode": 1},
        {"timestamp": None},
        {"timestamp": datetime(1970, 1, 1, tzinfo=UTC)},
    ]
    seen: list[Event] = []
    inbox = Inbox("shop")

    @inbox.on("T")
    async def keep(event: Event, tx: Connection) -> None:
        seen.append(event)

    async with world(database, broker) as w, w.running(inbox):
        for seq, changes in enumerate(props, 1):
            await send(w, (b"{}", properties(message(seq), **changes)))
        await w.until(lambda s: s.applied == len(props))
    assert {event.seq for event in seen} == set(range(1, len(props) + 1))


async def test_what_a_handler_cannot_read_is_held_and_the_others_flow(database: str, broker: str) -> None:
    inbox = recording()

    @inbox.on("J")
    async def read(event: Event, tx: Connection) -> None:
        event.json()
        await record(event, tx)

    bodies = [b"", b"no json", b"\xff\xfe\xfd", b'{"a": ', b"[" * 100_000, b"1" * 10_000, b"\0"]
    async with world(database, broker, max_attempts=2) as w, w.running(inbox):
        for n, body in enumerate(bodies):
            name = f"bad{n}"
            await w.publish([Sent(seq=1, aggregate=name, event_type="J", body=body), *stream(name, 2)[1:]])
        await w.publish([Sent(seq=s, aggregate="good", event_type="J") for s in (1, 2, 3)])
        await w.until(lambda s: s.stuck == len(bodies) and s.applied == 3 and s.behind == len(bodies))
        assert await w.effects("good") == [1, 2, 3]
        held = await w.db.fetch(
            "SELECT error, body FROM relay.inbox_held WHERE reason = 'failed' ORDER BY aggregate_id"
        )
        assert [row["body"] for row in held] == bodies
        assert [row["error"].split(":")[0] for row in held] == [
            "JSONDecodeError",
            "JSONDecodeError",
            "UnicodeDecodeError",
            "JSONDecodeError",
            "RecursionError",
            "ValueError",
            "JSONDecodeError",
        ]
        await last_good_event_flows(w)


@pytest.mark.parametrize("size", [0, 16 * 1024 * 1024], ids=["empty", "16 MiB"])
async def test_a_body_of_any_size_is_applied_held_and_quarantined(database: str, broker: str, size: int) -> None:
    body = b"\xff" * size
    sizes: list[int] = []
    inbox = recording()

    @inbox.on("B")
    async def measure(event: Event, tx: Connection) -> None:
        sizes.append(len(event.body))
        await record(event, tx)

    async with world(database, broker) as w, w.running(inbox):
        await w.publish([Sent(seq=2, event_type="B", body=body)])
        await w.until(lambda s: s.early == 1)
        await w.publish([Sent(seq=1, event_type="B", body=body)])
        await send(w, (body, spec.Basic.Properties()))
        await w.until(lambda s: s.applied == 2 and s.quarantined == 1)
        assert sizes == [size, size]
        assert await w.db.fetchval("SELECT octet_length(body) FROM relay.inbox_quarantine") == size
        await last_good_event_flows(w)


async def test_an_event_with_the_largest_headers_is_held_and_applied(database: str, broker: str) -> None:
    more = {f"h{i}": "v" * 100 for i in range(1000)} | {"deep": nested(100), "nul": "a\0b"}
    seen: list[Event] = []
    inbox = Inbox("shop")

    @inbox.on("T")
    async def keep(event: Event, tx: Connection) -> None:
        seen.append(event)

    async with world(database, broker) as w, w.running(inbox):
        for seq in (2, 1):
            m = message(seq)
            await send(w, (m.body, properties(m, headers={**m.headers, **more})))
        await w.until(lambda s: s.applied == 2)
    assert [event.seq for event in seen][-2:] == [1, 2]
    assert len(seen[-1].headers) == 1001


async def test_the_same_number_with_other_content_is_a_conflict_and_the_first_stays(database: str, broker: str) -> None:
    async with world(database, broker) as w, w.running(recording()):
        await w.publish(stream("a", 2))
        await w.until(lambda s: s.applied == 2)
        await w.publish([Sent(seq=2, aggregate="a", body=b'{"other": 1}'), Sent(seq=2, aggregate="a")])
        await w.publish([Sent(seq=5, aggregate="a"), Sent(seq=5, aggregate="a", body=b"[5]")])
        await w.until(lambda s: s.quarantined == 2 and s.duplicates == 1 and s.early == 1)
        assert await w.quarantine() == ["conflict", "conflict"]
        assert await w.effects("a") == [1, 2]
        await w.publish(stream("a", 4)[2:])
        await w.until(lambda s: s.applied == 5)
        assert await w.effects("a") == [1, 2, 3, 4, 5]


async def test_numbers_of_every_width_that_a_stock_publisher_sends_are_read_rightly(database: str, broker: str) -> None:
    """aio-pika encodes a whole number by its size: 8, 16, 32 or 64 bits."""
    numbers = [1, 127, 128, 255, 256, 32_767, 32_768, 65_535, 65_536, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1]
    async with world(database, broker, policies={"order": "latest"}) as w, w.running(recording()):
        connection = await aio_pika.connect(broker)
        try:
            channel = await connection.channel()
            exchange = await channel.get_exchange(EXCHANGE)
            for seq in numbers:
                m = message(seq)
                await exchange.publish(
                    aio_pika.Message(
                        m.body,
                        message_id=m.message_id,
                        type=m.event_type,
                        app_id=m.source,
                        content_type=m.content_type,
                        headers=dict(m.headers),
                    ),
                    "order.T",
                )
        finally:
            await connection.close()
        await w.until(lambda s: s.applied == len(numbers))
        assert await w.effects("x") == numbers
        assert await w.quarantine() == []


# --- what the client library cannot read


class RawPublisher:
    """AMQP frames built by hand: no client library sends such properties."""

    HEADERS, TIMESTAMP, MESSAGE_ID, TYPE = 0x2000, 0x0040, 0x0080, 0x0020

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    @asynccontextmanager
    async def connect(cls, url: str) -> AsyncIterator[RawPublisher]:
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        publisher = cls(reader, writer)
        try:
            writer.write(b"AMQP\0\0\x09\x01")
            await publisher._expect("Connection.Start")
            plain = f"\0{unquote(parts.username or '')}\0{unquote(parts.password or '')}"
            publisher._method(
                0, commands.Connection.StartOk(client_properties={}, mechanism="PLAIN", response=plain, locale="en_US")
            )
            await publisher._expect("Connection.Tune")
            publisher._method(0, commands.Connection.TuneOk(10, 131072, 0))
            publisher._method(0, commands.Connection.Open(virtual_host=unquote(parts.path[1:])))
            await publisher._expect("Connection.OpenOk")
            publisher._method(1, commands.Channel.Open())
            await publisher._expect("Channel.OpenOk")
            publisher._method(1, commands.Confirm.Select())
            await publisher._expect("Confirm.SelectOk")
            yield publisher
        finally:
            writer.close()
            await writer.wait_closed()

    async def publish(self, flags: int, values: bytes, *, routing_key: bytes = b"order.T", body: bytes = b"x") -> None:
        """One message to the exchange, confirmed. `flags` and `values` are the property list as it stands on the wire."""
        self._frame(1, struct.pack(">HHH", 60, 40, 0) + short(EXCHANGE.encode()) + short(routing_key) + b"\0")
        self._frame(2, struct.pack(">HHQH", 60, 0, len(body), flags) + values)
        self._frame(3, body)
        await self._expect("Basic.Ack")

    def _method(self, channel: int, method: Any) -> None:
        self._writer.write(frame.marshal(method, channel))

    def _frame(self, kind: int, content: bytes) -> None:
        self._writer.write(struct.pack(">BHI", kind, 1, len(content)) + content + b"\xce")

    async def _expect(self, name: str) -> None:
        head = await self._reader.readexactly(7)
        rest = await self._reader.readexactly(struct.unpack(">I", head[3:])[0] + 1)
        _, _, got = frame.unmarshal(head + rest)
        assert got.name == name, f"{got.name}: {dict(got)}"  # type: ignore[arg-type]


def short(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def table(entries: bytes) -> bytes:
    return struct.pack(">I", len(entries)) + entries


def deep_table(depth: int) -> bytes:
    value = table(b"")
    for _ in range(depth):
        value = table(b"\x01kF" + value)
    return value


def deep_array(depth: int) -> bytes:
    value = table(b"")
    for _ in range(depth):
        value = table(b"A" + value)
    return table(b"\x01kA" + value)


Case = tuple[int, bytes, bytes]


def encoded(props: spec.Basic.Properties) -> Case:
    """A client library's encoding, for what it would otherwise fill in: aiormq gives every message an id."""
    flags = props.marshal()
    return struct.unpack(">H", flags[:2])[0], flags[2:], b"order.T"


CANNOT_BE_READ: dict[str, Case] = {
    "header name not UTF-8": (RawPublisher.HEADERS, table(b"\x02\xff\xfet\x01"), b"order.T"),
    "tables nested 1500": (RawPublisher.HEADERS, deep_table(1500), b"order.T"),
    "arrays nested 1500": (RawPublisher.HEADERS, deep_array(1500), b"order.T"),
    "header time 2^64-1": (RawPublisher.HEADERS, table(b"\x01tT" + b"\xff" * 8), b"order.T"),
    "header time 10^16": (RawPublisher.HEADERS, table(b"\x01tT" + struct.pack(">Q", 10**16)), b"order.T"),
    "timestamp 2^64-1": (RawPublisher.TIMESTAMP, b"\xff" * 8, b"order.T"),
    "timestamp 10^16": (RawPublisher.TIMESTAMP, struct.pack(">Q", 10**16), b"order.T"),
    "message id not UTF-8": (RawPublisher.MESSAGE_ID, short(b"\xff\xfe"), b"order.T"),
    "type not UTF-8": (RawPublisher.TYPE, short(b"\xff\xfe"), b"order.T"),
    "routing key not UTF-8": (0, b"", b"order.\xff\xfe"),
}
CAN_BE_READ: dict[str, Case] = {
    "no message id": encoded(properties(message(body=b"x"), message_id=None)),
    "header value not UTF-8": (RawPublisher.HEADERS, table(b"\x01kS" + table(b"\xff\xfe")), b"order.T"),
    "a header twice": (RawPublisher.HEADERS, table(b"\x01kt\x01" * 2), b"order.T"),
    "tables nested 300": (RawPublisher.HEADERS, deep_table(300), b"order.T"),
    "arrays nested 300": (RawPublisher.HEADERS, deep_array(300), b"order.T"),
    "timestamp 0": (RawPublisher.TIMESTAMP, bytes(8), b"order.T"),
    "timestamp in ms": (RawPublisher.TIMESTAMP, struct.pack(">Q", 1_700_000_000_000), b"order.T"),
    "header time 0": (RawPublisher.HEADERS, table(b"\x01tT" + bytes(8)), b"order.T"),
    "decimal of 255 places": (RawPublisher.HEADERS, table(b"\x01kD\xff" + struct.pack(">i", 12345)), b"order.T"),
    "a header without a name": (RawPublisher.HEADERS, table(b"\0t\x01"), b"order.T"),
    "sequence not UTF-8": (RawPublisher.HEADERS, table(short(b"x-sequence") + b"S" + table(b"\xff")), b"order.T"),
    "routing key of control characters": (0, b"", b"order.\x1b[2J\r\n\0"),
}


async def depth(w: World, queue: str) -> int:
    async with w.channel() as channel:
        answer = await channel.queue_declare(queue, passive=True)
        assert answer.message_count is not None
        return answer.message_count


async def test_hand_made_messages_that_can_be_read_are_quarantined(database: str, broker: str) -> None:
    async with world(database, broker) as w, w.running(recording()):
        async with RawPublisher.connect(broker) as raw:
            for seq, (flags, values, key) in enumerate(CAN_BE_READ.values(), 1):
                await raw.publish(flags, values, routing_key=key)
                await w.publish([Sent(seq=seq)])
        await w.until(lambda s: s.quarantined == len(CAN_BE_READ) and s.applied == len(CAN_BE_READ))
        malformed = [name in ("no message id", "sequence not UTF-8") for name in CAN_BE_READ]
        assert await w.quarantine() == ["malformed" if yes else "foreign" for yes in malformed]
    assert await w.queue_is_empty()
    assert await depth(w, "shop.dead") == 0


async def test_on_the_fast_lane_what_aiormq_cannot_read_is_quarantined_and_the_session_goes_on(
    database: str, broker: str
) -> None:
    async with world(database, broker) as w:
        with capture_logs() as log:
            async with w.running(recording()), RawPublisher.connect(broker) as raw:
                for seq, (flags, values, key) in enumerate(CANNOT_BE_READ.values(), 1):
                    await raw.publish(flags, values, routing_key=key)
                    await w.publish([Sent(seq=seq)])
                await w.until(lambda s: s.quarantined == len(CANNOT_BE_READ) and s.applied == len(CANNOT_BE_READ))
        assert [line["event"] for line in log].count("inbox_started") == 1
        malformed = [name in ("message id not UTF-8", "type not UTF-8") for name in CANNOT_BE_READ]
        assert await w.quarantine() == ["malformed" if yes else "foreign" for yes in malformed]
        rows = await w.db.fetch("SELECT routing_key, properties, body FROM relay.inbox_quarantine ORDER BY id")
        kept = {name: json.loads(row["properties"]) for name, row in zip(CANNOT_BE_READ, rows, strict=True)}
        assert {row["body"] for row in rows} == {b"x"}
        assert rows[-1]["routing_key"] == "order.\\xff\\xfe"
        assert kept["timestamp 10^16"]["timestamp"] == 10**16
        assert kept["header time 2^64-1"]["headers"] == {"t": 2**64 - 1}
        assert set(kept["message id not UTF-8"]["unread"]) == {"base64"}
    assert await w.queue_is_empty()
    assert await depth(w, "shop.dead") == 0


@pytest.mark.parametrize("name", ["header name not UTF-8", "tables nested 1500", "routing key not UTF-8"])
async def test_a_message_that_cannot_be_read_goes_to_the_dead_letters_alone(
    database: str, broker: str, name: str
) -> None:
    """Without care everything in the consumer's window would go with it: each death counts as a delivery of all of them."""
    flags, values, key = CANNOT_BE_READ[name]
    async with world(database, broker, client="stock", delivery_limit=3, prefetch=50) as w:
        async with w.running(recording()):
            pass  # the queue is there
        await w.publish(stream("a", 30))
        async with RawPublisher.connect(broker) as raw:
            await raw.publish(flags, values, routing_key=key)
        await w.publish(stream("b", 130))
        with capture_logs() as log:
            await one_is_set_aside(w)
        prefetches = [line["prefetch"] for line in log if line["event"] == "inbox_started"]
        assert prefetches == [50, 1, 1, 1, 1, 50]  # one by one until it is gone, then as before
        assert {line["error"] for line in log if line["event"] == "session_failed"} == {"UnreadableMessage"}


async def one_is_set_aside(w: World) -> None:
    async with running_through_deaths(w, recording()):
        await w.until(lambda s: s.applied == 160)
        await eventually(lambda: depth(w, "shop.dead"))
        await last_good_event_flows(w)
        assert await w.effects("a") == list(range(1, 31))
        assert await w.effects("b") == list(range(1, 131))
    assert await depth(w, "shop.dead") == 1
    assert await w.queue_is_empty()
    assert await w.held() == []
    assert await w.quarantine() == []


async def test_many_messages_that_cannot_be_read_go_to_the_dead_letters_alone(database: str, broker: str) -> None:
    """With two consumers, so that each dies of what the other gave back."""
    async with world(database, broker, client="stock", delivery_limit=6, prefetch=50) as w:
        async with w.running(recording()):
            pass
        async with RawPublisher.connect(broker) as raw:
            for n, (flags, values, key) in enumerate(CANNOT_BE_READ.values()):
                await w.publish(stream(f"a{n}", 20))
                await raw.publish(flags, values, routing_key=key)
        async with running_through_deaths(w, recording(), consumers=2):
            await w.until(lambda s: s.applied == 20 * len(CANNOT_BE_READ))
            await eventually(lambda: dead_are(w, len(CANNOT_BE_READ)))
            await last_good_event_flows(w)
        assert await w.queue_is_empty()
        assert await w.held() == []


async def dead_are(w: World, n: int) -> bool:
    return await depth(w, "shop.dead") == n


@asynccontextmanager
async def running_through_deaths(w: World, inbox: Inbox, *, consumers: int = 1) -> AsyncIterator[None]:
    """The inbox, without waiting for a moment in which all are subscribed: they die too fast for that."""
    stop = asyncio.Event()
    tasks = [asyncio.create_task(inbox.run(w.settings, stop=stop, on_commit=w.committed)) for _ in range(consumers)]
    try:
        yield
    finally:
        stop.set()
        async with asyncio.timeout(20):
            await asyncio.gather(*tasks)
