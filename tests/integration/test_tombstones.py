"""Tombstones in the outbox daemon: what an operator took out of the sequence goes out as its number without its content, in its place."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypeAlias

import asyncpg
import pytest
from aio_pika.abc import AbstractIncomingMessage

from relay.message import TOMBSTONE, Message
from relay.rabbitmq.contract import Outcome
from relay.rabbitmq.fast_publisher import FastPublisher
from tests.harness.audit import Audit, audit
from tests.harness.outbox import connected, insert, outbox_running, settings_for, shard_of, until, wait_until

Db: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


async def mark(db: Db, *seqs: int, aggregate: str = "ghost") -> None:
    """As `relay skip` and `relay purge` do it to parked rows: the marks, and the head is due now. In the caller's transaction."""
    await db.execute("SELECT FROM relay.outbox_cursor ORDER BY shard FOR UPDATE")
    audited = await db.fetchval(
        "INSERT INTO relay.audit (who, side, act, selection, rows) VALUES ('test', 'outbox', 'skip', '{}', 1) RETURNING id"
    )
    await db.execute(
        "INSERT INTO relay.outbox_tombstone (id, shard, act, audit_id)"
        " SELECT id, shard, 'skip', $1 FROM relay.outbox WHERE aggregate_type = $2 AND seq = ANY ($3::bigint[])",
        audited,
        aggregate,
        list(seqs),
    )
    await db.execute(
        "UPDATE relay.outbox_parked SET state = 'retrying', next_attempt_at = now()"
        " WHERE aggregate_type = $1 AND seq = ANY ($2::bigint[]) AND state <> 'waiting'",
        aggregate,
        list(seqs),
    )
    await db.execute("SELECT pg_notify('relay_outbox', 'operate')")


async def park_published(db: Db, *seqs: int, aggregate: str = "order") -> None:
    """As `relay skip --seq` does it to a row that went out already."""
    await db.execute("SELECT FROM relay.outbox_cursor ORDER BY shard FOR UPDATE")
    await db.execute(
        "INSERT INTO relay.outbox_parked (id, shard, aggregate_type, aggregate_id, seq, reason, state, next_attempt_at)"
        " SELECT id, shard, aggregate_type, aggregate_id, seq, 'tombstone', 'retrying', now() FROM relay.outbox"
        " WHERE aggregate_type = $1 AND seq = ANY ($2::bigint[])",
        aggregate,
        list(seqs),
    )
    await mark(db, *seqs, aggregate=aggregate)


def told(witness: Audit) -> list[tuple[Any, str | None]]:
    """(seq, type) of all that arrived, in its order."""
    return [(m.headers["x-sequence"], m.type) for m in witness.messages]


async def nothing_is_parked(db: Db) -> bool:
    return not await db.fetchval("SELECT count(*) FROM relay.outbox_parked")


async def test_a_skipped_row_goes_out_as_a_tombstone_under_the_same_id_without_its_content_and_the_others_follow(
    database: str, broker: str
) -> None:
    settings = settings_for(database, broker, outbox__retry_first_s=300)
    async with audit(broker, "order.#") as witness, connected(database) as db, outbox_running(settings) as outbox:
        await insert(db, "ghost/1", count=3, payload='{"secret": "poison"}')
        await wait_until(await shard_of(outbox), lambda p: p.parked == 3)
        await witness.queue.bind(
            witness.exchange, "ghost.Changed"
        )  # the tombstone goes where the event would have gone
        async with db.transaction():
            await mark(db, 1)
        first, *others = await witness.wait_for(3)
        await until(lambda: nothing_is_parked(db))
    assert told(witness) == [(1, TOMBSTONE), (2, "Changed"), (3, "Changed")]
    assert first.body == b""
    assert (first.headers["x-aggregate-type"], first.headers["x-aggregate-id"]) == ("ghost", "1")
    assert first.routing_key == "ghost.Changed"
    assert "poison" not in str(first.headers)
    assert [m.body for m in others] == [b'{"secret": "poison"}'] * 2
    assert first.message_id == await original_id(database, broker, first)


async def original_id(database: str, broker: str, tombstone: AbstractIncomingMessage) -> str | None:
    """The message id of the event whose place it took: published again as if it had never been marked."""
    async with connected(database) as db, audit(broker, queue="again") as witness:
        await db.execute("UPDATE relay.outbox_cursor SET snapshot = '1:1:', window_snapshot = NULL, after_id = 0")
        async with outbox_running(settings_for(database, broker)):
            await witness.wait_for(3)
    return next(m.message_id for m in witness.messages if m.headers["x-sequence"] == tombstone.headers["x-sequence"])


