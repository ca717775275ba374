"""Falling asleep without losing a wake-up, and without a NOTIFY for each transaction under load.

"Asleep" is the session lock S(shard), held exclusively by the sleeping relay. The insert trigger tries it shared: granted,
the relay is awake and cannot fall asleep before that transaction has ended; refused, the trigger notifies. So the poll
after S was granted sees every event whose producer did not notify.
"""

from __future__ import annotations

import asyncio
from typing import Any

from relay.errors import PostgresUnavailable
from relay.failpoints import Point, reached
from relay.postgres.connect import Connection
from relay.postgres.errors import postgres_errors
from relay.postgres.queries import query

CHANNEL = "relay_outbox"
OPERATE = "operate"
"""What an operator's act says on the channel, where a producer says the shard's number."""
WAKE_LOCK = 727002
"""First key of the lock S, as in the trigger relay.outbox_assign; the second is the shard."""


class Wakeup:
    """The bed of one shard. Needs a direct connection that it shares with the ownership lock: they are lost together."""

    def __init__(self, connection: Connection, *, shard: int) -> None:
        self._connection = connection
        self._shard = shard
        self._asleep = False
        self.event = asyncio.Event()
        """Set by a notification, by the loss of the connection, or by whoever wants the sleeper up."""
        self.urgent = asyncio.Event()
        """Set by an operator's act and by all but producers: it also ends a nap. Cleared by who has got up."""
        self.acted = False
        """Operators have acted, by their own word. Cleared by who has looked."""
        self.told = False
        """The last `wait` was ended, by all that is known by a producer, and nobody has got up yet."""

    def interrupt(self) -> None:
        """End a sleep or a nap: something else than a new event is to be seen to."""
        self.event.set()
        self.urgent.set()

    async def listen(self) -> None:
        """Start listening. Raises PostgresUnavailable."""
        with postgres_errors():
            self._connection.add_termination_listener(self._lost)
            await self._connection.add_listener(CHANNEL, self._notified)

    @property
    def asleep(self) -> bool:
        """True while S is ours: producers notify."""
        return self._asleep

    async def try_fall_asleep(self) -> bool:
        """Try S. When it is granted, look once more for new rows before `wait`. When refused, producers are at work.

        Never waits for the lock: a queued exclusive request would refuse every producer, and all would notify.
        """
        self.event.clear()
        with postgres_errors():
            self._asleep = bool(await self._connection.fetchval(query("try_wake_lock"), WAKE_LOCK, self._shard))
        if self._asleep:
            reached(Point.FALLING_ASLEEP)
        return self._asleep

    async def wait(self, timeout_s: float) -> None:
        """Wait for a producer's notification, at most `timeout_s` seconds. Raises PostgresUnavailable when the connection is gone."""
        self.require_connection()
        try:
            async with asyncio.timeout(timeout_s):
                await self.event.wait()
        except TimeoutError:
            return
        self.require_connection()
        self.told = not self.urgent.is_set()

    def require_connection(self) -> None:
        """Raise PostgresUnavailable when the connection is gone: and with it the wake-ups, and the ownership of the shard."""
        if self._connection.is_closed():
            raise PostgresUnavailable("the connection that holds the shard's lock and listens was closed")

    async def get_up(self) -> None:
        """Release S: producers need not notify any more."""
        self.told = False
        if self._asleep:
            self._asleep = False
            with postgres_errors():
                await self._connection.execute(query("release_wake_lock"), WAKE_LOCK, self._shard)

    def _notified(self, _connection: Any, _pid: int, _channel: str, payload: object) -> None:
        if payload == str(self._shard):  # only a hint: what is new, the log says
            self.event.set()
        elif payload == OPERATE:  # only a hint as well: the tables say what was done
            self.acted = True
            self.interrupt()

    def _lost(self, _connection: Any) -> None:
        self.interrupt()
