"""Migrations: all or nothing, once, whoever runs them and however many at a time; and `missing` names what a database lacks."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import asyncpg
import pytest

from relay.errors import PostgresError, PrivilegeError, SchemaError
from relay.postgres import migrate as schema
from relay.postgres.connect import connection as session
from relay.postgres.migrate import Migration, migrate, migrations, missing, require_current
from relay.sandbox import Postgres, SandboxPostgres
from relay.settings import PostgresSettings
from tests.harness.logins import Logins
from tests.harness.outbox import connected, until

ALL = tuple(f"{m.version:04} {m.name}" for m in migrations())


async def test_an_empty_database_gets_everything(empty_database: str) -> None:
    async with connected(empty_database) as connection:
        assert (await migrate(connection)).applied == ALL
        assert await missing(connection) == []
        await require_current(connection)


async def test_a_second_run_changes_nothing(empty_database: str) -> None:
    async with connected(empty_database) as connection:
        await migrate(connection)
        before = await _fingerprint(connection)
        assert (await migrate(connection)).applied == ()
        assert await _fingerprint(connection) == before


async def test_five_at_once_apply_everything_exactly_once_and_none_fails(empty_database: str) -> None:
    async def one() -> tuple[str, ...]:
        async with connected(empty_database) as connection:
            return (await migrate(connection)).applied

    applied = await asyncio.gather(*(one() for _ in range(5)))
    assert sorted(applied) == [(), (), (), (), ALL]
    async with connected(empty_database) as connection:
        assert await missing(connection) == []


async def test_databases_of_one_cluster_migrated_at_once_do_not_quarrel_over_the_roles() -> None:
    with SandboxPostgres(fsync=False) as server:
        dsns = [server.create_database(f"database_{number}") for number in range(4)]

        async def one(dsn: str) -> str | None:
            async with connected(dsn) as connection:
                return (await migrate(connection)).roles_skipped

        assert await asyncio.gather(*map(one, dsns)) == [None] * 4


async def test_a_migration_may_take_longer_than_any_other_statement(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for a lock that is held until PostgreSQL says that the time-out of other statements is over."""
    impatient = PostgresSettings.model_validate({"dsn": empty_database, "command_timeout_s": 2})
    long = Migration(len(ALL) + 1, "long", "SELECT pg_advisory_xact_lock(1)")
    overdue = "SELECT count(*) = 1 FROM pg_stat_activity WHERE application_name = 'test long' AND wait_event = 'advisory' AND clock_timestamp() - query_start > interval '2 s'"
    async with connected(empty_database) as holder, session(impatient, application="test long") as opened:
        await migrate(holder)
        monkeypatch.setattr(schema, "migrations", lambda: [*migrations(), long])
        await holder.execute("SELECT pg_advisory_lock(1)")
        migrating = asyncio.create_task(migrate(opened))
        await until(lambda: holder.fetchval(overdue))
        assert not migrating.done()
        await holder.execute("SELECT pg_advisory_unlock(1)")
        assert (await migrating).applied == (f"{long.version:04} long",)


