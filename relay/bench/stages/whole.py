"""The whole way: a producer's insert, the relay, the broker, the inbox, the handler's commit; under load, and asleep."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from relay.bench.children import Child
from relay.bench.figures import MeasurementFailed, Result
from relay.bench.measure import Bench, ServersClock, delays, require_applied
from relay.bench.stages.inbox import declare_inbox_queue
from relay.bench.stages.rated import Pace, Produced, open_accounts, produce, producers, until_counted, warm_up
from relay.bench.workload import Workload
from relay.settings import Settings

_SINGLE_UP_TO = 2000
"""Transactions a second: above this rate a transaction has several events (of one aggregate), since each waits for an fsync."""


async def end_to_end(bench: Bench, load: Workload, rate: int) -> Result:
    """Everything running at `rate` events a second. The latency is from just before the producer's statement to the moment
    when the inbox has the commit of the handler's transaction in hand; in `more` the same from the producer's commit on.
    """
    rows_each = 1 if rate <= _SINGLE_UP_TO else -(-rate // 1000)
    pace = Pace(
        max(1, int(rate * load.seconds) // rows_each), rate / rows_each, rows_each=rows_each, connections=load.producers
    )
    async with bench.servers.fresh() as settings, _running(bench, settings, load) as whole:
        clock = ServersClock(settings)
        async with producers(bench, settings, load, pace) as children:
            produced = await produce(children, pace)
        catch_up_s = await until_counted(whole.inbox, "applied", pace.events + 1)
        servers = clock.us_per(pace.events)
        result, handled = await _told(whole, pace, produced, "end-to-end", f"{rate}/s", servers)
        await require_applied(settings, pace.events + 1, effects=False)
    more = {"late_s": max(0.0, produced.late_s), "catch_up_s": catch_up_s}
    since_commit = delays(handled, produced.commits)
    more |= {"from_commit_p50_ms": since_commit.p50_ms, "from_commit_p99_ms": since_commit.p99_ms}
    return replace(result, more=more)


async def asleep(bench: Bench, load: Workload) -> Result:
    """One event at a time, each after the relay has fallen asleep. The latency is from the producer's commit to the handler's.

    In `more` the same from just before the producer's statement, its own commit included.
    """
    pace = Pace(load.samples, 1 / load.interval_s, connections=1)
    async with bench.servers.fresh() as settings, _running(bench, settings, load) as whole:
        await until_counted(whole.relay, "sleeps", 2)  # the second time, after the event that warmed up
        before = (await whole.relay.ask("count"))["sleeps"]
        clock = ServersClock(settings)
        async with producers(bench, settings, load, pace) as children:
            produced = await produce(children, pace)
        await until_counted(whole.inbox, "applied", pace.events + 1)
        servers = clock.us_per(pace.events)
        sleeps = (await whole.relay.ask("count"))["sleeps"] - before
        if sleeps < pace.transactions - 1:
            raise MeasurementFailed(f"the relay fell asleep {sleeps} times between {pace.transactions} events")
        result, handled = await _told(whole, pace, produced, "asleep", "one by one", servers)
        await require_applied(settings, pace.events + 1, effects=False)
    since_insert = delays(handled)
    more = {"from_insert_p50_ms": since_insert.p50_ms, "from_insert_p99_ms": since_insert.p99_ms}
    return replace(result, more=more, latency=delays(handled, produced.commits))


@dataclass(frozen=True, slots=True)
class _Whole:
    """Both daemons, at work."""

    relay: Child
    inbox: Child


@asynccontextmanager
async def _running(bench: Bench, settings: Settings, load: Workload) -> AsyncIterator[_Whole]:
    await open_accounts(settings, load)
    await declare_inbox_queue(settings)
    async with (
        bench.child("relay", settings, drain=False) as relay,
        bench.child("apply", settings, handler="stamp", events=0) as inbox,
    ):
        await relay.tell("go")
        await inbox.tell("go")
        await warm_up(settings, load)
        await until_counted(inbox, "applied", 1)
        yield _Whole(relay, inbox)


async def _told(
    whole: _Whole, pace: Pace, produced: Produced, stage: str, variant: str, servers: dict[str, float | None]
) -> tuple[Result, dict[int, int]]:
    """End both daemons; what they tell, and when each transaction's last event was handled."""
    relay: dict[str, Any] = await whole.relay.ask("stop")
    inbox: dict[str, Any] = await whole.inbox.ask("stop")
    handled = {at: end for at, end in inbox["stamps"] if at}  # 0: the event that warmed up
    if handled.keys() != produced.commits.keys():
        raise MeasurementFailed(f"{len(handled)} transactions were handled, of {pace.transactions}")
    result = Result(
        stage=stage,
        variant=variant,
        events=pace.events,
        seconds=produced.seconds,
        latency=delays(handled),
        cpu_us={
            "producers": produced.cpu_s / pace.events * 1e6,
            "relay": relay["cpu_s"] / pace.events * 1e6,
            "inbox": inbox["cpu_s"] / pace.events * 1e6,
            **servers,
        },
        rss_mib={"producers": produced.rss_mib, "relay": relay["rss_mib"], "inbox": inbox["rss_mib"]},
    )
    return result, handled
