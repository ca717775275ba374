"""The parked rows of one shard: trying them again without disturbing live traffic.

Heads are tried first; behind each that went out follows what waited behind it. A row that ended a session before (it closed
the channel, or its queue never confirmed) is tried alone, on a connection of its own, beside the live traffic.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal

import structlog

from relay.errors import BrokerError
from relay.message import Aggregate, Message, Row
from relay.outbox.blocked import Blocked
from relay.outbox.parking import Parked, is_done, refusal, unsendable
from relay.outbox.progress import Progress
from relay.outbox.store import Due, Store
from relay.rabbitmq.contract import Outcome, Publisher, Refused, Unknown
from relay.settings import OutboxSettings

_PROBES = 10
"""Rows tried alone in one go: each may take the whole confirm time-out."""

_AGGREGATES = 20
_AGGREGATES_BESIDE_TRAFFIC = 10
"""Heads in one portion, each with up to 49 rows behind it: few, since a new event waits for the whole portion."""

_TRAFFICS_SHARE = 8
"""While there is live traffic, it has 8 t for itself after a portion that took t: an operator's retry of everything costs it a ninth."""

_TRAFFIC_S = 1.0
"""So long after a page of new rows there is live traffic."""

Probed = tuple[Due, Outcome | None]
"""A row that was tried alone; None: the broker could not be reached, which says nothing about the row."""


