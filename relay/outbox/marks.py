"""Tells inboxes how far each aggregate has been published, so that a lost last message is missed as well.

Recently published aggregates are told every two seconds, and an endless slow sweep tells all that the log retains: a mark
that was lost together with its events is followed by another. Now and then it tells as well of aggregates of which nothing is
retained any more, in messages of their own: whoever has applied something of them then notices that the rest cannot be had.

Runs beside the pipeline, on connections of its own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from relay.control import MARKS, MAX_MARKS, Mark, Marks, marks_message
from relay.errors import BrokerRefused, BrokerUnavailable
from relay.failpoints import Point, reached
from relay.message import Aggregate, Message, Row
from relay.outbox.recent import Newest, Recent
from relay.outbox.routing import routing_key
from relay.postgres.connect import Connection, connection
from relay.postgres.errors import postgres_errors
from relay.postgres.queries import query
from relay.rabbitmq.contract import Publisher
from relay.rabbitmq.control_topology import marks_exchange, marks_exchange_name
from relay.rabbitmq.stock_publisher import StockPublisher
from relay.services import refusals
from relay.settings import Settings

log = structlog.get_logger()

_MESSAGES = 100
"""Messages of one pass: where every aggregate has a routing key of its own, marks must not become half of the traffic."""

_SWEEP_AGGREGATES = 2000
"""Aggregates that one pass of the sweep looks at: some 40 ms of the server's time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How often marks are published (s)."""

    interval_s: float = 2.0  # between two passes
    sweep_s: float = 60.0  # least duration of one sweep over all aggregates
    history_s: float = 3600.0  # between sweeps that tell also of what is not retained any more: it may be much


class MarksService:
    """The marks of one shard. `run` is for relay.services: it ends only by an error or by being cancelled."""

    def __init__(
        self, settings: Settings, *, shard: int, source: str, recent: Recent, pace: Pace | None = None
    ) -> None:
        self._settings = settings
        self._shard = shard
        self._source = source
        self._recent = recent
        self._pace = pace or Pace()
        self._clock = asyncio.get_running_loop().time
        self._told_unavailable = False
        self._refusals = refusals()
        self._waiting: deque[Message] = deque()  # of what is recent
        self._swept_waiting: deque[Message] = deque()  # of the sweep
        self._swept: Aggregate | None = ("", "")  # where the sweep goes on; None: it is done
        self._sweep_at = 0.0
        self._history_at = 0.0
        self._tells_history = False  # this sweep does
        self.published = 0  # messages

    async def run(self) -> None:
        """Publish marks. Raises BrokerError or PostgresError when a connection broke: to be run again."""
        self._recent.wanted = True
        try:
            async with connection(self._settings.postgres, application="relay marks") as opened, self._open() as target:
                self._told_unavailable, self._refusals = False, refusals()
                while True:
                    await self._pass(opened, target)
                    await asyncio.sleep(self._pace.interval_s)
        except BrokerRefused as exc:
            if not self._told_unavailable:
                log.warning(
                    "marks_unavailable",
                    exchange=marks_exchange_name(self._settings.rabbitmq),
                    reason=str(exc),
                    effect="inboxes do not notice a lost last event of an aggregate",
                )
            self._told_unavailable = True
            await asyncio.sleep(self._refusals.next_s())
        finally:
            self._recent.wanted = False

    async def _pass(self, opened: Connection, target: Publisher) -> None:
        """What is recent first, and half of it is the sweep's, which goes on only where nothing of it is left waiting."""
        self._waiting.extend(self._messages(self._recent.take()))
        if not self._swept_waiting and len(self._waiting) < _MESSAGES:
            self._swept_waiting.extend(await self._sweep(opened))
        while len(self._waiting) > _MESSAGES * 10:  # a mark that is left out is told by the sweep
            self._waiting.popleft()
        portion = _taken(self._waiting, max(_MESSAGES // 2, _MESSAGES - len(self._swept_waiting)))
        portion += _taken(self._swept_waiting, _MESSAGES - len(portion))
        if not portion:
            return
        await target.publish(portion)  # what becomes of one mark is not worth asking: there will be another
        reached(Point.MARKS_PUBLISHED)
        if target.lost is not None:
            raise BrokerUnavailable(f"the session with RabbitMQ ended while publishing marks: {target.lost}")
        self.published += len(portion)

    async def _sweep(self, opened: Connection) -> list[Message]:
        now = self._clock()
        if self._swept is None:
            if now < self._sweep_at:
                return []
            self._swept = ("", "")
        if self._swept == ("", ""):
            self._sweep_at = now + self._pace.sweep_s
            self._tells_history = now >= self._history_at
            if self._tells_history:
                self._history_at = now + self._pace.history_s
        with postgres_errors():
            records = await opened.fetch(query("sweep_aggregates"), self._shard, *self._swept, _SWEEP_AGGREGATES)
        full = len(records) == _SWEEP_AGGREGATES
        self._swept = (records[-1]["aggregate_type"], records[-1]["aggregate_id"]) if full else None
        retained = [
            Newest((r["aggregate_type"], r["aggregate_id"]), r["seq"], r["event_type"], r["routing_key"])
            for r in records
            if r["seq"] is not None
        ]
        history = [  # how its events were addressed is gone with them: the template's key, as for an event of this name
            Newest((r["aggregate_type"], r["aggregate_id"]), r["last_seq"], MARKS, None)
            for r in records
            if self._tells_history and r["last_seq"] is not None
        ]
        return self._messages(retained) + self._messages(history, retained=False)

    def _messages(self, newest: Sequence[Newest], *, retained: bool = True) -> list[Message]:
        """Marks by routing key: they reach the queues that the events reached."""
        by_key: dict[str, list[Mark]] = {}
        for one in newest:
            by_key.setdefault(self._key(one), []).append(Mark(*one.aggregate, one.seq))
        at = datetime.now(UTC)
        return [
            marks_message(
                Marks(source=self._source, marks=tuple(marks[i : i + MAX_MARKS]), retained=retained),
                routing_key=key,
                at=at,
            )
            for key, marks in by_key.items()
            for i in range(0, len(marks), MAX_MARKS)
        ]

    def _key(self, newest: Newest) -> str:
        kind, name = newest.aggregate
        row = Row(
            id=0,
            aggregate_type=kind,
            aggregate_id=name,
            seq=newest.seq,
            event_type=newest.event_type,
            content_type="",
            headers={},
            routing_key=newest.routing_key,
            created_at=datetime.now(UTC),
            body=b"",
        )
        return routing_key(row, self._settings.outbox.routing_key)

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Publisher]:
        publisher = await StockPublisher.open(
            self._settings.rabbitmq,
            confirm_timeout_s=self._settings.outbox.confirm_timeout_s,
            name=f"relay marks {self._source} shard {self._shard}",
            target=marks_exchange,
        )
        try:
            yield publisher
        finally:
            await publisher.close()


def _taken(waiting: deque[Message], most: int) -> list[Message]:
    return [waiting.popleft() for _ in range(min(most, len(waiting)))]
