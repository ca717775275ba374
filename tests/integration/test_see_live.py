"""The commands that look, on a producer and a consumer that are really running."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import SecretStr

from relay.inbox import Event, Inbox
from relay.operate import status, story, stuck
from relay.operate.look import looking
from relay.operate.selection import Selection
from relay.settings import PostgresSettings
from tests.harness.audit import audit
from tests.harness.outbox import connected, insert, outbox_running, settings_for, until


async def _status(dsn: str) -> status.Status:
    async with looking(PostgresSettings(dsn=SecretStr(dsn)), application="test") as look:
        return await status.status(look)


async def _stuck(dsn: str) -> list[stuck.Blocked]:
    async with looking(PostgresSettings(dsn=SecretStr(dsn)), application="test") as look:
        return list((await stuck.stuck(look, Selection(), by_cause=False, limit=50)).blocked)


async def _story(dsn: str, name: str) -> story.Story:
    async with looking(PostgresSettings(dsn=SecretStr(dsn)), application="test") as look:
        found = await story.story(look, "order", name, limit=20)
    assert found is not None
    return found


async def test_an_owner_that_lives_is_told_from_one_that_is_gone(database: str, broker: str) -> None:
    async with audit(broker), connected(database) as db:
        await insert(db, "order/1", count=3)
        settings = settings_for(database, broker)
        async with outbox_running(settings), outbox_running(settings):

            async def owned_and_published() -> bool:
                told = await _status(database)
                assert told.outbox is not None
                (shard,) = told.outbox.shards
                return shard.owner_alive and shard.standbys == 1 and shard.backlog.rows == 0 and shard.published == 3

            await until(owned_and_published)
            told = await _status(database)
            assert told.outbox is not None
            assert told.outbox.shards[0].source == "shop"
            assert told.problems == ()
            assert [row.state for row in (await _story(database, "1")).outbox.rows] == ["published"] * 3  # type: ignore[union-attr]
        await insert(db, "order/1")
        told = await _status(database)
        assert told.outbox is not None
        assert not told.outbox.shards[0].owner_alive
        assert [(p.text, p.command) for p in told.problems] == [
            ("rows wait, and no relay publishes shard 0", "relay run")
        ]
        assert [row.state for row in (await _story(database, "1")).outbox.rows] == ["published"] * 3 + ["waiting"]  # type: ignore[union-attr]


async def test_an_unroutable_row_is_stuck_with_its_successors_behind_it(database: str, broker: str) -> None:
    async with audit(broker, "customer.#"), connected(database) as db:
        await insert(db, "order/1", count=3)
        await insert(db, "customer/1", count=2)
        settings = settings_for(
            database, broker, outbox__max_attempts=2, outbox__retry_first_s=0.05, outbox__retry_max_s=0.05
        )
        async with outbox_running(settings):

            async def is_stuck() -> bool:
                return any(b.state == "stuck" for b in await _stuck(database))

            await until(is_stuck)
            (blocked,) = await _stuck(database)
            assert (blocked.side, blocked.aggregate_id, blocked.seq, blocked.cause, blocked.behind) == (
                "outbox",
                "1",
                1,
                "unroutable",
                2,
            )
            assert (blocked.attempts, blocked.event_type, blocked.next_attempt_at) == (2, "Changed", None)
            assert [row.state for row in (await _story(database, "1")).outbox.rows] == ["stuck", "behind", "behind"]  # type: ignore[union-attr]
            told = await _status(database)
            assert [(p.text, p.command) for p in told.problems] == [("1 aggregate stuck in the outbox", "relay stuck")]


async def test_a_poison_event_is_told_with_the_handlers_error(database: str, broker: str) -> None:
    inbox = Inbox("billing")

    @inbox.on("Changed")
    async def handler(event: Event, tx: Any) -> None:
        if event.seq == 2 and event.aggregate_id == "1":
            raise KeyError("amount")

    settings = settings_for(database, broker, inbox__bindings=("order.#",), inbox__max_attempts=2, inbox__retry_first_s=0.05, inbox__retry_max_s=0.05)  # fmt: skip
    stop = asyncio.Event()
    running = asyncio.create_task(inbox.run(settings, stop=stop))
    try:
        async with outbox_running(settings), connected(database) as db:
            await until(lambda: _queue_is_there(database))
            await insert(db, "order/1", count=4)
            await insert(db, "order/2", count=2)

            async def is_stuck() -> bool:
                return any(b.side == "inbox" and b.state == "stuck" and b.behind == 2 for b in await _stuck(database))

            await until(is_stuck)
            blocked = next(b for b in await _stuck(database) if b.side == "inbox")
            assert (blocked.consumer, blocked.source, blocked.aggregate_id, blocked.seq, blocked.cause) == (
                "billing",
                "shop",
                "1",
                2,
                "failed",
            )
            assert blocked.detail == "KeyError: 'amount'"
            (consumer,) = (await _story(database, "1")).inbox
            assert (consumer.last_seq, consumer.blocked, [h.reason for h in consumer.held]) == (
                1,
                True,
                ["failed", "behind", "behind"],
            )
            (figures,) = (await _status(database)).inbox
            assert (figures.consumer, figures.held.failed, figures.held.stuck) == ("billing", 1, 1)
            assert figures.running >= 1
    finally:
        stop.set()
        await running


async def _queue_is_there(database: str) -> bool:
    return any(c.running for c in (await _status(database)).inbox)


async def test_stored_events_that_no_taker_sees_are_told(database: str) -> None:
    async with connected(database) as db:
        await db.execute(
            "INSERT INTO relay.inbox (consumer, source, aggregate_type, aggregate_id, seq, event_type, message_id, content_type, headers, body, leads)"
            " SELECT 'store', 'shop', 'order', a, n, 'T', n::text, '', '{}', '{}', a <> '2' AND n = 1"
            " FROM unnest('{1,2,3}'::text[]) AS a, generate_series(1, 3) AS n"
        )
    told = await _status(database)
    (consumer,) = told.inbox
    assert (consumer.stranded, consumer.taker_failed) == (1, 0)
    assert [(p.text, p.command) for p in told.problems] == [
        ("no taker sees the stored events of 1 aggregate of store: its inbox mends that", "relay inbox run")
    ]
    (blocked,) = await _stuck(database)
    assert (blocked.kind, blocked.aggregate_id, blocked.seq, blocked.cause, blocked.behind) == (
        *("stored", "2", 1, "stranded", 2),
    )
