"""Whether the inbox slows down with the number of aggregates, or on tables that were never analysed: `python -m tests.bench.inbox_cliff`.

    [--messages 50000] [--rounds 3] [--large 1000000]

The batch handler, fed from memory. Cases alternate; each has a database of its own in which nothing is ever analysed. Reported is
the time of each case against the first one's in the same round (median of the rounds): a cliff would be a factor of ten.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass

import asyncpg
import structlog

from tests.bench.inbox_load import CONSUMER, applied, database, deliveries, set_based, settings

CURSORS = """
INSERT INTO relay.inbox_aggregate (consumer, source, aggregate_type, aggregate_id, last_seq)
SELECT $1, 'shop', 'order', 'order-' || n, 0 FROM generate_series(0, $2::bigint - 1) n
"""


@dataclass
class Case:
    """Events of so many aggregates, of which so many have a cursor to begin with."""

    name: str
    aggregates: int
    cursors: int
    dsn: str = ""
    next_seq: int = 1


async def _prepare(case: Case) -> None:
    connection = await asyncpg.connect(case.dsn, command_timeout=3600)
    try:
        await connection.execute(CURSORS, CONSUMER, case.cursors)
        await connection.execute("CHECKPOINT")
    finally:
        await connection.close()


def _took(case: Case, messages: int) -> float:
    """Seconds a message; each round goes on where the last one ended, or meets other aggregates."""
    events = deliveries(messages, aggregates=min(case.aggregates, messages), first_seq=case.next_seq)
    case.next_seq += -(-messages // case.aggregates)
    started = time.perf_counter()
    asyncio.run(applied(set_based(), settings(case.dsn, batch=500, prefetch=2000), events))
    return (time.perf_counter() - started) / messages


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", type=int, default=1_000_000)
    given = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    n, large = given.messages, given.large
    cases = [
        Case("1 000 aggregates, empty table", 1000, 0),
        Case("100 aggregates, empty table", 100, 0),
        Case(f"{n} aggregates, all new at first, empty table", n, 0),
        Case(f"1 000 aggregates among {large} cursors", 1000, large),
        Case(f"{n} aggregates among {large} cursors", n, large),
    ]
    with ExitStack() as stack:
        for case in cases:
            case.dsn = stack.enter_context(database())
            asyncio.run(_prepare(case))
        rounds = [[_took(case, n) for case in cases] for _ in range(given.rounds)]
    for position, case in enumerate(cases):
        ratio = statistics.median(one[position] / one[0] for one in rounds)
        print(
            f"{case.name:50} {ratio:5.2f}  ({statistics.median(one[position] for one in rounds) * 1e6:.0f} us a message)"
        )


if __name__ == "__main__":
    main()
