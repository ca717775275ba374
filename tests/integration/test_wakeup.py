"""Falling asleep and waking up: no wake-up is lost, and nobody notifies under load."""

from __future__ import annotations

import asyncio
import statistics

import asyncpg
import pytest

from relay.outbox.wakeup import Wakeup
from tests.harness.audit import audit
from tests.harness.outbox import connected, insert, outbox_running, settings_for, shard_of, until, wait_until

LONG_S = 3600.0
"""A poll interval that no test survives: whatever arrives was announced."""


async def test_a_sleeping_relay_is_woken_by_each_insert_without_polling(database: str, broker: str) -> None:
    settings = settings_for(database, broker, outbox__poll_interval_s=LONG_S)
    async with audit(broker) as witness, connected(database) as db, outbox_running(settings) as outbox:
        progress = await shard_of(outbox)
        for n in range(1, 21):
            asleep = progress.sleeps
            await insert(db, "order/1")
            await witness.wait_for(n)
            await wait_until(progress, lambda p, asleep=asleep: p.sleeps > asleep)  # type: ignore[misc]


async def test_what_woke_the_relay_is_sent_without_waiting_until_producers_need_not_notify_any_more(
    database: str, broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(database, broker, outbox__poll_interval_s=LONG_S)
    gets_up, may_get_up = Wakeup.get_up, asyncio.Event()

    async def get_up(self: Wakeup) -> None:
        if self.asleep:
            await may_get_up.wait()
        await gets_up(self)

    monkeypatch.setattr(Wakeup, "get_up", get_up)
    async with audit(broker) as witness, connected(database) as db, outbox_running(settings) as outbox:
        progress = await shard_of(outbox)
        await wait_until(progress, lambda p: p.sleeps > 0)
        await insert(db, "order/1")
        await witness.wait_for(1)
        may_get_up.set()
        asleep = progress.sleeps
        await wait_until(progress, lambda p: p.sleeps > asleep)
        await insert(db, "order/1")
        await witness.wait_for(2)


LOCK_MODES = """
    SELECT array_agg(mode ORDER BY mode) FROM pg_locks
    WHERE locktype = 'advisory' AND classid = 727002 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


async def test_a_producer_that_saw_the_relay_awake_keeps_it_awake_until_it_commits(database: str, broker: str) -> None:
    settings = settings_for(database, broker, outbox__poll_interval_s=LONG_S)
    async with (
        audit(broker) as witness,
        connected(database) as slow,
        connected(database) as db,
        outbox_running(settings) as outbox,
    ):
        progress = await shard_of(outbox)

        async def barred() -> bool:
            """An open transaction that was granted its side of the lock, so that the relay cannot take the other."""
            transaction = slow.transaction()
            await transaction.start()
            await insert(slow, "order/1")
            if await db.fetchval(LOCK_MODES) == ["ShareLock"]:
                return True
            await transaction.rollback()
            await insert(db, "order/0")  # it was asleep: wake it, and try again
            return False

        await until(barred)
        slept, loops = progress.sleeps, 50
        for _ in range(loops):  # each of these lets the relay go round, find nothing, and try to fall asleep
            await insert(db, "order/0")
            await db.fetchval("SELECT pg_sleep(0.01)")
        assert progress.sleeps == slept, "it fell asleep over an open transaction that would not have woken it"
        assert "order/1" not in witness.sequences()
        await slow.execute("COMMIT")

        async def arrived() -> bool:
            return "order/1" in witness.sequences()

        await until(arrived)


async def test_no_notification_is_sent_under_continuous_load(database: str, broker: str) -> None:
    settings = settings_for(database, broker, outbox__poll_interval_s=LONG_S)
    async with audit(broker) as witness, connected(database) as counter, outbox_running(settings) as outbox:
        progress = await shard_of(outbox)
        await wait_until(progress, lambda p: p.sleeps > 0)
        heard: list[str] = []
        await counter.add_listener("relay_outbox", lambda *args: heard.append(str(args[3])))

        async def produce(n: int) -> None:
            async with connected(database) as db:
                await insert(db, f"order/{n}", count=400)

        await asyncio.gather(*(produce(n) for n in range(4)))
        await witness.wait_for(1600)
        await counter.fetchval("SELECT 1")
        # One at the start, when the relay was asleep. On a machine so busy that no producer ran for 50 ms, it dozes off, and
        # whoever commits until it is up again notifies too: 101 were seen at load 6, 1 or 2 on a quiet one.
        assert 1 <= len(heard) <= 320, f"{len(heard)} notifications for 1600 transactions"
        await counter.reset()


async def test_in_poll_mode_nobody_notifies_and_everything_arrives(database: str, broker: str) -> None:
    settings = settings_for(database, broker, outbox__wakeup="poll", outbox__poll_interval_s=0.02)
    async with (
        audit(broker) as witness,
        connected(database) as db,
        connected(database) as counter,
        outbox_running(settings),
    ):
        heard: list[str] = []
        await counter.add_listener("relay_outbox", lambda *args: heard.append(str(args[3])))
        for n in range(1, 11):
            await insert(db, "order/1")
            await witness.wait_for(n)
        await counter.fetchval("SELECT 1")
        assert heard == []
        await counter.reset()


async def test_a_lost_notification_costs_one_poll_interval_and_no_event(database: str, broker: str) -> None:
    settings = settings_for(database, broker, outbox__poll_interval_s=0.2)
    async with audit(broker) as witness, connected(database) as db, outbox_running(settings) as outbox:
        await wait_until(await shard_of(outbox), lambda p: p.sleeps > 0)
        await db.execute("ALTER TABLE relay.outbox DISABLE TRIGGER outbox_assign")  # nobody notifies
        await db.execute(
            "INSERT INTO relay.outbox (id, xid, shard, aggregate_type, aggregate_id, seq, event_type, payload, size) "
            "VALUES (nextval('relay.outbox_id_seq'), pg_current_xact_id(), 0, 'order', '1', 1, 'E', '{}', 2)"
        )
        await witness.wait_for(1)


async def test_the_relay_does_not_write_while_nothing_happens(database: str, broker: str) -> None:
    settings = settings_for(database, broker, outbox__poll_interval_s=0.1)
    async with audit(broker) as witness, connected(database) as db, outbox_running(settings) as outbox:
        progress = await shard_of(outbox)
        await insert(db, "order/1")
        await witness.wait_for(1)
        slept = progress.sleeps
        await wait_until(progress, lambda p: p.sleeps > slept + 2)
        before = await db.fetchrow("SELECT ctid, updated_at FROM relay.outbox_cursor")
        slept = progress.sleeps
        await wait_until(progress, lambda p: p.sleeps > slept + 5)
        assert await db.fetchrow("SELECT ctid, updated_at FROM relay.outbox_cursor") == before


@pytest.mark.parametrize("wakeup", ["notify", "poll"])
async def test_two_phase_commit_works_for_producers_in_poll_mode_and_while_the_relay_is_awake(
    database: str, broker: str, wakeup: str
) -> None:
    settings = settings_for(database, broker, outbox__wakeup=wakeup, outbox__poll_interval_s=0.2)
    async with audit(broker) as witness, connected(database) as db, outbox_running(settings) as outbox:
        await shard_of(outbox)

        async def prepared() -> bool:
            """Refused by PostgreSQL when the trigger had to notify: then the relay was asleep; wake it and try again."""
            await db.execute("BEGIN")
            await insert(db, "order/1")
            try:
                await db.execute("PREPARE TRANSACTION 'two-phase'")
            except asyncpg.PostgresError:
                await db.execute("ROLLBACK")
                await insert(db, "order/wake")
                return False
            return True

        await until(prepared)
        await db.execute("COMMIT PREPARED 'two-phase'")

        async def arrived() -> bool:
            return "order/1" in witness.sequences()

        await until(arrived)


async def test_from_commit_to_the_broker_a_sleeping_relay_takes_milliseconds(database: str, broker: str) -> None:
    """Not a timed test: it prints the median, and fails only where a poll interval (5 s) was waited for."""
    async with (
        audit(broker) as witness,
        connected(database) as db,
        outbox_running(settings_for(database, broker)) as outbox,
    ):
        progress = await shard_of(outbox)
        delays = []
        for n in range(1, 31):
            await wait_until(progress, lambda p, n=n: p.sleeps >= n)  # type: ignore[misc]
            started = asyncio.get_running_loop().time()
            await insert(db, "order/1")
            await witness.wait_for(n)
            delays.append(asyncio.get_running_loop().time() - started)
        print(f"insert to arrival: median {statistics.median(delays) * 1000:.1f} ms, worst {max(delays) * 1000:.1f} ms")
        assert max(delays) < 4
