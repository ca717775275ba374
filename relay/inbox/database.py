"""The inbox's one connection to PostgreSQL, and its transactions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, TypeVar

import asyncpg

from relay.errors import PostgresError, RelayError
from relay.inbox.failures import CommitFailed, HandlerFailed, described, is_aborted, judged
from relay.postgres import connect as postgres
from relay.postgres.connect import Connection, close, connect
from relay.postgres.errors import FAILURES, postgres_errors
from relay.postgres.migrate import require_current
from relay.postgres.queries import query
from relay.settings import PostgresSettings
from relay.supervisor import ended

OPERATE_CHANNEL = "relay_inbox_operate"
"""Operators notify here, with the consumer's name: only a hint, to look at once for what they have released."""

PLANS = {"enable_seqscan": "off", "jit": "off"}
"""Without `plan_cache_mode`: handlers run here, and planning each of their statements anew costs the server 40 % more. Our own keep to
the index in either mode, also when they were planned on empty tables: tests/integration/test_inbox_plans.py pins that."""

_CHECK_INTERVAL = "2000"  # ms
_END_TIMEOUT_MS = 5000

_ASK_S = 5.0
"""While a statement waits for another consumer's locks, PostgreSQL is asked so often whether it still does."""

_T = TypeVar("_T")


class Database:
    """One connection, opened at need and replaced after a handler made it unfit. `lost` is set when it breaks by itself.

    `operated` is set by an operator's notification for the consumer; whoever waits for it clears it.
    """

    def __init__(self, settings: PostgresSettings, *, application: str, consumer: str = "") -> None:
        self._settings = settings
        self._application = application
        self._connection: Connection | None = None
        self._cut: list[int] = []  # process ids of backends that may still be at work for us
        self._consumer = consumer
        self.waited_s = 0.0
        """Spent in `patiently` and in COMMITs, in all: what lasts as long for a batch of few messages as for one of many."""
        self.lost = asyncio.Event()
        self.operated = asyncio.Event()

    @property
    def worked_s(self) -> float:
        """A clock that stood still in `waited_s`: what passes on it, smaller batches make shorter."""
        return asyncio.get_running_loop().time() - self.waited_s

    async def connection(self) -> Connection:
        """The connection; the schema is checked when it is opened. Raises PostgresError."""
        if self._connection is None or self._connection.is_closed():
            opened = await connect(self._settings, application=self._application, plans=PLANS)
            self._connection = opened
            opened.add_termination_listener(self._on_termination)
            await require_current(opened)
            with postgres_errors():
                await self._outlive_nothing(opened)
                await opened.add_listener(OPERATE_CHANNEL, self._on_operate)
        return self._connection

    async def _outlive_nothing(self, opened: Connection) -> None:
        """A backend in the middle of a statement does not notice that we are gone, and keeps its locks on the cursors.

        Ours are ended, so that a message can be held while the slow statement of its handler would still be running;
        and PostgreSQL is asked to look after the client itself, for the day when this process is killed.
        """
        with suppress(asyncpg.InvalidParameterValueError):  # not on every platform
            await opened.execute(query("set_session"), "client_connection_check_interval", _CHECK_INTERVAL)
        await self._end_cut(opened)

    async def _end_cut(self, opened: Connection) -> None:
        while self._cut:
            await opened.execute(query("end_backend"), self._cut[-1], self._application, _END_TIMEOUT_MS)
            self._cut.pop()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """One READ COMMITTED transaction, whatever the database's default is: the locks are what makes it safe.

        Raises CommitFailed when the transaction fails through what was done in it, Collision when it may be redone,
        PostgresError when PostgreSQL or the connection failed. Cancelled, or left by a handler that made it unfit, the
        connection is cut, so that nothing of it can be committed late.
        """
        connection = await self.connection()
        transaction = connection.transaction(isolation="read_committed")
        with postgres_errors():
            await transaction.start()
        try:
            yield connection
            await self._commit(transaction)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            self.discard()
            raise
        except HandlerFailed as exc:
            if exc.ends_transaction:
                self.discard()
            else:
                await self._roll_back(connection, transaction)
            raise
        except asyncpg.PostgresError as exc:
            await self._roll_back(connection, transaction)
            if is_aborted(exc):
                raise CommitFailed(described(exc)) from exc
            if (verdict := judged(exc)) is not None:
                raise verdict from exc
            with postgres_errors():
                raise
        except Exception:
            with postgres_errors():
                await self._roll_back(connection, transaction)
                raise

    async def patiently(self, locking: Awaitable[_T]) -> _T:
        """Wait for a statement that may wait for another consumer's locks, as long as PostgreSQL says that it is at work on it.

        A connection that fell silent looks the same from here, and no time-out tells the two apart: one that is short ends sessions
        that only wait their turn, in the laboratory a long one was ten minutes of silence for every consumer. After two noes,
        since the answer may just be on its way, the connection is cut, and the backend ended if PostgreSQL can be reached: it may
        have the locks. Raises what the statement raises.
        """
        statement, began = asyncio.ensure_future(locking), self.worked_s
        noes = 0
        try:
            while not (await asyncio.wait([statement], timeout=_ASK_S))[0]:
                noes = 0 if await self._is_at_work_or_done(statement) else noes + 1
                if noes == 2 and not statement.done():
                    await self._give_up()
            return statement.result()
        finally:
            self.waited_s += self.worked_s - began
            if not statement.done():
                await ended(statement)

    async def _is_at_work_or_done(self, statement: asyncio.Future[Any]) -> bool:
        """The answer to the statement has the locks, and so does not wait for the answer to a question that has none."""
        question = asyncio.create_task(self._is_at_work())
        try:
            await asyncio.wait([statement, question], return_when=asyncio.FIRST_COMPLETED)
            return statement.done() or question.result()
        finally:
            await ended(question)

    async def _give_up(self) -> None:
        self.discard()
        with suppress(RelayError):
            async with self._another() as other:
                with postgres_errors():
                    await self._end_cut(other)

    def _another(self) -> AbstractAsyncContextManager[Connection]:
        return postgres.connection(self._settings, application=f"{self._application} asks")

    async def _is_at_work(self) -> bool:
        """Whether PostgreSQL is at work for our connection, asked over another one.

        Also when it answers that it has no connection to spare, or does not let us in: it is there, and whoever waits its turn
        must not be cut for that, again and again until the broker counts a delivery too many.
        """
        if self._connection is None or self._connection.is_closed():
            return False
        pid = self._connection.get_server_pid()
        try:
            async with self._another() as other:
                with postgres_errors():
                    return bool(await other.fetchval(query("is_at_work"), pid))
        except PostgresError as exc:
            return exc.sqlstate is not None and not exc.sqlstate.startswith("08")
        except RelayError:
            return False

    def discard(self) -> None:
        """Cut the connection: whatever it was doing will not be committed."""
        if self._connection is not None:
            cut, self._connection = self._connection, None
            if not cut.is_closed():
                self._cut.append(cut.get_server_pid())
            cut.terminate()

    async def close(self) -> None:
        """Say goodbye within a bounded time. Never raises for the connection's sake."""
        if self._connection is not None:
            closing, self._connection = self._connection, None
            await close(closing)

    async def _commit(self, transaction: asyncpg.transaction.Transaction) -> None:
        began = self.worked_s
        try:
            await transaction.commit()
        except asyncpg.PostgresError as exc:
            if (verdict := judged(exc, at_commit=True)) is not None:
                raise verdict from exc
            raise CommitFailed(described(exc)) from exc
        finally:
            self.waited_s += self.worked_s - began

    async def _roll_back(self, connection: Connection, transaction: asyncpg.transaction.Transaction) -> None:
        if connection.is_closed():
            return
        try:
            await transaction.rollback()
        except FAILURES:
            self.discard()

    def _on_operate(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        if payload == self._consumer:
            self.operated.set()

    def _on_termination(self, connection: object) -> None:
        """It is told a step of the loop later: of a connection that was discarded, when there is none in its place yet."""
        if connection is self._connection:
            self.lost.set()
