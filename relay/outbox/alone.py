"""Trying parked rows alone: one at a time, each on a connection of its own, so that live traffic does not notice how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import structlog

from relay.errors import BrokerError
from relay.failpoints import Point, reached
from relay.message import Message, Row
from relay.outbox.store import Due
from relay.rabbitmq.contract import Outcome, Publisher, Refused, Unknown
from relay.supervisor import ended

Tried = tuple[Due, Outcome | None]
"""A row that was tried; None: the broker could not be reached, which says nothing about the row."""


class Alone:
    """`begin` opens a connection; when it `wants_a_row`, `send` gives it one; when it `is_over`, `take` tells what came of it.

    The row is named last, when the connection is there: opening one can take long, and an operator may act meanwhile.
    """

    def __init__(
        self,
        *,
        probe: Callable[[], AbstractAsyncContextManager[Publisher]],
        message: Callable[[Row], Message],
        wake: Callable[[], None],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._probe = probe
        self._message = message
        self._wake = wake
        self._log = log
        self._task: asyncio.Task[Outcome | None] | None = None
        self._row: asyncio.Future[Due | None] | None = None  # there once the connection is open
        self._sent: Due | None = None

    @property
    def is_idle(self) -> bool:
        """True when nothing is being tried, and nothing is left to `take`."""
        return self._task is None

    @property
    def wants_a_row(self) -> bool:
        """True when the connection is open and nothing has been sent."""
        return self._row is not None and not self._row.done() and not self.is_over

    @property
    def is_over(self) -> bool:
        """True when the answer is there."""
        return self._task is not None and self._task.done()

    def holds(self, row: Row) -> bool:
        """True for the row that is being tried, and for all of its aggregate."""
        sent = self._sent
        return sent is not None and (
            row.id == sent.row.id or (row.aggregate is not None and row.aggregate == sent.row.aggregate)
        )

    def begin(self) -> None:
        """Open a connection; `wake` is called when it is open, and when all is over."""
        self._task = asyncio.create_task(self._try())
        self._task.add_done_callback(lambda _: self._wake())

    def send(self, due: Due | None) -> None:
        """Send this row, as it is now; None: there is none any more."""
        if self._row is not None:
            self._sent = due
            self._row.set_result(due)

    def take(self) -> Tried | None:
        """What came of it: None when nothing was sent."""
        outcome, sent = None if self._task is None else self._task.result(), self._sent
        self._task = self._row = self._sent = None
        return None if sent is None else (sent, outcome)

    async def close(self) -> None:
        """End it: the row is tried again by the next session."""
        if self._task is not None:
            await ended(self._task)

    async def _try(self) -> Outcome | None:
        try:
            async with self._probe() as publisher:
                self._row = asyncio.get_running_loop().create_future()
                self._wake()
                due = await self._row
                if due is None:
                    return None
                reached(Point.TRYING_ALONE)
                (outcome,) = await publisher.publish([self._message(due.row)])
        except BrokerError as exc:
            row = None if self._sent is None else self._sent.row.id
            self._log.warning("probe_failed", row=row, error=type(exc).__name__, reason=str(exc))
            return None
        if isinstance(outcome, Unknown):
            return Refused("unconfirmed", outcome.detail) if outcome.timed_out else None
        return outcome
