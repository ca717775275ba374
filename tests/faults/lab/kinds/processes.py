"""Daemons that are killed, told to stop, frozen, stalled: relays and consumers as processes.

What is counted is what the kernel tells of them (/proc), their exit codes, and the epoch of the log.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from tests.faults.lab.daemons import Daemon
from tests.faults.lab.fault import Broken, fault
from tests.faults.lab.stage import Stage, both_consume

KILLED = -signal.SIGKILL
TAKEOVER_S = 30.0
AT_WORK_S = 30.0
"""Until a daemon that was started a moment ago is at work."""
GRACE_S = 20.0
"""The default of daemon.shutdown_grace_s, which the laboratory leaves alone."""
GOODBYE_S = 9.0
"""What ending a process takes besides: the goodbyes to servers that are being broken at the same time, 2 to 3 s each."""
HEARTBEATS_S = 16.0
"""A client that is silent for two to three heartbeats (5 s in the laboratory) is cut off by RabbitMQ."""
RESTS_A_SECOND = 4
"""An event loop at work waits dozens of times a second; one that stands still only answers the sampler's signals."""

TERMINATE_LEASE = """
SELECT pg_terminate_backend(l.pid) FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid AND a.application_name = 'relay lease 0'
WHERE l.locktype = 'advisory' AND l.classid = 727003 AND l.objid = 0 AND l.granted
"""
"""The owner's backend only: the standby's has the same name, and does not hold the lock."""


# --- relays


@fault("relay killed", rows=(1, 2), touches=("relay",), smoke=True)
async def relay_killed(stage: Stage, dice: random.Random) -> int:
    """kill -9 of the owner at any moment; the standby takes over, the dead one is started again as the next standby."""
    owner, before = await stage.owner(), await stage.epoch()
    await asyncio.sleep(dice.uniform(0, 0.5))  # anywhere between two checkpoints
    code = await owner.kill9()
    return int(code == KILLED and await _taken_over(stage, before))


@fault("standby killed", rows=(1,), touches=("relay",))
async def standby_killed(stage: Stage, dice: random.Random) -> int:
    """kill -9 of the relay that only waits: nobody may notice."""
    await asyncio.sleep(dice.uniform(0, 0.5))
    standby = await stage.standby()
    await at_work(stage, standby)
    return int(await standby.kill9() == KILLED)


@fault("both relays killed", rows=(1, 2), touches=("relay",))
async def both_relays_killed(stage: Stage, dice: random.Random) -> int:
    """Nobody publishes until a supervisor has started one of them again."""
    await stage.owner()
    before = await stage.epoch()
    await asyncio.sleep(dice.uniform(0, 0.5))
    codes = await asyncio.gather(*(relay.kill9() for relay in stage.relays))
    return int(KILLED in codes and await _taken_over(stage, before))


@fault("relay terminated", rows=(3,), touches=("relay",))
async def relay_terminated(stage: Stage, dice: random.Random) -> int:
    """SIGTERM of the owner under load: it must end by itself, in time and with exit code 0."""
    owner, before = await stage.owner(), await stage.epoch()
    await asyncio.sleep(dice.uniform(0, 0.5))
    await _terminated_in_time(owner)
    return int(await _taken_over(stage, before))


@fault("relay frozen", rows=(16,), touches=("relay",))
async def relay_frozen(stage: Stage, dice: random.Random) -> int:
    """SIGSTOP of the owner for some seconds: its lease stays its own, as its sockets do."""
    owner = await stage.owner()
    async with frozen(stage, owner) as stopped:
        await asyncio.sleep(dice.uniform(2, 7))
    return stopped.count("T")


