"""What a consumer says about itself in relay.inbox_progress, for `relay status`: about once a second, beside the batches."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import structlog

from relay.errors import RelayError
from relay.inbox.stats import Stats
from relay.postgres.connect import Connection
from relay.postgres.errors import FAILURES
from relay.postgres.queries import query

log = structlog.get_logger()

INTERVAL_S = 1.0
"""Least time between two writes while something is applied: each is a commit of its own."""

IDLE_INTERVAL_S = 10.0
"""As often it is written that there is nothing to say: a consumer that has not written for longer is not there."""

_ERROR_LENGTH = 500
_TIMEOUT_S = 2.0
"""Somebody may have locked the row: events are not kept waiting for a figure."""


class Figures:
    """Counts what was applied since the last write; remembers what ended the last session until one reaches the database."""

    def __init__(self, consumer: str, clock: Callable[[], float]) -> None:
        self._consumer = consumer
        self._clock = clock
        self._owner = f"{socket.gethostname()}:{os.getpid()}"
        self._applied = 0
        self._error: str | None = None
        self._written_at = float("-inf")

    def count(self, stats: Stats) -> None:
        """Committed, and not yet told."""
        self._applied += stats.applied

    def failed(self, error: RelayError) -> None:
        """A session has ended by this error. relay's own words, as in the log: never a payload."""
        self._error = f"{type(error).__name__}: {error}"[:_ERROR_LENGTH].replace("\0", "\ufffd")

    @property
    def due_in_s(self) -> float:
        """Seconds until the next write; not positive: now."""
        interval_s = INTERVAL_S if self._applied or self._error else IDLE_INTERVAL_S
        return self._written_at + interval_s - self._clock()

    async def write(self, connection: Connection) -> None:
        """Write them, in a transaction of its own."""
        applied, error = self._applied, self._error
        await connection.execute(
            query("write_figures"), self._consumer, applied, self._owner, error, timeout=_TIMEOUT_S
        )
        self._applied -= applied
        self._error = None
        self._written_at = self._clock()

    async def tell(self, connection: Connection) -> None:
        """`write`, but no failure of it is anybody's: what could not be written is told later."""
        try:
            await self.write(connection)
        except FAILURES as exc:
            log.warning("figures_not_written", consumer=self._consumer, error=type(exc).__name__)
            self._written_at = self._clock() + IDLE_INTERVAL_S
