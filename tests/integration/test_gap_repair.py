"""What was lost on the way is missed, asked for and sent again; what cannot be sent again is said to be gone."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import aio_pika.exceptions
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from relay.control import GONE, MARKS, REPAIR, Range, RepairRequest, repair_message
from relay.errors import BrokerUnavailable
from relay.inbox import gaps
from relay.message import CONTENT_DIGEST, Row, content_digest
from relay.outbox.repair import Repair
from relay.outbox.resend import Retained, by_size, holes, portions
from relay.postgres.connect import connection
from relay.settings import PostgresSettings
from tests.harness.outbox import until
from tests.harness.pair import RARE, Pair, pair, taken

__all__ = ["pair"]

ASKED_ONCE: dict[str, Any] = {"gap_alert_after_s": 3600}
"""What is asked for is not asked for again, however late the answer is. Nothing is missed in time either: see `Pair.missed`."""


async def test_a_message_that_is_lost_in_the_middle_is_sent_again_and_told_once(pair: Pair) -> None:
    await pair.declare(marks=False)
    await pair.emit("order/1", 5)
    await pair.emit("order/2", 2)
    await pair.publish()
    await pair.lose(("1", 3))
    pair.with_inbox(**ASKED_ONCE)
    with capture_logs() as told:
        async with pair.both():
            await pair.missed(("1", 4), ("1", 5))
            await pair.applied("1", [1, 2, 3, 4, 5])
            await pair.applied("2", [1, 2])
            await pair.no_gap()
            await until(has_told(told, "repaired"))
    assert [(t["first"], t["last"], t["found_by"]) for t in told if t["event"] == "gap"] == [(3, 3, "successor")]
    assert [(t["last"], t["asks"]) for t in told if t["event"] == "gap_closed"] == [(3, 1)]
    assert [(t["sent"], t["gone"]) for t in told if t["event"] == "repaired"] == [(1, 0)]


async def test_holes_between_held_messages_are_asked_for_together(pair: Pair) -> None:
    await pair.declare(marks=False)
    await pair.emit("order/1", 10)
    await pair.publish()
    await pair.lose(("1", 2), ("1", 5), ("1", 6), ("1", 9))
    pair.with_inbox(**ASKED_ONCE)
    with capture_logs() as told:
        async with pair.both():
            await pair.missed(("1", 3), ("1", 4), ("1", 7), ("1", 8), ("1", 10))
            await pair.applied("1", range(1, 11))
            await until(has_told(told, "repaired"))
    assert [(t["ranges"], t["sent"]) for t in told if t["event"] == "repaired"] == [(3, 4)]


async def test_a_purged_queue_heals(pair: Pair) -> None:
    await pair.declare()
    for aggregate in ("order/1", "order/2", "order/3"):
        await pair.emit(aggregate, 20)
    await pair.publish()
    assert await pair.purge() == 60
    await pair.emit("order/1", 3)
    async with pair.both():
        await pair.applied("1", range(1, 24))
        await pair.applied("2", range(1, 21))
        await pair.applied("3", range(1, 21))
        await pair.no_gap()
        assert await pair.held() == []


async def test_what_is_not_retained_is_said_to_be_gone_and_a_row_that_comes_after_all_goes_on(pair: Pair) -> None:
    await pair.declare(marks=False)
    await pair.emit("order/1", 3)
    await pair.emit("order/2", 1)
    await pair.publish()
    await pair.purge()
    slot = await pair.db.fetchval("SELECT slot FROM relay.outbox LIMIT 1")
    await pair.db.execute(f"TRUNCATE relay.outbox_{slot}")
    await pair.emit("order/1", 2)
    with capture_logs() as told:
        async with pair.both():
            gap = await pair.gap("state = 'stuck'")
            assert (gap["aggregate_id"], gap["to_seq"], gap["next_ask_at"]) == ("1", 3, None)
            assert "numbers 1 to 3 are not retained by source shop any more" in gap["detail"]
            assert "relay inbox skip order/1 --through 3" in gap["detail"]

            async def held() -> bool:
                return await pair.held() == [("1", 4, "early"), ("1", 5, "early")]

            await until(held)
            await pair.emit("order/3", 2)
            await pair.applied("3", [1, 2])  # others flow on
            for seq in (3, 2, 1):  # what is not retained of the rest is not asked for in between
                await pair.send_row(a_row(seq))
            await pair.applied("1", [1, 2, 3, 4, 5])
            await pair.no_gap()
    assert [t["log_level"] for t in told if t["event"] == "gap_stuck"] == ["error"]


async def test_a_stuck_gap_of_which_something_comes_is_asked_for_again(pair: Pair) -> None:
    await pair.declare(marks=False)
    await pair.emit("order/1", 3)
    await pair.publish()
    await pair.lose(("1", 1), ("1", 2))
    for slot in range(4):
        await pair.db.execute(f"TRUNCATE relay.outbox_{slot}")
    async with pair.both():
        await pair.gap("state = 'stuck' AND asked_from = 1")
        await pair.send_row(a_row(1))
        gap = await pair.gap("state = 'stuck' AND asked_from = 2")
    assert "number 2 is not retained" in gap["detail"]
    assert await pair.effects("1") == [1]


async def test_an_aggregate_that_the_source_does_not_know_is_gone(pair: Pair) -> None:
    await pair.declare(marks=False)
    await pair.send_row(a_row(2))
    async with pair.both():
        gap = await pair.gap("state = 'stuck'")
    assert "source shop knows no order/1" in gap["detail"]


async def test_a_skipped_row_is_sent_again_as_its_tombstone(pair: Pair) -> None:
    await pair.declare(marks=False)
    await pair.emit("order/1", 3)
    await pair.publish()
    await pair.lose(("1", 2))
    await pair.db.execute(
        "WITH a AS (INSERT INTO relay.audit (who, side, act, selection, rows) VALUES ('t', 'outbox', 'skip', '{}', 1) RETURNING id) "
        "INSERT INTO relay.outbox_tombstone (id, shard, act, audit_id) "
        "SELECT o.id, o.shard, 'skip', a.id FROM relay.outbox o, a WHERE o.seq = 2"
    )
    async with pair.both():
        await pair.applied("1", [1, 3])


async def test_while_no_relay_answers_it_is_asked_again_with_back_off_and_said_so(pair: Pair) -> None:
    await pair.declare(marks=False)
    await pair.emit("order/1", 3)
    await pair.publish()
    await pair.lose(("1", 2))
    async with pair.inbox():
        gap = await pair.gap("detail LIKE 'cannot be asked for%'")  # the exchange is not even there
        async with pair.channel() as channel:
            await channel.declare_exchange("relay.repair", "direct", durable=True)
        gap = await pair.gap("detail LIKE 'nobody answers for source shop%' AND asks >= 3")
        waited = gap["next_ask_at"] - gap["noticed_at"]
        assert waited.total_seconds() > 0.3 * (2 ** gap["asks"] - 1)  # doubles, and is not shortened by looking
        async with pair.relay():
            await pair.applied("1", [1, 2, 3])


async def test_a_relay_that_does_not_answer_is_named(pair: Pair) -> None:
    await pair.declare(marks=False)
    await pair.emit("order/1", 3)
    await pair.publish()
    await pair.lose(("1", 2))
    async with pair.channel() as channel:
        await listening(channel)
        async with pair.inbox():
            gap = await pair.gap("asks >= 2")
    told = f"asked {gap['asks']} times, and nothing has come: is `relay run` of source shop running"
    assert gap["detail"].startswith(told)


@pytest.mark.parametrize(("breaks", "long", "answers"), [(1, False, 2), (2, False, 2), (1, True, 1)])
async def test_a_request_whose_answer_breaks_off_is_answered_once_more_unless_it_was_long(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, breaks: int, long: bool, answers: int
) -> None:
    """The inbox need not ask again for it. What breaks off a second time may do so by the request's own fault."""
    serve = Repair._serve
    served = 0

    async def breaking_off(self: Repair, request: RepairRequest, answerer: Any) -> list[Range]:
        nonlocal served
        gone = await serve(self, request, answerer)
        served += 1
        if served <= breaks:
            raise BrokerUnavailable("cut in the middle of an answer")
        return gone

    async def sent(rows: int) -> bool:
        async with pair.channel() as channel:
            queue = await channel.declare_queue("billing", passive=True)
        return queue.declaration_result.message_count == rows

    monkeypatch.setattr(Repair, "_serve", breaking_off)
    if long:
        monkeypatch.setattr("relay.outbox.repair._REDONE_S", -1.0)
    await pair.declare(marks=False)
    await pair.emit("order/1", 3)
    await pair.publish()
    await pair.purge()
    with capture_logs() as told:
        async with pair.relay():
            await pair.listening()
            await ask(pair, "billing", Range("order", "1", 2, 2))
            await until(lambda: sent(answers))
            await ask(pair, "billing", Range("order", "1", 3, 3))
            await until(lambda: sent(answers + 1))
    assert served == answers + 1
    assert [t["service"] for t in told if t["event"] == "service_failed"] == ["repair"] * breaks


