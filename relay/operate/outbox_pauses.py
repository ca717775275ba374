"""Pausing: what must not be published for now, and letting it go on. An aggregate, a type of aggregates or of events, a shard."""

from __future__ import annotations

from typing import Any, ClassVar

import asyncpg

from relay.errors import ConfigError, NothingSelected
from relay.operate.act import Act, Done, Plan, counted
from relay.operate.audit import Operator, Side
from relay.operate.place import outbox_place
from relay.operate.selection import Selection, aggregate_text
from relay.postgres.connect import Connection
from relay.postgres.errors import postgres_errors
from relay.postgres.queries import query

Scope = tuple[str, str | None, str | None, str | None, int | None]
"""(scope, aggregate type, aggregate id, event type, shard), as in relay.outbox_pause."""


def scope_of(selection: Selection, shard: int | None) -> Scope:
    """What is to be paused. Raises ConfigError unless it is exactly one thing."""
    given = [selection.aggregate, selection.aggregate_type, selection.event_type, shard]
    if sum(value is not None for value in given) != 1:
        raise ConfigError("name one thing: an aggregate (order/42), --type order, --event-type OrderPaid, or --shard 0")
    if selection.aggregate is not None:
        if (exact := selection.exact()) is None:
            raise ConfigError(
                f"a pause holds one aggregate, and {selection.aggregate!r} is a pattern: name one, or use --type for all of a type"
                r" (an asterisk that is part of the id is written \*)"
            )
        return ("aggregate", *exact, None, None)
    if selection.aggregate_type is not None:
        return ("aggregate_type", selection.aggregate_type, None, None, None)
    if selection.event_type is not None:
        return ("event_type", None, None, selection.event_type, None)
    return ("shard", None, None, None, shard)


def scope_text(scope: Scope) -> str:
    """As people say it."""
    kind, aggregate_type, aggregate_id, event_type, shard = scope
    match kind:
        case "aggregate":
            return aggregate_text(aggregate_type or "", aggregate_id or "")
        case "aggregate_type":
            return f"all aggregates of type {aggregate_type}"
        case "event_type":
            return f"all events of type {event_type}"
        case _:
            return f"shard {shard}"


class Pause(Act):
    """Nothing of it is published until it is resumed. What is in flight at the broker may still arrive."""

    side: ClassVar[Side] = "outbox"
    name = "pause"

    def __init__(self, selection: Selection, shard: int | None = None) -> None:
        """Raises ConfigError unless exactly one thing is named."""
        super().__init__(selection)
        self.scope = scope_of(selection, shard)

    def also_asked(self) -> dict[str, object]:
        """The shard."""
        return {} if self.scope[4] is None else {"shard": self.scope[4]}

    async def plan(self, connection: Connection) -> Plan:
        """One pause, or none if it is there already."""
        with postgres_errors():
            there = await connection.fetchrow(query("find_pause"), *self.scope)
            knows = await connection.fetchrow(query("outbox_knows"), self.scope[1], self.scope[2], self.scope[4])
        assert knows is not None  # noqa: S101 - the statement returns one row whatever there is
        if there is not None:
            return Plan(rows=0, aggregates=_aggregates(self.scope), notes=[_already(there)])
        if self.scope[0] == "shard" and not knows["shard"]:
            raise NothingSelected(f"there is no shard {self.scope[4]}: nothing was changed")
        unknown = self.scope[0] == "aggregate" and not knows["aggregate"]
        notes = await self._doubts(connection)
        if unknown and not notes:
            notes.append("it has no event yet: the pause holds from its first one on")
        return Plan(rows=1, aggregates=_aggregates(self.scope), notes=notes)

    async def do(self, connection: Connection, plan: Plan, operator: Operator) -> Done:
        """Pausing twice changes nothing, and leaves no second record."""
        if (there := await connection.fetchrow(query("find_pause"), *self.scope)) is not None:
            return Done(rows=0, aggregates=0, audit_id=None, notes=[_already(there)])
        audit_id = await self.record(connection, operator, 1, plan.aggregates)
        if await connection.fetchval(query("insert_pause"), *self.scope, audit_id) is None:
            raise asyncpg.SerializationError("it was paused in the same moment")  # done again, and then told as above
        await connection.execute(query("notify_outbox"))
        return Done(
            rows=1,
            aggregates=len(plan.aggregates),
            audit_id=audit_id,
            notes=[
                *await self._doubts(connection),
                "relay holds it back from now on, in order; `relay resume` lets it go on",
            ],
        )

    async def _doubts(self, connection: Connection) -> list[str]:
        """Of a pause that holds nothing yet. Raises ConfigError in a database that is a consumer's."""
        place = await outbox_place(connection)
        if place.consumers:
            raise ConfigError(f"a pause here would hold nothing: {place.doubt}")
        return [f"it holds nothing yet: {place.doubt}"] if place.doubt else []


