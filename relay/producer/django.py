"""Emit through Django's database connection, in its current transaction.

Errors of the database are Django's own (`django.db.Error`), so the caller's retries work as for any statement of theirs: a
`seq` that is not the next one is an OperationalError. In async code use `sync_to_async` around the whole atomic block,
as for all of Django's transactions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from django.db import DEFAULT_DB_ALIAS, connections

from relay.errors import InputError
from relay.producer.event import NewEvent
from relay.producer.many import Many
from relay.producer.statement import parameters, require_transaction, statement

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

_REMEDY = "Use `with transaction.atomic():` around the change and the emit"


def emit(event: NewEvent, *, using: str = DEFAULT_DB_ALIAS, allow_autocommit: bool = False) -> int | None:
    """Insert an event: committed with the current transaction of `using`, or not at all.

    Returns its seq (None without an aggregate). Raises InputError outside `atomic`, unless `allow_autocommit`.
    """
    seq: int | None = _rows("insert_event", parameters(event), _checked(using, allow_autocommit))[0][0]
    return seq


def emit_many(
    events: Iterable[NewEvent], *, using: str = DEFAULT_DB_ALIAS, allow_autocommit: bool = False
) -> list[int | None]:
    """Insert events, committed with the current transaction of `using` or not at all. Returns their seqs in the order given.

    Each aggregate's events are numbered in that order; which aggregate comes first is not promised: see `Many`.

    Raises InputError, before anything is sent, outside `atomic`, unless `allow_autocommit`.
    """
    many = Many(events)
    connection = _checked(using, allow_autocommit)
    seqs: list[int | None] = []
    for values in many.statements(at_once=not _in_transaction(connection)):
        seqs += [row[0] for row in _rows("insert_events", values, connection)]
    return many.as_given(seqs)


def _checked(using: str, allow_autocommit: bool) -> BaseDatabaseWrapper:
    connection = connections[using]
    if connection.vendor != "postgresql":
        raise InputError(
            f"the outbox is in PostgreSQL, but the database {using!r} is {connection.vendor}: pass using=..."
        )
    require_transaction(allow_autocommit or _in_transaction(connection), _REMEDY)
    return connection


def _in_transaction(connection: BaseDatabaseWrapper) -> bool:
    return bool(connection.in_atomic_block or not connection.get_autocommit())


def _rows(
    name: Literal["insert_event", "insert_events"], values: tuple[Any, ...], connection: BaseDatabaseWrapper
) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(statement(name, "%s"), values)
        rows: list[tuple[Any, ...]] = cursor.fetchall()
        return rows
