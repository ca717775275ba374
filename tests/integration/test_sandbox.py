"""What the sandbox promises: real servers of our own, loopback only, that keep their data and never outlive us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import aiormq
import asyncpg
import psutil
import psycopg
import pytest
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

from relay.errors import SandboxError
from relay.sandbox import ExternalPostgres, ExternalRabbitMQ, Postgres, SandboxPostgres, SandboxRabbitMQ
from relay.sandbox.postgres_binaries import find_postgres_binaries

KINDS = ("system", "embedded")
HUNG = 4711
HANGING = f"SELECT pg_advisory_lock({HUNG})"
LOOPBACK = {"127.0.0.1", "::1"}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    kind = str(request.param)
    try:
        find_postgres_binaries(kind)
    except SandboxError as error:
        pytest.skip(str(error))
    return kind


@pytest.fixture
def server(kind: str) -> Iterator[SandboxPostgres]:
    with SandboxPostgres(kind) as server:
        yield server


@pytest.fixture(scope="module")
def own_broker() -> Iterator[SandboxRabbitMQ]:
    """Not the run's broker, which others are connected to: this one is killed."""
    with SandboxRabbitMQ() as broker:
        yield broker


async def test_postgres_starts_and_leaves_nothing(kind: str) -> None:
    server = SandboxPostgres(kind)
    server.start()
    pid, home = server.pid, server.log.parent
    assert str(await _fetchval(server.dsn(), "SHOW server_version")).split()[0] == server.version
    assert await _fetchval(server.dsn(), "SHOW server_encoding") == "UTF8"
    assert await _fetchval(server.dsn(), "SHOW fsync") == "on"
    server.stop()
    server.stop()
    assert not psutil.pid_exists(pid)
    assert not home.exists()


async def test_postgres_wants_its_password(server: SandboxPostgres) -> None:
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(server.dsn().replace("postgres:", "postgres:not-", 1))


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_postgres_keeps_its_data_over_a_restart(server: SandboxPostgres, mode: str) -> None:
    server.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    port = server.port
    server.restart("fast" if mode == "fast" else "immediate")
    assert server.port == port
    assert await _fetchval(server.dsn(), "SELECT answer FROM kept") == 42


async def test_postgres_keeps_committed_data_over_kill9(server: SandboxPostgres) -> None:
    server.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    family = _family(server.pid)
    server.kill9()
    assert [process for process in family if process.is_running()] == []
    with pytest.raises(SandboxError, match="not running"):
        server.kill9()
    server.start_again()
    assert await _fetchval(server.dsn(), "SELECT answer FROM kept") == 42


async def test_postgres_clones_and_drops_databases(server: SandboxPostgres) -> None:
    server.create_database("original")
    server.execute("CREATE TABLE kept AS SELECT 42 AS answer", "original")
    dsn = server.create_database("copy", template="original")
    connection = await asyncpg.connect(dsn)
    assert await connection.fetchval("SELECT answer FROM kept") == 42
    server.drop_database("copy")  # thrown out, not waited for
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await connection.fetchval("SELECT 1")
    await connection.close()
    server.drop_database("copy")


def test_postgres_survives_the_thread_that_started_it() -> None:
    server = SandboxPostgres()
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    try:
        server.execute("SELECT 1")
    finally:
        server.stop()


def test_ctrl_c_does_not_wait_for_a_statement_that_hangs(postgres: Postgres) -> None:
    ended = f"SELECT pg_terminate_backend(pid) FROM pg_locks WHERE objid = {HUNG} AND NOT granted"
    with psycopg.connect(postgres.dsn(), autocommit=True) as other:
        other.execute(HANGING)

        def interrupt() -> None:
            with psycopg.connect(postgres.dsn(), autocommit=True) as looking:
                while not looking.execute(f"SELECT FROM pg_locks WHERE objid = {HUNG} AND NOT granted").fetchall():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGINT)
                interrupted.wait(5)
                looking.execute(ended)  # or this test would hang if it fails

        interrupted = threading.Event()
        beside = threading.Thread(target=interrupt)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        beside.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                postgres.execute(HANGING)
            was_hanging = other.execute(ended).fetchall()
        finally:
            interrupted.set()
            beside.join()
            signal.signal(signal.SIGINT, before)
    assert was_hanging == [(True,)]


def test_postgres_that_cannot_start_says_what_its_log_says() -> None:
    with pytest.raises(SandboxError, match="no_such_setting"):
        SandboxPostgres(settings={"no_such_setting": "1"}).start()


def test_postgres_listens_on_loopback_only(server: SandboxPostgres) -> None:
    assert _addresses_listened_on(server.pid) <= LOOPBACK


