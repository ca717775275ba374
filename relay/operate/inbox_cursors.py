"""Acts on the cursors of an inbox: over a gap that will not be filled, and back for a rebuild."""

from __future__ import annotations

from typing import Any

import asyncpg

from relay.errors import ConfigError, NothingSelected
from relay.inbox.store import columns
from relay.message import TOMBSTONE
from relay.operate.act import SAMPLE, Done, Plan, aggregates_of, counted, nothing, place_filters
from relay.operate.audit import Operator
from relay.operate.inbox_acts import InboxAct, lock_first_stored, set_aside_by
from relay.operate.place import connected
from relay.operate.selection import Selection, aggregate_text
from relay.postgres.connect import Connection
from relay.postgres.errors import postgres_errors
from relay.postgres.queries import query

_STOP_FIRST = "stop `relay inbox run` and clear your own tables first: what comes again is applied again"

_HIGHEST = 2**63 - 1
"""Of PostgreSQL's bigint. A cursor stays below it: what follows it must have a number, too."""


class SkipThrough(InboxAct):
    """One aggregate's cursor moves over numbers that will not come; what follows them is applied."""

    name = "skip"

    def __init__(self, selection: Selection, through: int) -> None:
        """Raises ConfigError unless exactly one aggregate is named."""
        super().__init__(selection)
        exact = selection.exact()
        if exact is None or not selection.as_json().keys() <= {"aggregate", "source", "consumer"}:
            raise ConfigError(
                "--through moves the cursor of one aggregate, without other filters: `relay inbox skip order/42 --through 7`"
            )
        if not 1 <= through < _HIGHEST:
            raise ConfigError(f"--through {through}: a number from 1 to {_HIGHEST - 1} is meant")
        self._type, self._id = exact
        self._name = aggregate_text(*exact)
        self._through = through

    def also_asked(self) -> dict[str, object]:
        """How far."""
        return {"through": self._through}

    async def plan(self, connection: Connection) -> Plan:
        """What is held and what is missing up to there. Never beyond what is known to exist: that is still to come."""
        consumer = await self.choose_consumer(connection)
        place = await self._place(connection, consumer)
        held = await self._held(connection, consumer, place["source"])
        missing = self._through - place["last_seq"] - held
        notes = [f"consumer {consumer} has applied {self._name} up to {place['last_seq']}"]
        if held:
            notes.append(f"{counted(held, 'held message')} up to {self._through} will not be applied either")
        if place["failed_seq"] == place["last_seq"] + 1 and not missing:
            notes.append(f"nothing is missing: seq {place['failed_seq']} failed, and `relay inbox skip` skips it alone")
        return Plan(rows=missing + held, aggregates=[(self._type, self._id)], consumer=consumer, notes=notes)

    async def do(self, connection: Connection, plan: Plan, operator: Operator) -> Done:
        """Under the cursor's lock, looked at again: what was missing may have come."""
        consumer = plan.consumer
        source = (await self._place(connection, consumer))["source"]
        await self._lock(connection, consumer, source)
        place = await self._place(connection, consumer)
        rows = self._through - place["last_seq"]
        if rows > plan.rows:
            raise NothingSelected(f"{self._name} was reset meanwhile: nothing was changed. Look again.")
        where = (consumer, place["source"], self._type, self._id)
        detail = set_aside_by(operator, "skipped")
        await connection.execute(query("skip_through"), *where, self._through, detail, TOMBSTONE)
        await connection.execute(query("make_successors_due"), *where[:3], [self._id], [self._through])
        audit_id = await self.record(connection, operator, rows, [(self._type, self._id)])
        await connection.execute(query("notify_inbox"), consumer)
        next_ = f"the cursor is at {self._through}; the inbox goes on with {self._through + 1}"
        return Done(rows=rows, aggregates=1, audit_id=audit_id, notes=[next_])

    async def _lock(self, connection: Connection, consumer: str | None, source: str) -> None:
        """As the daemon does: an aggregate of which nothing has come yet has no cursor."""
        key = columns([(source, self._type, self._id)])
        if not await connection.fetch(query("lock_cursors"), consumer, *key):
            await connection.execute(query("create_cursors"), consumer, *key)
            await connection.execute(query("lock_cursors"), consumer, *key)

    async def _held(self, connection: Connection, consumer: str, source: str) -> int:
        with postgres_errors():
            held: int = await connection.fetchval(
                query("held_through"), consumer, source, self._type, self._id, self._through
            )
        return held

    async def _place(self, connection: Connection, consumer: str | None) -> asyncpg.Record:
        with postgres_errors():
            places = await connection.fetch(
                query("places_in_inbox"), consumer, self._type, self._id, self.selection.source
            )
        if len(places) > 1:
            sources = ", ".join(p["source"] for p in places)
            raise ConfigError(f"{self._name} comes from several sources ({sources}): say --source NAME")
        if not places:
            raise nothing(self.selection, f"consumer {consumer} has never heard of {self._name}")
        place: asyncpg.Record = places[0]
        if self._through <= place["last_seq"]:
            raise NothingSelected(
                f"consumer {consumer} has applied {self._name} up to {place['last_seq']} already: nothing was changed"
            )
        if place["known_seq"] is None or self._through > place["known_seq"]:
            known = max(place["last_seq"], place["known_seq"] or 0)
            raise NothingSelected(
                f"nothing of {self._name} is known beyond {known}, so skipping through {self._through} would drop events that are"
                " still to come: nothing was changed"
            )
        return place