async def test_a_purged_line_goes_out_as_tombstones_in_order_and_what_came_later_behind_them(
    database: str, broker: str
) -> None:
    settings = settings_for(database, broker, outbox__max_attempts=1)
    async with audit(broker, "order.#") as witness, connected(database) as db, outbox_running(settings) as outbox:
        progress = await shard_of(outbox)
        await insert(db, "ghost/1", count=60)  # more than one portion
        await wait_until(progress, lambda p: p.parked == 60)
        await witness.queue.bind(witness.exchange, "ghost.#")
        async with db.transaction():
            await mark(db, *range(1, 61))
        await insert(db, "ghost/1", count=2)
        await witness.wait_for(62)
        await until(lambda: nothing_is_parked(db))
    assert told(witness) == [*((n, TOMBSTONE) for n in range(1, 61)), (61, "Changed"), (62, "Changed")]


async def test_a_tombstone_that_no_queue_is_bound_for_is_done(database: str, broker: str) -> None:
    settings = settings_for(database, broker, outbox__max_attempts=1)
    async with audit(broker, "order.#") as witness, connected(database) as db, outbox_running(settings) as outbox:
        await insert(db, "ghost/1")
        await wait_until(await shard_of(outbox), lambda p: p.parked == 1)
        async with db.transaction():
            await mark(db, 1)
        await until(lambda: nothing_is_parked(db))
        assert witness.messages == []
        await witness.queue.bind(witness.exchange, "ghost.#")
        await insert(db, "ghost/1")  # nothing blocks it any more
        await witness.wait_for(1)
    assert told(witness) == [(2, "Changed")]


async def test_a_published_row_is_followed_by_its_tombstone_and_later_rows_keep_their_order(
    database: str, broker: str
) -> None:
    async with audit(broker) as witness, connected(database) as db:
        async with outbox_running(settings_for(database, broker)):
            await insert(db, "order/1", count=5)
            await witness.wait_for(5)
        async with db.transaction():
            await park_published(db, 2, 4)
        await insert(db, "order/1", count=3)
        async with outbox_running(settings_for(database, broker)):  # a new session: it must not read them again either
            await witness.wait_for(10)
            await insert(db, "order/1")
            await witness.wait_for(11)
            await until(lambda: nothing_is_parked(db))
    tombstones = [place for place in told(witness) if place[1] == TOMBSTONE]
    events = [seq for seq, kind in told(witness) if kind == "Changed"]
    assert tombstones == [(2, TOMBSTONE), (4, TOMBSTONE)]
    assert events == list(range(1, 10))


async def test_the_tombstone_of_a_published_row_does_not_disturb_a_line_that_is_stuck_behind_it(
    database: str, broker: str
) -> None:
    settings = settings_for(database, broker, outbox__max_attempts=1)
    async with audit(broker, "order.Good") as witness, connected(database) as db, outbox_running(settings) as outbox:
        await insert(db, "order/1", event_type="Good")
        await insert(db, "order/1", event_type="Lost")
        await wait_until(await shard_of(outbox), lambda p: p.parked == 1)
        await insert(db, "order/1", event_type="Good")
        await wait_until(await shard_of(outbox), lambda p: p.parked == 2)
        await db.execute("UPDATE relay.outbox_parked SET attempts = 7 WHERE state = 'stuck'")
        async with db.transaction():
            await park_published(db, 1)
        await witness.wait_for(2)
        await until(lambda: _left(db, 2))
        assert [
            tuple(r) for r in await db.fetch("SELECT seq, state, attempts FROM relay.outbox_parked ORDER BY seq")
        ] == [
            (2, "stuck", 7),  # it was not tried again
            (3, "waiting", 0),
        ]
    assert told(witness) == [(1, "Good"), (1, TOMBSTONE)]