async def test_a_failing_migration_leaves_nothing_behind(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Migration(len(ALL) + 1, "broken", "CREATE TABLE relay.half (); SELECT no_such_function()")
    monkeypatch.setattr(schema, "migrations", lambda: [*migrations(), broken])
    async with connected(empty_database) as connection:
        with pytest.raises(PostgresError, match="no_such_function"):
            await migrate(connection)
        assert await connection.fetchval("SELECT to_regnamespace('relay')") is None


async def test_a_failing_migration_leaves_the_version_before_it(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Migration(len(ALL) + 1, "good", "CREATE TABLE relay.more ()")
    broken = Migration(len(ALL) + 2, "broken", "SELECT 1/0")
    monkeypatch.setattr(schema, "migrations", lambda: [*migrations(), good, broken])
    async with connected(database) as connection:
        with pytest.raises(PostgresError, match="division by zero"):
            await migrate(connection)
        assert await connection.fetchval("SELECT to_regclass('relay.more')") is None
        assert await connection.fetchval("SELECT max(version) FROM relay.migration") == len(ALL)


@pytest.mark.parametrize("act", [migrate, require_current])
async def test_a_database_newer_than_the_program_is_named_and_left_alone(database: str, act: object) -> None:
    assert callable(act)
    async with connected(database) as connection:
        await connection.execute("INSERT INTO relay.migration (version, name, checksum) VALUES (9999, 'future', 'x')")
        before = await _fingerprint(connection)
        with pytest.raises(SchemaError, match=r"migration 9999 future, which this program does not know"):
            await act(connection)
        assert await _fingerprint(connection) == before


@pytest.mark.parametrize("act", [migrate, require_current])
async def test_an_edited_migration_is_an_error_that_names_it(
    database: str, act: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(act)
    edited = [replace(m, sql=m.sql + "-- edited\n") if m.version == 1 else m for m in migrations()]
    monkeypatch.setattr(schema, "migrations", lambda: edited)
    async with connected(database) as connection:
        with pytest.raises(SchemaError, match="migration 0001 outbox was applied with another text"):
            await act(connection)


async def test_a_database_without_the_schema_says_what_to_run(empty_database: str) -> None:
    async with connected(empty_database) as connection:
        with pytest.raises(SchemaError, match="Run `relay migrate`"):
            await require_current(connection)


async def test_a_database_older_than_the_program_names_the_first_missing_migration(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = len(ALL) + 1
    monkeypatch.setattr(schema, "migrations", lambda: [*migrations(), Migration(number, "next", "SELECT 1")])
    async with connected(database) as connection:
        with pytest.raises(SchemaError, match=f"migration {number:04} next has not been applied"):
            await require_current(connection)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("DROP INDEX relay.outbox_by_xid", "index relay.outbox_by_xid on outbox (xid)"),
        ("DROP INDEX relay.outbox_parked_due", "index relay.outbox_parked_due on outbox_parked"),
        ("DROP TRIGGER outbox_assign ON relay.outbox", "trigger outbox_assign on relay.outbox"),
        ("ALTER TABLE relay.outbox DISABLE TRIGGER outbox_assign", "trigger outbox_assign on relay.outbox"),
        ("ALTER TABLE relay.outbox DROP COLUMN routing_key", "column relay.outbox.routing_key text"),
        (
            "ALTER TABLE relay.outbox_parked ALTER COLUMN reason DROP NOT NULL",
            "column relay.outbox_parked.reason text not null",
        ),
        (
            "ALTER TABLE relay.outbox ALTER COLUMN slot DROP DEFAULT",
            "column relay.outbox.slot smallint not null default",
        ),
        (
            "ALTER TABLE relay.outbox DROP CONSTRAINT outbox_is_valid",
            "constraint relay.outbox.outbox_is_valid",
        ),
        ("ALTER TABLE relay.outbox DETACH PARTITION relay.outbox_3", "table relay.outbox_3 partition of relay.outbox"),
        ("ALTER TABLE relay.outbox_2 SET UNLOGGED", "table relay.outbox_2 partition of relay.outbox"),
        ("DROP TABLE relay.inbox_seen", "table relay.inbox_seen"),
        ("DROP SEQUENCE relay.outbox_id_seq", "sequence relay.outbox_id_seq"),
        ("DROP FUNCTION relay.emit", "function relay.emit(aggregate_type text, aggregate_id text"),
        ("ALTER FUNCTION relay.outbox_assign() RESET search_path", "function relay.outbox_assign()"),
        ("ALTER FUNCTION relay.outbox_assign() SECURITY INVOKER", "function relay.outbox_assign()"),
        (
            "CREATE OR REPLACE FUNCTION relay.outbox_shards() RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT 2'",
            "function relay.outbox_shards()",
        ),
    ],
)
async def test_whatever_is_damaged_is_named(database: str, damage: str, named: str) -> None:
    async with connected(database) as connection:
        await connection.execute(damage)
        lines = await missing(connection)
        assert any(line.startswith(f"missing or different: {named}") for line in lines), lines


async def test_what_others_add_is_not_our_business(database: str) -> None:
    async with connected(database) as connection:
        await connection.execute(
            "CREATE INDEX theirs ON relay.outbox (event_type); CREATE VIEW relay.their_view AS SELECT 1 AS one"
        )
        assert await missing(connection) == []


async def test_what_is_there_is_named_alike_whatever_the_search_path(database: str) -> None:
    async with connected(database) as connection:
        await connection.execute("SET search_path = relay, public")
        assert await missing(connection) == []


class TestAnOwnerWithoutCreaterole:
    """The roles are the cluster's and need an administrator; everything else needs only the database's owner."""

    async def test_gets_everything_but_the_roles_and_is_told_so(self) -> None:
        with SandboxPostgres(fsync=False) as server, Logins(server) as logins:
            async with connected(logins.create_owner()) as owner:
                report = await migrate(owner)
                assert report.applied == ALL
                assert report.roles_skipped is not None
                assert "let an administrator run it" in report.roles_skipped
                await require_current(owner)
                assert await missing(owner) == [
                    f"missing: role relay_{name}"
                    for name in ("consumer", "daemon", "monitor", "operator", "producer", "taker")
                ]
                assert (await migrate(owner)).roles_skipped is not None

    async def test_grants_their_rights_where_the_roles_exist(self, postgres: Postgres, database: str) -> None:
        with Logins(postgres) as logins:  # `database`, by being there, has seen to the roles
            async with connected(logins.create_owner()) as owner:
                assert (await migrate(owner)).roles_skipped is None
                assert await missing(owner) == []
                assert await owner.fetchval(
                    "SELECT has_column_privilege('relay_producer', 'relay.outbox', 'payload', 'INSERT')"
                )
                assert await owner.fetchval("SELECT has_table_privilege('relay_daemon', 'relay.outbox', 'SELECT')")
                assert await owner.fetchval("SELECT relay.emit('order', '1', 'Created', '{}')") == 1

    async def test_a_stranger_may_not_create_the_schema_and_is_told_so(
        self, postgres: Postgres, empty_database: str
    ) -> None:
        with Logins(postgres) as logins:
            async with connected(logins.create(empty_database)) as stranger:
                with pytest.raises(PrivilegeError, match="permission denied"):
                    await migrate(stranger)


async def _fingerprint(connection: asyncpg.Connection[asyncpg.Record]) -> object:
    """Whatever a run could have changed: objects, their rights, and the rows by their versions."""
    return [
        await connection.fetch(
            "SELECT oid, relname, relacl::text FROM pg_class WHERE relnamespace = to_regnamespace('relay') ORDER BY oid"
        ),
        await connection.fetch(
            "SELECT oid, proname, proacl::text, prosrc FROM pg_proc WHERE pronamespace = to_regnamespace('relay') ORDER BY oid"
        ),
        await connection.fetch(
            "SELECT xmin::text, oid, conname FROM pg_constraint WHERE connamespace = to_regnamespace('relay') ORDER BY oid"
        ),
        await connection.fetch("SELECT xmin::text, * FROM relay.migration ORDER BY version"),
        await connection.fetch("SELECT xmin::text, shard FROM relay.outbox_cursor"),
    ]
