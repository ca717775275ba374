"""Where it is measured: throwaway servers, or the user's own, and there only in what the benchmark made itself.

Every measurement gets a database and, on throwaway servers, a virtual host of its own; on the user's own servers a database
and an exchange and queues with names of their own. All of it is removed after the measurement, also after a failed one.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiormq.abc import AbstractChannel

from relay.bench.figures import MeasurementFailed
from relay.bench.workload import Workload
from relay.errors import BrokerRefused
from relay.postgres.connect import connection
from relay.postgres.migrate import migrate
from relay.postgres.queries import query
from relay.rabbitmq.control_topology import marks_exchange_name
from relay.rabbitmq.queues import DEAD_EXCHANGE
from relay.rabbitmq.session import broker_errors, close, connect
from relay.rabbitmq.topology import NOT_FOUND
from relay.sandbox import ExternalPostgres, Postgres, RabbitMQ
from relay.settings import PostgresSettings, RabbitmqSettings, Settings

_NAME = "bench"


class Broker(Protocol):
    """Where messages go."""

    async def create(self, name: str) -> Mapping[str, Any]:
        """Make room under a name; the settings that lead there."""
        ...

    async def remove(self, name: str, settings: Settings) -> None:
        """Take everything away that was made there."""
        ...


@dataclass(slots=True)
class Servers:
    """A fresh place for every measurement. `settings` are the user's own tuning; where they lead does not count."""

    postgres: Postgres
    broker: Broker
    settings: Settings = field(default_factory=Settings)
    _templates: dict[Workload, str] = field(default_factory=dict)

    @asynccontextmanager
    async def fresh(self, workload: Workload | None = None) -> AsyncIterator[Settings]:
        """Settings for a database and a place at the broker of its own; with a workload, its events are in the outbox.

        The database is then a copy: filling it takes longer than most measurements. Never analysed, either way.
        """
        name = fresh_name()
        template = None if workload is None else await self._filled(workload)
        async with self._database(name, template) as dsn:
            settings = settings_at(self.settings, dsn, await self.broker.create(name))
            try:
                if template is None:
                    await _migrate(settings.postgres, name)
                yield settings
            finally:
                await self.broker.remove(name, settings)

    async def close(self) -> None:
        """Drop what was kept to be copied."""
        while self._templates:
            await asyncio.to_thread(self.postgres.drop_database, self._templates.popitem()[1])

    @asynccontextmanager
    async def _database(self, name: str, template: str | None) -> AsyncIterator[str]:
        try:
            yield await asyncio.to_thread(self.postgres.create_database, name, template)
        finally:
            await asyncio.to_thread(self.postgres.drop_database, name)

    async def _filled(self, workload: Workload) -> str:
        """The database that is copied: migrated, with the benchmark's tables, and the workload's events in its outbox."""
        if workload not in self._templates:
            self._templates[workload] = name = fresh_name()
            dsn = await asyncio.to_thread(self.postgres.create_database, name, "template0")
            settings = settings_at(self.settings, dsn, {}).postgres
            await _migrate(settings, name)
            await fill(settings, workload)
        return self._templates[workload]


class Vhosts:
    """A throwaway broker: a virtual host for each measurement."""

    def __init__(self, rabbitmq: RabbitMQ) -> None:
        self._rabbitmq = rabbitmq

    async def create(self, name: str) -> Mapping[str, Any]:
        """An empty virtual host."""
        return {"rabbitmq.url": await asyncio.to_thread(self._rabbitmq.create_vhost, name)}

    async def remove(self, name: str, _: Settings) -> None:
        """The virtual host, with all that is in it."""
        await asyncio.to_thread(self._rabbitmq.delete_vhost, name)


class OwnPostgres(ExternalPostgres):
    """The user's server: databases are made over a connection to the one that the settings name, which is only for that."""

    def __init__(self, settings: PostgresSettings, tell: Callable[[str], None]) -> None:
        super().__init__(settings.dsn.get_secret_value())
        self._administration = settings.dsn.get_secret_value()
        self._tell = tell

    def dsn(self, database: str = "postgres") -> str:
        """The address of one database; for making and dropping others, that of the settings as it is."""
        return self._administration if database == "postgres" else super().dsn(database)

    def create_database(self, name: str, template: str | None = None) -> str:
        """From template0: whatever the user's template1 holds is none of ours."""
        self._tell(f"creating the database {name}")
        return super().create_database(name, template or "template0")

    def drop_database(self, name: str) -> None:
        """Drop what `create_database` made."""
        self._tell(f"dropping the database {name}")
        super().drop_database(name)


