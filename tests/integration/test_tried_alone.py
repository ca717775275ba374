"""Rows that are tried alone, because one like them ended a session: operators are heard meanwhile, and nobody else waits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from relay.message import TOMBSTONE, Message
from relay.operate.outbox_acts import Retry, Skip
from relay.operate.outbox_pauses import Pause
from relay.operate.selection import Selection
from relay.postgres.queries import query
from relay.rabbitmq.contract import Outcome, Unknown
from relay.rabbitmq.fast_publisher import FastPublisher
from tests.harness.acts import act_on
from tests.harness.audit import audit
from tests.harness.outbox import connected, insert, outbox_running, settings_for, shard_of, wait_until
from tests.integration.test_retention import publish_all

_PARK = """
INSERT INTO relay.outbox_parked (id, shard, aggregate_type, aggregate_id, seq, reason, state, attempts, next_attempt_at)
SELECT id, 0, aggregate_type, aggregate_id, seq, CASE aggregate_type WHEN 'order' THEN 'unroutable' ELSE 'unconfirmed' END,
       'retrying', 1, now() - CASE aggregate_type WHEN 'hung' THEN interval '1 min' ELSE '1 s' END
FROM relay.outbox ORDER BY id
"""


class Queue:
    """Stands for a queue that does not confirm what is called Hung until the test lets the confirm time-out pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hangs = asyncio.Event()
        self.is_late = asyncio.Event()
        real = FastPublisher.publish

        async def publish(publisher: FastPublisher, messages: Sequence[Message]) -> list[Outcome]:
            if len(messages) == 1 and messages[0].event_type == "Hung" and not self.is_late.is_set():
                self.hangs.set()
                await self.is_late.wait()
                return [Unknown("not confirmed", timed_out=True)]
            return await real(publisher, messages)

        monkeypatch.setattr(FastPublisher, "publish", publish)


async def test_what_is_skipped_or_paused_while_it_waits_for_its_turn_is_not_delivered(
    database: str, broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue(monkeypatch)
    settings = settings_for(database, broker, outbox__retry_first_s=60)
    async with audit(broker) as witness, connected(database) as db:
        await insert(db, "hung/1", event_type="Hung")
        for aggregate in ("bill/paused", "bill/skipped", "bill/last"):
            await insert(db, aggregate, payload='{"secret": 1}')
        await publish_all(db)
        await db.execute(_PARK)
        async with outbox_running(settings) as outbox:
            progress = await shard_of(outbox)
            await queue.hangs.wait()
            await act_on(settings, Pause(Selection(aggregate="bill/paused")))
            await act_on(settings, Skip(Selection(aggregate="bill/skipped")))
            queue.is_late.set()
            await wait_until(progress, lambda p: p.unparked == 2)
            told = sorted((m.headers["x-aggregate-id"], m.type, m.body) for m in witness.messages)
        assert told == [("last", "Changed", b'{"secret": 1}'), ("skipped", TOMBSTONE, b"")]


async def test_the_tables_themselves_say_what_may_be_tried_alone_now(database: str, broker: str) -> None:
    """The daemon may not have heard of an act yet: a row is passed over, and does not hold up the next, from the commit on."""
    settings = settings_for(database, broker)
    async with connected(database) as db:
        for n in range(4):
            await insert(db, f"bill/{n}", payload='{"secret": 1}')
        await db.execute(_PARK)
        await db.execute("UPDATE relay.outbox_parked SET next_attempt_at = next_attempt_at + id * interval '1 ms'")

        async def next_alone(*suspects: int) -> tuple[str, bool, bytes]:
            row = await db.fetchrow(query("due_alone"), 0, suspects)
            assert row is not None
            return row["aggregate_id"], row["is_tombstone"], row["body"]

        assert await next_alone() == ("0", False, b'{"secret": 1}')
        await act_on(settings, Pause(Selection(aggregate="bill/0")))
        assert await next_alone() == ("1", False, b'{"secret": 1}')
        await db.execute("UPDATE relay.outbox_parked SET reason = 'unroutable' WHERE aggregate_id IN ('0', '1')")
        assert (await next_alone())[0] == "2"
        assert (await next_alone(1, 2))[0] == "1"  # suspects, by their ids: the paused one is passed over as well
        await db.execute(
            "UPDATE relay.outbox_parked SET state = 'stuck', next_attempt_at = NULL WHERE aggregate_id IN ('1', '3')"
        )
        await act_on(settings, Skip(Selection(aggregate="bill/2")))
        assert await next_alone() == ("2", True, b"")


async def test_others_do_not_wait_for_rows_that_are_tried_alone(
    database: str, broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue(monkeypatch)
    async with audit(broker) as witness, connected(database) as db:
        for n in range(25):  # more than a portion has
            await insert(db, f"hung/{n}", event_type="Hung")
        await insert(db, "order/1", count=2)
        await publish_all(db)
        await db.execute(_PARK)
        await db.execute(
            "UPDATE relay.outbox_parked SET state = 'waiting', reason = 'behind', next_attempt_at = NULL WHERE seq = 2"
        )
        async with outbox_running(settings_for(database, broker, outbox__retry_first_s=60)):
            await queue.hangs.wait()
            await witness.wait_for(2)
    assert witness.sequences() == {"order/1": [1, 2]}


async def test_an_operators_retry_during_an_attempt_outlasts_its_failure(
    database: str, broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be stuck: this was its last attempt."""
    queue = Queue(monkeypatch)
    settings = settings_for(database, broker, outbox__retry_first_s=60, outbox__max_attempts=2)
    async with audit(broker) as witness, connected(database) as db:
        await insert(db, "hung/1", event_type="Hung")
        await publish_all(db)
        await db.execute(_PARK)
        async with outbox_running(settings):
            await queue.hangs.wait()
            await act_on(settings, Retry(Selection(aggregate="hung/1")))
            queue.is_late.set()
            await witness.wait_for(1)
    assert witness.sequences() == {"hung/1": [1]}
