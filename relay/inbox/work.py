"""What is done inside one transaction: lock, sequence, call handlers, let held successors follow, write."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import structlog

from relay.control import Control, Gone, Marks
from relay.failpoints import Point, reached
from relay.inbox import gaps
from relay.inbox.calls import Caller
from relay.inbox.charges import Charges
from relay.inbox.failures import DIED, ENDED, CommitFailed, loggable
from relay.inbox.handlers import Inbox
from relay.inbox.handling import Handling
from relay.inbox.overlap import Overlap
from relay.inbox.sequencer import (
    Arrival,
    Cursor,
    Key,
    Line,
    Placed,
    Policy,
    Reason,
    Refusal,
    Unit,
    is_ordered,
    key_of,
)
from relay.inbox.stats import Stats, Tally
from relay.inbox.store import LOCK_TIMEOUT_S, Conflict, Due, Hold, Patiently, Store, Stranger
from relay.inbox.stored import Stored
from relay.inbox.straight import cursors_after
from relay.message import Event
from relay.postgres.connect import Connection
from relay.settings import InboxSettings

log = structlog.get_logger()

_PORTION = 64
"""Held successors of one aggregate that are loaded at a time."""

FOLLOW_LIMIT = 2000
"""Held successors applied in one transaction; those after them are left to the retry timer, at once."""

FOLLOW_S = 1.0
"""The same as a time: handlers may be slow, and others may be waiting for the cursors. Looked at after one, two, four ... of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What does not change from batch to batch."""

    consumer: str
    inbox: Inbox
    settings: InboxSettings

    def policy(self, aggregate_type: str | None) -> Policy:
        """The ordering policy of an aggregate type."""
        return self.settings.policies.get(aggregate_type or "", self.settings.policy)

    def key(self, event: Event) -> Key | None:
        """The cursor that an event needs; None for one without order, which is only deduplicated by its message id."""
        key = key_of(event)
        return key if key is not None and is_ordered(event, self.policy(key[1])) else None

    def placed(self, arrivals: Sequence[Arrival]) -> list[Placed]:
        """Arrivals with their keys. As `key` says, at a third of the cost where all aggregates have one policy."""
        if self.settings.policies or self.settings.policy == "none":
            return [(self.key(arrival.event), arrival) for arrival in arrivals]
        found: list[Placed] = []
        for arrival in arrivals:
            event = arrival.event
            kind, name = event.aggregate_type, event.aggregate_id
            ordered = kind is not None and name is not None and event.seq is not None
            found.append(((event.source, kind, name) if ordered else None, arrival))  # type: ignore[arg-type]
        return found

    def unit(self, arrival: Arrival) -> Unit:
        """What fails together with an arrival."""
        return self.key(arrival.event) or arrival.message

    def unit_of_due(self, due: Due) -> Unit:
        """The same for a held message that has not been loaded yet."""
        key = self.key_of_due(due)
        return key or (due.source, due.message_id)

    def key_of_due(self, due: Due) -> Key | None:
        """The cursor that a held message needs; None for one without order."""
        if due.aggregate_type is None or due.aggregate_id is None or self.policy(due.aggregate_type) == "none":
            return None
        return (due.source, due.aggregate_type, due.aggregate_id)

    def delay_s(self, attempts: int) -> float | None:
        """Seconds until a message that failed so often is tried again; None: it is stuck."""
        if attempts >= self.settings.max_attempts:
            return None
        return float(min(self.settings.retry_max_s, self.settings.retry_first_s * 2.0 ** min(attempts - 1, 60)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one transaction is to deal with."""

    arrivals: Sequence[Arrival] = ()  # in the broker's order
    strangers: Sequence[Stranger] = ()  # not events: to the quarantine
    controls: Sequence[Control] = ()  # for the inbox itself
    due: Sequence[Due] = ()  # held messages whose time has come

    def __bool__(self) -> bool:
        return bool(self.arrivals or self.strangers or self.controls or self.due)

    def without_events(self) -> Batch:
        """What is left when its events are dealt with apart."""
        return Batch(strangers=self.strangers, controls=self.controls)


