"""The network between the daemons and their servers: cut, silent, slow, lying; at any moment, and at the worst ones.

What is counted is what the proxies did: connections cut, acks swallowed or turned around, sessions that went silent. A link that
lost bytes in a black hole stays silent when it is healed: what has to be found out, a daemon has to find out by itself. Lies about
confirms are about events only: a mark that was refused is nobody's loss.
"""

from __future__ import annotations

import asyncio
import random
import re
from contextlib import AbstractAsyncContextManager

from relay.postgres.queries import query
from tests.faults.lab.fault import fault
from tests.faults.lab.kinds.messages import EVENTS
from tests.faults.lab.postgres_proxy import Side
from tests.faults.lab.proxy import Bites, TcpProxy
from tests.faults.lab.stage import Stage

BITE_S = 20.0
"""Longest wait for something to bite: daemons may be starting, and connect again with up to 1 s in between."""
SILENCE_S = (6.0, 20.0)
"""Heartbeats of 5 s notice it after 10 s (RabbitMQ) or 18 to 20 s (aiormq), statements and confirms after 10 and 5 s."""
NOTICED_S = 40.0
"""Recovery from a silence: that it is noticed may take 20 s more after its end."""

COMMIT = r"^\s*COMMIT\b"
CHECKPOINT = re.escape(query("checkpoint"))
EFFECT = "INSERT INTO effect"
EVENT = r"INSERT INTO relay\.outbox"


# --- relay and RabbitMQ


@fault("relay cut off RabbitMQ", rows=(2, 4), touches=("relay-amqp",))
async def relay_amqp_cut(stage: Stage, dice: random.Random) -> int:
    """Its connections are reset, a few times, at any moment."""
    return await _cut(stage, stage.relay_amqp, dice)


@fault("relay: silence from RabbitMQ", rows=(6,), touches=("relay-amqp",), recovery_s=NOTICED_S)
async def relay_amqp_silent(stage: Stage, dice: random.Random) -> int:
    """A black hole: the kernel acknowledges, nobody answers."""
    return await _silence(stage.relay_amqp, dice)


@fault("relay: slow way to RabbitMQ", rows=(6,), touches=("relay-amqp",))
async def relay_amqp_slow(stage: Stage, dice: random.Random) -> int:
    """Every byte is late, each way."""
    return await _slowness(stage, stage.relay_amqp, dice, (0.15, 0.4))


@fault("relay: confirms dropped", rows=(2, 6), touches=("relay-amqp",), smoke=True)
async def confirms_dropped(stage: Stage, dice: random.Random) -> int:
    """RabbitMQ takes messages and says so, and the relay does not hear it: it must send them again, and nobody apply them twice."""
    async with stage.relay_amqp.dropping_acks(about=EVENTS) as bites:
        await _bitten(stage, bites)
        await asyncio.sleep(dice.uniform(0, 6))  # up to longer than the relay waits for a confirm
    return bites.count


@fault("relay: ack becomes nack", rows=(8,), touches=("relay-amqp",), smoke=True)
async def ack_as_nack(stage: Stage, dice: random.Random) -> int:
    """RabbitMQ took messages and is said to have refused them: they are parked, with all of their aggregate behind them."""
    return await _nacked(stage, dice, share=dice.uniform(0.05, 0.4), multiple=False)


@fault("relay: acks become one nack", rows=(8,), touches=("relay-amqp",))
async def acks_as_one_nack(stage: Stage, dice: random.Random) -> int:
    """The same with the bit that stands for all messages up to this one."""
    return await _nacked(stage, dice, share=dice.uniform(0.3, 1), multiple=True)


@fault("relay cut at the confirm", rows=(1, 2), touches=("relay-amqp",), smoke=True)
async def cut_at_the_confirm(stage: Stage, dice: random.Random) -> int:
    """The ack is on its way when the connection goes: the message is in the queue, the relay cannot know and sends it again."""
    return await _sprung(stage, stage.relay_amqp.cutting_at_ack(times := dice.randint(2, 3), about=EVENTS), times)


@fault("relay cut inside a publish", rows=(2,), touches=("relay-amqp",))
async def cut_inside_a_publish(stage: Stage, dice: random.Random) -> int:
    """RabbitMQ gets the beginning of a message and then the end of the connection."""
    return await _sprung(
        stage, stage.relay_amqp.cutting_inside_publish(times := dice.randint(2, 5), about=EVENTS), times
    )


# --- relay and PostgreSQL


