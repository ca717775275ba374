"""The broker without the database: raw confirmed publishing, and raw consume-and-acknowledge. The ceilings of relay's two halves."""

from __future__ import annotations

import asyncio
import gc
import random
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from relay.bench.clients import consuming, publishing
from relay.bench.disorder import disordered
from relay.bench.figures import MeasurementFailed
from relay.bench.parent import Meter, Parent
from relay.bench.roles.outbox import pages
from relay.message import AGGREGATE_ID, SEQUENCE, Delivery, Message
from relay.outbox.routing import route
from relay.postgres.connect import connection
from relay.rabbitmq.contract import Confirmed, Outcome, Publisher
from relay.settings import Settings

_WINDOWS, _FULL_WINDOWS = 4, 2
"""Windows under way at once, and so many times `outbox.page_bytes`: what relay.outbox.pipeline allows itself."""


async def publish(settings: Settings, spec: Mapping[str, Any], parent: Parent) -> None:
    """Publish the first `events` of the outbox in the relay's own pages, as many in flight, from messages made beforehand.

    `times`: all of them so often, one time after the other, for more messages than memory should hold (they must be more than what
    is in flight at once). Measured from the first publish to the last confirm.
    """
    windows: list[list[Message]] = []
    left: int = spec["events"]
    async with aclosing(_pages(settings)) as found:
        async for page in found:
            windows.append(page[:left])
            left -= len(windows[-1])
            if not left:
                break
    times: int = spec.get("times", 1)
    gc.freeze()  # the relay never holds so many at once: looking through them again and again would lower the ceiling
    meter = Meter()
    async with publishing(settings) as publisher:
        await parent.go()
        with meter:
            await _publish(publisher, windows * times, page_bytes=settings.outbox.page_bytes)
    parent.tell_measured(meter, events=(spec["events"] - left) * times)


@dataclass(frozen=True, slots=True)
class Filled:
    """What was put into a queue."""

    deliveries: int
    duplicates: int
    swaps: int


async def publish_log(settings: Settings, *, share: float) -> Filled:
    """Publish every event of the outbox; `share` of them swapped with their successors, as many sent once more. Not measured."""
    async with publishing(settings) as publisher:
        if share:
            return await _publish_in_disorder(settings, publisher, share)
        deliveries = 0
        async for page in _pages(settings):
            _require_confirmed(await publisher.publish(page))
            deliveries += len(page)
    return Filled(deliveries, 0, 0)


async def _publish_in_disorder(settings: Settings, publisher: Publisher, share: float) -> Filled:
    """With all messages in memory."""
    messages = [message async for page in _pages(settings) for message in page]
    dice = random.Random(1)  # noqa: S311 - no secret
    plan = disordered(
        messages, key=lambda m: m.headers[AGGREGATE_ID], share=share, window=settings.outbox.page_rows, dice=dice
    )
    for window in plan.windows:  # one after the other: a message that is sent twice must not be under way twice
        _require_confirmed(await publisher.publish(window))
    return Filled(sum(map(len, plan.windows)), plan.duplicates, plan.swaps)


async def consume(settings: Settings, spec: Mapping[str, Any], parent: Parent) -> None:
    """Receive `events` messages in batches like the inbox's, read their properties, acknowledge each batch as a whole.

    The first batch only starts the clock, so that connecting is not measured (unless it is the only one).
    """
    meter, first, received, batch = Meter(), 0, 0, settings.inbox.batch
    await parent.go()
    meter.start()
    async with consuming(settings) as consumer:
        while received < spec["events"]:
            deliveries = await consumer.receive(batch)
            if not received and len(deliveries) < spec["events"]:
                meter.start()
                first = len(deliveries)
            for delivery in deliveries:
                _read(delivery)
            await consumer.acknowledge(deliveries[-1].tag)
            received += len(deliveries)
            meter.stop()
    parent.tell_measured(meter, events=received - first)


async def _pages(settings: Settings) -> AsyncGenerator[list[Message], None]:
    """The log's messages, as the relay makes them, in its pages."""
    source, template = settings.source or "", settings.outbox.routing_key
    async with connection(settings.postgres, application="relay bench") as opened:
        async for page in pages(settings, opened):
            yield [route(row, source=source, template=template) for row in page.rows]


async def _publish(publisher: Publisher, windows: Sequence[Sequence[Message]], *, page_bytes: int) -> None:
    under_way: deque[tuple[int, asyncio.Task[list[Outcome]]]] = deque()
    size = 0
    for window in windows:
        while len(under_way) == _WINDOWS or size >= _FULL_WINDOWS * page_bytes:
            ended, publishing_it = under_way.popleft()
            _require_confirmed(await publishing_it)
            size -= ended
        begun = sum(len(message.body) for message in window)
        under_way.append((begun, asyncio.create_task(publisher.publish(window))))
        size += begun
    for _, publishing_it in under_way:
        _require_confirmed(await publishing_it)


def _require_confirmed(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        if not isinstance(outcome, Confirmed):
            raise MeasurementFailed(f"a message was not confirmed: {outcome}")


def _read(delivery: Delivery) -> tuple[object, ...]:
    """Everything of a delivery that the inbox looks at, so that a lazy reader has to read it."""
    headers = delivery.headers
    return (
        delivery.message_id,
        delivery.event_type,
        delivery.source,
        delivery.content_type,
        delivery.occurred_at,
        delivery.body,
        headers.get(AGGREGATE_ID),
        headers.get(SEQUENCE),
    )
