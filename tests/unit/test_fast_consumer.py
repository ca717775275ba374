"""What the fast consumer makes of a message off the wire: the same as the stock one, and something of what that one dies of."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import struct
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from aiormq.abc import DeliveredMessage
from pamqp import commands, header

from relay.errors import UnreadableMessage
from relay.inbox import storable
from relay.inbox.store import Stranger
from relay.message import Delivery, NotAnEvent, Row, to_event, to_message
from relay.rabbitmq import fast_consumer, stock_consumer
from relay.rabbitmq.fast_consumer import FastConsumer
from relay.rabbitmq.queues import InboxQueue
from relay.rabbitmq.wire import properties
from tests.harness.stub_broker import StubBroker, stub_broker
from tests.unit.test_wire_properties import some_properties

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
METHOD = commands.Basic.Deliver("ctag1.x", 7, True, "relay.events", "order.OrderPaid")
WIRE = struct.pack(">I", METHOD.index) + METHOD.marshal()
NEW = commands.Basic.Properties


def fast(block: bytes, body: bytes | None = b"{}") -> Delivery:
    return fast_consumer._delivery(WIRE, block, body)[0]


def stock(properties: commands.Basic.Properties, body: bytes = b"{}") -> Delivery:
    head = header.ContentHeader(0, len(body))
    head.unmarshal(struct.pack(">HHQ", 60, 0, len(body)) + properties.marshal())
    message = DeliveredMessage(delivery=METHOD, header=head, body=body, channel=None)  # type: ignore[arg-type]
    return stock_consumer._delivery(message)


def plain(value: Any) -> Any:
    """Without the difference between bytes that can be changed and bytes that cannot."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return bytes(value) if isinstance(value, bytearray) else value


def test_a_message_is_the_same_delivery_whichever_way_it_is_read() -> None:
    dice = random.Random(11)
    for _ in range(300):
        properties = NEW(**some_properties(dice))
        expected = stock(properties)
        others = {name: value for name, value in expected.others.items() if value is not None}
        assert fast(properties.marshal()) == expected._replace(headers=plain(expected.headers), others=others)


def test_a_relay_s_message_is_its_event() -> None:
    row = Row(
        id=1,
        aggregate_type="order",
        aggregate_id="4711",
        seq=2**40,
        event_type="OrderPaid",
        content_type="application/json",
        headers={"traceparent": "00-x", "yes": True, "n": -5},
        routing_key=None,
        created_at=NOON,
        body=b'{"amount": 1}',
    )
    sent = to_message(row, source="shop", routing_key="order.OrderPaid")
    block = NEW(
        message_id=sent.message_id,
        message_type=sent.event_type,
        app_id=sent.source,
        content_type=sent.content_type,
        timestamp=sent.occurred_at,
        headers=dict(sent.headers),
        delivery_mode=2,
    ).marshal()
    event = to_event(fast(block, sent.body))
    assert (event.source, event.aggregate_type, event.aggregate_id, event.seq) == ("shop", "order", "4711", 2**40)
    assert (event.event_type, event.message_id, event.body) == ("OrderPaid", sent.message_id, sent.body)
    assert (event.headers, event.occurred_at) == ({"traceparent": "00-x", "yes": True, "n": -5}, NOON)


def test_properties_that_cannot_be_read_are_malformed_and_go_into_the_quarantine_as_they_are() -> None:
    block = struct.pack(">H", 0x0080) + b"\x02\xff\xfe"
    delivery = fast(block, b"whole")
    assert (delivery.tag, delivery.redelivered, delivery.routing_key, delivery.body) == (
        7,
        True,
        METHOD.routing_key,
        b"whole",
    )
    with pytest.raises(NotAnEvent, match="malformed: a property is not UTF-8"):
        to_event(delivery)
    kept = json.loads(storable.properties_of_delivery(delivery))
    assert kept["unread"] == {"base64": "AIAC//4="}


def test_a_time_that_is_no_time_is_kept_in_the_quarantine_as_the_number_it_is() -> None:
    delivery = fast(struct.pack(">HQ", 0x0040, 2**64 - 1))
    assert json.loads(storable.properties_of_delivery(delivery))["timestamp"] == 2**64 - 1


def test_a_message_larger_than_is_kept_in_memory_is_left_to_the_delivery_limit() -> None:
    """Acknowledged it would be lost: nothing has its body."""
    with pytest.raises(UnreadableMessage, match="larger than 134217728 bytes"):
        fast(b"\0\0", None)


