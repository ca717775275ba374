"""The seven ways in which events go wrong between services: each shown happening with the naive way, and gone with relay.

Both tests of a pair force the same thing at the same moment, on the same real servers; nothing here is left to chance.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

from relay.daemon import Outbox
from relay.inbox import Event, Inbox, Stats
from relay.producer import NewEvent
from relay.producer.asyncpg import emit
from relay.settings import Settings
from tests.acceptance import naive
from tests.acceptance.consumers import UNBOUND, by_hand, consuming, until_subscribed
from tests.acceptance.naive import QUEUE, Pool
from tests.acceptance.wire import wire
from tests.harness.audit import audit
from tests.harness.outbox import outbox_running, settings_for, shard_of, until, wait_until

SPINS = 200
"""Deliveries of one message that are called spinning: the broker would go on for ever."""


class Crash(Exception):
    """The process dies here."""


def die(*_: object) -> None:
    raise Crash


@pytest.fixture
async def db(database: str) -> AsyncIterator[Pool]:
    """One database for both sides, which makes the tests shorter and nothing easier."""
    async with asyncpg.create_pool(database, min_size=1, max_size=4) as pool:
        await pool.execute(naive.TABLES)
        yield pool


def settings(database: str, broker: str, **flags: Any) -> Settings:
    """For relay and for inboxes, which take one message at a time unless told otherwise, like the naive consumers."""
    short = {"inbox__retry_first_s": 0.05, "inbox__retry_max_s": 0.1, "inbox__batch": 1, "inbox__prefetch": 1}
    return settings_for(database, broker, daemon__backoff_first_s=0.05, **(short | flags))


async def nothing(_: Event) -> None:
    """What happens before an event is applied, if nothing is said."""


def ledger_inbox(before: Callable[[Event], Awaitable[None]] = nothing) -> Inbox:
    """Writes each event into the ledger, as the naive consumers do."""
    inbox = Inbox(QUEUE)

    @inbox.on("OrderCreated", "OrderPaid", "OrderShipped")
    async def apply(event: Event, tx: naive.Connection) -> None:
        await before(event)
        await tx.execute("INSERT INTO ledger (order_id, what) VALUES ($1, $2)", event.aggregate_id, event.event_type)

    return inbox


async def tell(db: Pool, *events: str) -> None:
    """Emit events, each in a transaction of its own: `OrderPaid of 2`; without an order, of order 1."""
    for event in events:
        what, _, order = event.partition(" of ")
        async with db.acquire() as connection, connection.transaction():
            await emit(connection, order_event(what, order or "1"))


def order_event(what: str, order: str) -> NewEvent:
    return NewEvent(aggregate_type="order", aggregate_id=order, event_type=what, payload={})


async def ledger(db: Pool, order: str = "1") -> list[str]:
    return [r["what"] for r in await db.fetch("SELECT what FROM ledger WHERE order_id = $1 ORDER BY at", order)]


async def orders(db: Pool) -> list[str]:
    return [r["id"] for r in await db.fetch("SELECT id FROM orders ORDER BY id")]


async def in_queue(channel: AbstractChannel) -> list[str]:
    """What is ready in the naive consumers' queue, taken out."""
    queue = await channel.get_queue(QUEUE)
    found = []
    while (message := await queue.get(no_ack=True, fail=False)) is not None:
        found.append(naive.order_and_event(message)[1])
    return found


async def is_waiting_for_a_lock(db: Pool) -> bool:
    """Whether a transaction of this database waits for another one."""
    return bool(
        await db.fetchval(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock')"
        )
    )


async def held(db: Pool) -> list[tuple[str, int, str]]:
    rows = await db.fetch("SELECT aggregate_id, seq, reason FROM relay.inbox_held ORDER BY aggregate_id, seq")
    return [tuple(r) for r in rows]


# 1. Dual write: the process dies between COMMIT and publish, or publishes and then rolls back.


