"""Everything that must be there before the shop opens: servers, databases, queues, daemons, and who plays whom."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from relay.demo.audit import QUEUE as AUDIT_QUEUE
from relay.demo.audit import Audit
from relay.demo.broker import DIRECT, EVENTS, declare_exchanges, declare_queue, session
from relay.demo.naive import Naive
from relay.demo.nemesis import Nemesis
from relay.demo.processes import Daemon
from relay.demo.screen import Screen
from relay.demo.shop import DualWrite, Shop, Tally
from relay.demo.sql import sql
from relay.errors import BrokerError, SandboxError
from relay.inbox import Stats
from relay.postgres.connect import connection
from relay.postgres.migrate import migrate
from relay.sandbox import SandboxPostgres, SandboxRabbitMQ
from relay.settings import PostgresSettings, RabbitmqSettings

START_TIMEOUT_S = 30.0

BILLING_QUEUE, NAIVE_QUEUE, DUAL_WRITE_QUEUE = "billing", "naive", "dual_write"
DATABASES = ("shop", BILLING_QUEUE, NAIVE_QUEUE, DUAL_WRITE_QUEUE)
"""A consumer's database has the name of its queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What can be chosen."""

    orders: int = 1000
    seconds: float = 30
    seed: int = 1
    plain: bool = False


@dataclass(slots=True)
class Cast:
    """Everybody in it."""

    databases: Mapping[str, PostgresSettings]
    rabbitmq: RabbitmqSettings
    relays: tuple[Daemon, Daemon]
    billing: Daemon
    shop: Shop
    audit: Audit
    naive: Naive
    dual_write: Naive
    nemesis: Nemesis
    stats: Stats = field(default_factory=Stats)  # of the inbox, as far as it lived to tell
    effects: dict[str, tuple[int, int]] = field(default_factory=dict)  # database -> (applications, different events)
    looking: asyncio.Lock = field(default_factory=asyncio.Lock)  # one look at a time


@asynccontextmanager
async def throwaway_servers(screen: Screen) -> AsyncIterator[tuple[SandboxPostgres, SandboxRabbitMQ]]:
    """Both throwaway servers, started at the same time, stopped whatever happens."""
    postgres, rabbitmq = SandboxPostgres(fsync=False), SandboxRabbitMQ()
    screen.say(f"starting PostgreSQL {postgres.version} and RabbitMQ (a few seconds)")

    async def start(name: str, server: SandboxPostgres | SandboxRabbitMQ) -> None:
        await asyncio.to_thread(server.start)
        screen.say(f"{name} listens on port {server.port}")

    starting = [asyncio.create_task(start("PostgreSQL", postgres)), asyncio.create_task(start("RabbitMQ", rabbitmq))]
    try:
        await asyncio.shield(asyncio.gather(*starting))
        yield postgres, rabbitmq
    finally:
        await asyncio.gather(
            *starting, return_exceptions=True
        )  # a start runs in a thread: it can be waited for, not cancelled
        await asyncio.gather(asyncio.to_thread(postgres.stop), asyncio.to_thread(rabbitmq.stop))


@asynccontextmanager
async def engaged(
    options: Options, postgres: SandboxPostgres, rabbitmq: SandboxRabbitMQ, screen: Screen
) -> AsyncIterator[Cast]:
    """Databases, queues and daemons; the daemons are ended at the end."""
    databases = await _make_databases(postgres)
    broker = RabbitmqSettings(url=SecretStr(rabbitmq.url()))
    await _make_queues(broker)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-demo-")))
        cast = _engage(options, databases, broker, rabbitmq, folder, screen)
        for daemon in (*cast.relays, cast.billing):
            stack.push_async_callback(daemon.end)
            await daemon.start()
        await until(lambda: _at_work(cast), START_TIMEOUT_S, "the daemons are not at work", cast)
        screen.say(f"two relays run: one owns the log, one stands by (pids {cast.relays[0].pid}, {cast.relays[1].pid})")
        screen.say(f"billing's inbox runs (pid {cast.billing.pid}), and naive consumers beside it")
        yield cast


