"""The pipeline of one shard: read -> route -> publish -> settle -> checkpoint, until told to stop or the session breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager

import structlog

from relay.errors import BrokerUnavailable
from relay.failpoints import Point, reached
from relay.message import Aggregate, Message, Row
from relay.outbox.blocked import Blocked
from relay.outbox.cursor import Page
from relay.outbox.lease import Ownership
from relay.outbox.parking import Parked, settle, unsendable, waves
from relay.outbox.progress import Progress
from relay.outbox.reader import Reader
from relay.outbox.retry import Retry
from relay.outbox.routing import route
from relay.outbox.store import Store
from relay.outbox.wakeup import Wakeup
from relay.rabbitmq.contract import Confirmed, Outcome, Publisher, Refused, Unknown
from relay.settings import OutboxSettings
from relay.supervisor import wait_for

log = structlog.get_logger()

_LINGER_S = 0.05
"""Idle time before falling asleep. Under load the next event is there sooner, so nobody ever notifies."""
_BACKOFF_FIRST_S = 0.001
_BACKOFF_LAST_S = 0.01
"""Delays between two looks while awake and idle: a look costs about 0.4 ms of PostgreSQL."""
_HOPELESS = 3
_FEW_ROWS = 10


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
        self._position = ownership.position  # everything before it is confirmed or parked
        self._dirty = False  # rows were dealt with that the persisted cursor does not know of
        self._high_id = ownership.high_id
        self._clock = asyncio.get_running_loop().time
        self._checkpointed_at = self._clock()
        self._idle_since: float | None = None
        self._nap_s = _BACKOFF_FIRST_S
        self._unsaved = 0  # rows confirmed since the last checkpoint
        self._held_up: str | None = None  # why nothing is read
        self._blocked = Blocked(store=store, shard=ownership.shard)
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
        self._progress.rate.at(self._clock(), self._progress.confirmed)
        await self._retry.look()
        following: asyncio.Task[Page] | None = None
        try:
            while not self._stop.is_set():
                self._wakeup.require_connection()
                if self._publisher.lost is not None:
                    self._end_session(0)
                await self._look()
                if not self._blocked.shard_is_paused:
                    await self._retry.step()
                if self._is_held_up():
                    if not drain:
                        await self._pause()
                    elif await self._is_drained():
                        break
                    continue
                page = await (following or self._read())
                following = None
                if page.empty:
                    closing = self._position.window is not None
                    self._position = self._position.after(page)
                    if closing:  # the end of a backlog says nothing about what was committed since it was opened
                        self._dirty = True
                        continue
                    if not drain:
                        await self._rest()
                    elif await self._is_drained():
                        break
                    continue
                await self._get_up()
                following = self._read_ahead(page)
                await self._handle(page, following)
                self._retry.saw_traffic()  # now, not before: a page can take longer than what counts as a while
            reached(Point.STOPPING)
            await self._save()
            await self._retry.settle_alone()
            reached(Point.STOPPED)
        finally:
            await self._retry.close()
            if following is not None:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
        return self._blocked.rows

    async def _look(self) -> None:
        """See what operators have done: at once when they say so, and now and then in any case."""
        self._wakeup.urgent.clear()
        if self._wakeup.acted:
            self._wakeup.acted = False
            await self._blocked.heed()
        if self._clock() >= self._blocked.look_at:
            await self._retry.look()
            self._progress.looks += 1
            self._progress.changed.set()

    # --- read -> publish -> settle -> checkpoint

    async def _read(self) -> Page:
        return await self._reader.read(self._position, page_rows=1 if self._progress.careful else None)

    def _read_ahead(self, page: Page) -> asyncio.Task[Page] | None:
        """The next page is read while this one is published; at the end of a window, and while careful, it is not."""
        if page.complete or self._progress.careful:
            return None
        return asyncio.create_task(self._reader.read(self._position.after(page)))

    async def _handle(self, page: Page, following: asyncio.Task[Page] | None) -> None:
        reached(Point.PAGE_READ)
        outcomes = await self._publish(page.rows)
        if following is not None:
            await asyncio.wait([following])  # it uses the connection that the checkpoint needs
        reached(Point.CONFIRMED)
        final = self._give_up_unconfirmed(page.rows, outcomes)
        settlement = settle(page.rows, final, self._blocked.aggregates, self._blocked.pauses)
        whole = settlement.settled == len(page.rows)
        if whole:
            self._position = self._position.after(page)
        elif settlement.settled:
            self._position = self._position.within(page, page.rows[settlement.settled - 1].id)
        if settlement.confirmed:
            self._high_id = max(self._high_id, max(row.id for row in settlement.confirmed))
        self._unsaved += len(settlement.confirmed)
        self._progress.confirmed += len(settlement.confirmed)
        self._dirty = self._dirty or settlement.settled > 0
        await self._checkpoint(settlement.parked, force=not whole)
        self._count(settlement.settled, len(settlement.confirmed), settlement.parked)
        self._progress.recent.note(settlement.confirmed)
        if not whole or self._publisher.lost is not None:
            self._end_session(len(page.rows) - settlement.settled)

    async def _publish(self, rows: Sequence[Row]) -> list[Outcome | None]:
        """The outcome of every row, None for one that was not sent because it or its aggregate is held up."""
        outcomes: list[Outcome | None] = [None] * len(rows)
        unsent = unsendable(rows, self._blocked.aggregates, self._blocked.pauses)
        failed: set[Aggregate | None] = set()  # in this page
        for wave in waves(rows) if self._settings.order == "strict" else [range(len(rows))]:
            chosen = [i for i in wave if i not in unsent and rows[i].aggregate not in failed]
            for i, outcome in zip(chosen, await self._send([rows[i] for i in chosen]), strict=True):
                outcomes[i] = outcome
                if rows[i].aggregate is not None and not isinstance(outcome, Confirmed):
                    failed.add(rows[i].aggregate)
            if any(isinstance(outcome, Unknown) for outcome in outcomes):
                return [Unknown("not sent") if o is None and i not in unsent else o for i, o in enumerate(outcomes)]
        return outcomes

    def _give_up_unconfirmed(self, rows: Sequence[Row], outcomes: Sequence[Outcome | None]) -> Sequence[Outcome | None]:
        """Park a row that is not confirmed in time, again and again: its queue hangs, not the broker.

        That others were confirmed beside it is the evidence. A few rows alone in the rest of a window cannot have that, and
        would hold up everything behind the window; a whole page that is late without it means that the broker is not well.
        """
        late = [row.id for row, o in zip(rows, outcomes, strict=True) if isinstance(o, Unknown) and o.timed_out]
        witnessed = any(isinstance(o, Confirmed) for o in outcomes)
        before = self._progress.unconfirmed
        weight = 2 if witnessed else 1
        scores = {i: before.get(i, 0) + weight for i in late if witnessed or i in before or len(late) <= _FEW_ROWS}
        if late:
            self._progress.unconfirmed = scores
        hopeless = Refused("unconfirmed", "its queue did not confirm in time, several times")
        return [hopeless if scores.get(row.id, 0) >= _HOPELESS else o for row, o in zip(rows, outcomes, strict=True)]

    async def _send(self, rows: Sequence[Row]) -> list[Outcome]:
        if not rows:
            return []
        reached(Point.PUBLISHING)
        return await self._publisher.publish([self._message(row) for row in rows])

    def _message(self, row: Row) -> Message:
        return route(row, source=self._source, template=self._settings.routing_key)

    async def _checkpoint(self, parked: Sequence[Parked], *, force: bool) -> None:
        """Write the cursor: at once with what must be parked, otherwise now and then (a crash repeats what came since)."""
        due = self._clock() - self._checkpointed_at >= self._settings.checkpoint_interval_s
        if parked or force or due:
            await self._save(parked)

    async def _save(self, parked: Sequence[Parked] = ()) -> None:
        if not self._dirty:
            return
        rate = self._progress.rate.at(self._clock(), self._progress.confirmed)
        await self._store.checkpoint(self._position, self._high_id, parked, confirmed=self._unsaved, rate=rate)
        self._dirty, self._unsaved = False, 0
        self._checkpointed_at = self._clock()
        self._progress.checkpoints += 1
        self._retry.note(parked)

    def _count(self, settled: int, confirmed: int, parked: Sequence[Parked]) -> None:
        self._progress.pages += 1
        self._progress.published += confirmed
        self._progress.parked += len(parked)
        self._progress.careful = max(0, self._progress.careful - settled)
        self._progress.changed.set()

    def _end_session(self, unsettled: int) -> None:
        """The publisher is gone. If a message may be to blame, the next session looks for it, one at a time."""
        lost = self._publisher.lost
        if self._publisher.message_is_suspect and unsettled > 1:
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

    # --- nothing to do

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
