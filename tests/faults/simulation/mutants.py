"""relay, broken on purpose: what a simulation must find. Each mutant is one mistake that somebody could make.

Mistakes in Python are patched into the product; mistakes in a statement into the model's answer to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast
from unittest.mock import patch

import relay.outbox.pipeline
import relay.outbox.retry
from relay.inbox.consumer import _Loop
from relay.inbox.intake import Taken
from relay.inbox.sequencer import Arrival, Line, Refusal
from relay.inbox.store import Store as InboxStore
from relay.inbox.work import Work
from relay.outbox.cursor import Page, Position
from relay.outbox.parking import Settlement, settle
from relay.outbox.pipeline import Pipeline
from relay.outbox.reader import Reader, to_row
from relay.outbox.retry import Retry
from relay.outbox.shard import Shard
from relay.outbox.store import Store
from relay.outbox.wakeup import Wakeup
from relay.rabbitmq.contract import Confirmed, Nacked, Returned, Unknown
from tests.faults.simulation.inbox_database import InboxDatabase
from tests.faults.simulation.outbox_database import LogRow, OutboxDatabase, ProducerTransaction

Mutant = Callable[[], Any]
"""Gives a context manager: within it, relay is broken."""


# --- the outbox


def checkpoint_before_confirm() -> Any:
    """The cursor is written first, and then the page is published."""
    begin = Shard._begin

    async def mutated(self: Shard, page: Page) -> None:
        before = self._pipeline.position
        if self._pipeline.is_empty:
            self._pipeline.position, self._dirty = before.after(page), True
            await self._save()
            self._pipeline.position = before
        await begin(self, page)

    return patch.object(Shard, "_begin", mutated)


def read_is_settled() -> Any:
    """The cursor moves behind what is read, not behind what is settled."""
    begin = Pipeline.begin

    def mutated(self: Pipeline, page: Page) -> None:
        begin(self, page)
        self.position = self.read_to

    return patch.object(Pipeline, "begin", mutated)


def settled_as_answered() -> Any:
    """Pages are settled in the order in which they are answered, and the cursor moves behind each."""

    def mutated(self: Pipeline) -> bool:
        self._sent = deque(sorted(self._sent, key=lambda sent: not sent.answers.done()))
        return bool(self._sent) and self._sent[0].answers.done()

    return patch.object(Pipeline, "is_answered", property(mutated))


def acts_in_the_middle() -> Any:
    """What may be sent is changed, and parked rows are tried, while pages are in flight."""
    act = Shard._act

    async def mutated(self: Shard) -> None:
        with patch.object(Shard, "_settle_all", Shard._settle_answered):
            await act(self)

    return patch.object(Shard, "_act", mutated)


def _taken_for_confirmed(kind: type[Any]) -> Any:
    def mutated(rows: Any, outcomes: Sequence[Any], blocked: Any, pauses: Any) -> Settlement:
        return settle(rows, [Confirmed() if isinstance(o, kind) else o for o in outcomes], blocked, pauses)

    return patch.object(relay.outbox.pipeline, "settle", mutated)


def ignore_nack() -> Any:
    """A nack is taken for an ack."""
    return _taken_for_confirmed(Nacked)


def ignore_return() -> Any:
    """A returned message is taken for a published one."""
    return _taken_for_confirmed(Returned)


def unknown_is_confirmed() -> Any:
    """What was sent is taken for published, though the session ended before the answer."""
    return _taken_for_confirmed(Unknown)


def successors_not_parked() -> Any:
    """A refused row is parked alone; what follows it in its aggregate is published past it."""

    def mutated(rows: Any, outcomes: Any, blocked: Any, pauses: Any) -> Settlement:
        settlement = settle(rows, outcomes, blocked, pauses)
        return replace(settlement, parked=[p for p in settlement.parked if p.is_head])

    return patch.object(relay.outbox.pipeline, "settle", mutated)


def id_after_cursor() -> Any:
    """`id > cursor` instead of snapshots: ids are handed out before the commit."""

    async def mutated(self: Reader, position: Position, *, page_rows: int | None = None) -> Page:
        connection: Any = self._connection
        db: OutboxDatabase = connection._server
        after = max(getattr(self, "last_id", db.cursor.high_id), position.after_id)
        page = await reads(self, Position(position.snapshot), page_rows=page_rows)
        new = [to_row(cast("Any", row.record)) for row in db.log if row.id > after]
        rows = new[: page_rows or self._page_rows]
        if rows:
            self.last_id = rows[-1].id  # type: ignore[attr-defined]
        return Page(rows, page.snapshot, len(rows) == len(new))

    reads = Reader.read
    return patch.object(Reader, "read", mutated)


def xmax_only() -> Any:
    """Only what is at or above the snapshot's xmax is new: transactions that were in progress are forgotten."""
    opened = OutboxDatabase._open_window

    def mutated(self: Any, session: Any, shard: int, xmax: str, limit: int, most: int, late: Any = None) -> Any:
        return opened(self, session, shard, xmax, limit, most, None)

    return patch.object(OutboxDatabase, "_open_window", mutated)


