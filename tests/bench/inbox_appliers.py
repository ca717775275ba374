"""When several appliers pay: `python -m tests.bench.inbox_appliers [--messages 20000] [--rounds 5]`.

A handler with one statement a message, fed from memory, with 1, 2 and 4 appliers, and a batch handler with one; beside them the bare
statements, one after the other on one connection in transactions of the same size. Cases alternate; reported are rates against the
bare statements of the same round (median of the rounds).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Sequence

import asyncpg
import structlog

from relay.message import Delivery, to_event
from tests.bench.inbox_load import INSERT, applied, database, deliveries, one_by_one, set_based, settings

BATCH = 500


async def _bare(dsn: str, events: Sequence[Delivery]) -> None:
    """What the handler executes, without an inbox."""
    connection = await asyncpg.connect(dsn)
    try:
        understood = [to_event(delivery) for delivery in events]
        for start in range(0, len(understood), BATCH):
            async with connection.transaction():
                for event in understood[start : start + BATCH]:
                    await connection.execute(INSERT, event.aggregate_id, event.seq, event.event_type)
    finally:
        await connection.close()


async def _cleared(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("TRUNCATE relay.inbox_aggregate, effect")
    finally:
        await connection.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    events = deliveries(given.messages, aggregates=1000)
    with database() as dsn:

        def inbox(appliers: int) -> Callable[[], object]:
            configured = settings(dsn, batch=BATCH, prefetch=4 * BATCH, appliers=appliers)
            return lambda: asyncio.run(applied(one_by_one(), configured, events))

        cases: dict[str, Callable[[], object]] = {
            "bare statements": lambda: asyncio.run(_bare(dsn, events)),
            "1 applier": inbox(1),
            "2 appliers": inbox(2),
            "4 appliers": inbox(4),
            "batch handler, 1 applier": lambda: asyncio.run(
                applied(set_based(), settings(dsn, batch=BATCH, prefetch=4 * BATCH), events)
            ),
        }
        rounds = []
        for _ in range(given.rounds):
            took = {}
            for name, run in cases.items():
                asyncio.run(_cleared(dsn))
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                took[name] = (time.perf_counter() - wall, time.process_time() - cpu)
            rounds.append(took)
    for name in cases:
        ratio = statistics.median(one["bare statements"][0] / one[name][0] for one in rounds)
        cpu_us = statistics.median(one[name][1] for one in rounds) / given.messages * 1e6
        print(f"{name:26} {ratio:5.2f} of the bare statements' rate  ({cpu_us:.0f} us of Python a message)")


if __name__ == "__main__":
    main()
