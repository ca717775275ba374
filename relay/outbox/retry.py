"""The parked rows of one shard: trying them again without disturbing live traffic.

Heads are tried first; behind each that went out follows what waited behind it. A row that ended a session before (it closed
the channel, or its queue never confirmed) is tried alone, beside the live traffic and all others. A portion that ends the
session makes suspects of its rows: they are tried alone until the one to blame is found. A row that is refused again and again as
if its queue were full is tried alone, too: if that succeeds, it is this session that is wrong, and it ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal

import structlog

from relay.errors import BrokerUnavailable
from relay.failpoints import Point, reached
from relay.message import Aggregate, Message, Row
from relay.outbox.alone import Alone, Tried
from relay.outbox.blocked import Blocked
from relay.outbox.parking import Parked, is_done, refusal, unsendable
from relay.outbox.progress import Progress, Suspicion
from relay.outbox.routing import routing_key
from relay.outbox.store import Due, Store
from relay.rabbitmq.contract import Confirmed, Nacked, Publisher, Refused, Unknown
from relay.settings import OutboxSettings

_AGGREGATES = 20
_AGGREGATES_BESIDE_TRAFFIC = 10
"""Heads in one portion, each with up to 49 rows behind it: few, since a new event waits for the whole portion."""

_TRAFFICS_SHARE = 8
"""While there is live traffic, it has 8 t for itself after a portion that took t: an operator's retry of everything costs it a ninth."""

