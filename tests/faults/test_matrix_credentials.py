"""Row 40 of the fault matrix: passwords that are rotated, certificates that are not good (any more), for both servers."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote, urlsplit

import asyncpg
import pytest

from relay.postgres.migrate import migrate
from relay.sandbox import Postgres, RabbitMQ, SandboxPostgres, SandboxRabbitMQ
from relay.sandbox.account import private_folder, remove_folder, unprivileged_user
from relay.sandbox.management import ALL_PERMISSIONS
from relay.sandbox.ports import LOOPBACK, free_ports
from tests.faults.certificates import OPENSSL, Certificates
from tests.faults.own_servers import own_broker, postgres_version
from tests.harness.audit import Audit, audit
from tests.harness.logins import Logins, role_of
from tests.harness.outbox import connected, insert
from tests.harness.program import Program, changed, environment, relay

__all__ = ["own_broker", "postgres_version"]

BAD = {
    "expired": "certificate has expired",
    "of a stranger": "certificate verify failed",
    "of another host": "IP address mismatch",
}
NEW_SESSIONS = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name LIKE 'relay %' AND datname = current_database()
"""
"""Whoever is connected stays so: what has changed is felt by new connections."""

needs_openssl = pytest.mark.skipif(OPENSSL is None, reason="needs the program openssl")


@needs_openssl
async def test_a_postgresql_whose_certificate_is_not_good_is_waited_for_and_told(
    tls_postgres: tuple[SandboxPostgres, Certificates], broker: str, tmp_path: Path
) -> None:
    server, certificates = tls_postgres
    plain = server.dsn("shop")
    dsn = f"{plain}?sslmode=verify-full&sslrootcert={certificates.authority}"
    async with connected(plain) as db:

        async def swap(kind: str) -> None:
            certificates.use(kind)
            certificates.give(unprivileged_user())
            await db.execute("SELECT pg_reload_conf()")
            await db.execute(NEW_SESSIONS)

        async with flowing(tmp_path, environment(dsn, broker), db, broker) as (program, flows):
            await flows()
            assert await db.fetchval(
                "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name LIKE 'relay %'"
            )
            await through_bad_ones(program, swap, flows, error="PostgresUnavailable", row="40, PostgreSQL")
    assert_keeps(program.log, urlsplit(plain).password)


@needs_openssl
async def test_a_broker_whose_certificate_is_not_good_is_waited_for_and_told(
    database: str, broker: str, tls_broker: tuple[int, Certificates], tmp_path: Path
) -> None:
    port, certificates = tls_broker
    url = (
        changed(broker, host=f"{LOOPBACK}:{port}").replace("amqp:", "amqps:")
        + f"?cafile={quote(str(certificates.authority))}"
    )
    async with connected(database) as db:

        async def swap(kind: str) -> None:
            certificates.use(kind)
            await db.execute(NEW_SESSIONS)

        async with flowing(tmp_path, environment(database, url), db, broker) as (program, flows):
            await through_bad_ones(program, swap, flows, error="BrokerUnavailable", row="40, RabbitMQ")
    assert_keeps(program.log, urlsplit(broker).password)


async def test_a_password_of_postgresql_that_was_changed_is_waited_for_and_told(
    database: str, broker: str, logins: Logins, tmp_path: Path
) -> None:
    dsn = logins.create(database, "relay_daemon")
    async with connected(database) as db:
        async with flowing(tmp_path, environment(dsn, broker), db, broker) as (program, flows):
            await flows()
            await db.execute(f"ALTER ROLE {role_of(dsn)} PASSWORD 'rotated-b81c'")
            await db.execute(NEW_SESSIONS)
            await program.says("PostgresRefused", "password authentication failed", times=2)
            await db.execute(f"ALTER ROLE {role_of(dsn)} PASSWORD 'secret'")
            await recovered(flows, "40, password of PostgreSQL")
    assert_keeps(program.log, "rotated-b81c")
    assert "secret" not in program.log


