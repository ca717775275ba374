"""The whole benchmark: servers, rounds in which every stage has its turn, and what is left of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from relay.bench.figures import Key, MeasurementFailed, Result
from relay.bench.machine import Place, look
from relay.bench.measure import Bench
from relay.bench.plan import Step, steps
from relay.bench.servers import OwnBroker, OwnPostgres, Servers, Vhosts
from relay.bench.workload import Workload
from relay.event_loop import EventLoop
from relay.postgres.connect import connection
from relay.sandbox import find_postgres, find_rabbitmq
from relay.settings import Settings

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was asked for."""

    loads: tuple[Workload, ...]
    stages: tuple[str, ...] = ()  # none: all
    rounds: int = 3
    own_servers: bool = False
    event_loop: EventLoop = "uvloop"


@dataclass(frozen=True, slots=True)
class Measured:
    """One workload: what was measured, and what each round found."""

    load: Workload
    steps: tuple[Step, ...]
    rounds: tuple[dict[Key, Result], ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured, where, with what."""

    place: Place
    options: Options
    settings: Settings
    measured: tuple[Measured, ...]


async def measure(options: Options, settings: Settings, *, tell: Tell) -> Report:
    """Every stage once in every round, one after the other. Raises MeasurementFailed, told where, for one that cannot verify.

    Throwaway servers keep the defaults that matter: fsync on, messages persistent, every one confirmed.
    """
    loads = tuple(load.bounded() for load in options.loads)
    rounds: dict[Workload, list[dict[Key, Result]]] = {load: [] for load in loads}
    async with _servers(options, settings, tell) as servers:
        bench = Bench(servers, options.event_loop)
        place = await _place(servers)
        for turn in range(1, options.rounds + 1):
            for load, found in rounds.items():
                tell(f"round {turn} of {options.rounds}: {load.name}")
                found.append(await _round(bench, load, options, tell))
    measured = tuple(Measured(load, tuple(steps(options.stages, load)), tuple(found)) for load, found in rounds.items())
    return Report(place, options, settings, measured)


async def _round(bench: Bench, load: Workload, options: Options, tell: Tell) -> dict[Key, Result]:
    found: dict[Key, Result] = {}
    for step in steps(options.stages, load):
        tell(f"  {step.told}")
        try:
            result = await step.run(bench, load)
        except MeasurementFailed as exc:
            raise MeasurementFailed(f"{step.stage}, {step.variant} ({load.name}): {exc}") from exc
        found[result.key] = result
    return found


@asynccontextmanager
async def _servers(options: Options, settings: Settings, tell: Tell) -> AsyncIterator[Servers]:
    if options.own_servers:
        servers = Servers(OwnPostgres(settings.postgres, tell), OwnBroker(settings.rabbitmq, tell), settings)
        async with _closing(servers):
            yield servers
        return
    tell("starting PostgreSQL and RabbitMQ")
    postgres, rabbitmq = find_postgres(), find_rabbitmq()
    try:
        await asyncio.gather(asyncio.to_thread(postgres.start), asyncio.to_thread(rabbitmq.start))
        servers = Servers(postgres, Vhosts(rabbitmq), settings)
        async with _closing(servers):
            yield servers
    finally:
        await asyncio.gather(asyncio.to_thread(postgres.stop), asyncio.to_thread(rabbitmq.stop))


@asynccontextmanager
async def _closing(servers: Servers) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await servers.close()


async def _place(servers: Servers) -> Place:
    async with servers.fresh() as settings, connection(settings.postgres, application="relay bench") as opened:
        return await look(opened, settings)
