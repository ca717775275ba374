"""What the outbox daemon writes: the cursor, and the parked rows in the same transaction. Every write is fenced by the epoch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from relay.errors import LeaseLost
from relay.failpoints import Point, reached
from relay.message import Aggregate, Row
from relay.outbox.cursor import Position
from relay.outbox.parking import Parked, retry_delay_s
from relay.outbox.pause import Pauses
from relay.outbox.reader import to_row
from relay.postgres.connect import Connection
from relay.postgres.errors import postgres_errors
from relay.postgres.planning import Planning
from relay.postgres.queries import query
from relay.settings import OutboxSettings

_RETRY_ROWS_EACH = 50
"""Of one aggregate in a portion of parked rows: with less, the heads' round trip to the broker would be most of the work."""


@dataclass(frozen=True, slots=True)
class Due:
    """A parked row that may be tried again."""

    row: Row
    attempts: int  # refusals so far
    at: datetime | None = None  # since when it is due, None: it waits behind one that is


class Store:
    """The writes of the owner of one shard. Raises LeaseLost as soon as another owner has raised the epoch."""

    def __init__(
        self,
        connection: Connection,
        *,
        shard: int,
        epoch: int,
        settings: OutboxSettings,
        planning: Planning,
    ) -> None:
        self._connection = connection
        self._planning = planning
        self._shard = shard
        self._epoch = epoch
        self._settings = settings

    async def checkpoint(
        self,
        position: Position,
        high_id: int,
        parked: Sequence[Parked] = (),
        *,
        confirmed: int = 0,
        rate: float = 0.0,
    ) -> None:
        """Persist `position` and park rows, both or neither. `high_id`: the highest id published so far.

        `confirmed` messages were published since the last checkpoint, `rate` a second lately: for `relay status`.
        """
        with postgres_errors():
            async with self._connection.transaction():
                # The cursor first: an operator's act locks it before it touches parked rows.
                await self._move(position, high_id, confirmed, rate)
                reached(Point.CURSOR_MOVED)
                if parked:
                    await self._park(parked)
                    reached(Point.ROWS_PARKED)
        reached(Point.CHECKPOINTED)

    async def pauses(self) -> Pauses:
        """What operators have paused."""
        with postgres_errors():
            return Pauses.of(await self._connection.fetch(query("list_pauses")))

    async def blocked(self) -> dict[Aggregate | None, tuple[int, int]]:
        """(parked rows, those of them that were refused or are behind one that was) by aggregate.

        Of events without an aggregate under None.
        """
        async with self._planned_for_values():
            records = await self._connection.fetch(query("blocked_aggregates"), self._shard)
        found: dict[Aggregate | None, tuple[int, int]] = {}
        for r in records:
            key = None if r["aggregate_id"] is None else (r["aggregate_type"], r["aggregate_id"])
            parked, refused = found.get(key, (0, 0))
            found[key] = (parked + r["parked"], refused + r["refused"])
        return found

    async def reconcile(self, pauses: Pauses) -> bool:
        """See that every aggregate's first parked row is tried, is paused, or is stuck. True if something was changed.

        An operator may have taken a head away, paused what is being tried, or resumed what was paused.
        """
        blocks = ["promote_headless", *(["hold_paused"] if pauses.any_rows else []), "release_paused"]
        async with self._planned_for_values():
            async with self._connection.transaction():
                self._require(await self._connection.fetchval(query("fence"), self._shard, self._epoch, 0, 0))
                done = [await self._connection.execute(query(block), self._shard) for block in blocks]
        return any(tag != "UPDATE 0" for tag in done)

    async def hold(self, rows: Sequence[Row]) -> bool:
        """A pause holds these rows, which were found due or behind one: from here on they are not due. True if one of them was."""
        async with self._planned_for_values():
            async with self._connection.transaction():
                self._require(await self._connection.fetchval(query("fence"), self._shard, self._epoch, 0, 0))
                done = await self._connection.execute(query("hold_due"), [row.id for row in rows])
        return done != "UPDATE 0"

    async def due(self, aggregates: int, suspects: Sequence[int]) -> list[Due]:
        """A portion of the parked rows that may be tried now, by id: so many heads, each with some of the rows behind it.

        Without what is tried alone: `suspects`, and what closed the channel or was not confirmed in time.
        """
        rows_each = 1 if self._settings.order == "strict" else _RETRY_ROWS_EACH
        async with self._planned_for_values():
            records = await self._connection.fetch(
                query("due_parked"), self._shard, aggregates, rows_each, self._settings.page_bytes, suspects
            )
        return [_to_due(r) for r in records]

    async def due_alone(self, suspects: Sequence[int]) -> Due | None:
        """The parked row to be tried alone now, as the tables are at this moment."""
        async with self._planned_for_values():
            record = await self._connection.fetchrow(query("due_alone"), self._shard, suspects)
        return None if record is None else _to_due(record)

    async def next_attempts_s(self, suspects: Sequence[int]) -> tuple[float | None, float | None]:
        """Seconds until a parked row is due, and until one that is tried alone (negative: overdue); None when none ever will be."""
        async with self._planned_for_values():
            record = await self._connection.fetchrow(query("next_parked_attempt"), self._shard, suspects)
        return (None, None) if record is None else (record["together_s"], record["alone_s"])

    async def unpark(
        self, published: Sequence[Row], refused: Sequence[tuple[Parked, Due]]
    ) -> tuple[dict[int, bool], dict[Aggregate, bool]]:
        """Remove the rows that went out, delay those that were refused again.

        Returns the ids of those that were removed, and whether each had been refused before; and which of these aggregates are
        still blocked, and whether by a row that was refused. A row that an operator took out of the sequence while it was
        being published stays: its tombstone goes out next.
        In one transaction, fenced like a checkpoint.
        """
        aggregates = {a for a in (row.aggregate for row in (*published, *(p.row for p, _ in refused))) if a is not None}
        tombstones = [row.id for row in published if row.is_tombstone]
        async with self._planned_for_values():
            async with self._connection.transaction():
                high_id = max((row.id for row in published), default=0)
                self._require(
                    await self._connection.fetchval(query("fence"), self._shard, self._epoch, high_id, len(published))
                )
                gone = await self._connection.fetch(query("unpark"), [row.id for row in published], tombstones)
                reached(Point.ROWS_UNPARKED)
                await self._delay(refused)
                still = await self._connection.fetch(
                    query("promote_parked"), self._shard, [a[0] for a in aggregates], [a[1] for a in aggregates]
                )
        reached(Point.UNPARKED)
        return (
            {r["id"]: r["refused"] for r in gone},
            {(r["aggregate_type"], r["aggregate_id"]): r["refused"] for r in still},
        )

    async def note_failure(self, error: str, seconds_ago: float) -> None:
        """What ended the last session, for `relay status`. Nothing is written if we are not the owner any more."""
        with postgres_errors():
            await self._connection.execute(query("note_failure"), self._shard, self._epoch, error, seconds_ago)

    @asynccontextmanager
    async def _planned_for_values(self) -> AsyncIterator[None]:
        """Within it, what is asked of the parked rows: a table that is empty today, and joined with the log."""
        with postgres_errors():
            await self._planning.for_values()
            yield

    async def _move(self, position: Position, high_id: int, confirmed: int, rate: float) -> None:
        moved = await self._connection.fetchval(
            query("checkpoint"),
            self._shard,
            self._epoch,
            str(position.snapshot),
            None if position.window is None else str(position.window),
            position.after_id,
            high_id,
            confirmed,
            rate,
        )
        self._require(moved)

    def _require(self, owned: int | None) -> None:
        if owned is None:
            raise LeaseLost(
                f"shard {self._shard}: another relay took over (epoch {self._epoch} is over); this one stops"
            )

    async def _park(self, parked: Sequence[Parked]) -> None:
        rows = [p.row for p in parked]
        fates = [self._first_fate(p) for p in parked]
        await self._connection.execute(
            query("park"),
            self._shard,
            [r.id for r in rows],
            [r.aggregate_type if r.aggregate_id is not None else None for r in rows],
            [r.aggregate_id for r in rows],
            [r.seq for r in rows],
            [p.reason for p in parked],
            [p.detail for p in parked],
            [fate[0] for fate in fates],
            [fate[1] for fate in fates],
            [fate[2] for fate in fates],
        )

    async def _delay(self, refused: Sequence[tuple[Parked, Due]]) -> None:
        if not refused:
            return
        fates = [self._fate(attempts=due.attempts + 1) for _, due in refused]
        await self._connection.execute(
            query("delay_parked"),
            [p.row.id for p, _ in refused],
            [p.reason for p, _ in refused],
            [p.detail for p, _ in refused],
            [fate[0] for fate in fates],
            [fate[1] for fate in fates],
            [fate[2] for fate in fates],
            [p.row.is_tombstone for p, _ in refused],
            [due.at for _, due in refused],
        )

    def _first_fate(self, parked: Parked) -> tuple[str, int, float | None]:
        """(state, attempts, delay in s) of a row that is parked now."""
        if parked.is_paused:
            return "paused", 0, None
        return self._fate(attempts=1) if parked.is_head else ("waiting", 0, None)

    def _fate(self, *, attempts: int) -> tuple[str, int, float | None]:
        """(state, attempts, delay in s) of a row that was refused `attempts` times."""
        if attempts >= self._settings.max_attempts:
            return "stuck", attempts, None
        return (
            "retrying",
            attempts,
            retry_delay_s(attempts, first_s=self._settings.retry_first_s, longest_s=self._settings.retry_max_s),
        )


def _to_due(record: Any) -> Due:
    return Due(to_row(record), record["attempts"], record["next_attempt_at"])
