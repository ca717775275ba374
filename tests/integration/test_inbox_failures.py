"""What fails holds itself and what comes after it, nothing else; and nothing of it is applied twice or lost."""

from __future__ import annotations

import asyncio
import re
from urllib.parse import urlsplit

import asyncpg
import pytest
import structlog
from pydantic import SecretStr

from relay.errors import PrivilegeError, SchemaError
from relay.inbox import Event, Inbox
from relay.inbox.apply import Applier
from relay.inbox.database import Database
from relay.inbox.work import Rules
from relay.postgres.connect import Connection
from relay.sandbox import RabbitMQ
from relay.settings import PostgresSettings
from tests.integration.inbox_harness import Sent, eventually, record, recording, stream, tombstone, world


class Switch:
    """An inbox whose type `P` fails while the switch is on, after it has left an effect."""

    def __init__(self) -> None:
        self.on = True
        self.calls = 0
        self.inbox = recording()
        self.inbox.on("P")(self.poison)

    async def poison(self, event: Event, tx: Connection) -> None:
        self.calls += 1
        await record(event, tx)
        if self.on:
            raise RuntimeError("boom\nsecret: the payload")


async def test_a_poison_event_holds_only_its_aggregate_and_a_later_retry_releases_it_in_order(
    database: str, broker: str
) -> None:
    switch = Switch()
    async with world(database, broker) as w, w.running(switch.inbox):
        poisoned = [Sent(seq=1, aggregate="p"), Sent(seq=2, aggregate="p", event_type="P"), *stream("p", 6)[2:]]
        good = [e for name in "abc" for e in stream(name, 20)]
        await w.publish(poisoned[:3] + good + poisoned[3:])
        await w.until(lambda s: s.applied == 61 and s.failed >= 2 and s.behind == 4)
        assert await w.effects("p") == [1]
        assert all([await w.effects(name) == list(range(1, 21)) for name in "abc"])
        error = await w.db.fetchval("SELECT error FROM relay.inbox_held WHERE seq = 2")
        assert error == "RuntimeError: boom"
        assert await w.db.fetchval("SELECT blocked FROM relay.inbox_aggregate WHERE aggregate_id = 'p'")
        switch.on = False
        await w.until(lambda s: s.applied == 66)
        assert await w.effects("p") == [1, 2, 3, 4, 5, 6]
        assert await w.held() == []
        assert not await w.db.fetchval("SELECT bool_or(blocked) FROM relay.inbox_aggregate")


async def test_after_max_attempts_an_event_is_stuck_and_its_successors_wait(database: str, broker: str) -> None:
    switch = Switch()
    async with world(database, broker, max_attempts=3) as w, w.running(switch.inbox):
        await w.publish([Sent(seq=1, event_type="P"), Sent(seq=2)])
        await w.until(lambda s: s.stuck == 1)
        assert w.total.failed == 3
        assert await w.held() == [(1, "failed", "stuck", 3), (2, "behind", "waiting", 0)]
        await w.publish([Sent(seq=3)])
        await w.until(lambda s: s.behind == 2)
        await w.publish([tombstone(1)])  # the producer's operator skips it
        await w.until(lambda s: s.applied == 2)
        assert await w.effects() == [2, 3]
        assert await w.held() == []


async def test_many_poison_events_in_one_batch_are_all_set_apart(database: str, broker: str) -> None:
    switch = Switch()
    async with world(database, broker, retry_first_s=60, retry_max_s=60) as w, w.running(switch.inbox):
        await w.publish(
            [
                Sent(seq=seq, aggregate=str(i), event_type="P" if i % 3 and seq == 2 else "T")
                for i in range(15)
                for seq in (1, 2, 3)
            ]
        )
        await w.until(lambda s: s.received == 45)
        assert (w.total.applied, w.total.failed, w.total.behind) == (5 * 3 + 10, 10, 10)
        assert await w.db.fetchval("SELECT count(*) FROM effect WHERE event_type = 'P'") == 0


async def test_an_event_without_order_fails_alone_is_retried_and_stays_deduplicated(database: str, broker: str) -> None:
    switch = Switch()
    async with world(database, broker) as w, w.running(switch.inbox):
        await w.publish([Sent(seq=None, id=1, event_type="P"), Sent(seq=None, id=2)])
        await w.until(lambda s: s.applied == 1 and s.failed >= 2)
        await w.publish([Sent(seq=None, id=1, event_type="P")])
        await w.until(lambda s: s.duplicates == 1)
        switch.on = False
        await w.until(lambda s: s.applied == 2)
        assert await w.held() == []
        assert await w.db.fetchval("SELECT count(*) FROM effect") == 2


