"""The demo, top to bottom: servers -> databases -> daemons -> a day of business with faults -> catching up -> the verdict."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import fields
from typing import Any

from rich.console import Console

from relay.demo.conclusion import conclude
from relay.demo.naive import Naive
from relay.demo.screen import INBOX, NAIVE, NAIVE_ALONE, Consumed, Numbers, Screen
from relay.demo.sql import sql
from relay.demo.stage import (
    BILLING_QUEUE,
    DUAL_WRITE_QUEUE,
    NAIVE_QUEUE,
    Cast,
    Options,
    engaged,
    ready,
    throwaway_servers,
    until,
)
from relay.errors import SandboxError
from relay.inbox import Stats
from relay.postgres.connect import Connection, connection

CATCH_UP_TIMEOUT_S = 60.0
QUIET_S = 1.0
"""A consumer whose queue is empty and that was given nothing for so long has done all it will do."""
LOOK_INTERVAL_S = 0.3


async def run(options: Options, console: Console) -> int:
    """The whole demo; returns the exit code. Cancelling it stops everything."""
    screen = Screen(console, plain=options.plain)
    screen.say("a shop and its billing on throwaway servers, with faults on the way")
    with _one_error():
        async with (
            throwaway_servers(screen) as (postgres, rabbitmq),
            engaged(options, postgres, rabbitmq, screen) as cast,
        ):
            screen.say(f"the shop opens: {options.orders} orders in about {options.seconds:g} s, seed {options.seed}")
            on_time = await _business(cast, screen)
            return await conclude(cast, screen, on_time=on_time)


async def _business(cast: Cast, screen: Screen) -> bool:
    """The shop's day, then catching up. False if somebody was not done in time."""
    with screen.live():
        background: list[Coroutine[Any, Any, None]] = [
            cast.audit.run(),
            cast.naive.run(),
            cast.dual_write.run(),
            cast.shop.dual_write.run(),
        ]
        async with _eyes(cast) as eyes, _running(*background, _watching(cast, screen, eyes)):
            async with asyncio.TaskGroup() as day:
                day.create_task(cast.shop.run())
                day.create_task(cast.nemesis.run())
            screen.say("the shop is closed and the faults are over; everybody catches up")
            on_time = await _caught_up(cast, screen)
            for daemon in (*cast.relays, cast.billing):
                await daemon.stop()
            async with cast.looking:
                await _look(cast, eyes)
            return on_time


@asynccontextmanager
async def _eyes(cast: Cast) -> AsyncIterator[dict[str, Connection]]:
    """A connection to the database of each consumer."""
    async with AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(connection(cast.databases[name], application="demo look"))
            for name in (BILLING_QUEUE, NAIVE_QUEUE, DUAL_WRITE_QUEUE)
        }


@asynccontextmanager
async def _running(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """The background: if any of it fails, so does what runs in front of it."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(each) for each in work]
        yield
        for task in tasks:
            task.cancel()


async def _caught_up(cast: Cast, screen: Screen) -> bool:
    """Wait until every event is applied by the inbox and no queue holds anything for anybody."""

    async def done() -> bool:
        if (
            cast.effects["billing"][1] < cast.shop.tally.events
            or await ready(cast.rabbitmq, BILLING_QUEUE, NAIVE_QUEUE, DUAL_WRITE_QUEUE) != 0
        ):
            return False
        before = _given(cast)
        await asyncio.sleep(QUIET_S)
        return before == _given(cast)

    try:
        await until(done, CATCH_UP_TIMEOUT_S, "not everything has arrived in time", cast)
    except SandboxError as error:
        screen.say(str(error))
        return False
    return True


def _given(cast: Cast) -> tuple[int, int, int]:
    return cast.naive.deliveries, cast.dual_write.deliveries, cast.stats.received


async def _watching(cast: Cast, screen: Screen, eyes: Mapping[str, Connection]) -> None:
    """Look at everybody a few times a second, and show it."""
    while True:
        async with cast.looking:
            await _look(cast, eyes)
        screen.update(_numbers(cast))
        await asyncio.sleep(LOOK_INTERVAL_S)


async def _look(cast: Cast, eyes: Mapping[str, Connection]) -> None:
    names = {f.name for f in fields(Stats)}
    for line in cast.billing.news():
        if line.get("event") == "batch":
            cast.stats += Stats(**{name: value for name, value in line.items() if name in names})
    for name, opened in eyes.items():
        for row in await opened.fetch(sql("count_effects")):
            cast.effects[name] = (row["applied"], row["events"])


def _numbers(cast: Cast) -> Numbers:
    tally = cast.shop.tally

    def naive(consumer: Naive) -> Consumed:
        applied, events = cast.effects[consumer.queue]
        return Consumed(delivered=consumer.deliveries, applied=applied, repeated=applied - events)

    applied, events = cast.effects["billing"]
    stats = cast.stats
    return Numbers(
        phase="catching up" if cast.shop.progress >= 1 else "the shop is open",
        progress=cast.shop.progress,
        committed=tally.committed,
        rolled_back=tally.rolled_back,
        events=tally.events,
        at_broker=cast.audit.events,
        copies=cast.audit.copies,
        consumed={
            NAIVE_ALONE: naive(cast.dual_write),
            NAIVE: naive(cast.naive),
            INBOX: Consumed(
                delivered=stats.received,
                applied=applied,
                repeated=applied - events,
                dropped=stats.duplicates,
                early=stats.early,
            ),
        },
    )


@contextmanager
def _one_error() -> Iterator[None]:
    """Of what went wrong at the same time, the first, told as itself."""
    try:
        yield
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from group
