"""Databases with relay's schema, one for each test: to make one costs more than most tests, so they are used again.

A database is given on only if nothing tells it from a fresh copy of the template: what a test left in relay's tables is
emptied, tables, functions and schemas of its own are dropped, and then the catalogs, the sizes of the tables and the
database's own settings must be as the template's. One in which a test changed the schema, a privilege or a setting is
dropped. Each test finds it under a new name, so that no process of an earlier test can find it too.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import asyncpg

from relay.postgres.migrate import migrate
from relay.sandbox import Postgres
from tests.harness.maintenance import Maintenance

CATALOGS = """
SELECT string_agg(format('SELECT concat_ws('' '', %L, count(*), max(xmin::text::bigint)) FROM pg_catalog.%1$I', relname),
                  ' UNION ALL ' ORDER BY relname)
FROM pg_class WHERE relnamespace = 'pg_catalog'::regnamespace AND relkind = 'r' AND NOT relisshared
  AND relname NOT IN ('pg_class', 'pg_namespace', 'pg_statistic')
"""
"""Makes the question after every catalog: each change but a deletion leaves a younger xmin, and a deletion a smaller count.

The three others change without a change of the schema: by TRUNCATE, by temporary tables and by ANALYZE.
"""

OBJECTS = """
SELECT concat_ws(' ', 'schema', oid, nspname, nspowner, nspacl::text)
FROM pg_namespace WHERE nspname !~ '^pg_(toast_)?temp_'
UNION ALL
SELECT concat_ws(' ', 'relation',
  to_jsonb(c) - '{relfilenode,relpages,reltuples,relallvisible,relallfrozen,relfrozenxid,relminmxid}'::text[])
FROM pg_class c WHERE oid >= 16384
UNION ALL
SELECT concat_ws(' ', 'pg_class', count(*), max(xmin::text::bigint)) FROM pg_class WHERE oid < 16384
UNION ALL
SELECT concat_ws(' ', 'database', datdba, datacl::text, datallowconn, datconnlimit, datistemplate)
FROM pg_database WHERE datname = current_database()
UNION ALL
SELECT 'setting ' || s::text FROM pg_db_role_setting s
WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())
UNION ALL
SELECT 'prepared ' || gid FROM pg_prepared_xacts WHERE database = current_database()
ORDER BY 1
"""

TABLES = """
SELECT oid::int8, oid::regclass::text AS name, pg_total_relation_size(oid) AS bytes, reltuples
FROM pg_class WHERE oid >= 16384 AND relkind = 'r' AND relnamespace = 'relay'::regnamespace ORDER BY oid
"""

SEQUENCES = "SELECT setval(seqrelid, seqstart, false) FROM pg_sequence"

FOREIGN = """
SELECT format('DROP SCHEMA %I CASCADE', nspname) FROM pg_namespace
WHERE oid >= 16384 AND oid::int8 <> ALL (string_to_array($1, ' ')::int8[]) AND nspname !~ '^pg_(toast_)?temp_'
UNION ALL
SELECT format('DROP TABLE IF EXISTS %s CASCADE', oid::regclass) FROM pg_class
WHERE oid >= 16384 AND oid::int8 <> ALL (string_to_array($1, ' ')::int8[]) AND relkind IN ('r', 'p') AND relpersistence <> 't'
UNION ALL
SELECT format('DROP FUNCTION IF EXISTS %s CASCADE', oid::regprocedure) FROM pg_proc
WHERE oid >= 16384 AND oid::int8 <> ALL (string_to_array($1, ' ')::int8[]) AND prokind = 'f'
"""
"""What a test added, in an order in which the first may take the others along.