async def test_a_handler_that_takes_too_long_has_failed_and_cannot_commit_late(database: str, broker: str) -> None:
    slow = [True]
    inbox = recording()

    @inbox.on("S")
    async def sleep(event: Event, tx: Connection) -> None:
        await record(event, tx)
        if slow[0]:
            await tx.execute("SELECT pg_sleep(60)")

    async with (
        world(database, broker, handler_timeout_s=0.3, retry_first_s=0.3, retry_max_s=0.3) as w,
        w.running(inbox),
    ):
        await w.publish([Sent(seq=1), Sent(seq=2, event_type="S"), Sent(seq=3), *stream("other", 3)])
        await w.until(lambda s: s.applied == 4 and s.failed >= 1)
        assert await w.effects() == [1]
        assert "longer than 0.3 s" in await w.db.fetchval("SELECT error FROM relay.inbox_held WHERE seq = 2")
        slow[0] = False
        await w.until(lambda s: s.applied == 6)
        assert await w.effects() == [1, 2, 3]


async def test_a_handler_that_takes_too_long_costs_its_connection_and_not_the_session(
    database: str, broker: str
) -> None:
    """A session that ends gives all that it was sent back to the broker, and what is on its way waits for the next one."""
    inbox = recording()

    @inbox.on("S")
    async def sleep(event: Event, tx: Connection) -> None:
        await asyncio.sleep(60)

    async with world(database, broker, handler_timeout_s=0.3, retry_first_s=0.3, retry_max_s=0.3) as w:
        with structlog.testing.capture_logs() as logs:
            async with w.running(inbox):
                await w.publish([Sent(seq=1, event_type="S"), *stream("other", 3)])
                await w.until(lambda s: s.applied == 3 and s.failed >= 3)
                await w.publish([Sent(seq=4, aggregate="other")])
                await w.until(lambda s: s.applied == 4)
    told = [line["event"] for line in logs]
    assert told.count("inbox_started") == 1
    assert "session_failed" not in told


async def test_a_deferred_constraint_that_fails_at_commit_is_charged_to_its_message(database: str, broker: str) -> None:
    async with world(database, broker) as w:
        await w.db.execute(
            "CREATE TABLE once (n int, CONSTRAINT once_n UNIQUE (n) DEFERRABLE INITIALLY DEFERRED); INSERT INTO once VALUES (1)"
        )
        inbox = recording()

        @inbox.on("D")
        async def insert(event: Event, tx: Connection) -> None:
            await record(event, tx)
            await tx.execute("INSERT INTO once VALUES (1)")

        async with w.running(inbox):
            await w.publish([Sent(seq=1), Sent(seq=2, event_type="D"), Sent(seq=3), *stream("a", 5)])
            await w.until(lambda s: s.applied == 6 and s.failed >= 2)
            assert await w.effects() == [1]
            assert "once_n" in await w.db.fetchval("SELECT error FROM relay.inbox_held WHERE seq = 2")
            await w.db.execute("DELETE FROM once")
            await w.until(lambda s: s.applied == 8)
            assert await w.effects() == [1, 2, 3]
            assert await w.effects("a") == [1, 2, 3, 4, 5]


async def test_a_held_successor_that_fails_at_commit_does_not_take_its_predecessor_down(
    database: str, broker: str
) -> None:
    async with world(database, broker) as w:
        await w.db.execute(
            "CREATE TABLE once (n int UNIQUE DEFERRABLE INITIALLY DEFERRED); INSERT INTO once VALUES (1)"
        )
        inbox = recording()

        @inbox.on("D")
        async def insert(event: Event, tx: Connection) -> None:
            await tx.execute("INSERT INTO once VALUES (1)")

        async with w.running(inbox):
            await w.publish([Sent(seq=2), Sent(seq=3, event_type="D"), Sent(seq=4)])
            await w.until(lambda s: s.early == 3)
            await w.publish([Sent(seq=1)])
            await w.until(lambda s: s.applied == 2 and s.failed >= 1)
            assert await w.effects() == [1, 2]
            await w.db.execute("DELETE FROM once")
            await w.until(lambda s: s.applied == 4)
            assert await w.effects() == [1, 2, 4]
            assert await w.held() == []


@pytest.mark.parametrize("sql", ["COMMIT", "ROLLBACK"])
async def test_a_handler_that_ends_the_transaction_is_held_with_the_reason(
    sql: str, database: str, broker: str
) -> None:
    inbox = recording()

    @inbox.on("E")
    async def end(event: Event, tx: Connection) -> None:
        await tx.execute(sql)

    async with world(database, broker, max_attempts=1) as w, w.running(inbox):
        await w.publish([Sent(seq=1, event_type="E"), Sent(seq=2)])
        await w.until(lambda s: s.stuck == 1 and s.behind == 1)
        assert "ended the transaction" in await w.db.fetchval("SELECT error FROM relay.inbox_held WHERE seq = 1")
        await w.publish(stream("a", 3))
        await w.until(lambda s: s.applied == 3)


