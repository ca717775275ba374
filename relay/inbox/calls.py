"""Calls one handler, in its time, and finds out whose fault a failure is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import asyncpg

from relay.inbox.charges import Charges
from relay.inbox.deadline import Deadline
from relay.inbox.failures import (
    ABORTED,
    ENDED,
    Collision,
    HandlerFailed,
    collided,
    described,
    is_aborted,
    speaks_of_server,
    too_long,
)
from relay.inbox.handlers import Grouped, Handler
from relay.inbox.sequencer import Arrival
from relay.inbox.store import Store
from relay.postgres.connect import Connection


class Caller:
    """Calls the handlers of one transaction. `called` are the events of the last call: who was at work if the connection breaks."""

    def __init__(self, connection: Connection, store: Store, charges: Charges, *, timeout_s: float) -> None:
        self._connection = connection
        self._store = store
        self._charges = charges
        self._timeout_s = timeout_s
        self._deadline = Deadline(timeout_s)
        self.called: Sequence[Arrival] = ()

    async def call_in_savepoint(self, handler: Handler | Grouped, arrival: Arrival) -> None:
        """Call a handler with one event. After HandlerFailed nothing of it is left, unless that ends the transaction."""
        savepoint = self._connection.transaction()
        await savepoint.start()
        try:
            await self.call(handler, (arrival,))
        except HandlerFailed as exc:
            if not exc.ends_transaction:
                await self._undo(savepoint.rollback, arrival)
            raise
        try:
            await savepoint.commit()
        except asyncpg.PostgresError as exc:
            if not is_aborted(exc):
                raise
            if exc.sqlstate != "25P02":
                raise HandlerFailed((arrival,), ENDED, ends_transaction=True) from exc
            # asyncpg gives up a savepoint whose RELEASE failed; PostgreSQL has kept it, but the whole is redone anyway.
            raise HandlerFailed((arrival,), ABORTED, ends_transaction=True) from exc

    async def _undo(self, roll_back: Callable[[], object], arrival: Arrival) -> None:
        try:
            await roll_back()  # type: ignore[misc]
        except asyncpg.PostgresError as exc:
            if is_aborted(exc):
                raise HandlerFailed((arrival,), ENDED, ends_transaction=True) from exc
            raise

    async def call(self, handler: Handler | Grouped, arrivals: Sequence[Arrival]) -> None:
        """Call a handler within its time: with one event, unless it is Grouped. Raises what `call_all` does."""
        await self.call_all(((handler, arrivals),))

    async def call_all(self, calls: Iterable[tuple[Handler | Grouped, Sequence[Arrival]]]) -> None:
        """Call handlers one after the other, each within its time: with one event, unless it is Grouped.

        Raises what `_blamed` finds behind the first exception, or HandlerFailed for what a handler did to the transaction; then
        those after it are not called. One coroutine for all of them: one for each would cost as much as the checks.
        """
        connection, deadline = self._connection, self._deadline
        for handler, arrivals in calls:
            self.called = arrivals
            failure: BaseException | None = None
            try:
                with deadline:
                    if isinstance(handler, Grouped):
                        await handler.function([arrival.event for arrival in arrivals], connection)
                    else:
                        (arrival,) = arrivals
                        await handler(arrival.event, connection)
            except asyncio.CancelledError as exc:
                if _being_cancelled():
                    raise
                failure = exc
            except Exception as exc:  # noqa: BLE001 - whatever a handler raises is its failure
                failure = exc
            if deadline.expired:
                raise HandlerFailed(arrivals, too_long(self._timeout_s), ends_transaction=True)
            if failure is not None:
                raise await self._blamed(failure, arrivals) from failure
            if connection.is_closed():
                raise _broken()
            if not connection.is_in_transaction():
                raise HandlerFailed(arrivals, ENDED, ends_transaction=True)

    async def _blamed(self, failure: BaseException, arrivals: Sequence[Arrival]) -> Exception:
        """Whose fault it is: of the server only if our own connection has broken, of chance only a few times."""
        if await self._is_broken(failure):
            return _broken()
        if collided(failure) and self._charges.forgives(arrivals):
            return Collision(described(failure), arrivals)
        ended = not self._connection.is_in_transaction()
        return HandlerFailed(arrivals, ENDED if ended else described(failure), ends_transaction=ended)

    async def _is_broken(self, failure: BaseException) -> bool:
        """Ask the connection itself: it may take a moment to notice, and the handler may have used another one."""
        if speaks_of_server(failure) and not self._connection.is_closed():
            with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError):
                await self._store.transaction_id()
        return self._connection.is_closed()


def _broken() -> asyncpg.PostgresError:
    return asyncpg.ConnectionDoesNotExistError("the connection broke while a handler was using it")


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
