"""What the broker delivers, received and understood ahead: while PostgreSQL works on a batch, the next one is made ready.

Digests are compared and texts checked here, beside the transaction, so that a batch begins with its first statement.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import NamedTuple

import structlog

from relay.control import Control, is_control, to_control
from relay.errors import BrokerUnavailable
from relay.inbox.overlap import Overlap
from relay.inbox.sequencer import Arrival
from relay.inbox.store import Stranger
from relay.inbox.work import Batch
from relay.message import Delivery, NotAnEvent, to_event
from relay.rabbitmq.contract import Consumer
from relay.rabbitmq.subscription import BATCH_BYTES, taken
from relay.supervisor import ended

log = structlog.get_logger()

_PORTION = 32
"""Deliveries understood at a time, a third of a millisecond: so long may an answer from PostgreSQL wait for us, several times in a
statement. With 128, batches took a tenth longer."""


_BESIDE_BYTES = 4096
"""What a message counts beside its body: about what the consumer counts for it, so that a batch is at most half of what that holds,
and the next one can be made ready, also with messages of 8 KiB."""

_arrival = partial(tuple.__new__, Arrival)
"""An Arrival of a tuple of all its fields: half of the time that its constructor takes, which is a function of Python's."""


class Taken(NamedTuple):
    """Deliveries as a batch, to be acknowledged together once they are committed."""

    batch: Batch
    tag: int  # the last one's
    received: int


class _Other(NamedTuple):
    """A delivery that is no event."""

    thing: Stranger | Control
    tag: int
    size: int  # of its body


class Intake:
    """The deliveries of one consumer's session, in the broker's order."""

    def __init__(self, consumer: Consumer, *, ahead: int, overlap: Overlap | None = None) -> None:
        self._consumer = consumer
        self._ahead = ahead
        self._overlap = overlap or Overlap()
        self._ready: deque[Arrival | _Other] = deque()
        self._bytes = 0  # of what is ready: see _size
        self._changed = asyncio.Event()  # something is ready, or the session has ended
        self._room = asyncio.Event()
        self._room.set()
        self._error: BaseException | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Intake]:
        """Within it, deliveries are received, about `ahead` of them at most (a portion and a few more) and no more once BATCH_BYTES of them wait to be taken.

        They, what waits at the consumer and the batch at work are bounded together by the consumer, which counts until they are
        acknowledged: see relay.rabbitmq.fast_consumer.
        """
        task = asyncio.create_task(self._run())
        try:
            with self._overlap.stepping(self._one):
                yield self
        finally:
            await ended(task)

    async def wait(self) -> None:
        """Return when `take` has something to give. Raises BrokerError when the session has ended, whatever is ready."""
        while self._error is None and not self._ready:
            self._changed.clear()
            await self._changed.wait()
        if self._error is not None:
            raise self._error

    def take(self, limit: int) -> Taken:
        """The next deliveries, at most `limit` and BATCH_BYTES, one at least. Only after `wait`."""
        found = self._all() if len(self._ready) <= limit and self._bytes <= BATCH_BYTES else self._first(limit)
        self._room.set()
        others = [one.thing for one in found if isinstance(one, _Other)]
        batch = Batch(
            arrivals=[one for one in found if isinstance(one, Arrival)] if others else found,  # type: ignore[arg-type]
            strangers=[thing for thing in others if isinstance(thing, Stranger)],
            controls=[thing for thing in others if not isinstance(thing, Stranger)],
        )
        return Taken(batch, found[-1].tag or 0, len(found))

    def _all(self) -> list[Arrival | _Other]:
        everything = list(self._ready)
        self._ready.clear()
        self._bytes = 0
        return everything

    def _first(self, limit: int) -> list[Arrival | _Other]:
        first = taken(self._ready, limit, _size)
        self._bytes -= sum(map(_size, first))
        return first

    async def _run(self) -> None:
        try:
            while self._error is None:
                await self._others_turn()
                while (room := self._room_left) <= 0:
                    self._room.clear()
                    await self._room.wait()
                for delivery in await self._consumer.receive(min(room, _PORTION)):
                    self._keep(delivery)
                self._changed.set()
        except asyncio.CancelledError:
            self._error = BrokerUnavailable("the intake was stopped")
            raise
        except Exception as exc:  # noqa: BLE001 - raised by `wait`
            self._error = exc
        finally:
            self._changed.set()

    async def _others_turn(self) -> None:
        """A consumer that has more does not wait, and between calls of handlers it is `_one` that goes on."""
        if self._overlap.rests:
            await self._overlap.rested()
        else:
            await asyncio.sleep(0)

    def _one(self) -> None:
        """The next delivery, if it is here and there is room."""
        if self._error is not None or self._room_left <= 0:
            return
        try:
            if (delivery := self._consumer.next_ready()) is not None:
                self._keep(delivery)
        except Exception as exc:  # noqa: BLE001 - raised by `wait`, so that nothing after what is lost here is acknowledged
            self._error = exc
        self._changed.set()

    @property
    def _room_left(self) -> int:
        """How many deliveries may be received."""
        return self._ahead - len(self._ready) if self._bytes < BATCH_BYTES else 0

    def _keep(self, delivery: Delivery) -> None:
        if self._error is not None:
            return  # one before it is lost: it must not be acknowledged with what comes after
        self._bytes += _BESIDE_BYTES + len(delivery.body)
        self._ready.append(_understood(delivery))


def _understood(delivery: Delivery) -> Arrival | _Other:
    try:
        if is_control(delivery):
            return _Other(to_control(delivery), delivery.tag, len(delivery.body))
        return _arrival((to_event(delivery), delivery.tag, delivery.exchange, delivery.routing_key, None, 0))
    except NotAnEvent as exc:
        log.warning("quarantined", reason=exc.reason, detail=exc.detail, routing_key=delivery.routing_key)
        return _Other(Stranger.of_delivery(delivery, exc.reason, exc.detail), delivery.tag, len(delivery.body))


def _size(one: Arrival | _Other) -> int:
    return _BESIDE_BYTES + (one.size if isinstance(one, _Other) else len(one.event.body))
