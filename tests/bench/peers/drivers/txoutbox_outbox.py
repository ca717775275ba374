# mypy: ignore-errors
"""txoutbox, as its README says: PostgresStorage, a publisher of a few lines, Relay.run. Runs in an environment of its own.

Its own guarantees: at least once (leases); messages of one key in the order of ids, one after the other, also over retries
(`strict_ordering`, the default); other keys at the same time. Confirms are aio-pika's: `publish` returns when the broker has confirmed,
and raises for a returned message.
"""

import asyncio
import os
import sys
from datetime import timedelta

import aio_pika
from txoutbox import OutboxMessage, Relay, RelayConfig
from txoutbox.adapters.postgres import PostgresStorage

BATCH = 500


async def prepare() -> None:
    storage = await PostgresStorage.connect(os.environ["PEER_DSN"])
    await storage.create_schema()
    await storage.close()


async def run() -> None:
    storage = await PostgresStorage.connect(os.environ["PEER_DSN"], delete_on_ack=True)
    broker = await aio_pika.connect(os.environ["PEER_URL"])
    channel = await broker.channel(publisher_confirms=True, on_return_raises=True)
    exchange = await channel.get_exchange(os.environ["PEER_EXCHANGE"])

    class Publisher:
        async def publish(self, message: OutboxMessage) -> None:
            sent = aio_pika.Message(
                message.payload,
                content_type="application/json",
                delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
                message_id=str(message.id),
                headers=dict(message.headers),
            )
            await exchange.publish(sent, message.topic, mandatory=True)

    config = RelayConfig(batch_size=BATCH, concurrency=BATCH, lease=timedelta(seconds=60))
    await Relay(storage, Publisher(), config=config).run(handle_signals=True)
    await broker.close()
    await storage.close()


asyncio.run(prepare() if sys.argv[1] == "prepare" else run())
