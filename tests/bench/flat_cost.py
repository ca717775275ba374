"""Does an event cost the same, however many there are? `python -m tests.bench.flat_cost [--sizes 10000 100000 1000000 5000000]`.

Each size is drained (`relay run --drain`'s own code) from a fresh database into a quorum queue that keeps the newest 10 000 messages
only, so that the broker's cost is the same for all; the clock runs from the first to the last confirmed page, start-up left out. Once
after VACUUM ANALYZE, once never analysed (autovacuum off). Rounds are interleaved, sizes above a million are drained once unless
--rounds-large says otherwise. Reported: microseconds per event, wall clock and this process's CPU, and the ratio to the size
that --against names. A throwaway PostgreSQL (fsync on) and RabbitMQ.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aio_pika

from relay.daemon import Outbox
from relay.log import configure_logging
from relay.postgres.connect import connection
from relay.postgres.migrate import migrate
from relay.sandbox import Postgres, RabbitMQ, SandboxPostgres, SandboxRabbitMQ
from relay.settings import DaemonSettings, Settings, load_settings
from tests.bench.peers.contenders import OUR_FILL

AGGREGATES = 500
PAYLOAD_BYTES = 256
KEPT = 10_000
LARGE = 1_000_000
LOOK_S = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """One drain."""

    size: int
    analysed: bool
    round: int
    events: int  # that the clock ran for
    wall_us: float  # per event
    cpu_us: float  # per event, of the relay's process


async def drain(settings: Settings, size: int, *, analysed: bool, number: int) -> Drained:
    """Fill, then drain and look. Raises when not every event was published."""
    await _bind(settings)
    async with connection(settings.postgres, application="flat cost") as db:
        await migrate(db)
        if not analysed:
            await _never_analyse(db)
        for _ in range(0, size, 500):
            await db.execute(OUR_FILL, 500, AGGREGATES, PAYLOAD_BYTES)
        if analysed:
            await db.execute("VACUUM ANALYZE", timeout=3600)
        await db.execute("CHECKPOINT", timeout=3600)
    outbox = Outbox(settings)
    task = asyncio.create_task(outbox.run(drain=True))
    await outbox.started.wait()
    progress = outbox.progress[0]
    first: tuple[float, float, int] | None = None
    while progress.confirmed < size and not task.done():
        if first is None and progress.confirmed:
            first = (time.perf_counter(), time.process_time(), progress.confirmed)
        await asyncio.sleep(LOOK_S)
    ended, spent = time.perf_counter(), time.process_time()
    await task
    if progress.published != size or first is None or first[2] >= size:
        raise RuntimeError(f"{progress.published:,} of {size:,} published; too few to measure, or not all")
    events = size - first[2]
    return Drained(
        size=size,
        analysed=analysed,
        round=number,
        events=events,
        wall_us=1e6 * (ended - first[0]) / events,
        cpu_us=1e6 * (spent - first[1]) / events,
    )


async def measure(
    postgres: Postgres, rabbitmq: RabbitMQ, sizes: Sequence[int], *, rounds: int, rounds_large: int, quiet: bool = False
) -> list[Drained]:
    """All sizes, interleaved, each on a database and a virtual host of its own."""
    found = []
    for number in range(1, max(rounds, rounds_large) + 1):
        for size in sizes:
            if number > (rounds_large if size > LARGE else rounds):
                continue
            for analysed in (True, False):
                found.append(await _on_its_own(postgres, rabbitmq, size, analysed=analysed, number=number))
                if not quiet:
                    print(json.dumps(asdict(found[-1])), flush=True)
    return found


def table(found: Sequence[Drained], *, against: int) -> list[dict[str, Any]]:
    """Medians, and the ratio to one of the sizes that was analysed. Pure."""

    def median(size: int, analysed: bool, pick: str) -> float:
        values: list[float] = [getattr(d, pick) for d in found if d.size == size and d.analysed == analysed]
        return statistics.median(values)

    rows = []
    for size in sorted({d.size for d in found}):
        for analysed in (True, False):
            row: dict[str, Any] = {"events": size, "analysed": analysed}
            for pick in ("wall_us", "cpu_us"):
                value = median(size, analysed, pick)
                row |= {pick: round(value, 2), f"{pick}_ratio": round(value / median(against, True, pick), 3)}
            rows.append(row)
    return rows


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 5_000_000])
    parser.add_argument("--against", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rounds-large", type=int, default=1, help=f"of sizes above {LARGE:,}")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    configure_logging(DaemonSettings(log_level="warning"))
    if given.against not in given.sizes:
        parser.error("--against must be one of --sizes")
    with SandboxPostgres(fsync=True, settings={"shared_buffers": "512MB", "max_wal_size": "4GB"}) as postgres:
        with SandboxRabbitMQ() as rabbitmq:
            found = asyncio.run(
                measure(postgres, rabbitmq, given.sizes, rounds=given.rounds, rounds_large=given.rounds_large)
            )
    rows = table(found, against=given.against)
    for row in rows:
        print(
            f"{row['events']:>10,} {'analysed' if row['analysed'] else 'never analysed':15}"
            f"{row['wall_us']:8.1f} us/event ({row['wall_us_ratio']:.2f} x){row['cpu_us']:8.1f} us CPU ({row['cpu_us_ratio']:.2f} x)"
        )
    if given.json:
        given.json.write_text(json.dumps({"table": rows, "runs": [asdict(d) for d in found]}, indent=1) + "\n")


async def _on_its_own(postgres: Postgres, rabbitmq: RabbitMQ, size: int, *, analysed: bool, number: int) -> Drained:
    name = f"flat_{size}_{'analysed' if analysed else 'young'}_{number}"
    dsn = await asyncio.to_thread(postgres.create_database, name)
    url = await asyncio.to_thread(rabbitmq.create_vhost, name)
    flags = {"source": "bench", "postgres.dsn": dsn, "rabbitmq.url": url, "daemon.log_level": "warning"}
    try:
        return await drain(load_settings(environ={}, flags=flags), size, analysed=analysed, number=number)
    finally:
        await asyncio.to_thread(rabbitmq.delete_vhost, name)
        await asyncio.to_thread(postgres.drop_database, name)


async def _bind(settings: Settings) -> None:
    broker = await aio_pika.connect(settings.rabbitmq.url.get_secret_value())
    async with broker:
        channel = await broker.channel()
        target = await channel.declare_exchange(settings.rabbitmq.exchange, aio_pika.ExchangeType.TOPIC, durable=True)
        arguments: dict[str, Any] = {"x-queue-type": "quorum", "x-max-length": KEPT, "x-overflow": "drop-head"}
        queue = await channel.declare_queue("newest", durable=True, arguments=arguments)
        await queue.bind(target, "#")


async def _never_analyse(db: Any) -> None:
    for record in await db.fetch(
        "SELECT oid::regclass::text AS name FROM pg_class WHERE relkind = 'r' AND relnamespace = 'relay'::regnamespace"
    ):
        await db.execute(f"ALTER TABLE {record['name']} SET (autovacuum_enabled = off)")


if __name__ == "__main__":
    main()