class Resume(Act):
    """What only this pause held goes on, in order."""

    side: ClassVar[Side] = "outbox"
    name = "resume"

    def __init__(self, selection: Selection, shard: int | None = None) -> None:
        """Raises ConfigError unless exactly one thing is named, or everything."""
        super().__init__(selection)
        self.scope = None if selection.everything else scope_of(selection, shard)

    def also_asked(self) -> dict[str, object]:
        """The shard."""
        return {} if self.scope is None or self.scope[4] is None else {"shard": self.scope[4]}

    async def plan(self, connection: Connection) -> Plan:
        """The pause; with --all every pause."""
        with postgres_errors():
            pauses = await connection.fetch(query("find_pauses"))
        chosen = [p for p in pauses if self.scope in (None, _scope(p))]
        if not chosen:
            raise NothingSelected(self._nothing([_scope(p) for p in pauses]))
        aggregates = sorted({a for p in chosen for a in _aggregates(_scope(p))})
        named = [scope_text(_scope(p)) for p in chosen] if self.scope is None else []
        return Plan(rows=len(chosen), aggregates=aggregates, ids=[p["id"] for p in chosen], notes=named)

    async def do(self, connection: Connection, plan: Plan, operator: Operator) -> Done:
        """Take the pauses away."""
        gone = await connection.fetch(query("delete_pauses"), plan.ids)
        if not gone:
            raise NothingSelected("it was resumed meanwhile, by somebody else: nothing was changed")
        audit_id = await self.record(connection, operator, len(gone), plan.aggregates)
        await connection.execute(query("notify_outbox"))
        return Done(
            rows=len(gone),
            aggregates=len(plan.aggregates),
            audit_id=audit_id,
            notes=["relay publishes what was held back, in order, unless another pause holds it"],
        )

    def _nothing(self, pauses: list[Scope]) -> str:
        if self.scope is not None and self.scope[0] == "aggregate":
            of_type: Scope = ("aggregate_type", self.scope[1], None, None, None)
            if of_type in pauses:
                return (
                    f"{scope_text(self.scope)} is held by the pause of {scope_text(of_type)}: nothing was resumed."
                    f" That pause ends with: relay resume --type {self.scope[1]}"
                )
        paused = [scope_text(pause) for pause in pauses]
        what = "nothing" if self.scope is None else f"{scope_text(self.scope)} is not paused, so nothing"
        others = f" Paused {'is' if len(paused) == 1 else 'are'}: {', '.join(paused[:5])}" if paused else ""
        more = f" and {counted(len(paused) - 5, 'other')}" if len(paused) > 5 else ""
        return f"{what} was resumed.{others}{more}"


def _aggregates(scope: Scope) -> list[tuple[str, str]]:
    return [(scope[1], scope[2])] if scope[1] is not None and scope[2] is not None else []


def _scope(pause: asyncpg.Record) -> Scope:
    row: Any = (pause["scope"], pause["aggregate_type"], pause["aggregate_id"], pause["event_type"], pause["shard"])
    scope: Scope = row
    return scope


def _already(pause: asyncpg.Record) -> str:
    why = f": {pause['why']}" if pause["why"] else ""
    return f"paused already, since {pause['paused_at']:%Y-%m-%d %H:%M:%S} UTC by {pause['who']}{why}"
