"""What nobody of ours has published comes into the consumers' queue: contradictions, strangers, nonsense.

All of it must end in the quarantine, whole, and none of it may stop or change anything. It is sent into the queue alone, so
that the audit stays the witness of what relay has published.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import aio_pika

from relay.message import CONTENT_DIGEST, Row, to_message
from tests.faults.lab.fault import fault
from tests.faults.lab.kinds.messages import EFFECTS, connected
from tests.faults.lab.stage import Stage

SOURCE = "shop"
QUARANTINED_S = 20.0
QUIET_S = 15.0
"""Longest wait for the end of all transactions that were going on, and for their effects."""

EVERYTHING = (
    *("relay", "relay-amqp", "relay-pg", "consumer", "consumer-amqp", "consumer-pg"),
    *("broker", "producers", "producer-db", "consumer-db"),
)

OPEN = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'lab_producer' AND xact_start IS NOT NULL"
GIVEN_OUT = "SELECT aggregate_id, last_seq FROM relay.outbox_aggregate WHERE aggregate_type = 'account'"
APPLIED = """
SELECT a.aggregate_id, a.last_seq, e.message_id FROM relay.inbox_aggregate a
JOIN effect e ON e.kind = a.aggregate_type AND e.aggregate = a.aggregate_id AND e.seq = a.last_seq
WHERE a.aggregate_type = 'account' AND NOT a.blocked AND a.last_digest IS NOT NULL
"""
QUARANTINED = "SELECT count(DISTINCT body) FROM relay.inbox_quarantine WHERE reason = ANY ($1::text[]) AND body = ANY ($2::bytea[])"


@fault("forged messages that contradict applied ones", rows=(27, 36), touches=EVERYTHING)
async def contradictions(stage: Stage, dice: random.Random) -> int:
    """The number and id of an event that was applied last, with other content: as after a failover that has lost a tail.

    An older number with other content is only a duplicate (what was applied under it is not remembered), so producers
    pause until each aggregate's last event is known. Bites: forgeries in the quarantine.
    """
    stage.workload.hold()
    try:
        known = await _applied_last(stage)
        forged = [_forged(row, dice) for row in dice.sample(known, min(len(known), dice.randint(3, 10)))]
        async for _ in _sent(stage, forged):
            stage.expected_conflicts += 1
        return await _quarantined(stage, ["conflict"], forged)
    finally:
        stage.workload.release()


@fault("strangers in the queue", rows=(28,), touches=("broker",))
async def strangers(stage: Stage, dice: random.Random) -> int:
    """Messages of somebody who knows nothing of relay: text, JSON, bytes, with and without properties."""
    sent = [_stranger(dice, n) for n in range(dice.randint(5, 20))]
    async for _ in _sent(stage, sent):
        stage.expected_strangers += 1
    return await _quarantined(stage, ["foreign"], sent)


@fault("malformed messages in the queue", rows=(30, 31), touches=("broker",))
async def malformed(stage: Stage, dice: random.Random) -> int:
    """Headers that look like relay's and cannot be: every one of them would be applied if it were believed."""
    sent = list(_malformed(dice))
    async for _ in _sent(stage, sent):
        stage.expected_strangers += 1
    return await _quarantined(stage, ["foreign", "malformed"], sent)


async def _applied_last(stage: Stage) -> list[Any]:
    """The accounts of which everything is applied, once no producer has a transaction any more; none if that takes too long."""
    known: list[Any] = []

    async def are_quiet() -> bool:
        if (await stage.producer_sql(OPEN))[0]["count"]:
            return False
        given_out = {row["aggregate_id"]: row["last_seq"] for row in await stage.producer_sql(GIVEN_OUT)}
        applied = {row["aggregate_id"]: row for row in await stage.consumer_sql(APPLIED)}
        known[:] = [row for name, row in sorted(applied.items()) if given_out.get(name) == row["last_seq"]]
        return len(known) == len(given_out)

    return known if await stage.until(are_quiet, timeout_s=QUIET_S) else []


async def _sent(stage: Stage, messages: Sequence[aio_pika.Message]) -> AsyncIterator[None]:
    """Once for each message that the consumers' queue has accepted."""
    async with connected(stage, "lab forger") as opened:
        channel = await opened.channel(publisher_confirms=True, on_return_raises=True)
        for message in messages:
            await channel.default_exchange.publish(message, EFFECTS)
            yield


