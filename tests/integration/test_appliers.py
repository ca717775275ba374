"""Several appliers on one queue's batches: once, in order, on connections of their own; whatever happens to one of them."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import pytest

from relay.inbox import Event, Inbox
from relay.postgres.connect import Connection
from tests.integration.inbox_harness import Sent, World, eventually, record, recording, stream, world

NAMES = "abcdefghijkl"
APPLIERS = 4


class Gate:
    """An inbox whose handlers wait until it is opened. `at_work` are the backends on which they do.

    The first event waits apart, until all others are at the consumer and so in one batch.
    """

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.at_work: set[int] = set()
        self._begun = asyncio.Event()
        self._collected = asyncio.Event()
        self.inbox = Inbox("shop")
        self.inbox.on("T")(self.wait)

    async def wait(self, event: Event, tx: Connection) -> None:
        await record(event, tx)
        if event.aggregate_id == "first":
            self._begun.set()
            await self._collected.wait()
            return
        self.at_work.add(tx.get_server_pid())
        await self.opened.wait()

    async def fill(self, w: World) -> None:
        """Publish two events of each aggregate, and return when all appliers are at work on one batch."""
        await w.publish([Sent(seq=1, aggregate="first")])
        await self._begun.wait()
        await w.publish([e for name in NAMES for e in stream(name, 2)])
        await eventually(w.queue_is_empty)  # all is delivered, though nothing is acknowledged
        self._collected.set()

        async def are_at_work() -> bool:
            return len(self.at_work) == APPLIERS

        await eventually(are_at_work)


async def is_once_and_in_order(w: World, each: int) -> bool:
    return all([await w.effects(name) == list(range(1, each + 1)) for name in NAMES])


async def test_duplicates_and_swaps_are_applied_once_and_in_order_by_all_of_them(database: str, broker: str) -> None:
    events = [e for one in zip(*(stream(name, 50) for name in NAMES), strict=True) for e in one]
    dice = random.Random(1)
    for i in dice.sample(range(len(events) - 12), 60):
        events[i], events[i + 12] = events[i + 12], events[i]
    for e in dice.sample(events, 60):
        events.insert(dice.randrange(len(events)), e)
    backends: set[int] = set()
    inbox = Inbox("shop")

    @inbox.on("T")
    async def noting(event: Event, tx: Connection) -> None:
        backends.add(tx.get_server_pid())
        await record(event, tx)

    async with world(database, broker, appliers=APPLIERS) as w:
        async with w.running(inbox):
            await w.publish(events)
            await w.until(lambda s: s.applied == 600 and s.received == 660)
        assert await is_once_and_in_order(w, 50)
        assert await w.held() == []
        assert await w.queue_is_empty()
    assert len(backends) == APPLIERS


async def test_they_are_at_work_at_the_same_time(database: str, broker: str) -> None:
    gate = Gate()
    async with world(database, broker, appliers=APPLIERS) as w, w.running(gate.inbox):
        await gate.fill(w)
        gate.opened.set()
        await w.until(lambda s: s.applied == 25)


async def test_what_fails_in_one_part_holds_its_aggregate_only(database: str, broker: str) -> None:
    inbox = recording()

    @inbox.on("P")
    async def poison(event: Event, tx: Connection) -> None:
        raise RuntimeError("no")

    poisoned = [Sent(seq=1, aggregate="p", event_type="P"), *stream("p", 3)[1:]]
    async with world(database, broker, appliers=APPLIERS, retry_first_s=60, retry_max_s=60) as w:
        async with w.running(inbox):
            await w.publish([*poisoned, *(e for name in NAMES for e in stream(name, 4))])
            await w.until(lambda s: s.applied == 48 and s.failed == 1 and s.behind == 2)
        assert await is_once_and_in_order(w, 4)
        assert await w.held() == [
            (1, "failed", "retrying", 1),
            (2, "behind", "waiting", 0),
            (3, "behind", "waiting", 0),
        ]


async def test_a_backend_that_dies_under_one_part_costs_nobody_an_effect(database: str, broker: str) -> None:
    """The others' parts are committed, and recognised when all is delivered again."""
    killed: list[int] = []
    inbox = Inbox("shop")

    @inbox.on("T")
    async def once_deadly(event: Event, tx: Connection) -> None:
        if event.aggregate_id == "a" and event.seq == 3 and not killed:
            killed.append(tx.get_server_pid())
            await tx.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        await record(event, tx)

    async with world(database, broker, appliers=APPLIERS) as w:
        async with w.running(inbox):
            await w.publish([e for one in zip(*(stream(name, 4) for name in NAMES), strict=True) for e in one])
            await w.until(lambda s: s.applied == 48)
        assert await is_once_and_in_order(w, 4)
        assert killed
        assert await w.queue_is_empty()


