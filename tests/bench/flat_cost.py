"""Does an event cost the same, however many there are? `python -m tests.bench.flat_cost [--sizes 10000 100000 1000000 5000000]`.

Each size is drained by the daemon as `relay run --drain` starts it (a process of its own, uvloop, a calm collector), once from an outbox
after VACUUM ANALYZE, once from one that was never analysed; the clock runs from the connected broker to the last confirm, the first
look at all of the log included. Before that as many messages (a million at most) go into such a queue by the relay's own publisher
without the database: what the broker itself makes of a size is told apart by the ratio to that, and by the processor time of each
process (PostgreSQL's has connecting and the first plans in it, 50 ms). Sizes are interleaved, up in one round and down in the next;
those above a million are drained once unless --rounds-large says otherwise. A throwaway PostgreSQL (fsync on) and RabbitMQ.

So that the broker works alike for every size:
- The queue keeps the newest 10 000 messages only, and has them before the clock starts: it drops one for each that it takes.
- The write-ahead log of quorum queues is rolled over each 8 MiB, some 10 000 of these messages, so that every size pays its share of
  that. By default it is each 512 MiB, some 650 000: then it takes one to two seconds of processor time, which a small size pays not at
  all or, by chance, in full. `--wal-mib 512` measures with the default.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import aio_pika

from relay.bench.figures import MeasurementFailed, Result
from relay.bench.measure import Bench
from relay.bench.roles.messages import publish_log
from relay.bench.servers import Servers, Vhosts
from relay.log import configure_logging
from relay.postgres.connect import connection
from relay.postgres.migrate import migrate
from relay.sandbox import Postgres, RabbitMQ, SandboxPostgres, SandboxRabbitMQ
from relay.settings import DaemonSettings, Settings, load_settings
from tests.bench.peers.contenders import OUR_FILL
from tests.bench.peers.place import QUEUE

AGGREGATES = 500
PAYLOAD_BYTES = 256
KEPT = 10_000
"""Messages in the queue, and events in a block: those of the first are inserted, the others are copies of it."""
LARGE = 1_000_000
WAL_MIB = 8

Way = Literal["raw", "analysed", "never analysed"]
WAYS: Sequence[Way] = ("raw", "analysed", "never analysed")

COPY_BLOCK = """
INSERT INTO relay.outbox (id, xid, slot, shard, aggregate_type, aggregate_id, seq, event_type, payload, size, created_at)
SELECT id + $1, pg_current_xact_id(), slot, shard, aggregate_type, aggregate_id, seq + $2, event_type, payload, size, clock_timestamp()
FROM relay.outbox WHERE id <= $3 ORDER BY id
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One drain, or as many messages published without the database."""

    size: int
    way: Way
    round: int
    events: int  # that were published
    wall_us: float  # per event
    cpu_us: Mapping[str, float | None]  # per event, by process


async def fill(settings: Settings, events: int, *, block: int = KEPT) -> None:
    """An outbox of `events`, a multiple of `block`: the first block inserted, the others copied from it past the trigger.

    In less than half the time that inserting takes. The counters of the aggregates stay behind: nothing is inserted afterwards.
    """
    async with connection(settings.postgres, application="flat cost") as db:
        await migrate(db)
        await _leave_to_us(db)
        for _ in range(0, block, AGGREGATES):
            await db.execute(OUR_FILL, AGGREGATES, AGGREGATES, PAYLOAD_BYTES)
        await db.execute("SET session_replication_role = replica")
        for copied in range(block, events, block):
            await db.execute(COPY_BLOCK, copied, copied // AGGREGATES, block)


async def drain(bench: Bench, settings: Settings, events: int) -> Result:
    """Drain an outbox of `events`. Raises MeasurementFailed unless that many are confirmed."""
    return _all(await bench.play(settings, "relay", **_told("drain", events), drain=True), events)


async def publish(bench: Bench, settings: Settings, events: int, *, block: int = KEPT) -> Result:
    """Publish `events` messages, those of the first block of an outbox again and again. Raises MeasurementFailed unless all are confirmed."""
    again: dict[str, Any] = {"events": block, "times": events // block}
    return _all(await bench.play(settings, "publish", **_told("publish", events), **again), events)


@dataclass(slots=True)
class Places:
    """A database and a queue of its own for every measurement; outboxes are filled once and then copied."""

    postgres: Postgres
    rabbitmq: RabbitMQ
    _filled: dict[int, str] = field(default_factory=dict)

    @asynccontextmanager
    async def place(self, size: int, name: str, *, analysed: bool) -> AsyncIterator[Settings]:
        """An outbox of that size, and a queue that is full: of what is in the smallest outbox."""
        full = await self._outbox(KEPT)
        template = await self._outbox(size)
        dsn = await asyncio.to_thread(self.postgres.create_database, name, template)
        settings = _settings(dsn, await asyncio.to_thread(self.rabbitmq.create_vhost, name))
        try:
            await bind(settings)
            await publish_log(_settings(self.postgres.dsn(full), self.rabbitmq.url(name)), share=0)
            await asyncio.to_thread(self._settle, name, analysed)
            yield settings
        finally:
            await asyncio.to_thread(self.rabbitmq.delete_vhost, name)
            await asyncio.to_thread(self.postgres.drop_database, name)

    def _settle(self, name: str, analysed: bool) -> None:
        if analysed:
            self.postgres.execute("VACUUM ANALYZE", name)
        self.postgres.execute("CHECKPOINT", name)

    async def _outbox(self, size: int) -> str:
        if size not in self._filled:
            name, begun = f"flat_{size}", time.perf_counter()
            dsn = await asyncio.to_thread(self.postgres.create_database, name)
            await fill(_settings(dsn, self.rabbitmq.url()), size)
            print(f"an outbox of {size:,} filled in {time.perf_counter() - begun:.0f} s", flush=True)
            self._filled[size] = name
        return self._filled[size]


async def measure(places: Places, sizes: Sequence[int], *, rounds: int, rounds_large: int) -> list[Measured]:
    """All sizes, interleaved, in every way."""
    bench = Bench(Servers(places.postgres, Vhosts(places.rabbitmq)))
    found = []
    for number in range(1, max(rounds, rounds_large) + 1):
        for size in sizes if number % 2 else reversed(sizes):
            for way in WAYS if number <= (rounds_large if size > LARGE else rounds) else ():
                found.append(await _measured(bench, places, size, way, number))
                print(json.dumps(asdict(found[-1])), flush=True)
    return found


def table(found: Sequence[Measured], *, against: int) -> list[dict[str, Any]]:
    """Medians by size and way; `ratio` to the size compared with (raw to raw, drains to the analysed one), `of_raw` to the same size. Pure."""

    def wall_us(size: int, way: Way) -> float:
        return statistics.median([m.wall_us for m in found if (m.size, m.way) == (size, way)])

    rows = []
    for size in sorted({m.size for m in found}):
        for way in WAYS:
            own = [m for m in found if (m.size, m.way) == (size, way)]
            wall = wall_us(size, way)
            row = {
                "events": size,
                "way": way,
                "wall_us": round(wall, 2),
                "ratio": round(wall / wall_us(against, "raw" if way == "raw" else "analysed"), 3),
                "of_raw": round(wall / wall_us(size, "raw"), 3),
                "cpu_us": {process: _median([m.cpu_us[process] for m in own]) for process in own[0].cpu_us},
            }
            rows.append(row)
    return rows


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 5_000_000])
    parser.add_argument("--against", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rounds-large", type=int, default=1, help=f"of sizes above {LARGE:,}")
    parser.add_argument("--wal-mib", type=int, default=WAL_MIB, help="of RabbitMQ's raft.wal_max_size_bytes")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    configure_logging(DaemonSettings(log_level="warning"))
    if given.against not in given.sizes:
        parser.error("--against must be one of --sizes")
    if any(size % KEPT for size in given.sizes):
        parser.error(f"--sizes are multiples of {KEPT:,}")
    wal = f"raft.wal_max_size_bytes = {given.wal_mib * 1024**2}"
    with SandboxPostgres(fsync=True, settings={"shared_buffers": "512MB", "max_wal_size": "4GB"}) as postgres:
        with SandboxRabbitMQ(config=(wal,)) as rabbitmq:
            places = Places(postgres, rabbitmq)
            found = asyncio.run(measure(places, given.sizes, rounds=given.rounds, rounds_large=given.rounds_large))
    rows = table(found, against=given.against)
    for row in rows:
        print(_line(row))
    if given.json:
        given.json.write_text(json.dumps({"table": rows, "runs": [asdict(m) for m in found]}, indent=1) + "\n")


async def _measured(bench: Bench, places: Places, size: int, way: Way, number: int) -> Measured:
    name = f"flat_{size}_{WAYS.index(way)}_{number}"
    async with places.place(KEPT if way == "raw" else size, name, analysed=way == "analysed") as settings:
        result = await (publish(bench, settings, min(size, LARGE)) if way == "raw" else drain(bench, settings, size))
    wall_us = 1e6 * result.seconds / result.events
    return Measured(size=size, way=way, round=number, events=result.events, wall_us=wall_us, cpu_us=result.cpu_us)


def _told(stage: str, events: int) -> dict[str, Any]:
    return {"stage": stage, "variant": "quorum", "process": "relay", "served": events}


def _all(result: Result, events: int) -> Result:
    if result.events != events:
        raise MeasurementFailed(f"{result.stage}: {result.events:,} events of {events:,}")
    return result


def _median(values: Sequence[float | None]) -> float | None:
    """None where a process's time was not to be had."""
    told = [value for value in values if value is not None]
    return round(statistics.median(told), 2) if told else None


