"""Reads a shard's log in pages: nothing lost, nothing twice, every aggregate in order, and no row is ever touched."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from operator import itemgetter
from types import MappingProxyType
from typing import Any

import asyncpg

from relay.message import Header, Row
from relay.outbox.cursor import Page, Position, Snapshot
from relay.postgres.connect import Connection
from relay.postgres.errors import postgres_errors
from relay.postgres.planning import Planning
from relay.postgres.queries import query

_NO_HEADERS: Mapping[str, Header] = MappingProxyType({})

_REMEMBERED = 1024
_REMEMBERED_CHARACTERS = 512
"""Parsed headers remembered, by their text, and the longest such text: about a megabyte at most."""

_columns = itemgetter(*Row._fields)
_PAGE_COLUMNS = tuple("created_s" if name == "created_at" else name for name in Row._fields)
_new = tuple.__new__


class Reader:
    """Reads one shard over one connection, in pages of at most `page_rows` rows and about `page_bytes` bytes."""

    def __init__(
        self,
        connection: Connection,
        *,
        shard: int,
        page_rows: int,
        page_bytes: int,
        planning: Planning,
    ) -> None:
        self._connection = connection
        self._planning = planning
        self._shard = shard
        self._page_rows = page_rows
        self._page_bytes = page_bytes

    async def read(self, position: Position, *, page_rows: int | None = None) -> Page:
        """The page behind `position`. Raises PostgresError; reading again from the same position is always right."""
        limit = page_rows or self._page_rows
        with postgres_errors():
            await self._planning.once()
            records = await (
                self._open(position, limit) if position.window is None else self._continue(position, limit)
            )
        snapshot = position.window or Snapshot.parse(records[0]["snapshot"])
        found = records if records and records[0]["id"] is not None else []
        complete = not found or (found[-1]["is_last"] and len(found) < limit)
        return Page(to_rows(found), snapshot, complete)

    async def _open(self, position: Position, limit: int) -> list[asyncpg.Record]:
        """The first page of a new window. The late branch is left out when it has nothing to look for: it costs a plan."""
        prev = position.snapshot
        arguments: list[Any] = [self._shard, str(prev.xmax), limit, self._page_bytes]
        if not prev.xip:
            return await self._connection.fetch(query("open_window"), *arguments)
        return await self._connection.fetch(query("open_window_with_late"), *arguments, _texts(prev.xip))

    async def _continue(self, position: Position, limit: int) -> list[asyncpg.Record]:
        prev = position.snapshot
        return await self._connection.fetch(
            query("next_page"),
            self._shard,
            str(prev.xmax),
            limit,
            self._page_bytes,
            _texts(prev.xip),
            position.after_id,
            str(position.window),
        )


def to_row(record: asyncpg.Record) -> Row:
    """A record of the log as a value: every query that is read into rows gives Row's columns, the headers as text or null."""
    return _row(_columns(record), record["created_at"])


def to_rows(records: Sequence[asyncpg.Record]) -> list[Row]:
    """The same for a page, at a third of the cost: its columns are side by side in Row's order, and the time is in whole seconds."""
    if not records:
        return []
    place = _place(records[0])
    return [_row(record[place], _moment(record["created_s"])) for record in records]


def _place(record: asyncpg.Record) -> slice:
    names = (*record.keys(),)
    place = slice(start := names.index("id"), start + len(_PAGE_COLUMNS))
    if names[place] != _PAGE_COLUMNS:
        raise ValueError(f"columns that are not those of a row, in its order: {names[place]}")
    return place


def _row(columns: tuple[Any, ...], created_at: datetime) -> Row:
    (
        row_id,
        aggregate_type,
        aggregate_id,
        seq,
        event_type,
        content_type,
        headers,
        routing_key,
        _,
        body,
        is_tombstone,
    ) = columns
    return _new(
        Row,
        (
            row_id,
            aggregate_type,
            aggregate_id,
            seq,
            event_type,
            content_type,
            _NO_HEADERS if headers is None else _headers(headers),
            routing_key,
            created_at,
            body,
            is_tombstone,
        ),
    )


@lru_cache(_REMEMBERED)
def _moment(seconds: int) -> datetime:
    """Rows that are read one after the other were mostly created in the same second."""
    return datetime.fromtimestamp(seconds, UTC)


def _headers(text: str) -> Mapping[str, Header]:
    """Of a row. Rows repeat their headers, unless a trace is among them."""
    return _remembered(text) if len(text) <= _REMEMBERED_CHARACTERS else _parsed(text)


def _parsed(text: str) -> Mapping[str, Header]:
    return MappingProxyType(json.loads(text))


_remembered = lru_cache(_REMEMBERED)(_parsed)


def _texts(xids: tuple[int, ...]) -> list[str]:
    return [str(xid) for xid in xids]
