"""All stages, one after the other, several rounds; the median round is what is reported."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from relay.bench.stages import Result, apply, drain, insert, wake
from relay.bench.workload import QUEUE_TYPES, Servers, Workload
from relay.sandbox import find_postgres, find_rabbitmq
from relay.settings import Settings


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured, where, with what."""

    machine: str
    workload: Workload
    rounds: int
    results: tuple[Result, ...]  # the median round of each stage

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "machine": self.machine,
            "workload": asdict(self.workload),
            "rounds": self.rounds,
            "results": [asdict(r) | {"rate": round(r.rate, 1)} for r in self.results],
        }


async def measure(workload: Workload, *, rounds: int, announce: Callable[[str], None]) -> Report:
    """Start throwaway servers (with fsync), run every stage `rounds` times interleaved, keep the median by rate."""
    found: dict[str, list[Result]] = {}
    with find_postgres() as postgres, find_rabbitmq() as rabbitmq:
        servers = Servers(postgres, rabbitmq)
        for turn in range(1, rounds + 1):
            for name, stage in _stages(workload).items():
                announce(f"round {turn} of {rounds}: {name}")
                async with servers.fresh(f"relay_bench_{turn}_{len(found)}") as settings:
                    for result in await stage(settings):
                        found.setdefault(f"{result.stage} {result.note}", []).append(result)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    return Report(machine, workload, rounds, tuple(_median(results) for results in found.values()))


def _stages(workload: Workload) -> dict[str, Callable[[Settings], Awaitable[list[Result]]]]:
    async def fill_and_drain(settings: Settings, queue_type: str) -> list[Result]:
        return [await insert(settings, workload), await drain(settings, workload, queue_type=queue_type)]

    async def consume(settings: Settings, statements: bool) -> list[Result]:
        return [await apply(settings, workload, statements=statements)]

    async def latency(settings: Settings) -> list[Result]:
        return [await wake(settings)]

    drains = {f"insert and drain, {kind} queue": lambda s, kind=kind: fill_and_drain(s, kind) for kind in QUEUE_TYPES}
    return {
        **drains,
        "inbox, empty handler": lambda s: consume(s, False),
        "inbox, one statement a message": lambda s: consume(s, True),
        "latency while asleep": latency,
    }


def _median(results: list[Result]) -> Result:
    middle = statistics.median_low(r.rate for r in results)
    return next(r for r in results if r.rate == middle)
