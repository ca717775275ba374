"""What an event costs its producer, part by part: `python -m tests.bench.producer_cost [--rounds 5] [--rows 20000] [--server 15]`.

One private PostgreSQL (fsync on, no autovacuum), a database for each variant of the schema: the whole, what it was before the last
migration of the trigger, and the whole without one of its parts. Each round measures every variant with the same number of rows, in
another order each time; reported are medians of time and of the backends' CPU a row, and the medians of the ratios to the whole within
a round: on a busy machine trust the latter. By pgbench, so that the client costs little. Rows are of the shapes in WORKLOADS.

What migration 0006 rests on, the backends' CPU (2 busy cores; PostgreSQL 15, five rounds of 8 000 rows): one row a transaction 0.94,
with headers 0.65, 8 clients 0.84, 500 rows a statement 0.79, of one aggregate 0.79 of what it was. Without the protocol and the commit
(statements in a loop of a procedure, eight rounds), a row took 60 instead of 90 us, with headers 82 instead of 244, in a statement of
500 rows 21 instead of 28; PostgreSQL 18: 49 instead of 72, 65 instead of 99, 17 instead of 26. A bare table: 9, and 3 among many.
What is left of the 21: the log with its three indexes and the check 8, the counter 10, all else in the trigger 3.

Tried, and not done: UPDATE of the counter before the upsert (0.99 to 1.15; and a plan that would have to be kept on the index), the rules
in the trigger (12 us less for a single row, but rows would be unchecked while triggers are off), no pinned search_path for the check
(0.96 to 1.0), headers by jsonpath first (0.87 to 0.97 of a row with headers, for a second text of their rules), fillfactor 50 for the
counters and COLLATE "C" for the names (0.93 to 1.05 and 0.97 to 1.02: nothing that can be told from the noise).
A trigger function cannot be in SQL, and neither a statement's trigger nor a transition table may set columns.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from relay.postgres.connect import Connection
from relay.postgres.migrate import migrations
from relay.sandbox import SandboxPostgres

AGGREGATES = 20_000
BEFORE = 5
"""The last migration before 0006, which made the trigger cheaper."""

BEFORE_PARTS = 6
"""The last migration before 0007, since which a counter moves on to another key after every 32 events."""

PAYLOAD = (
    '{"order": 4711, "customer": "c-30291", "currency": "EUR", "lines": [{"sku": "A-1001", "count": 2, "cents": 1999},'
    ' {"sku": "B-2002", "count": 1, "cents": 4950}], "total_cents": 8948, "paid": true, "note": "leave it with the neighbours"}'
)
HEADERS = '{"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "tenant": "acme"}'


@dataclass(frozen=True, slots=True)
class Workload:
    """Rows of one shape: the SQL of the aggregate's number and of the headers, and how they are inserted."""

    told: str
    aggregate: str
    headers: str = "NULL::jsonb"
    clients: int = 1
    rows: int = 1  # a statement
    share: float = 1.0  # of --rows: the single-row transactions are dear


WORKLOADS: Mapping[str, Workload] = {
    "one": Workload("one row a transaction", ":a", share=0.25),
    "headers": Workload("the same with headers", ":a", headers=f"'{HEADERS}'::jsonb", share=0.25),
    "clients": Workload("the same without, 8 clients", ":a", clients=8, share=0.5),
    "new": Workload("500 rows a statement, of new aggregates", ":b::bigint * 500 + n", rows=500),
    "known": Workload("500 rows a statement, of known aggregates", f"(:a + n) % {AGGREGATES} + 1", rows=500),
    "hot": Workload("500 rows a statement, of one aggregate", ":a", rows=500),
}

_COLUMNS = "aggregate_type, aggregate_id, event_type, payload, headers"
_INSERT = "INSERT INTO relay.outbox ({columns}) SELECT {values} FROM generate_series(1, {rows}) AS n;"
_INSERT_ONE = "INSERT INTO relay.outbox ({columns}) VALUES ({values});"
_ASSIGNED = {
    "id": "nextval('relay.outbox_id_seq')",
    "xid": "pg_current_xact_id()",
    "shard": "0",
    "seq": "1",
    "size": "300",
}
_BARE = """
DROP TABLE relay.outbox CASCADE;
CREATE TABLE relay.outbox (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, aggregate_type text, aggregate_id text,
  event_type text NOT NULL, payload jsonb, body bytea, content_type text, headers jsonb, routing_key text,
  created_at timestamptz NOT NULL DEFAULT now());
"""
_WITHOUT_CHECKS = """
DO $do$ DECLARE c record; BEGIN
  FOR c IN SELECT conname FROM pg_constraint WHERE conrelid = 'relay.outbox'::regclass AND contype = 'c' LOOP
    EXECUTE 'ALTER TABLE relay.outbox DROP CONSTRAINT ' || c.conname;
  END LOOP;
END $do$;
"""


