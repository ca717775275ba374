"""Producers at a steady pace with a burst now and then, probes received, windows taken: one running comparison."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aio_pika
import asyncpg
import psutil
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

from relay.postgres.connect import Connection
from tests.bench.endurance.sides import Side, sizes
from tests.bench.endurance.windows import PROBE_EVERY, Burst, Meter, Window

KEPT = 10_000
"""Messages that the queues beside the probes' keep: RabbitMQ's own cost stays flat, and the disk free."""

UP_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is done, times in seconds since the start of the load."""

    seconds: float
    hold: tuple[float, float]
    rate: int  # events a second, for each side
    rows: int = 20  # of one statement, a transaction of its own
    aggregates: int = 1000
    fill_bytes: int = 200
    window_s: float = 5.0
    burst: int = 10_000
    burst_every_s: float = 60.0  # each side once in this time, half of it apart; 0: none

    def bursts(self, number: int) -> list[float]:
        """When the number-th side (0 or 1) gets one: never while the hold begins or ends, nor at the very end."""
        if not self.burst_every_s:
            return []
        step = self.burst_every_s
        first = step * (0.25 + 0.5 * number)
        return [
            first + step * n for n in range(int(self.seconds / step) + 1) if first + step * n < self.seconds - step / 4
        ]


@dataclass(slots=True)
class Comparison:
    """Both sides, running."""

    plan: Plan
    dsn: str
    url: str
    sides: Sequence[Side]
    meters: dict[str, Meter] = field(init=False)
    windows: list[Window] = field(default_factory=list)
    holding: bool = False
    _began: float | None = None
    _up: dict[str, asyncio.Event] = field(init=False)  # by side: something arrived

    def __post_init__(self) -> None:
        self.meters = {side.name: Meter(side.name) for side in self.sides}
        self._up = {side.name: asyncio.Event() for side in self.sides}

    @property
    def bursts(self) -> list[Burst]:
        """Of both sides."""
        return [burst for meter in self.meters.values() for burst in meter.bursts]

    async def run(self) -> None:
        """All of it. Raises when a relay ends early."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._receiving())
            relays = {side.name: await stack.enter_async_context(self._process(side)) for side in self.sides}
            for side in self.sides:
                await self._wait_until_up(side)
            self._began = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for number, side in enumerate(self.sides):
                    group.create_task(self._produce(side, self.plan.bursts(number)))
                group.create_task(self._hold())
                group.create_task(self._watch(relays))

    def now(self) -> float:
        """Seconds since the start of the load."""
        return 0.0 if self._began is None else time.perf_counter() - self._began

    async def _wait_until_up(self, side: Side) -> None:
        """Until probe number 0 has come through."""
        async with _connected(self.dsn) as db, asyncio.timeout(UP_S):
            await db.execute(side.insert, 0, 0, 1, 0, PROBE_EVERY)
            await self._up[side.name].wait()

    async def _produce(self, side: Side, bursts: list[float]) -> None:
        """One connection, one small transaction after the other; what it was late it makes up for."""
        plan, meter = self.plan, self.meters[side.name]
        async with _connected(self.dsn) as db:
            statement = await db.prepare(side.insert)
            number, due = 0, 0.0
            while (now := self.now()) < plan.seconds:
                if bursts and now >= bursts[0]:
                    bursts.pop(0)
                    meter.burst(now, number + plan.burst, held=self.holding)
                    for _ in range(plan.burst // 500):
                        number = await self._insert(statement, meter, number, 500)
                    due = self.now()
                number = await self._insert(statement, meter, number, plan.rows)
                due = max(due + plan.rows / plan.rate, now - 1.0)  # after a long wait: no flood
                await asyncio.sleep(max(due - self.now(), 0))

    async def _insert(self, statement: Any, meter: Meter, number: int, rows: int) -> int:
        began = time.perf_counter()
        await statement.fetch(number + 1, number + rows, self.plan.aggregates, self.plan.fill_bytes, PROBE_EVERY)
        meter.insert(number + rows, time.perf_counter() - began)
        return number + rows

    async def _hold(self) -> None:
        """The session that is forgotten: a snapshot and a transaction id of its own, then nothing."""
        since, until = self.plan.hold
        if until <= since:
            return
        await asyncio.sleep(max(since - self.now(), 0))
        async with _connected(self.dsn) as db:
            await db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            await db.fetchval("SELECT pg_current_xact_id()")
            self.holding = True
            await asyncio.sleep(max(until - self.now(), 0))
            await db.execute("ROLLBACK")
            self.holding = False

    async def _watch(self, relays: dict[str, asyncio.subprocess.Process]) -> None:
        """A window of each side every few seconds."""
        usage = {name: psutil.Process(process.pid) for name, process in relays.items()}
        spent = dict.fromkeys(relays, 0.0)
        then = 0.0
        async with _connected(self.dsn) as db:
            while then < self.plan.seconds - 0.01:
                await asyncio.sleep(max(then + self.plan.window_s - self.now(), 0))
                now = self.now()
                for side in self.sides:
                    if relays[side.name].returncode is not None:
                        raise RuntimeError(f"{side.name} ended with {relays[side.name].returncode}")
                    times = usage[side.name].cpu_times()
                    used, spent[side.name] = times.user + times.system - spent[side.name], times.user + times.system
                    dead, size = await sizes(db, side)
                    self.windows.append(
                        self.meters[side.name].window(
                            now, held=self.holding, relay_cpu=used / (now - then), dead_rows=dead, table_bytes=size
                        )
                    )
                then = now

    @asynccontextmanager
    async def _receiving(self) -> AsyncIterator[None]:
        """Queues for everything, and probes timed as they arrive."""
        broker = await aio_pika.connect(self.url)
        try:
            channel = await broker.channel()
            for side in self.sides:
                await self._bind(channel, side)
            yield
        finally:
            await broker.close()

    async def _bind(self, channel: AbstractChannel, side: Side) -> None:
        exchange = await channel.declare_exchange(side.exchange, aio_pika.ExchangeType.TOPIC, durable=True)
        arguments: dict[str, Any] = {"x-queue-type": "quorum", "x-max-length": KEPT, "x-overflow": "drop-head"}
        rest = await channel.declare_queue(f"{side.name}.rest", durable=True, arguments=arguments)
        await rest.bind(exchange, "bench.Measured")
        probes = await channel.declare_queue(f"{side.name}.probes", durable=True, arguments={"x-queue-type": "quorum"})
        await probes.bind(exchange, "bench.Probe")
        meter = self.meters[side.name]

        async def arrive(message: AbstractIncomingMessage) -> None:
            body = json.loads(message.body)
            self._up[side.name].set()
            quiet = self._began is not None and not any(m.bursting for m in self.meters.values())
            meter.arrive(self.now(), body["n"], time.time() - body["at"], quiet=quiet)

        await probes.consume(arrive, no_ack=True)

    @asynccontextmanager
    async def _process(self, side: Side) -> AsyncIterator[asyncio.subprocess.Process]:
        process = await asyncio.create_subprocess_exec(*side.command, env=side.environment(self.dsn, self.url))
        try:
            yield process
        finally:
            if process.returncode is None:
                process.terminate()
                async with asyncio.timeout(60):
                    await process.wait()


@asynccontextmanager
async def _connected(dsn: str) -> AsyncIterator[Connection]:
    db: Connection = await asyncpg.connect(dsn)
    try:
        yield db
    finally:
        await db.close()
