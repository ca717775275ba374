"""Consuming, bare statements, and the inbox that does both."""

from __future__ import annotations

from dataclasses import replace

from relay.bench.clients import inbox_queue
from relay.bench.figures import Result
from relay.bench.measure import Bench, require_applied, require_in_queue
from relay.bench.roles.messages import Filled, publish_log
from relay.bench.workload import Workload
from relay.rabbitmq.queues import ensure_queue
from relay.rabbitmq.session import close, connect
from relay.settings import Settings

DISORDER = 0.1
"""Share of events that come twice, and share that are swapped with their successor."""


async def consume(bench: Bench, load: Workload) -> Result:
    """Ceiling: the same consumer, acknowledging each batch, without the database."""
    async with bench.servers.fresh(load) as settings:
        await _fill_queue(settings, 0.0)
        result = await bench.play(
            settings,
            "consume",
            stage="consume",
            variant="quorum",
            process="inbox",
            served=load.events,
            events=load.events,
        )
        await require_in_queue(settings, 0)
    return result


async def statements(bench: Bench, load: Workload) -> Result:
    """Ceiling: the handler's statement, bare, on one connection."""
    async with bench.servers.fresh(load) as settings:
        return await bench.play(
            settings,
            "statements",
            stage="statements",
            variant="bare",
            process="inbox",
            served=load.events,
            events=load.events,
            aggregates=load.aggregates,
        )


async def apply(bench: Bench, load: Workload, handler: str, *, share: float) -> Result:
    """`relay inbox run` over a filled queue. `more`: how many came twice or swapped, and the effects."""
    async with bench.servers.fresh(load) as settings:
        filled = await _fill_queue(settings, share)
        result = await bench.play(
            settings,
            "apply",
            stage="apply",
            variant=f"{handler}-disorder" if share else handler,
            process="inbox",
            served=load.events,
            handler=handler,
            events=load.events,
            deliveries=filled.deliveries,
        )
        effects = await require_applied(settings, load.events, effects=handler in ("batch", "statement"))
        await require_in_queue(settings, 0)
    disorder = {"duplicates": filled.duplicates, "swaps": filled.swaps} if share else {}
    return replace(result, more={**disorder, **effects})


async def declare_inbox_queue(settings: Settings) -> None:
    """As the inbox would itself, before anything is published into it."""
    broker = await connect(settings.rabbitmq, name="relay bench")
    try:
        await ensure_queue(broker, settings.rabbitmq, inbox_queue(settings))
    finally:
        await close(broker)


async def _fill_queue(settings: Settings, share: float) -> Filled:
    """Publish the log's events into the inbox's queue, not measured."""
    await declare_inbox_queue(settings)
    filled = await publish_log(settings, share=share)
    await require_in_queue(settings, filled.deliveries)
    return filled