def window_not_checked() -> Any:
    """The next pages of a window show what was committed after it was opened, too."""
    following = OutboxDatabase._next_page

    def mutated(self: Any, session: Any, shard: int, xmax: str, limit: int, most: int, *rest: Any) -> Any:
        return following(self, session, shard, xmax, limit, most, rest[0], rest[1], f"{2**60}:{2**60}:")

    return patch.object(OutboxDatabase, "_next_page", mutated)


def unfenced_checkpoint() -> Any:
    """`WHERE epoch = mine` is missing: whoever was the owner still moves the cursor."""

    async def owned(self: OutboxDatabase, session: Any, _epoch: int) -> Any:
        await self.lock(session, "cursor")
        return self.read(session, "cursor")[0]

    return patch.object(OutboxDatabase, "_owned", owned)


def lease_lost_ignored() -> Any:
    """The fence says no, and nobody listens: rows are parked by a relay that is not the owner."""
    return patch.object(Store, "_require", lambda _self, _owned: None)


def barrier_ignored() -> Any:
    """The relay falls asleep though a producer, who will not notify, is at work."""
    tries = Wakeup.try_fall_asleep

    async def mutated(self: Wakeup) -> bool:
        await tries(self)
        self._asleep = True
        return True

    return patch.object(Wakeup, "try_fall_asleep", mutated)


def barrier_dropped() -> Any:
    """The producers' lock is given back with the statement, not with the transaction."""
    insert = ProducerTransaction.insert

    def mutated(self: ProducerTransaction, place: Any, event_type: str) -> LogRow | None:
        row = insert(self, place, event_type)
        self._database.barrier.discard(self)
        return row

    return patch.object(ProducerTransaction, "insert", mutated)


def no_look_before_sleep() -> Any:
    """S is granted, and the relay sleeps at once, without one more look."""
    tries = Wakeup.try_fall_asleep

    async def mutated(self: Wakeup) -> bool:
        granted = await tries(self)
        if granted:
            await self.wait(5.0)
        return granted

    return patch.object(Wakeup, "try_fall_asleep", mutated)


def unparked_before_confirm() -> Any:
    """A parked row is deleted whatever the broker says to its next attempt."""
    return patch.object(relay.outbox.retry, "is_done", lambda _row, outcome: outcome is not None)


def blocked_not_learned() -> Any:
    """A new session does not look which aggregates have parked rows, and publishes past them."""

    async def mutated(self: Retry) -> None:
        await self._plan()

    return patch.object(Retry, "look", mutated)


OUTBOX: tuple[Mutant, ...] = (
    checkpoint_before_confirm,
    read_is_settled,
    settled_as_answered,
    acts_in_the_middle,
    ignore_nack,
    ignore_return,
    unknown_is_confirmed,
    successors_not_parked,
    id_after_cursor,
    xmax_only,
    unfenced_checkpoint,
    lease_lost_ignored,
    barrier_ignored,
    barrier_dropped,
    no_look_before_sleep,
    unparked_before_confirm,
    blocked_not_learned,
    window_not_checked,
)


# --- the inbox


