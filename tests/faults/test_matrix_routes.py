"""Rows 6, 9 and 11 of the fault matrix: connections that are cut again and again, one full queue among others, another exchange."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import aio_pika
import psutil
from structlog.testing import capture_logs

from tests.faults.lab.amqp_proxy import AmqpProxy
from tests.harness.audit import EXCHANGE, audit
from tests.harness.outbox import connected, insert, outbox_running, settings_for, shard_of, until, wait_until
from tests.harness.program import changed

CYCLES = 50


async def test_fifty_lost_connections_leave_no_socket_and_no_task_behind(database: str, broker: str) -> None:
    """Row 6. Under load, so that they are lost in the middle of something."""
    proxy = AmqpProxy(urlsplit(broker).port or 5672)
    port = await proxy.start()
    settings = settings_for(
        database,
        changed(broker, host=f"127.0.0.1:{port}"),
        daemon__backoff_first_s=0.01,
        daemon__backoff_max_s=0.01,
        daemon__log_level="error",
        outbox__repair=False,
    )
    counts: list[tuple[int, int]] = []
    try:
        async with audit(broker) as witness, connected(database) as db, outbox_running(settings):
            with capture_logs() as logged:
                for n in range(CYCLES + 1):
                    await insert(db, "order/1")
                    await witness.wait_for_distinct(n + 1)
                    if n in (10, CYCLES):
                        counts.append((psutil.Process().num_fds(), len(asyncio.all_tasks())))
                    if n < CYCLES:
                        assert proxy.cut() >= 1
            assert sum(line["event"] == "session_failed" for line in logged) >= CYCLES
    finally:
        await proxy.close()
    (fds, tasks), (fds_later, tasks_later) = counts
    assert fds_later <= fds + 5
    assert tasks_later <= tasks + 5
    assert witness.sequences() == {"order/1": list(range(1, CYCLES + 2))}
    print(
        f"row 6: after 10 and {CYCLES} lost connections: {fds} and {fds_later} descriptors, {tasks} and {tasks_later} tasks"
    )


async def test_only_what_is_routed_to_the_full_queue_waits(database: str, broker: str) -> None:
    """Row 9."""
    settings = settings_for(database, broker, outbox__retry_first_s=0.2, outbox__retry_max_s=0.2)
    async with audit(broker, "order.#") as witness, connected(database) as db:
        small = await witness.channel.declare_queue(
            "small", durable=True, arguments={"x-max-length": 3, "x-overflow": "reject-publish"}
        )
        await small.bind(witness.exchange, "full.#")
        async with outbox_running(settings) as outbox:
            progress = await shard_of(outbox)
            await insert(db, "full/1", count=5)
            await insert(db, "full/2", count=5)
            await wait_until(progress, lambda p: p.parked > 0)
            worst_s = 0.0
            for n in range(1, 31):
                began = time.monotonic()
                await insert(db, "order/1")
                await witness.wait_for_distinct(n)
                worst_s = max(worst_s, time.monotonic() - began)
            held = {
                r["aggregate_type"] for r in await db.fetch("SELECT DISTINCT aggregate_type FROM relay.outbox_parked")
            }
            assert held == {"full"}, "inconclusive, or others were parked too"
            began = time.monotonic()
            await small.consume(witness._take, no_ack=True)
            await witness.wait_for_distinct(40)
            recovered_s = time.monotonic() - began
    assert witness.sequences() == {
        "full/1": [1, 2, 3, 4, 5],
        "full/2": [1, 2, 3, 4, 5],
        "order/1": list(range(1, 31)),
    }
    print(f"row 9: others took {worst_s:.2f} s at most; all was out {recovered_s:.2f} s after there was room")


async def test_an_exchange_that_was_declared_otherwise_is_waited_for_with_back_off_and_told(
    database: str, broker: str
) -> None:
    """Row 11: somebody has made an exchange of another kind under relay's name (406)."""
    settings = settings_for(
        database, broker, daemon__backoff_first_s=0.2, daemon__backoff_max_s=0.5, outbox__repair=False
    )
    connection = await aio_pika.connect(broker)
    async with connection, connected(database) as db:
        channel = await connection.channel()
        wrong = await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.DIRECT, durable=True)
        await insert(db, "order/1", count=3)
        with capture_logs() as logged:
            async with outbox_running(settings):
                began = time.monotonic()
                await until(lambda: failures(logged, 4), timeout_s=20)
                took_s = time.monotonic() - began
                await wrong.delete()
                async with audit(broker) as witness:
                    healed = time.monotonic()
                    await witness.wait_for_distinct(3)
                    recovered_s = time.monotonic() - healed
    reasons = {line["reason"] for line in logged if line["event"] == "session_failed"}
    assert all("the exchange 'relay.events' exists with another type" in reason for reason in reasons), reasons
    assert took_s > 0.2 + 0.4 + 0.5, "a tight loop"
    assert witness.sequences() == {"order/1": [1, 2, 3]}
    print(f"row 11: 4 sessions in {took_s:.1f} s; published {recovered_s:.2f} s after it was healed")


async def failures(logged: Sequence[Any], count: int) -> bool:
    """Whether so many sessions have failed."""
    failed = [line for line in logged if line["event"] == "session_failed"]
    return len(failed) >= count
