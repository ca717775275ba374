"""The clock of one process jumps by an hour while it works, forth and back: libfaketime lies to it alone.

The daemon is started again with the library, which reads from a file what to add to the wall clock; the monotonic clock is
left alone, as it is when a real clock is set. Afterwards it is started again without.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path

import aio_pika
from aio_pika.abc import AbstractIncomingMessage

from tests.faults.lab.daemons import Daemon
from tests.faults.lab.fault import fault
from tests.faults.lab.kinds.processes import at_work
from tests.faults.lab.stage import Stage

HOUR_S = 3600
SEEN_S = 4.0
"""Longest wait until the process shows what time it thinks it is: marks are published every second."""
MARKS_EXCHANGE = "relay.events.marks"
TIMESTAMP = re.compile(r'"timestamp": "([^"]+)"')


def library() -> Path | None:
    """Debian's package `faketime` has it."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


@fault(
    "relay's clock jumps",
    rows=(33,),
    touches=("relay", "relay-amqp", "relay-pg", "producer-db"),
    needs_repair=True,  # of the marks
    needs=lambda: library() is not None,
)
async def relay_clock_jumps(stage: Stage, dice: random.Random) -> int:
    """The owner's. Bitten for each jump after which a mark was published with the wrong time."""
    faked = await stage.standby()
    async with _lied_to(stage, faked) as set_clock:
        await (await stage.owner()).kill9()
        await stage.until(lambda: _owns(stage, faked), timeout_s=15)
        async with _marks(stage) as times:
            return await _jump(stage, dice, set_clock, lambda: times, _nothing)


@fault(
    "consumer's clock jumps",
    rows=(33,),
    touches=("consumer", "consumer-amqp", "consumer-pg", "consumer-db"),
    needs=lambda: library() is not None,
)
async def consumer_clock_jumps(stage: Stage, dice: random.Random) -> int:
    """Bitten for each jump after which it logged something with the wrong time; to make it log, its connections are closed."""
    faked = dice.choice(stage.consumers)
    async with _lied_to(stage, faked) as set_clock:
        mark = faked.log_mark()
        return await _jump(stage, dice, set_clock, lambda: _logged(faked, mark), lambda: stage.consumer_amqp.cut())


async def _jump(
    stage: Stage,
    dice: random.Random,
    set_clock: Callable[[int], None],
    times: Callable[[], list[float]],
    provoke: Callable[[], object],
) -> int:
    """An hour forth and an hour back, in either order; how many of the jumps were seen."""
    seen = 0
    for offset in dice.sample([HOUR_S, -HOUR_S], 2):
        set_clock(offset)
        provoke()

        async def shown(offset: int = offset) -> bool:
            return any(abs(at - time.time() - offset) < HOUR_S / 10 for at in times())

        seen += await stage.until(shown, timeout_s=SEEN_S)
        await asyncio.sleep(dice.uniform(0, 1.5))
    set_clock(0)
    return seen


@asynccontextmanager
async def _lied_to(stage: Stage, daemon: Daemon) -> AsyncIterator[Callable[[int], None]]:
    """Within it the daemon runs with the library. Yields what sets its clock: seconds to add."""
    file, usual = stage.folder / f"{daemon.name}.clock", daemon.environment

    def set_clock(offset: int) -> None:
        unfinished = file.with_suffix(".new")  # it reads the file at any time
        unfinished.write_text(f"{offset:+d}\n")
        unfinished.replace(file)

    set_clock(0)
    daemon.environment = usual | {
        "LD_PRELOAD": str(library()),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    await at_work(stage, daemon)
    try:
        await daemon.restart()
        await at_work(stage, daemon)
        yield set_clock
    finally:
        daemon.environment = usual
        await daemon.restart()


@asynccontextmanager
async def _marks(stage: Stage) -> AsyncIterator[list[float]]:
    """Yields a list that gets the times which the relay writes on its marks."""
    times: list[float] = []

    async def take(message: AbstractIncomingMessage) -> None:
        if message.timestamp is not None:
            times.append(message.timestamp.timestamp())

    async with await aio_pika.connect(stage.broker.url(), timeout=10) as connection:
        channel = await connection.channel(publisher_confirms=False)
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(MARKS_EXCHANGE, "#")
        await queue.consume(take, no_ack=True)
        yield times


def _logged(daemon: Daemon, mark: int) -> list[float]:
    """The times of what it has logged since then."""
    return [datetime.fromisoformat(at).timestamp() for at in TIMESTAMP.findall(daemon.log_since(mark))]


async def _owns(stage: Stage, daemon: Daemon) -> bool:
    return await stage.owner() is daemon


def _nothing() -> None:
    return None
