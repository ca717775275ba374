"""What every act has in common: counted first, then done in one transaction with its record, and never more than was counted.

    plan = await act.plan(connection)        # what it would do; takes no lock, changes nothing
    done = await perform(connection, act, plan, operator)

Between the two somebody may have been asked, and the daemons go on: what was counted and is not there any more is left out,
what came meanwhile is not touched. An act that would do nothing raises NothingSelected.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import asyncpg

from relay.errors import NothingSelected, PostgresUnavailable
from relay.message import Aggregate
from relay.operate.audit import Operator, Side, record
from relay.operate.selection import Selection, like
from relay.operate.wording import as_options
from relay.postgres.connect import Connection
from relay.postgres.errors import postgres_errors
from relay.postgres.queries import query

LOCK_WAIT_S = 45.0
"""Longest wait for what a daemon has locked: for as long as its handlers are at work, and shorter than the command time-out."""

PLANS = {"enable_seqscan": "off", "jit": "off"}
"""Settings of an act's session. Each statement is planned for its own parameters anyway, being used once; but the foreign keys
behind 100 000 marks must keep their plan: `force_custom_plan`, which the daemons need, makes one for each row."""

SAMPLE = 10
"""Aggregates that are named before an act is done; of the others only the number is told."""

_REDOS = 5
"""A daemon and an act that lock rows in another order: PostgreSQL ends one of them, which may simply be redone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What an act would do, as counted."""

    rows: int
    aggregates: Sequence[Aggregate] = ()  # distinct, sorted; of a `reset` only a sample
    aggregate_count: int | None = None  # where `aggregates` are a sample
    ids: Sequence[int] = ()  # of the rows
    stored_ids: Sequence[int] = ()  # store mode: of rows in relay.inbox
    gaps: Sequence[tuple[str, str, str]] = ()  # source, aggregate type, aggregate id of gaps to be asked for again
    consumer: str | None = None  # inbox: whose
    notes: Sequence[str] = ()  # what is left alone, and why; what to know before saying yes
    unit: str | None = None  # what the rows are, where it is not what the act speaks of otherwise
    obstacle: str | None = None  # why it is better not done now; a dry run shows it

    @property
    def touched(self) -> int:
        """How many aggregates."""
        return len(self.aggregates) if self.aggregate_count is None else self.aggregate_count


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What an act did."""

    rows: int
    aggregates: int
    audit_id: int | None  # None: all was as asked for already, nothing was changed
    notes: Sequence[str] = ()  # what happens next


class Act(ABC):
    """One act on one side. `selection` is recorded as it was given."""

    side: ClassVar[Side]
    name: ClassVar[str]

    def __init__(self, selection: Selection) -> None:
        self.selection = selection

    @abstractmethod
    async def plan(self, connection: Connection) -> Plan:
        """Count, without a lock. Raises NothingSelected, and ConfigError for what cannot be meant."""

    @abstractmethod
    async def do(self, connection: Connection, plan: Plan, operator: Operator) -> Done:
        """Do it, inside a transaction, and record it there. Raises NothingSelected when nothing is left to do."""

    def also_asked(self) -> dict[str, object]:
        """What was asked for beside the filters: it is recorded with them."""
        return {}

    async def record(
        self, connection: Connection, operator: Operator, rows: int, aggregates: Iterable[Aggregate]
    ) -> int:
        """Write the record. An act on everything names no aggregates: its selection says it all."""
        return await record(
            connection,
            operator=operator,
            side=self.side,
            act=self.name,
            selection=self.selection,
            rows=rows,
            aggregates=() if self.selection.everything else aggregates,
            also=self.also_asked(),
        )


async def perform(connection: Connection, act: Act, plan: Plan, operator: Operator) -> Done:
    """Do what was counted, in one transaction: all of it and its record, or nothing."""
    for redo in range(_REDOS):
        try:
            with postgres_errors():
                async with connection.transaction(isolation="read_committed"):
                    await connection.execute(query("limit_lock_wait"), str(int(LOCK_WAIT_S * 1000)))
                    return await act.do(connection, plan, operator)
        except PostgresUnavailable as exc:
            if exc.sqlstate == asyncpg.LockNotAvailableError.sqlstate:
                raise PostgresUnavailable(
                    f"{act.name}: a daemon has been at work on these rows for more than {LOCK_WAIT_S:g} s (a slow handler?): nothing"
                    " was changed. Try again.",
                    sqlstate=exc.sqlstate,
                ) from exc
            if exc.sqlstate not in _CHANCE or redo == _REDOS - 1:
                raise
            await asyncio.sleep(0.05 * (redo + 1))
    raise AssertionError("not reached")


_CHANCE = (asyncpg.DeadlockDetectedError.sqlstate, asyncpg.SerializationError.sqlstate)


def aggregates_of(rows: Iterable[asyncpg.Record]) -> list[Aggregate]:
    """The distinct aggregates of rows, sorted; rows without one have none."""
    return sorted({(r["aggregate_type"], r["aggregate_id"]) for r in rows if r["aggregate_id"] is not None})


def place_filters(selection: Selection) -> tuple[str | None, str | None, str | None, str | None, str | None]:
    """$1 to $5 of the selecting statements: the aggregate exactly, or as patterns; the aggregate type."""
    exact, parts = selection.exact(), selection.parts()
    if exact is not None:
        return *exact, None, None, selection.aggregate_type
    return None, None, *(parts or (None, None)), selection.aggregate_type


def error_pattern(selection: Selection) -> str | None:
    """The text that an error contains, as a pattern for ILIKE."""
    return None if selection.error is None else f"%{like(selection.error)}%"


def nothing(selection: Selection, what: str, hint: str = "") -> NothingSelected:
    """The error of an act that found nothing."""
    return NothingSelected(
        f"{what} ({as_options(selection.as_json())}): nothing was changed.{' ' + hint if hint else ''}"
    )


def described(row: asyncpg.Record | None) -> list[str]:
    """The one row that is given up, so that whoever is asked knows what is lost."""
    if row is None:
        return []
    name = f"it is {row['event_type']}" if row["seq"] is None else f"it is seq {row['seq']}, {row['event_type']}"
    tried = f", {counted(row['attempts'], 'attempt')}" if row["attempts"] else ""
    why = f": {row['reason']}, {row['state']}{tried}" if row["reason"] is not None else ""
    return [name + why]


def counted(n: int, one: str, many: str | None = None) -> str:
    """`1 row`, `2 rows`."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"
