"""Reads a shard's log in pages: nothing lost, nothing twice, every aggregate in order, and no row is ever touched."""

from __future__ import annotations

import json
from typing import Any

import asyncpg

from relay.message import Row
from relay.outbox.cursor import Page, Position, Snapshot
from relay.postgres.connect import Connection
from relay.postgres.errors import postgres_errors
from relay.postgres.queries import query


class Reader:
    """Reads one shard over one connection, in pages of at most `page_rows` rows and about `page_bytes` bytes."""

    def __init__(self, connection: Connection, *, shard: int, page_rows: int, page_bytes: int) -> None:
        self._connection = connection
        self._shard = shard
        self._page_rows = page_rows
        self._page_bytes = page_bytes

    async def read(self, position: Position, *, page_rows: int | None = None) -> Page:
        """The page behind `position`. Raises PostgresError; reading again from the same position is always right."""
        limit = page_rows or self._page_rows
        with postgres_errors():
            records = await (
                self._open(position, limit) if position.window is None else self._continue(position, limit)
            )
        snapshot = position.window or Snapshot.parse(records[0]["snapshot"])
        found = [r for r in records if r["id"] is not None]
        complete = not found or found[0]["page_rows"] == len(found) < limit
        return Page([to_row(r) for r in found], snapshot, complete)

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


def to_row(record: asyncpg.Record, *, is_tombstone: bool = False) -> Row:
    """A record of the log as a value; the content type is filled in where the producer left it out.

    Of a tombstone the content was not even read.
    """
    payload, body = record["payload"], record["body"]
    default = "application/octet-stream" if payload is None else "application/json"
    return Row(
        id=record["id"],
        aggregate_type=record["aggregate_type"],
        aggregate_id=record["aggregate_id"],
        seq=record["seq"],
        event_type=record["event_type"],
        content_type=record["content_type"] or default,
        headers=json.loads(record["headers"]) if record["headers"] else {},
        routing_key=record["routing_key"],
        created_at=record["created_at"],
        body=b"" if is_tombstone else body if payload is None else payload.encode(),
        is_tombstone=is_tombstone,
    )


def _texts(xids: tuple[int, ...]) -> list[str]:
    return [str(xid) for xid in xids]
