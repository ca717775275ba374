"""What the index outbox_by_aggregate costs producers: `python -m tests.bench.index_cost [--seconds 5] [--rounds 5] [--rows 1000000]`.

Two databases on one private PostgreSQL (fsync on), alike but for that index, each with a log of so many rows to begin with. Rounds
alternate between them: single-row transactions by 8 clients, then one client with 500 rows a statement; by pgbench, so that the
client costs little. Reported are medians, and the median of the ratios of each round's pair: on a busy machine trust the latter.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

import asyncpg

from relay.postgres.migrate import migrate
from relay.sandbox import SandboxPostgres

AGGREGATES = 20_000
CLIENTS = 8
ROWS_EACH = 500

SINGLE = f"""\\set a random(1, {AGGREGATES})
INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload) VALUES ('order', 'order-' || :a, 'Changed', jsonb_build_object('text', repeat('x', 200)));
"""
# From the small numbers to the large, as the README advises: no two statements can deadlock.
MANY = f"""\\set a random(1, {AGGREGATES - ROWS_EACH})
INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload)
SELECT 'order', 'order-' || (:a + n), 'Changed', jsonb_build_object('text', repeat('x', 200)) FROM generate_series(1, {ROWS_EACH}) AS n;
"""
HISTORY = """
INSERT INTO relay.outbox (id, xid, shard, aggregate_type, aggregate_id, seq, event_type, payload, size)
SELECT -n + 1000000000, '3', 0, 'order', 'order-' || (n % $2::bigint + 1), n / $2 + 1, 'Changed', jsonb_build_object('text', repeat('x', 200)), 212
FROM generate_series(1, $1::bigint) AS n
"""
COUNTERS = "INSERT INTO relay.outbox_aggregate (aggregate_type, aggregate_id, last_seq) SELECT 'order', 'order-' || n, $2::bigint / $1 + 1 FROM generate_series(1, $1::bigint) AS n"


async def _prepare(dsn: str, *, rows: int, indexed: bool) -> None:
    db = await asyncpg.connect(dsn, command_timeout=3600)
    try:
        await migrate(db)
        if not indexed:
            await db.execute("DROP INDEX relay.outbox_by_aggregate")
        await db.execute("ALTER TABLE relay.outbox DISABLE TRIGGER outbox_assign")
        await db.execute(HISTORY, rows, AGGREGATES)
        await db.execute(COUNTERS, AGGREGATES, rows)
        await db.execute("ALTER TABLE relay.outbox ENABLE TRIGGER outbox_assign")
        await db.execute("SELECT setval('relay.outbox_id_seq', 2000000000)")
        await db.execute("VACUUM ANALYZE")
        await db.execute("CHECKPOINT")
    finally:
        await db.close()


def _transactions(dsn: str, script: Path, *, clients: int, seconds: int) -> float:
    """Transactions a second."""
    pgbench = shutil.which("pgbench")
    if pgbench is None:
        raise SystemExit("pgbench is not on the PATH: apt-get install postgresql-client-15, or another version's")
    command = [pgbench, "--no-vacuum", "-f", str(script), "-c", str(clients), "-j", "2", "-T", str(seconds), dsn]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"tps = ([\d.]+) \(without", told) or re.search(r"tps = ([\d.]+)", told)
    if match is None:
        raise SystemExit(f"pgbench told no figure: {told}")
    return float(match[1])


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1_000_000, help="in each log to begin with")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, SandboxPostgres(fsync=True) as server:
        scripts = {"single": Path(folder, "single.sql"), "many": Path(folder, "many.sql")}
        scripts["single"].write_text(SINGLE, encoding="utf-8")
        scripts["many"].write_text(MANY, encoding="utf-8")
        databases = {indexed: server.create_database(f"index_{indexed}".lower()) for indexed in (True, False)}
        for indexed, dsn in databases.items():
            asyncio.run(_prepare(dsn, rows=given.rows, indexed=indexed))
        found: dict[tuple[str, bool], list[float]] = {}
        for n in range(given.rounds):
            for indexed in (True, False) if n % 2 else (False, True):
                dsn = databases[indexed]
                single = _transactions(dsn, scripts["single"], clients=CLIENTS, seconds=given.seconds)
                many = ROWS_EACH * _transactions(dsn, scripts["many"], clients=1, seconds=given.seconds)
                found.setdefault(("single", indexed), []).append(single)
                found.setdefault(("many", indexed), []).append(many)
                print(
                    f"round {n + 1} {'with' if indexed else 'without':8} {single:10.0f} {many:10.0f} rows/s", flush=True
                )
    print(f"\n{server.version}, {given.rows:,} rows to begin with; medians of {given.rounds}, rows/s")
    for name, told in (
        ("single", f"{CLIENTS} clients, one row a transaction"),
        ("many", f"one client, {ROWS_EACH} rows a statement"),
    ):
        with_it, without = found[name, True], found[name, False]
        ratio = statistics.median(w / o for w, o in zip(with_it, without, strict=True))
        print(
            f"{told:40} with {statistics.median(with_it):8.0f}   without {statistics.median(without):8.0f}   ratio {ratio:.3f}"
        )


if __name__ == "__main__":
    main()
