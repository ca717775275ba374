"""What a message costs the inbox, from the delivery to the acknowledgement, in microseconds of CPU: `python -m tests.bench.inbox_cost`.

    [--messages 50000] [--batch 500] [--aggregates 1000] [--rounds 5] [--profile]

Deliveries come from memory, PostgreSQL is a real one (RELAY_TEST_POSTGRES_DSN or a private one). Python's share is process_time,
PostgreSQL's is the backends' own; the wall clock is shown beside them and means little on a busy machine. Rounds alternate
between the handlers. The median of the rounds is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import statistics
import time
from collections.abc import Sequence

import asyncpg
import structlog

from relay.inbox import Inbox
from relay.inbox.intake import Intake
from relay.message import Delivery, to_event
from tests.bench.inbox_load import Feed, applied, backends_cpu_s, database, deliveries, one_by_one, set_based, settings

Costs = dict[str, float]


def _understanding(events: Sequence[Delivery]) -> Costs:
    started = time.process_time()
    for delivery in events:
        to_event(delivery)
    return {"to_event": (time.process_time() - started) / len(events) * 1e6}


async def _intake(events: Sequence[Delivery], batch: int) -> Costs:
    """to_event included: as it happens beside the transaction."""
    feed = Feed(events, prefetch=len(events), stop=asyncio.Event())
    left = len(events)
    started = time.process_time()
    async with Intake(feed, ahead=batch).running() as ready:
        while left:
            await ready.wait()
            left -= ready.take(batch).received
    return {"received and understood": (time.process_time() - started) / len(events) * 1e6}


async def _apply(inbox: Inbox, dsn: str, events: Sequence[Delivery], batch: int) -> Costs:
    watch = await asyncpg.connect(dsn)
    try:
        await watch.execute("TRUNCATE relay.inbox_aggregate, relay.inbox_held, effect")
        configured = settings(dsn, batch=batch, prefetch=4 * batch)
        sampled = asyncio.create_task(_sample(watch))
        wall, cpu = time.perf_counter(), time.process_time()
        total = await applied(inbox, configured, events)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        sampled.cancel()
        backend = await asyncio.gather(sampled, return_exceptions=True)
        effects = await watch.fetchval("SELECT count(*) FROM effect")
        if effects != len(events) or total.applied != len(events):
            raise SystemExit(f"{effects} effects of {len(events)} events: {total}")
    finally:
        await watch.close()
    each = 1e6 / len(events)
    server = backend[0] if isinstance(backend[0], float) else 0.0
    return {
        "Python": cpu * each,
        "PostgreSQL": server * each,
        "wall": wall * each,
        "batch": len(events) / total.batches,
    }


async def _sample(watch: asyncpg.Connection[asyncpg.Record]) -> float:
    """The CPU that the inbox's backends have used, looked at until cancelled: they are gone when the inbox is."""
    highest: dict[int, float] = {}
    try:
        while True:
            rows = await watch.fetch("SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'relay inbox %'")
            highest |= {row["pid"]: backends_cpu_s([row["pid"]]) for row in rows}
            await asyncio.sleep(0.02)
    except asyncio.CancelledError:
        return sum(highest.values())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--aggregates", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="one run of the batch handler under cProfile")
    given = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    events = deliveries(given.messages, aggregates=given.aggregates)
    with database() as dsn:
        if given.profile:
            profile = cProfile.Profile()
            profile.enable()
            asyncio.run(_apply(set_based(), dsn, events, given.batch))
            profile.disable()
            pstats.Stats(profile).sort_stats("tottime").print_stats(45)
            return
        rounds: dict[str, list[Costs]] = {}
        for _ in range(given.rounds):
            rounds.setdefault("understand", []).append(
                _understanding(events) | asyncio.run(_intake(events, given.batch))
            )
            for name, inbox in (("batch handler", set_based()), ("a statement each", one_by_one())):
                rounds.setdefault(name, []).append(asyncio.run(_apply(inbox, dsn, events, given.batch)))
    for name, costs in rounds.items():
        medians = {what: statistics.median(cost[what] for cost in costs) for what in costs[0]}
        print(f"{name:18}", "  ".join(f"{what} {value:.1f}" for what, value in medians.items()))


if __name__ == "__main__":
    main()
