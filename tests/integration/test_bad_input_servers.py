"""Wrong addresses, logins, schemas and rights: one clear line, the promised exit code, no secret; and what heals is waited for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from relay.postgres.migrate import migrations
from relay.sandbox import Postgres, RabbitMQ
from tests.harness.audit import audit
from tests.harness.logins import Logins
from tests.harness.outbox import connected, insert, until
from tests.harness.program import changed, ended, environment, relay

CANARY = "canary-6b1f"
NOWHERE = "127.0.0.1:1"
APP = "app:inbox"
APPLICATION = """
from relay.inbox import Inbox

inbox = Inbox("shop")


@inbox.on("Changed")
async def record(event, tx):
    await tx.execute("INSERT INTO effect (aggregate, seq) VALUES ($1, $2)", event.aggregate_id, event.seq)


@inbox.on("Poison")
async def fail(event, tx):
    await tx.execute("SELECT $1::text::integer", event.body.decode())


@inbox.on("Quoted")
async def quote(event, tx):
    raise ValueError(f"cannot {event.json()}")
"""
EFFECT = "CREATE TABLE effect (id bigint GENERATED ALWAYS AS IDENTITY, aggregate text, seq bigint)"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a module app.py that holds the inbox."""
    (tmp_path / "app.py").write_text(APPLICATION)
    return tmp_path


def commands() -> list[tuple[str, ...]]:
    return [("run",), ("inbox", "run", APP), ("migrate",), ("check",)]


def one_line(log: str) -> str:
    (line,) = log.splitlines()
    return line


# --- PostgreSQL's address and login


@pytest.mark.parametrize("command", commands(), ids=" ".join)
@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"password": CANARY}, "password authentication failed for user"),
        ({"user": "nobody", "password": CANARY}, 'password authentication failed for user "nobody"'),
        ({"path": "/nothing_here"}, 'database "nothing_here" does not exist'),
    ],
    ids=["password", "user", "database"],
)
async def test_a_refused_login_ends_every_command_with_4(
    database: str, broker: str, folder: Path, command: tuple[str, ...], parts: dict[str, str], told: str
) -> None:
    code, log = await ended(folder, environment(changed(database, **parts), broker), *command)
    assert code == 4, log
    assert one_line(log).startswith("relay: PostgreSQL refused the login: ")
    assert told in log
    assert "Check postgres.dsn." in log
    assert CANARY not in log


@pytest.mark.parametrize(
    ("host", "told", "told_by_uvloop"),
    [
        (NOWHERE, "Connect call failed", "Connection refused"),
        ("no-such-host.invalid:5432", "Name or service not known", "Name or service not known"),
    ],
    ids=["port", "host"],
)
async def test_an_unreachable_server_ends_a_command_with_5_and_is_waited_for_by_the_daemons(
    database: str, broker: str, folder: Path, host: str, told: str, told_by_uvloop: str
) -> None:
    environ = environment(changed(database, host=host, password=CANARY), broker)
    for command in ("migrate", "check"):
        code, log = await ended(folder, environ, command)
        assert (code, one_line(log).startswith("relay: PostgreSQL cannot be reached: ")) == (
            5,
            True,
        )
        assert told in log
    for daemon in (("run",), ("inbox", "run", APP)):
        async with relay(folder, environ, *daemon) as program:
            await program.says(
                '"error": "PostgresUnavailable"', "PostgreSQL cannot be reached", told_by_uvloop, times=2
            )
            code, log = await program.stop()
        assert code == 0
        assert CANARY not in log


@pytest.mark.parametrize("command", commands(), ids=" ".join)
async def test_a_dsn_that_the_driver_does_not_take_ends_every_command_with_2(
    database: str, broker: str, folder: Path, command: tuple[str, ...]
) -> None:
    code, log = await ended(folder, environment(f"{database}?sslmode=bogus", broker), *command)
    assert (code, one_line(log).startswith("relay: postgres.dsn cannot be used: `sslmode`")) == (2, True)


# --- the broker's address and login


