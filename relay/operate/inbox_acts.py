"""Acts on what an inbox holds: try it again, skip what failed, purge all that waits, dismiss what is in the quarantine.

A skipped or purged message leaves a tombstone in its place, so that the inbox's own path advances the cursor; its content goes
to relay.inbox_quarantine. In store mode the same is done to what a taker gave back. An act is on one consumer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import asyncpg

from relay.errors import ConfigError, PostgresUnavailable
from relay.message import TOMBSTONE, TOMBSTONE_CONTENT_TYPE, content_digest
from relay.operate.act import (
    LOCK_WAIT_S,
    Act,
    Done,
    Plan,
    aggregates_of,
    counted,
    described,
    error_pattern,
    nothing,
    place_filters,
)
from relay.operate.audit import Operator, Side
from relay.operate.place import when_inbox_acts
from relay.operate.selection import Selection
from relay.postgres.connect import Connection
from relay.postgres.errors import postgres_errors
from relay.postgres.queries import query


class InboxAct(Act):
    """An act on one consumer's inbox, which the selection names once it is known."""

    side: ClassVar[Side] = "inbox"

    async def choose_consumer(self, connection: Connection) -> str:
        """The consumer that was named, or the only one that there is. Raises ConfigError when there are several."""
        consumer = await the_consumer(connection, self.selection)
        self.selection = replace(self.selection, consumer=consumer)
        return consumer


class Retry(InboxAct):
    """What failed is tried again now, and what is missing and stuck is asked for again.

    Attempts are kept: one that fails once more is stuck again.
    """

    name = "retry"

    async def plan(self, connection: Connection) -> Plan:
        """Messages whose handler failed; in store mode those that their taker gave back; and gaps that are stuck."""
        consumer = await self.choose_consumer(connection)
        return await _plan_failed(connection, self, gaps=await _stuck_gaps(connection, self.selection, consumer))

    async def do(self, connection: Connection, plan: Plan, operator: Operator) -> Done:
        """Due now."""
        await connection.execute(query("lock_cursors_of_held"), plan.consumer, plan.ids)
        held = await connection.fetch(query("retry_held"), plan.consumer, plan.ids)
        stored = await connection.fetch(query("retry_given_back"), plan.consumer, plan.stored_ids)
        keys = list(zip(*plan.gaps, strict=True)) or [(), (), ()]
        gaps = await connection.fetch(query("reopen_gaps"), plan.consumer, *keys)
        when = "now" if stored else await when_inbox_acts(connection, plan.consumer)
        next_ = f"the inbox {'asks for' if gaps and not held and not stored else 'tries'} them {when}"
        return await _finish(connection, self, plan, operator, [*held, *stored, *gaps], next_)


class Skip(InboxAct):
    """What failed is set aside, and its aggregate goes on behind it."""

    name = "skip"

    async def plan(self, connection: Connection) -> Plan:
        """The same messages as for a retry."""
        return await _plan_failed(connection, self, alive=True)

    async def do(self, connection: Connection, plan: Plan, operator: Operator) -> Done:
        """Tombstones in their places."""
        rows = await _bury(connection, plan, operator, "skipped", lines=False)
        return await _finish(connection, self, plan, operator, rows, await _goes_on(connection, plan))


class Purge(InboxAct):
    """All that is held of the selection is set aside. What is missing in between is still waited for."""

    name = "purge"

    async def plan(self, connection: Connection) -> Plan:
        """Whole lines: the first held messages that the filters describe, and all that waits behind them."""
        consumer = await self.choose_consumer(connection)
        held = _alive(await _held(connection, self.selection, consumer, lines=True))
        stored = await _given_back(connection, self.selection, consumer, lines=True)
        _refuse_mixed(self.selection, held, stored)
        if not held and not stored:
            raise nothing(self.selection, f"nothing that consumer {consumer} holds is selected")
        gaps = sum(1 for r in held if r["is_head"] and r["head_reason"] == "early")
        note = (
            f"{counted(gaps, 'aggregate')} of these still miss numbers before what is held: a purge does not fill a gap, `relay inbox"
            " skip TYPE/ID --through N` passes over it"
        )
        return _plan(held, stored, consumer, [*await _only(connection, held, stored), *([note] if gaps else [])])

    async def do(self, connection: Connection, plan: Plan, operator: Operator) -> Done:
        """Tombstones in their places."""
        rows = await _bury(connection, plan, operator, "purged", lines=True)
        return await _finish(connection, self, plan, operator, rows, await _goes_on(connection, plan))


