"""`python -m tests.bench.endurance [--minutes 10] [--hold-from 2] [--hold-to 8] [--rate 2000] [--out DIR]`.

relay beside the textbook relay (gathered confirms, tests/bench/textbook.py), at the same time, on the same throwaway PostgreSQL (fsync
on) and RabbitMQ, each with its own table and the same input. From minute 2 to minute 8 a session is idle in a transaction that owns an
id and a snapshot, so that nothing which dies meanwhile can be vacuumed. Every 5 s: rate, latency from INSERT to a consumer, backlog,
dead rows, size of the tables. Each minute each side gets a burst, in turns, which says how fast it *could* go.

Writes windows.csv, endurance.json and endurance.svg.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import asyncpg

from relay.postgres.connect import Connection
from relay.sandbox import SandboxPostgres, SandboxRabbitMQ
from tests.bench.endurance.load import Comparison, Plan
from tests.bench.endurance.plot import drawing
from tests.bench.endurance.sides import SIDES, prepare
from tests.bench.endurance.windows import Window, minute


def main() -> None:
    """Run it, write the files, print the summary."""
    given = _arguments()
    plan = Plan(
        seconds=60 * given.minutes,
        hold=(60 * given.hold_from, 60 * given.hold_to),
        rate=given.rate,
        aggregates=given.aggregates,
        burst=given.burst,
        burst_every_s=given.burst_every,
        window_s=given.window,
    )
    with SandboxPostgres(fsync=True, settings={"shared_buffers": "512MB"}) as postgres, SandboxRabbitMQ() as rabbitmq:
        dsn, url = postgres.create_database("endurance"), rabbitmq.create_vhost("endurance")
        comparison = Comparison(plan=plan, dsn=dsn, url=url, sides=SIDES)
        asyncio.run(_run(comparison))
    write(comparison, Path(given.out))
    print(summary(comparison))


async def _run(comparison: Comparison) -> None:
    db: Connection = await asyncpg.connect(comparison.dsn)
    await prepare(db)
    await db.close()
    await comparison.run()


def write(comparison: Comparison, folder: Path) -> None:
    """windows.csv, endurance.json, endurance.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(window) for window in comparison.windows]
    with (folder / "windows.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    told = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "plan": asdict(comparison.plan),
        "windows": rows,
        "bursts": [asdict(burst) | {"rate": round(burst.rate, 1)} for burst in comparison.bursts],
    }
    (folder / "endurance.json").write_text(json.dumps(told, indent=1) + "\n")
    plan = comparison.plan
    about = (
        f"{plan.rate:,} events/s into each outbox, {plan.hold[0] / 60:g} to {plan.hold[1] / 60:g} min: "
        "a session idle in a transaction holds xmin"
    )
    names = [side.name for side in comparison.sides]
    (folder / "endurance.svg").write_text(drawing(comparison.windows, comparison.bursts, sides=names, about=about))


def summary(comparison: Comparison) -> str:
    """Minute 1 against the last whole minute of the hold, for both."""
    plan = comparison.plan
    last = max(int(plan.hold[1] / 60), 1)
    lines = [f"{'':10}{'minute 1':>40}{f'minute {last}':>40}"]
    for side in comparison.sides:
        cells = []
        for number in (1, last):
            found = minute(comparison.windows, side.name, number)
            draining = [
                b.rate for b in comparison.bursts if b.side == side.name and 60 * (number - 1) <= b.second < 60 * number
            ]
            cells.append(
                f"{_median(found, lambda w: w.rate):,.0f}/s p99 {_median(found, lambda w: w.p99_ms):,.1f} ms, "
                + (f"burst {draining[0]:,.0f}/s" if draining else "burst not drained")
            )
        lines.append(f"{side.name:10}{cells[0]:>40}{cells[1]:>40}")
    return "\n".join(lines)


def _median(found: Sequence[Window], pick: Callable[[Window], float | None]) -> float:
    values: list[Any] = [value for w in found if (value := pick(w)) is not None]
    return statistics.median(values) if values else float("nan")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--hold-from", type=float, default=2, help="minute")
    parser.add_argument("--hold-to", type=float, default=8, help="minute")
    parser.add_argument("--rate", type=int, default=2000, help="events a second into each outbox")
    parser.add_argument("--aggregates", type=int, default=1000)
    parser.add_argument("--burst", type=int, default=10_000, help="events of one burst")
    parser.add_argument("--burst-every", type=float, default=60, help="seconds; 0: none")
    parser.add_argument("--window", type=float, default=5, help="seconds")
    parser.add_argument("--out", default="endurance-out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