def _line(row: Mapping[str, Any]) -> str:
    cpu = ", ".join(f"{process} {'?' if us is None else f'{us:.1f}'}" for process, us in row["cpu_us"].items())
    figures = f"{row['wall_us']:7.1f} us/event ({row['ratio']:.2f} x), {row['of_raw']:.2f} of raw"
    return f"{row['events']:>10,} {row['way']:15}{figures}; us of CPU: {cpu}"


def _settings(dsn: str, url: str) -> Settings:
    flags = {"source": "bench", "postgres.dsn": dsn, "rabbitmq.url": url, "daemon.log_level": "warning"}
    return load_settings(environ={}, flags=flags)


async def bind(settings: Settings) -> None:
    broker = await aio_pika.connect(settings.rabbitmq.url.get_secret_value())
    async with broker:
        channel = await broker.channel()
        target = await channel.declare_exchange(settings.rabbitmq.exchange, aio_pika.ExchangeType.TOPIC, durable=True)
        arguments: dict[str, Any] = {"x-queue-type": "quorum", "x-max-length": KEPT, "x-overflow": "drop-head"}
        queue = await channel.declare_queue(QUEUE, durable=True, arguments=arguments)
        await queue.bind(target, "#")


async def _leave_to_us(db: Any) -> None:
    """No autovacuum: it would look at copies of what is filled whenever it likes, in the middle of a measurement."""
    for record in await db.fetch(
        "SELECT oid::regclass::text AS name FROM pg_class WHERE relkind = 'r' AND relnamespace = 'relay'::regnamespace"
    ):
        await db.execute(f"ALTER TABLE {record['name']} SET (autovacuum_enabled = off)")


if __name__ == "__main__":
    main()