async def test_1_dual_write_loses_events_and_invents_them_with_the_naive_way(db: Pool, broker: str) -> None:
    async with naive.channel(broker) as channel, db.acquire() as connection:
        with pytest.raises(Crash):
            await naive.commit_then_publish(connection, channel, "lost", die)
        assert await orders(db) == ["lost"]
        assert await in_queue(channel) == []

        with pytest.raises(Crash):
            await naive.publish_then_commit(connection, channel, "phantom", die)
        assert await orders(db) == ["lost"]
        assert await in_queue(channel) == ["OrderCreated"]


async def test_1_dual_write_is_gone_with_relay(db: Pool, database: str, broker: str) -> None:
    async def place(order: str, *, in_transaction: Callable[[], None], after: Callable[[], None]) -> None:
        async with db.acquire() as connection, connection.transaction():
            await connection.execute("INSERT INTO orders VALUES ($1)", order)
            await emit(connection, order_event("OrderCreated", order))
            in_transaction()
        after()

    both = settings(database, broker)
    async with audit(broker) as witness, consuming(ledger_inbox(), both) as consumers:
        with pytest.raises(Crash):
            await place("not lost", in_transaction=lambda: None, after=die)
        with pytest.raises(Crash):
            await place("no phantom", in_transaction=die, after=lambda: None)
        await Outbox(both).run(drain=True)
        await consumers.until(lambda s: s.applied == 1)
        await witness.wait_for(1)
        assert witness.sequences() == {"order/not lost": [1]}
    assert await orders(db) == ["not lost"]
    assert await ledger(db, "not lost") == ["OrderCreated"]


# 2. "FIFO" leaks: a client's retry after a reconnect puts message 2 before message 1.


async def test_2_a_retry_after_a_reconnect_swaps_two_messages_with_the_naive_way(broker: str) -> None:
    async with naive.channel(broker) as channel, wire(broker) as line:
        publisher = naive.RetryingPublisher(line.url)
        await publisher.connect()
        line.lose_what_is_sent()
        first = asyncio.create_task(publisher.publish("1", "OrderCreated"))
        await line.until_lost(b"OrderCreated")
        line.cut()
        await first
        await publisher.publish("1", "OrderPaid")
        await publisher.publish_failed()
        await publisher.close()
        assert await in_queue(channel) == ["OrderPaid", "OrderCreated"]


async def test_2_the_swap_by_a_retry_is_gone_with_relay(db: Pool, database: str, broker: str) -> None:
    async with audit(broker) as witness, wire(broker) as line:
        async with (
            consuming(ledger_inbox(), settings(database, broker)) as consumers,
            outbox_running(settings(database, line.url)) as outbox,
        ):
            await wait_until(await shard_of(outbox), lambda progress: progress.sleeps > 0)
            line.lose_what_is_sent()
            await tell(db, "OrderCreated")
            await line.until_lost(b"OrderCreated")
            await tell(db, "OrderPaid")
            line.cut()
            await consumers.until(lambda s: s.applied == 2)
        assert [m.type for m in await witness.wait_for(2)] == ["OrderCreated", "OrderPaid"]
    assert await ledger(db) == ["OrderCreated", "OrderPaid"]


# 3. Competing consumers: consumer 1 pauses on "create order", consumer 2 handles "pay order" at once.


async def test_3_competing_consumers_overtake_each_other_with_the_naive_way(db: Pool, broker: str) -> None:
    pausing, go_on, paid, created = asyncio.Event(), asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def handle(message: AbstractIncomingMessage) -> None:
        _, what = naive.order_and_event(message)
        if what == "OrderCreated":
            pausing.set()
            await go_on.wait()
        await naive.apply(db, message)
        await message.ack()
        (created if what == "OrderCreated" else paid).set()

    async with naive.consumer(broker, handle), naive.consumer(broker, handle), naive.channel(broker) as channel:
        await naive.publish(channel, "1", "OrderCreated")
        await asyncio.wait_for(pausing.wait(), 20)
        await naive.publish(channel, "1", "OrderPaid")
        await asyncio.wait_for(paid.wait(), 20)
        assert await ledger(db) == ["OrderPaid"]
        go_on.set()
        await asyncio.wait_for(created.wait(), 20)
    assert await ledger(db) == ["OrderPaid", "OrderCreated"]


