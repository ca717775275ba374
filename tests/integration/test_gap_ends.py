"""Gaps that asking does not fill come to an end that people are told of, and none is overlooked. Real servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import aio_pika
import pytest
from structlog.testing import capture_logs

from relay.control import MARKS, Mark, Marks, marks_message
from relay.inbox.asking import Asker
from relay.inbox.healing import Healing
from relay.inbox.sequencer import Key
from relay.operate.inbox_acts import Purge, Retry
from relay.operate.inbox_cursors import Reset
from relay.operate.selection import Selection
from tests.harness.acts import act_on, audits
from tests.harness.outbox import until
from tests.harness.pair import RARE, Pair, pair, taken
from tests.integration.test_gap_repair import a_row, has_told, listening, signed

__all__ = ["pair"]

ORDER = Selection(aggregate="order/1", consumer="billing")


# --- what ends its consumer


async def test_what_ends_among_the_dead_letters_again_is_not_sent_for_ever(pair: Pair) -> None:
    """Here a consumer that rejects plays the one whose process dies of the message until the delivery limit takes it out."""
    await pair.declare(marks=False)
    await pair.emit("order/1", 3)
    await pair.publish()
    await pair.lose(("1", 2))
    async with pair.inbox():
        await pair.gap("asks >= 1")
    with capture_logs() as told:
        async with pair.relay(RARE), rejecting(pair), healing(pair):
            gap = await pair.gap("state = 'stuck'")
    assert gap["asks"] >= 3
    died = f"number 2 was sent again {gap['asks']} times and has not arrived, and billing.dead has grown"
    assert gap["detail"].startswith(died)
    assert "relay inbox skip order/1 --through 2" in gap["detail"]
    assert [t["log_level"] for t in told if t["event"] == "gap_stuck"] == ["error"]
    async with pair.channel() as channel:
        dead = [m.headers["x-sequence"] for m in await taken(await channel.get_queue("billing.dead"))]
    assert set(dead) == {2}
    assert len(dead) < gap["asks"]  # the first request was made while no relay ran
    assert (await act_on(pair.consumer, Retry(ORDER))).rows == 1
    async with pair.both(RARE):
        await pair.applied("1", [1, 2, 3])
        await pair.no_gap()


async def test_old_dead_letters_do_not_end_a_gap_whose_relay_does_not_answer(pair: Pair) -> None:
    await pair.declare(marks=False)
    await pair.emit("order/1", 3)
    await pair.publish()
    await pair.lose(("1", 2))
    await pair.send(b"", key="billing.dead")
    async with pair.channel() as channel:
        await listening(channel)
        async with pair.inbox():
            gap = await pair.gap("asks >= 4")
    assert (gap["state"], gap["dead_letters"]) == ("open", 1)


async def test_a_request_is_counted_before_its_answer_can_end_the_process(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    async def ask(_: Asker, missing: Any) -> dict[Key, str]:
        counted.append(await pair.consumer_db.fetchval("SELECT asks FROM relay.inbox_gap"))
        return {}

    monkeypatch.setattr(Asker, "ask", ask)
    await pair.declare(marks=False)
    await pair.send_row(a_row(2))
    async with pair.inbox():
        await until(lambda: _is(len(counted) >= 2))
    assert counted[:2] == [1, 2]


# --- holes far behind


async def test_a_hole_behind_thousands_of_held_messages_is_asked_for(pair: Pair) -> None:
    await pair.declare(marks=False)
    await pair.emit("order/1", 2503)
    await pair.publish()
    await pair.purge()
    await hold(pair, 1, 2499)  # the first has failed, all others wait
    await pair.send_row(a_row(2503))
    with capture_logs() as told:
        async with pair.both(RARE):
            await until(has_told(told, "gap_closed"))
            held = await pair.consumer_db.fetchval("SELECT count(*) FROM relay.inbox_held")
            await until(has_told(told, "repaired"))
    assert held == 2503
    assert [(t["first"], t["last"]) for t in told if t["event"] == "gap"] == [(2500, 2502)]
    assert next((t["ranges"], t["sent"]) for t in told if t["event"] == "repaired") == (1, 3)


# --- what is not retained


async def test_a_lost_end_that_is_not_retained_any_more_is_told(pair: Pair) -> None:
    await pair.declare()
    await pair.emit("order/1", 2)
    async with pair.both():
        await pair.applied("1", [1, 2])
    await pair.emit("order/1", 2)
    await pair.emit("order/2", 3)  # nothing of it was ever applied: that of a late joiner
    await pair.publish()
    await pair.purge()
    await forget(pair)
    async with pair.both():
        gap = await pair.gap("state = 'stuck'")
        await pair.emit("order/2", 1)  # noticed by its successor all the same
        await pair.gap("aggregate_id = '2' AND state = 'stuck'")
    assert (gap["aggregate_id"], gap["to_seq"], gap["found_by"]) == ("1", 4, "mark")
    assert "numbers 3 to 4 are not retained by source shop any more" in gap["detail"]


async def test_what_is_not_retained_is_told_apart_and_not_of_what_is_parked(pair: Pair) -> None:
    await pair.declare()
    for n in (1, 2, 3):
        await pair.emit(f"order/{n}", n)
    await pair.publish()
    await pair.purge()
    await pair.db.execute(
        "INSERT INTO relay.outbox_parked (id, shard, aggregate_type, aggregate_id, seq, reason, state) "
        "SELECT id, shard, aggregate_type, aggregate_id, seq, 'unroutable', 'stuck' FROM relay.outbox "
        "WHERE aggregate_id = '2' AND seq = 2"
    )
    await pair.db.execute("DELETE FROM relay.outbox WHERE aggregate_id <> '3'")
    async with pair.relay():
        marks: list[Any] = []

        async def both_kinds() -> bool:
            async with pair.channel() as channel:
                marks.extend(await drained(await channel.get_queue("billing")))
            return {m.routing_key for m in marks} >= {"order.Changed", "order.relay.marks"}

        await until(both_kinds)
    assert {m.body for m in marks if m.routing_key == "order.relay.marks"} == {
        b'{"marks":[["order","1",1]],"retained":false}'
    }
    assert {m.body for m in marks if m.routing_key == "order.Changed"} == {b'{"marks":[["order","3",3]]}'}


# --- what was never given out


async def test_a_mark_beyond_what_exists_is_no_gap_for_ever(pair: Pair) -> None:
    await pair.declare(marks=False)
    await pair.emit("order/1", 3)
    await pair.publish()
    with capture_logs() as told:
        async with pair.both(RARE):
            await pair.applied("1", [1, 2, 3])
            await send_marks(pair, Marks(source="shop", marks=(Mark("order", "1", 10**6),)))
            await until(has_told(told, "mark_unfounded"))
            await pair.no_gap()
            await pair.emit("order/1", 1)
            await pair.applied("1", [1, 2, 3, 4])
    assert [(t["aggregate"], t["last"]) for t in told if t["event"] == "mark_unfounded"] == [("order/1", 10**6)]


async def test_numbers_that_a_source_has_lost_are_told_where_something_waits_behind_them(pair: Pair) -> None:
    await pair.declare(marks=False)
    await pair.emit("order/1", 1)
    await pair.publish()
    await pair.send_row(a_row(4))
    async with pair.both(RARE):
        gap = await pair.gap("state = 'stuck'")
    assert "source shop has never given out order/1 beyond 1, and more has come from it" in gap["detail"]
    assert "its database has lost numbers 2 to 3" in gap["detail"]


async def test_what_is_committed_and_not_published_yet_is_not_answered(pair: Pair) -> None:
    """A paused shard publishes nothing; the inbox may ask as long as it likes."""
    await pair.declare(marks=False)
    await pair.emit("order/1", 3)
    await pair.db.execute(
        "WITH a AS (INSERT INTO relay.audit (who, side, act, selection, rows) VALUES ('t', 'outbox', 'pause', '{}', 1) RETURNING id) "
        "INSERT INTO relay.outbox_pause (scope, shard, audit_id) SELECT 'shard', 0, a.id FROM a"
    )
    await pair.send_row(a_row(3))
    with capture_logs() as told:
        async with pair.both(RARE):
            gap = await pair.gap("asks >= 3")
            await until(has_told(told, "repaired"))
    assert gap["state"] == "open"
    assert {(t["sent"], t["gone"]) for t in told if t["event"] == "repaired"} == {(0, 0)}


# --- operators


async def test_a_retry_asks_again_for_what_is_stuck_and_is_recorded(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relay was pointed at another database for a while."""
    monkeypatch.setattr("relay.inbox.healing.LOOK_INTERVAL_S", 3600.0)
    await pair.declare(marks=False)
    await pair.emit("order/1", 3)
    await pair.publish()
    await pair.lose(("1", 2))
    kept = await pair.db.fetch("SELECT * FROM relay.outbox_aggregate")
    await pair.db.execute("DELETE FROM relay.outbox_aggregate")
    async with pair.both(RARE):
        await pair.gap("state = 'stuck'")
        await pair.db.executemany(
            "INSERT INTO relay.outbox_aggregate VALUES ($1, $2, $3)", [tuple(r.values()) for r in kept]
        )
        done = await act_on(pair.consumer, Retry(Selection(cause="gap", consumer="billing")))
        await pair.applied("1", [1, 2, 3])  # told, not looked for
    assert (done.rows, done.aggregates) == (1, 1)
    assert [(a[1], a[3], a[4]) for a in await audits(pair.consumer_db)] == [("retry", 1, ["order/1"])]


