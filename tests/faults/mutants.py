"""Mutants of the product: each is relay with one mistake that systems of its kind are known for. The checker must kill them all.

A mutant is named after its mistake. Its story is a fault under which the mistake shows; the same story leaves the real product
unharmed, which is tested too: else a story that breaks everything would "kill" everything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aio_pika
import asyncpg
import pytest

from relay.daemon import Outbox
from relay.errors import PostgresError
from relay.inbox import consumer as inbox_consumer
from relay.inbox.intake import Taken
from relay.inbox.sequencer import Arrival, Line, Refusal
from relay.message import CONTENT_DIGEST, Event, content_digest
from relay.outbox.cursor import Page, Position, Snapshot
from relay.outbox.reader import Reader, to_row
from relay.outbox.retention import Retention
from relay.outbox.shard import Shard
from relay.outbox.store import Store
from relay.outbox.wakeup import Wakeup
from relay.postgres.connect import connection
from relay.rabbitmq.contract import Confirmed, Nacked, Outcome, Returned, Unknown
from relay.rabbitmq.fast_publisher import FastPublisher
from relay.sandbox import RabbitMQ
from tests.faults.lab.scene import Scene
from tests.harness.outbox import connected, shard_of, until, wait_until

Story = Callable[[Scene, RabbitMQ], Awaitable[None]]
Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One mistake."""

    name: str
    patch: Patch
    story: Story
    killed_by: frozenset[str]  # checks of which at least one must find it


# --- stories: what happens, with or without a mistake in the product


async def cut_inside_a_publish(scene: Scene, _: RabbitMQ) -> None:
    """The connection breaks in the middle of a page."""
    await scene.declare("account.#")
    await scene.book(*[f"account/a{n % 5}" for n in range(40)])
    async with scene.broker.cutting_inside_publish() as cuts, scene.relay(), scene.consumer():
        await until(lambda: _true(cuts.count > 0))
        await scene.all_applied()


async def silence_instead_of_confirms(scene: Scene, _: RabbitMQ) -> None:
    """The messages go nowhere, and no answer comes until the relay gives up waiting."""
    await scene.declare("account.#")
    async with scene.relay(scene.relay_settings(outbox__confirm_timeout_s=0.5)) as outbox, scene.consumer():
        await _asleep(outbox)
        async with scene.broker.black_hole() as swallowed:
            await scene.book("account/a1", "account/a2")
            await until(lambda: _true(swallowed.count > 0))
            progress = await shard_of(outbox)
            await until(lambda: _true(progress.failure is not None or progress.confirmed > 0))
        await scene.all_applied()


async def full_queue(scene: Scene, rabbitmq: RabbitMQ) -> None:
    """The consumer's queue takes one message and refuses the others, until its limit is taken away."""
    await scene.declare("account.#")
    vhost = scene.url.rpartition("/")[2]
    policy = f"/api/policies/{vhost}/full"
    definition: dict[str, object] = {
        "pattern": "^effects$",
        "apply-to": "queues",
        "definition": {"max-length": 1, "overflow": "reject-publish"},
    }
    await asyncio.to_thread(rabbitmq.management().request, "PUT", policy, definition)
    await until(lambda: _has_policy(rabbitmq, vhost))
    async with scene.relay():
        async with asyncio.timeout(20):
            while not scene.broker.seen["nack"]:
                await scene.book("account/a1", "account/a2")
                await asyncio.sleep(0.02)  # room for the broker to notice that it is full
        await asyncio.to_thread(rabbitmq.management().request, "DELETE", policy)
        async with scene.consumer():
            await scene.all_applied()


async def unrouted_for_a_while(scene: Scene, _: RabbitMQ) -> None:
    """Nobody is bound for a type of aggregate; then somebody is."""
    await scene.declare("account.#")
    await scene.book("lonely/l1", "account/a1", "lonely/l1")
    async with scene.relay():
        await until(lambda: _true(scene.broker.seen["return"] > 0))
        await scene.declare("account.#", "lonely.#")
        async with scene.consumer():
            await scene.all_applied()