@fault("relay cut off PostgreSQL", rows=(13, 14, 15), touches=("relay-pg",))
async def relay_pg_cut(stage: Stage, dice: random.Random) -> int:
    """Reader, listener and lease are reset, of owner and standby alike, a few times."""
    return await _cut(stage, stage.relay_pg, dice)


@fault("relay: silence from PostgreSQL", rows=(7,), touches=("relay-pg",), recovery_s=NOTICED_S)
async def relay_pg_silent(stage: Stage, dice: random.Random) -> int:
    """A black hole; the owner's backend keeps the lock for as long as it lasts, since it hears of no end either."""
    return await _silence(stage.relay_pg, dice)


@fault("relay: slow way to PostgreSQL", rows=(38,), touches=("relay-pg",))
async def relay_pg_slow(stage: Stage, dice: random.Random) -> int:
    """Every byte is late, each way."""
    return await _slowness(stage, stage.relay_pg, dice, (0.1, 0.3))


@fault("relay cut between confirm and checkpoint", rows=(1,), touches=("relay-pg",))
async def cut_before_the_checkpoint(stage: Stage, dice: random.Random) -> int:
    """Messages are confirmed, and that they are is never written down."""
    times = dice.randint(1, 3)
    return await _sprung(stage, stage.relay_pg.cutting_at(CHECKPOINT, "request", times), times)


@fault("relay cut at the checkpoint's commit", rows=(1, 7), touches=("relay-pg",), smoke=True)
async def cut_at_the_checkpoint(stage: Stage, dice: random.Random) -> int:
    """The cursor was moved, and the relay does not know: the next session must begin where the cursor is, not where it thought."""
    times = dice.randint(1, 2)
    return await _sprung(stage, stage.relay_pg.cutting_at(COMMIT, "answer", times, after=CHECKPOINT), times)


@fault("relay: silence at the checkpoint's commit", rows=(1, 7), touches=("relay-pg",), recovery_s=NOTICED_S)
async def silence_at_the_checkpoint(stage: Stage, dice: random.Random) -> int:
    """The same without an end of the connection: its statement must have a time-out, and its backend keeps what it holds."""
    async with stage.relay_pg.black_holing_at(COMMIT, "answer", 1, after=CHECKPOINT) as bites:
        await _bitten(stage, bites)
        await asyncio.sleep(dice.uniform(0, 12))
    return bites.count


# --- consumers and RabbitMQ


@fault("consumers cut off RabbitMQ", rows=(21, 22), touches=("consumer-amqp",))
async def consumer_amqp_cut(stage: Stage, dice: random.Random) -> int:
    """All that they had in hand is delivered again, to another one as it comes, behind what that one has."""
    return await _cut(stage, stage.consumer_amqp, dice)


@fault("consumers: silence from RabbitMQ", rows=(6,), touches=("consumer-amqp",), recovery_s=NOTICED_S)
async def consumer_amqp_silent(stage: Stage, dice: random.Random) -> int:
    """A black hole: a consumer that only waits for messages cannot tell it from a quiet day but by the heartbeat."""
    return await _silence(stage.consumer_amqp, dice)


@fault("consumers: slow way to RabbitMQ", rows=(6, 22), touches=("consumer-amqp",))
async def consumer_amqp_slow(stage: Stage, dice: random.Random) -> int:
    """Every byte is late, each way: acks come late as well."""
    return await _slowness(stage, stage.consumer_amqp, dice, (0.15, 0.4))


# --- consumers and PostgreSQL


@fault("consumers cut off PostgreSQL", rows=(13, 22), touches=("consumer-pg",))
async def consumer_pg_cut(stage: Stage, dice: random.Random) -> int:
    """In the middle of their batches, a few times."""
    return await _cut(stage, stage.consumer_pg, dice)


@fault("consumers: silence from PostgreSQL", rows=(7,), touches=("consumer-pg",), recovery_s=NOTICED_S)
async def consumer_pg_silent(stage: Stage, dice: random.Random) -> int:
    """A black hole; cursors stay locked by backends that hear of no end for as long as it lasts."""
    return await _silence(stage.consumer_pg, dice)


@fault("consumers: slow way to PostgreSQL", rows=(38,), touches=("consumer-pg",))
async def consumer_pg_slow(stage: Stage, dice: random.Random) -> int:
    """Every byte is a little late: a batch is many statements."""
    return await _slowness(stage, stage.consumer_pg, dice, (0.005, 0.03))


