# mypy: ignore-errors
"""faststream-outbox, as "Relay to a foreign broker" in its documentation says. Runs in an environment of its own.

Its own guarantees: at least once (leases); no order between messages that are in flight at once; a message that fails ten times is
dropped unless a dead-letter table is given. The batched terminal flush is what its page "Performance" advises for throughput.
Confirms are aio-pika's, by FastStream's RabbitBroker: persistent, mandatory, a returned message raises.
"""

import asyncio
import os
import signal
import sys

from faststream.message import StreamMessage
from faststream.rabbit import Channel, ExchangeType, RabbitBroker, RabbitExchange
from faststream_outbox import OutboxBroker, make_outbox_table
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import create_async_engine

WORKERS = int(os.environ.get("PEER_WORKERS", "50"))
FLUSH = int(os.environ.get("PEER_FLUSH", "100"))

metadata = MetaData()
table = make_outbox_table(metadata, table_name="outbox")
engine = create_async_engine(
    os.environ["PEER_DSN"].replace("postgresql://", "postgresql+asyncpg://", 1), pool_size=WORKERS + 5, max_overflow=10
)


async def prepare() -> None:
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    await engine.dispose()


async def as_it_is(message: StreamMessage) -> bytes:
    """Without decoding and encoding the body, nor validating it: a relay need not look inside."""
    return message.body


async def run() -> None:
    outbox = OutboxBroker(engine, outbox_table=table, logger=None, apply_types=False)
    rabbit = RabbitBroker(
        os.environ["PEER_URL"],
        default_channel=Channel(publisher_confirms=True, on_return_raises=True),
        logger=None,
    )
    exchange = RabbitExchange(os.environ["PEER_EXCHANGE"], type=ExchangeType.TOPIC, durable=True)
    publisher = rabbit.publisher(exchange=exchange, routing_key="bench.Measured", persist=True, mandatory=True)

    @publisher
    @outbox.subscriber(
        "bench",
        max_workers=WORKERS,
        fetch_batch_size=500,
        min_fetch_interval=0.02,
        max_fetch_interval=1.0,
        terminal_flush_batch_size=FLUSH,
        propagate_inbound_headers=True,
        decoder=as_it_is,
    )
    async def relay(body: bytes) -> bytes:
        return body

    await rabbit.start()
    await outbox.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await outbox.stop()
    await rabbit.stop()
    await engine.dispose()


asyncio.run(prepare() if sys.argv[1] == "prepare" else run())