_TRAFFIC_S = 1.0
"""So long after a page of new rows there is live traffic."""


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
        self._message = message
        self._settings = settings
        self._progress = progress
        self._log = log
        self._clock = asyncio.get_running_loop().time
        self._due_at: float | None = None
        self._alone_at: float | None = None  # when a row is due that is tried alone
        self._not_before = 0.0  # while there is live traffic: until then the time is its own
        self._traffic_until = 0.0
        self._doubted: int | None = None  # a row that this session refused, and that is tried alone
        self._is_wrong = False  # this session: what it refused, the broker took
        self._alone = Alone(probe=probe, message=message, wake=wake, log=log)

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
        if heads:  # of either kind: looking costs little
            due_at = self._clock() + self._settings.retry_first_s
            self._due_at = due_at if self._due_at is None else min(self._due_at, due_at)
            self._alone_at = due_at if self._alone_at is None else min(self._alone_at, due_at)

    def within(self, seconds: float) -> float:
        """The shorter of `seconds` and the time until something is to be done here."""
        times = []
        if self._due_at is not None and not self._blocked.shard_is_paused:
            times.append(max(self._due_at, min(self._not_before, self._traffic_until)))
        if self._alone_at is not None and self._alone.is_idle and not self._blocked.shard_is_paused:
            times.append(self._alone_at)
        if self._blocked.may_change_unseen:
            times.append(self._blocked.look_at)
        return max(0.0, min([seconds, *(at - self._clock() for at in times)]))

    @property
    def busy(self) -> bool:
        """True while a row is being tried alone, or is due: with those a drain is not done."""
        if self._blocked.shard_is_paused:
            return False
        times = (self._due_at, self._alone_at)
        return not self._alone.is_idle or any(at is not None and at <= self._clock() for at in times)

    def saw_traffic(self) -> None:
        """New rows are being published: for a while this takes no more than a bounded share of the time."""
        self._traffic_until = self._clock() + _TRAFFIC_S

    @property
    def wants_a_step(self) -> bool:
        """True when `step` would do something now. It must not be called while pages are in flight."""
        return self._is_due or (
            self._alone.is_over
            or self._alone.wants_a_row
            or (self._alone.is_idle and self._alone_at is not None and self._clock() >= self._alone_at)
        )

    async def step(self) -> None:
        """Go on with what is tried alone, and try a portion of what is due. After it the publisher may be lost."""
        await self._step_alone()
        started = self._clock()
        traffic = started < self._traffic_until
        if not self._is_due:
            return
        found = await self._store.due(_AGGREGATES_BESIDE_TRAFFIC if traffic else _AGGREGATES, self._by_id)
        held = await self._hold_paused(found)
        due = [d for d in self._not_paused(found) if not self._alone.holds(d.row)]
        did = await self._try(_heads_first(due))
        await self._plan()
        if (
            not (did or held) and self._due_at is not None
        ):  # what is due is behind what is being tried alone, or a pause holds it
            self._due_at = max(self._due_at, self._clock() + self._settings.retry_first_s)
        self._not_before = self._clock() + _TRAFFICS_SHARE * (self._clock() - started)

    async def settle_alone(self) -> None:
        """Write down what has been tried alone, if the answer is there."""
        if not self._alone.is_over:
            return
        tried = self._alone.take()
        doubted, self._doubted = self._doubted, None  # whatever came of it: this session is asked again first
        if tried is not None:
            reached(Point.TRIED_ALONE)
            self._acquit(tried)
            await self._settle([tried])
            self._is_wrong = tried[0].row.id == doubted and isinstance(tried[1], Confirmed)
        await self._plan()
        if tried is None or tried[1] is None:
            self._rest_alone()

    async def close(self) -> None:
        """End what is being tried alone: it is tried again by the next session."""
        await self._alone.close()

    @property
    def _is_due(self) -> bool:
        """True when a portion of the parked rows is to be tried, and live traffic has had its share."""
        now = self._clock()
        if self._due_at is None or now < self._due_at:
            return False
        return now >= min(self._not_before, self._traffic_until)

    async def _plan(self) -> None:
        waits = await self._store.next_attempts_s(self._by_id) if self._blocked.rows else (None, None)
        now = self._clock()
        self._due_at, self._alone_at = (None if wait_s is None else now + max(0.0, wait_s) for wait_s in waits)
        if self._alone_at is None:
            self._suspects.clear()  # those that are left have been taken away, or paused

    async def _hold_paused(self, due: Sequence[Due]) -> bool:
        """See that what a pause holds is not found due again and again, in the place of others. True if something was."""
        held = [d.row for d in due if self._blocked.pauses.hold(d.row)]
        return bool(held) and await self._store.hold(held)

    def _not_paused(self, due: Sequence[Due]) -> list[Due]:
        """Without what a pause holds, and what is behind that: the rows behind a head that is due may be of another type."""
        held = unsendable([d.row for d in due], frozenset(), self._blocked.pauses)
        return [d for position, d in enumerate(due) if position not in held]

    async def _try(self, due: tuple[list[Due], list[Due]]) -> bool:
        """True when something was sent."""
        heads, behind = due
        settled = self._doubt(await self._send(heads))
        held = {d.row.aggregate for d, outcome in settled if not is_done(d.row, outcome)}
        settled += await self._send([d for d in behind if d.row.aggregate not in held])
        await self._settle(settled)
        return bool(settled)

    async def _send(self, due: Sequence[Due]) -> list[Tried]:
        if not due or self._publisher.lost is not None:
            return []
        reached(Point.RETRYING)
        outcomes = await self._publisher.publish([self._message(d.row) for d in due])
        reached(Point.RETRIED)
        closed = self._publisher.message_is_suspect
        for d, outcome in zip(due, outcomes, strict=True):
            if isinstance(outcome, Unknown) and (closed or outcome.timed_out):
                self._suspects[d.row.id] = "late" if outcome.timed_out else "closed"
        return [
            (d, None if isinstance(outcome, Unknown) else outcome) for d, outcome in zip(due, outcomes, strict=True)
        ]

    async def _settle(self, tried: Sequence[Tried]) -> None:
        """Write down what became of rows. Behind one that did not get through, its aggregate's rows stay where they are."""
        published: list[Row] = []
        refused: list[tuple[Parked, Due]] = []
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
                refused.append((refusal(due.row, outcome), due))
        if published or refused:
            await self._write(published, refused)

    async def _write(self, published: Sequence[Row], refused: Sequence[tuple[Parked, Due]]) -> None:
        gone, still = await self._store.unpark(published, refused)
        first = sum(p.row.aggregate is None and due.attempts == 0 for p, due in refused)
        self._blocked.release(published, [p for p, _ in refused], gone, still, first_refusals=first)
        self._progress.unparked += len(gone)
        self._progress.confirmed += len(published)
        self._progress.recent.note(published)
        self._progress.changed.set()
        self._log.info("retried", published=len(published), refused=len(refused), still_parked=self._blocked.rows)
        for parked, due in refused:
            if due.attempts + 1 >= self._settings.max_attempts:
                self._tell("stuck", parked, "error")

    # --- alone

    def _doubt(self, tried: Sequence[Tried]) -> list[Tried]:
        """What became of heads, as far as this session is believed: one that it nacked may stay due, and is tried alone at once.

        Not if others wait for that already: it could take minutes, in which a queue that really was full takes it.
        """
        if not self._alone.is_idle or (self._alone_at is not None and self._alone_at <= self._clock()):
            return list(tried)
        nacked = [(d, routing_key(d.row, self._settings.routing_key)) for d, o in tried if isinstance(o, Nacked)]
        chosen = self._progress.doubts.choose(nacked, self._clock())
        if chosen is not None:
            self._doubted = chosen.row.id
        return [(d, None if d is chosen else outcome) for d, outcome in tried]

    @property
    def _by_id(self) -> list[int]:
        """The rows that are tried alone, whatever they are parked for."""
        return [*self._suspects, *([] if self._doubted is None else [self._doubted])]

    @property
    def _suspects(self) -> dict[int, Suspicion]:
        return self._progress.suspects

    async def _step_alone(self) -> None:
        """Which row is sent is asked when the connection is there: until then operators may skip it, or pause it."""
        await self.settle_alone()
        if self._is_wrong:
            self._progress.doubts.found_wrong(self._clock())
            raise BrokerUnavailable(
                "RabbitMQ refuses (basic.nack) in this session what it took in a new one: so that one comes instead"
            )
        if self._alone.wants_a_row:
            self._alone.send(await self._next_alone())
        elif self._alone.is_idle and self._alone_at is not None and self._clock() >= self._alone_at:
            if await self._next_alone() is not None:
                self._alone.begin()
            else:
                await self._plan()
                self._rest_alone()

    def _rest_alone(self) -> None:
        """Looking again at once would find the same."""
        if self._alone_at is not None:
            self._alone_at = max(self._alone_at, self._clock() + self._settings.retry_first_s)

    async def _next_alone(self) -> Due | None:
        due = await self._store.due_alone(self._by_id)
        return None if due is None or self._blocked.pauses.hold(due.row) else due

    def _acquit(self, tried: Tried) -> None:
        """The row has had its trial. With the one found that closes the channel, the others that were sent beside it are free."""
        due, outcome = tried
        if outcome is None:
            return
        self._suspects.pop(due.row.id, None)
        if isinstance(outcome, Refused) and outcome.reason == "refused":
            for row in [row for row, why in self._suspects.items() if why == "closed"]:
                del self._suspects[row]

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
