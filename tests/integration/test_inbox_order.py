"""The inbox against a real broker and database: once, in order, whatever the broker delivers."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from aiormq import spec

from relay.inbox import Event, Inbox
from relay.postgres.connect import Connection
from tests.integration.inbox_harness import Sent, recording, stream, tombstone, world


async def test_shuffled_and_duplicated_events_are_applied_once_and_in_order(database: str, broker: str) -> None:
    events = [e for name in "abcdefgh" for e in stream(name, 30)]
    events += random.Random(1).sample(events, 60)
    random.Random(2).shuffle(events)
    async with world(database, broker, batch=13) as w:
        async with w.running(recording()):
            await w.publish(events)
            await w.until(lambda s: s.applied == 240 and s.received == 300)
        assert all([await w.effects(name) == list(range(1, 31)) for name in "abcdefgh"])
        assert await w.held() == []
        assert 50 <= w.total.duplicates <= 60  # a duplicate that is applied in place of its held twin counts as applied
        assert await w.queue_is_empty()


async def test_competing_consumers_on_one_queue_keep_order_and_apply_once(database: str, broker: str) -> None:
    events = [e for name in "abcdef" for e in stream(name, 100)]
    random.Random(3).shuffle(events)
    events.sort(key=lambda e: (e.seq or 0) // 10)  # near, but not in, order
    async with world(database, broker, batch=7, prefetch=7) as w:
        async with w.running(recording(), consumers=4):
            await w.publish(events + events[::5])
            await w.until(lambda s: s.applied == 600 and s.received >= 720)
        assert all([await w.effects(name) == list(range(1, 101)) for name in "abcdef"])
        assert await w.held() == []


async def test_competing_consumers_meet_new_aggregates_at_once_and_none_is_left_waiting(
    database: str, broker: str
) -> None:
    """The race for an aggregate without a cursor: one applies 1 while the other holds 2."""
    async with world(database, broker, batch=1, prefetch=1) as w:
        async with w.running(recording(), consumers=4):
            await w.publish([Sent(seq=seq, aggregate=str(i)) for i in range(150) for seq in (2, 1)])
            await w.until(lambda s: s.applied == 300)
        assert await w.held() == []
        assert await w.db.fetchval(
            "SELECT bool_and(seqs = '{1,2}') FROM (SELECT array_agg(seq ORDER BY id) AS seqs FROM effect GROUP BY aggregate) a"
        )


async def test_an_early_event_waits_in_the_table_and_follows_its_predecessor(database: str, broker: str) -> None:
    async with world(database, broker) as w, w.running(recording()):
        await w.publish([Sent(seq=3), Sent(seq=2)])
        await w.until(lambda s: s.early == 2)
        assert await w.held() == [(2, "early", "waiting", 0), (3, "early", "waiting", 0)]
        await w.publish([Sent(seq=3)])
        await w.until(lambda s: s.duplicates == 1)
        await w.publish([Sent(seq=1)])
        await w.until(lambda s: s.applied == 3)
        assert await w.effects() == [1, 2, 3]
        assert await w.held() == []


async def test_a_long_run_of_held_events_follows_in_portions(database: str, broker: str) -> None:
    async with world(database, broker) as w, w.running(recording()):
        await w.publish(stream("1", 300)[1:])
        await w.until(lambda s: s.early == 299)
        await w.publish([Sent(seq=1)])
        await w.until(lambda s: s.applied == 300)
        assert await w.effects() == list(range(1, 301))
        assert await w.held() == []


async def test_held_events_survive_with_all_that_a_handler_sees(database: str, broker: str) -> None:
    seen: list[Event] = []
    inbox = Inbox("shop")

    @inbox.on("T")
    async def keep(event: Event, tx: Connection) -> None:
        seen.append(event)

    async with world(database, broker) as w, w.running(inbox):
        await w.publish([Sent(seq=2, body=b'{"a": 1}')])
        await w.until(lambda s: s.early == 1)
        await w.publish([Sent(seq=1, body=b'{"a": 1}')])
        await w.until(lambda s: s.applied == 2)
    first, second = seen
    assert replace(second, seq=1, message_id=first.message_id, occurred_at=first.occurred_at) == first
    assert second.headers == {"traceparent": "00-x"}
    assert second.occurred_at is not None


async def test_the_same_number_with_other_content_is_quarantined_wherever_the_first_one_is(
    database: str, broker: str
) -> None:
    async with world(database, broker) as w, w.running(recording()):
        await w.publish([Sent(seq=1), Sent(seq=3)])
        await w.until(lambda s: s.applied == 1 and s.early == 1)
        await w.publish([Sent(seq=1, body=b"other"), Sent(seq=3, body=b"other")])
        await w.until(lambda s: s.quarantined == 2)
        await w.publish([Sent(seq=2)])
        await w.until(lambda s: s.applied == 3)
        assert await w.effects() == [1, 2, 3]
        assert await w.quarantine() == ["conflict", "conflict"]


async def test_tombstones_and_types_without_a_handler_use_up_their_number(database: str, broker: str) -> None:
    async with world(database, broker) as w, w.running(recording()):
        await w.publish([Sent(seq=1), tombstone(2), Sent(seq=3, event_type="Unknown"), Sent(seq=4)])
        await w.until(lambda s: s.applied == 2 and s.skipped == 2)
        await w.publish([Sent(seq=2), tombstone(3)])
        await w.until(lambda s: s.duplicates == 2)
        assert await w.effects() == [1, 4]
        assert await w.quarantine() == []


async def test_a_tombstone_takes_the_place_of_a_held_event(database: str, broker: str) -> None:
    async with world(database, broker) as w, w.running(recording()):
        await w.publish([Sent(seq=2)])
        await w.until(lambda s: s.early == 1)
        await w.publish([tombstone(2)])
        await w.until(lambda s: s.duplicates == 1)
        await w.publish([Sent(seq=1), Sent(seq=3)])
        await w.until(lambda s: s.applied == 2 and s.skipped == 1)
        assert await w.effects() == [1, 3]


async def test_latest_applies_newer_ones_and_drops_stale_ones(database: str, broker: str) -> None:
    async with world(database, broker, policies={"order": "latest"}) as w, w.running(recording()):
        await w.publish([Sent(seq=5), Sent(seq=3), Sent(seq=7), Sent(seq=7)])
        await w.until(lambda s: s.received == 4)
        assert await w.effects() == [5, 7]
        assert (w.total.stale, w.total.duplicates) == (1, 1)


@pytest.mark.parametrize("seq", [None, 4])
async def test_without_order_an_event_is_applied_once_by_its_message_id(
    seq: int | None, database: str, broker: str
) -> None:
    async with world(database, broker, policy="none" if seq else "sequence") as w:
        async with w.running(recording(), consumers=2):
            await w.publish([Sent(seq=seq, id=1)] * 5 + [Sent(seq=9 if seq else None, id=2)] * 5)
            await w.until(lambda s: s.received == 10)
        assert (w.total.applied, w.total.duplicates) == (2, 8)
        assert await w.db.fetchval("SELECT count(*) FROM effect") == 2


async def test_foreign_and_malformed_messages_are_quarantined_and_the_next_event_flows(
    database: str, broker: str
) -> None:
    async with world(database, broker) as w, w.running(recording()):
        async with w.channel() as channel:
            for properties in HOSTILE:
                await channel.basic_publish(
                    b"\xff\0", exchange="relay.events", routing_key="order.\0T", properties=properties
                )
        await w.publish([Sent(seq=1)])
        await w.until(lambda s: s.applied == 1)
        assert w.total.quarantined == len(HOSTILE)
        assert set(await w.quarantine()) == {"foreign", "malformed"}
        assert await w.db.fetchval("SELECT count(*) FROM relay.inbox_quarantine WHERE body = '\\xff00'::bytea") == len(
            HOSTILE
        )


def _hostile() -> list[spec.Basic.Properties]:
    nested: dict[str, Any] = {}
    inner = nested
    for _ in range(60):
        inner["n"] = inner = {}
    headers: list[dict[str, Any]] = [
        {},
        {
            "nul\0key": "nul\0value",
            "bytes": bytearray(b"\xff\0"),
            "when": datetime.now(UTC),
            "price": Decimal("1.5"),
            "f": 0.1,
        },
        {"list": [1, None, [bytearray(b"x")], {"a": True}], "nested": nested},
        {"x-sequence": "1", "x-content-digest": "sha256:zz"},
        {"x-sequence": 1, "x-content-digest": bytearray(b"\xff")},
        {"x-aggregate-type": 1, "x-aggregate-id": "\0", "x-sequence": -1},
    ]
    made = [spec.Basic.Properties(headers=h, message_id="m\0", message_type="T\0", app_id="a\0") for h in headers]
    return [*made, spec.Basic.Properties(), spec.Basic.Properties(timestamp=datetime(9999, 12, 31, tzinfo=UTC))]


HOSTILE = _hostile()