def test_rabbitmq_listens_on_loopback_only(own_broker: SandboxRabbitMQ) -> None:
    keeper = psutil.Process(own_broker.pid).parent()
    assert keeper is not None
    assert any("epmd" in process.name() for process in keeper.children(recursive=True))
    assert _addresses_listened_on(keeper.pid) <= LOOPBACK


async def test_rabbitmq_keeps_durable_messages_over_restart_and_kill9(own_broker: SandboxRabbitMQ) -> None:
    url = own_broker.create_vhost("kept")
    await _publish(url, "queue", b"first")
    own_broker.restart()
    await _publish(url, "queue", b"second")
    family = _family(own_broker.pid)
    own_broker.kill9()
    assert [process for process in family if process.is_running()] == []
    own_broker.start_again()
    assert await _take(url, "queue") == b"first"
    assert await _take(url, "queue") == b"second"
    own_broker.delete_vhost("kept")
    own_broker.delete_vhost("kept")


async def test_rabbitmq_is_commanded_through_rabbitmqctl(own_broker: SandboxRabbitMQ) -> None:
    url = own_broker.create_vhost("commanded")
    await _publish(url, "queue", b"unwanted")
    own_broker.purge_queue("queue", "commanded")
    assert await _take(url, "queue") is None
    assert "guest" not in own_broker.ctl("list_users")
    with pytest.raises(SandboxError, match="no_such_command"):
        own_broker.ctl("no_such_command")


async def test_rabbitmq_closes_connections(own_broker: SandboxRabbitMQ) -> None:
    connection = await aiormq.connect(own_broker.url())
    own_broker.close_all_connections("because")
    with pytest.raises(aiormq.exceptions.ConnectionClosed, match="because"):
        await connection.closing


def test_a_server_of_somebody_else_is_never_stopped() -> None:
    postgres = ExternalPostgres("postgresql://me:secret@db.example:5433/any?sslmode=require")
    assert postgres.dsn("other") == "postgresql://me:secret@db.example:5433/other?sslmode=require"
    rabbitmq = ExternalRabbitMQ("amqp://me:secret@mq.example:5672/")
    assert rabbitmq.url("a/b") == "amqp://me:secret@mq.example:5672/a%2Fb"
    for server in (postgres, rabbitmq):
        server.start().stop()
        for forbidden in (server.restart, server.kill9, server.start_again):
            with pytest.raises(SandboxError, match="not ours"):
                forbidden()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_servers_do_not_outlive_their_parent(number: signal.Signals) -> None:
    with tempfile.TemporaryDirectory(prefix="relay-orphans-") as folder:
        Path(folder).chmod(0o711)  # the server's user must be able to pass
        private = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_TEST_")}
        environment = {**private, "TMPDIR": folder}
        command = [sys.executable, "-m", "relay.sandbox", "up"]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            assert [parent.stdout.readline().split()[0] for _ in range(2)] == ["PostgreSQL", "RabbitMQ"]
            family = [process for process in _family(parent.pid) if process.pid != parent.pid]
            names = {process.name() for process in family}
            assert {"postgres", "beam.smp", "epmd"} <= names
            parent.send_signal(number)
        _wait_until_gone(family, Path(folder))


@retry(retry=retry_if_exception_type(AssertionError), wait=wait_fixed(0.05), stop=stop_after_delay(20), reraise=True)
def _wait_until_gone(family: list[psutil.Process], folder: Path) -> None:
    assert [process for process in family if process.is_running()] == []
    assert list(folder.iterdir()) == []


def _family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def _addresses_listened_on(pid: int) -> set[str]:
    listening = {address for process in _family(pid) for address in _listening(process)}
    assert listening
    return listening


def _listening(process: psutil.Process) -> list[str]:
    """Nothing for a process that has ended meanwhile, as PostgreSQL's workers do: what has ended does not listen."""
    try:
        connections = process.net_connections("inet")
    except psutil.NoSuchProcess:
        return []
    return [connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN]


async def _fetchval(dsn: str, query: str) -> object:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def _publish(url: str, queue: str, body: bytes) -> None:
    connection = await aiormq.connect(url)
    channel = await connection.channel()
    await channel.queue_declare(queue, durable=True)
    properties = aiormq.spec.Basic.Properties(delivery_mode=2)
    await channel.basic_publish(body, routing_key=queue, properties=properties)
    await connection.close()


async def _take(url: str, queue: str) -> bytes | None:
    connection = await aiormq.connect(url)
    channel = await connection.channel()
    message = await channel.basic_get(queue, no_ack=True)
    await connection.close()
    return message.body or None
