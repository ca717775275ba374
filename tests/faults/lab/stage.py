"""Everything that a run needs: servers, proxies between them, databases, daemons; and the handles by which faults take them."""

from __future__ import annotations

import asyncio
import random
import secrets
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aio_pika
import aiormq.exceptions
import asyncpg

from relay.errors import SandboxError
from relay.postgres.migrate import migrate
from relay.sandbox import SandboxPostgres, SandboxRabbitMQ
from tests.faults.lab import cursor_log, effects, workload
from tests.faults.lab.amqp_proxy import AmqpProxy
from tests.faults.lab.daemons import Daemon
from tests.faults.lab.history import History
from tests.faults.lab.postgres_proxy import PostgresProxy
from tests.faults.lab.profile import Options
from tests.faults.lab.workload import Workload

ROOT = Path(__file__).parents[3]
ROLES = {"lab_producer": "relay_producer", "lab_relay": "relay_daemon", "lab_consumer": "relay_consumer"}
"""Who logs in, and which of relay's roles that is a member of."""

BROKER_USERS = ("lab_relay", "lab_consumer")
ALL_PERMISSIONS: dict[str, object] = {"configure": ".*", "write": ".*", "read": ".*"}
START_TIMEOUT_S = 60.0

NOT_NOW = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What a server that is just being broken answers with."""

DAEMONS: Mapping[str, str] = {
    "RELAY_SOURCE": "shop",
    "RELAY_POSTGRES_CONNECT_TIMEOUT_S": "5",
    "RELAY_POSTGRES_COMMAND_TIMEOUT_S": "10",
    "RELAY_RABBITMQ_CONNECT_TIMEOUT_S": "5",
    "RELAY_RABBITMQ_HEARTBEAT_S": "5",
    "RELAY_OUTBOX_PAGE_ROWS": "200",
    "RELAY_OUTBOX_CHECKPOINT_INTERVAL_S": "0.2",
    "RELAY_OUTBOX_CONFIRM_TIMEOUT_S": "5",
    "RELAY_OUTBOX_STANDBY_INTERVAL_S": "0.3",
    "RELAY_OUTBOX_RETRY_FIRST_S": "0.3",
    "RELAY_OUTBOX_RETRY_MAX_S": "2",
    "RELAY_OUTBOX_MAX_ATTEMPTS": "1000",
    "RELAY_INBOX_BINDINGS": "account.#,lonely.#,poison.#",
    "RELAY_INBOX_BATCH": "100",
    "RELAY_INBOX_PREFETCH": "200",
    "RELAY_INBOX_HANDLER_TIMEOUT_S": "3",
    "RELAY_INBOX_RETRY_FIRST_S": "0.3",
    "RELAY_INBOX_RETRY_MAX_S": "2",
    "RELAY_INBOX_MAX_ATTEMPTS": "1000",
    "RELAY_INBOX_GAP_ALERT_AFTER_S": "3",
    "RELAY_DAEMON_BACKOFF_MAX_S": "1",
    "PYTHONPATH": str(ROOT),
}
"""Impatient, so that a run of minutes shows what takes hours with the defaults."""


@dataclass(slots=True)
class Stage:
    """The system under test. Faults use what is public here and nothing else."""

    folder: Path
    history: History
    producer_postgres: SandboxPostgres  # with the database shop
    consumer_postgres: SandboxPostgres  # with the database effects
    broker: SandboxRabbitMQ
    relay_amqp: AmqpProxy
    consumer_amqp: AmqpProxy
    relay_pg: PostgresProxy
    consumer_pg: PostgresProxy
    producer_pg: PostgresProxy
    relays: tuple[Daemon, Daemon]
    consumers: tuple[Daemon, Daemon]
    workload: Workload
    password: str  # of every role and broker user of the laboratory
    committed: int = 0  # events, as the sampler saw last
    applied: int = 0
    expected_conflicts: int = 0  # forged messages that faults sent
    expected_strangers: int = 0

    @property
    def daemons(self) -> tuple[Daemon, ...]:
        """All four."""
        return (*self.relays, *self.consumers)

    @property
    def producer_dsn(self) -> str:
        """Superuser, straight to the server."""
        return self.producer_postgres.dsn("shop")

    @property
    def consumer_dsn(self) -> str:
        """Superuser, straight to the server."""
        return self.consumer_postgres.dsn("effects")

    @asynccontextmanager
    async def producer(self) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        """A superuser's connection to the producer's database."""
        async with _connected(self.producer_dsn) as connection:
            yield connection

    @asynccontextmanager
    async def consumer(self) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        """A superuser's connection to the consumer's database."""
        async with _connected(self.consumer_dsn) as connection:
            yield connection

    async def producer_sql(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        """One statement in the producer's database."""
        async with self.producer() as connection:
            return await connection.fetch(statement, *arguments)

    async def consumer_sql(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        """One statement in the consumer's database."""
        async with self.consumer() as connection:
            return await connection.fetch(statement, *arguments)

    async def epoch(self) -> int:
        """How often the log has been taken over; -1 while the database does not answer."""
        try:
            (row,) = await self.producer_sql("SELECT epoch FROM relay.outbox_cursor WHERE shard = 0")
        except NOT_NOW:
            return -1
        return int(row["epoch"])

    async def owner(self) -> Daemon:
        """The relay that owns the log, waiting until one does. Raises TimeoutError."""
        async with asyncio.timeout(START_TIMEOUT_S):
            while (found := await self._owner()) is None:  # noqa: ASYNC110 - a table announces nothing
                await asyncio.sleep(0.05)
        return found

    async def standby(self) -> Daemon:
        """The other one."""
        owner = await self.owner()
        return self.relays[1] if owner is self.relays[0] else self.relays[0]

    async def _owner(self) -> Daemon | None:
        """Who holds the lock: the row alone may name one that is dead."""
        try:
            found = await self.producer_sql(
                "SELECT c.owner FROM relay.outbox_cursor c WHERE c.shard = 0 AND c.owner IS NOT NULL AND EXISTS "
                "(SELECT FROM pg_locks l WHERE l.locktype = 'advisory' AND l.classid = 727003 AND l.objid = 0 AND l.granted)"
            )
        except NOT_NOW:
            return None
        pid = found[0]["owner"].rpartition(":")[2] if found else None
        return next((relay for relay in self.relays if pid is not None and str(relay.pid) == pid), None)

    async def until(self, question: Callable[[], Awaitable[Any]], *, timeout_s: float, every_s: float = 0.05) -> bool:
        """Ask until the answer is true; False at the deadline. A server that does not answer counts as not yet."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                if await question():
                    return True
            except NOT_NOW:  # asked again
                pass
            await asyncio.sleep(every_s)
        return False


@asynccontextmanager
async def staged(folder: Path, history: History, options: Options) -> AsyncIterator[Stage]:
    """The whole system, at work; all of it is gone at the end."""
    async with AsyncExitStack() as stack:
        # Inherited by the daemons: a signal that comes before they have set their handlers must not end them.
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            before = signal.signal(number, signal.SIG_IGN)
            stack.callback(signal.signal, number, before)
        servers = (
            SandboxPostgres(options.postgres, fsync=False),
            SandboxPostgres(options.postgres, fsync=False),
            SandboxRabbitMQ(),
        )
        for server in servers:
            stack.push_async_callback(asyncio.to_thread, server.stop)
        await asyncio.gather(*(asyncio.to_thread(server.start) for server in servers))
        producers, consumers, broker = servers
        password = secrets.token_hex(16)
        await _make_databases(producers, consumers, password)
        await asyncio.to_thread(make_broker_users, broker, password)
        stage = await _connect(stack, folder, history, options, servers, password)
        for daemon in stage.daemons:
            stack.push_async_callback(daemon.kill9)
        keepers = [asyncio.create_task(daemon.keep()) for daemon in stage.daemons]
        stack.push_async_callback(_cancelled, keepers)
        await _until_at_work(stage)
        yield stage


async def _connect(
    stack: AsyncExitStack,
    folder: Path,
    history: History,
    options: Options,
    servers: tuple[SandboxPostgres, SandboxPostgres, SandboxRabbitMQ],
    password: str,
) -> Stage:
    producers, consumers, broker = servers
    dealt: list[AmqpProxy] = []

    async def amqp() -> tuple[AmqpProxy, int]:
        proxy = AmqpProxy(broker.port, dice=random.Random(f"{options.seed} amqp {len(dealt)}"))
        dealt.append(proxy)
        stack.push_async_callback(proxy.close)
        return proxy, await proxy.start()

    async def pg(server: SandboxPostgres) -> tuple[PostgresProxy, int]:
        proxy = PostgresProxy(server.port)
        stack.push_async_callback(proxy.close)
        return proxy, await proxy.start()

    relay_amqp, relay_amqp_port = await amqp()
    consumer_amqp, consumer_amqp_port = await amqp()
    relay_pg, relay_pg_port = await pg(producers)
    producer_pg, producer_pg_port = await pg(producers)
    consumer_pg, consumer_pg_port = await pg(consumers)

    def daemon(name: str, user: str, database: str, pg_port: int, amqp_port: int, *arguments: str) -> Daemon:
        environment = {
            **DAEMONS,
            "RELAY_OUTBOX_REPAIR": str(options.repair).lower(),
            "RELAY_INBOX_REPAIR": str(options.repair).lower(),
            "RELAY_POSTGRES_DSN": f"postgresql://{user}:{password}@127.0.0.1:{pg_port}/{database}",
            "RELAY_RABBITMQ_URL": f"amqp://{user}:{password}@127.0.0.1:{amqp_port}/%2F",
        }
        return Daemon(name, *arguments, folder=folder, environment=environment)

    def relay(name: str) -> Daemon:
        return daemon(name, "lab_relay", "shop", relay_pg_port, relay_amqp_port, "run")

    def consumer(name: str) -> Daemon:
        arguments = ("inbox", "run", "tests.faults.lab.effects:inbox")
        return daemon(name, "lab_consumer", "effects", consumer_pg_port, consumer_amqp_port, *arguments)

    return Stage(
        folder=folder,
        history=history,
        producer_postgres=producers,
        consumer_postgres=consumers,
        broker=broker,
        relay_amqp=relay_amqp,
        consumer_amqp=consumer_amqp,
        relay_pg=relay_pg,
        consumer_pg=consumer_pg,
        producer_pg=producer_pg,
        relays=(relay("relay 1"), relay("relay 2")),
        consumers=(consumer("consumer 1"), consumer("consumer 2")),
        workload=Workload(
            dsn=f"postgresql://lab_producer:{password}@127.0.0.1:{producer_pg_port}/shop",
            history=history,
            seed=options.seed,
            rate=options.profile.rate,
            producers=options.profile.producers,
        ),
        password=password,
    )


async def _make_databases(producers: SandboxPostgres, consumers: SandboxPostgres, password: str) -> None:
    for server, name, tables, grants, users in (
        (producers, "shop", workload.TABLES + cursor_log.TABLES, workload.GRANTS, ("lab_producer", "lab_relay")),
        (consumers, "effects", effects.TABLES, effects.GRANTS, ("lab_consumer",)),
    ):
        dsn = await asyncio.to_thread(server.create_database, name)
        async with _connected(dsn) as connection:
            await migrate(connection)
            for user in users:
                await connection.execute(f"CREATE ROLE {user} LOGIN PASSWORD '{password}' IN ROLE {ROLES[user]}")
            await connection.execute(tables)
            await connection.execute(grants)


def make_broker_users(broker: SandboxRabbitMQ, password: str) -> None:
    """The laboratory's users with all permissions; also right when they are there already. Blocks."""
    api = broker.management()
    for user in BROKER_USERS:
        api.request("PUT", f"/api/users/{user}", {"password": password, "tags": ""})
        api.request("PUT", f"/api/permissions/%2F/{user}", ALL_PERMISSIONS)


async def _until_at_work(stage: Stage) -> None:
    """An owner of the log, and both consumers on the queue."""
    try:
        await stage.owner()
        at_work = await stage.until(lambda: both_consume(stage), timeout_s=START_TIMEOUT_S)
    except TimeoutError:
        at_work = False
    if not at_work:
        words = "\n".join(f"--- {d.name}\n{d.log_since(0)[-2000:]}" for d in stage.daemons)
        raise SandboxError(f"the daemons are not at work after {START_TIMEOUT_S:g} s\n{words}")


async def both_consume(stage: Stage) -> bool:
    """True when the queue effects has both consumers. Asks the queue: the management's figures are seconds old."""
    try:
        async with await aio_pika.connect(stage.broker.url(), timeout=5) as connection:
            channel = await connection.channel()
            declared = await channel.declare_queue("effects", passive=True)
    except aiormq.exceptions.AMQPError:
        return False
    return declared.declaration_result.consumer_count == len(stage.consumers)


@asynccontextmanager
async def _connected(dsn: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(dsn, timeout=5, command_timeout=30)
    try:
        yield connection
    finally:
        await connection.close(timeout=5)


async def _cancelled(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def with_port(url: str, port: int) -> str:
    """The same address at another port."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition(":")[0] + f":{port}"))
