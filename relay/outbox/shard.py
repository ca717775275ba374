"""The loop of one shard: read -> publish -> settle -> checkpoint, until told to stop or the session breaks.

One task does all of it but publishing, so the database is asked one thing at a time, and nothing changes in the middle of a step.
Several pages are in flight meanwhile, see `relay.outbox.pipeline`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager

import structlog

from relay.errors import BrokerUnavailable
from relay.failpoints import Point, reached
from relay.message import Message, Row
from relay.outbox.blocked import Blocked
from relay.outbox.cursor import Page
from relay.outbox.lease import Ownership
from relay.outbox.pace import Pace
from relay.outbox.parking import Parked, Settlement
from relay.outbox.pipeline import Pipeline
from relay.outbox.progress import Progress
from relay.outbox.reader import Reader
from relay.outbox.retry import Retry
from relay.outbox.routing import route
from relay.outbox.store import Store
from relay.outbox.wakeup import Wakeup
from relay.rabbitmq.contract import Publisher
from relay.settings import OutboxSettings
from relay.supervisor import wait_for

log = structlog.get_logger()

_LINGER_S = 0.05
"""Idle time before falling asleep. Under load the next event is there sooner, so nobody ever notifies."""
_LEAST_S = 0.0005
"""Shorter waits are none on uvloop, which counts whole milliseconds: it would be asked again and again until the next one."""
_BACKOFF_FIRST_S = 0.001
_BACKOFF_LAST_S = 0.01
"""Delays between two looks while awake and idle: a look costs about 0.4 ms of PostgreSQL."""


class Shard:
    """One session of the owner of a shard. Not reusable: after an error a new one starts from the persisted cursor."""

    def __init__(
        self,
        *,
        ownership: Ownership,
        reader: Reader,
        store: Store,
        publisher: Publisher,
        probe: Callable[[], AbstractAsyncContextManager[Publisher]],
        wakeup: Wakeup,
        settings: OutboxSettings,
        source: str,
        progress: Progress,
        stop: asyncio.Event,
    ) -> None:
        self._reader = reader
        self._store = store
        self._publisher = publisher
        self._wakeup = wakeup
        self._settings = settings
        self._source = source
        self._stop = stop
        self._log = log.bind(shard=ownership.shard, epoch=ownership.epoch)
        self._progress = progress
        self._dirty = False  # rows were dealt with that the persisted cursor does not know of
        self._high_id = ownership.high_id
        self._clock = asyncio.get_running_loop().time
        self._checkpointed_at = self._clock()
        self._idle_since: float | None = None
        self._nap_s = _BACKOFF_FIRST_S
        self._pace = Pace(settings.gather_s)
        self._unsaved = 0  # rows confirmed since the last checkpoint
        self._held_up: str | None = None  # why nothing is read
        self._blocked = Blocked(store=store, shard=ownership.shard)
        self._pipeline = Pipeline(
            position=ownership.position,
            publisher=publisher,
            blocked=self._blocked,
            message=self._message,
            settings=settings,
            progress=progress,
        )
        self._retry = Retry(
            store=store,
            blocked=self._blocked,
            publisher=publisher,
            probe=probe,
            message=self._message,
            settings=settings,
            progress=progress,
            wake=wakeup.interrupt,
            log=self._log,
        )

    async def run(self, *, drain: bool = False) -> int:
        """Work until `stop` is set; with `drain`, until nothing is left that can be published now. Returns how many rows are parked.

        Raises BrokerError or PostgresError when the session is over, LeaseLost when another relay owns the shard.
        """
        if drain:
            self._pace = Pace(0)  # what is left is read, not what is still being written
        self._progress.rate.at(self._clock(), self._progress.confirmed)
        await self._retry.look()
        try:
            while not self._stop.is_set():
                self._wakeup.require_connection()
                await self._settle_answered()
                if self._pipeline.is_empty or self._has_to_act():
                    if self._wakeup.told and self._has_to_act():
                        await self._get_up()  # this may take long, and asleep every producer would notify meanwhile
                    await self._act()
                if self._is_held_up():
                    await self._settle_all()
                    if not drain:
                        await self._pause()
                    elif await self._is_drained():
                        break
                    continue
                await self._gather()
                await self._make_room()
                page = await self._read()
                if page.rows:
                    await self._begin(page)
                elif await self._nothing_new(page) and await self._has_rested(drain=drain):
                    break
            await self._settle_all()
            reached(Point.STOPPING)
            await self._save()
            await self._retry.settle_alone()
            reached(Point.STOPPED)
        finally:
            try:
                await self._retry.close()
            finally:
                await self._pipeline.close()
        return self._blocked.rows

    # --- what may change what is sent, or sends by itself: with nothing in flight

    def _has_to_act(self) -> bool:
        return (
            self._wakeup.acted
            or self._wakeup.urgent.is_set()  # whatever it was about: only acting clears it, and until then nothing rests
            or self._clock() >= self._blocked.look_at
            or (not self._blocked.shard_is_paused and self._retry.wants_a_step)
        )

    async def _act(self) -> None:
        """See what operators have done, at once when they say so, and now and then in any case; and try what is parked."""
        await self._settle_all()
        self._wakeup.urgent.clear()
        if self._wakeup.acted:
            self._wakeup.acted = False
            await self._blocked.heed()
        if self._clock() >= self._blocked.look_at:
            await self._retry.look()
            self._progress.looks += 1
            self._progress.changed.set()
        if not self._blocked.shard_is_paused:
            await self._retry.step()
        if self._publisher.lost is not None:
            await self._end_session()

    # --- read -> publish -> settle -> checkpoint

    async def _gather(self) -> None:
        """Wait until the next page is likely to be worth reading, or there is something else to see to."""
        while (left_s := self._pace.due_s(self._clock())) > _LEAST_S:
            if self._has_to_act():
                break  # a nap would end at once, again and again
            if not self._pipeline.is_empty:
                await self._pipeline.wait(left_s)
                await self._settle_answered()
            elif self._pace.gathers:
                await self._nap(left_s)
            if not self._pace.gathers:
                break

    async def _make_room(self) -> None:
        """Wait until another page may be begun."""
        while self._pipeline.is_full:
            await self._pipeline.wait()
            await self._settle_answered()

    async def _read(self) -> Page:
        page = await self._reader.read(self._pipeline.read_to, page_rows=1 if self._progress.careful else None)
        self._pace.saw(page, self._clock())
        return page

    async def _begin(self, page: Page) -> None:
        reached(Point.PAGE_READ)
        await self._settle_answered()  # what is known to be blocked by now is not sent
        self._pipeline.begin(page)
        await self._get_up()

    async def _nothing_new(self, page: Page) -> bool:
        """Nothing was found. True if nothing is in flight, and nothing was committed since the last look."""
        closing = self._pipeline.read_to.window is not None
        self._pipeline.skip(page)
        if not self._pipeline.is_empty:
            return False
        self._dirty = self._dirty or closing
        return not closing  # the end of a backlog says nothing about what was committed since it was opened

    async def _settle_all(self) -> None:
        """Wait for everything in flight."""
        while not self._pipeline.is_empty:
            await self._pipeline.wait()
            await self._settle_answered()

    async def _settle_answered(self) -> None:
        """Settle, in their order, the pages that are answered. Raises BrokerUnavailable when the publisher is lost."""
        while self._pipeline.is_settleable and self._publisher.lost is None:
            await self._settle()
        if self._publisher.lost is not None or self._pipeline.is_answered:
            await self._end_session()

    async def _settle(self) -> None:
        """Deal with the oldest page: what is confirmed is counted, what is not is parked, and the cursor moves behind both."""
        reached(Point.CONFIRMED)
        settlement = self._pipeline.settle()
        confirmed = settlement.confirmed
        if confirmed:
            self._high_id = max(self._high_id, confirmed[-1].id)  # a page is in the order of ids
        self._unsaved += len(confirmed)
        self._progress.confirmed += len(confirmed)
        self._dirty = self._dirty or settlement.settled > 0
        await self._checkpoint(settlement.parked)
        self._count(settlement)
        self._progress.recent.note(confirmed)
        self._retry.saw_traffic()  # now, not before: a page can take longer than what counts as a while

    async def _checkpoint(self, parked: Sequence[Parked]) -> None:
        """Write the cursor: at once with what must be parked, otherwise now and then (a crash repeats what came since)."""
        if parked or self._clock() - self._checkpointed_at >= self._settings.checkpoint_interval_s:
            await self._save(parked)

    async def _save(self, parked: Sequence[Parked] = ()) -> None:
        if not self._dirty:
            return
        rate = self._progress.rate.at(self._clock(), self._progress.confirmed)
        await self._store.checkpoint(self._pipeline.position, self._high_id, parked, confirmed=self._unsaved, rate=rate)
        self._dirty, self._unsaved = False, 0
        self._checkpointed_at = self._clock()
        self._progress.checkpoints += 1
        self._retry.note(parked)

    def _count(self, settlement: Settlement) -> None:
        self._progress.pages += 1
        self._progress.published += len(settlement.confirmed)
        self._progress.parked += len(settlement.parked)
        self._progress.careful = max(0, self._progress.careful - settlement.settled)
        self._progress.changed.set()

    async def _end_session(self) -> None:
        """The publisher is gone: write down what is known, up to the first row whose fate is not, and raise BrokerUnavailable.

        If a message may be to blame, the next session looks for it among the rest, one at a time.
        """
        await self._pipeline.conclude()
        while self._pipeline.is_settleable:
            await self._settle()
        await self._save()
        lost, unsettled = self._publisher.lost, self._pipeline.rows
        if self._publisher.message_is_suspect and unsettled:
            self._progress.careful = unsettled
            self._log.warning("careful", reason="a message may have closed the channel", rows=unsettled)
        raise BrokerUnavailable(f"the session with RabbitMQ ended: {lost}") from lost

    def _is_held_up(self) -> bool:
        """True when nothing may be read: an operator paused the shard, or too much is parked."""
        why: str | None = None
        if self._blocked.shard_is_paused:
            why = "an operator paused the shard"
        elif self._blocked.refused_rows > self._settings.parked_limit:
            why = "more rows are parked than outbox.parked_limit"
        if why != self._held_up:
            told = {"parked": self._blocked.rows, "parked_limit": self._settings.parked_limit}
            if why is None:
                self._log.warning("resumed", **told)
            else:
                self._log.error("paused", reason=why, **told)
            self._held_up = why
        self._progress.shard_is_paused = self._blocked.shard_is_paused
        return why is not None

    async def _pause(self) -> None:
        await self._get_up()  # asleep, every producer would notify for as long as this lasts
        await self._save()
        await self._nap(self._settings.poll_interval_s)

    def _message(self, row: Row) -> Message:
        return route(row, source=self._source, template=self._settings.routing_key)

    # --- nothing to do

    async def _has_rested(self, *, drain: bool) -> bool:
        """True when a drain is done; otherwise after a rest."""
        if drain:
            return await self._is_drained()
        await self._rest()
        return False

    async def _is_drained(self) -> bool:
        """True when no parked row is due either; otherwise a short time later."""
        if self._retry.busy:
            await self._nap(_BACKOFF_LAST_S)
            return False
        return True

    async def _rest(self) -> None:
        """Nothing is new: look again soon for a while, then fall asleep if no producer is at work."""
        if self._stop.is_set():
            return
        if self._wakeup.told:
            await self._get_up()
        now = self._clock()
        if self._idle_since is None:
            self._idle_since, self._nap_s = now, _BACKOFF_FIRST_S
        if self._settings.wakeup == "poll":
            await self._save()
            await self._nap(self._settings.poll_interval_s)
        elif self._wakeup.asleep:
            await self._save()
            self._progress.sleeps += 1
            self._progress.changed.set()
            reached(Point.ASLEEP)
            await self._wakeup.wait(self._retry.within(self._settings.poll_interval_s))
            reached(Point.WOKEN)
            if not self._wakeup.told:  # else what it is about is read and sent first, whoever notifies meanwhile
                await self._get_up()
        elif now - self._idle_since < _LINGER_S or not await self._wakeup.try_fall_asleep():
            await self._nap(self._nap_s)
            self._nap_s = min(_BACKOFF_LAST_S, self._nap_s * 2)

    async def _get_up(self) -> None:
        self._idle_since = None
        await self._wakeup.get_up()

    async def _nap(self, seconds: float) -> None:
        """Sleep, unless `stop` is set or an operator acts meanwhile, or a parked row becomes due."""
        await wait_for(self._wakeup.urgent, self._retry.within(seconds))