async def test_3_overtaking_by_competing_consumers_is_gone_with_relay(db: Pool, database: str, broker: str) -> None:
    pausing, go_on = asyncio.Event(), asyncio.Event()

    async def pause(event: Event) -> None:
        if event.event_type == "OrderCreated":
            pausing.set()
            await go_on.wait()

    both = settings(database, broker)
    async with consuming(ledger_inbox(pause), both, count=2) as consumers:
        await tell(db, "OrderCreated")
        await Outbox(both).run(drain=True)
        await asyncio.wait_for(pausing.wait(), 20)
        await tell(db, "OrderPaid")
        await Outbox(both).run(drain=True)
        await until(lambda: is_waiting_for_a_lock(db))  # the second consumer, with the payment in its hands
        assert await ledger(db) == []
        go_on.set()
        await consumers.until(lambda s: s.applied == 2)
    assert await ledger(db) == ["OrderCreated", "OrderPaid"]


# 4. Duplicates: redelivery after a crash between the effect and the ack; two consumers racing on one message id.


async def test_4_a_crash_before_the_ack_doubles_the_effect_with_the_naive_way(db: Pool, broker: str) -> None:
    applied, again = asyncio.Event(), asyncio.Event()

    async def dies_before_the_ack(message: AbstractIncomingMessage) -> None:
        await naive.apply(db, message)
        applied.set()

    async def lives(message: AbstractIncomingMessage) -> None:
        await naive.apply(db, message)
        await message.ack()
        again.set()

    async with naive.channel(broker) as channel:
        await naive.publish(channel, "1", "OrderPaid")
    async with naive.consumer(broker, dies_before_the_ack):
        await asyncio.wait_for(applied.wait(), 20)
    async with naive.consumer(broker, lives):
        await asyncio.wait_for(again.wait(), 20)
    assert await ledger(db) == ["OrderPaid", "OrderPaid"]


async def test_4_the_doubled_effect_of_a_crash_is_gone_with_relay(db: Pool, database: str, broker: str) -> None:
    def die_before_the_ack(stats: Stats) -> None:
        if stats.applied:
            die()

    both = settings(database, broker)
    dying = asyncio.create_task(ledger_inbox().run(both, on_commit=die_before_the_ack))
    await until_subscribed(both, QUEUE)
    await tell(db, "OrderPaid")
    await Outbox(both).run(drain=True)
    with pytest.raises(Crash):
        await dying
    assert await ledger(db) == ["OrderPaid"]
    async with consuming(ledger_inbox(), both) as consumers:
        await consumers.until(lambda s: s.duplicates == 1)
    assert await ledger(db) == ["OrderPaid"]


async def test_4_two_consumers_that_check_the_same_id_both_apply_it_with_the_naive_way(db: Pool, broker: str) -> None:
    both_have_checked = asyncio.Barrier(2)
    both_are_done = asyncio.Barrier(3)

    async def handle(message: AbstractIncomingMessage) -> None:
        if not await naive.is_known(db, message):
            await both_have_checked.wait()
            await naive.apply(db, message)
        await message.ack()
        await both_are_done.wait()

    async with naive.consumer(broker, handle), naive.consumer(broker, handle), naive.channel(broker) as channel:
        for _ in range(2):  # a client's retry: the first confirm was lost
            await naive.publish(channel, "1", "OrderPaid", message_id="the same")
        await asyncio.wait_for(both_are_done.wait(), 20)
    assert await ledger(db) == ["OrderPaid", "OrderPaid"]


async def test_4_the_race_on_one_id_is_gone_with_relay(db: Pool, database: str, broker: str) -> None:
    calls: list[int | None] = []
    go_on = asyncio.Event()

    async def pause(event: Event) -> None:
        calls.append(event.seq)
        await go_on.wait()

    both = settings(database, broker, inbox__bindings=UNBOUND)
    async with by_hand(broker, QUEUE) as hand, consuming(ledger_inbox(pause), both, count=2) as consumers:
        await tell(db, "OrderPaid")
        [payment] = await hand.published(both, 1)
        await hand.deliver(payment, payment)
        await until(lambda: is_waiting_for_a_lock(db))  # the second consumer, with the copy in its hands
        go_on.set()
        await consumers.until(lambda s: s.applied == 1 and s.duplicates == 1)
    assert calls == [1]
    assert await ledger(db) == ["OrderPaid"]