What is known comes as one text: of an array asyncpg would ask in each connection what its type is, which takes three times as long.
"""

KNOWN = """
SELECT oid::int8 FROM pg_namespace WHERE oid >= 16384 UNION SELECT oid::int8 FROM pg_class WHERE oid >= 16384
UNION SELECT oid::int8 FROM pg_proc WHERE oid >= 16384
"""

QUIETLY = "SET LOCAL session_replication_role = replica; SET LOCAL client_min_messages = error"
"""No trigger fires, and nothing is told of what else is dropped."""

EVERYBODY_OUT = (
    "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = $1 AND pid <> pg_backend_pid()"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fresh:
    """What a database is like that nobody has used yet."""

    catalogs: str  # the question after the catalogs
    looks: tuple[str, ...]  # the answer, and everything else that can be told in words
    tables: dict[str, tuple[int, float]]  # bytes with indexes, and what the planner believes of the number of rows
    rows: dict[str, bytes]  # of the tables that are not empty
    known: str  # oids; a copy has the template's

    @classmethod
    async def of(cls, db: asyncpg.Connection[Any]) -> Fresh:
        """Look at a database that was only migrated."""
        catalogs = str(await db.fetchval(CATALOGS))
        await db.execute(SEQUENCES)  # as they will be set again; they were not drawn from
        tables = await _tables(db)
        rows = {name: found for name in tables if (found := await _rows(db, name)) != await _rows(db, name, "LIMIT 0")}
        known = " ".join(str(row[0]) for row in await db.fetch(KNOWN))
        return cls(catalogs=catalogs, looks=await _looks(db, catalogs), tables=tables, rows=rows, known=known)

    async def restore(self, db: asyncpg.Connection[Any]) -> bool:
        """Undo what a test did; True if nothing tells the database from a fresh one."""
        async with db.transaction():
            await db.execute("; ".join([QUIETLY, *(row[0] for row in await db.fetch(FOREIGN, self.known))]))
            used = [name for name, now in (await _tables(db)).items() if now != self.tables.get(name)]
            used += [name for name, rows in self.rows.items() if name not in used and await _rows(db, name) != rows]
            if used:
                await db.execute(f"TRUNCATE {', '.join(used)} CASCADE")
            for name in self.rows.keys() & set(used):
                schema, _, table = name.partition(".")
                await db.copy_to_table(table, schema_name=schema, source=BytesIO(self.rows[name]), format="binary")
            await db.execute(f"{SEQUENCES}; DELETE FROM pg_statistic WHERE starelid >= 16384; SELECT pg_stat_reset()")
        return await _tables(db) == self.tables and await _looks(db, self.catalogs) == self.looks


class Databases:
    """Makes them in one server, keeps those that can be used again, and drops all at the end. Methods block."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres
        self._maintenance = Maintenance(postgres.dsn())
        self._free: list[str] = []
        self.template = fresh_name("template")
        self._maintenance.execute(f"CREATE DATABASE {self.template}")
        self.fresh = self._maintenance.run(_migrated(postgres.dsn(self.template)))

    def close(self) -> None:
        """Drop the template and what is kept."""
        for name in (*self._free, self.template):
            self._drop(name)
        self._free.clear()
        self._maintenance.close()

    @contextmanager
    def one(self, purpose: str = "test") -> Iterator[str]:
        """The DSN of a database that nobody else has, and that looks as if nobody ever had."""
        name = fresh_name(purpose)
        if self._free:
            self._maintenance.execute(f"ALTER DATABASE {self._free.pop()} RENAME TO {name}")
        else:
            self._maintenance.execute(f"CREATE DATABASE {name} TEMPLATE {self.template}")
        yield self._postgres.dsn(name)
        if self._as_fresh(name):
            self._free.append(name)
        else:
            self._drop(name)

    def _drop(self, name: str) -> None:
        self._maintenance.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def _as_fresh(self, name: str) -> bool:
        """Whatever keeps it from being restored keeps it from being used again, and nothing else."""
        with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            return self._maintenance.run(self._restored(name))
        return False

    async def _restored(self, name: str) -> bool:
        db = await asyncpg.connect(self._postgres.dsn(name), timeout=10, command_timeout=10)
        try:
            await db.fetch(EVERYBODY_OUT, name)
            return await self.fresh.restore(db)
        finally:
            await db.close(timeout=10)


def fresh_name(purpose: str) -> str:
    """A name that no other database or virtual host has."""
    return f"relay_{purpose}_{secrets.token_hex(4)}"


async def _tables(db: asyncpg.Connection[Any]) -> dict[str, tuple[int, float]]:
    return {row["name"]: (row["bytes"], row["reltuples"]) for row in await db.fetch(TABLES)}


async def _looks(db: asyncpg.Connection[Any], catalogs: str) -> tuple[str, ...]:
    return tuple(row[0] for row in (*await db.fetch(catalogs), *await db.fetch(OBJECTS)))


async def _rows(db: asyncpg.Connection[Any], table: str, limit: str = "") -> bytes:
    found = BytesIO()
    await db.copy_from_query(f"SELECT * FROM {table} {limit}", output=found, format="binary")
    return found.getvalue()


async def _migrated(dsn: str) -> Fresh:
    connection = await asyncpg.connect(dsn)
    try:
        await migrate(connection)
        return await Fresh.of(connection)
    finally:
        await connection.close()
