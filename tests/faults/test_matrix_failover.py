"""Row 36 of the fault matrix: PostgreSQL fails over to a standby that had not received the last commits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from relay.daemon import Outbox
from relay.inbox import Inbox
from relay.postgres.migrate import migrate
from relay.sandbox import SandboxPostgres
from relay.settings import Settings
from tests.faults.own_servers import postgres_version
from tests.faults.shop import declare_queue
from tests.faults.standby import Standby
from tests.harness.audit import audit
from tests.harness.outbox import connected, insert, outbox_running, settings_for, until
from tests.harness.pair import record

__all__ = ["postgres_version"]

DATABASE = "shop"


@pytest.fixture
def primary(postgres_version: str | None) -> Iterator[SandboxPostgres]:
    """A server of this test's own, of the version that the others use."""
    with SandboxPostgres(postgres_version, fsync=False) as server:
        yield server


async def test_numbers_that_are_given_out_again_after_a_failover_are_told_as_far_as_they_can_be(
    primary: SandboxPostgres, database: str, broker: str
) -> None:
    """Five events are applied; the last two die with the primary. Their numbers are given out again by the promoted standby.

    The documented limit: of the applied numbers only the newest is known by its content. So the new number 5 is a conflict,
    is quarantined, and shown; the new number 4 is taken for a copy of the old one. What has other numbers flows.
    """
    consumer = settings_for(database, broker, inbox__bindings=("order.#",), inbox__repair=False)
    source = primary.create_database(DATABASE)
    await migrated(source)
    stop = asyncio.Event()
    inbox = Inbox("billing")
    inbox.on("Changed")(record)
    async with connected(database) as consumer_db:
        await consumer_db.execute(
            "CREATE TABLE effect (id bigint GENERATED ALWAYS AS IDENTITY, aggregate text, seq bigint, event_type text)"
        )
        await declare_queue(consumer, "billing")
        applying = asyncio.create_task(inbox.run(consumer, stop=stop))
        async with audit(broker) as witness:
            try:
                with Standby(primary) as standby:
                    async with connected(source) as db:
                        async with outbox_running(settings_for(source, broker)):
                            await insert(db, "order/1", count=3, payload='{"by": "the primary"}')
                            await insert(db, "order/2", count=3, payload='{"by": "the primary"}')
                            await until(lambda: has_effects(consumer_db, 6))
                        position = await db.fetchval("SELECT pg_current_wal_lsn()::text")
                        await until(lambda: standby.has_replayed(position))
                        await standby.cut_off()
                        await until(lambda: answered_no(standby))
                        await insert(db, "order/1", count=2, payload='{"by": "the primary, lost"}')
                        await drain(settings_for(source, broker))
                        await until(lambda: has_effects(consumer_db, 8))
                    await asyncio.to_thread(primary.kill9)
                    await standby.promote()
                    promoted = time.monotonic()
                    async with connected(standby.dsn(DATABASE)) as db:
                        assert await db.fetchval("SELECT max(seq) FROM relay.outbox") == 3, (
                            "inconclusive: no commit was lost"
                        )
                        await insert(db, "order/1", count=3, payload='{"by": "the standby"}')
                        await insert(db, "order/2", payload='{"by": "the standby"}')
                        async with outbox_running(settings_for(standby.dsn(DATABASE), broker)):
                            await witness.wait_for(6 + 2 + 4)
                            await until(lambda: has_effects(consumer_db, 10))
                            recovered_s = time.monotonic() - promoted
            finally:
                stop.set()
                await applying
        effects = [
            tuple(r) for r in await consumer_db.fetch("SELECT aggregate, seq FROM effect ORDER BY aggregate, id")
        ]
        quarantined = await consumer_db.fetch(
            "SELECT reason, properties ->> 'sequence' AS seq, convert_from(body, 'UTF8') AS body FROM relay.inbox_quarantine"
        )
        held = await consumer_db.fetchval("SELECT count(*) FROM relay.inbox_held")
    assert effects == [("1", n) for n in range(1, 7)] + [("2", n) for n in range(1, 5)]
    assert [tuple(r) for r in quarantined] == [("conflict", "5", '{"by": "the standby"}')]
    assert held == 0
    print(f"row 36: events of the promoted standby were applied {recovered_s:.1f} s after its promotion")


async def has_effects(db: Any, count: int) -> bool:
    return bool(await db.fetchval("SELECT count(*) >= $1 FROM effect", count))


async def answered_no(standby: Standby) -> bool:
    return not await standby.receives()


async def drain(settings: Settings) -> None:
    async with asyncio.timeout(30):
        await Outbox(settings).run(drain=True)


async def migrated(dsn: str) -> None:
    async with connected(dsn) as db:
        await migrate(db)