def tables_in_tables(deep: int) -> bytes:
    """A header whose many tables are read into far more memory than any other shape of so many bytes."""
    table = b"\0V"
    for _ in range(deep):
        table = b"\0F" + struct.pack(">I", len(table)) + table
    one = b"F" + struct.pack(">I", len(table)) + table
    many = one * (60_000 // len(one))
    headers = b"\1aA" + struct.pack(">I", len(many)) + many
    return struct.pack(">HI", 0x2000, len(headers)) + headers


def plain_block(headers: dict[str, Any]) -> bytes:
    """With the properties that a relay's message has, and no tables."""
    return NEW(
        content_type="a",
        headers=headers,
        delivery_mode=2,
        message_id="m",
        timestamp=NOON,
        message_type="A",
        app_id="s",
    ).marshal()


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEF"
PLAIN: dict[str, dict[str, Any]] = {
    "a relay's": {
        "x-aggregate-type": "order",
        "x-aggregate-id": "order-000123",
        "x-sequence": 2**40,
        "x-content-digest": "sha256:" + 64 * "0",
    },
    "texts": dict.fromkeys(LETTERS, "ab"),
    "signs": dict.fromkeys(LETTERS, "αb"),
    "astral": dict.fromkeys(LETTERS, "💩"),
    "numbers": dict.fromkeys(LETTERS, 2**62),
    "control": {"a": 10_000 * "\x01" + "\N{PILE OF POO}"},
    "long": {"a": 4000 * "a" + "\N{PILE OF POO}"},
}
SHAPES = {
    "none": b"\0\0",
    "flat": tables_in_tables(1),
    "deep": tables_in_tables(28),
    "no layout": NEW(headers={f"{name}{more}": "ab" for name in LETTERS for more in LETTERS}).marshal(),
    **{name: plain_block(headers) for name, headers in PLAIN.items()},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_message_counts_at_least_what_it_takes(shape: str) -> None:
    """Read or not, and on its way into the quarantine: what counts is what it will be, 60 kB of properties may be two megabytes."""
    body, block = bytes(10_000), SHAPES[shape]
    if shape in PLAIN:
        properties._layouts.learn(block)
    Stranger.of_delivery(fast(block, body), "foreign", "")
    gc.collect()
    tracemalloc.start()
    try:
        whole = (bytes(bytearray(WIRE)), bytes(bytearray(block)), bytes(bytearray(body)))
        unread, _ = tracemalloc.get_traced_memory()
        delivery, has_layout = fast_consumer._delivery(*whole)
        as_read = tracemalloc.get_traced_memory()[0] - len(block)
        size = fast_consumer._size((WIRE, block, body))
        left = fast_consumer._size_read(size, block, delivery.headers, names_are_shared=has_layout)
        del whole
        kept = Stranger.of_delivery(delivery, "foreign", "")
        del delivery
        gc.collect()  # what encoding has left behind
        for_the_quarantine, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept.body is not body
    assert has_layout == (shape in PLAIN)
    assert unread <= size
    assert max(as_read, for_the_quarantine) <= left
    assert (left == size) == (shape in ("flat", "deep"))


@asynccontextmanager
async def consuming(monkeypatch: pytest.MonkeyPatch, *, bound: int) -> AsyncIterator[tuple[StubBroker, FastConsumer]]:
    monkeypatch.setattr(fast_consumer, "HELD_BYTES", bound)
    properties._layouts.learn(SHAPES["a relay's"])
    queue = InboxQueue(name="heavy", bindings=("order.#",), delivery_limit=50)
    async with stub_broker() as broker:
        consumer = await FastConsumer.open(broker.settings(), queue, prefetch=1000, name="x")
        try:
            yield broker, consumer
        finally:
            await consumer.close()


async def test_what_is_held_is_what_waits_and_what_was_handed_out_and_nothing_once_that_is_acknowledged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with consuming(monkeypatch, bound=200_000) as (broker, consumer):
        for tag in range(1, 401):
            broker.last.deliver(tag, b"{}", SHAPES["a relay's"] if tag % 3 else b"\0\0")
        tags: list[int] = []
        while len(tags) < 400:
            one = consumer.next_ready() if len(tags) % 2 else None
            found = [one] if one is not None else await consumer.receive(7)
            tags += [delivery.tag for delivery in found]
            waiting = sum(size for size, _ in consumer._buffer)
            assert consumer.backpressure.held == waiting + sum(size for _, size in consumer._handed_out)
            await consumer.acknowledge(tags[-1])
        assert tags == list(range(1, 401))
        assert consumer.backpressure.held == 0
        assert not consumer.backpressure.is_holding_back


async def test_messages_that_take_less_than_they_might_let_others_in_before_they_are_acknowledged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with consuming(monkeypatch, bound=600_000) as (broker, consumer):
        for tag in range(1, 101):
            broker.last.deliver(tag, b"{}", SHAPES["a relay's"])
        async with asyncio.timeout(20):
            while len(consumer._buffer) < 100:
                consumer._changed.clear()
                await consumer._changed.wait()
        assert consumer.backpressure.is_holding_back
        assert len(await consumer.receive(100)) == 100
        assert not consumer.backpressure.is_holding_back