@dataclass(frozen=True, slots=True)
class Variant:
    """A database: the schema up to a migration, then changes."""

    told: str
    sql: str = ""
    edits: tuple[tuple[str, str], ...] = ()  # of the trigger function's text: pattern and replacement
    upto: int = len(migrations())
    given: Mapping[str, str] | None = None  # columns that the statement fills, as there is no trigger


VARIANTS: dict[str, Variant] = {
    "whole": Variant("the whole"),
    "before": Variant("the whole as it was before 0006", upto=BEFORE),
    "one_row": Variant("one row for a counter, as before 0007", upto=BEFORE_PARTS),
    "bare": Variant("a bare table with a primary key", _BARE),
    "plain": Variant("no trigger", "ALTER TABLE relay.outbox DISABLE TRIGGER outbox_assign", given=_ASSIGNED),
    "checks": Variant("without the CHECK", _WITHOUT_CHECKS),
    "by_aggregate": Variant("without the index by aggregate", "DROP INDEX relay.outbox_by_aggregate"),
    "by_xid": Variant("without the index by xid", "DROP INDEX relay.outbox_by_xid"),
    "counter": Variant(
        "without the counter",
        edits=((r"INSERT INTO relay\.outbox_counter AS c.*?(?=IF NEW\.seq IS DISTINCT)", "next_seq := 1;"),),
    ),
    "definer": Variant(
        "without SECURITY DEFINER and its search_path",
        "ALTER FUNCTION relay.outbox_assign() SECURITY INVOKER; ALTER FUNCTION relay.outbox_assign() RESET ALL",
    ),
    "barrier": Variant(
        "without the wake-up barrier", edits=((r"IF NOT pg_try_advisory_xact_lock_shared\(.*?END IF;", ""),)
    ),
    "size": Variant("without the size", edits=((r"NEW\.size := [^;]*;", "NEW.size := 300;"),)),
}


async def prepare(dsn: str, variant: Variant) -> None:
    """Make the variant's schema, with the counters of AGGREGATES."""
    db: Connection = await asyncpg.connect(dsn, command_timeout=600)
    try:
        for migration in migrations()[: variant.upto]:
            await db.execute(migration.sql)
        await db.execute(variant.sql or "SELECT 1")
        for pattern, replacement in variant.edits:
            text = await db.fetchval("SELECT pg_get_functiondef('relay.outbox_assign'::regproc)")
            edited, count = re.subn(pattern, replacement, text, flags=re.DOTALL)
            if count != 1:
                raise SystemExit(f"the trigger has {count} times: {pattern}")
            await db.execute(edited)
        await db.execute(
            "INSERT INTO relay.outbox_aggregate (aggregate_type, aggregate_id, last_seq)"
            " SELECT 'order', 'order-' || n, 1 FROM generate_series(1, $1::bigint) AS n",
            AGGREGATES,
        )
        await db.execute("VACUUM ANALYZE")
    finally:
        await db.close()


def script(variant: Variant, workload: Workload) -> str:
    """The pgbench script: one statement, which is one transaction."""
    values = {
        "aggregate_type": "'order'",
        "aggregate_id": f"'order-' || {workload.aggregate}",
        "event_type": "'OrderChanged'",
        "payload": f"'{PAYLOAD}'::jsonb",
        "headers": workload.headers,
    } | dict(variant.given or {})
    insert = _INSERT if workload.rows > 1 else _INSERT_ONE
    text = insert.format(columns=", ".join(values), values=", ".join(values.values()), rows=workload.rows)
    return f"\\set a random(1, {AGGREGATES})\n\\set b random(1000, 1000000000)\n{text}\n"