async def test_under_latest_a_reset_leaves_nothing_waiting_and_no_gap(pair: Pair) -> None:
    """What failed waits for no predecessor there."""
    pair.with_inbox(policies={"order": "latest"}, retry_first_s=60.0)
    await pair.declare(marks=False)
    mended = False

    async def handle(event: Any, tx: Any) -> None:
        if not mended and event.seq == 7:
            raise RuntimeError("broken")
        await tx.execute("INSERT INTO effect (aggregate, seq) VALUES ($1, $2)", event.aggregate_id, event.seq)

    await pair.send_row(a_row(5))
    await pair.send_row(a_row(7))
    with capture_logs() as told:
        async with pair.inbox(handle):

            async def is_old() -> Any:
                return await pair.consumer_db.fetchval(
                    "SELECT count(*) FROM relay.inbox_held WHERE held_at < clock_timestamp() - interval '0.5 s'"
                )

            await until(is_old)
            mended = True
            await act_on(pair.consumer, Reset(Selection(everything=True, consumer="billing")))
            await pair.applied("1", [5, 7], timeout_s=9)
            assert await pair.gaps() == []
    assert not [t for t in told if t["event"] == "gap"]


@pytest.mark.parametrize("others", [0, 3])
async def test_what_was_purged_while_it_was_held_is_not_applied_by_another_copy(pair: Pair, others: int) -> None:
    """Its predecessors and a copy of it come in one batch, with or without other held messages behind it."""
    pair.with_inbox(repair=False)
    await pair.declare(marks=False)
    await pair.send_row(a_row(3))
    async with pair.inbox():
        await until(pair.held)
        await act_on(pair.consumer, Purge(ORDER))
        for n in range(others):
            await pair.send_row(a_row(4 + n))

        async def all_held() -> bool:
            return len(await pair.held()) == 1 + others

        await until(all_held)
    for seq in (1, 2, 3):
        await pair.send_row(a_row(seq))
    async with pair.inbox():

        async def none_held() -> bool:
            return not await pair.held() and len(await pair.effects("1")) >= 2

        await until(none_held)
    assert await pair.effects("1") == [1, 2, *range(4, 4 + others)]
    assert await pair.consumer_db.fetchval("SELECT last_seq FROM relay.inbox_aggregate") == 3 + others


