"""What happens to messages between relay and handler: stolen for a while or for good, handed out again, copied.

Nothing of it is simulated: the faults are further clients of the broker, straight and as an administrator.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aio_pika
from aio_pika.abc import AbstractIncomingMessage

from relay.demo.broker import session
from relay.rabbitmq.session import Session
from relay.settings import RabbitmqSettings
from tests.faults.lab.amqp_proxy import Watch
from tests.faults.lab.fault import fault
from tests.faults.lab.stage import Stage

EVENTS = "relay.events"
EFFECTS = "effects"
"""The consumers' queue."""

WORN_OUT = 20
"""Deliveries after which we hand a message out no more: the queue's limit is 100, and dead letters are another fault's."""

ONCE = "SELECT message_id FROM effect WHERE message_id = ANY ($1::text[]) GROUP BY message_id HAVING count(*) = 1"
DONE = "SELECT count(DISTINCT message_id) FROM effect WHERE message_id = ANY ($1::text[])"

SEEN_S = 10.0
"""Longest wait until the consumers were handed what they have to be handed: they may be far behind."""

HEALED_S = 25.0
"""From the loss of a message to its second arrival: noticed after a second, asked for, sent, applied; more if relay is down."""

_BROKERS_OWN = (
    "x-delivery-count",
    "x-acquired-count",
    "x-death",
    "x-first-death-exchange",
    "x-first-death-queue",
    "x-first-death-reason",
)


@fault("a consumer that takes messages and dies", rows=(21, 22, 23), touches=("broker",), smoke=True)
async def thief(stage: Stage, dice: random.Random) -> int:
    """It sits on them while others go past, and ends without an acknowledgement.

    Bites: messages in its hands when it died that the consumers were handed again afterwards.
    """
    with stage.consumer_amqp.watching() as watch:
        held: dict[str, int] = {}  # by id: redeliveries when it died
        for _ in range(dice.randint(2, 4)):
            prefetch, holding_s = dice.choice((10, 25, 50)), dice.uniform(0.5, 2.5)
            async with connected(stage, "lab thief") as opened:
                taken = await _take(opened, prefetch)
                await asyncio.sleep(holding_s)
                opened.abort()
                held = {id_: watch.again[id_] for id_ in _ids(taken)} | held
            await asyncio.sleep(dice.uniform(0, 1))
        return await _handed_again(stage, watch, held)


