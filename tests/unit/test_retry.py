"""Trying parked rows again does not spin, whatever the number of those that must be tried alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import structlog

from relay.message import Message, Row
from relay.outbox.blocked import Blocked
from relay.outbox.pause import Pauses
from relay.outbox.progress import Progress
from relay.outbox.retry import Retry
from relay.outbox.routing import route
from relay.outbox.store import Due, Store
from relay.rabbitmq.contract import Outcome, Publisher
from relay.settings import OutboxSettings
from tests.unit.test_parking import rows


class Table:
    """Parked rows that are due and never leave: counts how often it is asked."""

    def __init__(self, due: list[Due]) -> None:
        self.rows = due
        self.asked = 0

    async def pauses(self) -> Pauses:
        return Pauses()

    async def blocked(self) -> dict[Any, tuple[int, int]]:
        return {d.row.aggregate: (1, 0) for d in self.rows}

    async def reconcile(self, _pauses: Pauses) -> bool:
        return False

    async def next_attempt_s(self) -> float:
        return -1.0

    async def due(self, _aggregates: int) -> list[Due]:
        self.asked += 1
        return self.rows


class Hanging:
    """A publisher that never answers."""

    lost = None
    message_is_suspect = False

    async def publish(self, messages: Sequence[Message]) -> list[Outcome]:
        await asyncio.Event().wait()
        raise AssertionError


async def test_more_suspects_than_are_tried_alone_at_once_do_not_make_it_spin() -> None:
    table = Table([Due(row, 1, alone=True) for row in rows(*(f"a{n}" for n in range(11)))])

    @asynccontextmanager
    async def probe() -> AsyncIterator[Publisher]:
        yield cast("Publisher", Hanging())

    def message(row: Row) -> Message:
        return route(row, source="s", template="{event_type}")

    store = cast("Store", table)
    retry = Retry(
        store=store,
        blocked=Blocked(store=store, shard=0),
        publisher=cast("Publisher", Hanging()),
        probe=probe,
        message=message,
        settings=OutboxSettings(),
        progress=Progress(),
        wake=lambda: None,
        log=structlog.get_logger(),
    )
    await retry.look()
    for _ in range(50):
        await retry.step()
    assert table.asked == 2  # once to begin, once to see that the eleventh must wait
    assert retry.within(60) > 0.5
    await retry.close()