async def _quarantined(stage: Stage, reasons: list[str], messages: Sequence[aio_pika.Message]) -> int:
    """How many of these messages the quarantine holds, once it holds them all. Each has a body of its own."""
    found = 0
    bodies = [message.body for message in messages]

    async def hold_all() -> bool:
        nonlocal found
        found = (await stage.consumer_sql(QUARANTINED, reasons, bodies))[0]["count"]
        return bool(found == len(bodies))

    await stage.until(hold_all, timeout_s=QUARANTINED_S)
    return found


def _content(dice: random.Random) -> bytes:
    """What the handler would apply."""
    return json.dumps({"token": f"forged-{dice.getrandbits(64):x}", "amount": 1_000_000, "padding": ""}).encode()


def _forged(row: Any, dice: random.Random) -> aio_pika.Message:
    """Valid in itself; the message id is the contradicted one's, since that follows from source, aggregate and number."""
    message = _amqp(_content(dice), aggregate_id=row["aggregate_id"], seq=row["last_seq"])
    if message.message_id != row["message_id"]:
        raise AssertionError("a forgery has another id than what it contradicts")
    return message


def _amqp(body: bytes, *, aggregate_id: str, seq: int) -> aio_pika.Message:
    row = Row(
        id=1,
        aggregate_type="account",
        aggregate_id=aggregate_id,
        seq=seq,
        event_type="Booked",
        content_type="application/json",
        headers={},
        routing_key=None,
        created_at=datetime.now(UTC),
        body=body,
    )
    message = to_message(row, source=SOURCE, routing_key=EFFECTS)
    return aio_pika.Message(
        message.body,
        message_id=message.message_id,
        type=message.event_type,
        app_id=message.source,
        timestamp=message.occurred_at,
        content_type=message.content_type,
        headers=dict(message.headers),
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
    )


def _stranger(dice: random.Random, number: int) -> aio_pika.Message:
    name = f"{dice.getrandbits(64):x}"
    return dice.choice(
        (
            aio_pika.Message(dice.randbytes(dice.randint(20, 5000))),
            aio_pika.Message(name.encode(), content_type="text/plain"),
            aio_pika.Message(
                _content(dice), content_type="application/json", type="Booked", app_id=SOURCE, message_id=name
            ),
            aio_pika.Message(json.dumps({"cmd": name}).encode(), headers={"task": "t", "id": number, "retries": 0}),
            aio_pika.Message(name.encode(), correlation_id=name, reply_to="amq.rabbitmq.reply-to.x", priority=7),
            aio_pika.Message(
                name.encode(),
                headers={"x" * 120: "y" * 30_000, "": "", "nested": {"a": [1, {"b": bytearray(b"\xff")}]}},
            ),
        )
    )


_MALFORMED_HEADERS: tuple[dict[str, Any], ...] = (
    {"x-sequence": "1"},
    {"x-sequence": 0},
    {"x-sequence": -(2**63)},
    {"x-sequence": True},
    {"x-sequence": 1.5},
    {"x-sequence": [1]},
    {"x-sequence": datetime.now(UTC)},
    {"x-sequence": None},
    {"x-aggregate-id": ""},
    {"x-aggregate-id": "\0"},
    {"x-aggregate-id": "ä" * 300},
    {"x-aggregate-id": {"nested": {"deeper": ["x"]}}},
    {"x-aggregate-id": bytearray(b"\xff\xfe")},
    {"x-aggregate-id": None},
    {"x-aggregate-type": 7},
    {"x-aggregate-type": "a" * 101},
    {"x-aggregate-type": None},
    {CONTENT_DIGEST: "sha256:" + "0" * 64},
    {CONTENT_DIGEST: "sha256:nonsense"},
    {CONTENT_DIGEST: "md5:d41d8cd98f00b204e9800998ecf8427e"},
    {CONTENT_DIGEST: 5},
)


def _malformed(dice: random.Random) -> Iterable[aio_pika.Message]:
    """One of each sort. What is changed is all that is wrong with it."""
    for headers in _MALFORMED_HEADERS:
        message = _of_nobody(dice)
        message.headers.update(headers)
        yield message
    for attribute, value in (
        ("message_id", "\0"),
        ("app_id", None),
        ("app_id", "bad\0name"),
        ("type", None),
        ("type", "relay.marks"),
        ("type", "relay.gone"),
        ("content_type", "text/plain"),
    ):
        message = _of_nobody(dice)
        setattr(message, attribute, value)
        yield message


def _of_nobody(dice: random.Random) -> aio_pika.Message:
    """Valid, the first event of an account that does not exist."""
    return _amqp(_content(dice), aggregate_id=str(uuid.UUID(int=dice.getrandbits(128))), seq=1)