@fault("zombie relay", rows=(15, 16), touches=("relay", "relay-pg", "producer-db"), smoke=True)
async def zombie_relay(stage: Stage, dice: random.Random) -> int:
    """The owner is frozen, its lock is taken from it, the standby takes over; then the frozen one goes on, not knowing.

    Whatever it was about to write is fenced by the epoch. Bitten when the epoch rose while it stood still.
    """
    await at_work(stage, await stage.standby())
    owner, before = await stage.owner(), await stage.epoch()
    await asyncio.sleep(dice.uniform(0, 0.3))
    async with frozen(stage, owner) as stopped:
        await stage.producer_sql(TERMINATE_LEASE)
        succeeded = await _taken_over(stage, before) and state(owner.pid) == "T"
        await asyncio.sleep(dice.uniform(0.5, 3))  # the successor publishes what the frozen one had in hand
    return int(succeeded and "T" in stopped)


@fault("relay stalled", rows=(39,), touches=("relay",))
async def relay_stalled(stage: Stage, dice: random.Random) -> int:
    """The owner's event loop stands still, for less than the heartbeats of its connections."""
    owner = await stage.owner()
    await at_work(stage, owner)
    return await _stalled([owner], dice.uniform(2, 4))


@fault("relay stalled for longer than the heartbeats", rows=(39, 6), touches=("relay", "relay-amqp"))
async def relay_stalled_for_long(stage: Stage, dice: random.Random) -> int:
    """RabbitMQ cuts the silent client off; it finds that out when it goes on, and starts a new session."""
    owner = await stage.owner()
    await at_work(stage, owner)
    mark = stage.broker.log.stat().st_size
    stood = await _stalled([owner], dice.uniform(HEARTBEATS_S, HEARTBEATS_S + 2))
    return _count_since(stage.broker.log, mark, "missed heartbeats from client") if stood else 0


# --- consumers


@fault("consumer killed", rows=(21, 22, 23), touches=("consumer",), smoke=True)
async def consumer_killed(stage: Stage, dice: random.Random) -> int:
    """kill -9 of one of two, with messages in hand: they are delivered to the other, late and out of order."""
    consumer = dice.choice(stage.consumers)
    await at_work(stage, consumer)
    await asyncio.sleep(dice.uniform(0, 0.5))
    return int(await consumer.kill9() == KILLED)


@fault("all consumers killed", rows=(21, 23), touches=("consumer",))
async def all_consumers_killed(stage: Stage, dice: random.Random) -> int:
    """Nobody consumes until a supervisor has started them again, which is when the fault is over: as with both relays."""
    for consumer in stage.consumers:
        await at_work(stage, consumer)
    await asyncio.sleep(dice.uniform(0, 0.5))
    codes = await asyncio.gather(*(consumer.kill9() for consumer in stage.consumers))
    for consumer in stage.consumers:
        await at_work(stage, consumer)
    return int(all(code == KILLED for code in codes))


@fault("consumer terminated", rows=(3, 22), touches=("consumer",))
async def consumer_terminated(stage: Stage, dice: random.Random) -> int:
    """SIGTERM of one under load: it must end by itself, in time and with exit code 0."""
    consumer = dice.choice(stage.consumers)
    await at_work(stage, consumer)
    await asyncio.sleep(dice.uniform(0, 0.5))
    await _terminated_in_time(consumer)
    return 1


@fault("consumer frozen", rows=(16, 23), touches=("consumer",))
async def consumer_frozen(stage: Stage, dice: random.Random) -> int:
    """SIGSTOP of one for some seconds, perhaps in the middle of a transaction whose locks the other waits for."""
    consumer = dice.choice(stage.consumers)
    await at_work(stage, consumer)
    async with frozen(stage, consumer) as stopped:
        await asyncio.sleep(dice.uniform(2, 7))
    return stopped.count("T")


@fault("consumer stalled", rows=(39,), touches=("consumer",))
async def consumer_stalled(stage: Stage, dice: random.Random) -> int:
    """A handler computes: the event loop of one consumer stands still."""
    consumer = dice.choice(stage.consumers)
    await at_work(stage, consumer)
    return await _stalled([consumer], dice.uniform(2, 6))