async def test_a_password_of_the_broker_that_was_changed_is_waited_for_and_told(
    database: str, broker: str, rabbitmq: RabbitMQ, tmp_path: Path
) -> None:
    user, old, new = f"test-{secrets.token_hex(4)}", "before-5d0a", "after-77e2"
    vhost = urlsplit(broker).path[1:]

    async def password(value: str) -> None:
        await asyncio.to_thread(
            rabbitmq.management().request, "PUT", f"/api/users/{user}", {"password": value, "tags": ""}
        )

    await password(old)
    try:
        await asyncio.to_thread(
            rabbitmq.management().request, "PUT", f"/api/permissions/{quote(vhost, safe='')}/{user}", ALL_PERMISSIONS
        )
        url = changed(broker, user=user, password=old)
        async with connected(database) as db:
            async with flowing(tmp_path, environment(database, url), db, broker) as (program, flows):
                await flows()
                await password(new)
                await db.execute(NEW_SESSIONS)
                await program.says("BrokerRefused", "ACCESS_REFUSED", times=2)
                await password(old)
                await recovered(flows, "40, password of RabbitMQ")
        assert_keeps(program.log, old, new)
    finally:
        await asyncio.to_thread(rabbitmq.management().request, "DELETE", f"/api/users/{user}")


# --- what they share

Flows = Callable[[], Awaitable[None]]


@asynccontextmanager
async def flowing(
    folder: Path, environ: dict[str, str], db: object, broker: str
) -> AsyncIterator[tuple[Program, Flows]]:
    """A relay, and a function that commits an event and waits until it has arrived. In the end it stops as it should."""
    count = 0
    async with audit(broker) as witness, relay(folder, environ, "run") as program:

        async def flows() -> None:
            nonlocal count
            count += 1
            await insert(db, "order/1")
            await witness.wait_for_distinct(count)

        yield program, flows
        code, log = await program.stop()
        assert code == 0, log
        assert_in_order(witness, count)


def assert_in_order(witness: Audit, count: int) -> None:
    assert witness.sequences() == {"order/1": list(range(1, count + 1))}


async def through_bad_ones(
    program: Program, swap: Callable[[str], Awaitable[None]], flows: Flows, *, error: str, row: str
) -> None:
    """Each kind of bad certificate is told in its own words, again and again; with a good one everything goes on."""
    await flows()
    for kind, told in BAD.items():
        before = program.log.count(told)
        await swap(kind)
        await program.says(f'"error": "{error}"', told, times=before + 2)
        await swap("good")
        await recovered(flows, f"{row}, certificate {kind}")


async def recovered(flows: Flows, row: str) -> None:
    healed = time.monotonic()
    await flows()
    print(f"row {row}: the next event arrived {time.monotonic() - healed:.2f} s later")


def assert_keeps(log: str, *values: str | None) -> None:
    """None of the secrets is in the log."""
    for secret in values:
        assert secret
        assert secret not in log


@pytest.fixture
def logins(postgres: Postgres) -> Iterator[Logins]:
    with Logins(postgres) as made:
        yield made


@pytest.fixture
def tls_postgres(postgres_version: str | None) -> Iterator[tuple[SandboxPostgres, Certificates]]:
    """A server with TLS, and relay's schema in its database `shop`."""
    folder = private_folder("relay-certificates-", user=unprivileged_user())
    try:
        certificates = Certificates.make(folder)
        certificates.give(unprivileged_user())
        settings = {"ssl": "on", "ssl_cert_file": str(certificates.certificate), "ssl_key_file": str(certificates.key)}
        with SandboxPostgres(postgres_version, fsync=False, settings=settings) as server:
            asyncio.run(migrated(server.create_database("shop")))
            yield server, certificates
    finally:
        remove_folder(folder)


@pytest.fixture
def tls_broker(own_broker: SandboxRabbitMQ, tmp_path: Path) -> tuple[int, Certificates]:
    """The session's broker, with one more listener, for TLS."""
    (tmp_path / "tls").mkdir()
    certificates = Certificates.make(tmp_path / "tls")
    (port,) = free_ports(1)
    options = f'[{{certfile, "{certificates.certificate}"}}, {{keyfile, "{certificates.key}"}}]'
    own_broker.ctl(
        "eval",
        "ok = application:set_env(ssl, bypass_pem_cache, true),"  # Erlang would look at the files again after two minutes
        f" ok = application:set_env(rabbit, ssl_options, {options}), Options = rabbit_networking:ensure_ssl(),"
        f' rabbit_networking:start_ssl_listener({{"{LOOPBACK}", {port}}}, Options, 10).',
    )
    return port, certificates


async def migrated(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await migrate(connection)
    finally:
        await connection.close()
