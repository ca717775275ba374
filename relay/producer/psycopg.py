"""Emit through a psycopg 3 connection or cursor, in its current transaction: `emit`, and `emit_async` for the async ones.

A cursor stands for its connection; what it has fetched is left alone. Errors of the database are psycopg's own, so the
caller's retries work as for any statement of theirs: a `seq` that is not the next one is a SerializationFailure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from relay.errors import InputError
from relay.producer.event import NewEvent
from relay.producer.many import Many
from relay.producer.statement import parameters, require_transaction, statement

Sync: TypeAlias = psycopg.Connection[Any] | psycopg.Cursor[Any]
Async: TypeAlias = psycopg.AsyncConnection[Any] | psycopg.AsyncCursor[Any]
_Any: TypeAlias = psycopg.Connection[Any] | psycopg.AsyncConnection[Any]

_REMEDY = "Use `with connection.transaction():` around the change and the emit"


def emit(connection: Sync, event: NewEvent, *, allow_autocommit: bool = False) -> int | None:
    """Insert an event: committed with the caller's transaction, or not at all. Returns its seq (None without an aggregate).

    Raises InputError on an autocommit connection outside a transaction, unless `allow_autocommit`.
    """
    values = parameters(event)
    with psycopg.RawCursor(_checked(connection, allow_autocommit), row_factory=tuple_row) as cursor:
        return cursor.execute(_INSERT_EVENT, values).fetchall()[0][0]  # type: ignore[no-any-return]


def emit_many(connection: Sync, events: Iterable[NewEvent], *, allow_autocommit: bool = False) -> list[int | None]:
    """Insert events, committed with the caller's transaction or not at all. Returns their seqs in the order given.

    Each aggregate's events are numbered in that order; which aggregate comes first is not promised: see `Many`.

    Raises InputError, before anything is sent, on an autocommit connection outside a transaction, unless `allow_autocommit`.
    """
    many = Many(events)
    seqs: list[int | None] = []
    with psycopg.RawCursor(_checked(connection, allow_autocommit), row_factory=tuple_row) as cursor:
        for values in many.statements(at_once=_alone(cursor.connection)):
            seqs += [row[0] for row in cursor.execute(_INSERT_EVENTS, values)]
    return many.as_given(seqs)


async def emit_async(connection: Async, event: NewEvent, *, allow_autocommit: bool = False) -> int | None:
    """`emit` for an AsyncConnection or AsyncCursor."""
    values = parameters(event)
    async with psycopg.AsyncRawCursor(_checked_async(connection, allow_autocommit), row_factory=tuple_row) as cursor:
        await cursor.execute(_INSERT_EVENT, values)
        return (await cursor.fetchall())[0][0]  # type: ignore[no-any-return]


async def emit_many_async(
    connection: Async, events: Iterable[NewEvent], *, allow_autocommit: bool = False
) -> list[int | None]:
    """`emit_many` for an AsyncConnection or AsyncCursor."""
    many = Many(events)
    seqs: list[int | None] = []
    async with psycopg.AsyncRawCursor(_checked_async(connection, allow_autocommit), row_factory=tuple_row) as cursor:
        for values in many.statements(at_once=_alone(cursor.connection)):
            await cursor.execute(_INSERT_EVENTS, values)
            seqs += [row[0] for row in await cursor.fetchall()]
    return many.as_given(seqs)


_INSERT_EVENT = statement("insert_event", "$1").encode()
_INSERT_EVENTS = statement("insert_events", "$1").encode()


def _checked(given: object, allow_autocommit: bool) -> psycopg.Connection[Any]:
    connection = given.connection if isinstance(given, psycopg.Cursor) else given
    if not isinstance(connection, psycopg.Connection):
        raise InputError(f"emit takes a psycopg Connection or Cursor, not a {type(given).__name__}{_hint(given)}")
    _require(connection, allow_autocommit)
    return connection


def _checked_async(given: object, allow_autocommit: bool) -> psycopg.AsyncConnection[Any]:
    connection = given.connection if isinstance(given, psycopg.AsyncCursor) else given
    if not isinstance(connection, psycopg.AsyncConnection):
        raise InputError(
            f"emit_async takes a psycopg AsyncConnection or AsyncCursor, not a {type(given).__name__}{_hint(given)}"
        )
    _require(connection, allow_autocommit)
    return connection


def _hint(given: object) -> str:
    if isinstance(given, psycopg.Connection | psycopg.Cursor):
        return ": use emit"
    return ": use emit_async" if isinstance(given, psycopg.AsyncConnection | psycopg.AsyncCursor) else ""


def _require(connection: _Any, allow_autocommit: bool) -> None:
    require_transaction(allow_autocommit or not _alone(connection), _REMEDY)


def _alone(connection: _Any) -> bool:
    """True when a statement would be a transaction of its own. Without autocommit psycopg opens one that the caller ends."""
    return connection.autocommit and connection.info.transaction_status == TransactionStatus.IDLE
