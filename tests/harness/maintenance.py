"""A server's maintenance connection, kept open: to connect for each CREATE or ALTER DATABASE costs more than most of them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from threading import Thread
from typing import Any, TypeVar

import asyncpg

T = TypeVar("T")

TIMEOUT_S = 10

LOST = (
    asyncpg.InterfaceError,
    asyncpg.ConnectionDoesNotExistError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    OSError,
)
"""What the first statement after a restart of the server may raise. Whether it was run nobody knows; if it was, the second attempt says so."""


class Maintenance:
    """Runs what needs an event loop in a thread of its own: whoever asks may have a loop, or none. Methods block."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: asyncpg.Connection[Any] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="test-maintenance", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def execute(self, statement: str) -> None:
        """Run SQL outside a transaction block; in a new session if the old one has ended."""
        self.run(self._execute(statement))

    def close(self) -> None:
        """End the session and the thread."""
        self.run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _execute(self, statement: str) -> None:
        with suppress(*LOST):
            await (await self._session()).execute(statement)
            return
        await self._close()
        await (await self._session()).execute(statement)

    async def _session(self) -> asyncpg.Connection[Any]:
        if self._connection is None or self._connection.is_closed():
            self._connection = await asyncpg.connect(self._dsn, timeout=TIMEOUT_S)
        return self._connection

    async def _close(self) -> None:
        if self._connection is not None:
            with suppress(*LOST):
                await self._connection.close(timeout=TIMEOUT_S)
            self._connection = None
