"""Acts on parked rows: try them again, skip what holds an aggregate up, purge all that waits. Called by the command line.

A skipped or purged event keeps its place in the sequence: the daemon publishes a tombstone with its number, so that no consumer
waits for it. Its content stays in relay.outbox as long as the log is retained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import asyncpg

from relay.errors import ConfigError, NothingSelected
from relay.operate.act import (
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
from relay.operate.place import when_relay_acts
from relay.operate.selection import Selection, aggregate_text
from relay.postgres.connect import Connection
from relay.postgres.errors import postgres_errors
from relay.postgres.queries import query

_NOT_AT_FAULT = ("behind", "tombstone")
"""Heads that were not refused: their turn has come, or a tombstone of theirs is on its way."""


class Retry(Act):
    """The heads are tried again now. Attempts are kept: one that is refused once more is stuck again."""

    side: ClassVar[Side] = "outbox"
    name = "retry"

    async def plan(self, connection: Connection) -> Plan:
        """Heads that are not paused."""
        found = await _selected(connection, self.selection)
        chosen = [r for r in found if not r["is_paused"]]
        paused = len(found) - len(chosen)
        if not chosen and paused:
            raise nothing(self.selection, "what is selected is paused", "`relay resume` lets it go on.")
        if not chosen:
            raise nothing(self.selection, "nothing that is parked is selected")
        notes = [f"{counted(paused, 'aggregate')} left alone: paused (`relay resume`)"] if paused else []
        return _plan(chosen, notes)

    async def do(self, connection: Connection, plan: Plan, operator: Operator) -> Done:
        """Due now."""
        rows = [r for r in await _locked(connection, self, plan) if r["state"] != "paused"]
        if not rows:
            raise nothing(self.selection, "what is selected was paused meanwhile", "`relay resume` lets it go on.")
        audit_id = await self.record(connection, operator, len(rows), aggregates_of(rows))
        await connection.execute(query("retry_parked"), [r["id"] for r in rows])
        await connection.execute(query("notify_outbox"))
        when = await when_relay_acts(connection)
        return _done(rows, plan, audit_id, [f"relay tries them {when}; `relay stuck` shows what is refused again"])


class Skip(Act):
    """The row that holds each aggregate up goes out as a tombstone, and what waits behind it follows."""

    side: ClassVar[Side] = "outbox"
    name = "skip"

    async def plan(self, connection: Connection) -> Plan:
        """Heads that were refused; a paused one only if it was asked for."""
        found = await _selected(connection, self.selection)
        refused = [r for r in found if r["reason"] not in _NOT_AT_FAULT and not r["is_marked"]]
        chosen, notes = _without_paused(refused, self.selection)
        if not chosen:
            raise nothing(self.selection, _marked_already(found) or "no row that was refused is selected", *notes)
        return _plan(chosen, [*await _only(connection, chosen), *notes])

    async def do(self, connection: Connection, plan: Plan, operator: Operator) -> Done:
        """Mark, and let go."""
        return await _entomb(connection, self, plan, operator)


class Purge(Act):
    """All parked rows of the selection go out as tombstones."""

    side: ClassVar[Side] = "outbox"
    name = "purge"

    async def plan(self, connection: Connection) -> Plan:
        """Whole lines: the heads that the filters describe, and all that waits behind them."""
        found = await _selected(connection, self.selection, lines=True)
        chosen, notes = _without_paused([r for r in found if not r["is_marked"]], self.selection)
        if not chosen:
            raise nothing(self.selection, _marked_already(found) or "nothing that is parked is selected", *notes)
        return _plan(chosen, [*await _only(connection, chosen), *notes])

    async def do(self, connection: Connection, plan: Plan, operator: Operator) -> Done:
        """Mark, and let go."""
        return await _entomb(connection, self, plan, operator)


class SkipNumber(Act):
    """One number of one aggregate goes out as a tombstone, also when it was published before: whoever still holds it drops it."""

    side: ClassVar[Side] = "outbox"
    name = "skip"

    def __init__(self, selection: Selection) -> None:
        """Raises ConfigError unless the selection is one number of one aggregate."""
        super().__init__(selection)
        exact = selection.exact()
        one = selection.from_seq is not None and selection.from_seq == selection.to_seq
        if exact is None or not one or not selection.as_json().keys() <= {"aggregate", "from_seq", "to_seq"}:
            raise ConfigError(
                "--seq skips one number of one aggregate, without other filters: `relay skip order/42 --seq 7`"
            )
        self._type, self._id = exact
        self._seq = selection.from_seq or 0
        self._name = f"{aggregate_text(*exact)} seq {self._seq}"

    async def plan(self, connection: Connection) -> Plan:
        """Parked, or published already; anything else is refused."""
        place = await self._place(connection)
        notes = await _only(connection, [place])
        if place["parked_as"] is None:
            notes.append(
                f"{self._name} was published already: its tombstone is sent to everyone who gets its aggregate"
            )
        elif place["head_seq"] != self._seq:
            notes.append(
                f"{self._name} waits behind seq {place['head_seq']}: its tombstone goes out when its turn comes"
            )
        return Plan(rows=1, aggregates=[(self._type, self._id)], ids=[place["id"]], notes=notes)

    async def do(self, connection: Connection, plan: Plan, operator: Operator) -> Done:
        """Look again under the lock: it may have been published meanwhile."""
        await connection.execute(query("lock_outbox_cursors"))
        place = await self._place(connection)
        audit_id = await self.record(connection, operator, 1, [(self._type, self._id)])
        if place["parked_as"] is None:
            await connection.execute(query("park_tombstone"), place["id"], place["shard"])
        notes = await _mark(connection, self.name, [place["id"]], audit_id)
        return Done(rows=plan.rows, aggregates=plan.touched, audit_id=audit_id, notes=notes)

    async def _place(self, connection: Connection) -> asyncpg.Record:
        with postgres_errors():
            place = await connection.fetchrow(query("place_in_outbox"), self._type, self._id, self._seq)
        assert place is not None  # noqa: S101 - the statement returns one row whatever there is
        if place["id"] is not None and (place["parked_as"] is not None or place["is_read"]):
            return place
        raise NothingSelected(f"{self._why_not(place)} Nothing was changed.")

    def _why_not(self, place: asyncpg.Record) -> str:
        name, last = aggregate_text(self._type, self._id), place["last_seq"]
        if place["id"] is not None:
            return f"{self._name} is neither published nor parked yet: `relay run` has not come to it. Try again when it has."
        if last is None:
            return f"there is no event of {name} in this outbox."
        if self._seq > last:
            return f"{name} has no seq {self._seq} yet: its last one is {last}."
        return (
            f"{self._name} is not retained any more, so there is nothing to publish in its place. A consumer that waits for it"
            f" moves on with: relay inbox skip {name} --through {self._seq}."
        )


async def _only(connection: Connection, rows: Sequence[asyncpg.Record]) -> list[str]:
    """What is lost, where it is one row."""
    if len(rows) != 1:
        return []
    with postgres_errors():
        return described(await connection.fetchrow(query("describe_parked"), rows[0]["id"]))


async def _selected(connection: Connection, selection: Selection, *, lines: bool = False) -> list[asyncpg.Record]:
    filters: list[Any] = [
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
    ]
    with postgres_errors():
        return await connection.fetch(query("select_parked"), *filters, lines)


def _without_paused(rows: Sequence[asyncpg.Record], selection: Selection) -> tuple[list[asyncpg.Record], list[str]]:
    """A pause protects from acts on many: (the rest, what to say about it). Named or asked for as paused, it does not."""
    if selection.exact() is not None or selection.ids or "paused" in (selection.cause, selection.state):
        return list(rows), []
    chosen = [r for r in rows if not r["is_paused"]]
    paused = len(rows) - len(chosen)
    note = f"{counted(paused, 'row')} left alone: paused (name the aggregate, or say --cause paused)"
    return chosen, [note] if paused else []


def _marked_already(rows: Sequence[asyncpg.Record]) -> str:
    """What to say of rows that were given up before and are still parked; empty if there are none."""
    marked = sum(r["is_marked"] for r in rows)
    return f"{counted(marked, 'row')} given up already, on the way as tombstones" if marked else ""


def _plan(rows: Sequence[asyncpg.Record], notes: Sequence[str]) -> Plan:
    return Plan(rows=len(rows), aggregates=aggregates_of(rows), ids=[r["id"] for r in rows], notes=notes)


async def _locked(connection: Connection, act: Act, plan: Plan) -> list[asyncpg.Record]:
    """Those of the counted rows that are parked still; nobody else changes them until the end of the transaction."""
    await connection.execute(query("lock_outbox_cursors"))
    rows = await connection.fetch(query("still_parked"), plan.ids)
    if not rows:
        raise nothing(act.selection, f"what was counted ({counted(plan.rows, 'row')}) went out meanwhile")
    return rows


async def _entomb(connection: Connection, act: Act, plan: Plan, operator: Operator) -> Done:
    rows = await _locked(connection, act, plan)
    audit_id = await act.record(connection, operator, len(rows), aggregates_of(rows))
    notes = await _mark(connection, act.name, [r["id"] for r in rows], audit_id)
    if loose := [r["id"] for r in rows if r["aggregate_id"] is None]:
        await connection.execute(query("drop_unordered"), loose)
    return _done(rows, plan, audit_id, notes)


async def _mark(connection: Connection, act: str, ids: Sequence[int], audit_id: int) -> list[str]:
    """Returns what happens next."""
    await connection.execute(query("mark_tombstones"), ids, act, audit_id)
    await connection.execute(query("release_marked"), ids)
    await connection.execute(query("notify_outbox"))
    go_out = f"relay publishes the tombstones {await when_relay_acts(connection)}, in order; consumers pass over them"
    if not await connection.fetch(query("find_pauses")):
        return [go_out]
    held: int = await connection.fetchval(query("held_by_pause"), ids)
    if held == len(ids):
        return ["paused: relay publishes the tombstones after `relay resume`, in order; consumers pass over them"]
    return [go_out, *([f"{held:,} of them after `relay resume`: paused"] if held else [])]


def _done(rows: Sequence[asyncpg.Record], plan: Plan, audit_id: int, notes: list[str]) -> Done:
    if (gone := plan.rows - len(rows)) > 0:
        notes = [f"{counted(gone, 'row')} went out, or was paused, meanwhile", *notes]
    return Done(rows=len(rows), aggregates=len(aggregates_of(rows)), audit_id=audit_id, notes=notes)
