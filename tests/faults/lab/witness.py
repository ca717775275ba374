"""The audit queue: an independent witness of what the broker really accepted, in its order."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import aio_pika
import aiormq.exceptions
from aio_pika.abc import AbstractIncomingMessage

from tests.faults.lab.evidence import Witnessed

EXCHANGE = "relay.events"
QUEUE = "audit"
BINDINGS = ("account.#",)
_GONE = (OSError, TimeoutError, aiormq.exceptions.AMQPError, RuntimeError)


class Witness:
    """Consumes the audit queue, over restarts of the broker."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.messages: list[Witnessed] = []
        self.ready = asyncio.Event()
        self._seen: set[str] = set()

    async def run(self) -> None:
        """Ends by cancellation."""
        while True:
            with suppress(*_GONE):
                await self._session()
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise asyncio.CancelledError  # which the library may have told as an error of a connection that was closing
            await asyncio.sleep(0.3)  # the broker is being restarted

    async def _session(self) -> None:
        connection = await aio_pika.connect(self._url, timeout=5)
        async with connection:
            channel = await connection.channel()
            await channel.set_qos(prefetch_count=500)
            exchange = await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
            queue = await channel.declare_queue(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
            for binding in BINDINGS:
                await queue.bind(exchange, binding)
            await queue.consume(self._take)
            self.ready.set()
            underlay = await channel.get_underlay_channel()
            await asyncio.wait([underlay.closing])

    async def _take(self, message: AbstractIncomingMessage) -> None:
        """A message that only comes again because our acknowledgement got lost is not another one at the broker."""
        name = message.message_id or ""
        if not (message.redelivered and name in self._seen):
            self._seen.add(name)
            self.messages.append(_witnessed(message, name))
        with suppress(*_GONE):
            await message.ack()


def _witnessed(message: AbstractIncomingMessage, name: str) -> Witnessed:
    headers = message.headers
    return Witnessed(
        message_id=name,
        key=(str(headers.get("x-aggregate-type")), str(headers.get("x-aggregate-id"))),
        seq=int(str(headers.get("x-sequence", -1))),
        token=_token(message.body),
        at=time.time(),
    )


def _token(body: bytes) -> str:
    """Without parsing 300 kB: jsonb prints the keys by length, so the token is near the front or the end."""
    _, found, rest = body.partition(b'"token": "')
    return rest[: rest.find(b'"')].decode() if found else ""
