"""How much a retry of 100 000 parked rows slows other traffic: `python -m tests.bench.retry_fairness`.

One run on private servers, with a backlog of live events that never ends. Windows of a few seconds alternate: in every second
one, 1 000 parked aggregates are freed as by `relay retry --all`, and stopped again at its end. Reported are the live events
a second in both kinds of windows, their ratio, the parked rows that went out meanwhile, and the rate of a retry that has the
relay to itself.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from dataclasses import dataclass

from relay.bench.servers import Servers, Vhosts
from relay.daemon import Outbox
from relay.outbox.progress import Progress
from relay.postgres.connect import Connection, connection
from relay.rabbitmq.session import close, connect
from relay.rabbitmq.topology import exchange
from relay.sandbox import find_postgres, find_rabbitmq
from relay.settings import Settings
from tests.harness.outbox import outbox_running, shard_of, until

_INSERT = """
INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload)
SELECT $1, (n % $3)::text, 'Measured', jsonb_build_object('text', repeat('x', 200)) FROM generate_series(1, $2::int) AS n
"""
_PARK = """
INSERT INTO relay.outbox_parked (id, shard, aggregate_type, aggregate_id, seq, reason, detail, state, attempts)
SELECT id, shard, aggregate_type, aggregate_id, seq, CASE WHEN seq = 1 THEN 'unroutable' ELSE 'behind' END, NULL,
       CASE WHEN seq = 1 THEN 'stuck' ELSE 'waiting' END, 0
FROM relay.outbox
"""
_PUBLISHED = "UPDATE relay.outbox_cursor SET snapshot = pg_current_snapshot()"
_FREE = "UPDATE relay.outbox_parked SET state = 'retrying', next_attempt_at = now() WHERE state = 'stuck'"
_STOP = "UPDATE relay.outbox_parked SET state = 'stuck', next_attempt_at = NULL WHERE state = 'retrying'"
_NOTIFY = "SELECT pg_notify('relay_outbox', 'operate')"


@dataclass(frozen=True)
class Window:
    """What went out in a window, by the daemon's own counts."""

    live: float  # rows a second
    parked: float


async def _act(db: Connection, statement: str) -> None:
    """As an operator's command does it: under the cursor's lock, and announced."""
    async with db.transaction():
        await db.execute("SELECT FROM relay.outbox_cursor FOR UPDATE")
        await db.execute(statement)
        await db.execute(_NOTIFY)


async def _window(progress: Progress, seconds: float) -> Window:
    started, live, parked = time.perf_counter(), progress.published, progress.unparked
    await asyncio.sleep(seconds)
    took = time.perf_counter() - started
    return Window((progress.published - live) / took, (progress.unparked - parked) / took)


async def measure(settings: Settings, *, parked: int, aggregates: int, live: int, windows: int, seconds: float) -> None:
    broker = await connect(settings.rabbitmq, name="bench")
    channel = await broker.channel()
    queue = await channel.declare_queue("bench", durable=True, arguments={"x-queue-type": "quorum"})
    await queue.bind(await exchange(channel, settings.rabbitmq), "#")
    async with connection(settings.postgres, application="bench") as db:
        await db.execute(_INSERT, "ghost", parked, aggregates)
        await db.execute(_PARK)
        await db.execute(_PUBLISHED)
        for _ in range(0, live, 500):
            await db.execute(_INSERT, "order", 500, 500)
        free: list[Window] = []
        retrying: list[Window] = []
        async with outbox_running(settings) as outbox:
            progress = await shard_of(outbox)
            await _window(progress, 3)
            for n in range(windows):
                await _act(db, _STOP if n % 2 == 0 else _FREE)
                (free if n % 2 == 0 else retrying).append(found := await _window(progress, seconds))
                print(
                    f"window {n + 1:2} {'retry' if n % 2 else 'live only':9} {found.live:7.0f} live/s {found.parked:6.0f} parked/s"
                )
            left = live - progress.published
            assert left > 0, "the backlog of live events ended: take more of them, or fewer windows"
        await _report(free, retrying)
        await _alone(settings, db)
    await close(broker)


async def _report(free: list[Window], retrying: list[Window]) -> None:
    alone, beside = statistics.mean(w.live for w in free), statistics.mean(w.live for w in retrying)
    print(f"live traffic: {alone:.0f}/s alone, {beside:.0f}/s beside a retry: {beside / alone:.3f} of it")
    print(f"parked rows meanwhile: {statistics.mean(w.parked for w in retrying):.0f}/s")


async def _alone(settings: Settings, db: Connection) -> None:
    """What is left of the parked rows, with nothing beside them."""
    await Outbox(settings).run(drain=True)
    await _act(db, _FREE)
    left: int = await db.fetchval("SELECT count(*) FROM relay.outbox_parked")
    started = time.perf_counter()
    async with outbox_running(settings):
        await until(lambda: _none_parked(db), timeout_s=300, every_s=0.1)
    print(f"a retry with the relay to itself: {left / (time.perf_counter() - started):.0f}/s ({left} rows)")


async def _none_parked(db: Connection) -> bool:
    return not await db.fetchval("SELECT EXISTS (SELECT FROM relay.outbox_parked)")


async def _main(arguments: argparse.Namespace) -> None:
    with find_postgres() as postgres, find_rabbitmq() as rabbitmq:
        async with Servers(postgres, Vhosts(rabbitmq)).fresh() as settings:
            await measure(settings, **vars(arguments))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parked", type=int, default=100_000)
    parser.add_argument("--aggregates", type=int, default=1000)
    parser.add_argument("--live", type=int, default=400_000)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=5)
    asyncio.run(_main(parser.parse_args()))
