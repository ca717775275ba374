"""What the broker delivers, received and understood ahead: while PostgreSQL works on a batch, the next one is made ready.

Digests are compared and texts checked here, beside the transaction, so that a batch begins with its first statement.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import structlog

from relay.control import Control, is_control, to_control
from relay.errors import BrokerUnavailable
from relay.inbox.sequencer import Arrival
from relay.inbox.store import Stranger
from relay.inbox.work import Batch
from relay.message import Delivery, NotAnEvent, to_event
from relay.rabbitmq.contract import Consumer
from relay.supervisor import ended

log = structlog.get_logger()

_PORTION = 128
"""Deliveries understood at a time, about a millisecond: so long may an answer from PostgreSQL wait for us."""

BATCH_BYTES = 64 * 1024 * 1024
"""Most bytes of bodies in one batch (its first message always fits). While so many wait, nothing more is received."""


class Taken(NamedTuple):
    """Deliveries as a batch, to be acknowledged together once they are committed."""

    batch: Batch
    tag: int  # the last one's
    received: int


class _Understood(NamedTuple):
    """A delivery, and what it is."""

    thing: Arrival | Stranger | Control
    tag: int
    size: int


class Intake:
    """The deliveries of one consumer's session, in the broker's order."""

    def __init__(self, consumer: Consumer, *, ahead: int) -> None:
        self._consumer = consumer
        self._ahead = ahead
        self._ready: deque[_Understood] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()  # something is ready, or the session has ended
        self._room = asyncio.Event()
        self._room.set()
        self._error: BaseException | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Intake]:
        """Within it, deliveries are received, at most `ahead` and BATCH_BYTES before they are taken."""
        task = asyncio.create_task(self._run())
        try:
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
        """The next deliveries, at most `limit` and BATCH_BYTES. Only after `wait`."""
        arrivals: list[Arrival] = []
        strangers: list[Stranger] = []
        controls: list[Control] = []
        total = received = tag = 0
        while self._ready and received < limit:
            thing, at, size = self._ready[0]
            total += size
            if received and total > BATCH_BYTES:
                break
            self._ready.popleft()
            self._bytes -= size
            received, tag = received + 1, at
            if isinstance(thing, Arrival):
                arrivals.append(thing)
            elif isinstance(thing, Stranger):
                strangers.append(thing)
            else:
                controls.append(thing)
        self._room.set()
        return Taken(Batch(arrivals=arrivals, strangers=strangers, controls=controls), tag, received)

    async def _run(self) -> None:
        try:
            while True:
                while (room := self._ahead - len(self._ready)) <= 0 or self._bytes >= BATCH_BYTES:
                    self._room.clear()
                    await self._room.wait()
                for delivery in await self._consumer.receive(min(room, _PORTION)):
                    understood = _understood(delivery)
                    self._ready.append(understood)
                    self._bytes += understood.size
                self._changed.set()
                await asyncio.sleep(0)  # a consumer that has more does not wait: let the others go on
        except asyncio.CancelledError:
            self._error = BrokerUnavailable("the intake was stopped")
            raise
        except Exception as exc:  # noqa: BLE001 - raised by `wait`
            self._error = exc
        finally:
            self._changed.set()


def _understood(delivery: Delivery) -> _Understood:
    size = len(delivery.body)
    try:
        if is_control(delivery):
            return _Understood(to_control(delivery), delivery.tag, size)
        event = to_event(delivery)
    except NotAnEvent as exc:
        log.warning("quarantined", reason=exc.reason, detail=exc.detail, routing_key=delivery.routing_key)
        return _Understood(Stranger.of_delivery(delivery, exc.reason, exc.detail), delivery.tag, size)
    return _Understood(Arrival(event, delivery.tag, delivery.exchange, delivery.routing_key), delivery.tag, size)
