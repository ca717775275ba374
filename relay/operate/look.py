"""Looking at one database: read only, everything out of one snapshot, with plans that stay on the indexes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg

from relay.operate.selection import Selection
from relay.outbox.cursor import Snapshot
from relay.postgres.connect import Connection, connection
from relay.postgres.errors import postgres_errors
from relay.postgres.migrate import require_current
from relay.postgres.queries import query
from relay.settings import PostgresSettings

_WORK_MEM = "64MB"
"""Counting 100 000 blocked rows by aggregate stays in memory (measured on a busy machine: 105 instead of 180 ms)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One look at a database: what is read through it is true at the moment `now`."""

    connection: Connection
    database: str
    role: str
    now: datetime
    outbox: bool  # it holds a producer's side
    inbox: bool  # it holds a consumer's side
    errors: bool  # this role may read what handlers' errors say

    async def fetch(self, block: str, *arguments: Any) -> list[asyncpg.Record]:
        """The records of a named block."""
        return await self.connection.fetch(query(block), *arguments)

    async def one(self, block: str, *arguments: Any) -> asyncpg.Record | None:
        """The first record of a named block."""
        return await self.connection.fetchrow(query(block), *arguments)

    async def has_several_inboxes(self) -> bool:
        """True when more than one consumer keeps its inbox here: an act has to say which it means."""
        return len(await self.fetch("see_inboxes")) > 1

    def age_s(self, moment: datetime | None) -> float | None:
        """Seconds from `moment` to now; None for None."""
        return None if moment is None else max(0.0, (self.now - moment).total_seconds())


@asynccontextmanager
async def looking(settings: PostgresSettings, *, application: str) -> AsyncIterator[Look]:
    """Open a look. The role needs relay_monitor's rights. Raises SchemaError, PrivilegeError and the like as every command does."""
    async with connection(settings, application=application) as opened:
        await require_current(opened)
        with postgres_errors():
            await opened.execute(query("set_session"), "work_mem", _WORK_MEM)
            async with opened.transaction(isolation="repeatable_read", readonly=True):
                record = await opened.fetchrow(query("see_sides"))
                if record is None:
                    raise AssertionError("see_sides gives one row")
                yield Look(connection=opened, **record)


@dataclass(frozen=True, slots=True)
class Unread:
    """Where a shard's log has been read to, as the arguments that the blocks take."""

    xmax: str
    late: list[str]  # transactions that were in progress
    window: str | None
    after_id: int

    @classmethod
    def of(cls, record: asyncpg.Record) -> Unread:
        """From a record of `see_shards`."""
        snapshot = Snapshot.parse(record["snapshot"])
        return cls(str(snapshot.xmax), [str(x) for x in snapshot.xip], record["window_snapshot"], record["after_id"])


def containing(text: str | None) -> str | None:
    """The pattern of ILIKE for texts that contain this one; None for None."""
    if text is None:
        return None
    return "%" + text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"


def patterns(selection: Selection) -> tuple[str | None, str | None]:
    """(aggregate type, aggregate id) as patterns of LIKE; None: any."""
    return selection.parts() or (None, None)


def ids(selection: Selection) -> list[int] | None:
    """The row ids that were asked for; None: any."""
    return None if selection.ids is None else list(selection.ids)


def by_id(records: Iterable[asyncpg.Record], column: str) -> dict[int, Any]:
    """{id: column}."""
    return {r["id"]: r[column] for r in records}