def _engage(
    options: Options,
    databases: Mapping[str, PostgresSettings],
    broker: RabbitmqSettings,
    rabbitmq: SandboxRabbitMQ,
    folder: Path,
    screen: Screen,
) -> Cast:
    def daemon(name: str, database: str, module: str, *arguments: str) -> Daemon:
        return Daemon(name, module, *arguments, folder=folder, environment=environment(databases[database], broker))

    relays = (daemon("relay 1", "shop", "relay", "run"), daemon("relay 2", "shop", "relay", "run"))
    billing = daemon("billing's inbox", "billing", "relay.demo.worker")
    tally = Tally()
    shop = Shop(databases["shop"], DualWrite(broker, tally), tally, options.orders, options.seconds, options.seed)
    audit = Audit(broker)
    nemesis = Nemesis(
        shop=shop,
        relays=relays,
        billing=billing,
        broker=rabbitmq,
        audit=audit,
        postgres=databases["shop"],
        rabbitmq=broker,
        queues=(BILLING_QUEUE, NAIVE_QUEUE, DUAL_WRITE_QUEUE),
        tell=screen.say,
        dice=random.Random(options.seed),  # noqa: S311 - no secret
    )
    return Cast(
        databases=databases,
        rabbitmq=broker,
        relays=relays,
        billing=billing,
        shop=shop,
        audit=audit,
        naive=Naive(NAIVE_QUEUE, databases["naive"], broker),
        dual_write=Naive(DUAL_WRITE_QUEUE, databases["dual_write"], broker),
        nemesis=nemesis,
    )


def environment(postgres: PostgresSettings, rabbitmq: RabbitmqSettings) -> dict[str, str]:
    """Settings of a daemon. Secrets travel in the environment."""
    return {
        "RELAY_SOURCE": "shop",
        "RELAY_POSTGRES_DSN": postgres.dsn.get_secret_value(),
        "RELAY_RABBITMQ_URL": rabbitmq.url.get_secret_value(),
        "RELAY_DAEMON_BACKOFF_MAX_S": "1",
        "RELAY_INBOX_BATCH": "100",
        "RELAY_INBOX_PREFETCH": "200",
    }


async def _make_databases(postgres: SandboxPostgres) -> dict[str, PostgresSettings]:
    """The shop's and billing's with relay's schema, those of the naive consumers without: they have no use for it."""
    made = {}
    for name in DATABASES:
        made[name] = PostgresSettings(dsn=SecretStr(await asyncio.to_thread(postgres.create_database, name)))
        async with connection(made[name], application="demo set-up") as opened:
            if name in ("shop", "billing"):
                await migrate(opened)
            await opened.execute(sql("shop_tables" if name == "shop" else "billing_tables"))
    return made


async def _make_queues(broker: RabbitmqSettings) -> None:
    """All but billing's own, which its inbox declares. Before anything is published, so that nobody misses the beginning."""
    async with session(broker, "demo set-up") as opened:
        channel = await opened.channel()
        await declare_exchanges(channel)
        await declare_queue(channel, AUDIT_QUEUE, EVENTS, DIRECT)
        await declare_queue(channel, NAIVE_QUEUE, EVENTS)
        await declare_queue(channel, DUAL_WRITE_QUEUE, DIRECT)


async def _at_work(cast: Cast) -> bool:
    for daemon in (*cast.relays, cast.billing):
        daemon.require_running()
    async with connection(cast.databases["shop"], application="demo set-up") as opened:
        owned = await opened.fetchval(sql("owner_of_log")) is not None
    return owned and await ready(cast.rabbitmq, BILLING_QUEUE) is not None


async def ready(broker: RabbitmqSettings, *queues: str) -> int | None:
    """Messages waiting in the queues; None if one of them does not exist, or the broker does not answer."""
    try:
        async with session(broker, "demo look") as opened:
            channel = await opened.channel()
            declared = [await channel.declare_queue(name, passive=True) for name in queues]
            return sum(queue.declaration_result.message_count or 0 for queue in declared)
    except BrokerError:
        return None


async def until(
    question: Callable[[], Coroutine[Any, Any, bool]], timeout_s: float, otherwise: str, cast: Cast
) -> None:
    """Ask again and again. Raises SandboxError with the daemons' last words."""
    try:
        async with asyncio.timeout(timeout_s):
            while not await question():  # noqa: ASYNC110 - about other processes, which announce nothing
                await asyncio.sleep(0.1)
    except TimeoutError:
        words = "\n".join(f"--- {d.name}\n{d.tail()}" for d in (*cast.relays, cast.billing))
        raise SandboxError(f"{otherwise} ({timeout_s:g} s)\n{words}") from None
