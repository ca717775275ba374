"""A crooked way from relay to a consumer's queue: what goes in in order comes out shuffled, some of it twice, one event last."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

from relay.errors import BrokerError
from relay.rabbitmq.session import broker_errors, close, connect
from relay.settings import RabbitmqSettings
from tests.harness.audit import EXCHANGE

WINDOW = 40
"""Messages that are shuffled with each other, if so many are there."""

DOUBLED = 0.2
DEADLINE_S = 60.0

Place = tuple[str, int]
"""(aggregate id, sequence number)."""


class CrookedWay:
    """Takes over from the queue `entrance`, which gets all that relay publishes, and hands on to another queue.

    The event `last` is kept back until `let_last_go`, and is then given twice: until then all its successors are early.
    Nothing gets lost here: a message is acknowledged when its copies are confirmed.
    """

    def __init__(self, broker: RabbitmqSettings, to_queue: str, *, last: Place, seed: int = 1) -> None:
        self._broker = broker
        self._to_queue = to_queue
        self._last = last
        self._last_may_go = False
        self._dice = random.Random(seed)
        self._incoming = asyncio.Queue[AbstractIncomingMessage | None]()  # None: look around
        self._changed = asyncio.Event()
        self.seen: set[Place] = set()

    def let_last_go(self) -> None:
        """Hand on what was kept back."""
        self._last_may_go = True
        self._incoming.put_nowait(None)

    async def until(self, condition: Callable[[CrookedWay], bool]) -> None:
        """Wait until it has handed on (or keeps back) what the condition asks for."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition(self):
                self._changed.clear()
                await self._changed.wait()

    async def run(self) -> None:
        """Over all broken connections, until cancelled."""
        while True:
            with suppress(BrokerError):
                connection = await connect(self._broker, name="crooked way")
                try:
                    with broker_errors("on the crooked way"):
                        await self._session(await connection.channel())
                finally:
                    await close(connection)

    async def _session(self, channel: AbstractChannel) -> None:
        incoming = self._incoming = asyncio.Queue[AbstractIncomingMessage | None]()
        channel.close_callbacks.add(lambda *_: incoming.put_nowait(None))
        await (await entrance(channel)).consume(incoming.put)
        kept: list[AbstractIncomingMessage] = []
        while not channel.is_closed:
            window = await self._window()
            going = [message for message in window if _place(message) != self._last]
            kept += [message for message in window if _place(message) == self._last]
            copies = [message for message in going if self._dice.random() < DOUBLED]
            self._dice.shuffle(going)
            if self._last_may_go:
                going, copies, kept = going + kept, copies + kept, []
            publish = channel.default_exchange.publish
            await asyncio.gather(*(publish(message, routing_key=self._to_queue) for message in going + copies))
            self.seen |= {_place(message) for message in window}
            self._changed.set()
            for message in going:
                await message.ack()

    async def _window(self) -> list[AbstractIncomingMessage]:
        """What has arrived, waiting until there is something to do."""
        window = [await self._incoming.get()]
        while len(window) < WINDOW and not self._incoming.empty():
            window.append(self._incoming.get_nowait())
        return [message for message in window if message is not None]


def _place(message: AbstractIncomingMessage) -> Place:
    sequence = message.headers["x-sequence"]
    assert isinstance(sequence, int)
    return str(message.headers["x-aggregate-id"]), sequence


async def entrance(channel: AbstractChannel) -> aio_pika.abc.AbstractQueue:
    """The queue that gets all that relay publishes."""
    exchange = await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
    queue = await channel.declare_queue("crooked", durable=True)
    await queue.bind(exchange, "#")
    return queue


@asynccontextmanager
async def crooked_way(broker: RabbitmqSettings, to_queue: str, *, last: Place) -> AsyncIterator[CrookedWay]:
    """The way, open: whatever relay publishes from now on takes it."""
    connection = await connect(broker, name="crooked way")
    await entrance(await connection.channel())
    await close(connection)
    way = CrookedWay(broker, to_queue, last=last)
    task = asyncio.create_task(way.run())
    try:
        yield way
    finally:
        if task.done():
            task.result()  # it ends by cancellation only: let its error be seen
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