# 5. Early arrival: the payment arrives before the order; it must wait, not fail and not spin.


async def test_5_an_early_payment_is_lost_with_the_naive_way_that_rejects_it(db: Pool, broker: str) -> None:
    handled = asyncio.Queue[str]()

    async def handle(message: AbstractIncomingMessage) -> None:
        await naive.settle_or_reject(db, message, requeue=False)
        handled.put_nowait(naive.order_and_event(message)[1])

    async with naive.consumer(broker, handle), naive.channel(broker) as channel:
        await naive.publish(channel, "1", "OrderPaid")
        await naive.publish(channel, "1", "OrderCreated")
        assert [await asyncio.wait_for(handled.get(), 20) for _ in range(2)] == ["OrderPaid", "OrderCreated"]
    assert await ledger(db) == ["OrderCreated"]
    async with naive.channel(broker) as channel:
        assert await in_queue(channel) == []


async def test_5_an_early_payment_spins_with_the_naive_way_that_requeues_it(db: Pool, broker: str) -> None:
    deliveries = 0
    spun = asyncio.Event()

    async def handle(message: AbstractIncomingMessage) -> None:
        nonlocal deliveries
        deliveries += 1
        if deliveries == SPINS:
            spun.set()
        await naive.settle_or_reject(db, message, requeue=True)

    async with naive.consumer(broker, handle), naive.channel(broker) as channel:
        await naive.publish(channel, "1", "OrderPaid")
        await asyncio.wait_for(spun.wait(), 20)
    assert await ledger(db) == []


async def test_5_early_arrival_neither_fails_nor_spins_with_relay(db: Pool, database: str, broker: str) -> None:
    calls: list[str] = []

    async def count(event: Event) -> None:
        calls.append(event.event_type)

    both = settings(database, broker, inbox__bindings=UNBOUND)
    async with by_hand(broker, QUEUE) as hand, consuming(ledger_inbox(count), both) as consumers:
        await tell(db, "OrderCreated", "OrderPaid")
        created, paid = await hand.published(both, 2)
        await hand.deliver(paid)
        await consumers.until(lambda s: s.early == 1)
        assert await held(db) == [("1", 2, "early")]
        assert calls == []
        await hand.deliver(created)
        await consumers.until(lambda s: s.applied == 2)
    assert consumers.total.received == 2
    assert calls == ["OrderCreated", "OrderPaid"]
    assert await ledger(db) == ["OrderCreated", "OrderPaid"]
    assert await held(db) == []


# 6. Late arrival (stale echo): version 3 arrives after version 5 was applied; it must not overwrite.


async def test_6_a_stale_echo_overwrites_with_the_naive_way(db: Pool, broker: str) -> None:
    handled = asyncio.Semaphore(0)

    async def handle(message: AbstractIncomingMessage) -> None:
        await naive.set_price(db, message)
        await message.ack()
        handled.release()

    async with naive.consumer(broker, handle), naive.channel(broker) as channel:
        for cents in (500, 300):
            await naive.publish(channel, "lamp", str(cents))
            await asyncio.wait_for(handled.acquire(), 20)
    assert await db.fetchval("SELECT cents FROM price") == 300


