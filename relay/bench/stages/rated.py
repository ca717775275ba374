"""Producers at a given rate, in processes of their own: what every stage with a rate begins with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from relay.bench.children import Child
from relay.bench.figures import Latency, MeasurementFailed
from relay.bench.measure import Bench, delays
from relay.bench.roles.producers import shares
from relay.bench.workload import Workload
from relay.postgres.connect import connection
from relay.postgres.queries import query
from relay.settings import Settings

_PROCESSES = 2
_CAUGHT_UP_S = 120.0
_LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class Pace:
    """How events come: so many transactions a second, each with so many events of one aggregate."""

    transactions: int
    per_s: float
    rows_each: int = 1
    connections: int = 8

    @property
    def events(self) -> int:
        """In all."""
        return self.transactions * self.rows_each


@dataclass(frozen=True, slots=True)
class Produced:
    """What the producers did."""

    seconds: float  # until the last of them was ready
    busy_s: float  # sum over transactions
    late_s: float  # how far behind its time the latest transaction began
    cpu_s: float
    rss_mib: float | None  # of the largest of the processes
    commits: dict[int, int]  # stamp -> when its commit was in hand, ns

    @property
    def transactions(self) -> Latency:
        """How long a transaction takes its producer."""
        return delays(self.commits)


@asynccontextmanager
async def producers(bench: Bench, settings: Settings, load: Workload, pace: Pace) -> AsyncIterator[Sequence[Child]]:
    """The producers' processes, ready."""
    processes = min(_PROCESSES, pace.connections)
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                bench.child(
                    "produce",
                    settings,
                    index=index,
                    processes=processes,
                    transactions=transactions,
                    connections=connections,
                    per_s=pace.per_s / processes,
                    rows_each=pace.rows_each,
                    aggregates=load.aggregates,
                    fill=load.fill,
                )
            )
            for index, (transactions, connections) in enumerate(
                zip(shares(pace.transactions, processes), shares(pace.connections, processes), strict=True)
            )
        ]


async def produce(children: Sequence[Child], pace: Pace) -> Produced:
    """Let them go, and wait for all. Raises MeasurementFailed if a transaction is missing."""
    answers = await asyncio.gather(*(each.ask("go") for each in children))
    commits = {at: end for answer in answers for at, end in answer["stamps"]}
    if len(commits) != pace.transactions:
        raise MeasurementFailed(f"the producers committed {len(commits)} transactions of {pace.transactions}")
    memory = [answer["rss_mib"] for answer in answers if answer["rss_mib"] is not None]
    return Produced(
        seconds=max(answer["seconds"] for answer in answers),
        busy_s=sum(answer["busy_s"] for answer in answers),
        late_s=max(answer["late_s"] for answer in answers),
        cpu_s=sum(answer["cpu_s"] for answer in answers),
        rss_mib=max(memory, default=None),
        commits=commits,
    )


async def open_accounts(settings: Settings, load: Workload) -> None:
    """What the producers change beside their events."""
    async with connection(settings.postgres, application="relay bench") as opened:
        await opened.execute(query("bench_accounts"), load.aggregates)


async def warm_up(settings: Settings, load: Workload) -> None:
    """One event, so that everybody is connected and at work before the first one that counts."""
    async with connection(settings.postgres, application="relay bench") as opened:
        await opened.execute(query("bench_produce"), 0, 1, 0, load.fill)


async def until_counted(watched: Child, name: str, expected: int) -> float:
    """Wait until a child counts so many; the seconds that took. Raises MeasurementFailed after two minutes."""
    clock = asyncio.get_running_loop().time
    started, found = clock(), -1
    while clock() - started < _CAUGHT_UP_S:
        answer: dict[str, Any] = await watched.ask("count")
        found = answer[name]
        if found >= expected:
            return clock() - started
        await asyncio.sleep(_LOOK_S)
    raise MeasurementFailed(f"{name}: {found} of {expected} after {_CAUGHT_UP_S:g} s")
