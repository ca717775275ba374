"""RabbitMQ as a whole: it goes away, or takes nothing for a while.

What is counted is its process, what a connection attempt saw, and what the proxies saw of its frames. That it went away has
bitten when relays and consumers were connected again afterwards, and events were confirmed and handed out.
"""

from __future__ import annotations

import asyncio
import random

from tests.faults.lab.broker_operator import QUEUE, api, close_connections, nobody_consuming, require, wait
from tests.faults.lab.fault import fault
from tests.faults.lab.stage import BROKER_USERS, Stage

WHOLE = ("broker", "relay-amqp", "consumer-amqp")
LIMIT = "/api/policies/%2F/lab-full"
MEMORY_LIMIT = "0.4"  # RabbitMQ 3's default
DISK_LIMIT = "50MB"  # the sandbox's
BACK_S = 20.0
"""Longest until daemons are at work again with a broker that is back."""


# --- the broker goes away


@fault("broker restarted", rows=(4,), touches=WHOLE, recovery_s=20)
async def broker_restarted(stage: Stage, _: random.Random) -> int:
    """A graceful stop, which closes all connections with a word of its own, and a start."""
    before, had = stage.broker.pid, _connections(stage)
    await asyncio.to_thread(stage.broker.restart)
    return int(stage.broker.pid != before and await _are_back(stage, had))


@fault("broker killed", rows=(4,), touches=WHOLE, smoke=True, recovery_s=20)
async def broker_killed(stage: Stage, dice: random.Random) -> int:
    """kill -9 of the Erlang machine: whatever it confirmed is on its disk."""
    before, had = stage.broker.pid, _connections(stage)
    await asyncio.to_thread(stage.broker.kill9)
    try:
        await asyncio.sleep(dice.uniform(0, 2))
    finally:
        await asyncio.to_thread(stage.broker.start_again)
    return int(stage.broker.pid != before and await _are_back(stage, had))


@fault("broker application stopped", rows=(4, 6), touches=WHOLE, recovery_s=20)
async def application_stopped(stage: Stage, dice: random.Random) -> int:
    """`rabbitmqctl stop_app`, as for maintenance: the machine runs, nobody listens, a connection is refused."""
    had = _connections(stage)
    await asyncio.to_thread(stage.broker.ctl, "stop_app")
    try:
        refused = not await _listens(stage.broker.port)
        await asyncio.sleep(dice.uniform(0.5, 3))
    finally:
        await asyncio.to_thread(stage.broker.ctl, "start_app")
        await require(stage, lambda: asyncio.to_thread(stage.broker.management().answers), "the broker is not back", 30)
    return int(refused and await _are_back(stage, had))


@fault("connections closed by an operator", rows=(4,), touches=("relay-amqp", "consumer-amqp"))
async def connections_closed(stage: Stage, dice: random.Random) -> int:
    """Some times in a row: what was in flight has no answer, and the next session starts from the cursor."""
    closed = 0
    for _ in range(dice.randint(1, 4)):
        for user in BROKER_USERS:
            closed += await close_connections(stage, user)
        await asyncio.sleep(dice.uniform(0.2, 1.5))
    return closed


# --- the broker does not take anything for a while


@fault("memory alarm", rows=(5,), touches=WHOLE)
async def memory_alarm(stage: Stage, dice: random.Random) -> int:
    """Every publisher is blocked; who consumes goes on."""
    return await _alarm(stage, dice, ("set_vm_memory_high_watermark",), ("absolute", "1MB"), (MEMORY_LIMIT,))


@fault("disk alarm", rows=(5, 32), touches=WHOLE)
async def disk_alarm(stage: Stage, dice: random.Random) -> int:
    """The same for a disk that is nearly full."""
    return await _alarm(stage, dice, ("set_disk_free_limit",), ("9000GB",), (DISK_LIMIT,))


async def _alarm(
    stage: Stage, dice: random.Random, limit: tuple[str, ...], alarming: tuple[str, ...], usual: tuple[str, ...]
) -> int:
    """Bitten as often as a connection of the relays was told that it is blocked."""
    before = stage.relay_amqp.seen["blocked"]
    try:
        await asyncio.to_thread(stage.broker.ctl, *limit, *alarming)
        await wait(stage, lambda: stage.relay_amqp.seen["blocked"] > before, timeout_s=12)
        await asyncio.sleep(dice.uniform(1, 7))  # sometimes longer than the relay waits for confirms
    finally:
        await asyncio.to_thread(stage.broker.ctl, *limit, *usual)
    return int(stage.relay_amqp.seen["blocked"] - before)


@fault("queue full", rows=(8, 9), touches=("consumer", *WHOLE), smoke=True, recovery_s=30)
async def queue_full(stage: Stage, dice: random.Random) -> int:
    """Nobody consumes, and the queue takes no more: what goes there is refused with basic.nack, and tried again.

    The limit is taken away while the queue is full, which RabbitMQ does not tell publishers (rabbitmq-server issue 12206).
    """
    rules = {"max-length": 20, "overflow": "reject-publish"}
    before = stage.relay_amqp.seen["nack"]
    async with nobody_consuming(stage):
        try:
            await api(stage, "PUT", LIMIT, {"pattern": f"^{QUEUE}$", "apply-to": "queues", "definition": rules})
            await wait(stage, lambda: stage.relay_amqp.seen["nack"] > before, timeout_s=20)
            await asyncio.sleep(dice.uniform(0.5, 2.5))
            return stage.relay_amqp.seen["nack"] - before
        finally:
            await api(stage, "DELETE", LIMIT)


def _connections(stage: Stage) -> tuple[int, int]:
    """So many have reached the broker yet, of the relays and of the consumers."""
    return stage.relay_amqp.seen["connection"], stage.consumer_amqp.seen["connection"]


async def _are_back(stage: Stage, had: tuple[int, int]) -> bool:
    """Whether both have connected since then, and work again from now on."""
    confirmed, handed_out = stage.relay_amqp.seen["ack"], stage.consumer_amqp.seen["deliver"]

    def at_work() -> bool:
        connected = all(now > before for now, before in zip(_connections(stage), had, strict=True))
        works = stage.relay_amqp.seen["ack"] > confirmed and stage.consumer_amqp.seen["deliver"] > handed_out
        return connected and works

    return await wait(stage, at_work, timeout_s=BACK_S)


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True