@pytest.mark.parametrize(
    ("policy", "arriving"),
    [("latest", [5, 3]), ("sequence", [1, 2, 3, 4, 5, 3])],
)
async def test_6_the_stale_echo_is_gone_with_relay(
    db: Pool, database: str, broker: str, policy: str, arriving: list[int]
) -> None:
    inbox = Inbox(QUEUE)

    @inbox.on("PriceChanged")
    async def set_price(event: Event, tx: naive.Connection) -> None:
        await tx.execute(
            "INSERT INTO price VALUES ($1, $2) ON CONFLICT (product) DO UPDATE SET cents = excluded.cents",
            event.aggregate_id,
            event.json()["cents"],
        )

    both = settings(database, broker, inbox__bindings=UNBOUND, inbox__policy=policy)
    async with by_hand(broker, QUEUE) as hand, consuming(inbox, both) as consumers:
        for cents in (100, 200, 300, 400, 500):
            event = NewEvent(
                aggregate_type="product", aggregate_id="lamp", event_type="PriceChanged", payload={"cents": cents}
            )
            async with db.acquire() as connection, connection.transaction():
                await emit(connection, event)
        versions = await hand.published(both, 5)
        await hand.deliver(*(versions[number - 1] for number in arriving))
        await consumers.until(lambda s: s.received == len(arriving))
    assert consumers.total.applied == len(arriving) - 1
    assert consumers.total.stale + consumers.total.duplicates == 1
    assert await db.fetchval("SELECT cents FROM price") == 500


# 7. One bad message stops everything behind it, or is thrown away and breaks the order of what follows.

SHOPPING = [f"{what} of {order}" for what in ("OrderCreated", "OrderPaid", "OrderShipped") for order in ("1", "2")]


async def publish_shopping(channel: AbstractChannel) -> None:
    for event in SHOPPING:
        what, _, order = event.partition(" of ")
        await naive.publish(channel, order, what)


async def test_7_one_bad_message_blocks_all_others_with_the_naive_way_that_requeues_it(db: Pool, broker: str) -> None:
    failures = 0
    failed_often = asyncio.Event()

    async def handle(message: AbstractIncomingMessage) -> None:
        nonlocal failures
        if naive.order_and_event(message) == ("1", "OrderPaid"):
            failures += 1
            if failures == SPINS:
                failed_often.set()
            await message.reject(requeue=True)
            return
        await naive.apply(db, message)
        await message.ack()

    async with naive.channel(broker) as channel:
        await publish_shopping(channel)
    async with naive.consumer(broker, handle):
        await asyncio.wait_for(failed_often.wait(), 20)
    assert await ledger(db, "2") == ["OrderCreated"]
    assert await ledger(db, "1") == ["OrderCreated"]


async def test_7_one_bad_message_that_is_thrown_away_breaks_the_order_with_the_naive_way(db: Pool, broker: str) -> None:
    handled = asyncio.Semaphore(0)

    async def handle(message: AbstractIncomingMessage) -> None:
        if naive.order_and_event(message) == ("1", "OrderPaid"):
            await message.reject(requeue=False)
        else:
            await naive.apply(db, message)
            await message.ack()
        handled.release()

    async with naive.channel(broker) as channel:
        await publish_shopping(channel)
    async with naive.consumer(broker, handle):
        for _ in SHOPPING:
            await asyncio.wait_for(handled.acquire(), 20)
    assert await ledger(db, "1") == ["OrderCreated", "OrderShipped"]


async def test_7_the_bad_message_holds_only_its_own_order_with_relay(db: Pool, database: str, broker: str) -> None:
    healed = asyncio.Event()

    async def fail_until_healed(event: Event) -> None:
        if (event.aggregate_id, event.event_type) == ("1", "OrderPaid") and not healed.is_set():
            raise RuntimeError("this payment cannot be booked")

    both = settings(database, broker, daemon__log_level="error")
    async with consuming(ledger_inbox(fail_until_healed), both) as consumers:
        await tell(db, *SHOPPING)
        await Outbox(both).run(drain=True)
        await consumers.until(lambda s: s.applied == 4 and s.behind == 1)
        assert await held(db) == [("1", 2, "failed"), ("1", 3, "behind")]
        assert await ledger(db, "2") == ["OrderCreated", "OrderPaid", "OrderShipped"]
        assert await ledger(db, "1") == ["OrderCreated"]
        healed.set()
        await consumers.until(lambda s: s.applied == 6)
    assert await ledger(db, "1") == ["OrderCreated", "OrderPaid", "OrderShipped"]
    assert await held(db) == []