@pytest.mark.parametrize("aggregate", ["ordered", "unordered"])
async def test_a_handler_that_swallows_an_sql_error_is_held_and_nothing_is_acknowledged_unapplied(
    aggregate: str, database: str, broker: str
) -> None:
    inbox = recording()

    @inbox.on("W")
    async def swallow(event: Event, tx: Connection) -> None:
        await record(event, tx)
        try:
            await tx.execute("SELECT 1 / 0")
        except asyncpg.DivisionByZeroError:
            return

    async with world(database, broker, max_attempts=1) as w, w.running(inbox):
        await w.publish([Sent(seq=1 if aggregate == "ordered" else None, event_type="W"), *stream("a", 3)])
        await w.until(lambda s: s.stuck == 1 and s.applied == 3)
        assert "swallowed an SQL error" in await w.db.fetchval("SELECT error FROM relay.inbox_held")
        assert await w.effects("a") == [1, 2, 3]
        assert await w.db.fetchval("SELECT count(*) FROM effect WHERE event_type = 'W'") == 0


async def test_a_deadlock_is_redone_and_counted_as_nobody_s_failure(database: str, broker: str) -> None:
    inbox = recording()
    raised: list[int] = []

    @inbox.on("K")
    async def collide(event: Event, tx: Connection) -> None:
        await record(event, tx)
        if len(raised) < 3:
            raised.append(1)
            try:
                await tx.execute("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40P01'; END $$")
            except asyncpg.DeadlockDetectedError as exc:
                raise RuntimeError("an application's own wrapping") from exc

    async with world(database, broker) as w, w.running(inbox):
        await w.publish([Sent(seq=1, event_type="K"), Sent(seq=2)])
        await w.until(lambda s: s.applied == 2)
        assert w.total.failed == 0
        assert await w.effects() == [1, 2]


async def test_a_killed_connection_in_the_middle_of_a_batch_is_nobody_s_failure_and_loses_nothing(
    database: str, broker: str
) -> None:
    killed: list[int] = []
    inbox = recording()

    @inbox.on("K")
    async def suicide(event: Event, tx: Connection) -> None:
        await record(event, tx)
        if len(killed) < 2:
            killed.append(1)
            await tx.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    async with world(database, broker) as w, w.running(inbox):
        await w.publish([*stream("a", 5), Sent(seq=1, event_type="K"), Sent(seq=2), *stream("b", 5)])
        await w.until(lambda s: s.applied >= 12)
        assert len(killed) == 2
        assert w.total.failed == 0
        assert await w.effects() == [1, 2]
        assert await w.effects("a") == await w.effects("b") == [1, 2, 3, 4, 5]


async def test_an_idle_connection_that_is_killed_is_noticed_and_replaced(database: str, broker: str) -> None:
    async with world(database, broker) as w, w.running(recording()):
        await w.publish([Sent(seq=1)])
        await w.until(lambda s: s.applied == 1)
        await w.db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'relay inbox shop'"
        )
        await eventually(
            lambda: w.db.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'relay inbox shop'")
        )
        await w.publish([Sent(seq=2)])
        await w.until(lambda s: s.applied == 2)
        assert await w.effects() == [1, 2]


async def test_connections_that_the_broker_closes_are_replaced_and_nothing_is_applied_twice(
    database: str, broker: str, rabbitmq: RabbitMQ
) -> None:
    if rabbitmq.external:
        pytest.skip("needs a broker of our own: unset RELAY_TEST_RABBITMQ_URL")
    async with world(database, broker, batch=5, prefetch=20) as w, w.running(recording(), consumers=2):
        for start in (1, 101):
            await w.publish([e for name in "abc" for e in stream(name, start + 99)[start - 1 :]])
            await w.until(lambda s: s.applied >= 3 * start)  # noqa: B023 - awaited here
            await asyncio.to_thread(rabbitmq.close_all_connections, vhost=broker.rpartition("/")[2])
        await w.until(lambda s: s.applied == 600)
        assert all([await w.effects(name) == list(range(1, 201)) for name in "abc"])


async def test_stopping_finishes_and_acknowledges_the_batch_in_hand(database: str, broker: str) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()
    inbox = Inbox("shop")

    @inbox.on("T")
    async def wait(event: Event, tx: Connection) -> None:
        await record(event, tx)
        entered.set()
        await leave.wait()

    async with world(database, broker) as w:
        stop = asyncio.Event()
        task = asyncio.create_task(inbox.run(w.settings, stop=stop, on_commit=w.committed))
        async with asyncio.timeout(20):
            await eventually(lambda: w.are_subscribed(1))
            await w.publish([Sent(seq=1)])
            await entered.wait()
            stop.set()
            await asyncio.sleep(0)
            leave.set()
            total = await task
        assert total.applied == 1
        assert await w.effects() == [1]
        assert await w.queue_is_empty()