async def test_with_repair_off_a_gap_is_noticed_and_not_asked_for(pair: Pair) -> None:
    await pair.declare(marks=False)
    pair.with_inbox(repair=False)
    await pair.emit("order/1", 3)
    await pair.publish()
    await pair.lose(("1", 2))
    async with pair.channel() as channel:
        asked = await listening(channel)
        with capture_logs() as told:
            async with pair.inbox():
                gap = await pair.gap("alerted_at IS NOT NULL")
        assert await taken(asked) == []
    assert (gap["state"], gap["asks"], gap["detail"]) == ("open", 0, "inbox.repair is off: it is not asked for")
    assert [t["event"] for t in told if t["event"] == "gap"] == ["gap"]


async def test_a_relay_with_repair_off_declares_and_answers_nothing(pair: Pair) -> None:
    settings = pair.producer
    pair.producer = settings.model_copy(update={"outbox": settings.outbox.model_copy(update={"repair": False})})
    await pair.declare(marks=False)
    await pair.emit("order/1", 3)
    await pair.publish()
    await pair.lose(("1", 2))
    async with pair.both():
        await pair.gap("asks >= 1")
        async with pair.channel() as channel:
            with pytest.raises(aio_pika.exceptions.ChannelClosed, match="NOT_FOUND"):
                await channel.get_queue("relay.repair.shop")