class Reset(InboxAct):
    """Cursors go back, so that what is replayed is applied again: for a rebuild of what the consumer keeps."""

    name = "reset"

    def __init__(self, selection: Selection, to: int = 0) -> None:
        """Raises ConfigError for filters that a cursor does not have."""
        super().__init__(selection)
        if not 0 <= to < _HIGHEST:
            raise ConfigError(f"--to {to}: a number from 0 to {_HIGHEST - 1} is meant")
        self._to = to

    def also_asked(self) -> dict[str, object]:
        """How far."""
        return {"to": self._to}

    async def plan(self, connection: Connection) -> Plan:
        """Cursors beyond the number. They may be many: only a sample is named."""
        consumer = await self.choose_consumer(connection)
        with postgres_errors():
            found = await connection.fetchrow(query("count_cursors"), *self._filters(consumer), SAMPLE)
        if found is None or not found["cursors"]:
            return await self._plan_unordered(connection, consumer)
        obstacle = await self._obstacle(connection, consumer)
        notes = [obstacle or _STOP_FIRST]
        if self._forgets_unordered:
            notes.append(
                "events that come without order (no aggregate, or policy none) are forgotten as well: they are applied again when they"
                " come again"
            )
        return Plan(
            rows=found["cursors"],
            aggregates=list(zip(found["types"], found["names"], strict=True)),
            aggregate_count=found["aggregates"],
            consumer=consumer,
            notes=notes,
            obstacle=obstacle,
        )

    async def _obstacle(self, connection: Connection, consumer: str) -> str | None:
        """A consumer that applies meanwhile what its tables do not have any more."""
        if not (running := await connected(connection, consumer)):
            return None
        return f"{running} consumer{'' if running == 1 else 's'} of {consumer} {'is' if running == 1 else 'are'} connected now: stop `relay inbox run` first, and clear your own tables"

    async def _plan_unordered(self, connection: Connection, consumer: str) -> Plan:
        """A consumer that has only ever had events without order has no cursor: it is the events that are forgotten."""
        forgotten = 0
        if self._forgets_unordered:
            with postgres_errors():
                forgotten = await connection.fetchval(query("count_seen"), consumer, self.selection.source)
        if not forgotten:
            beyond = f" beyond {self._to}" if self._to else ""
            raise nothing(self.selection, f"no cursor of consumer {consumer}{beyond} is selected")
        obstacle = await self._obstacle(connection, consumer)
        notes = [obstacle or _STOP_FIRST]
        return Plan(rows=forgotten, consumer=consumer, unit="event without order", notes=notes, obstacle=obstacle)

    async def do(self, connection: Connection, plan: Plan, operator: Operator) -> Done:
        """All at once: a rebuild must not begin from two states."""
        rows = await connection.fetch(query("reset_cursors"), *self._filters(plan.consumer))
        untaken, forgotten = await self._drop_stored(connection, plan.consumer), 0
        if self._forgets_unordered:
            forgotten = await connection.fetchval(query("forget_seen"), plan.consumer, self.selection.source)
        if not rows and not forgotten:
            raise nothing(self.selection, "all of it was reset meanwhile")
        aggregates = aggregates_of(rows)
        audit_id = await self.record(connection, operator, len(rows) or forgotten, aggregates)
        await connection.execute(query("notify_inbox"), plan.consumer)
        notes = []
        if untaken:
            notes.append(
                f"{counted(untaken, 'stored message')} that nobody had taken were removed: they are stored again"
            )
        notes.append(
            f"next: `relay replay {self._replayed} --to-queue {plan.consumer}` at the producer sends the events again"
        )
        return Done(rows=len(rows) or forgotten, aggregates=len(aggregates), audit_id=audit_id, notes=notes)

    async def _drop_stored(self, connection: Connection, consumer: str | None) -> int:
        """Store mode: what nobody has taken yet would be there twice."""
        again = await connection.fetch(query("select_stored_again"), *self._filters(consumer)[:-1])
        if self._forgets_unordered:
            again += await connection.fetch(query("select_stored_unordered"), consumer, self.selection.source)
        ids = [r["id"] for r in again]
        await lock_first_stored(connection, consumer, ids)
        return len(await connection.fetch(query("drop_stored"), consumer, ids)) if ids else 0

    @property
    def _replayed(self) -> str:
        """What was reset, as `relay replay` wants to be told."""
        if self.selection.aggregate is not None:
            return f"'{self.selection.aggregate}'"
        return "--all" if self.selection.aggregate_type is None else f"--type {self.selection.aggregate_type}"

    @property
    def _forgets_unordered(self) -> bool:
        """Events without an aggregate have no cursor: only a rebuild from the beginning applies them again."""
        return self._to == 0 and self.selection.aggregate is None and self.selection.aggregate_type is None

    def _filters(self, consumer: str | None) -> list[Any]:
        return [*place_filters(self.selection), self.selection.source, consumer, self._to]
