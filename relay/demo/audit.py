"""A witness at the broker: a queue of its own that gets every message, so that faults are counted where they happened."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from aio_pika.abc import AbstractIncomingMessage

from relay.demo.broker import EVENTS, reconnecting
from relay.rabbitmq.session import Session
from relay.settings import RabbitmqSettings

QUEUE = "audit"
PREFETCH = 500
REMEMBERED = 400
"""Messages that the nemesis may repeat: the last few seconds."""


@dataclass(slots=True)
class Audit:
    """Counts what relay's exchange handed out. A message redelivered to the audit itself is not counted again."""

    rabbitmq: RabbitmqSettings
    copies: int = 0  # messages beyond the first with their id
    recent: deque[AbstractIncomingMessage] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _seen: set[str] = field(default_factory=set)

    @property
    def events(self) -> int:
        """Different messages that have reached the broker."""
        return len(self._seen)

    async def run(self) -> None:
        """Ends by cancellation."""
        await reconnecting(self.rabbitmq, "demo audit", self._consume)

    async def _consume(self, session: Session) -> None:
        channel = await session.channel(publisher_confirms=False)
        await channel.set_qos(prefetch_count=PREFETCH)
        await (await channel.get_queue(QUEUE, ensure=False)).consume(self._take)
        await asyncio.Event().wait()

    async def _take(self, message: AbstractIncomingMessage) -> None:
        if message.exchange == EVENTS and message.message_id is not None:
            if message.message_id not in self._seen:
                self._seen.add(message.message_id)
            elif not message.redelivered:
                self.copies += 1
        self.recent.append(message)
        await message.ack()