async def a_late_commit(scene: Scene, _: RabbitMQ) -> None:
    """A transaction that has its ids already commits after later ones were published."""
    await scene.declare("account.#")
    async with connected(scene.producer_dsn) as late, scene.relay(), scene.consumer():
        transaction = late.transaction()
        await transaction.start()
        await scene.book("account/a1", connection=late)
        await scene.book("account/a2", "account/a3")
        await scene.all_applied()
        await transaction.commit()
        await scene.all_applied()


async def a_commit_that_fails(scene: Scene, _: RabbitMQ) -> None:
    """The consumer's connection breaks before its COMMIT has arrived."""
    await scene.declare("account.#")
    await scene.book(*[f"account/a{n % 5}" for n in range(20)])
    async with scene.relay():
        await until(lambda: _waits_in_queue(scene, 20))
        async with scene.consumer_pg.cutting_at("^COMMIT", side="request") as cuts, scene.consumer():
            await until(lambda: _true(cuts.count > 0))
            await scene.all_applied()


async def acks_turned_into_nacks(scene: Scene, _: RabbitMQ) -> None:
    """The broker has the messages, and says that it has not: they are published again."""
    await scene.declare("account.#")
    await scene.book(*[f"account/a{n % 5}" for n in range(40)])
    async with scene.broker.acks_as_nacks(share=0.3) as nacks, scene.relay():
        await until(lambda: _true(nacks.count > 0))
    async with scene.relay(), scene.consumer():
        await scene.book(*[f"account/a{n}" for n in range(5)])  # each goes out behind its aggregate's copies
        await scene.all_applied()


async def swapped_in_the_queue(scene: Scene, _: RabbitMQ) -> None:
    """Redelivered in reverse."""
    await scene.declare("account.#")
    await scene.book(*["account/a1"] * 6)
    async with scene.relay():
        await until(lambda: _waits_in_queue(scene, 6))
        async with scene.channel() as channel:
            queue = await channel.get_queue("effects")
            messages = [await queue.get() for _ in range(6)]
            for message in reversed(messages):
                await channel.default_exchange.publish(_again(message), "effects")
                await message.ack()
        async with scene.consumer():
            await scene.all_applied()


async def a_zombie_owner(scene: Scene, _: RabbitMQ) -> None:
    """The owner waits for confirms while its lock is taken away; another relay takes over; then the confirms come."""
    await scene.declare("account.#")
    settings = scene.relay_settings(outbox__order="strict")  # while it waits for confirms it does nothing else
    async with scene.consumer(), scene.relay(settings) as zombie:
        sleeps = await _asleep(zombie)
        await scene.book("account/a1")  # its session has written a checkpoint
        await _asleep(zombie, oftener_than=sleeps)
        async with scene.broker.delaying(1.0):
            before = scene.broker.seen["publish"]
            await scene.book("account/a1", "account/a2")
            await until(lambda: _true(scene.broker.seen["publish"] > before))
            await _terminate(scene, "relay lease 0")
            async with scene.relay(scene.relay_settings(through_proxy=False)):
                await scene.all_applied()
                await until(lambda: _has_epoch(scene, 2))
                progress = await shard_of(zombie)
                await until(lambda: _true(progress.failure is not None or progress.checkpoints > 1), timeout_s=10)


async def the_listener_is_lost(scene: Scene, _: RabbitMQ) -> None:
    """The connection that listens, and holds the lock, is ended while the relay is asleep."""
    await scene.declare("account.#")
    async with scene.consumer(), scene.relay() as outbox:
        sleeps = await _asleep(outbox)
        await scene.book("account/a1")
        await scene.all_applied()
        await _asleep(outbox, oftener_than=sleeps)
        await _terminate(scene, "relay lease 0")
        await scene.book("account/a1", "account/a2")
        await scene.all_applied()


async def asleep(scene: Scene, _: RabbitMQ) -> None:
    """An event is committed while the relay sleeps."""
    await scene.declare("account.#")
    async with scene.consumer(), scene.relay() as outbox:
        await _asleep(outbox)
        await scene.book("account/a1", "account/a2")
        await scene.all_applied()


