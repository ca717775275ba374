"""The outbox daemon as an object in the test's own loop, and as a process that can be killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from relay.daemon import Outbox
from relay.outbox.progress import Progress
from relay.settings import Settings, load_settings


def settings_for(database: str, broker: str, **flags: Any) -> Settings:
    """Settings of a test; flags as `outbox__page_rows=5`."""
    return load_settings(
        environ={},
        flags={
            "source": "shop",
            "postgres.dsn": database,
            "rabbitmq.url": broker,
            "daemon.backoff_max_s": 1.0,
            "daemon.log_level": "warning",
        }
        | {name.replace("__", "."): value for name, value in flags.items()},
    )


@asynccontextmanager
async def outbox_running(settings: Settings) -> AsyncIterator[Outbox]:
    """The daemon, running, and stopped at the end; what it raises is raised here."""
    outbox = Outbox(settings)
    task = asyncio.create_task(outbox.run())
    try:
        yield outbox
    finally:
        outbox.stop.set()
        async with asyncio.timeout(60):
            await task


async def wait_until(progress: Progress, condition: Callable[[Progress], bool], *, timeout_s: float = 30) -> None:
    """Wait for the shard's own announcements until the condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition(progress):
            progress.changed.clear()
            if condition(progress):
                return
            await progress.changed.wait()


async def shard_of(outbox: Outbox, shard: int = 0, *, timeout_s: float = 30) -> Progress:
    """The shard's progress, as soon as it has been found."""
    async with asyncio.timeout(timeout_s):
        await outbox.started.wait()
    return outbox.progress[shard]


async def until(question: Callable[[], Any], *, timeout_s: float = 30, every_s: float | None = None) -> Any:
    """Ask (an async function) again and again until the answer is true; returns it. For what announces nothing itself.

    Default: soon at first, and seldom when it takes long. Many a question is a connection of its own, 10 ms of CPU: asked each 20 ms
    it takes from whom it waits for.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.timeout(timeout_s):
        while not (answer := await question()):
            seldom = min(max(0.02, (loop.time() - began) / 10), 0.1)
            await asyncio.sleep(seldom if every_s is None else every_s)
    return answer


async def insert(
    connection: Any, aggregate: str, *, count: int = 1, event_type: str = "Changed", payload: str = "{}"
) -> None:
    """Events of one aggregate (`order/42`), one statement each."""
    kind, _, name = aggregate.partition("/")
    for _ in range(count):
        await connection.execute(
            "INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload) VALUES ($1, $2, $3, $4)",
            kind,
            name,
            event_type,
            payload,
        )


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection of the test's own."""
    connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


class RelayProcess:
    """`relay run` (or another command) as a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, settings: Settings, *arguments: str) -> RelayProcess:
        """Start it; secrets travel in the environment."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RELAY_")} | {
            "RELAY_SOURCE": settings.source or "",
            "RELAY_POSTGRES_DSN": settings.postgres.dsn.get_secret_value(),
            "RELAY_RABBITMQ_URL": settings.rabbitmq.url.get_secret_value(),
            "RELAY_OUTBOX_PAGE_ROWS": str(settings.outbox.page_rows),
            "RELAY_OUTBOX_CHECKPOINT_INTERVAL_S": str(settings.outbox.checkpoint_interval_s),
            "RELAY_OUTBOX_STANDBY_INTERVAL_S": str(settings.outbox.standby_interval_s),
            "RELAY_DAEMON_BACKOFF_MAX_S": str(settings.daemon.backoff_max_s),
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "relay", *(arguments or ("run",)), env=environment, stderr=asyncio.subprocess.PIPE
        )
        return cls(process)

    async def kill(self) -> None:
        """kill -9."""
        self.process.send_signal(signal.SIGKILL)
        await self.process.communicate()

    async def terminate(self, *, timeout_s: float = 30) -> tuple[int, str]:
        """SIGTERM; (exit code, what it logged)."""
        self.process.send_signal(signal.SIGTERM)
        return await self.wait(timeout_s=timeout_s)

    async def wait(self, *, timeout_s: float = 60) -> tuple[int, str]:
        """(exit code, what it logged)."""
        async with asyncio.timeout(timeout_s):
            _, logged = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, logged.decode()