@fault("consumer cut after its commit", rows=(21,), touches=("consumer-pg",), smoke=True)
async def consumer_cut_after_commit(stage: Stage, dice: random.Random) -> int:
    """Effects are committed, and the consumer does not know: it gets all of the batch again and must recognise it."""
    times = dice.randint(2, 3)
    return await _sprung(stage, stage.consumer_pg.cutting_at(COMMIT, "answer", times, after=EFFECT), times)


@fault("consumer cut before its commit", rows=(22,), touches=("consumer-pg",))
async def consumer_cut_before_commit(stage: Stage, dice: random.Random) -> int:
    """The COMMIT never arrives: what it got again must be applied after all."""
    times = dice.randint(2, 4)
    return await _sprung(stage, stage.consumer_pg.cutting_at(COMMIT, "request", times, after=EFFECT), times)


@fault("consumer: silence at its commit", rows=(7, 21), touches=("consumer-pg",), recovery_s=NOTICED_S)
async def consumer_silent_at_commit(stage: Stage, dice: random.Random) -> int:
    """Done or not, a consumer waits for the answer to its COMMIT, with a time-out; if not, its backend keeps the cursors locked."""
    sides: tuple[Side, ...] = ("request", "answer")
    async with stage.consumer_pg.black_holing_at(COMMIT, dice.choice(sides), 1, after=EFFECT) as bites:
        await _bitten(stage, bites)
        await asyncio.sleep(dice.uniform(0, 12))
    return bites.count


# --- producers and PostgreSQL


@fault("producers cut off PostgreSQL", rows=(20,), touches=("producers",))
async def producers_cut(stage: Stage, dice: random.Random) -> int:
    """Transactions end where they are: numbers that they took are given to others."""
    return await _cut(stage, stage.producer_pg, dice)


@fault("producer cut after its commit", rows=(20,), touches=("producers",))
async def producer_cut_after_commit(stage: Stage, dice: random.Random) -> int:
    """Events are committed, and the application does not know: they must arrive like any other."""
    times = dice.randint(3, 8)
    return await _sprung(stage, stage.producer_pg.cutting_at(COMMIT, "answer", times, after=EVENT), times)


@fault("producer cut before its commit", rows=(20,), touches=("producers",))
async def producer_cut_before_commit(stage: Stage, dice: random.Random) -> int:
    """The COMMIT never arrives: nothing of it may ever be published."""
    times = dice.randint(3, 8)
    return await _sprung(stage, stage.producer_pg.cutting_at(COMMIT, "request", times, after=EVENT), times)


# --- what they have in common


async def _cut(stage: Stage, proxy: TcpProxy, dice: random.Random) -> int:
    """All connections, once to four times; again as soon as there are new ones, or a little later."""
    cut = 0
    for _ in range(dice.randint(1, 4)):
        await stage.until(lambda: _has_links(proxy), timeout_s=BITE_S)
        await asyncio.sleep(dice.uniform(0, 0.7))
        cut += proxy.cut()
        await asyncio.sleep(0.05)  # they are gone, so that new ones can be waited for
    return cut


async def _silence(proxy: TcpProxy, dice: random.Random) -> int:
    """Bites as often as there are connections that lost something in it."""
    async with proxy.black_hole() as bites:
        await asyncio.sleep(dice.uniform(*SILENCE_S))
        half_open = sum(link.silent for link in proxy.links)
    return half_open if bites.count else 0


async def _slowness(stage: Stage, proxy: TcpProxy, dice: random.Random, each_way_s: tuple[float, float]) -> int:
    async with proxy.delaying(dice.uniform(*each_way_s)) as bites:
        await _bitten(stage, bites)
        await asyncio.sleep(dice.uniform(4, 8))
    return bites.count


async def _nacked(stage: Stage, dice: random.Random, *, share: float, multiple: bool) -> int:
    async with stage.relay_amqp.acks_as_nacks(share=share, multiple=multiple, about=EVENTS) as bites:
        await _bitten(stage, bites)
        await asyncio.sleep(dice.uniform(1, 4))
    return bites.count


async def _sprung(stage: Stage, trap: AbstractAsyncContextManager[Bites], times: int) -> int:
    """Within it, wait until it has bitten so often."""
    async with trap as bites:
        await _bitten(stage, bites, times)
    return bites.count


async def _bitten(stage: Stage, bites: Bites, times: int = 1) -> None:
    async def often_enough() -> bool:
        return bites.count >= times

    await stage.until(often_enough, timeout_s=BITE_S)


async def _has_links(proxy: TcpProxy) -> bool:
    return bool(proxy.links)