async def test_a_stop_whose_grace_is_over_rolls_back_and_the_broker_delivers_again(database: str, broker: str) -> None:
    entered = asyncio.Event()
    inbox = Inbox("shop")

    @inbox.on("T")
    async def hang(event: Event, tx: Connection) -> None:
        await record(event, tx)
        entered.set()
        await asyncio.Event().wait()

    async with world(database, broker) as w:
        short = w.settings.model_copy(update={"daemon": w.settings.daemon.model_copy(update={"shutdown_grace_s": 0.2})})
        stop = asyncio.Event()
        task = asyncio.create_task(inbox.run(short, stop=stop))
        async with asyncio.timeout(20):
            await eventually(lambda: w.are_subscribed(1))
            await w.publish([Sent(seq=1)])
            await entered.wait()
            stop.set()
            await task
        assert await w.effects() == []
        async with w.running(recording()):
            await w.until(lambda s: s.applied == 1)


async def test_a_missing_schema_ends_the_inbox_at_once_and_takes_no_message(empty_database: str, broker: str) -> None:
    async with world(empty_database, broker) as w:
        with pytest.raises(SchemaError, match=re.escape("Run `relay migrate`")):
            await recording().run(w.settings)


@pytest.mark.parametrize(("policy", "seqs"), [("sequence", [None, None, None]), ("none", [7, 2, 5])])
async def test_old_ids_of_unordered_events_are_forgotten_but_not_those_of_held_ones(
    database: str, broker: str, policy: str, seqs: list[int | None]
) -> None:
    switch = Switch()
    async with world(database, broker, max_attempts=1, seen_retention_s=60, policy=policy) as w:
        async with w.running(switch.inbox):
            kinds = ["P", "T", "T"]
            await w.publish(
                [
                    Sent(seq=seq, id=n, event_type=kind)
                    for n, (seq, kind) in enumerate(zip(seqs, kinds, strict=True), start=1)
                ]
            )
            await w.until(lambda s: s.applied == 2 and s.stuck == 1)
        await w.db.execute("UPDATE relay.inbox_seen SET seen_at = now() - interval '61 s'")
        async with w.running(recording()):
            await eventually(lambda: w.db.fetchval("SELECT count(*) = 1 FROM relay.inbox_seen"))
        assert await w.db.fetchval("SELECT s.message_id = h.message_id FROM relay.inbox_seen s, relay.inbox_held h")


async def test_the_role_relay_consumer_is_enough(database: str, broker: str) -> None:
    async with world(database, broker) as w:
        await w.db.execute(
            "GRANT INSERT ON effect TO relay_consumer; CREATE ROLE inbox_test LOGIN PASSWORD 'x' IN ROLE relay_consumer"
        )
        try:
            parts = urlsplit(database)
            dsn = parts._replace(netloc=f"inbox_test:x@{parts.hostname}:{parts.port}").geturl()
            as_role = w.settings.model_copy(update={"postgres": PostgresSettings(dsn=SecretStr(dsn))})
            switch = Switch()
            async with w.running(switch.inbox, settings=as_role):
                await w.publish(
                    [
                        Sent(seq=2, event_type="P"),
                        Sent(seq=1),
                        Sent(seq=3),
                        Sent(seq=1, body=b"x"),
                        Sent(seq=None, id=9),
                        tombstone(4),
                    ]
                )
                await w.until(lambda s: s.applied == 2 and s.failed >= 2 and s.quarantined == 1 and s.behind == 2)
                switch.on = False
                await w.until(lambda s: s.applied == 4 and s.skipped == 1)
            assert await w.held() == []
        finally:
            await w.db.execute("REVOKE INSERT ON effect FROM relay_consumer; DROP ROLE inbox_test")


async def test_a_missing_privilege_is_found_before_any_message_is_taken(database: str, broker: str) -> None:
    async with world(database, broker) as w:
        await w.db.execute("CREATE ROLE inbox_none LOGIN PASSWORD 'x' IN ROLE relay_monitor")
        try:
            parts = urlsplit(database)
            dsn = parts._replace(netloc=f"inbox_none:x@{parts.hostname}:{parts.port}").geturl()
            settings = w.settings.inbox
            database_of_ours = Database(PostgresSettings(dsn=SecretStr(dsn)), application="test")
            rules = Rules(consumer="shop", inbox=recording(), settings=settings)
            with pytest.raises(PrivilegeError):
                await Applier(database_of_ours, rules).probe()
            await database_of_ours.close()
        finally:
            await w.db.execute("DROP ROLE inbox_none")
