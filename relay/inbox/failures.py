"""Who is to blame for an exception in a batch: a handler, chance, or the servers."""

from __future__ import annotations

from collections.abc import Iterator

import asyncpg

from relay.errors import PostgresUnavailable
from relay.inbox.sequencer import Arrival

_CHANCE = ("40001", "40P01")
"""Serialization failure, deadlock: the transaction is redone, nobody has failed."""

_SERVER_CLASSES = ("08", "57P", "58")
_SERVER_STATES = ("25006", "53100", "53300")
"""Connection lost, server shutting down, I/O error; read-only server, disk full, no connection slot: not a handler's fault."""

_ABORTED = ("25P01", "25P02", "3B001")
"""No transaction, an aborted one, or our savepoint is gone: some handler broke its contract."""

_ERROR_LENGTH = 300


class HandlerFailed(Exception):
    """A handler raised, took too long, or broke its contract. `error` is fit for the table and the log."""

    def __init__(self, arrival: Arrival, error: str, *, ends_transaction: bool = False) -> None:
        super().__init__(error)
        self.arrival = arrival
        self.error = error
        self.ends_transaction = ends_transaction  # the connection is not fit for anything any more


class CommitFailed(Exception):
    """The transaction as a whole failed through somebody's effects: a deferred constraint, or a swallowed SQL error."""

    def __init__(self, error: str) -> None:
        super().__init__(error)
        self.error = error


class Collision(Exception):
    """Deadlock or serialization failure: redo."""


def judged(exc: BaseException) -> Collision | PostgresUnavailable | None:
    """What an exception really means when PostgreSQL is behind it; None: the one who raised it is to blame."""
    for cause in _chain(exc):
        if isinstance(cause, asyncpg.PostgresError):
            state = cause.sqlstate or ""
            if state in _CHANCE:
                return Collision(described(cause))
            if state in _SERVER_STATES or state.startswith(_SERVER_CLASSES):
                return PostgresUnavailable(f"PostgreSQL said: {described(cause)}", sqlstate=state)
    return None


def is_aborted(exc: asyncpg.PostgresError) -> bool:
    """True when PostgreSQL says that the transaction is not as relay left it."""
    return exc.sqlstate in _ABORTED


def described(exc: BaseException) -> str:
    """Class and first line: an exception's further lines (PostgreSQL's DETAIL, pydantic's inputs) may quote the payload."""
    lines = str(exc).splitlines()
    name = type(exc).__name__
    return f"{name}: {lines[0][:_ERROR_LENGTH]}" if lines else name


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        seen.add(id(exc))
        yield exc
        exc = exc.__cause__ or exc.__context__