async def test_a_row_that_may_close_the_channel_is_sent_alone_also_behind_a_tombstone(
    database: str, broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = FastPublisher.publish
    sent: list[list[tuple[Any, str]]] = []  # by connection
    by_publisher: dict[FastPublisher, list[tuple[Any, str]]] = {}

    async def noted(publisher: FastPublisher, messages: Sequence[Message]) -> list[Outcome]:
        if publisher not in by_publisher:
            sent.append(by_publisher.setdefault(publisher, []))
        by_publisher[publisher] += [(m.headers["x-sequence"], m.event_type) for m in messages]
        return await publish(publisher, messages)

    async with audit(broker, "order.Good") as witness, connected(database) as db:
        settings = settings_for(database, broker, outbox__max_attempts=1)
        async with outbox_running(settings) as outbox:
            progress = await shard_of(outbox)
            for parked, kind in enumerate(("Good", "Lost", "Good")):
                await insert(db, "order/1", event_type=kind)
                await wait_until(progress, lambda p, parked=parked: p.confirmed == 1 and p.parked == parked)  # type: ignore[misc]
        await witness.queue.bind(witness.exchange, "order.Lost")
        async with db.transaction():
            await db.execute(
                "UPDATE relay.outbox_parked SET reason = 'refused', state = 'retrying', next_attempt_at = now() WHERE state = 'stuck'"
            )
            await park_published(db, 1)
        monkeypatch.setattr(FastPublisher, "publish", noted)
        async with outbox_running(settings):
            await witness.wait_for(4)
            await until(lambda: _left(db, 0))
    assert sent == [[(1, TOMBSTONE), (3, "Good")], [(2, "Lost")]]
    assert told(witness) == [(1, "Good"), (1, TOMBSTONE), (2, "Lost"), (3, "Good")]


async def _left(db: Db, rows: int) -> bool:
    return bool(await db.fetchval("SELECT count(*) = $1 FROM relay.outbox_parked", rows))


class Gate:
    """When armed, it holds the next publication: the broker has answered, and the daemon does not know yet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go = asyncio.Event(), asyncio.Event()
        self.armed = False
        publish = FastPublisher.publish
        gate = self

        async def held(publisher: FastPublisher, messages: Sequence[Message]) -> list[Outcome]:
            if not gate.armed:
                return await publish(publisher, messages)
            gate.armed = False
            outcomes = await publish(publisher, messages)
            gate.reached.set()
            await gate.go.wait()
            return outcomes

        monkeypatch.setattr(FastPublisher, "publish", held)


@pytest.mark.parametrize("marked", [(1,), (1, 2, 3)])
async def test_a_row_that_is_marked_while_it_is_being_published_stays_parked_and_its_tombstone_follows(
    database: str, broker: str, monkeypatch: pytest.MonkeyPatch, marked: tuple[int, ...]
) -> None:
    gate = Gate(monkeypatch)
    settings = settings_for(database, broker, outbox__retry_first_s=300)
    async with audit(broker, "order.#") as witness, connected(database) as db, outbox_running(settings) as outbox:
        await insert(db, "ghost/1", count=3)
        await wait_until(await shard_of(outbox), lambda p: p.parked == 3)
        await witness.queue.bind(witness.exchange, "ghost.#")
        gate.armed = True
        async with db.transaction():  # a retry of the head
            await db.execute("UPDATE relay.outbox_parked SET next_attempt_at = now() WHERE state = 'retrying'")
            await db.execute("SELECT pg_notify('relay_outbox', 'operate')")
        await gate.reached.wait()
        async with db.transaction():  # it is on the wire, and the daemon has not written that down yet
            await mark(db, *marked)
        gate.go.set()
        await until(lambda: nothing_is_parked(db))
        await insert(db, "ghost/1")
        await witness.wait_for(3 + len(marked) + 1)
    arrived = told(witness)
    assert [seq for seq, kind in arrived if kind == TOMBSTONE] == list(marked)
    assert arrived[0] == (1, "Changed")
    assert arrived[-1] == (4, "Changed")


async def test_a_row_that_is_refused_while_it_is_being_marked_is_not_stuck_but_goes_out_as_a_tombstone(
    database: str, broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    settings = settings_for(database, broker, outbox__retry_first_s=300, outbox__max_attempts=2)
    async with audit(broker, "order.#") as witness, connected(database) as db, outbox_running(settings) as outbox:
        await insert(db, "ghost/1")
        await wait_until(await shard_of(outbox), lambda p: p.parked == 1)
        gate.armed = True
        async with db.transaction():
            await db.execute("UPDATE relay.outbox_parked SET next_attempt_at = now() WHERE state = 'retrying'")
            await db.execute("SELECT pg_notify('relay_outbox', 'operate')")
        await gate.reached.wait()  # refused for the second and last time
        await witness.queue.bind(witness.exchange, "ghost.#")
        async with db.transaction():
            await mark(db, 1)
        gate.go.set()
        await witness.wait_for(1)
        await until(lambda: nothing_is_parked(db))
    assert told(witness) == [(1, TOMBSTONE)]


async def test_a_parked_row_is_never_read_again_after_a_crash(database: str, broker: str) -> None:
    settings = settings_for(database, broker, outbox__retry_first_s=300, outbox__checkpoint_interval_s=60)
    async with audit(broker, "order.#") as witness, connected(database) as db:
        for n in range(3):
            async with outbox_running(settings) as outbox:
                await insert(db, "ghost/1", count=2)
                await insert(db, "order/1", count=2)
                await wait_until(await shard_of(outbox), lambda p, n=n: p.parked == 2)  # type: ignore[misc]
                killed = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'relay lease 0' AND datname = current_database()"
                assert await db.fetchval(killed) == 1
                await until(lambda n=n: _sessions(db, 2 * n + 2))  # type: ignore[misc]
                assert await db.fetchval("SELECT count(*) FROM relay.outbox_parked") == 2 * n + 2
                assert (await shard_of(outbox)).parked == 2, "it was read, and parked, twice"
        await witness.queue.bind(witness.exchange, "ghost.#")
        async with db.transaction():
            await mark(db, 1, 3, 5)
        async with outbox_running(settings):
            await until(lambda: nothing_is_parked(db))
    ghosts = [(m.headers["x-sequence"], m.type) for m in witness.messages if m.headers["x-aggregate-type"] == "ghost"]
    assert ghosts == [(n, TOMBSTONE if n % 2 else "Changed") for n in range(1, 7)]


async def _sessions(db: Db, epoch: int) -> bool:
    return bool(await db.fetchval("SELECT epoch >= $1 FROM relay.outbox_cursor", epoch))
