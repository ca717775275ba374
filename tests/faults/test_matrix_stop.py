"""Rows 3, 5 and 16 of the fault matrix: a broker that takes nothing, and a relay that is asked to stop meanwhile.

The broker is our own session's: an alarm or a frozen broker would disturb whoever else uses it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from relay.rabbitmq.session import _USER_TIMEOUT_MS
from relay.sandbox import SandboxRabbitMQ
from relay.settings import Settings
from tests.faults.own_servers import own_broker
from tests.faults.shop import CONSUMER_TABLES, PRODUCER_TABLES, applied_count, declare_queue, effects_inbox, judge
from tests.harness.audit import audit
from tests.harness.outbox import connected, insert, settings_for, until
from tests.harness.program import Program, environment, relay

__all__ = ["own_broker"]

MEGABYTE = 1024 * 1024
GOODBYES_S = 10.0
"""On top of the grace period: each of relay's connections may take 2 or 3 s for its goodbye. Measured: 3.1 s together."""

PATIENCE_S = _USER_TIMEOUT_MS / 1000
"""An alarm that lasts longer ends relay's session with the broker, and with it the one that holds the lock: the first of our time-outs."""

BOOK = """
WITH booked AS (INSERT INTO txn_log SELECT 'a' || $1 || '-' || n, 'a' || n % 100, 1 FROM generate_series(1, $2::integer) n RETURNING *)
INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload)
SELECT 'account', aggregate, 'Booked', jsonb_build_object('token', token, 'amount', amount, 'padding', repeat('x', 1000)) FROM booked
"""
OWNER = """
SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND classid = 727003 AND granted
AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


@asynccontextmanager
async def memory_alarm(broker: SandboxRabbitMQ) -> AsyncIterator[None]:
    """Within it the broker takes nothing from anybody who publishes."""
    await asyncio.to_thread(broker.ctl, "set_vm_memory_high_watermark", "absolute", "1MB")
    try:
        yield
    finally:
        await asyncio.to_thread(broker.ctl, "set_vm_memory_high_watermark", "0.4")


async def is_blocked(broker: SandboxRabbitMQ) -> bool:
    """Whether the broker holds a relay's connection back: the proof that an alarm has bitten."""
    told = await asyncio.to_thread(broker.ctl, "list_connections", "client_properties", "state")
    return any("blocked" in line.rsplit("\t", 1)[-1] for line in told.splitlines())


@pytest.fixture
def frozen(own_broker: SandboxRabbitMQ) -> Iterator[SandboxRabbitMQ]:
    """The broker, thawed at the end whatever happens: the kernel acknowledges what is sent to it, and nobody answers."""
    yield own_broker
    os.kill(own_broker.pid, signal.SIGCONT)


async def test_an_alarm_costs_neither_memory_nor_time_nor_the_ownership_and_consumers_go_on(
    database: str, consumer_database: str, broker: str, own_broker: SandboxRabbitMQ, tmp_path: Path
) -> None:
    """Row 5. What is queued is applied during the alarm; what is committed during it waits in the log, not in the relay.

    The ownership is kept by the same session while our time-outs allow it. On a machine so busy that the alarm outlasts them, the
    relay takes the log again.
    """
    settings = settings_for(consumer_database, broker, inbox__bindings=("account.#",), daemon__log_level="error")
    async with connected(database) as db, connected(consumer_database) as consumer:
        await db.execute(PRODUCER_TABLES)
        await consumer.execute(CONSUMER_TABLES)
        await declare_queue(settings)
        async with relay(tmp_path, environment(database, broker), "run") as program:
            await db.execute(BOOK, "before", 500)
            await until(lambda: db.fetchval("SELECT published = 500 FROM relay.outbox_cursor"))
            owner = await db.fetchval(OWNER)
            alarmed = time.monotonic()
            async with memory_alarm(own_broker):
                await db.execute(BOOK, "during", 3000)
                await until(lambda: is_blocked(own_broker))
                used = psutil.Process(program.pid)
                rss, cpu, began = used.memory_info().rss, sum(used.cpu_times()[:2]), time.monotonic()
                async with consuming(settings):
                    await until(lambda: are_applied(consumer_database, 500))
                    await db.execute(BOOK, "more", 3000)
                    await asyncio.sleep(1)  # how long the alarm lasts is the fault, not a wait
                    grown = used.memory_info().rss - rss
                    busy = (sum(used.cpu_times()[:2]) - cpu) / (time.monotonic() - began)
                    assert await is_blocked(own_broker), "inconclusive: the alarm was over"
                    owner_now = await until(lambda: db.fetchval(OWNER))
                    lasted_s = time.monotonic() - alarmed
                    assert owner_now == owner or lasted_s > PATIENCE_S, "it gave the log away, or began another session"
                    assert await are_applied(consumer_database, 500)
            healed = time.monotonic()
            async with consuming(settings):
                await until(lambda: are_applied(consumer_database, 6500))
            recovered_s = time.monotonic() - healed
            code, _ = await program.stop()
    verdict = await judge(database, consumer_database)
    print(f"row 5: {grown / MEGABYTE:+.1f} MB, {busy:.0%} of a core; all applied {recovered_s:.1f} s after the alarm")
    assert code == 0
    assert verdict.holds, verdict
    assert grown < 30 * MEGABYTE
    assert busy < 0.5


