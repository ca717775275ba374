"""Applies the numbered migrations, and says what a database lacks."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import asyncpg

from relay.errors import PostgresUnavailable, SchemaError
from relay.postgres.connect import Connection
from relay.postgres.errors import postgres_errors
from relay.postgres.queries import query, sql_root

LOCK_KEY = 727001
"""Advisory lock of migrations. 727002 is the wake-up barrier, 727003 the ownership of a shard."""

_TIMEOUT_S = 24 * 3600.0
"""For a migration's statements: an index over a large log takes longer than any answer that a daemon would wait for."""

_FILE = re.compile(r"^(\d{4})_(\w+)\.sql$")


@dataclass(frozen=True, slots=True)
class Migration:
    """One file of sql/migrations."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the text: an applied migration must never be edited."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Report:
    """What `migrate` did."""

    applied: tuple[str, ...]
    roles_skipped: str | None  # why the roles could not be created, None if they are there


def migrations() -> list[Migration]:
    """The migrations that this program brings, in order, without a hole."""
    found = []
    for file in (sql_root() / "migrations").iterdir():
        if match := _FILE.match(file.name):
            found.append(Migration(int(match[1]), match[2], file.read_text(encoding="utf-8")))
    found.sort(key=lambda migration: migration.version)
    if [m.version for m in found] != list(range(1, len(found) + 1)):
        raise ValueError(f"sql/migrations is not numbered 1, 2, 3 ...: {[m.version for m in found]}")
    return found


def printed() -> str:
    """All of it as one SQL script for psql: what `migrate` would do to an empty database."""
    parts = [
        "-- relay's schema, as one script. Apply with: psql --single-transaction -v ON_ERROR_STOP=1 -f FILE",
        query("create_migration_table") + ";",
    ]
    for m in migrations():
        parts += [f"-- migration {m.version}: {m.name}", m.sql.strip()]
        record = (
            query("record_migration")
            .replace("$1", str(m.version))
            .replace("$2", f"'{m.name}'")
            .replace("$3", f"'{m.checksum}'")
        )
        parts.append(record + ";")
    return "\n\n".join([*parts, roles_sql().strip()]) + "\n"


def roles_sql() -> str:
    """The script that creates the roles and grants them their rights."""
    return (sql_root() / "roles.sql").read_text(encoding="utf-8")


async def migrate(connection: Connection) -> Report:
    """Bring the schema up to date, in one transaction under an advisory lock. Safe to run twice and at once.

    Raises SchemaError if the database is newer than this program or an applied migration was edited, PrivilegeError if
    the role may not create the schema.
    """
    with postgres_errors():
        async with connection.transaction():
            await connection.execute(query("lock_migrations"), LOCK_KEY)
            await connection.execute(query("create_migration_table"))
            done = await _applied(connection)
            todo = [m for m in migrations() if m.version not in done]
            _refuse_unknown(done)
            for m in todo:
                await _apply(connection, m)
                await connection.execute(query("record_migration"), m.version, m.name, m.checksum)
            skipped = await _roles(connection)
    return Report(tuple(f"{m.version:04} {m.name}" for m in todo), skipped)


async def require_current(connection: Connection) -> None:
    """Raise SchemaError, naming the version, unless the schema is exactly this program's."""
    with postgres_errors():
        if not await connection.fetchval(query("has_migration_table")):
            raise SchemaError("relay's schema is not in this database. Run `relay migrate`.")
        done = await _applied(connection)
    _refuse_unknown(done)
    for m in migrations():
        if m.version not in done:
            raise SchemaError(
                f"migration {m.version:04} {m.name} has not been applied to this database. Run `relay migrate`."
            )


async def missing(connection: Connection) -> list[str]:
    """What the database lacks or has differently, by name; empty when all is as this program needs it."""
    with postgres_errors():
        present = set(await manifest(connection))
        roles = [r["rolname"] for r in await connection.fetch(query("missing_roles"))]
    expected = expected_manifest()
    lacking = [f"missing or different: {line}" for line in expected if line not in present]
    return lacking + [f"missing: role {name}" for name in roles]


async def manifest(connection: Connection) -> list[str]:
    """One line for each object of the schema, with its definition: what `relay check` compares."""
    return [r["line"] for r in await connection.fetch(query("schema_manifest"))]


def expected_manifest() -> list[str]:
    """The manifest of a database migrated by this program (sql/manifest.txt; a test keeps it true)."""
    return (sql_root() / "manifest.txt").read_text(encoding="utf-8").splitlines()


async def _apply(connection: Connection, migration: Migration) -> None:
    try:
        await connection.execute(migration.sql, timeout=_TIMEOUT_S)
    except asyncpg.LockNotAvailableError as exc:
        raise PostgresUnavailable(
            f"migration {migration.version:04} {migration.name} waited for a transaction that uses relay's tables until its lock"
            " timeout, as producers did for it meanwhile; nothing was changed. Let those that are open end (state and xact_start in"
            " pg_stat_activity), then run `relay migrate` again, at a quiet moment.",
            sqlstate=exc.sqlstate,
        ) from exc


async def _applied(connection: Connection) -> dict[int, tuple[str, str]]:
    return {r["version"]: (r["name"], r["checksum"]) for r in await connection.fetch(query("applied_migrations"))}


def _refuse_unknown(done: dict[int, tuple[str, str]]) -> None:
    ours = {m.version: m for m in migrations()}
    for version, (name, checksum) in sorted(done.items()):
        if version not in ours:
            raise SchemaError(
                f"the database has migration {version:04} {name}, which this program does not know: it is newer. Upgrade relay."
            )
        if ours[version].checksum != checksum:
            raise SchemaError(
                f"migration {version:04} {name} was applied with another text than this program brings: the database was migrated by"
                " another version of relay. Install that version, or one that is newer; a database that is only for trying may be made anew."
            )


async def _roles(connection: Connection) -> str | None:
    """The roles are cluster-wide and need CREATEROLE: where that is missing, everything else still works."""
    try:
        async with connection.transaction():
            await connection.execute(roles_sql())
    except asyncpg.InsufficientPrivilegeError as exc:
        return f"{exc} (sql/roles.sql needs CREATEROLE: let an administrator run it)"
    return None
