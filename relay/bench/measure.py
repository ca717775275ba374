"""One role played by a child between two looks at the servers' processor time; and what every stage verifies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from relay.bench.children import Child, child
from relay.bench.figures import Latency, MeasurementFailed, Result
from relay.bench.proc import listener, tree_cpu_s
from relay.bench.servers import Servers
from relay.event_loop import EventLoop
from relay.postgres.connect import connection
from relay.postgres.queries import query
from relay.rabbitmq.session import broker_errors, close, connect
from relay.rabbitmq.topology import exchange
from relay.settings import Settings

_SETTLED_S = 10.0
"""Longest time in which a queue's count must be what was confirmed, or acknowledged: acknowledgements are not answered."""

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements have in common."""

    servers: Servers
    event_loop: EventLoop = "uvloop"  # of our processes

    @asynccontextmanager
    async def child(self, role: str, settings: Settings, **spec: Any) -> AsyncIterator[Child]:
        """A process in its role, ready."""
        async with child(role, settings, event_loop=self.event_loop, **spec) as made:
            yield made

    async def play(
        self, settings: Settings, role: str, *, stage: str, variant: str, process: str, served: int, **spec: Any
    ) -> Result:
        """A measurement that is one role of one process. The servers' processor time is that for `served` events."""
        async with self.child(role, settings, **spec) as made:
            clock = ServersClock(settings)
            answer = await made.ask("go")
            servers = clock.us_per(served)
        return Result(
            stage=stage,
            variant=variant,
            events=answer["events"],
            seconds=answer["seconds"],
            cpu_us={process: answer["cpu_s"] / answer["events"] * 1e6, **servers},
            rss_mib={process: answer["rss_mib"]},
            more={name: answer[name] for name in ("whole_s",) if name in answer},
        )


class ServersClock:
    """Processor time of PostgreSQL and RabbitMQ since this was made, where they run on this machine."""

    def __init__(self, settings: Settings) -> None:
        self._pids = {
            "postgresql": _server(settings.postgres.dsn.get_secret_value(), 5432, "postgres"),
            "rabbitmq": _server(settings.rabbitmq.url.get_secret_value(), 5672, "beam.smp"),
        }
        self._before = self._look()

    def us_per(self, events: int) -> dict[str, float | None]:
        """Microseconds an event, by server; None where it is not to be had."""
        found: dict[str, float | None] = {}
        for name, after in self._look().items():
            before = self._before[name]
            found[name] = None if before is None or after is None else (after - before) / events * 1e6
        return found

    def _look(self) -> dict[str, float | None]:
        return {name: None if pid is None else tree_cpu_s(pid) for name, pid in self._pids.items()}


def _server(url: str, port: int, program: str) -> int | None:
    parts = urlsplit(url)
    return listener(parts.port or port, program) if parts.hostname in _LOOPBACK else None


async def declare_bound_queue(settings: Settings, kind: str) -> None:
    """A queue that receives all and that nobody consumes: what a relay publishes into."""
    broker = await connect(settings.rabbitmq, name="relay bench")
    try:
        with broker_errors("declaring the benchmark's queue"):
            channel = await broker.channel()
            target = await exchange(channel, settings.rabbitmq)
            queue = await channel.declare_queue(queue_name(settings), durable=True, arguments={"x-queue-type": kind})
            await queue.bind(target, "#")
    finally:
        await close(broker)


def queue_name(settings: Settings) -> str:
    """The one queue of a measurement."""
    return settings.inbox.queue or "bench"


async def require_in_queue(settings: Settings, expected: int) -> None:
    """Raise MeasurementFailed unless the queue holds exactly so many messages."""
    clock = asyncio.get_running_loop().time
    broker = await connect(settings.rabbitmq, name="relay bench")
    try:
        with broker_errors("counting the benchmark's queue"):
            channel = await (await broker.channel(publisher_confirms=False)).get_underlay_channel()
            until = clock() + _SETTLED_S
            while (
                found := (await channel.queue_declare(queue_name(settings), passive=True)).message_count
            ) != expected:
                if clock() > until:
                    raise MeasurementFailed(f"the queue holds {found} messages, not {expected}")
                await asyncio.sleep(0.05)
    finally:
        await close(broker)


async def require_in_log(settings: Settings, events: int) -> None:
    """Raise MeasurementFailed unless the log has so many events, none of them parked."""
    found = await _one(settings, "bench_verify_outbox")
    if (found["events"], found["parked"]) != (events, 0):
        raise MeasurementFailed(f"the log has {found['events']} events of {events}, {found['parked']} are parked")


async def require_published(settings: Settings, events: int) -> None:
    """Raise MeasurementFailed unless the log has so many events, none of them parked, and the queue has them all."""
    await require_in_log(settings, events)
    await require_in_queue(settings, events)


async def require_applied(settings: Settings, events: int, *, effects: bool) -> dict[str, float]:
    """Raise MeasurementFailed unless every event was applied once and in order, and nothing waits; what was counted."""
    inbox = await _one(settings, "bench_verify_inbox", settings.inbox.consumer)
    if (inbox["applied"], inbox["held"], inbox["quarantined"]) != (events, 0, 0):
        raise MeasurementFailed(f"the inbox applied {inbox['applied']} of {events}, {dict(inbox)}")
    if not effects:
        return {}
    done = await _one(settings, "bench_verify_effects")
    if (done["effects"], done["out_of_turn"]) != (events, 0):
        raise MeasurementFailed(f"not exactly once in order: {dict(done)} of {events} events")
    return dict(done)


async def _one(settings: Settings, name: str, *values: object) -> Mapping[str, Any]:
    async with connection(settings.postgres, application="relay bench") as opened:
        record = await opened.fetchrow(query(name), *values)
    return dict(record or {})


def delays(stamps: Mapping[int, int], since: Mapping[int, int] | None = None) -> Latency:
    """How long it took from each stamp (or from what `since` says of it) to when it was seen."""
    return Latency.of((end - (at if since is None else since[at])) / 1e9 for at, end in stamps.items())