async def test_of_competing_consumers_one_asks(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three look at the same time, when a request takes longest: nobody has a connection for it yet."""
    looks = 0
    claim = gaps.claim

    async def looking(*arguments: Any) -> Any:
        nonlocal looks
        claimed = await claim(*arguments)
        looks += 1
        return claimed

    async def looked() -> bool:
        return looks >= 3

    async def looked_again_and_asked() -> bool:
        queue = await channel.get_queue("relay.repair.shop")
        return looks >= 6 and bool(queue.declaration_result.message_count)

    monkeypatch.setattr(gaps, "claim", looking)
    await pair.declare(marks=False)
    pair.with_inbox(**ASKED_ONCE)
    await pair.emit("order/1", 3)
    await pair.publish()
    await pair.lose(("1", 2))
    async with pair.channel() as channel:
        asked = await listening(channel)
        async with pair.inbox(consumers=3):
            await until(looked)
            await pair.missed(("1", 3))
            await until(looked_again_and_asked)
        requests = [json.loads(m.body) for m in await taken(asked)]
    assert [gap["asks"] for gap in await pair.gaps()] == [1]
    assert requests == [{"consumer": "billing", "reply_to": "billing", "ranges": [["order", "1", 2, 2]]}]


async def test_a_long_gap_is_asked_for_in_portions_until_it_is_closed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.inbox.gaps.NUMBERS_EACH", 7)
    monkeypatch.setattr("relay.inbox.healing._BUSY_INTERVAL_S", 0.05)
    await pair.declare(marks=False)
    await pair.emit("order/1", 30)
    await pair.publish()
    await pair.purge()
    await pair.emit("order/1", 1)
    pair.with_inbox(**ASKED_ONCE)
    with capture_logs() as told:
        async with pair.both():
            await pair.missed(("1", 31))
            await pair.applied("1", range(1, 32))
            await pair.no_gap()
            await until(has_told(told, "repaired", 5))
    assert [t["sent"] for t in told if t["event"] == "repaired"] == [7, 7, 7, 7, 2]


async def test_a_hole_behind_a_message_that_fails_is_missed_and_filled_meanwhile(pair: Pair) -> None:
    """Those behind a failed message wait for it, but one that is behind a hole is early."""
    await pair.declare(marks=False)
    await pair.emit("order/1", 4)
    await pair.publish()
    await pair.lose(("1", 3))

    async def fail(event: Any, tx: Any) -> None:
        raise RuntimeError("poison")

    async with pair.relay(), pair.inbox(fail):

        async def filled() -> Any:
            return [(seq, reason) for _, seq, reason in await pair.held()] == [
                (1, "failed"),
                (2, "behind"),
                (3, "behind"),
                (4, "early"),
            ]

        await until(filled)
        await pair.no_gap()


async def test_what_is_sent_again_while_the_original_comes_late_is_a_duplicate(pair: Pair) -> None:
    await pair.declare(marks=False)
    await pair.emit("order/1", 3)
    await pair.publish()
    await pair.lose(("1", 2))
    async with pair.both():
        await pair.applied("1", [1, 2, 3])
        for seq in (2, 3, 1):
            await pair.send_row(a_row(seq))
        await pair.emit("order/1")
        await pair.applied("1", [1, 2, 3, 4])


# --- hostile


JUNK: dict[str, dict[str, Any]] = {
    "no json": {"type": REPAIR},
    "no digest": {"type": REPAIR, "app_id": "x", "content_type": "application/json"},
    "an event": {"type": "OrderPaid", "app_id": "x"},
    "nothing": {},
}


async def test_hostile_requests_are_told_and_the_next_one_is_answered(pair: Pair) -> None:
    await pair.declare(marks=False)
    await pair.emit("order/1", 3)
    await pair.publish()
    await pair.lose(("1", 2))
    with capture_logs() as told:
        async with pair.relay():
            await pair.listening()
            for properties in JUNK.values():
                await pair.send(b"\xff{]", exchange="relay.repair", key="shop", **properties)
            await ask(pair, "no such queue", Range("order", "1", 1, 3))
            await ask(pair, "billing", Range("order", "1", 1, 2**62), Range("nobody", "x" * 512, 1, 2**62))
            async with pair.inbox():
                await pair.applied("1", [1, 2, 3])
                await pair.no_gap()
    refused = [t for t in told if t["event"] == "repair_request_refused"]
    assert len(refused) == len(JUNK)
    assert "the queue that asked does not exist" in [t["outcome"] for t in told if t["event"] == "repaired"]
    assert not [t for t in told if t["event"] == "service_failed"]


async def test_hostile_control_messages_go_to_the_quarantine_and_events_flow_on(pair: Pair) -> None:
    await pair.declare()
    for kind in (MARKS, GONE):
        for body in (b"", b"[]", b'{"marks": [["order", "1", 9223372036854775807]]}', b'{"ranges": "all"}'):
            await pair.send(body, **signed(kind, body))
        await pair.send(b"{}", type=kind, app_id="shop")
    harmless = b'{"marks": [["order", "1", 9223372036854775806]]}'
    await pair.send(harmless, **signed(MARKS, harmless))
    answer = b'{"reason": "unknown", "ranges": [["order", "77", 1, 9223372036854775806]]}'
    await pair.send(answer, **signed(GONE, answer))
    await pair.emit("order/1", 2)
    with capture_logs() as told:
        async with pair.both(RARE):
            await pair.applied("1", [1, 2])
            await until(has_told(told, "gap"))  # believed until the relay says better, and never harmful
    assert [t["last"] for t in told if t["event"] == "gap"] == [9223372036854775806]
    reasons = await pair.consumer_db.fetch("SELECT reason FROM relay.inbox_quarantine")
    assert [r["reason"] for r in reasons] == ["malformed"] * 10


# --- reading the log


async def test_only_what_is_published_and_not_parked_is_sent_again(database: str, pair: Pair) -> None:
    await pair.declare()
    await pair.emit("order/1", 5)
    await pair.publish()
    await pair.emit("order/1", 2)  # not published yet
    await pair.db.execute(
        "INSERT INTO relay.outbox_parked (id, shard, aggregate_type, aggregate_id, seq, reason, state) "
        "SELECT id, shard, aggregate_type, aggregate_id, seq, 'unroutable', 'stuck' FROM relay.outbox WHERE seq = 4"
    )
    await pair.db.execute("DELETE FROM relay.outbox WHERE seq = 2")
    async with connection(PostgresSettings(dsn=SecretStr(database)), application="test") as opened:
        retained = Retained(opened)
        asked = [Range("order", "1", 1, 100), Range("order", "9", 1, 1)]
        known = await retained.known(asked, numbers=5000)
        assert known.ranges == [Range("order", "1", 1, 7)]
        assert known.unknown == [Range("order", "9", 1, 1)]
        assert known.beyond == [Range("order", "1", 8, 100)]
        survey = await retained.survey(known.ranges)
        assert survey.gone == [Range("order", "1", 2, 2)]
        assert [row.seq for row in await retained.rows(survey.sendable)] == [1, 3, 5]
        assert (await retained.known(asked, numbers=3)).ranges == [Range("order", "1", 1, 3)]


def test_portions_cover_every_number_once() -> None:
    ranges = [Range("o", "1", 1, 10), Range("o", "2", 5, 5), Range("o", "3", 1, 4)]
    cut = list(portions(ranges, 4))
    assert all(sum(map(len, portion)) <= 4 for portion in cut)
    numbers = [(r.aggregate_id, n) for portion in cut for r in portion for n in range(r.from_seq, r.to_seq + 1)]
    assert numbers == [(r.aggregate_id, n) for r in ranges for n in range(r.from_seq, r.to_seq + 1)]


def test_holes_are_what_is_between() -> None:
    found = [(h.from_seq, h.to_seq) for h in holes(Range("o", "1", 3, 9), {4, 5, 8})]
    assert found == [(3, 3), (6, 7), (9, 9)]
    assert list(holes(Range("o", "1", 3, 4), {3, 4})) == []
    assert list(by_size([], 10)) == []


# --- helpers


def a_row(seq: int) -> Row:
    """As `emit` would have made it."""
    return Row(
        id=seq,
        aggregate_type="order",
        aggregate_id="1",
        seq=seq,
        event_type="Changed",
        content_type="application/json",
        headers={},
        routing_key=None,
        created_at=datetime.now(UTC),
        body=b"{}",
    )


def signed(kind: str, body: bytes) -> dict[str, Any]:
    digest = content_digest(kind, "application/json", body).hex()
    return {
        "type": kind,
        "app_id": "shop",
        "content_type": "application/json",
        "headers": {CONTENT_DIGEST: f"sha256:{digest}"},
    }


async def ask(pair: Pair, reply_to: str, *ranges: Range) -> None:
    message = repair_message(
        RepairRequest(consumer="billing", reply_to=reply_to, ranges=ranges), source="shop", at=datetime.now(UTC)
    )
    await pair.send(message.body, exchange="relay.repair", key="shop", **signed(REPAIR, message.body))


async def listening(channel: Any) -> Any:
    """The queue of a relay that does not answer."""
    exchange = await channel.declare_exchange("relay.repair", "direct", durable=True)
    queue = await channel.declare_queue("relay.repair.shop", exclusive=True)
    await queue.bind(exchange, "shop")
    return queue


def has_told(told: Sequence[Any], event: str, times: int = 1) -> Callable[[], Awaitable[bool]]:
    """Whether it has been logged so often."""

    async def look() -> bool:
        return [t["event"] for t in told].count(event) >= times

    return look
