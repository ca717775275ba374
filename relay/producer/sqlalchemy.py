"""Emit through a SQLAlchemy 2 connection or session, in its current transaction: `emit`, and `emit_async` for the async ones.

Works with every PostgreSQL driver that SQLAlchemy has. Errors of the database are SQLAlchemy's own, so the caller's retries
work as for any statement of theirs: a `seq` that is not the next one is a DBAPIError with SQLSTATE 40001.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from sqlalchemy import TextClause, text
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, scoped_session

from relay.errors import InputError
from relay.producer.event import NewEvent
from relay.producer.many import Many
from relay.producer.statement import named, parameters, require_transaction, statement

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

    Async: TypeAlias = AsyncConnection | AsyncSession

Sync: TypeAlias = Connection | Session | scoped_session[Any]

_REMEDY = "Do not use isolation_level=AUTOCOMMIT for the change and the emit"


def emit(connection: Sync, event: NewEvent, *, allow_autocommit: bool = False) -> int | None:
    """Insert an event: committed with the caller's transaction, or not at all. Returns its seq (None without an aggregate).

    A session's pending objects are not flushed by it. Raises InputError under AUTOCOMMIT, unless `allow_autocommit`.
    """
    values = parameters(event)
    seq: int | None = _checked(connection, allow_autocommit).execute(_text("insert_event"), named(values)).scalar_one()
    return seq


def emit_many(connection: Sync, events: Iterable[NewEvent], *, allow_autocommit: bool = False) -> list[int | None]:
    """Insert events, committed with the caller's transaction or not at all. Returns their seqs in the order given.

    Each aggregate's events are numbered in that order; which aggregate comes first is not promised: see `Many`.

    A session's pending objects are not flushed by it. Raises InputError, before anything is sent, under AUTOCOMMIT, unless
    `allow_autocommit`.
    """
    many = Many(events)
    checked = _checked(connection, allow_autocommit)
    seqs: list[int | None] = []
    for values in many.statements(at_once=_autocommit(checked)):
        seqs += checked.execute(_text("insert_events"), named(values)).scalars()
    return many.as_given(seqs)


async def emit_async(connection: Async, event: NewEvent, *, allow_autocommit: bool = False) -> int | None:
    """`emit` for an AsyncConnection or AsyncSession."""
    _require_async(connection)
    return await connection.run_sync(lambda inner: emit(inner, event, allow_autocommit=allow_autocommit))


async def emit_many_async(
    connection: Async, events: Iterable[NewEvent], *, allow_autocommit: bool = False
) -> list[int | None]:
    """`emit_many` for an AsyncConnection or AsyncSession."""
    _require_async(connection)
    return await connection.run_sync(lambda inner: emit_many(inner, events, allow_autocommit=allow_autocommit))


@cache
def _text(name: Literal["insert_event", "insert_events"]) -> TextClause:
    return text(statement(name, ":p1"))


def _checked(given: object, allow_autocommit: bool) -> Connection:
    connection = given.connection() if isinstance(given, Session | scoped_session) else given
    if not isinstance(connection, Connection):
        hint = ": use emit_async" if hasattr(given, "run_sync") else ""
        raise InputError(f"emit takes a SQLAlchemy Connection or Session, not a {type(given).__name__}{hint}")
    if connection.dialect.name != "postgresql":
        raise InputError(f"the outbox is in PostgreSQL, but this connection speaks to {connection.dialect.name}")
    require_transaction(allow_autocommit or not _autocommit(connection), _REMEDY)
    return connection


def _autocommit(connection: Connection) -> bool:
    """All PostgreSQL drivers, and SQLAlchemy's adapter of asyncpg, say so by this attribute."""
    return bool(getattr(connection.connection.dbapi_connection, "autocommit", False))


def _require_async(given: object) -> None:
    if not hasattr(given, "run_sync"):
        raise InputError(
            f"emit_async takes a SQLAlchemy AsyncConnection or AsyncSession, not a {type(given).__name__}: use emit"
        )
