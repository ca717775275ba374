"""Emit through an asyncpg connection, in its current transaction.

Errors of the database are asyncpg's own, so the caller's retries work as for any statement of theirs: a `seq` that is not
the next one is a SerializationError.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import asyncpg

from relay.errors import InputError
from relay.producer.event import NewEvent
from relay.producer.many import Many
from relay.producer.statement import parameters, require_transaction, statement

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection: TypeAlias = asyncpg.Connection[Any] | PoolConnectionProxy[Any]

_REMEDY = "Use `async with connection.transaction():` around the change and the emit"


async def emit(connection: Connection, event: NewEvent, *, allow_autocommit: bool = False) -> int | None:
    """Insert an event: committed with the caller's transaction, or not at all. Returns its seq (None without an aggregate).

    Raises InputError outside a transaction, unless `allow_autocommit`.
    """
    values = parameters(event)
    _check(connection, allow_autocommit)
    seq: int | None = await connection.fetchval(statement("insert_event", "$1"), *values)
    return seq


async def emit_many(
    connection: Connection, events: Iterable[NewEvent], *, allow_autocommit: bool = False
) -> list[int | None]:
    """Insert events, committed with the caller's transaction or not at all. Returns their seqs in the order given.

    Each aggregate's events are numbered in that order; which aggregate comes first is not promised: see `Many`.
    Raises InputError, before anything is sent, outside a transaction, unless `allow_autocommit`.
    """
    many = Many(events)
    _check(connection, allow_autocommit)
    seqs: list[int | None] = []
    for values in many.statements(at_once=not connection.is_in_transaction()):
        seqs += [record[0] for record in await connection.fetch(statement("insert_events", "$1"), *values)]
    return many.as_given(seqs)


def _check(connection: object, allow_autocommit: bool) -> None:
    if isinstance(connection, asyncpg.Pool):
        raise InputError("emit takes a connection, not a pool: acquire one and emit in the transaction of the change")
    require_transaction(allow_autocommit or connection.is_in_transaction(), _REMEDY)  # type: ignore[attr-defined]
