"""What an operator of RabbitMQ has: a channel, the management API, the daemons' logs, and patience."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import aio_pika
import aiormq.exceptions
from aiormq.abc import AbstractChannel

from relay.errors import SandboxError
from tests.faults.lab.daemons import Daemon
from tests.faults.lab.kinds.processes import frozen
from tests.faults.lab.stage import BROKER_USERS, Stage, both_consume

QUEUE = "effects"
RELAY_USER, CONSUMER_USER = BROKER_USERS

CLOSED_S = 2.0
"""Longest wait until the broker has told them; the list may have some that had gone by themselves."""


@asynccontextmanager
async def channel_to(stage: Stage) -> AsyncIterator[AbstractChannel]:
    """A channel straight to the broker: exact counts at once, where the management API's figures are seconds old."""
    async with await aio_pika.connect(stage.broker.url(), timeout=10) as connection:
        channel = await connection.channel(publisher_confirms=False)
        yield await channel.get_underlay_channel()


@asynccontextmanager
async def nobody_consuming(stage: Stage) -> AsyncIterator[None]:
    """Both consumers stand still: what they have not taken yet stays in the queue."""
    await all_at_work(stage)
    async with frozen(stage, *stage.consumers):
        yield


async def close_connections(stage: Stage, user: str) -> int:
    """Close all connections of a broker's user; how many were told so, as the proxy before them has seen."""
    path = f"/api/connections/username/{user}"
    proxy = stage.relay_amqp if user == RELAY_USER else stage.consumer_amqp
    had, before = json.loads(await api(stage, "GET", path) or b"[]"), proxy.seen["connection_close"]
    await api(stage, "DELETE", path)
    await wait(stage, lambda: proxy.seen["connection_close"] >= before + len(had), timeout_s=CLOSED_S)
    return proxy.seen["connection_close"] - before


async def api(stage: Stage, method: str, path: str, body: dict[str, object] | None = None) -> bytes:
    """The management API; nothing for what is not there."""
    return await asyncio.to_thread(stage.broker.management().request, method, path, body, missing_is_fine=True)


def log_marks(daemons: Sequence[Daemon]) -> list[int]:
    """Where their logs end now."""
    return [daemon.log_mark() for daemon in daemons]


def count_logged(words: re.Pattern[str], daemons: Sequence[Daemon], marks: Sequence[int]) -> int:
    """How often they have logged it since then."""
    return sum(len(words.findall(d.log_since(mark))) for d, mark in zip(daemons, marks, strict=True))


async def all_at_work(stage: Stage) -> None:
    """Wait until the relay publishes and both consumers are on the queue: who is just connecting notices nothing."""
    before = stage.relay_amqp.seen["publish"]

    async def at_work() -> bool:
        return await both_consume(stage) and stage.relay_amqp.seen["publish"] > before

    await require(stage, at_work, "relay and consumers are not at work", 40)


async def wait(stage: Stage, condition: Callable[[], Awaitable[bool] | bool], *, timeout_s: float) -> bool:
    """As `Stage.until`; a broker that does not answer counts as not yet, too."""

    async def asked() -> bool:
        try:
            found = condition()
            return found if isinstance(found, bool) else await found
        except (aiormq.exceptions.AMQPError, SandboxError):
            return False

    return await stage.until(asked, timeout_s=timeout_s)


async def require(stage: Stage, condition: Callable[[], Awaitable[bool]], failure: str, timeout_s: float) -> None:
    """`wait`, or TimeoutError."""
    if not await wait(stage, condition, timeout_s=timeout_s):
        raise TimeoutError(failure)
