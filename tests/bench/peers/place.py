"""Where a contender runs: a fresh database, an empty virtual host, a bound queue, its process, and what it cost."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aio_pika
import asyncpg
from aio_pika.abc import AbstractChannel

from relay.postgres.connect import Connection
from relay.sandbox import Postgres, RabbitMQ
from tests.bench import textbook
from tests.bench.peers.contenders import Contender
from tests.bench.peers.install import Installed

ROOT = Path(__file__).parents[3]
DRIVERS = Path(__file__).parent / "drivers"

QUEUE = "bench"
OURS = "relay.events"
EXCHANGE = "peers.events"
EXCHANGES = (OURS, EXCHANGE, textbook.EXCHANGE)

PREPARE_S = 120.0
STOP_S = 60.0


class Failed(Exception):
    """A contender's process ended with an error, or what it did was not what it should have done."""


@dataclass(frozen=True, slots=True)
class Place:
    """One run's own corner of the servers."""

    dsn: str
    url: str

    def environment(self, contender: Contender) -> dict[str, str]:
        """For ours, the textbook and the drivers alike; nothing of the caller's RELAY_* or PG* variables."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RELAY_", "PG", "NODE_"))}
        addresses = {
            "RELAY_POSTGRES_DSN": self.dsn,
            "RELAY_RABBITMQ_URL": self.url,
            "RELAY_SOURCE": "bench",
            "RELAY_DAEMON_LOG_LEVEL": "warning",
            "TEXTBOOK_DSN": self.dsn,
            "TEXTBOOK_URL": self.url,
            "PEER_DSN": self.dsn,
            "PEER_URL": self.url,
            "PEER_QUEUE": QUEUE,
            "PEER_EXCHANGE": EXCHANGE,
            "NODE_ENV": "production",
        }
        path = {"PYTHONPATH": str(ROOT)} if contender.packages is None else {}
        return clean | addresses | path | dict(contender.environment)

    def command(self, contender: Contender, installed: Installed | None, *verb: str) -> list[str]:
        """What is started: a module of this tree, or a driver in the packages' own environment."""
        if installed is None:
            return [sys.executable, "-m", *contender.arguments]
        return [*installed.command(DRIVERS / contender.driver), *verb, *contender.arguments]

    async def prepare(self, contender: Contender, installed: Installed) -> None:
        """The driver's own verb: the package's tables, as the package makes them. Raises Failed."""
        process = await self._start(contender, self.command(contender, installed, "prepare"))
        async with asyncio.timeout(PREPARE_S):
            _, said = await process.communicate()
        if process.returncode != 0:
            raise Failed(f"{contender.name}: prepare ended with {process.returncode}: {said.decode()[-800:]}")

    @asynccontextmanager
    async def running(self, contender: Contender, installed: Installed | None) -> AsyncIterator[Program]:
        """Its process; at the end it is stopped and its exit code looked at. Raises Failed."""
        verb = ("run",) if installed is not None else ()
        program = Program(contender, await self._start(contender, self.command(contender, installed, *verb)))
        try:
            yield program
            await program.finish()
        finally:
            await program.kill()

    async def _start(self, contender: Contender, command: Sequence[str]) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *command,
            env=self.environment(contender),
            cwd=ROOT if contender.packages is None else "/",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )


class Program:
    """A contender's process."""

    def __init__(self, contender: Contender, process: asyncio.subprocess.Process) -> None:
        self._contender = contender
        self._process = process
        self._before = _children()
        self._said = asyncio.create_task(self._read())
        self.cpu_s = 0.0  # of the process and its own children, known after `finish`

    def alive(self) -> bool:
        """False when nobody is there any more who could publish or apply."""
        return self._process.returncode is None

    async def finish(self) -> None:
        """Wait for its end, or ask for it. Raises Failed for an exit code that is neither 0 nor the signal's."""
        if not self._contender.ends and self.alive():
            self._process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOP_S):
            code = await self._process.wait()
        self.cpu_s = _children() - self._before
        if code not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
            raise Failed(f"{self._contender.name} ended with {code}: {await self._said}")

    async def kill(self) -> None:
        """If it still runs."""
        if self.alive():
            self._process.kill()
            await self._process.wait()
        await self._said

    async def _read(self) -> str:
        """The end of what it said; all of it is read, so that it never waits for us."""
        assert self._process.stderr is not None
        last = b""
        while part := await self._process.stderr.read(65536):
            last = (last + part)[-1500:]
        return last.decode(errors="replace")


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@asynccontextmanager
async def place(postgres: Postgres, rabbitmq: RabbitMQ, name: str) -> AsyncIterator[Place]:
    """A fresh database and virtual host, both gone at the end, replication slots as well."""
    dsn = await asyncio.to_thread(postgres.create_database, name)
    url = await asyncio.to_thread(rabbitmq.create_vhost, name)
    try:
        yield Place(dsn, url)
    finally:
        await asyncio.to_thread(rabbitmq.delete_vhost, name)
        async with connected(dsn) as db:
            await db.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = current_database() AND NOT active"
            )
        await asyncio.to_thread(postgres.drop_database, name)


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[Connection]:
    """A connection of the measuring process."""
    db: Connection = await asyncpg.connect(dsn, command_timeout=600)
    try:
        yield db
    finally:
        await db.close()


@asynccontextmanager
async def channel(url: str) -> AsyncIterator[AbstractChannel]:
    """A channel of the measuring process."""
    broker = await aio_pika.connect(url)
    try:
        yield await broker.channel()
    finally:
        await broker.close()


async def bound_queue(opened: AbstractChannel, queue_type: str) -> None:
    """One durable queue of the type, bound to everything on the exchange of each contender."""
    arguments: dict[str, Any] = {"x-queue-type": queue_type}
    queue = await opened.declare_queue(QUEUE, durable=True, arguments=arguments)
    for name in EXCHANGES:
        exchange = await opened.declare_exchange(name, aio_pika.ExchangeType.TOPIC, durable=True)
        await queue.bind(exchange, "#")


async def depth(opened: AbstractChannel) -> int:
    """Messages in the queue that nobody holds."""
    return (await opened.declare_queue(QUEUE, passive=True)).declaration_result.message_count or 0