@pytest.mark.parametrize("daemon", [("run",), ("inbox", "run", APP)], ids=" ".join)
@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"password": CANARY}, ("BrokerRefused", "ACCESS_REFUSED")),
        ({"user": "nobody", "password": CANARY}, ("BrokerRefused", "ACCESS_REFUSED")),
        ({"path": "/no%2Fhost"}, ("BrokerRefused", "/no%2Fhost: ", "the virtual host does not exist")),
        ({"host": NOWHERE, "password": CANARY}, ("BrokerUnavailable", "Connection refused")),
        ({"host": "no-such-host.invalid", "password": CANARY}, ("BrokerUnavailable", "Name or service not known")),
    ],
    ids=["password", "user", "vhost", "port", "host"],
)
async def test_a_broker_that_refuses_or_is_not_there_is_told_and_waited_for(
    database: str, broker: str, folder: Path, daemon: tuple[str, ...], parts: dict[str, str], told: tuple[str, ...]
) -> None:
    """The daemons wait: the events are safe in the database, and a broker may come up after them."""
    url = changed(broker, **parts)
    async with relay(folder, environment(database, url), *daemon) as program:
        await program.says('"session_failed"', *told, times=2)
        code, log = await program.stop()
    assert code == 0
    assert CANARY not in log
    assert (urlsplit(broker).password or "-") not in log


# --- schema


@pytest.mark.parametrize("command", [("run",), ("inbox", "run", APP), ("check",)], ids=" ".join)
async def test_a_missing_schema_ends_with_3(
    empty_database: str, broker: str, folder: Path, command: tuple[str, ...]
) -> None:
    code, log = await ended(folder, environment(empty_database, broker), *command)
    assert code == 3, log
    assert "Run `relay migrate`" in one_line(log)


@pytest.mark.parametrize("command", [("run",), ("inbox", "run", APP), ("check",)], ids=" ".join)
async def test_an_older_schema_ends_with_3_and_names_the_migration(
    database: str, broker: str, folder: Path, command: tuple[str, ...]
) -> None:
    last = migrations()[-1]
    async with connected(database) as connection:
        await connection.execute("DELETE FROM relay.migration WHERE version = $1", last.version)
    code, log = await ended(folder, environment(database, broker), *command)
    assert code == 3, log
    assert f"migration {last.version:04} {last.name} has not been applied to this database. Run `relay migrate`" in log


@pytest.mark.parametrize("command", commands(), ids=" ".join)
async def test_a_newer_schema_ends_with_3_and_names_the_migration(
    database: str, broker: str, folder: Path, command: tuple[str, ...]
) -> None:
    async with connected(database) as connection:
        await connection.execute("INSERT INTO relay.migration (version, name, checksum) VALUES (9999, 'future', 'x')")
    code, log = await ended(folder, environment(database, broker), *command)
    assert code == 3, log
    assert "migration 9999 future, which this program does not know: it is newer. Upgrade relay." in one_line(log)


# --- rights


@pytest.fixture
def logins(postgres: Postgres) -> Iterator[Logins]:
    with Logins(postgres) as made:
        yield made


@pytest.mark.parametrize(
    ("revoked", "named"),
    [
        ("USAGE ON SCHEMA relay", "schema relay"),
        ("SELECT ON relay.migration", "table migration"),
        ("SELECT ON relay.outbox", "table outbox"),
        ("UPDATE ON relay.outbox_cursor", "table outbox_cursor"),
        ("INSERT ON relay.outbox_parked", "table outbox_parked"),
        ("DELETE ON relay.outbox_parked", "table outbox_parked"),
    ],
)
async def test_a_right_that_the_outbox_daemon_lacks_at_its_start_ends_it_with_4(
    database: str, broker: str, folder: Path, logins: Logins, revoked: str, named: str
) -> None:
    async with connected(database) as connection:
        await connection.execute(f"REVOKE {revoked} FROM relay_daemon")
    code, log = await ended(folder, environment(logins.create(database, "relay_daemon"), broker), "run")
    assert code == 4, log
    assert f"relay: permission denied for {named}. Grant the role" in one_line(log)


