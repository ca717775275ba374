# mypy: ignore-errors
"""pactix's inbox, as its README and examples say: InboxStore.save_received, and InboxRunner.run_once in a loop of the service's own.

Runs in an environment of its own. Its own guarantees: messages are deduplicated by (source, message id) when they are stored; FIFO within
an ordering key; the handler's effects are *not* in the transaction that marks the message as processed, so a crash between the two
repeats them ("business effects still need idempotent application logic"). Fast as far as its interface allows: deliveries are stored
500 to a transaction and acknowledged at once, and several runners claim and handle at the same time, in this process.
"""

import asyncio
import json
import os
import signal
import sys
from datetime import timedelta

import aio_pika
import asyncpg
from pactix import (
    HandleOutcome,
    InboxRunner,
    InboxStore,
    MessageEnvelope,
    MessageMetadata,
    PactixConfig,
    ProcessAll,
    inbox_handler,
)
from pactix.db.tables import metadata
from sqlalchemy.ext.asyncio import create_async_engine

STORED_AT_ONCE = 500
RUNNERS = int(os.environ.get("PEER_RUNNERS", "4"))
BATCH = int(os.environ.get("PEER_BATCH", "250"))
IDLE_S = 0.02

engine = create_async_engine(
    os.environ["PEER_DSN"].replace("postgresql://", "postgresql+asyncpg://", 1), pool_size=RUNNERS + 2
)


async def prepare() -> None:
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    await engine.dispose()


def envelope(message: aio_pika.abc.AbstractIncomingMessage) -> MessageEnvelope:
    body = json.loads(message.body)
    described = MessageMetadata(message_id=message.message_id, event_type=message.type, ordering_key=body["aggregate"])
    return MessageEnvelope(described, body)


async def receive(store: InboxStore, queue: aio_pika.abc.AbstractQueue) -> None:
    waiting: asyncio.Queue[aio_pika.abc.AbstractIncomingMessage] = asyncio.Queue()
    await queue.consume(waiting.put)
    while True:
        batch = [await waiting.get()]
        while len(batch) < STORED_AT_ONCE and not waiting.empty():
            batch.append(waiting.get_nowait())
        async with engine.begin() as connection:
            for message in batch:
                await store.save_received(connection, "bench", envelope(message))
        await batch[-1].ack(multiple=True)


async def handle(runner: InboxRunner) -> None:
    while True:
        summary = await runner.run_once(engine)
        if not summary.claimed:
            await asyncio.sleep(IDLE_S)


async def run() -> None:
    config = PactixConfig(inbox_batch_size=BATCH, lease_duration=timedelta(seconds=60))
    store = InboxStore(config)
    effects = await asyncpg.create_pool(os.environ["PEER_DSN"], min_size=RUNNERS, max_size=RUNNERS)

    async def apply(record: object) -> HandleOutcome:
        body = record.payload
        await effects.execute("INSERT INTO effect (aggregate, seq) VALUES ($1, $2)", body["aggregate"], body["seq"])
        return HandleOutcome.processed()

    broker = await aio_pika.connect(os.environ["PEER_URL"])
    channel = await broker.channel()
    await channel.set_qos(prefetch_count=2 * STORED_AT_ONCE)
    queue = await channel.get_queue(os.environ["PEER_QUEUE"])
    tasks = [asyncio.create_task(receive(store, queue))]
    for _ in range(RUNNERS):
        tasks.append(asyncio.create_task(handle(InboxRunner(store, inbox_handler(apply), ProcessAll()))))
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    for task in tasks:
        task.add_done_callback(lambda _: stop.set())
    await stop.wait()
    for task in tasks:
        if task.done():
            task.result()
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await broker.close()
    await effects.close()
    await engine.dispose()


asyncio.run(prepare() if sys.argv[1] == "prepare" else run())
