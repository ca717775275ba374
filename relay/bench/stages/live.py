"""The relay beside producers at work: does it keep up, what does it cost them, how long until a confirm."""

from __future__ import annotations

from relay.bench.figures import MeasurementFailed, Result
from relay.bench.measure import Bench, ServersClock, declare_bound_queue, delays, require_published
from relay.bench.stages.rated import Pace, Produced, open_accounts, produce, producers, until_counted
from relay.bench.workload import Workload
from relay.settings import Settings


async def live(bench: Bench, load: Workload, variant: str) -> Result:
    """Producers at `live_rate`, one UPDATE and `live_rows` events of one aggregate a transaction, into one quorum queue; with the relay,
    or `without`. The latency is from just before the producer's statement to the moment when the relay has the broker's confirm in hand,
    on one clock (relay.bench.stamps). In `more`: `transaction_ms`, its `transaction_p99_ms`, `late_s` (how far producers fell
    behind their times), and with the relay `backlog` (events unconfirmed when the last producer ended) and `catch_up_s`.
    """
    rate, rows = load.live_rate, load.live_rows
    pace = Pace(int(rate * load.seconds), rate, rows_each=rows, connections=load.producers)
    async with bench.servers.fresh() as settings:
        await open_accounts(settings, load)
        await declare_bound_queue(settings, "quorum")
        if variant == "without":
            return await _without(bench, settings, load, pace)
        result = await _with(bench, settings, load, pace)
        await require_published(settings, pace.events)
    return result


async def _without(bench: Bench, settings: Settings, load: Workload, pace: Pace) -> Result:
    async with producers(bench, settings, load, pace) as children:
        clock = ServersClock(settings)
        produced = await produce(children, pace)
        servers = clock.us_per(pace.events)
    return Result(
        stage="live",
        variant="without",
        events=pace.events,
        seconds=produced.seconds,
        cpu_us={"producers": produced.cpu_s / pace.events * 1e6, **servers},
        rss_mib={"producers": produced.rss_mib},
        more=_transactions(produced),
    )


async def _with(bench: Bench, settings: Settings, load: Workload, pace: Pace) -> Result:
    async with (
        bench.child("relay", settings, drain=False, stamps=True) as relay,
        producers(bench, settings, load, pace) as children,
    ):
        clock = ServersClock(settings)
        await relay.tell("go")
        produced = await produce(children, pace)
        backlog = pace.events - (await relay.ask("count"))["confirmed"]
        catch_up_s = await until_counted(relay, "confirmed", pace.events)
        servers = clock.us_per(pace.events)
        answer = await relay.ask("stop")
    confirms = dict(answer["stamps"])
    if confirms.keys() != produced.commits.keys():
        raise MeasurementFailed(f"{len(confirms)} events were confirmed, of {pace.events}")
    return Result(
        stage="live",
        variant="relay",
        events=pace.events,
        seconds=produced.seconds,
        latency=delays(confirms),
        cpu_us={
            "producers": produced.cpu_s / pace.events * 1e6,
            "relay": answer["cpu_s"] / pace.events * 1e6,
            **servers,
        },
        rss_mib={"producers": produced.rss_mib, "relay": answer["rss_mib"]},
        more={**_transactions(produced), "backlog": backlog, "catch_up_s": catch_up_s},
    )


def _transactions(produced: Produced) -> dict[str, float]:
    latency = produced.transactions
    return {
        "transaction_ms": produced.busy_s / latency.samples * 1000,
        "transaction_p99_ms": latency.p99_ms,
        "late_s": max(0.0, produced.late_s),
    }