class Work:
    """One transaction's work. A Work is used once: a transaction that is redone starts a new one.

    `careful`: a savepoint for each message, so that one that fails is held and the others stay. Otherwise the first
    failure is raised as HandlerFailed, and batch handlers get what can be applied together: it is sequenced as if they
    succeeded. Arrivals that `charges` have a verdict on (their handler took too long, or ended the transaction) are held
    without another try. `follow` bounds how many held successors are applied.
    `given_up` are held tombstones (their ids) that come before the copies among the arrivals of what an operator gave up.
    That there are such is noticed only when they are passed: `run` raises GivenUp then.
    """

    def __init__(
        self,
        connection: Connection,
        rules: Rules,
        *,
        careful: bool,
        charges: Charges,
        follow: int = FOLLOW_LIMIT,
        given_up: Sequence[int] = (),
        patiently: Patiently | None = None,
        overlap: Overlap | None = None,
    ) -> None:
        self._connection = connection
        self._rules = rules
        self._charges = charges
        self._follow_left = follow
        self._given_up = given_up
        self._overlap = overlap or Overlap()
        self._clock = asyncio.get_running_loop().time
        self._store = Store(
            connection,
            rules.consumer,
            lock_timeout_s=LOCK_TIMEOUT_S + rules.settings.handler_timeout_s,
            patiently=patiently,
        )
        self._stored = Stored(connection, rules.consumer) if rules.settings.mode == "store" else None
        self._careful = careful
        self._lines: dict[Key, Line] = {}
        self._fresh: set[tuple[str, str]] = set()
        self._loose_failures: list[Arrival] = []
        self._loose_done: list[int] = []
        self._strangers: list[Stranger] = []
        self._taken: dict[Key, dict[int, bytes]] = {}  # digests of what came from the broker and was applied
        self._failures: list[Hold] = []
        self._conflicts: list[Conflict] = []
        self._stuck: list[tuple[Key, str]] = []
        self._dropped: list[gaps.Told] = []
        self._tally = Tally()
        self._caller = Caller(connection, self._store, charges, timeout_s=rules.settings.handler_timeout_s)
        self._handling = Handling(rules.inbox, self._caller, charges, self._tally, careful=careful)
        self.leaves_due = False  # held successors were left to the retry timer

    @property
    def called(self) -> Sequence[Arrival]:
        """What a handler was called with last."""
        return self._caller.called

    async def run(self, batch: Batch) -> Stats:
        """Do it all but the COMMIT; the counts are true once that succeeded."""
        self._strangers += batch.strangers
        placed = self._rules.placed(batch.arrivals)
        cursors = await self._lock(placed, batch.due)
        transaction = self._store.locked_in or await self._store.transaction_id()
        reached(Point.CURSORS_LOCKED)
        rest = self._careful or batch.due or self._given_up
        after = None if rest else cursors_after(placed, cursors)
        if after is not None:
            await self._take_straight(placed, cursors, after)
        else:
            await self._take_in_lines(placed, cursors, batch.due)
        await self._write_rest()
        await self._heed(batch.controls)
        reached(Point.WRITTEN)
        if (self._store.written_in or await self._store.transaction_id()) != transaction:
            raise CommitFailed(ENDED)
        return self._tally.stats()

    def committed(self) -> None:
        """Say what somebody should know, and forget what was suspected: call it after the COMMIT."""
        for arrival in self._handling.cleared:
            self._charges.suspects.clear(arrival.message)
        for hold in self._failures:
            if hold.error == DIED:
                self._charges.suspects.held(hold.arrival.message)
            self._log_failure(hold)
        for conflict in self._conflicts:
            self._log_conflict(conflict)
        for told in self._dropped:
            log.error(
                "mark_unfounded",
                consumer=self._rules.consumer,
                source=told.key[0],
                aggregate="/".join(told.key[1:]),
                last=told.to_seq,
                reason="it was announced, and its source has never given out the number: its database may have lost events",
            )
        for key, detail in self._stuck:
            log.error(
                "gap_stuck", consumer=self._rules.consumer, source=key[0], aggregate="/".join(key[1:]), reason=detail
            )

    async def _lock(self, placed: Sequence[Placed], due: Sequence[Due]) -> dict[Key, Cursor]:
        ordered = {key for key, _ in placed if key is not None}
        ordered |= {key for d in due if (key := self._rules.key_of_due(d))}
        first = next((arrival.event.seq for key, arrival in placed if key is not None), None)
        cursors = await self._store.lock_cursors(ordered, is_new=first == 1 and not due)
        self._fresh = await self._store.insert_seen([arrival.event for key, arrival in placed if key is None])
        return cursors

    async def _take_straight(
        self, placed: Sequence[Placed], cursors: Mapping[Key, Cursor], after: Mapping[Key, Cursor]
    ) -> None:
        """Apply all of it, in this order: a failure ends the transaction, so there is nothing to settle."""
        if not self._handling.postpone_all(placed):
            with self._overlap.calls():
                await self._take_each(placed)
        await self._handling.call_postponed()
        if held := await self._store.write_cursors(after, look=True):
            self._line_up({key: cursors[key] for key in held}, placed)
            await self._follow()
            await self._write_lines(after)  # not sooner: who follows may end the transaction, and commit it

    async def _take_each(self, placed: Sequence[Placed]) -> None:
        if self._stored is None and self._handling.calls_each:
            await self._handling.call_each(placed, self._overlap.begins)
            return
        for key, arrival in placed:
            if not self._handling.postpone(key, arrival):
                await self._succeeds(arrival)

    def _line_up(self, cursors: Mapping[Key, Cursor], placed: Sequence[Placed]) -> None:
        """Something is held of these, it turns out: put their lines where they would be, had they taken what is applied."""
        self._lines = self._lines_at(cursors)
        for key, arrival in placed:
            if key is not None and key in self._lines:
                self._lines[key].offer(arrival)
                self._settle(key, arrival, succeeds=True)

    async def _take_in_lines(self, placed: Sequence[Placed], cursors: Mapping[Key, Cursor], due: Sequence[Due]) -> None:
        """Take what came and what is due, aggregate by aggregate as their cursors allow, and what is held behind it."""
        self._lines = self._lines_at(await self._store.looked_for_held(cursors))
        held = self._rules.placed(await self._store.held(self._given_up))
        given_up = [(key, arrival) for key, arrival in held if key in self._lines]
        locked = self._rules.placed(await self._store.lock_due(due))
        await self._take([*given_up, *placed, *locked])
        await self._follow()
        await self._write_lines({})

    def _lines_at(self, cursors: Mapping[Key, Cursor]) -> dict[Key, Line]:
        return {key: Line(cursor, self._rules.policy(key[1])) for key, cursor in cursors.items()}

    async def _take(self, placed: Sequence[Placed]) -> None:
        """Take arrivals in this order, and apply what can be applied. Awaits nothing for an event that is postponed."""
        postpone = self._handling.postpone
        with self._overlap.calls():
            for key, arrival in self._applicable(placed):
                succeeds = postpone(key, arrival) or await self._succeeds(arrival)
                if key is None:
                    self._settle_loose(arrival, succeeds)
                else:
                    self._settle(key, arrival, succeeds=succeeds)
        await self._handling.call_postponed()

    def _applicable(self, placed: Sequence[Placed]) -> Iterator[Placed]:
        """What can be applied now that these come, each to be settled before the next is asked for."""
        for key, arrival in placed:
            if key is None:
                if self._is_fresh(arrival):
                    yield None, arrival
                continue
            line = self._lines[key]
            if (refusal := line.offer(arrival)) is not None:
                self._refuse(arrival, refusal)
            while (applicable := line.next()) is not None:
                yield key, applicable

    def _is_fresh(self, arrival: Arrival) -> bool:
        """A message without order: once by its id, whatever else happens."""
        if arrival.held_id is not None:
            return True
        if arrival.message not in self._fresh:
            self._tally.add("duplicates")
            return False
        self._fresh.remove(arrival.message)
        return True

    def _succeeds(self, arrival: Arrival) -> Awaitable[bool]:
        """Apply one event, or store it. False: its handler failed, and its effects are rolled back."""
        self._overlap.begins()
        if self._stored is None or arrival.event.is_tombstone:
            return self._handling.succeeds(arrival)
        return self._is_stored(self._stored, arrival)

    async def _is_stored(self, stored: Stored, arrival: Arrival) -> bool:
        await stored.add(arrival.event)
        self._tally.add("applied")
        return True

    def _settle(self, key: Key, arrival: Arrival, *, succeeds: bool) -> None:
        line = self._lines[key]
        if not succeeds:
            line.failed(arrival)
            return
        line.applied(arrival)
        if line.before.has_held and arrival.held_id is None and not arrival.event.is_tombstone:
            self._taken.setdefault(key, {})[line.cursor.last_seq] = arrival.event.digest

    def _settle_loose(self, arrival: Arrival, succeeds: bool) -> None:
        if not succeeds:
            self._loose_failures.append(arrival)
        elif arrival.held_id is not None:
            self._loose_done.append(arrival.held_id)

    async def _follow(self) -> None:
        """Held successors of what was applied follow in the same transaction, in bounded portions.

        A portion may leave lines out, being bounded in bytes: the loop ends only when no line has a successor.
        """
        until, most = self._clock() + FOLLOW_S, 1
        self._handling.follows = True
        while following := {key: line.cursor for key, line in self._lines.items() if line.follows}:
            if self._follow_left <= 0 or self._clock() > until:
                await self._leave_to_timer(following)
                return
            found = await self._store.successors(following, _PORTION)
            if not found:
                return
            self._follow_left -= len(found)
            while found:
                now, found = found[:most], found[most:]
                most *= 2
                await self._take(self._rules.placed(now))
                reached(Point.FOLLOWED)
                if self._clock() > until:
                    break

    async def _leave_to_timer(self, following: Mapping[Key, Cursor]) -> None:
        for key in await self._store.make_successors_due(following):
            self._lines[key].block()
            self.leaves_due = True

    def _refuse(self, arrival: Arrival, refusal: Refusal) -> None:
        if arrival.held_id is not None:
            return  # deleted with what is held up to the cursor, and compared there
        if refusal is Refusal.CONFLICT:
            self._conflict(arrival)
        else:
            self._tally.add("stale" if refusal is Refusal.STALE else "duplicates")

    def _conflict(self, arrival: Arrival) -> None:
        event = arrival.event
        self._strangers.append(Stranger.of_conflict(arrival))
        self._conflicts.append(
            Conflict(
                source=event.source,
                aggregate_type=event.aggregate_type,
                aggregate_id=event.aggregate_id,
                seq=event.seq,
                message_id=event.message_id,
            )
        )

    async def _write_rest(self) -> None:
        """What is written once for the whole batch, whichever way its events were taken."""
        await self._store.quarantine(self._strangers)
        if self._stored is not None:
            await self._stored.write()
        self._tally.add("quarantined", len(self._strangers))

    async def _write_lines(self, straight: Mapping[Key, Cursor]) -> None:
        """What is held and what is not, and cursors that have moved: those of lines, and of what was taken `straight`."""
        clearing = {key: line for key, line in self._lines.items() if line.clears_held}
        unread = await self._store.delete_held_through(
            {key: line.cursor for key, line in clearing.items()},
            {key: self._known_digests(key, line) for key, line in clearing.items()},
        )
        self._conflicts += unread
        self._tally.add("quarantined", len(unread))
        await self._store.delete_held(self._loose_done)
        await self._hold()
        moved = {key: line.cursor for key, line in self._lines.items() if line.cursor != line.before}
        await self._store.write_cursors({**straight, **moved}, look=False)

    async def _heed(self, controls: Sequence[Control]) -> None:
        """Marks and answers of relays: after the cursors are written, since what they speak of may be in the same batch."""
        if not controls:
            return
        self._tally.add("control", len(controls))
        consumer, policy = self._rules.consumer, self._rules.policy
        for retained in (True, False):
            marks = gaps.newest(
                (c for c in controls if isinstance(c, Marks) and c.retained == retained),
                is_ordered=lambda kind: policy(kind) != "none",
            )
            await gaps.note_marks(
                self._connection,
                consumer,
                marks,
                alert_s=self._rules.settings.gap_alert_after_s,
                retained=retained,
            )
        answers = [c for c in controls if isinstance(c, Gone)]
        keys = {(c.source, *r.aggregate) for c in answers for r in c.ranges}
        known = await gaps.states(self._connection, consumer, keys, is_latest=lambda kind: policy(kind) == "latest")
        details = gaps.stuck_details(answers, known)
        self._dropped += await gaps.drop_announced(self._connection, consumer, gaps.beyond(answers, details))
        self._stuck += await gaps.stick(self._connection, consumer, details)
        reached(Point.CONTROL_HEEDED)

    def _known_digests(self, key: Key, line: Line) -> dict[int, bytes]:
        """What has been applied under which number, as far as something else may be held under it."""
        last = line.before
        before = {} if last.last_digest is None else {last.last_seq: last.last_digest}
        return before | self._taken.get(key, {})

    async def _hold(self) -> None:
        holds = [self._as_hold(a, reason) for line in self._lines.values() for a, reason in line.left()]
        holds += [self._as_hold(a, "failed") for a in self._loose_failures]
        if not holds:
            return
        same, other = await self._store.hold(holds)
        reached(Point.ROWS_HELD)
        for arrival in other:
            self._conflict(arrival)
        await self._try_instead(other)
        refused = {a.name for a in (*same, *other)}
        self._tally.add("duplicates", len(same))
        for hold in holds:
            if hold.arrival.name not in refused:
                self._count(hold)

    async def _try_instead(self, refused: Sequence[Arrival]) -> None:
        """An arrival failed, and other content is held under its number: then that is next, and would only wait."""
        names = {arrival.name for arrival in refused}
        blocked = {
            key: line.cursor
            for key, line in self._lines.items()
            if line.cursor.blocked and any(a.name in names and reason == "failed" for a, reason in line.left())
        }
        if blocked and await self._store.make_successors_due(blocked):
            self.leaves_due = True

    def _as_hold(self, arrival: Arrival, reason: Reason) -> Hold:
        if reason != "failed":
            return Hold(arrival=arrival, reason=reason, attempts=arrival.attempts)
        attempts = arrival.attempts + 1
        return Hold(
            arrival=arrival,
            reason=reason,
            attempts=attempts,
            error=self._handling.errors.get(arrival.name),
            delay_s=self._rules.delay_s(attempts),
        )

    def _count(self, hold: Hold) -> None:
        if hold.reason == "failed":
            self._tally.add("failed")
            self._tally.add("stuck", hold.state == "stuck")
            self._failures.append(hold)
        elif hold.arrival.held_id is None:
            self._tally.add(hold.reason)

    def _log_failure(self, hold: Hold) -> None:
        event = hold.arrival.event
        say = log.error if hold.state == "stuck" else log.warning
        say(
            "handler_failed",
            consumer=self._rules.consumer,
            source=event.source,
            aggregate=f"{event.aggregate_type}/{event.aggregate_id}",
            seq=event.seq,
            event_type=event.event_type,
            message_id=event.message_id,
            error=loggable(hold.error or ""),
            attempts=hold.attempts,
            state=hold.state,
            retry_in_s=hold.delay_s,
        )

    def _log_conflict(self, conflict: Conflict) -> None:
        log.error(
            "conflict",
            consumer=self._rules.consumer,
            source=conflict.source,
            aggregate=f"{conflict.aggregate_type}/{conflict.aggregate_id}",
            seq=conflict.seq,
            message_id=conflict.message_id,
            reason="two messages have the same number and different content; one of them is in relay.inbox_quarantine",
        )
