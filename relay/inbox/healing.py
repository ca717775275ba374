"""Looks for what is missing and asks for it, beside the pipeline: find -> close -> claim -> ask -> write down.

Has connections of its own, so that nothing that happens here can end or slow the applying of events. Asks no more than
the answers can follow: what was asked for has to come, or its time to pass, before much more is asked for.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import structlog

from relay.control import Range
from relay.failpoints import Point, reached
from relay.inbox import gaps
from relay.inbox.asking import Asker
from relay.inbox.database import OPERATE_CHANNEL
from relay.inbox.gaps import Asked, Gap, Need, Told
from relay.inbox.sequencer import Key, Policy
from relay.postgres.connect import PLANS, Connection, connection
from relay.postgres.errors import postgres_errors
from relay.settings import Settings
from relay.supervisor import wait_for

log = structlog.get_logger()

LOOK_INTERVAL_S = 10.0
"""Longest time between two looks: a consumer that is gone may have left something."""

_BUSY_INTERVAL_S = 1.0
"""Time between two looks while something is missing."""

_WINDOW = 10_000
"""Numbers asked for and not come yet, at most: as many as a relay sends in a few seconds."""

_CLAIM = 500
_SLOWEST = 300.0
"""Numbers a second that come at least, on a slow relay and a slow consumer: what was asked for before comes first. To ask
again sooner would only put duplicates into the queue, and delay what is in it."""

_STALLED_S = 3.0
"""When nothing of what was asked for has come for so long, the rest of it is not on its way any more."""

_LONGEST_FLOW_S = 60.0
"""What has not come after so long is asked for again even while others do come."""

_OFF_DELAY_S = 60.0
_LOGGED = 20
"""Gaps told by name after one look; the others are counted."""


@dataclass(frozen=True, slots=True)
class _Outstanding:
    """What was asked for of one gap. Times are by the event loop's clock."""

    numbers: int
    first: int  # of them
    since: float
    until: float  # it has to be coming by then

    def is_due(self, now: float, flowed_at: float, stalled_s: float) -> bool:
        """True while it may still come: in its time, or, however slow, behind others that do come."""
        return now < self.until or (now - flowed_at < stalled_s and now - self.since < _LONGEST_FLOW_S)