@asynccontextmanager
async def consuming(settings: Settings) -> AsyncIterator[None]:
    stop = asyncio.Event()
    inbox = asyncio.create_task(effects_inbox().run(settings, stop=stop))
    try:
        yield
    finally:
        stop.set()
        async with asyncio.timeout(60):
            await inbox


async def are_applied(consumer_database: str, count: int) -> bool:
    return await applied_count(consumer_database) >= count


async def test_sigterm_while_the_broker_takes_nothing_ends_it_with_0_and_a_second_one_at_once(
    database: str, broker: str, own_broker: SandboxRabbitMQ, tmp_path: Path
) -> None:
    """Row 3, blocked by an alarm. What was not confirmed is still there for the next one."""
    patient = environment(database, broker, daemon_shutdown_grace_s="1")
    for_ever = environment(database, broker, daemon_shutdown_grace_s="600")
    async with audit(broker) as witness, connected(database) as db:
        async with relay(tmp_path, patient, "run") as first:
            await insert(db, "order/1", count=3)
            await witness.wait_for(3)
            async with memory_alarm(own_broker):
                await insert(db, "order/1", count=3)
                await until(lambda: is_blocked(own_broker))
                code, took_s = await stopped(first, signal.SIGTERM)
                assert code == 0, first.log
                assert "grace_over" in first.log
                assert took_s < 1 + GOODBYES_S
                async with relay(tmp_path, for_ever, "run") as second:
                    await second.says('"owner"')
                    await until(lambda: is_blocked(own_broker))
                    second.signal(signal.SIGTERM)
                    await second.says("once more to stop at once")
                    code, at_once_s = await stopped(second, signal.SIGTERM)
                    assert code == 128 + signal.SIGTERM
                    assert at_once_s < 2
                assert len(witness.messages) == 3, "inconclusive: the broker took more"
        await drained(tmp_path, patient)
        await witness.wait_for_distinct(6)
    assert witness.sequences() == {"order/1": [1, 2, 3, 4, 5, 6]}
    print(f"row 3, alarm: stopped {took_s - 1:.1f} s after the grace period; the second signal took {at_once_s:.2f} s")