class OwnBroker:
    """The user's broker: an exchange and queues with names of their own in the virtual host of the settings.

    Nothing is asked of the broker but what an ordinary user with configure, write and read may do.
    """

    def __init__(self, settings: RabbitmqSettings, tell: Callable[[str], None]) -> None:
        self._settings = settings
        self._tell = tell
        self._dead_is_theirs: bool | None = None  # whether the exchange for dead letters was there before us

    async def create(self, name: str) -> Mapping[str, Any]:
        """Only names: the daemons declare what they need. Without repair, whose exchange and queue have names for all."""
        self._tell(f"using the exchange {name} and the queues {name}.* at the broker")
        if self._dead_is_theirs is None:
            self._dead_is_theirs = await self._has_exchange(DEAD_EXCHANGE)
        return {
            "rabbitmq.url": self._settings.url,
            "rabbitmq.exchange": name,
            "inbox.queue": f"{name}.queue",
            "outbox.repair": False,
            "inbox.repair": False,
        }

    async def remove(self, name: str, settings: Settings) -> None:
        """What the daemons and the benchmark declared, and the exchange for dead letters if nobody had one."""
        self._tell(f"removing the exchange {name} and the queues {name}.*")
        queue = f"{name}.queue"
        async with self._channel("removing what the benchmark declared") as channel:
            for each in (queue, f"{queue}.dead"):
                await channel.queue_delete(each)
            for each in (name, marks_exchange_name(settings.rabbitmq)):
                await channel.exchange_delete(each)
            if not self._dead_is_theirs:
                await channel.exchange_delete(DEAD_EXCHANGE)

    async def _has_exchange(self, name: str) -> bool:
        try:
            async with self._channel(f"looking for the exchange {name}") as channel:
                await channel.exchange_declare(name, passive=True)
        except BrokerRefused as exc:
            if exc.reply_code != NOT_FOUND:
                raise
            return False
        return True

    @asynccontextmanager
    async def _channel(self, doing: str) -> AsyncIterator[AbstractChannel]:
        broker = await connect(self._settings, name="relay bench")
        try:
            with broker_errors(doing):
                yield await (await broker.channel(publisher_confirms=False)).get_underlay_channel()
        finally:
            await close(broker)


def settings_at(base: Settings, dsn: str, place: Mapping[str, Any]) -> Settings:
    """The user's tuning, leading to a place of the benchmark's own."""
    overriding = {
        "source": _NAME,
        "postgres.dsn": dsn,
        "rabbitmq.exchange": "relay.events",
        "rabbitmq.declare_topology": True,
        "inbox.consumer": _NAME,
        "inbox.queue": _NAME,
        "inbox.bindings": ("#",),
        "inbox.policy": "sequence",
        "inbox.policies": {},
        "inbox.start_from": "beginning",
        "inbox.mode": "apply",
        "inbox.functions": {},
        "daemon.log_level": "warning",
        **place,
    }
    tree: dict[str, Any] = base.model_dump()
    for setting, value in overriding.items():
        section, dot, inner = setting.partition(".")
        if dot:
            tree[section][inner] = value
        else:
            tree[section] = value
    return Settings.model_validate(tree)


async def fill(settings: PostgresSettings, workload: Workload) -> None:
    """The workload's events into the outbox, not measured."""
    async with connection(settings, application="relay bench") as opened:
        for first in range(0, workload.events, workload.rows_each):
            rows = min(workload.rows_each, workload.events - first)
            await opened.execute(query("bench_insert"), first, rows, workload.aggregates, workload.fill)


async def _migrate(settings: PostgresSettings, name: str) -> None:
    """Only in the database that was made for it: wherever else a DSN may lead, nothing is touched there."""
    async with connection(settings, application="relay bench") as opened:
        found = await opened.fetchval(query("bench_database"))
        if found != name:
            raise MeasurementFailed(
                f"the DSN leads to the database {found}, not to {name} which was made for the benchmark"
            )
        await migrate(opened)
        await opened.execute(query("bench_tables"))


def fresh_name() -> str:
    """A name that nothing else has."""
    return f"relay_bench_{secrets.token_hex(4)}"