class Dismiss(InboxAct):
    """Entries of the quarantine do not count as problems any more; they stay."""

    name = "dismiss"

    async def plan(self, connection: Connection) -> Plan:
        """Those that nobody has dismissed."""
        consumer = await self.choose_consumer(connection)
        selection = self.selection
        filters: list[Any] = [
            *place_filters(selection),
            selection.cause,
            error_pattern(selection),
            selection.older_than_s,
            selection.event_type,
            selection.since,
            selection.until,
            selection.from_seq,
            selection.to_seq,
            selection.ids,
            selection.source,
            consumer,
        ]
        with postgres_errors():
            found = await connection.fetch(query("select_quarantined"), *filters)
        if not found:
            raise nothing(selection, f"nothing in the quarantine of consumer {consumer} is selected")
        return _plan(found, [], consumer)

    async def do(self, connection: Connection, plan: Plan, operator: Operator) -> Done:
        """Only the mark: the daemon does not look at the quarantine."""
        rows = await connection.fetch(query("dismiss_quarantined"), plan.consumer, plan.ids)
        return await _finish(connection, self, plan, operator, rows, "they stay in relay.inbox_quarantine")


async def the_consumer(connection: Connection, selection: Selection) -> str:
    """The one consumer that an act is on: the one that was named, or the only one that there is. Raises ConfigError."""
    if selection.consumer is not None:
        return selection.consumer
    with postgres_errors():
        found = [r["consumer"] for r in await connection.fetch(query("known_consumers"))]
        if not found:
            found = [r["consumer"] for r in await connection.fetch(query("consumers_with_cursors"))]
    if len(found) > 1:
        raise ConfigError(
            f"several consumers keep their inbox in this database ({', '.join(found)}), and an act is on one of them: say --consumer NAME"
        )
    if not found:
        raise nothing(selection, "no consumer has its inbox in this database", "Is this postgres.dsn the consumer's?")
    name: str = found[0]
    return name


async def _goes_on(connection: Connection, plan: Plan) -> str:
    when = "now" if plan.stored_ids else await when_inbox_acts(connection, plan.consumer)
    return f"the inbox passes over them {when}, and goes on with what waited behind; their content is in relay.inbox_quarantine"


async def _only(connection: Connection, held: Sequence[asyncpg.Record], stored: Sequence[object]) -> list[str]:
    """What is given up, where it is one held message."""
    if stored or len(held) != 1:
        return []
    with postgres_errors():
        return described(await connection.fetchrow(query("describe_held"), held[0]["id"]))


async def _plan_failed(
    connection: Connection, act: InboxAct, *, alive: bool = False, gaps: Sequence[asyncpg.Record] = ()
) -> Plan:
    consumer = await act.choose_consumer(connection)
    selection = act.selection
    held = await _held(connection, selection, consumer, lines=False)
    held = _alive(held) if alive else held
    stored = await _given_back(connection, selection, consumer, lines=False)
    _refuse_mixed(selection, held, stored)
    if not held and not stored and not gaps:
        raise nothing(
            selection,
            f"nothing that failed at consumer {consumer} is selected",
            "What waits for a missing number has not failed: see `relay inbox gaps`.",
        )
    plan = _plan(held, stored, consumer, await _only(connection, held, stored) if alive else [])
    if not gaps:
        return plan
    note = f"{counted(len(gaps), 'gap')} among them: its source is asked for what is missing again"
    return replace(
        plan,
        rows=plan.rows + len(gaps),
        aggregates=aggregates_of([*held, *stored, *gaps]),
        gaps=[(r["source"], r["aggregate_type"], r["aggregate_id"]) for r in gaps],
        notes=[note] if plan.rows else plan.notes,
        unit=None if plan.rows else "gap",
    )


async def _stuck_gaps(connection: Connection, selection: Selection, consumer: str) -> list[asyncpg.Record]:
    """Gaps that nobody asks for any more; none where a filter speaks of messages."""
    of_messages = (selection.event_type, selection.since, selection.until, selection.from_seq, selection.to_seq)
    if any(value is not None for value in (*of_messages, selection.ids)):
        return []
    if selection.cause not in (None, "gap") or selection.state not in (None, "stuck"):
        return []
    filters = [*place_filters(selection), selection.source, error_pattern(selection), selection.older_than_s]
    with postgres_errors():
        return await connection.fetch(query("select_stuck_gaps"), *filters, consumer)


def _alive(held: Sequence[asyncpg.Record]) -> list[asyncpg.Record]:
    """Without those that were given up before, and tombstones of the producer's: they have no content to set aside."""
    return [r for r in held if r["event_type"] != TOMBSTONE]