def no_dedup() -> Any:
    """What was applied is applied again when it comes again."""
    offer = Line.offer

    def mutated(self: Line, arrival: Arrival) -> Refusal | None:
        seq = arrival.event.seq or 0
        if seq <= self.cursor.last_seq:
            self.cursor = self.cursor._replace(last_seq=seq - 1)
        return offer(self, arrival)

    return patch.object(Line, "offer", mutated)


def no_dedup_without_order() -> Any:
    """Ids of messages without order are not remembered."""

    async def mutated(self: InboxStore, events: Any) -> set[tuple[str, str]]:
        return {(event.source, event.message_id) for event in events}

    return patch.object(InboxStore, "insert_seen", mutated)


def no_reorder() -> Any:
    """Events are applied as they come."""
    return patch.object(Line, "next", lambda self: next(iter(self._kept.values()), None))


def acknowledge_before_commit() -> Any:
    """The broker is told first, and then the batch is applied."""

    async def mutated(self: _Loop, taken: Taken) -> None:
        await self._consumer.acknowledge(taken.tag)
        await self._applier.apply(taken.batch)

    return patch.object(_Loop, "_deliver", mutated)


def digest_not_compared() -> Any:
    """The same number is the same event, whatever is in it."""
    return patch.object(Line, "_refuse_past", lambda *_: Refusal.DUPLICATE)


def cursors_not_locked() -> Any:
    """SELECT without FOR UPDATE: two consumers decide about the same aggregate."""
    return patch.object(InboxDatabase, "locks_cursors", False)


def cursor_not_written() -> Any:
    """Effects are committed without the cursor."""

    async def mutated(self: InboxStore, cursors: Any, *, look: bool) -> list[Any]:
        return []

    return patch.object(InboxStore, "write_cursors", mutated)


def failed_counts_as_applied() -> Any:
    """An event whose handler failed is passed over."""
    return patch.object(Line, "failed", Line.applied)


def failed_does_not_block() -> Any:
    """A failed event is held, and what follows it is applied when it comes."""

    def mutated(self: Line, arrival: Arrival) -> None:
        seq = arrival.event.seq or 0
        del self._kept[seq]
        self._failed.append(arrival)
        self.cursor = self.cursor._replace(last_seq=seq)

    return patch.object(Line, "failed", mutated)


def held_do_not_follow() -> Any:
    """What was held early is not looked for when its predecessor is applied."""

    async def mutated(self: Work) -> None:
        """Nothing follows."""

    return patch.object(Work, "_follow", mutated)


def held_not_looked_for_afterwards() -> Any:
    """A batch that is in order is all there is: what is held behind it is not looked for."""
    write = InboxStore.write_cursors

    async def mutated(self: InboxStore, cursors: Any, *, look: bool) -> list[Any]:
        return await write(self, cursors, look=False)

    return patch.object(InboxStore, "write_cursors", mutated)


def lined_up_at_the_start() -> Any:
    """What is held behind a batch that is in order is dealt with as if the batch had not been applied."""

    def mutated(self: Work, cursors: Any, _placed: Any) -> None:
        self._lines = self._lines_at(cursors)

    return patch.object(Work, "_line_up", mutated)


def early_not_held() -> Any:
    """What comes early is acknowledged and forgotten."""

    async def mutated(self: Work) -> None:
        """Nothing is held."""

    return patch.object(Work, "_hold", mutated)


def stale_is_applied() -> Any:
    """Policy `latest` applies whatever comes."""
    offer = Line.offer

    def mutated(self: Line, arrival: Arrival) -> Refusal | None:
        if self._latest and (seq := arrival.event.seq or 0) < self.cursor.last_seq:
            self.cursor = self.cursor._replace(last_seq=seq - 1)
        return offer(self, arrival)

    return patch.object(Line, "offer", mutated)


INBOX: tuple[Mutant, ...] = (
    no_dedup,
    no_dedup_without_order,
    no_reorder,
    acknowledge_before_commit,
    digest_not_compared,
    cursors_not_locked,
    cursor_not_written,
    failed_counts_as_applied,
    failed_does_not_block,
    held_do_not_follow,
    held_not_looked_for_afterwards,
    lined_up_at_the_start,
    early_not_held,
    stale_is_applied,
)