class Server:
    """The sandbox, and the CPU time of the backends that have ended."""

    def __init__(self, server: SandboxPostgres) -> None:
        self._server = server
        self._postmaster = int(asyncio.run(self._ask("SELECT split_part(pg_read_file('postmaster.pid'), E'\\n', 1)")))

    async def _ask(self, statement: str) -> str:
        db: Connection = await asyncpg.connect(self._server.dsn())
        try:
            return str(await db.fetchval(statement))
        finally:
            await db.close()

    def run(self, dsn: str, file: Path, workload: Workload, rows: int) -> tuple[float, float]:
        """Insert so many rows; microseconds of time and of the backends' CPU a row."""
        pgbench = shutil.which("pgbench")
        if pgbench is None:
            raise SystemExit("pgbench is not on the PATH: apt-get install postgresql-client-15, or another version's")
        each = max(1, rows // workload.rows // workload.clients)
        options = ["--no-vacuum", "-M", "prepared", "-c", str(workload.clients), "-j", "1", "-t", str(each)]
        asyncio.run(self._ask("CHECKPOINT"))
        cpu, began = self._settled_cpu(), time.perf_counter()
        told = subprocess.run([pgbench, *options, "-f", str(file), dsn], capture_output=True, text=True, check=False)
        spent = time.perf_counter() - began
        if told.returncode:
            raise SystemExit(told.stderr)
        done = each * workload.rows * workload.clients
        return spent * 1e6 / done, (self._settled_cpu() - cpu) * 1e6 / done

    def _settled_cpu(self) -> float:
        """Seconds of all children that the postmaster has seen end; read when no more of them ends."""
        while True:
            before = self._cpu()
            time.sleep(0.2)
            if (now := self._cpu()) == before:
                return now

    def _cpu(self) -> float:
        fields = Path(f"/proc/{self._postmaster}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


Figures = dict[tuple[str, str], list[tuple[float, float]]]


def measure(
    variants: Mapping[str, Variant],
    workloads: Sequence[str],
    *,
    rounds: int,
    rows: int,
    select: str | None,
    told: Callable[[str], None] = print,
) -> Figures:
    """All variants and workloads, in rounds: (workload, variant) -> (time, CPU) of each round, in microseconds a row."""
    found: Figures = {}
    settings = {"autovacuum": "off", "max_wal_size": "4GB", "checkpoint_timeout": "1h", "shared_buffers": "256MB"}
    with tempfile.TemporaryDirectory() as folder, SandboxPostgres(select, fsync=True, settings=settings) as sandbox:
        server = Server(sandbox)
        told(f"PostgreSQL {sandbox.version}")
        databases = {}
        for name, variant in variants.items():
            databases[name] = sandbox.create_database(f"cost_{name}")
            asyncio.run(prepare(databases[name], variant))
        for n in range(rounds):
            for workload in workloads:
                shape = WORKLOADS[workload]
                for name in random.Random(n).sample(list(variants), len(variants)):
                    file = Path(folder, f"{name}-{workload}.sql")
                    file.write_text(script(variants[name], shape), encoding="utf-8")
                    found.setdefault((workload, name), []).append(
                        server.run(databases[name], file, shape, int(rows * shape.share))
                    )
            told(f"round {n + 1} of {rounds} done")
    return found


def table(found: Figures, variants: Mapping[str, Variant], base: str) -> str:
    """Medians, and medians of the ratios to `base` within each round."""
    lines = []
    for workload in dict.fromkeys(workload for workload, _ in found):
        lines.append(f"\n{WORKLOADS[workload].told}: us a row: time (ratio), CPU of the backends (ratio)")
        for name, variant in variants.items():
            figures, whole = found[workload, name], found[workload, base]
            cells = []
            for part in (0, 1):
                ratio = statistics.median(f[part] / max(w[part], 0.01) for f, w in zip(figures, whole, strict=True))
                cells.append(f"{statistics.median(f[part] for f in figures):8.1f} ({ratio:5.3f})")
            lines.append(f"  {variant.told:46} {cells[0]}  {cells[1]}")
    return "\n".join(lines)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=20_000, help="of a measurement")
    parser.add_argument("--server", help="15, 18, system or embedded; default: the first that is found")
    parser.add_argument(
        "--variants", default=",".join(VARIANTS), help="names, separated by commas; the first is compared with"
    )
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    given = parser.parse_args()
    variants = {name: VARIANTS[name] for name in given.variants.split(",")}
    workloads = given.workloads.split(",")
    found = measure(variants, workloads, rounds=given.rounds, rows=given.rows, select=given.server)
    print(table(found, variants, next(iter(variants))))


if __name__ == "__main__":
    main()