@fault("messages given back in another order", rows=(22, 23), touches=("broker",))
async def shuffled(stage: Stage, dice: random.Random) -> int:
    """A consumer with 50 messages in hand gives back some of them, now these, now those.

    Bites: messages that the consumers were handed again after they had been given back.
    """
    given_back: dict[str, int] = {}  # by id: redeliveries before
    with stage.consumer_amqp.watching() as watch:
        async with connected(stage, "lab shuffle") as opened:
            taken = await _take(opened, 50)
            until = _clock() + dice.uniform(3, 7)
            while _clock() < until:
                await asyncio.sleep(dice.uniform(0.02, 0.2))
                fresh = [message for message in taken if _deliveries(message) < WORN_OUT]
                for message in dice.sample(fresh, len(fresh) // 2):
                    taken.remove(message)
                    given_back |= {id_: watch.again[id_] for id_ in _ids([message]) - given_back.keys()}
                    await message.nack(requeue=True)
            opened.abort()
        return await _handed_again(stage, watch, given_back)


@fault("copies of messages", rows=(1, 2), touches=("broker",), smoke=True)
async def copies(stage: Stage, dice: random.Random) -> int:
    """Real messages are published again, as by a relay whose confirm got lost: some at once, some seconds late.

    Some come with what a broker adds to them, as a shovel would send them on. Some only into the consumers' queue.
    Bites: how often the consumers were handed a message once more, and no redelivery, of which there is one effect.
    """
    copied: Counter[str] = Counter()
    with stage.consumer_amqp.watching() as watch:
        async with connected(stage, "lab copies") as opened:
            channel = await opened.channel(publisher_confirms=True, on_return_raises=True)
            seen: list[AbstractIncomingMessage] = []
            tap = await channel.declare_queue(exclusive=True, arguments={"x-max-length": 1000})
            await tap.bind(EVENTS, "account.#")
            await tap.consume(_into(seen), no_ack=True)
            events = await channel.get_exchange(EVENTS, ensure=False)
            until = _clock() + dice.uniform(4, 8)
            while _clock() < until:
                await asyncio.sleep(dice.uniform(0, 0.05))
                del seen[:-500]
                if not seen:
                    continue
                message = dice.choice(seen)
                again = _again(message, shovelled=dice.random() < 0.3)
                if dice.random() < 0.5:
                    await events.publish(again, message.routing_key or "")
                else:
                    await channel.default_exchange.publish(again, EFFECTS)
                copied[message.message_id or ""] += 1
        return await _recognised(stage, watch, copied)


@fault("messages stolen for good", rows=(26, 41), touches=("broker",), recovery_s=30.0, loses=True)
async def stolen(stage: Stage, dice: random.Random) -> int:
    """Acknowledged by somebody who does nothing with them. Bites: those that had no effect then, and got one all the same."""
    async with connected(stage, "lab robber") as opened:
        taken = await _take(opened, dice.choice((20, 60, 100)))

        async def worth_it() -> bool:
            return any(message.type == "Booked" for message in taken)

        # The relay may be cut off the broker at this time by another fault: then there is nothing to steal for a while.
        await stage.until(worth_it, timeout_s=HEALED_S)
        await asyncio.sleep(dice.uniform(0.3, 1))
        loot = [message for message in taken if message.type == "Booked"]
        ids = [message.message_id for message in loot]
        done: list[int] = []

        async def looked() -> bool:
            done.append(int((await stage.consumer_sql(DONE, ids))[0]["count"]))
            return True

        if not await stage.until(looked, timeout_s=SEEN_S):
            return 0
        for message in loot:
            await message.ack()
        # What is not of value is handed out again when we are gone.

    async def healed() -> bool:
        return await looked() and done[-1] == len(set(ids))

    await stage.until(healed, timeout_s=HEALED_S, every_s=0.2)
    return done[-1] - done[0]


@asynccontextmanager
async def connected(stage: Stage, name: str) -> AsyncIterator[Session]:
    """A connection of our own, straight to the broker."""
    async with session(RabbitmqSettings(url=stage.broker.url()), name) as opened:
        yield opened


async def _take(opened: Session, prefetch: int) -> list[AbstractIncomingMessage]:
    """Join the consumers' queue; what we are given from now on arrives in the list."""
    taken: list[AbstractIncomingMessage] = []
    channel = await opened.channel(publisher_confirms=False)
    await channel.set_qos(prefetch_count=prefetch)
    queue = await channel.get_queue(EFFECTS, ensure=False)
    await queue.consume(_into(taken))
    return taken


def _into(messages: list[AbstractIncomingMessage]) -> Callable[[AbstractIncomingMessage], Awaitable[Any]]:
    async def append(message: AbstractIncomingMessage) -> None:
        messages.append(message)

    return append


def _ids(messages: Iterable[AbstractIncomingMessage]) -> set[str]:
    """Of the events among them."""
    return {message.message_id for message in messages if message.type == "Booked" and message.message_id}


async def _handed_again(stage: Stage, watch: Watch, before: Mapping[str, int]) -> int:
    """How many of these messages were redelivered to the consumers more often than before, waiting for all of them."""

    def handed() -> int:
        return sum(watch.again[id_] > count for id_, count in before.items())

    async def all_are() -> bool:
        return handed() == len(before)

    await stage.until(all_are, timeout_s=SEEN_S)
    return handed()


async def _recognised(stage: Stage, watch: Watch, copied: Mapping[str, int]) -> int:
    """Copies that the consumers were handed besides the original, of messages that have one effect; waiting for all of them."""
    bites = 0

    async def all_are() -> bool:
        nonlocal bites
        once = {row["message_id"] for row in await stage.consumer_sql(ONCE, list(copied))}
        bites = sum(min(count, max(0, watch.first[id_] - 1)) for id_, count in copied.items() if id_ in once)
        return bites == sum(copied.values())

    await stage.until(all_are, timeout_s=SEEN_S, every_s=0.2)
    return bites


def _deliveries(message: AbstractIncomingMessage) -> int:
    count = message.headers.get("x-delivery-count", 0)
    return count if isinstance(count, int) else 0


def _again(message: AbstractIncomingMessage, *, shovelled: bool) -> aio_pika.Message:
    headers = {name: value for name, value in message.headers.items() if name not in _BROKERS_OWN}
    if shovelled:
        headers |= {"x-delivery-count": 3, "x-first-death-queue": "elsewhere", "x-first-death-reason": "rejected"}
    return aio_pika.Message(
        message.body,
        message_id=message.message_id,
        type=message.type,
        app_id=message.app_id,
        timestamp=message.timestamp,
        content_type=message.content_type,
        headers=headers,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
    )


def _clock() -> float:
    return asyncio.get_running_loop().time()
