"""Answers inboxes that miss something: sends the rows again from the retained log, or says that they are gone.

Runs beside the pipeline, on connections of its own. A request is acknowledged when it is answered, so that an answer that breaks
off (this relay dies, or stops, or loses a connection) is begun again at once, here or by another relay: the inbox, which cannot
tell that from a slow answer, asks again only half a minute later. A long answer is acknowledged on the way, so as not to be sent
twice, and a request that was delivered before is acknowledged first: whatever becomes of it, an inbox that still misses something
asks again, and no request can be the end of this service more than twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from relay.control import MAX_NUMBERS, MAX_RANGES, Gone, Range, Reason, RepairRequest, gone_message, to_repair_request
from relay.errors import BrokerRefused, BrokerUnavailable
from relay.failpoints import Point, reached
from relay.message import Delivery, Message, NotAnEvent, to_message
from relay.outbox.resend import Place, Rate, Retained, by_size, portions
from relay.postgres.connect import connection
from relay.rabbitmq.contract import Confirmed, Consumer, Nacked, Publisher, Refused, Returned
from relay.rabbitmq.control_topology import RepairQueue
from relay.rabbitmq.lanes import open_consumer
from relay.rabbitmq.stock_publisher import StockPublisher
from relay.rabbitmq.topology import queues
from relay.services import refusals
from relay.settings import Settings

log = structlog.get_logger()

_PREFETCH = 10
_AT_ONCE = 100
"""Rows published in one go: the event loop is the pipeline's as well."""

_LINGER_S = 30.0
"""How long the connections for answering are kept after the last request."""

_REDONE_S = 10.0
"""An answer that breaks off later is not begun again: much of it has arrived, and the inbox asks for the rest."""


@dataclass(frozen=True, slots=True)
class _Answerer:
    """What answering takes."""

    retained: Retained
    publisher: Publisher
    rate: Rate


class Ended(Exception):
    """The asking queue takes nothing: the rest of the request is not worth sending."""