async def a_reissued_number(scene: Scene, _: RabbitMQ) -> None:
    """The newest number of an aggregate comes again with another content, as after a lossy fail-over."""
    await scene.declare("account.#")
    async with scene.consumer(), scene.relay():
        await scene.book("account/a1", "account/a1")
        await scene.all_applied()
        async with scene.channel() as channel:
            original = next(m for m in await _published(scene) if m.seq == 2)
            body = b'{"token": "forged", "amount": 1, "padding": ""}'
            other = aio_pika.Message(
                body,
                message_id=original.message_id,
                type="Booked",
                app_id="shop",
                content_type="application/json",
                headers={
                    "x-aggregate-type": "account",
                    "x-aggregate-id": "a1",
                    "x-sequence": 2,
                    CONTENT_DIGEST: "sha256:" + content_digest("Booked", "application/json", body).hex(),
                },
                delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            )
            await channel.default_exchange.publish(other, "effects")
        scene.expected_conflicts += 1
        await until(lambda: _waits_in_queue(scene, 0))
        await scene.book("account/a1")
        await scene.all_applied()


async def a_row_that_comes_into_an_old_slot(scene: Scene, _: RabbitMQ) -> None:
    """A slot was found to be published and old; before it is locked, a transaction commits a row into it."""
    await scene.declare("account.#")
    settings = scene.relay_settings().postgres
    async with connected(scene.producer_dsn) as db, connected(scene.producer_dsn) as other:
        slot = await db.fetchval("SELECT (extract(epoch FROM now())::bigint / 172800 - 3) % 4")  # filled six days ago
        await scene.book_long_ago("account/a1", slot, db)
        async with scene.relay(), scene.consumer():
            await scene.all_applied()
        retention = Retention(lambda: connection(settings, application="scene"), retention_s=0)
        blocking = other.transaction()
        await blocking.start()
        await scene.book_long_ago("account/a1", slot, other)
        await _commit_while_the_lock_is_waited_for(retention, slot, db, blocking)
    async with scene.relay(), scene.consumer():
        await scene.all_applied()


# --- the mistakes


def checkpoint_before_confirm(patching: pytest.MonkeyPatch) -> None:
    begin = Shard._begin

    async def first_the_cursor(self: Shard, page: Page) -> None:
        self._pipeline.position, self._dirty = self._pipeline.read_to.after(page), True
        await self._save()
        await begin(self, page)

    patching.setattr(Shard, "_begin", first_the_cursor)


def take_it_for_confirmed(*kinds: type[Outcome]) -> Patch:
    """Whatever the broker answered (or did not) of these kinds."""

    def patch(patching: pytest.MonkeyPatch) -> None:
        publish = FastPublisher.publish

        async def hopeful(self: FastPublisher, messages: Sequence[Any]) -> list[Outcome]:
            return [Confirmed() if isinstance(outcome, kinds) else outcome for outcome in await publish(self, messages)]

        patching.setattr(FastPublisher, "publish", hopeful)

    return patch


def id_above_cursor(patching: pytest.MonkeyPatch) -> None:
    """The reader of most home-made outboxes: `WHERE id > last_id`. Where it begins, high_id says."""
    last: dict[Reader, int] = {}

    async def read(self: Reader, position: Position, *, page_rows: int | None = None) -> Page:
        if self not in last:
            last[self] = await self._connection.fetchval("SELECT high_id FROM relay.outbox_cursor")
        snapshot = Snapshot.parse(await self._connection.fetchval("SELECT pg_current_snapshot()::text"))
        found = await self._connection.fetch(
            "SELECT id, aggregate_type, aggregate_id, seq, event_type, coalesce(content_type, 'application/json') AS content_type,"
            " headers::text AS headers, routing_key, created_at, coalesce(body, convert_to(payload::text, 'UTF8')) AS body,"
            " false AS is_tombstone FROM relay.outbox WHERE id > $1 ORDER BY id",
            last[self],
        )
        last[self] = found[-1]["id"] if found else last[self]
        return Page([to_row(r) for r in found], snapshot, complete=True)

    patching.setattr(Reader, "read", read)


