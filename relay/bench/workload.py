"""The load, and the throwaway servers it runs on: a fresh database and virtual host for every stage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from relay.postgres.connect import connection
from relay.postgres.migrate import migrate
from relay.sandbox import Postgres, RabbitMQ
from relay.settings import Settings, load_settings

QUEUE_TYPES = ("quorum", "classic")


@dataclass(frozen=True, slots=True)
class Workload:
    """What is sent."""

    events: int  # rounded up to whole statements of 500
    aggregates: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class Servers:
    """Where it is sent through."""

    postgres: Postgres
    rabbitmq: RabbitMQ

    @asynccontextmanager
    async def fresh(self, name: str) -> AsyncIterator[Settings]:
        """Settings for a migrated database and an empty virtual host of their own, both dropped at the end."""
        dsn = await asyncio.to_thread(self.postgres.create_database, name)
        url = await asyncio.to_thread(self.rabbitmq.create_vhost, name)
        settings = load_settings(
            environ={},
            flags={"source": "bench", "postgres.dsn": dsn, "rabbitmq.url": url, "daemon.log_level": "warning"},
        )
        try:
            async with connection(settings.postgres, application="relay bench") as opened:
                await migrate(opened)
            yield settings
        finally:
            await asyncio.to_thread(self.rabbitmq.delete_vhost, name)
            await asyncio.to_thread(self.postgres.drop_database, name)
