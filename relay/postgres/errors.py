"""Translates asyncpg's errors into relay's, once, at this edge."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg

from relay.errors import ConfigError, PostgresError, PostgresRefused, PostgresUnavailable, PrivilegeError, SchemaError

FAILURES = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
"""All that a statement may raise for the server's or the network's sake, for whoever goes on all the same. InternalClientError
is asyncpg's word when a connection was cut in the middle of an exchange and is used before that is noticed."""

_SCHEMA_STATES = {"3F000", "42P01", "42703", "42883"}  # no such schema, table, column, function
_REFUSED_STATES = {"28000", "28P01", "3D000"}  # authorisation, password, no such database


def translated(exc: BaseException) -> PostgresError | ConfigError | None:
    """The relay error for an exception of asyncpg or the socket; None if it is neither."""
    if isinstance(exc, asyncpg.PostgresError):
        state = exc.sqlstate or ""
        text = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        if state in _SCHEMA_STATES:
            return SchemaError(
                f"{text}. Run `relay migrate` (or `relay check` to see what is missing).", sqlstate=state
            )
        if state == "42501":
            return PrivilegeError(
                f"{text}. Grant the role that relay logs in as one of the roles in sql/roles.sql: relay_operator for acts (retry, skip,"
                " purge, pause, resume, replay ...), relay_monitor to look, relay_daemon or relay_consumer to run.",
                sqlstate=state,
            )
        if state in _REFUSED_STATES:
            return PostgresRefused(f"PostgreSQL refused the login: {text}. Check postgres.dsn.", sqlstate=state)
        return PostgresUnavailable(f"PostgreSQL said: {text} (SQLSTATE {state})", sqlstate=state)
    if isinstance(exc, asyncpg.ClientConfigurationError):
        return ConfigError(f"postgres.dsn cannot be used: {exc}")
    if isinstance(
        exc, asyncpg.InterfaceError | asyncpg.InternalClientError
    ):  # the latter: cut in the middle of an exchange
        return PostgresUnavailable(f"the connection to PostgreSQL is not usable: {exc}")
    if isinstance(exc, TimeoutError | asyncio.TimeoutError):
        return PostgresUnavailable("PostgreSQL did not answer in time")
    if isinstance(exc, OSError):
        file = f": {exc.filename}" if exc.filename else ""  # of a certificate that the DSN names
        return PostgresUnavailable(f"PostgreSQL cannot be reached: {exc.strerror or exc}{file}")
    return None


@contextmanager
def postgres_errors() -> Iterator[None]:
    """Within it, every error of asyncpg or its socket leaves as a PostgresError with the original as its cause."""
    try:
        yield
    except Exception as exc:
        if isinstance(exc, PostgresError) or (error := translated(exc)) is None:
            raise
        raise error from exc