class Repair:
    """The service of one source. `run` is for relay.services: it ends only by an error or by being cancelled."""

    def __init__(self, settings: Settings, *, source: str) -> None:
        self._settings = settings
        self._source = source
        self._queue = RepairQueue(source=source)
        self._told_unavailable = False
        self._refusals = refusals()
        self._clock = asyncio.get_running_loop().time
        self._taken: tuple[Consumer, int] | None = None  # the tag of the request that is to be acknowledged
        self._taken_at = 0.0
        self.answered = 0  # requests
        self.resent = 0  # rows

    async def run(self) -> None:
        """Answer requests. Raises BrokerError or PostgresError when a connection broke: to be run again."""
        try:
            consumer = await open_consumer(
                self._settings.rabbitmq, self._queue, prefetch=_PREFETCH, name=f"relay repair {self._source}"
            )
        except BrokerRefused as exc:
            await self._go_without(exc)
            return
        self._told_unavailable, self._refusals = False, refusals()
        try:
            while True:
                (delivery,) = await consumer.receive(1)
                async with self._answerer() as answerer:
                    await self._answer_all(consumer, delivery, answerer)
        finally:
            await consumer.close()

    async def _go_without(self, refusal: BrokerRefused) -> None:
        if not self._told_unavailable:
            log.warning(
                "repair_unavailable",
                queue=self._queue.name,
                reason=str(refusal),
                effect="inboxes that miss something are not answered",
            )
        self._told_unavailable = True
        await asyncio.sleep(self._refusals.next_s())

    async def _answer_all(self, consumer: Consumer, first: Delivery, answerer: _Answerer) -> None:
        """The first request and those after it, until none has come for a while."""
        delivery: Delivery | None = first
        while delivery is not None:
            self._taken, self._taken_at = (consumer, delivery.tag), self._clock()
            if delivery.redelivered:
                await self._acknowledge()
            reached(Point.REPAIR_TAKEN)
            await self._answer(delivery, answerer)
            reached(Point.REPAIR_ANSWERED)
            await self._acknowledge()
            self.answered += 1
            delivery = await _next(consumer)

    async def _acknowledge(self) -> None:
        """The request that is being answered; once."""
        if self._taken is not None:
            (consumer, tag), self._taken = self._taken, None
            await consumer.acknowledge(tag)

    async def _answer(self, delivery: Delivery, answerer: _Answerer) -> None:
        try:
            request = to_repair_request(delivery)
        except NotAnEvent as exc:
            log.warning("repair_request_refused", reason=exc.reason, detail=exc.detail, size=len(delivery.body))
            return
        before = self.resent
        outcome = "answered"
        gone: list[Range] = []
        try:
            gone = await self._serve(request, answerer)
        except Ended as exc:
            outcome = str(exc)
        log.info(
            "repaired",
            consumer=request.consumer,
            queue=request.reply_to,
            ranges=len(request.ranges),
            sent=self.resent - before,
            gone=sum(map(len, gone)),
            outcome=outcome,
        )

    async def _serve(self, request: RepairRequest, answerer: _Answerer) -> list[Range]:
        """Send what can be sent; return what could not, having said so."""
        known = await answerer.retained.known(request.ranges, numbers=MAX_NUMBERS)
        gone: list[Range] = []
        for portion in portions(known.ranges):
            survey = await answerer.retained.survey(portion)
            for places in by_size(survey.sendable, _AT_ONCE):
                await self._send(places, request.reply_to, answerer)
            gone += survey.gone
        answers: tuple[tuple[Reason, list[Range]], ...] = (
            ("not_retained", gone),
            ("unknown", known.unknown),
            ("beyond", known.beyond),
        )
        for reason, ranges in answers:
            await self._say_gone(Gone(source=self._source, reason=reason, ranges=tuple(ranges)), request, answerer)
        return gone + known.unknown + known.beyond

    async def _send(self, places: Sequence[Place], queue: str, answerer: _Answerer) -> None:
        await answerer.rate.take(len(places))
        rows = await answerer.retained.rows(places)
        await _publish([to_message(row, source=self._source, routing_key=queue) for row in rows], answerer.publisher)
        reached(Point.REPAIR_SENT)
        self.resent += len(rows)
        if self._clock() - self._taken_at > _REDONE_S:
            await self._acknowledge()

    async def _say_gone(self, gone: Gone, request: RepairRequest, answerer: _Answerer) -> None:
        for start in range(0, len(gone.ranges), MAX_RANGES):
            part = Gone(source=gone.source, reason=gone.reason, ranges=gone.ranges[start : start + MAX_RANGES])
            message = gone_message(part, reply_to=request.reply_to, at=datetime.now(UTC))
            await _publish([message], answerer.publisher)

    @asynccontextmanager
    async def _answerer(self) -> AsyncIterator[_Answerer]:
        async with connection(self._settings.postgres, application="relay repair") as opened:
            publisher = await StockPublisher.open(
                self._settings.rabbitmq,
                confirm_timeout_s=self._settings.outbox.confirm_timeout_s,
                name=f"relay repair {self._source}, answers",
                target=queues,
            )
            try:
                yield _Answerer(Retained(opened), publisher, Rate(self._settings.outbox.repair_rate))
            finally:
                await publisher.close()


async def _next(consumer: Consumer) -> Delivery | None:
    """The next request, None if there is none for a while. Being cut short loses none: see the contract."""
    try:
        async with asyncio.timeout(_LINGER_S):
            (delivery,) = await consumer.receive(1)
    except TimeoutError:
        return None
    return delivery


async def _publish(messages: Sequence[Message], publisher: Publisher) -> None:
    """Raises Ended when the queue takes nothing, BrokerUnavailable when the session is over."""
    for message, outcome in zip(messages, await publisher.publish(messages), strict=True):
        match outcome:
            case Confirmed():
                continue
            case Returned():
                raise Ended("the queue that asked does not exist")
            case Nacked():
                raise Ended("the queue that asked is full")
            case Refused(reason, detail):
                log.warning("repair_row_refused", message_id=message.message_id, reason=reason, detail=detail)
            case _:
                raise BrokerUnavailable(f"the session with RabbitMQ ended while answering: {publisher.lost}")