# --- the service itself


async def test_a_look_that_is_wished_for_during_another_is_not_forgotten(pair: Pair) -> None:
    service = Healing(pair.consumer, consumer="billing", queue="billing", policy=lambda _: "sequence")
    service.expect()  # nobody rests yet: a look goes on
    async with asyncio.timeout(5):
        await service._rest(3600.0, None)
    resting = asyncio.create_task(service._rest(3600.0, None))  # that wish is fulfilled
    await asyncio.sleep(0)
    service.expect()
    async with asyncio.timeout(5):
        await resting


# --- helpers


@asynccontextmanager
async def rejecting(pair: Pair) -> AsyncIterator[None]:
    """A consumer of the queue that sends all of it to the dead letters."""
    async with pair.channel() as channel:
        queue = await channel.get_queue("billing")

        async def reject(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            await message.reject(requeue=False)

        await queue.consume(reject)
        yield


@asynccontextmanager
async def healing(pair: Pair) -> AsyncIterator[None]:
    """The service that asks, without the inbox that it belongs to."""
    service = Healing(pair.consumer, consumer="billing", queue="billing", policy=lambda _: "sequence")
    task = asyncio.create_task(service.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def hold(pair: Pair, first: int, last: int) -> None:
    """As an inbox whose handler failed at the first would have held them."""
    await pair.consumer_db.execute(
        "INSERT INTO relay.inbox_aggregate (consumer, source, aggregate_type, aggregate_id, last_seq, blocked) "
        "VALUES ('billing', 'shop', 'order', '1', $1, true)",
        first - 1,
    )
    await pair.consumer_db.execute(
        "INSERT INTO relay.inbox_held (consumer, source, aggregate_type, aggregate_id, seq, message_id, event_type, content_type, body, "
        "digest, reason, state, attempts) SELECT 'billing', 'shop', 'order', '1', n, n, 'Changed', '', '', '', "
        "CASE WHEN n = $1 THEN 'failed' ELSE 'behind' END, CASE WHEN n = $1 THEN 'stuck' ELSE 'waiting' END, "
        "CASE WHEN n = $1 THEN 9 ELSE 0 END FROM generate_series($1::bigint, $2::bigint) n",
        first,
        last,
    )


async def forget(pair: Pair) -> None:
    """What retention does with all that is old."""
    for slot in range(4):
        await pair.db.execute(f"TRUNCATE relay.outbox_{slot}")


async def send_marks(pair: Pair, marks: Marks) -> None:
    message = marks_message(marks, routing_key="order.Changed", at=datetime.now(UTC))
    await pair.send(message.body, **signed(MARKS, message.body))


async def _is(true: bool) -> bool:
    return true


async def drained(queue: Any) -> list[Any]:
    messages = await taken(queue)
    for message in messages:
        await message.ack()
    return messages