def ack_before_commit(patching: pytest.MonkeyPatch) -> None:
    deliver = inbox_consumer._Loop._deliver

    async def eager(self: Any, taken: Taken) -> None:
        await self._consumer.acknowledge(taken.tag)
        await self._consumer._channel.basic_qos(prefetch_count=200)  # a round trip: the ack has arrived
        acknowledge, self._consumer.acknowledge = self._consumer.acknowledge, _nothing
        try:
            await deliver(self, taken)
        finally:
            self._consumer.acknowledge = acknowledge

    patching.setattr(inbox_consumer._Loop, "_deliver", eager)


def no_deduplication(patching: pytest.MonkeyPatch) -> None:
    offer = Line.offer

    def trusting(self: Line, arrival: Arrival) -> Refusal | None:
        seq = arrival.event.seq or 0
        if seq <= self.cursor.last_seq:
            self.cursor = self.cursor._replace(last_seq=seq - 1, last_digest=None)
        return offer(self, arrival)

    patching.setattr(Line, "offer", trusting)


def no_reordering(patching: pytest.MonkeyPatch) -> None:
    offer = Line.offer

    def hasty(self: Line, arrival: Arrival) -> Refusal | None:
        if (seq := arrival.event.seq or 0) != self.cursor.last_seq + 1:
            self.cursor = self.cursor._replace(last_seq=seq - 1, last_digest=None)
        return offer(self, arrival)

    patching.setattr(Line, "offer", hasty)


def unfenced_checkpoint(patching: pytest.MonkeyPatch) -> None:
    checkpoint = Store.checkpoint

    async def forced(self: Store, *arguments: Any, **more: Any) -> None:
        self._epoch = await self._connection.fetchval(
            "SELECT epoch FROM relay.outbox_cursor WHERE shard = $1", self._shard
        )
        await checkpoint(self, *arguments, **more)

    patching.setattr(Store, "checkpoint", forced)


def no_fallback_of_listen(patching: pytest.MonkeyPatch) -> None:
    """LISTEN, and nothing that notices that nobody listens any more."""
    wait = Wakeup.wait

    async def trusting(self: Wakeup, timeout_s: float) -> None:
        try:
            await wait(self, timeout_s)
        except PostgresError:
            await asyncio.Event().wait()

    patching.setattr(Wakeup, "require_connection", lambda self: None)
    patching.setattr(Wakeup, "_lost", lambda self, _: None)
    patching.setattr(Wakeup, "wait", trusting)


def no_barrier(patching: pytest.MonkeyPatch) -> None:
    """Asleep by its own word alone: producers see nobody hold the lock, and notify nobody."""

    async def asleep_without_lock(self: Wakeup) -> bool:
        self.event.clear()
        self._asleep = True
        return True

    async def up_without_lock(self: Wakeup) -> None:
        self._asleep = self.told = False

    patching.setattr(Wakeup, "try_fall_asleep", asleep_without_lock)
    patching.setattr(Wakeup, "get_up", up_without_lock)


def no_digest(patching: pytest.MonkeyPatch) -> None:
    def same_number_same_event(self: Line, event: Event, seq: int) -> Refusal:
        return Refusal.DUPLICATE

    patching.setattr(Line, "_refuse_past", same_number_same_event)


def no_check_under_the_lock(patching: pytest.MonkeyPatch) -> None:
    async def trusting(self: Retention, connection: Any, slot: int, attempt: Any) -> str | None:
        try:
            async with connection.transaction():
                await connection.execute("SET LOCAL lock_timeout = '200ms'")
                await connection.execute(f"TRUNCATE ONLY relay.outbox_{slot}")
        except asyncpg.LockNotAvailableError:
            return "locked"
        return None

    patching.setattr(Retention, "_empty", trusting)