async def test_an_idle_connection_of_one_of_them_that_is_killed_is_noticed(database: str, broker: str) -> None:
    mine = "SELECT pid FROM pg_stat_activity WHERE application_name = 'relay inbox shop' ORDER BY backend_start"
    async with world(database, broker, appliers=APPLIERS) as w, w.running(recording()):
        await w.publish([e for name in NAMES for e in stream(name, 1)])
        await w.until(lambda s: s.applied == 12)
        await eventually(
            lambda: w.db.fetchval(f"SELECT count(*) = {APPLIERS} FROM ({mine}) AS m")
        )  # the first look is over
        before = {row["pid"] for row in await w.db.fetch(mine)}
        await w.db.execute("SELECT pg_terminate_backend($1)", [row["pid"] for row in await w.db.fetch(mine)][-1])

        async def are_replaced() -> bool:
            now = {row["pid"] for row in await w.db.fetch(mine)}
            return len(now) == APPLIERS and not now & before

        await eventually(are_replaced)
        await w.publish([e for name in NAMES for e in stream(name, 2)[1:]])
        await w.until(lambda s: s.applied == 24)


async def test_a_stop_lets_every_part_end_and_acknowledges_the_batch(database: str, broker: str) -> None:
    gate = Gate()
    stop = asyncio.Event()
    async with world(database, broker, appliers=APPLIERS) as w:
        running = asyncio.create_task(gate.inbox.run(w.settings, stop=stop))
        await eventually(lambda: w.are_subscribed(1))
        await gate.fill(w)
        stop.set()
        await asyncio.sleep(0)
        assert not running.done()
        gate.opened.set()
        applied = (await running).applied
        assert 1 < applied <= 25
        assert await w.db.fetchval("SELECT count(*) FROM effect") == applied
        async with w.channel() as channel:
            assert (await channel.queue_declare("shop", passive=True)).message_count == 25 - applied


async def test_cancelled_none_of_them_commits_and_all_is_done_later(database: str, broker: str) -> None:
    gate = Gate()
    async with world(database, broker, appliers=APPLIERS) as w:
        running = asyncio.create_task(gate.inbox.run(w.settings))
        await eventually(lambda: w.are_subscribed(1))
        await gate.fill(w)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        async with w.running(recording()):
            await w.until(lambda s: s.applied == 24)
        assert await is_once_and_in_order(w, 2)


async def test_none_of_them_goes_on_after_the_end_when_a_handler_swallows_its_cancellation(
    database: str, broker: str
) -> None:
    """It would connect again, and apply what is left, beside the next session; and nobody would close its connection."""
    begun = asyncio.Event()
    ended = False
    late: list[str] = []
    inbox = Inbox("shop")

    @inbox.on("T")
    async def deaf(event: Event, tx: Connection) -> None:
        if ended:
            late.append(str(event.aggregate_id))
        if event.seq == 2 and not begun.is_set():
            begun.set()
            loop = asyncio.get_running_loop()
            until = loop.time() + 2.5
            while loop.time() < until:
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(until - loop.time())
        await record(event, tx)

    async with world(database, broker, appliers=2, handler_timeout_s=1.5) as w:
        daemon = w.settings.daemon.model_copy(update={"shutdown_grace_s": 0.1})
        async with w.running(recording()):
            pass
        await w.publish([e for name in NAMES for e in stream(name, 3)])
        stop = asyncio.Event()
        running = asyncio.create_task(inbox.run(w.settings.model_copy(update={"daemon": daemon}), stop=stop))
        await begun.wait()
        stop.set()
        await running
        ended = True
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and not task.done()]
        assert [task for task in others if "appl" in str(task.get_coro()).lower()] == []
        async with w.running(recording()):
            await w.until(lambda s: s.applied + s.duplicates >= len(NAMES) * 3)
        assert late == []
        assert await is_once_and_in_order(w, 3)
