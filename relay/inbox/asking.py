"""Asks relays to send something again, over a connection that is opened when there is something to ask."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from relay.control import MAX_NUMBERS, MAX_RANGES, Range, RepairRequest, repair_message
from relay.errors import BrokerError
from relay.inbox.sequencer import Key
from relay.message import Message
from relay.rabbitmq.contract import Confirmed, Outcome, Returned
from relay.rabbitmq.control_topology import RepairQueue, repair_exchange
from relay.rabbitmq.stock_publisher import StockPublisher
from relay.settings import Settings

_CONFIRM_TIMEOUT_S = 10.0
_KEPT_S = 30.0
"""How long the connection is kept after the last request."""


class Asker:
    """The requests of one consumer. What cannot be asked is told as a text, not raised: it is asked again later anyway."""

    def __init__(self, settings: Settings, *, consumer: str, queue: str) -> None:
        self._settings = settings
        self._consumer = consumer
        self._queue = queue
        self._clock = asyncio.get_running_loop().time
        self._publisher: StockPublisher | None = None
        self._asked_at = 0.0

    async def ask(self, missing: Mapping[Key, Sequence[Range]]) -> dict[Key, str]:
        """Ask for these numbers; return, for those that could not be asked for, why."""
        requests = list(_requests(missing))
        self._asked_at = self._clock()
        messages = [
            repair_message(
                RepairRequest(consumer=self._consumer, reply_to=self._queue, ranges=tuple(ranges)),
                source=source,
                at=datetime.now(UTC),
            )
            for source, ranges in requests
        ]
        try:
            outcomes = await self._publish(messages)
        except BrokerError as exc:
            return dict.fromkeys(missing, f"cannot be asked for: {exc}")
        details: dict[Key, str] = {}
        for (source, ranges), outcome in zip(requests, outcomes, strict=True):
            if not isinstance(outcome, Confirmed):
                detail = _why_not(outcome, source)
                details |= {(source, *r.aggregate): detail for r in ranges}
        return details

    async def dead_letters(self) -> int | None:
        """How many messages of the consumer's queue the broker has set aside; None if that cannot be seen."""
        try:
            return await (await self._open()).messages_in(f"{self._queue}.dead")
        except BrokerError:
            return None

    async def rest(self) -> None:
        """There is nothing to ask: give the connection back after a while."""
        if self._publisher is not None and self._clock() - self._asked_at > _KEPT_S:
            await self.close()

    async def close(self) -> None:
        """Say goodbye within a bounded time. Never raises."""
        if self._publisher is not None:
            closing, self._publisher = self._publisher, None
            await closing.close()

    async def _publish(self, messages: Sequence[Message]) -> list[Outcome]:
        return await (await self._open()).publish(messages)

    async def _open(self) -> StockPublisher:
        if self._publisher is not None and self._publisher.lost is not None:
            await self.close()
        if self._publisher is None:
            self._publisher = await StockPublisher.open(
                self._settings.rabbitmq,
                confirm_timeout_s=_CONFIRM_TIMEOUT_S,
                name=f"relay inbox {self._consumer}, repair",
                target=repair_exchange,
            )
        return self._publisher


def _requests(missing: Mapping[Key, Sequence[Range]]) -> Iterator[tuple[str, list[Range]]]:
    """(source, ranges) of each request: at most as much as one may hold."""
    by_source: dict[str, list[Range]] = {}
    for key, ranges in missing.items():
        by_source.setdefault(key[0], []).extend(ranges)
    for source, ranges in by_source.items():
        request: list[Range] = []
        numbers = 0
        for r in ranges:
            if request and (len(request) == MAX_RANGES or numbers + len(r) > MAX_NUMBERS):
                yield source, request
                request, numbers = [], 0
            request.append(r)
            numbers += len(r)
        yield source, request


def _why_not(outcome: Outcome, source: str) -> str:
    if isinstance(outcome, Returned):
        return (
            f"nobody answers for source {source}: there is no queue {RepairQueue(source=source).name}, which its "
            "`relay run` declares unless outbox.repair is off"
        )
    return f"cannot be asked for: {outcome}"
