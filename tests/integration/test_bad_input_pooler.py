"""PgBouncer in front of PostgreSQL: relay refuses to work through it and says so; producers may, and wake the relay."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

import asyncpg
import psycopg
import pytest
from pydantic import SecretStr

from relay.errors import PoolerError
from relay.postgres.connect import connection
from relay.producer import NewEvent
from relay.producer import asyncpg as with_asyncpg
from relay.producer import psycopg as with_psycopg
from relay.sandbox.account import give, private_folder, remove_folder, unprivileged_user
from relay.sandbox.ports import LOOPBACK, free_ports
from relay.sandbox.process import KeptProcess
from relay.settings import PostgresSettings
from tests.harness.audit import audit
from tests.harness.outbox import outbox_running, settings_for, shard_of, wait_until

PROGRAM = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")

pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="PgBouncer is not on this machine: apt-get install pgbouncer (Debian's package pgbouncer)"
)


@contextmanager
def pgbouncer(dsn: str, pool_mode: str) -> Iterator[str]:
    """PgBouncer with a single server connection a pool, so that clients really share it; the DSN through it."""
    parts = urlsplit(dsn)
    user = unprivileged_user()  # it refuses to run as root
    folder = private_folder("relay-pgbouncer-", user=user)
    (port,) = free_ports(1)
    files = {
        "users.txt": f'"{unquote(parts.username or "")}" "{unquote(parts.password or "")}"\n',
        "pgbouncer.ini": "\n".join(
            (
                "[databases]",
                f"* = host={parts.hostname} port={parts.port}",
                "[pgbouncer]",
                f"listen_addr = {LOOPBACK}",
                f"listen_port = {port}",
                "unix_socket_dir =",
                "auth_type = scram-sha-256",
                f"auth_file = {folder / 'users.txt'}",
                f"pool_mode = {pool_mode}",
                "default_pool_size = 1",
                "server_reset_query_always = 0",
                "",
            )
        ),
    }
    for name, content in files.items():
        (folder / name).touch(mode=0o600)
        (folder / name).write_text(content)
        give(folder / name, user)
    process = KeptProcess(
        [str(PROGRAM), str(folder / "pgbouncer.ini")],
        folder=folder,
        log=folder / "pgbouncer.log",
        env={"PATH": os.environ.get("PATH", os.defpath), "HOME": str(folder)},
        user=user,
    )
    try:
        process.wait_until(lambda: _listens(port), timeout_s=20)
        yield urlunsplit(parts._replace(netloc=f"{parts.netloc.rpartition('@')[0]}@{LOOPBACK}:{port}"))
    finally:
        process.end(signal.SIGTERM, signal.SIGKILL, timeout_s=10)
        remove_folder(folder)


def _listens(port: int) -> bool:
    try:
        with socket.create_connection((LOOPBACK, port), timeout=1):
            return True
    except OSError:
        return False


@pytest.fixture
def pooled(database: str) -> Iterator[str]:
    """The database through PgBouncer in transaction mode."""
    with pgbouncer(database, "transaction") as dsn:
        yield dsn


@pytest.mark.parametrize("command", [("run",), ("inbox", "run", "app:inbox"), ("migrate",), ("check",)], ids=" ".join)
async def test_every_command_refuses_transaction_pooling_with_2(
    pooled: str, broker: str, tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "app.py").write_text(
        "from relay.inbox import Inbox\ninbox = Inbox('shop')\n@inbox.on('T')\nasync def f(event, tx): ...\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RELAY_", "PG"))}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "relay", *command),
        env=clean
        | {
            "RELAY_SOURCE": "shop",
            "RELAY_POSTGRES_DSN": pooled,
            "RELAY_RABBITMQ_URL": broker,
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        cwd=tmp_path,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    assert process.returncode == 2, said.decode()
    assert said.decode().startswith("relay: postgres.dsn leads through a connection pooler (PgBouncer)")
    assert "Give relay a direct connection" in said.decode()


@pytest.mark.parametrize("pool_mode", ["transaction", "session", "statement"])
async def test_every_pool_mode_is_refused_again_and_again(database: str, pool_mode: str) -> None:
    """Statements that an earlier client prepared are still on the shared connection: that must not confuse the second look."""
    with pgbouncer(database, pool_mode) as dsn:
        for _ in range(3):
            with pytest.raises(PoolerError):
                async with connection(PostgresSettings(dsn=SecretStr(dsn)), application="test"):
                    raise AssertionError("connected through a pooler")


async def _plain(dsn: str, n: int) -> None:
    client = await asyncpg.connect(dsn, statement_cache_size=0)
    try:
        await client.execute(
            f"INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload) VALUES ('order', '1', 'Paid', '{n}')"
        )
    finally:
        await client.close()


async def _asyncpg(dsn: str, n: int) -> None:
    client = await asyncpg.connect(dsn, statement_cache_size=0)
    try:
        async with client.transaction():
            await with_asyncpg.emit(client, _event(n))
    finally:
        await client.close()


async def _psycopg(dsn: str, n: int) -> None:
    def emit() -> None:
        with psycopg.connect(dsn, prepare_threshold=None) as client:
            with_psycopg.emit(client, _event(n))

    await asyncio.to_thread(emit)


async def _psycopg_async(dsn: str, n: int) -> None:
    async with await psycopg.AsyncConnection.connect(dsn, prepare_threshold=None) as client:
        await with_psycopg.emit_async(client, _event(n))


def _event(n: int) -> NewEvent:
    return NewEvent(aggregate_type="order", aggregate_id="1", event_type="Paid", payload=n)


@pytest.mark.parametrize("produce", [_plain, _asyncpg, _psycopg, _psycopg_async], ids=lambda f: f.__name__.strip("_"))
async def test_producers_behind_the_pooler_work_and_wake_the_relay(
    database: str, pooled: str, broker: str, produce: Callable[[str, int], Awaitable[None]]
) -> None:
    """The relay's own look round comes far too late to help."""
    settings = settings_for(database, broker, outbox__poll_interval_s=600)
    async with audit(broker) as witness, outbox_running(settings) as outbox:
        progress = await shard_of(outbox)
        await wait_until(progress, lambda p: p.sleeps > 0)
        for n in range(1, 4):
            slept = progress.sleeps
            await produce(pooled, n)
            await witness.wait_for(n, timeout_s=10)
            await wait_until(progress, lambda p, slept=slept: p.sleeps > slept)  # type: ignore[misc]
        assert witness.sequences() == {"order/1": [1, 2, 3]}


async def test_many_producers_behind_the_pooler_lose_nothing(database: str, pooled: str, broker: str) -> None:
    async with audit(broker) as witness, outbox_running(settings_for(database, broker)):
        await asyncio.gather(*(_asyncpg(pooled, n) for n in range(20)), *(_plain(pooled, n) for n in range(20)))
        await witness.wait_for_distinct(40)
        assert witness.sequences() == {"order/1": list(range(1, 41))}