@pytest.mark.parametrize(
    ("revoked", "named"),
    [
        ("UPDATE ON relay.inbox_aggregate", "table inbox_aggregate"),
        ("INSERT ON relay.inbox_held", "table inbox_held"),
        ("DELETE ON relay.inbox_seen", "table inbox_seen"),
        ("INSERT ON relay.inbox_quarantine", "table inbox_quarantine"),
    ],
)
async def test_a_right_that_the_inbox_lacks_at_its_start_ends_it_with_4(
    database: str, broker: str, folder: Path, logins: Logins, revoked: str, named: str
) -> None:
    async with connected(database) as connection:
        await connection.execute(f"REVOKE {revoked} FROM relay_consumer")
    code, log = await ended(folder, environment(logins.create(database, "relay_consumer"), broker), "inbox", "run", APP)
    assert code == 4, log
    assert f"permission denied for {named}" in one_line(log)


@pytest.mark.parametrize("command", [("run",), ("inbox", "run", APP), ("migrate",)], ids=" ".join)
async def test_a_login_without_any_right_ends_with_4(
    database: str, broker: str, folder: Path, logins: Logins, command: tuple[str, ...]
) -> None:
    code, log = await ended(folder, environment(logins.create(database), broker), *command)
    assert code == 4, log
    assert "relay: permission denied for " in one_line(log)


async def test_a_right_that_is_revoked_while_it_runs_is_waited_for_and_nothing_is_lost(
    database: str, broker: str, folder: Path, logins: Logins
) -> None:
    dsn = logins.create(database, "relay_daemon")
    async with audit(broker) as witness, connected(database) as connection:
        async with relay(folder, environment(dsn, broker), "run") as program:
            await insert(connection, "order/1", count=3)
            await witness.wait_for_distinct(3)
            await connection.execute("REVOKE UPDATE ON relay.outbox_cursor FROM relay_daemon")
            await insert(connection, "order/1", count=3)
            await program.says('"error": "PrivilegeError"', "permission denied for table outbox_cursor", times=2)
            await insert(connection, "order/2", count=3)
            await connection.execute("GRANT UPDATE ON relay.outbox_cursor TO relay_daemon")
            await witness.wait_for_distinct(9)
            code, log = await program.stop()
        assert code == 0, log
        assert witness.sequences() == {"order/1": [1, 2, 3, 4, 5, 6], "order/2": [1, 2, 3]}
        assert "secret" not in log


async def test_a_right_that_the_inbox_loses_while_it_runs_is_waited_for_and_nothing_is_lost(
    database: str, broker: str, folder: Path, logins: Logins
) -> None:
    async with connected(database) as connection:
        await connection.execute(EFFECT + "; GRANT INSERT ON effect TO relay_consumer")
        consumer = logins.create(database, "relay_consumer")
        async with (
            relay(folder, environment(consumer, broker), "inbox", "run", APP) as inbox,
            relay(folder, environment(database, broker), "run"),
        ):
            await inbox.says("inbox_started")
            await insert(connection, "order/1", count=3)
            await until(lambda: connection.fetchval("SELECT count(*) = 3 FROM effect"))
            await connection.execute("REVOKE UPDATE ON relay.inbox_aggregate FROM relay_consumer")
            await insert(connection, "order/1", count=3)
            await inbox.says('"error": "PrivilegeError"', "permission denied for table inbox_aggregate", times=2)
            await connection.execute("GRANT UPDATE ON relay.inbox_aggregate TO relay_consumer")
            await until(lambda: connection.fetchval("SELECT count(*) = 6 FROM effect"))
            assert (await inbox.stop())[0] == 0
        found = [r["seq"] for r in await connection.fetch("SELECT seq FROM effect ORDER BY id")]
        assert found == [1, 2, 3, 4, 5, 6]


def set_permissions(rabbitmq: RabbitMQ, broker: str, *, write: str) -> None:
    """What the broker's user may do in the test's virtual host."""
    vhost, user = urlsplit(broker).path[1:], urlsplit(broker).username or ""
    rights: dict[str, object] = {"configure": ".*", "write": write, "read": ".*"}
    rabbitmq.management().request("PUT", f"/api/permissions/{vhost}/{quote(user, safe='')}", rights)