@fault("consumers stalled for longer than the heartbeats", rows=(39, 6), touches=("consumer", "consumer-amqp"))
async def consumers_stalled_for_long(stage: Stage, dice: random.Random) -> int:
    """RabbitMQ cuts both off and hands their messages out again; what they acknowledge afterwards is void."""
    for consumer in stage.consumers:
        await at_work(stage, consumer)
    await stage.until(lambda: both_consume(stage), timeout_s=30)  # who is only just connecting cannot be cut off
    mark = stage.broker.log.stat().st_size
    stood = await _stalled(stage.consumers, dice.uniform(HEARTBEATS_S, HEARTBEATS_S + 2))
    return _count_since(stage.broker.log, mark, "missed heartbeats from client") if stood else 0


# --- what is done to a process, and seen of it


async def _taken_over(stage: Stage, before: int) -> bool:
    """Wait for the next owner of the log."""

    async def raised() -> bool:
        return await stage.epoch() > before

    return await stage.until(raised, timeout_s=TAKEOVER_S)


async def at_work(stage: Stage, daemon: Daemon) -> None:
    """Wait until it runs and has its signal handlers: before that it can neither be stalled nor has it anything to lose."""
    await _require(stage, lambda: _catches(daemon.pid, signal.SIGTERM), f"{daemon.name} is not at work", AT_WORK_S)


@asynccontextmanager
async def frozen(stage: Stage, *daemons: Daemon) -> AsyncIterator[list[str]]:
    """Within it they stand still. Yields a list that has their states, as the kernel told them at the end of it."""
    pids = [daemon.pid for daemon in daemons]
    stopped: list[str] = []
    try:
        for daemon in daemons:
            daemon.freeze()
        await _require(stage, lambda: all(state(pid) == "T" for pid in pids), "SIGSTOP did not stop it", 5)
        yield stopped
        stopped += [state(pid) for pid in pids]
    finally:
        for daemon in daemons:
            daemon.thaw()


async def _stalled(daemons: Sequence[Daemon], seconds: float) -> int:
    """Stall them; how many were seen to do next to nothing for half of the time, though nothing stopped them."""
    for daemon in daemons:
        daemon.stall(seconds)
    began = time.monotonic()
    await asyncio.sleep(seconds / 4)
    before = [_rests(daemon.pid) for daemon in daemons]
    await asyncio.sleep(seconds / 2)
    after = [_rests(daemon.pid) for daemon in daemons]
    await asyncio.sleep(max(0.0, began + seconds - time.monotonic()))
    most = RESTS_A_SECOND * seconds / 2
    return sum(a is not None and b is not None and b - a < most for a, b in zip(before, after, strict=True))


async def _terminated_in_time(daemon: Daemon) -> None:
    """Raises Broken when it does not end as the README promises."""
    began = time.monotonic()
    code = await daemon.terminate()
    took_s = time.monotonic() - began
    if code != 0 or took_s > GRACE_S + GOODBYE_S:
        raise Broken(f"{daemon.name} ended {took_s:.1f} s after SIGTERM with exit code {code}")


async def _require(stage: Stage, condition: Callable[[], bool], failure: str, timeout_s: float) -> None:
    async def asked() -> bool:
        return condition()

    if not await stage.until(asked, timeout_s=timeout_s, every_s=0.02):
        raise TimeoutError(failure)


def state(pid: int | None) -> str:
    """The kernel's letter for what a process does: R, S, D, or T for one that is stopped; nothing when it is gone."""
    return (_status(pid).get("State") or " ")[0].strip()


def _catches(pid: int | None, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal."""
    return bool(int(_status(pid).get("SigCgt", "0"), 16) >> (number - 1) & 1)


def _rests(pid: int | None) -> int | None:
    """How often its main thread has given up the processor to wait: an event loop at work does so many times a second."""
    count = _status(pid).get("voluntary_ctxt_switches")
    return None if count is None else int(count)


def _status(pid: int | None) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _count_since(log: Path, mark: int, words: str) -> int:
    with log.open("rb") as file:
        file.seek(mark)
        return file.read().count(words.encode())
