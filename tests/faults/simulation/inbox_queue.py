"""The broker as the inbox sees it: one queue, competing consumers, redelivery in any order."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace

from relay.errors import BrokerUnavailable
from relay.message import Delivery
from tests.faults.simulation.clock import VirtualLoop
from tests.faults.simulation.connection import Process


@dataclass(frozen=True, slots=True)
class Queued:
    """A message in the queue."""

    delivery: Delivery
    redelivered: bool = False


class Queue:
    """A quorum queue, and who consumes it."""

    def __init__(self, loop: VirtualLoop, dice: random.Random) -> None:
        self.loop = loop
        self.dice = dice
        self.ready: list[Queued] = []
        self.consumers: list[ModelConsumer] = []
        self.is_down = False
        self.redelivers_in_disorder = False

    def put(self, delivery: Delivery, position: int | None = None) -> None:
        """A message arrives; at any position, since it may have been delivered and requeued before."""
        self.ready.insert(len(self.ready) if position is None else position, Queued(delivery))
        self._tell()

    def take_back(self, unacknowledged: list[Queued]) -> None:
        """A consumer is gone: what it had is delivered again."""
        again = [replace(queued, redelivered=True) for queued in unacknowledged]
        if self.redelivers_in_disorder:
            self.dice.shuffle(again)
            self.ready.extend(again)
        else:
            self.ready[:0] = again
        self._tell()

    async def consume(self, process: Process, prefetch: int) -> ModelConsumer:
        """A connection and its subscription. Raises BrokerUnavailable."""
        await self.loop.sleep(process.pause()[1])
        if self.is_down or process.is_dead:
            raise BrokerUnavailable("connection refused")
        return ModelConsumer(self, process, prefetch)

    def go_down(self) -> None:
        """All connections break, new ones are refused."""
        self.is_down = True
        for consumer in [*self.consumers]:
            consumer.cut()

    @property
    def is_empty(self) -> bool:
        """Nothing is to be delivered, and nothing to be acknowledged."""
        return not self.ready and not any(consumer.unacknowledged for consumer in self.consumers)

    def _tell(self) -> None:
        for consumer in self.consumers:
            consumer.something.set()


class ModelConsumer:
    """relay.rabbitmq.contract.Consumer."""

    def __init__(self, queue: Queue, process: Process, prefetch: int) -> None:
        self._queue = queue
        self._process = process
        self._prefetch = prefetch
        self._tag = 0
        self._is_over = False
        self.unacknowledged: dict[int, Queued] = {}
        self.something = asyncio.Event()
        self.something.set()
        queue.consumers.append(self)
        process.links.append(self)

    async def receive(self, limit: int) -> list[Delivery]:
        while True:
            await self.something.wait()
            if self._is_over:
                raise BrokerUnavailable("the session has ended")
            if found := self._take(min(limit, self._prefetch - len(self.unacknowledged))):
                return found
            self.something.clear()

    def next_ready(self) -> Delivery | None:
        """One of what `receive` would give now."""
        if self._is_over or len(self.unacknowledged) >= self._prefetch:
            return None
        return next(iter(self._take(1)), None)

    def _take(self, most: int) -> list[Delivery]:
        found = []
        for _ in range(min(most, self._queue.dice.randint(1, 8), len(self._queue.ready))):
            queued = self._queue.ready.pop(0)
            self._tag += 1
            self.unacknowledged[self._tag] = queued
            found.append(queued.delivery._replace(tag=self._tag, redelivered=queued.redelivered))
        return found

    async def acknowledge(self, tag: int) -> None:
        fate = self._process.next_fate()
        at_once, pause = self._process.pause()
        if self._is_over:
            raise BrokerUnavailable("the session has ended")
        if fate is None and at_once:  # fire and forget, as the client library has it
            self._acknowledged(tag)
            return
        await self._queue.loop.sleep(pause)
        if fate is None or fate.endswith("after"):
            self._acknowledged(tag)
        if fate is not None and fate.startswith("kill"):
            self._process.kill()
        if fate is not None:
            self.cut()
            raise BrokerUnavailable("the connection broke")

    def _acknowledged(self, tag: int) -> None:
        if not self._is_over:
            for known in [known for known in self.unacknowledged if known <= tag]:
                del self.unacknowledged[known]
            self.something.set()

    async def close(self) -> None:
        self.cut()

    def cut(self) -> None:
        """The session is over: what is not acknowledged is delivered again."""
        if not self._is_over:
            self._is_over = True
            self._queue.consumers.remove(self)
            if self in self._process.links:
                self._process.links.remove(self)
            unacknowledged, self.unacknowledged = [*self.unacknowledged.values()], {}
            self._queue.take_back(unacknowledged)
            self.something.set()