async def test_permissions_that_the_broker_takes_away_are_waited_for_and_nothing_is_lost_or_parked(
    database: str, broker: str, rabbitmq: RabbitMQ, folder: Path
) -> None:
    """The exchange has `topic` in its name, and so in the broker's refusal: no message is to blame for that."""
    environ = environment(database, broker, rabbitmq_exchange="shop.topic", outbox_retry_first_s="0.05")
    async with connected(database) as connection:
        await connection.execute(EFFECT)
        async with relay(folder, environ, "inbox", "run", APP) as inbox, relay(folder, environ, "run") as outbox:
            await inbox.says("inbox_started")
            await insert(connection, "order/1", count=3)
            await until(lambda: connection.fetchval("SELECT count(*) = 3 FROM effect"))
            await asyncio.to_thread(set_permissions, rabbitmq, broker, write="^$")
            # RabbitMQ remembers for a channel what it was allowed to do: new sessions are needed to feel it.
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name LIKE 'relay %' AND datname = current_database()"
            )
            await insert(connection, "order/1", count=3)
            await outbox.says("ACCESS_REFUSED - access to exchange 'shop.topic'", times=3)
            await inbox.says('"error": "BrokerRefused"', "ACCESS_REFUSED", times=2)
            assert await connection.fetchval("SELECT count(*) FROM effect") == 3
            await asyncio.to_thread(set_permissions, rabbitmq, broker, write=".*")
            await until(lambda: connection.fetchval("SELECT count(*) = 6 FROM effect"))
            assert (await outbox.stop())[0] == (await inbox.stop())[0] == 0
        assert '"event": "parked"' not in outbox.log
        found = [r["seq"] for r in await connection.fetch("SELECT seq FROM effect ORDER BY id")]
        assert found == [1, 2, 3, 4, 5, 6]


# --- what the logs never hold


@pytest.mark.parametrize("log_format", ["json", "text"])
async def test_no_payload_and_no_secret_is_logged_whatever_fails(
    database: str, broker: str, rabbitmq: RabbitMQ, folder: Path, logins: Logins, log_format: str
) -> None:
    more = {"daemon_log_level": "debug", "daemon_log_format": log_format, "inbox_max_attempts": "2"}
    environ = environment(database, broker, **more)
    async with connected(database) as connection:
        await connection.execute(EFFECT)
        async with relay(folder, environ, "inbox", "run", APP) as inbox, relay(folder, environ, "run") as outbox:
            await inbox.says("inbox_started")
            canary = json.dumps({"canary": CANARY})
            await insert(connection, "order/\x1b[2J\n1", event_type="Poison", payload=canary)
            await insert(connection, "order/2", event_type="Quoted", payload=canary)
            await insert(connection, "order/3", payload=canary)
            await connection.execute(
                "INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload, routing_key) VALUES ('order', '4', 'X', $1, $2)",
                canary,
                "no\x1b[31mwhere\n",
            )
            await inbox.says("handler_failed", "stuck", times=2)
            await until(lambda: connection.fetchval("SELECT count(*) = 1 FROM effect"))
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'relay %' AND datname = current_database()"
            )
            vhost = urlsplit(broker).path[1:]
            await asyncio.to_thread(rabbitmq.management().delete_vhost, vhost)
            await outbox.says("session_failed", times=2)
            await inbox.says("session_failed", times=2)
            codes = (await outbox.stop())[0], (await inbox.stop())[0]
            assert codes == (0, 0)
        errors = [r["error"] for r in await connection.fetch("SELECT error FROM relay.inbox_held")]
        assert all(CANARY in error for error in errors)  # it would have been there to be logged
        assert len(errors) == 2
    log = outbox.log + inbox.log
    for secret in (CANARY, urlsplit(database).password, urlsplit(broker).password):
        assert secret
        assert secret not in log
    assert not [c for c in log if not c.isprintable() and c != "\n"]
    if log_format == "json":
        lines = [json.loads(line) for line in log.splitlines() if line[0] == "{"]
        assert {"handler_failed", "session_failed", "owner"} <= {line["event"] for line in lines}
        assert {line["error"] for line in lines if line["event"] == "handler_failed"} == {
            "InvalidTextRepresentationError",
            "ValueError",
        }
        assert "order/\x1b[2J\n1" in {line.get("aggregate") for line in lines if line["event"] == "handler_failed"}
    else:
        assert r"order/\x1b[2J\n1" in log