MUTANTS = (
    Mutant(
        name="checkpoint before confirm",
        patch=checkpoint_before_confirm,
        story=cut_inside_a_publish,
        killed_by=frozenset({"no loss", "cursor"}),
    ),
    Mutant(
        name="ignore nack",
        patch=take_it_for_confirmed(Nacked),
        story=full_queue,
        killed_by=frozenset({"no loss", "leftovers"}),
    ),
    Mutant(
        name="ignore return",
        patch=take_it_for_confirmed(Returned),
        story=unrouted_for_a_while,
        killed_by=frozenset({"no loss"}),
    ),
    Mutant(
        name="ignore a time-out",
        patch=take_it_for_confirmed(Unknown),
        story=silence_instead_of_confirms,
        killed_by=frozenset({"no loss", "cursor"}),
    ),
    Mutant(name="id > cursor", patch=id_above_cursor, story=a_late_commit, killed_by=frozenset({"no loss"})),
    Mutant(
        name="ack before commit", patch=ack_before_commit, story=a_commit_that_fails, killed_by=frozenset({"no loss"})
    ),
    Mutant(
        name="no deduplication",
        patch=no_deduplication,
        story=acks_turned_into_nacks,
        killed_by=frozenset({"exactly one effect"}),
    ),
    Mutant(name="no reordering", patch=no_reordering, story=swapped_in_the_queue, killed_by=frozenset({"order"})),
    Mutant(
        name="unfenced checkpoint",
        patch=unfenced_checkpoint,
        story=a_zombie_owner,
        killed_by=frozenset({"single writer"}),
    ),
    Mutant(
        name="no fallback of LISTEN",
        patch=no_fallback_of_listen,
        story=the_listener_is_lost,
        killed_by=frozenset({"settled"}),
    ),
    Mutant(
        name="barrier lock dropped from the wake-up", patch=no_barrier, story=asleep, killed_by=frozenset({"settled"})
    ),
    Mutant(
        name="deduplication without digest",
        patch=no_digest,
        story=a_reissued_number,
        killed_by=frozenset({"leftovers"}),
    ),
    Mutant(
        name="truncate without the check under lock",
        patch=no_check_under_the_lock,
        story=a_row_that_comes_into_an_old_slot,
        killed_by=frozenset({"no loss"}),
    ),
)


# --- small things


async def _true(value: bool) -> bool:
    return value


async def _nothing(_: int) -> None:
    return


async def _asleep(outbox: Outbox, *, oftener_than: int = 0) -> int:
    """Wait until the relay falls asleep; how often it has."""
    progress = await shard_of(outbox)
    await wait_until(progress, lambda p: p.sleeps > oftener_than)
    return progress.sleeps


async def _terminate(scene: Scene, application: str) -> None:
    """End a backend, and see it gone."""
    async with connected(scene.producer_dsn) as db:
        ended = await db.fetchval(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = $1"
            " AND datname = current_database()",
            application,
        )
        assert ended == 1, "inconclusive: there was no such backend"


async def _commit_while_the_lock_is_waited_for(retention: Retention, slot: int, db: Any, blocking: Any) -> None:
    """It waits for 200 ms each time: on a busy machine we may see it too late, and then it tries again."""
    for _ in range(100):
        sweep = asyncio.create_task(retention.sweep())
        while not sweep.done():
            if await db.fetchval(
                f"SELECT true FROM pg_locks WHERE relation = 'relay.outbox_{slot}'::regclass AND NOT granted"
            ):
                await blocking.commit()
                await sweep
                return
            await asyncio.sleep(0)
        assert await sweep == [], "it was emptied under somebody's lock"
        retention._attempts[slot].not_before = 0.0
    raise AssertionError("inconclusive: it was never seen to wait for the lock")


async def _has_epoch(scene: Scene, epoch: int) -> bool:
    async with connected(scene.producer_dsn) as db:
        return bool(await db.fetchval("SELECT epoch >= $1 FROM relay.outbox_cursor", epoch))


async def _waits_in_queue(scene: Scene, count: int) -> bool:
    return await scene.waiting() == count


async def _has_policy(rabbitmq: RabbitMQ, vhost: str) -> bool:
    queue = await asyncio.to_thread(rabbitmq.management().request, "GET", f"/api/queues/{vhost}/effects")
    return b'"policy":"full"' in queue


async def _published(scene: Scene) -> list[Any]:
    return list(scene.witness.messages)


def _again(message: Any) -> aio_pika.Message:
    return aio_pika.Message(
        message.body,
        message_id=message.message_id,
        type=message.type,
        app_id=message.app_id,
        timestamp=message.timestamp,
        content_type=message.content_type,
        headers={k: v for k, v in message.headers.items() if k != "x-delivery-count"},
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
    )
