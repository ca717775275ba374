"""Who is to blame for an exception in a batch: a handler, chance, or the servers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import asyncpg

from relay.errors import HandlerError, PostgresUnavailable
from relay.inbox.sequencer import Arrival

_CHANCE = ("40001", "40P01")
"""Serialization failure, deadlock: the transaction is redone, nobody has failed."""

_SERVER_CLASSES = ("08", "57P", "58")
_SERVER_STATES = ("25006", "53100", "53300")
"""Connection lost, server shutting down, I/O error; read-only server, disk full, no connection slot: not a handler's fault."""

_ABORTED = ("25P01", "25P02", "3B001")
"""No transaction, an aborted one, or our savepoint is gone: some handler broke its contract."""

_ERROR_LENGTH = 300

ENDED = f"{HandlerError.__name__}: the handler ended the transaction, which belongs to the inbox"
ABORTED = (
    f"{HandlerError.__name__}: the handler swallowed an SQL error and left the transaction aborted (use a savepoint)"
)
MOVED = "rows of relay.inbox_aggregate were changed inside the inbox's transaction, by a handler or by a trigger on that table"
DIED = f"{HandlerError.__name__}: the connection to PostgreSQL broke under the handler, again and again"
SUSPECTED = (
    f"{HandlerError.__name__}: the connection to PostgreSQL broke when the handler was called with this and others"
)
_TOO_LONG = re.compile(r"TimeoutError: the handler took longer than [0-9.e+-]+ s")


class HandlerFailed(Exception):
    """A handler raised, took too long, or broke its contract. `error` is fit for the table, `loggable` of it for the log.

    `arrivals` are what it was called with: if they are several, one of them at least is to blame.
    """

    def __init__(self, arrivals: Sequence[Arrival], error: str, *, ends_transaction: bool = False) -> None:
        super().__init__(error)
        self.arrivals = arrivals
        self.error = error
        self.ends_transaction = ends_transaction  # the connection is not fit for anything any more


class CommitFailed(Exception):
    """The transaction as a whole failed through somebody's effects: a deferred constraint, a swallowed SQL error, a transaction that was
    ended, cursors that were changed.
    """

    def __init__(self, error: str) -> None:
        super().__init__(error)
        self.error = error


class Collision(Exception):
    """Deadlock or serialization failure: redo. `arrivals` are whose handler was running, none: a statement of ours."""

    def __init__(self, error: str, arrivals: Sequence[Arrival] = (), *, at_commit: bool = False) -> None:
        super().__init__(error)
        self.error = error
        self.arrivals = arrivals
        self.at_commit = at_commit


def judged(exc: asyncpg.PostgresError, *, at_commit: bool = False) -> Collision | PostgresUnavailable | None:
    """What an error of a statement of ours means; None: somebody's effects are to blame."""
    if _is_chance(exc):
        return Collision(described(exc), at_commit=at_commit)
    if _ends_session(exc) or (_is_of_server(exc) and not at_commit):  # a deferred trigger may raise whatever it likes
        return PostgresUnavailable(f"PostgreSQL said: {described(exc)}", sqlstate=exc.sqlstate)
    return None


def collided(exc: BaseException) -> bool:
    """True when a deadlock or serialization failure is behind what a handler raised, on whatever connection."""
    return any(isinstance(cause, asyncpg.PostgresError) and _is_chance(cause) for cause in _chain(exc))


def speaks_of_server(exc: BaseException) -> bool:
    """True when a handler raised what a dying server says, or somebody in its name: our own connection will tell."""
    return any(isinstance(cause, asyncpg.PostgresError) and _is_of_server(cause) for cause in _chain(exc))


def _is_chance(exc: asyncpg.PostgresError) -> bool:
    return exc.sqlstate in _CHANCE


def _is_of_server(exc: asyncpg.PostgresError) -> bool:
    state = exc.sqlstate or ""
    return _ends_session(exc) or state in _SERVER_STATES or state.startswith(_SERVER_CLASSES)


def _ends_session(exc: asyncpg.PostgresError) -> bool:
    """Whether the session is over: PostgreSQL said so, or asyncpg, which gives its own errors no severity."""
    severity = getattr(exc, "severity_en", None)
    return severity in ("FATAL", "PANIC") or (severity is None and (exc.sqlstate or "").startswith("08"))


def is_aborted(exc: asyncpg.PostgresError) -> bool:
    """True when PostgreSQL says that the transaction is not as relay left it."""
    return exc.sqlstate in _ABORTED


def described(exc: BaseException) -> str:
    """Class and first line: an exception's further lines (PostgreSQL's DETAIL, pydantic's inputs) may quote the payload."""
    lines = str(exc).splitlines()
    name = type(exc).__name__
    return f"{name}: {lines[0][:_ERROR_LENGTH]}" if lines else name


def loggable(error: str) -> str:
    """What of a described failure may go to a log: relay's own words, else only the class. The rest may be a payload."""
    return (
        error
        if error in (ENDED, ABORTED, MOVED, DIED, SUSPECTED) or _TOO_LONG.fullmatch(error)
        else error.partition(":")[0]
    )


def too_long(limit_s: float) -> str:
    """The failure of a handler that did not return in time."""
    return f"TimeoutError: the handler took longer than {limit_s:g} s"


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        seen.add(id(exc))
        yield exc
        exc = exc.__cause__ or exc.__context__