def _refuse_mixed(selection: Selection, held: Sequence[object], stored: Sequence[object]) -> None:
    """Ids of held and of stored messages are counted apart: one number can name two of them."""
    if selection.ids and held and stored:
        raise ConfigError("--id names a held and a stored message: say which with --cause failed or --cause taken")


def _plan(
    held: Sequence[asyncpg.Record], stored: Sequence[asyncpg.Record], consumer: str, notes: Sequence[str] = ()
) -> Plan:
    return Plan(
        rows=len(held) + len(stored),
        aggregates=aggregates_of([*held, *stored]),
        ids=[r["id"] for r in held],
        stored_ids=[r["id"] for r in stored],
        consumer=consumer,
        notes=notes,
    )


def _filters(selection: Selection, consumer: str) -> list[Any]:
    return [
        *place_filters(selection),
        selection.cause,
        selection.state,
        error_pattern(selection),
        selection.older_than_s,
        selection.event_type,
        selection.since,
        selection.until,
        selection.from_seq,
        selection.to_seq,
        selection.ids,
        selection.source,
        consumer,
    ]


async def _held(connection: Connection, selection: Selection, consumer: str, *, lines: bool) -> list[asyncpg.Record]:
    with postgres_errors():
        return await connection.fetch(query("select_held"), *_filters(selection, consumer), lines)


async def _given_back(
    connection: Connection, selection: Selection, consumer: str, *, lines: bool
) -> list[asyncpg.Record]:
    with postgres_errors():
        return await connection.fetch(query("select_given_back"), *_filters(selection, consumer), lines)


async def _bury(
    connection: Connection, plan: Plan, operator: Operator, reason: Literal["skipped", "purged"], *, lines: bool
) -> list[asyncpg.Record]:
    detail = set_aside_by(operator, reason)
    await connection.execute(query("lock_cursors_of_held"), plan.consumer, plan.ids)
    digest = content_digest(TOMBSTONE, TOMBSTONE_CONTENT_TYPE, b"")
    held = await connection.fetch(
        query("bury_held"), plan.consumer, plan.ids, lines, reason, detail, TOMBSTONE, TOMBSTONE_CONTENT_TYPE, digest
    )
    await lock_first_stored(connection, plan.consumer, plan.stored_ids)
    stored = await connection.fetch(
        query("set_given_back_aside"), plan.consumer, plan.stored_ids, reason, detail, lines
    )
    return [*held, *stored]


async def lock_first_stored(connection: Connection, consumer: str | None, ids: Sequence[int]) -> None:
    """Keep takers from the aggregates of these stored messages; waits for those that are at work.

    What a taker that we waited for has taken is gone, and its successor, which is the first now, can be another taker's by the time
    we know: so the first rows are looked at again until every one of them is ours. Raises PostgresUnavailable when that takes too long.
    """
    locked: set[int] = set()
    deadline = time.monotonic() + LOCK_WAIT_S
    while ids:
        locked |= {r["id"] for r in await connection.fetch(query("lock_first_stored"), consumer, ids)}
        if {r["id"] for r in await connection.fetch(query("first_stored"), consumer, ids)} <= locked:
            break
        if time.monotonic() > deadline:
            raise PostgresUnavailable(
                f"takers have been at work on these stored messages for more than {LOCK_WAIT_S:g} s: nothing was changed. Try again."
            )


def set_aside_by(operator: Operator, reason: str) -> str:
    """What the quarantine says of a message that an operator set aside."""
    return f"{reason} by {operator.who}{f': {operator.why}' if operator.why else ''}"


async def _finish(
    connection: Connection, act: InboxAct, plan: Plan, operator: Operator, rows: Sequence[asyncpg.Record], next_: str
) -> Done:
    """The record, and the hint to the daemon. What is not there any more was applied, or taken, meanwhile."""
    if not rows:
        raise nothing(act.selection, f"what was counted ({counted(plan.rows, 'message')}) went through meanwhile")
    aggregates = aggregates_of(rows)
    audit_id = await act.record(connection, operator, len(rows), aggregates)
    await connection.execute(query("notify_inbox"), plan.consumer)
    if plan.stored_ids:
        await connection.execute(query("notify_stored"), plan.consumer)  # for takers that sleep
    gone = plan.rows - len(rows)
    notes = [f"{counted(gone, 'message')} went through meanwhile"] if gone else []
    return Done(rows=len(rows), aggregates=len(aggregates), audit_id=audit_id, notes=[*notes, next_])
