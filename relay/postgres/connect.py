"""Connections to PostgreSQL: direct, with deadlines on both ends, and plans that stay on the index."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg

from relay.errors import PoolerError, PostgresRefused, PostgresUnavailable, SchemaError
from relay.postgres.errors import FAILURES, postgres_errors
from relay.postgres.queries import query
from relay.settings import PostgresSettings

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

CLOSE_TIMEOUT_S = 2.0
"""Longest goodbye; after it the socket is cut. A peer that is gone would keep us for the kernel's keepalive otherwise."""

_KEEPALIVE = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3))  # macOS has no TCP_KEEPIDLE
"""Our end of a dead peer: a connection that only listens, or waits for the next message, would not notice it by itself.

Without TCP_USER_TIMEOUT: Linux applies it to a peer that is alive and does not read as well, as a backend that waits for a row
lock in the middle of a handler's COPY or executemany. A dead peer with something under way is found by our own time-outs.
"""

_SESSION = {
    # The server's end of a dead peer: its backend, and the locks it holds, must be gone in seconds, not in two hours.
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10000",  # ms
    "idle_session_timeout": "0",
    # A handler may wait for something else, and a batch is one transaction: relay has its own deadlines for both.
    "idle_in_transaction_session_timeout": "0",
    "timezone": "UTC",
    # After a lock, a statement must see what the lock's last owner committed, whatever ALTER DATABASE or ALTER ROLE made the
    # default: an older snapshot does not show the row that retention must not take, nor the cursor that was moved.
    "default_transaction_isolation": "read committed",
}
_SESSION_17 = {"transaction_timeout": "0"}  # new in PostgreSQL 17

# The planner's wrong turns, measured: a sequential scan, or a generic plan made for an empty table, costs seconds on a young
# and never-analysed log (shared/PERFORMANCE.md B and G).
PLANS = {"enable_seqscan": "off", "plan_cache_mode": "force_custom_plan", "jit": "off"}
"""For what is asked now and then: gaps, seeds."""

READER_PLANS = PLANS | {
    "enable_bitmapscan": "off",  # the next page of a backlog would read all that is left, and sort it, for each page
    "max_parallel_workers_per_gather": "0",
}
"""For whoever reads pages of the log: the plans that tests/integration/test_reader_plans.py pins."""


async def connect(
    settings: PostgresSettings, *, application: str, plans: Mapping[str, str] = READER_PLANS
) -> Connection:
    """A direct session, UTF-8, READ COMMITTED, with short keepalives on both ends and these planner settings.

    Raises PoolerError through a connection pooler, PostgresUnavailable when there is no answer, SchemaError for a
    database that is not UTF-8.
    """
    with _located(settings), postgres_errors():
        async with asyncio.timeout(settings.connect_timeout_s):
            connection: Connection = await asyncpg.connect(
                settings.dsn.get_secret_value(),
                timeout=settings.connect_timeout_s,
                command_timeout=settings.command_timeout_s,
                server_settings={"application_name": application},
            )
    try:
        with postgres_errors():
            _keep_alive(connection)
            await _refuse_pooler(connection)
            await _set_session(connection, plans)
    except BaseException:
        connection.terminate()
        raise
    return connection


async def close(connection: Connection) -> None:
    """Close within CLOSE_TIMEOUT_S, then cut. Never raises for the connection's sake."""
    try:
        await connection.close(timeout=CLOSE_TIMEOUT_S)
    except FAILURES:
        connection.terminate()


@asynccontextmanager
async def connection(
    settings: PostgresSettings, *, application: str, plans: Mapping[str, str] = READER_PLANS
) -> AsyncIterator[Connection]:
    """`connect`, closed at the end."""
    opened = await connect(settings, application=application, plans=plans)
    try:
        yield opened
    finally:
        await close(opened)


@contextmanager
def _located(settings: PostgresSettings) -> Iterator[None]:
    """Within it, an error says where the server was looked for."""
    try:
        yield
    except (PostgresUnavailable, PostgresRefused) as exc:
        place = [located] if (located := address(settings.dsn.get_secret_value())) else []
        if "dsn" not in settings.model_fields_set:
            place.append("which is the default: neither a settings file nor RELAY_POSTGRES_DSN sets postgres.dsn")
        if not place:
            raise
        raise type(exc)(f"{exc} ({', '.join(place)})", sqlstate=exc.sqlstate) from exc.__cause__


def address(dsn: str) -> str:
    """Host and database of a DSN, for people; nothing of one that may have a piece of its password where a host belongs."""
    try:
        parts = urlsplit(dsn)
        if "@" in f"{parts.path}{parts.query}{parts.fragment}":  # of a password that is not percent-encoded
            return ""
        options = parse_qs(parts.query)
    except ValueError:
        return ""
    host = ",".join(options.get("host", ())) or parts.netloc.rpartition("@")[2]
    database = ",".join(options.get("dbname", options.get("database", ()))) or unquote(parts.path.lstrip("/"))
    return ", ".join(f"{name} {value}" for name, value in (("host", host), ("database", database)) if value)


def _keep_alive(connection: Connection) -> None:
    """By itself asyncpg sets TCP_NODELAY and no more; its transport, which is private, is the only way to its socket."""
    sock = connection._transport.get_extra_info("socket")  # type: ignore[attr-defined]
    if sock is None:  # so uvloop tells it, where asyncio's sockets raise
        raise ConnectionResetError("the connection ended right after the login")
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE:
            if (option := getattr(socket, name, None)) is not None:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)


async def _refuse_pooler(connection: Connection) -> None:
    """A pooler hands out a made-up process id; PostgreSQL hands out its own."""
    try:
        pid = await connection.fetchval(query("backend_pid"))
    except (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError) as exc:
        raise PoolerError(_POOLER) from exc
    if pid != connection.get_server_pid():
        raise PoolerError(_POOLER)


_POOLER = (
    "postgres.dsn leads through a connection pooler (PgBouncer): session locks, LISTEN and prepared statements do not work "
    "there. Give relay a direct connection; the producers may stay behind the pooler."
)


async def _set_session(connection: Connection, plans: Mapping[str, str]) -> None:
    encoding = await connection.fetchval(query("server_encoding"))
    if encoding != "UTF8":
        raise SchemaError(f"the database's encoding is {encoding}; relay needs UTF8")
    session = _SESSION | (_SESSION_17 if connection.get_server_version().major >= 17 else {})
    # All in one exchange: one by one each would be a way to the server and back.
    await connection.executemany(query("set_session"), list((session | dict(plans)).items()))
