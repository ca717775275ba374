"""What relay sees of a model database: asyncpg's connection, as far as relay uses it, with everything that can happen to it."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Callable
from typing import Any, Literal

import asyncpg

from tests.faults.simulation.server import Server, Session

Fate = Literal["cut before", "cut after", "kill before", "kill after", "hang before", "hang after"]
"""What may happen at an operation: before or after it took effect, the connection breaks, the process dies, or no answer comes."""
FATES: tuple[Fate, ...] = ("cut before", "cut after", "kill before", "kill after", "hang before", "hang after")

COMMAND_TIMEOUT_S = 1.0
_LATENCIES = (*(0.0003,) * 10, *(0.001,) * 10, *(0.004,) * 8, *(0.02,) * 3, 0.15)


class Process:
    """What lives and dies together: connections, the tasks that use them. `operations` counts what it asked of servers."""

    def __init__(self, name: str, dice: random.Random) -> None:
        self.name = name
        self.dice = dice
        self.is_dead = False
        self.epoch = 0  # of the shard that it owns, or believes to own
        self.operations = 0
        self.fates: dict[int, Fate] = {}  # by the number of the operation
        self.on_fate: Callable[[str, Fate], None] = lambda _name, _fate: None
        self.links: list[Connection | Any] = []
        self.main: asyncio.Task[None] | None = None

    def next_fate(self) -> Fate | None:
        """What happens to the operation that begins now."""
        self.operations += 1
        if not self.fates or (fate := self.fates.pop(self.operations, None)) is None:
            return None
        self.on_fate(self.name, fate)
        return fate

    def pause(self) -> tuple[bool, float]:
        """(whether an operation takes effect at once and the answer takes long, or the other way round; how long)."""
        bits = self.dice.getrandbits(6)
        return bool(bits & 1), _LATENCIES[bits >> 1]

    def kill(self) -> None:
        """kill -9: nothing of it reaches a server any more. What its tasks still do is done by a ghost."""
        if self.is_dead:
            return
        self.is_dead = True
        for link in [*self.links]:
            link.cut()
        if self.main is not None:
            self.main.cancel()


class Connection:
    """asyncpg.Connection in front of a model server."""

    def __init__(self, server: Server, process: Process, role: str) -> None:
        self._server = server
        self._process = process
        self._closed = False
        self._busy = False
        self._listeners: dict[str, Callable[..., None]] = {}
        self._on_termination: list[Callable[[Any], None]] = []
        self.role = role
        server.pids += 1
        self.session = Session(process, role, self._notified, server.pids)
        server.sessions.append(self.session)
        process.links.append(self)

    # --- what asyncpg offers

    def is_closed(self) -> bool:
        return self._closed

    def is_in_transaction(self) -> bool:
        return self.session.tx is not None

    def get_server_pid(self) -> int:
        return self.session.pid

    def add_termination_listener(self, callback: Callable[[Any], None]) -> None:
        self._on_termination.append(callback)

    async def add_listener(self, channel: str, callback: Callable[..., None]) -> None:
        await self._ask(self._listen, (channel,))
        self._listeners[channel] = callback

    def transaction(self, *, isolation: str | None = None) -> TransactionContext:
        return TransactionContext(self)

    async def fetch(self, sql: str, *args: Any, timeout: float | None = None) -> list[Any]:
        found: list[Any] = await self._ask(self._server.statements[sql], args, timeout)
        return found

    async def fetchrow(self, sql: str, *args: Any, timeout: float | None = None) -> Any:
        found = await self._ask(self._server.statements[sql], args, timeout)
        return found[0] if found else None

    async def fetchval(self, sql: str, *args: Any, timeout: float | None = None) -> Any:
        return await self._ask(self._server.statements[sql], args, timeout)

    async def execute(self, sql: str, *args: Any, timeout: float | None = None) -> Any:
        return await self._ask(self._server.statements[sql], args, timeout)

    async def close(self, *, timeout: float | None = None) -> None:
        self.cut()

    def terminate(self) -> None:
        self.cut()

    # --- what happens to it

    def cut(self) -> None:
        """Both ends know at once."""
        if not self.session.is_over:
            self._server.ended(self.session)
        self.notice()

    def lose_silently(self) -> None:
        """The server ends the session; the client does not hear of it until it asks something, or until `notice`."""
        if not self.session.is_over:
            self._server.ended(self.session)

    def notice(self) -> None:
        """The client learns that the connection is gone."""
        if not self._closed:
            self._closed = True
            if self in self._process.links:
                self._process.links.remove(self)
            for callback in self._on_termination:
                self._server.loop.call_soon(callback, self)

    # --- how it works

    async def _ask(self, effect: Callable[..., Any], args: tuple[Any, ...], timeout: float | None = None) -> Any:
        self._require_open()
        if self._busy:
            raise asyncpg.InterfaceError("cannot perform operation: another operation is in progress")
        self._busy = True
        try:
            fate = self._process.next_fate()
            if fate is not None:
                return await self._ask_with(fate, effect, args, timeout)
            at_once, pause = self._process.pause()
            if not at_once:
                await self._server.loop.sleep(pause)
            self._require_session()
            result = self._take_effect(effect, args)
            if inspect.iscoroutine(result):
                async with asyncio.timeout(timeout or COMMAND_TIMEOUT_S):
                    result = await result
            if at_once:
                await self._server.loop.sleep(pause)
                self._require_session()
        except asyncpg.PostgresError:
            if self.session.tx is not None:
                self.session.tx.is_aborted = True
            raise
        else:
            return result
        finally:
            self._busy = False

    async def _ask_with(
        self, fate: Fate, effect: Callable[..., Any], args: tuple[Any, ...], timeout: float | None
    ) -> Any:
        await self._server.loop.sleep(self._process.pause()[1])
        self._require_session()
        what, _, when = fate.partition(" ")
        if when == "after":
            result = self._take_effect(effect, args)
            if inspect.iscoroutine(result):
                async with asyncio.timeout(timeout or COMMAND_TIMEOUT_S):
                    await result
        if what == "hang":  # for as long as TCP's keepalive, or the command time-out, lets it
            await self._server.loop.sleep(COMMAND_TIMEOUT_S)
            raise TimeoutError
        if what == "kill":
            self._process.kill()
            await self._server.loop.sleep(0)
        self.cut()
        raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")

    def _do_at_once(self, effect: Callable[..., Any]) -> None:
        self._require_open()
        self._require_session()
        self._take_effect(effect, (self._server,))

    def _take_effect(self, effect: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if self.session.tx is not None and self.session.tx.is_aborted and effect not in _ENDING:
            raise asyncpg.InFailedSQLTransactionError("current transaction is aborted")
        return effect(self.session, *args)

    def _require_open(self) -> None:
        if self._closed:
            raise asyncpg.InterfaceError("connection is closed")

    def _require_session(self) -> None:
        if self.session.is_over:
            self.notice()
        if self._closed:
            raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")

    def _listen(self, session: Session, channel: str) -> None:
        session.channels.add(channel)

    def _notified(self, channel: str, payload: str) -> None:
        callback = self._listeners.get(channel)  # None: LISTEN is done, and the callback not yet registered
        if callback is not None and not self._closed and not self.session.is_over:
            callback(self, 0, channel, payload)


def _begin(session: Session, server: Server) -> None:
    server.begin(session)


def _commit(session: Session, server: Server) -> None:
    if session.tx is not None and session.tx.is_aborted:
        server.rollback(session)
        raise asyncpg.InFailedSQLTransactionError("the transaction was aborted")
    server.commit(session)


def _rollback(session: Session, server: Server) -> None:
    server.rollback(session)


def _savepoint(session: Session, server: Server) -> None:
    if session.tx is not None:
        server.savepoint(session.tx)


def _release(session: Session, _server: Server) -> None:
    if session.tx is not None:
        session.tx.savepoints.pop()


def _rollback_to(session: Session, server: Server) -> None:
    if session.tx is not None:
        server.rollback_to(session.tx)


_ENDING = (_commit, _rollback, _rollback_to)


class TransactionContext:
    """asyncpg's Transaction: the outer one, or a savepoint within it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._is_savepoint = False

    async def start(self) -> None:
        self._is_savepoint = self._connection.is_in_transaction()
        await self._do(_savepoint if self._is_savepoint else _begin)

    async def commit(self) -> None:
        await self._do(_release if self._is_savepoint else _commit)

    async def rollback(self) -> None:
        await self._do(_rollback_to if self._is_savepoint else _rollback)

    async def __aenter__(self) -> None:
        await self.start()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._connection._require_open()
        await (self.commit if kind is None else self.rollback)()

    async def _do(self, effect: Callable[[Session, Server], None]) -> None:
        connection = self._connection
        if effect in _ENDING or connection._process.fates:
            await connection._ask(effect, (connection._server,))
        else:  # nothing happens here that does not happen at the next statement as well
            connection._do_at_once(effect)