def states(pid: int) -> set[str]:
    """Of a process's threads: T is stopped. See proc_pid_stat(5); psutil tells the first thread's for all."""
    return {task.read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").glob("*/stat")}


async def is_stopped(pid: int) -> bool:
    """The kernel stops a process a moment after SIGSTOP: when each of its threads has come to it."""
    return states(pid) == {"T"}


async def test_sigterm_while_nobody_answers_at_the_other_end_ends_it_with_0(
    database: str, broker: str, frozen: SandboxRabbitMQ, tmp_path: Path
) -> None:
    """Row 3, half-open: the broker's kernel acknowledges every byte, and nobody reads it."""
    environ = environment(database, broker, daemon_shutdown_grace_s="1")
    async with audit(broker) as witness, connected(database) as db:
        async with relay(tmp_path, environ, "run") as program:
            await insert(db, "order/1", count=3)
            await witness.wait_for(3)
            os.kill(frozen.pid, signal.SIGSTOP)
            try:
                await until(lambda: is_stopped(frozen.pid))
                await insert(db, "order/1", count=3)
                code, took_s = await stopped(program, signal.SIGTERM)
            finally:
                os.kill(frozen.pid, signal.SIGCONT)
            assert code == 0, program.log
            assert took_s < 1 + GOODBYES_S
            assert len(witness.messages) == 3
        await drained(tmp_path, environ)
        await witness.wait_for_distinct(6)
    assert witness.sequences() == {"order/1": [1, 2, 3, 4, 5, 6]}
    print(f"row 3, half-open: stopped {took_s - 1:.1f} s after the grace period")


async def test_sigterm_under_load_leaves_a_cursor_that_repeats_nothing(
    database: str, broker: str, tmp_path: Path
) -> None:
    """Row 3, under load: what was confirmed is checkpointed, what was not is not."""
    environ = environment(database, broker, outbox_page_rows="50", outbox_checkpoint_interval_s="60")
    async with audit(broker) as witness, connected(database) as db:
        await db.execute(
            "INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload)"
            " SELECT 'order', (n % 20)::text, 'Changed', '{}' FROM generate_series(1, 5000) n"
        )
        async with relay(tmp_path, environ, "run") as program:
            await witness.wait_for(100)
            code, took_s = await stopped(program, signal.SIGTERM)
            assert code == 0, program.log
        halfway = len(witness.messages)
        assert halfway < 5000, "inconclusive: it was done before the signal"
        await drained(tmp_path, environ)
        await witness.wait_for_distinct(5000)
        assert len(witness.messages) == 5000, "something was published twice: its confirm was not written down"
    print(f"row 3, under load: stopped in {took_s:.1f} s after {halfway} of 5000")


async def test_an_owner_that_was_frozen_past_its_lease_wakes_up_and_can_move_nothing(
    database: str, broker: str, tmp_path: Path
) -> None:
    """Row 16: the zombie's lock was taken from it by the server, its successor has published, then it wakes up."""
    environ = environment(database, broker, outbox_standby_interval_s="0.1")
    async with audit(broker) as witness, connected(database) as db, relay(tmp_path, environ, "run") as zombie:
        await insert(db, "order/1", count=3)
        await witness.wait_for(3)
        lease = await db.fetchval(OWNER)
        zombie.signal(signal.SIGSTOP)
        await until(lambda: answer(psutil.Process(zombie.pid).status() == psutil.STATUS_STOPPED))
        async with relay(tmp_path, environ, "run") as successor:
            await successor.says('"standby"')
            await db.fetchval("SELECT pg_terminate_backend($1)", lease)
            began = time.monotonic()
            await successor.says('"owner"')
            took_s = time.monotonic() - began
            await insert(db, "order/1", count=3)
            await witness.wait_for_distinct(6)
            zombie.signal(signal.SIGCONT)
            await zombie.says('"session_failed"', '"standby"')
            await insert(db, "order/1", count=3)
            await witness.wait_for_distinct(9)
            assert await db.fetchval("SELECT epoch FROM relay.outbox_cursor") == 2
            assert (await successor.stop())[0] == (await zombie.stop())[0] == 0
    assert witness.sequences() == {"order/1": list(range(1, 10))}
    print(f"row 16: the successor owned the log {took_s:.1f} s after the zombie's backend was terminated")


async def answer(value: bool) -> bool:
    return value


async def stopped(program: Program, number: signal.Signals) -> tuple[int, float]:
    """(exit code, seconds that it took) after a signal."""
    began = time.monotonic()
    program.signal(number)
    code, _ = await program.ends()
    return code, time.monotonic() - began


async def drained(folder: Path, environ: dict[str, str]) -> None:
    """Another relay publishes what is left, and ends."""
    async with relay(folder, environ, "run", "--drain") as program:
        code, log = await program.ends()
    assert code == 0, log
