"""The pipeline of one shard: read -> route -> publish -> settle -> checkpoint, until told to stop or the session breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

import structlog

from relay.errors import BrokerUnavailable
from relay.message import Aggregate, Message, Row
from relay.outbox.cursor import Page
from relay.outbox.lease import Ownership
from relay.outbox.parking import Parked, refusal, settle, waves
from relay.outbox.reader import Reader
from relay.outbox.routing import route
from relay.outbox.store import Due, Store
from relay.outbox.wakeup import Wakeup
from relay.rabbitmq.contract import Confirmed, Outcome, Publisher, Unknown
from relay.settings import OutboxSettings

log = structlog.get_logger()

_LINGER_S = 0.05
"""Idle time before falling asleep. Under load the next event is there sooner, so nobody ever notifies."""
_BACKOFF_FIRST_S = 0.001
_BACKOFF_LAST_S = 0.01
"""Delays between two looks while awake and idle: a look costs about 0.4 ms of PostgreSQL."""


@dataclass(slots=True)
class Progress:
    """What a shard did, for the log, the tests and the benchmark. Counts rows; only ever grows."""

    published: int = 0
    parked: int = 0
    unparked: int = 0
    pages: int = 0
    checkpoints: int = 0
    sleeps: int = 0
    careful: int = 0  # rows still to be published one at a time, to find the one that closes the channel
    careful_retry: bool = False  # the same for the parked rows that are tried again
    changed: asyncio.Event = field(default_factory=asyncio.Event)


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
        self._probe = probe
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
        self._blocked: set[Aggregate] = set()
        self._parked_rows = 0
        self._retry_at: float | None = None
        self._idle_since: float | None = None
        self._nap_s = _BACKOFF_FIRST_S
        self._paused = False

    async def run(self, *, drain: bool = False) -> int:
        """Work until `stop` is set; with `drain`, until nothing is left to publish. Returns how many rows are parked.

        Raises BrokerError or PostgresError when the session is over, LeaseLost when another relay owns the shard.
        """
        await self._load_parked()
        following: asyncio.Task[Page] | None = None
        try:
            while not self._stop.is_set():
                self._wakeup.require_connection()
                if self._publisher.lost is not None:
                    self._end_session(0)
                await self._retry_due()
                if self._over_parked_limit():
                    await self._pause()
                    continue
                page = await (following or self._read())
                following = None
                if page.empty:
                    self._position = self._position.after(page)
                    if drain:
                        break
                    await self._rest()
                    continue
                await self._get_up()
                following = self._read_ahead(page)
                await self._handle(page, following)
            await self._save()
        finally:
            if following is not None:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
        return self._parked_rows

    # --- read -> publish -> settle -> checkpoint

    async def _read(self) -> Page:
        return await self._reader.read(self._position, page_rows=1 if self._progress.careful else None)

    def _read_ahead(self, page: Page) -> asyncio.Task[Page] | None:
        """The next page is read while this one is published; at the end of a window, and while careful, it is not."""
        if page.complete or self._progress.careful:
            return None
        return asyncio.create_task(self._reader.read(self._position.after(page)))

    async def _handle(self, page: Page, following: asyncio.Task[Page] | None) -> None:
        outcomes = await self._publish(page.rows)
        if following is not None:
            await asyncio.wait([following])  # it uses the connection that the checkpoint needs
        settlement = settle(page.rows, outcomes, self._blocked)
        whole = settlement.settled == len(page.rows)
        if whole:
            self._position = self._position.after(page)
        elif settlement.settled:
            self._position = self._position.within(page, page.rows[settlement.settled - 1].id)
        if settlement.confirmed:
            self._high_id = max(self._high_id, max(row.id for row in settlement.confirmed))
        self._dirty = self._dirty or settlement.settled > 0
        await self._checkpoint(settlement.parked, force=not whole)
        self._count(settlement.settled, len(settlement.confirmed), settlement.parked)
        if not whole or self._publisher.lost is not None:
            self._end_session(len(page.rows) - settlement.settled)

    async def _publish(self, rows: Sequence[Row]) -> list[Outcome | None]:
        """The outcome of every row, None for one that was not sent because its aggregate is held up."""
        outcomes: list[Outcome | None] = [None] * len(rows)
        held = set(self._blocked)
        for wave in waves(rows) if self._settings.order == "strict" else [range(len(rows))]:
            chosen = [i for i in wave if rows[i].aggregate not in held]
            for i, outcome in zip(chosen, await self._send([rows[i] for i in chosen]), strict=True):
                outcomes[i] = outcome
                aggregate = rows[i].aggregate
                if aggregate is not None and not isinstance(outcome, Confirmed):
                    held.add(aggregate)
            if any(isinstance(outcome, Unknown) for outcome in outcomes):
                return [
                    Unknown("not sent") if o is None and rows[i].aggregate not in self._blocked else o
                    for i, o in enumerate(outcomes)
                ]
        return outcomes

    async def _send(self, rows: Sequence[Row]) -> list[Outcome]:
        if not rows:
            return []
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
        await self._store.checkpoint(self._position, self._high_id, parked)
        self._dirty = False
        self._checkpointed_at = self._clock()
        self._progress.checkpoints += 1
        self._note_parked(parked)

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

    # --- parked rows

    async def _load_parked(self) -> None:
        blocked = await self._store.blocked()
        self._parked_rows = sum(blocked.values())
        self._blocked = {aggregate for aggregate in blocked if aggregate is not None}
        await self._plan_retry()

    def _note_parked(self, parked: Sequence[Parked]) -> None:
        heads = [p for p in parked if p.is_head]
        self._parked_rows += len(parked)
        self._blocked |= {p.row.aggregate for p in parked if p.row.aggregate is not None}
        for head in heads[:10]:
            row = head.row
            self._log.warning(
                "parked",
                row=row.id,
                type=row.event_type,
                aggregate=row.aggregate,
                seq=row.seq,
                reason=head.reason,
                detail=head.detail,
            )
        if heads:
            due_at = self._clock() + self._settings.retry_first_s
            self._retry_at = due_at if self._retry_at is None else min(self._retry_at, due_at)

    async def _plan_retry(self) -> None:
        wait_s = await self._store.next_attempt_s() if self._parked_rows else None
        self._retry_at = None if wait_s is None else self._clock() + max(0.0, wait_s)

    async def _retry_due(self) -> None:
        """Try a portion of the parked rows again: the heads first, and behind each that went out, what waits behind it."""
        if self._retry_at is None or self._clock() < self._retry_at:
            return
        due = await self._store.due()
        if due:
            await self._get_up()
            await self._retry(due)
        await self._plan_retry()
        if not due and self._retry_at is not None:  # overdue, and yet nothing to try: somebody else changed the table
            self._retry_at = max(self._retry_at, self._clock() + self._settings.retry_first_s)

    async def _retry(self, due: Sequence[Due]) -> None:
        attempts = {d.row.id: d.attempts for d in due}
        seen: set[Aggregate] = set()
        heads: list[Row] = []
        rest: list[Row] = []
        for d in due:
            aggregate = d.row.aggregate
            (rest if aggregate in seen else heads).append(d.row)
            if aggregate is not None:
                seen.add(aggregate)
        alone = {d.row.id for d in due if d.alone}
        heads.sort(key=lambda row: row.id in alone)  # those that may close the channel go last
        published, refused, failed = _divide(heads, await self._send_parked(heads, alone))
        rest = [row for row in rest if row.aggregate not in failed]
        more, again, _ = _divide(rest, await self._send_parked(rest, alone))
        published, refused = published + more, refused + again
        counted = [(parked, attempts[parked.row.id] + 1) for parked in refused]
        if published or refused:
            self._high_id = max([self._high_id, *(row.id for row in published)])
            touched = {row.aggregate for row in (*published, *(p.row for p in refused))}
            still = await self._store.unpark(published, counted, self._position, self._high_id)
            self._dirty = False
            self._blocked -= {aggregate for aggregate in touched if aggregate is not None} - still
            self._parked_rows -= len(published)
            self._progress.unparked += len(published)
            self._progress.changed.set()
            self._log.info("retried", published=len(published), refused=len(refused), still_parked=self._parked_rows)
        if self._publisher.lost is not None:
            self._progress.careful_retry = self._publisher.message_is_suspect
            self._end_session(0)
        self._progress.careful_retry = False

    async def _send_parked(self, rows: Sequence[Row], alone: AbstractSet[int]) -> list[Outcome]:
        """In one go, except what closed the channel before: that is sent one by one, on a connection that live traffic does not use."""
        if self._progress.careful_retry:
            alone = {row.id for row in rows}
        together = [row for row in rows if row.id not in alone]
        outcomes = await self._send(together)
        for row in rows[len(together) :]:
            async with self._probe() as publisher:
                outcomes += await publisher.publish([self._message(row)])
        return outcomes

    def _over_parked_limit(self) -> bool:
        over = self._parked_rows > self._settings.parked_limit
        if over != self._paused:
            self._paused = over
            self._log.error(
                "paused" if over else "resumed", parked=self._parked_rows, parked_limit=self._settings.parked_limit
            )
        return over

    async def _pause(self) -> None:
        await self._save()
        await self._nap(self._settings.poll_interval_s)

    # --- nothing to do

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
            await self._wakeup.wait(self._until_retry(self._settings.poll_interval_s))
            await self._get_up()
        elif now - self._idle_since < _LINGER_S or not await self._wakeup.try_fall_asleep():
            await self._nap(self._nap_s)
            self._nap_s = min(_BACKOFF_LAST_S, self._nap_s * 2)

    async def _get_up(self) -> None:
        self._idle_since = None
        await self._wakeup.get_up()

    async def _nap(self, seconds: float) -> None:
        """Sleep, unless `stop` is set meanwhile or a parked row becomes due."""
        try:
            async with asyncio.timeout(self._until_retry(seconds)):
                await self._stop.wait()
        except TimeoutError:
            return

    def _until_retry(self, seconds: float) -> float:
        return seconds if self._retry_at is None else max(0.0, min(seconds, self._retry_at - self._clock()))


def _divide(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> tuple[list[Row], list[Parked], set[Aggregate | None]]:
    """(published, refused, aggregates that did not get through). What is behind a refused or unknown row counts as not sent."""
    published: list[Row] = []
    refused: list[Parked] = []
    failed: set[Aggregate | None] = set()
    for row, outcome in zip(rows, outcomes, strict=True):
        if row.aggregate is not None and row.aggregate in failed:
            continue
        if isinstance(outcome, Confirmed):
            published.append(row)
            continue
        failed.add(row.aggregate)
        if not isinstance(outcome, Unknown):
            refused.append(refusal(row, outcome))
    return published, refused, failed - {None}