class Healing:
    """The service of one consumer. `run` is for relay.services: it ends only by an error or by being cancelled."""

    def __init__(self, settings: Settings, *, consumer: str, queue: str, policy: Callable[[str], Policy]) -> None:
        self._settings = settings
        self._consumer = consumer
        self._queue = queue
        self._policy = policy
        self._alert_s = settings.inbox.gap_alert_after_s
        self._clock = asyncio.get_running_loop().time
        inbox = settings.inbox
        self._early = gaps.EarlyWalk(consumer, alert_s=self._alert_s, policy=inbox.policy, policies=inbox.policies)
        self._walk = gaps.GapWalk(consumer)
        self._outstanding: dict[Key, _Outstanding] = {}
        self._flowed_at = -_STALLED_S  # when something that was asked for has come
        self._wished_at = math.inf  # when somebody wants a look, also one that is wished for while another goes on
        self._sooner = asyncio.Event()

    def expect(self) -> None:
        """Something came early, or was announced: look when it has become old enough to be missed."""
        self._wish(self._alert_s + 0.05)

    def _wish(self, in_s: float) -> None:
        if (at := self._clock() + in_s) < self._wished_at:
            self._wished_at = at
            self._sooner.set()

    def _on_operate(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        """An operator has acted on this consumer's inbox: only a hint to look."""
        if payload == self._consumer:
            self._wish(0.0)

    async def run(self) -> None:
        """Look, ask, and rest in between. Raises PostgresError when the connection broke: to be run again."""
        asker = Asker(self._settings, consumer=self._consumer, queue=self._queue)
        try:
            async with connection(
                self._settings.postgres, application=f"relay gaps {self._consumer}", plans=PLANS
            ) as opened:
                with postgres_errors():
                    await opened.add_listener(OPERATE_CHANNEL, self._on_operate)
                while True:
                    busy = await self._look(opened, asker)
                    if not busy:
                        await asker.rest()
                    due_s = await gaps.next_s(opened, self._consumer)
                    await self._rest(min(_BUSY_INTERVAL_S, self._alert_s) if busy else LOOK_INTERVAL_S, due_s)
        finally:
            await asker.close()

    async def _look(self, opened: Connection, asker: Asker) -> bool:
        """One look. True when there will be something to do soon."""
        if noted := await self._early.step(opened):
            reached(Point.GAP_NOTED)
        settled = await self._settle(opened, {*self._outstanding, *await self._walk.step(opened)})
        asked = await self._ask(opened, asker)
        return bool(noted or settled or asked or self._outstanding) or not self._early.is_over

    async def _settle(self, opened: Connection, keys: set[Key]) -> int:
        """Close what is complete, let go on what was waited for; return how many that were."""
        known = await self._states(opened, keys)
        closing = [gap for gap in known if gap.need is Need.CLOSE]
        due = [gap for gap in known if gap.need is Need.ASK]
        await self._close(opened, closing)
        await gaps.make_due(opened, self._consumer, due)
        self._see_what_comes({gap.key: gap for gap in known if gap.need is Need.WAIT and not gap.is_stuck})
        return len(closing) + len(due)

    async def _close(self, opened: Connection, closing: Sequence[Gap]) -> None:
        if closed := await gaps.close(opened, self._consumer, closing):
            reached(Point.GAP_CLOSED)
        self._tell_closed(closed)

    def _see_what_comes(self, waiting: Mapping[Key, Gap]) -> None:
        """Of what was asked for: is it still coming? A slow consumer must not be sent everything twice."""
        now, stalled_s = self._clock(), max(self._alert_s, _STALLED_S)
        before = self._outstanding
        if any(k not in waiting or waiting[k].first_missing > o.first for k, o in before.items()):
            self._flowed_at = now
        self._outstanding = {
            k: replace(o, first=waiting[k].first_missing)
            for k, o in before.items()
            if k in waiting and o.is_due(now, self._flowed_at, stalled_s)
        }

    async def _ask(self, opened: Connection, asker: Asker) -> int:
        """Claim what is due and ask for it, as far as the window has room; return how many were claimed."""
        room = _WINDOW - sum(o.numbers for o in self._outstanding.values())
        if room < _WINDOW // 2:
            return 0
        ours = await gaps.claim(opened, self._consumer, _CLAIM)
        if ours:
            reached(Point.GAP_CLAIMED)
        claimed = await self._states(opened, ours)
        closing = [gap for gap in claimed if gap.need is Need.CLOSE]
        await self._close(opened, closing)
        coming = [gap for gap in claimed if gap.need is Need.WAIT and (gap.is_coming or gap.key in self._outstanding)]
        missing = [gap for gap in claimed if gap not in closing and gap not in coming]
        await self._write(opened, [self._still_coming(gap) for gap in coming])
        await self._ask_for(opened, asker, missing, room)
        return len(claimed)

    async def _ask_for(self, opened: Connection, asker: Asker, missing: Sequence[Gap], room: int) -> None:
        """Written down first: the answer may be the end of this process, and such a request must count as well."""
        if not missing:
            return
        each = min(gaps.NUMBERS_EACH, max(1, room // len(missing)))
        ranges = await gaps.missing(opened, self._consumer, missing, each)
        wanted = [gap for gap in missing if gap.key in ranges]  # of the others, what was missing has just come
        if not self._settings.inbox.repair:
            detail = "inbox.repair is off: it is not asked for"
            off = [Asked(gap=gap, asks=0, asked_to=None, delay_s=_OFF_DELAY_S, detail=detail) for gap in wanted]
            await self._write(opened, off)
            return
        dead = await asker.dead_letters()
        dying = [gap for gap in wanted if gap.dies(dead)]
        await self._give_up(opened, dying)
        wanted = [gap for gap in wanted if gap not in dying]
        if not wanted:
            return
        numbers = await gaps.asked_numbers(opened, self._consumer)
        numbers += sum(len(r) for gap in wanted for r in ranges[gap.key])
        asked = [self._as_asked(gap, ranges[gap.key], numbers / _SLOWEST, dead) for gap in wanted]
        await self._write(opened, asked)
        reached(Point.GAP_WRITTEN)
        details = await asker.ask({gap.key: ranges[gap.key] for gap in wanted})
        reached(Point.GAP_ASKED)
        await self._write(opened, [self._not_asked(a, details[a.gap.key]) for a in asked if a.gap.key in details])

    async def _write(self, opened: Connection, written: Sequence[Asked]) -> None:
        new = await gaps.write_asked(opened, self._consumer, written)
        self._tell_new(new, {a.gap.key: a.gap for a in written})

    async def _give_up(self, opened: Connection, dying: Sequence[Gap]) -> None:
        """Do not send again what ends its consumer: the delivery limit has taken it out of the queue for that."""
        with postgres_errors():
            stuck = await gaps.stick(
                opened,
                self._consumer,
                {gap.key: (gap.first_missing, gaps.dead_detail(gap, self._queue)) for gap in dying},
            )
        for key, detail in stuck:
            log.error("gap_stuck", consumer=self._consumer, source=key[0], aggregate="/".join(key[1:]), reason=detail)

    def _as_asked(self, gap: Gap, ranges: Sequence[Range], queued_s: float, dead_letters: int | None) -> Asked:
        """`queued_s`: how long it may take until all that was asked for has come. `dead_letters`: as many there are now."""
        now, delay_s, detail = self._clock(), gap.delay_s(self._alert_s) + queued_s, None
        until = now + min(delay_s, max(self._alert_s, _STALLED_S) + queued_s)
        self._outstanding[gap.key] = _Outstanding(sum(map(len, ranges)), gap.first_missing, now, until)
        if gap.asks:
            detail = (
                f"asked {gap.asks + 1} times, and nothing has come: is `relay run` of source {gap.key[0]} running, "
                "and are its events published?"
            )
        return Asked(
            gap=gap,
            asks=gap.asks + 1,
            asked_to=ranges[-1].to_seq,
            delay_s=delay_s,
            detail=detail,
            dead_letters=_fewest(gap, dead_letters),
        )

    def _not_asked(self, asked: Asked, detail: str) -> Asked:
        """It could not be asked for, and why."""
        self._outstanding.pop(asked.gap.key, None)
        return replace(asked, delay_s=asked.gap.delay_s(self._alert_s), detail=detail)

    def _still_coming(self, gap: Gap) -> Asked:
        """What was asked for is on its way: do not ask for it twice. Of what has come in part, the rest is asked for anew."""
        asks = 1 if gap.is_coming else max(1, gap.asks)
        dead = None if gap.is_coming else gap.dead_letters
        return Asked(gap=gap, asks=asks, asked_to=None, delay_s=self._alert_s, dead_letters=dead)

    async def _states(self, opened: Connection, keys: set[Key] | list[Key]) -> list[Gap]:
        with postgres_errors():
            return await gaps.states(
                opened, self._consumer, keys, is_latest=lambda kind: self._policy(kind) == "latest"
            )

    async def _rest(self, seconds: float, due_s: float | None) -> None:
        if due_s is not None:
            seconds = min(seconds, max(due_s, min(_BUSY_INTERVAL_S, self._alert_s)))
        until = self._clock() + seconds
        while (left := min(until, self._wished_at) - self._clock()) > 0:
            self._sooner.clear()
            await wait_for(self._sooner, left)
        if self._wished_at <= self._clock():
            self._wished_at = math.inf

    def _tell_new(self, new: Sequence[Told], known: Mapping[Key, Gap]) -> None:
        for told in new[:_LOGGED]:
            source, kind, name = told.key
            log.warning(
                "gap",
                consumer=self._consumer,
                source=source,
                aggregate=f"{kind}/{name}",
                first=known[told.key].first_missing,
                last=told.to_seq,
                found_by=told.found_by,
            )
        if len(new) > _LOGGED:
            log.warning("gaps", consumer=self._consumer, more=len(new) - _LOGGED)

    def _tell_closed(self, closed: Sequence[Told]) -> None:
        for told in closed[:_LOGGED]:
            source, kind, name = told.key
            log.info(
                "gap_closed",
                consumer=self._consumer,
                source=source,
                aggregate=f"{kind}/{name}",
                last=told.to_seq,
                asks=told.asks,
                lasted_s=round(told.lasted_s, 1),
            )
        if len(closed) > _LOGGED:
            log.info("gaps_closed", consumer=self._consumer, more=len(closed) - _LOGGED)


def _fewest(gap: Gap, dead_letters: int | None) -> int | None:
    """What to compare the number of dead letters with later: an operator may take some away in between."""
    if gap.asks == 0 or gap.dead_letters is None or dead_letters is None:
        return dead_letters
    return min(gap.dead_letters, dead_letters)