class Retry:
    """Knows the parked rows of a shard whose owner we are. `step` belongs into the shard's loop, `close` to its end."""

    def __init__(
        self,
        *,
        store: Store,
        blocked: Blocked,
        publisher: Publisher,
        probe: Callable[[], AbstractAsyncContextManager[Publisher]],
        message: Callable[[Row], Message],
        settings: OutboxSettings,
        progress: Progress,
        wake: Callable[[], None],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._store = store
        self._blocked = blocked
        self._publisher = publisher
        self._probe = probe
        self._message = message
        self._settings = settings
        self._progress = progress
        self._wake = wake
        self._log = log
        self._clock = asyncio.get_running_loop().time
        self._due_at: float | None = None
        self._not_before = 0.0  # while there is live traffic: until then the time is its own
        self._traffic_until = 0.0
        self._probing: asyncio.Task[None] | None = None
        self._tried: list[Probed] = []  # alone, and not settled yet
        self._probed: set[int | Aggregate] = set()  # ids of the rows being tried alone, and their aggregates

    async def look(self) -> None:
        """Learn from the tables what is blocked, and when a parked row is due."""
        await self._blocked.look()
        await self._plan()

    def note(self, parked: Sequence[Parked]) -> None:
        """Rows have been parked."""
        self._blocked.note(parked)
        heads = [p for p in parked if p.is_head and not p.is_paused]
        for head in heads[:10]:
            self._tell("parked", head, "warning")
        if heads:
            due_at = self._clock() + self._settings.retry_first_s
            self._due_at = due_at if self._due_at is None else min(self._due_at, due_at)

    def within(self, seconds: float) -> float:
        """The shorter of `seconds` and the time until something is to be done here."""
        times = []
        if self._due_at is not None and not self._blocked.shard_is_paused:
            times.append(max(self._due_at, min(self._not_before, self._traffic_until)))
        if self._blocked.may_change_unseen:
            times.append(self._blocked.look_at)
        return max(0.0, min([seconds, *(at - self._clock() for at in times)]))

    @property
    def busy(self) -> bool:
        """True while a row is being tried alone, or is due: with those a drain is not done."""
        if self._blocked.shard_is_paused:
            return False
        return self._probing is not None or (self._due_at is not None and self._due_at <= self._clock())

    def saw_traffic(self) -> None:
        """New rows are being published: for a while this takes no more than a bounded share of the time."""
        self._traffic_until = self._clock() + _TRAFFIC_S

    async def step(self) -> None:
        """Settle what was tried alone, and try a portion of what is due. After it the publisher may be lost."""
        await self.settle_probes()
        started = self._clock()
        traffic = started < self._traffic_until
        if self._due_at is None or started < self._due_at or (traffic and started < self._not_before):
            return
        found = await self._store.due(_AGGREGATES_BESIDE_TRAFFIC if traffic else _AGGREGATES)
        held = await self._hold_paused(found)
        due = [d for d in self._not_paused(found) if not self._is_probed(d.row)]
        if not due and self._probing is None:
            self._progress.careful_retry = False  # all that was suspect has been tried alone
        did = await self._try(_heads_first(due))
        await self._plan()
        if (
            not (did or held) and self._due_at is not None
        ):  # what is due is being tried alone, or waits for its turn there
            self._due_at = max(self._due_at, self._clock() + self._settings.retry_first_s)
        self._not_before = self._clock() + _TRAFFICS_SHARE * (self._clock() - started)

    async def close(self) -> None:
        """End what is being tried alone: it is tried again by the next session."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)

    async def _plan(self) -> None:
        wait_s = await self._store.next_attempt_s() if self._blocked.rows else None
        self._due_at = None if wait_s is None else self._clock() + max(0.0, wait_s)

    async def _hold_paused(self, due: Sequence[Due]) -> bool:
        """See that what a pause holds is not found due again and again, in the place of others. True if something was."""
        held = [d.row for d in due if self._blocked.pauses.hold(d.row)]
        return bool(held) and await self._store.hold(held)

    def _not_paused(self, due: Sequence[Due]) -> list[Due]:
        """Without what a pause holds, and what is behind that: the rows behind a head that is due may be of another type."""
        held = unsendable([d.row for d in due], frozenset(), self._blocked.pauses)
        return [d for position, d in enumerate(due) if position not in held]

    async def _try(self, due: tuple[list[Due], list[Due]]) -> bool:
        """True when something was sent, or began to be tried alone."""
        heads, behind = due
        alone = [d for d in heads if d.alone or self._progress.careful_retry]
        together = [d for d in heads if d not in alone]
        probing = bool(alone) and self._probing is None
        if probing:
            self._start_probes(alone[:_PROBES])
        held = {d.row.aggregate for d in alone}
        settled = await self._send(together)
        held |= {d.row.aggregate for d, outcome in settled if not is_done(d.row, outcome)}
        settled += await self._send([d for d in behind if d.row.aggregate not in held])
        await self._settle(settled)
        return probing or bool(settled)

    async def _send(self, due: Sequence[Due]) -> list[Probed]:
        if not due:
            return []
        outcomes = await self._publisher.publish([self._message(d.row) for d in due])
        if self._publisher.message_is_suspect or any(isinstance(o, Unknown) and o.timed_out for o in outcomes):
            self._progress.careful_retry = True  # one of them may be to blame: the next session tries them alone
        return [
            (d, None if isinstance(outcome, Unknown) else outcome) for d, outcome in zip(due, outcomes, strict=True)
        ]

    async def _settle(self, tried: Sequence[Probed]) -> None:
        """Write down what became of rows. Behind one that did not get through, its aggregate's rows stay where they are."""
        published: list[Row] = []
        refused: list[tuple[Parked, int]] = []
        failed: set[Aggregate] = set()
        for due, outcome in tried:
            aggregate = due.row.aggregate
            if aggregate is not None and aggregate in failed:
                continue
            if is_done(due.row, outcome):
                published.append(due.row)
                continue
            if aggregate is not None:
                failed.add(aggregate)
            if outcome is not None:
                refused.append((refusal(due.row, outcome), due.attempts + 1))
        if published or refused:
            await self._write(published, refused)

    async def _write(self, published: Sequence[Row], refused: Sequence[tuple[Parked, int]]) -> None:
        gone, still = await self._store.unpark(published, refused)
        first = sum(p.row.aggregate is None and attempts == 1 for p, attempts in refused)
        self._blocked.release(published, [p for p, _ in refused], gone, still, first_refusals=first)
        self._progress.unparked += len(gone)
        self._progress.confirmed += len(published)
        self._progress.recent.note(published)
        self._progress.changed.set()
        self._log.info("retried", published=len(published), refused=len(refused), still_parked=self._blocked.rows)
        for parked, attempts in refused:
            if attempts >= self._settings.max_attempts:
                self._tell("stuck", parked, "error")

    # --- alone

    def _start_probes(self, due: Sequence[Due]) -> None:
        self._probed = {d.row.id for d in due} | {d.row.aggregate for d in due if d.row.aggregate is not None}
        self._probing = asyncio.create_task(self._probe_each(due))
        self._probing.add_done_callback(lambda _: self._wake())

    def _is_probed(self, row: Row) -> bool:
        return row.id in self._probed or (row.aggregate is not None and row.aggregate in self._probed)

    async def _probe_each(self, due: Sequence[Due]) -> None:
        """Each result is there at once: a session that ends in the middle has counted what was tried."""
        for d in due:
            outcome = await self._probe_one(d)
            self._tried.append((d, outcome))
            self._wake()

    async def _probe_one(self, due: Due) -> Outcome | None:
        try:
            async with self._probe() as publisher:
                (outcome,) = await publisher.publish([self._message(due.row)])
        except BrokerError as exc:
            self._log.warning("probe_failed", row=due.row.id, error=type(exc).__name__, reason=str(exc))
            return None
        if isinstance(outcome, Unknown):
            return Refused("unconfirmed", outcome.detail) if outcome.timed_out else None
        return outcome

    async def settle_probes(self) -> None:
        """Write down what has been tried alone so far."""
        tried, self._tried = self._tried, []
        if tried:
            await self._settle(tried)
        if self._probing is not None and self._probing.done():
            self._probing.result()
            self._probing, self._probed = None, set()
            await self._plan()
        if any(outcome is None for _, outcome in tried):
            self._due_at = max(self._due_at or 0.0, self._clock() + self._settings.retry_first_s)

    def _tell(self, event: str, parked: Parked, level: Literal["warning", "error"]) -> None:
        row = parked.row
        told = {"row": row.id, "type": row.event_type, "aggregate": row.aggregate, "seq": row.seq}
        getattr(self._log, level)(event, **told, reason=parked.reason, detail=parked.detail)


def _heads_first(due: Sequence[Due]) -> tuple[list[Due], list[Due]]:
    """(the first row of each aggregate, the rows behind one); a row without an aggregate is a head."""
    seen: set[Aggregate] = set()
    heads: list[Due] = []
    behind: list[Due] = []
    for d in {d.row.id: d for d in due}.values():
        (behind if d.row.aggregate in seen else heads).append(d)
        if d.row.aggregate is not None:
            seen.add(d.row.aggregate)
    return heads, behind
