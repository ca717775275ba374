"""The inboxes that are compared, and one run of one of them: a full queue, effects in a table, each exactly once."""

from __future__ import annotations

import asyncio
import time

from relay.postgres.connect import Connection
from relay.postgres.migrate import migrate
from relay.rabbitmq.contract import Confirmed
from relay.rabbitmq.lanes import open_publisher
from relay.rabbitmq.queues import InboxQueue, ensure_queue
from relay.rabbitmq.session import close, connect
from relay.sandbox import Postgres, RabbitMQ
from relay.settings import RabbitmqSettings
from tests.bench.peers.contenders import NODE, PACTIX, Contender
from tests.bench.peers.figures import Run
from tests.bench.peers.install import Installed
from tests.bench.peers.messages import Wanted, pages
from tests.bench.peers.place import QUEUE, Failed, bound_queue, channel, connected, place
from tests.bench.peers.watch import watched

AGGREGATES = 1000
SETTLE_S = 0.5
QUEUE_TYPE = "quorum"

EFFECTS = "CREATE TABLE effect (id bigint GENERATED ALWAYS AS IDENTITY, aggregate text NOT NULL, seq bigint NOT NULL)"

CONTENDERS = (
    Contender(
        name="relay, a batch handler",
        side="inbox",
        how="relay inbox run, defaults; one INSERT for the batch",
        order="per aggregate, 1, 2, 3 ... without a hole, whatever the broker did",
        safety="exactly once, in the transaction of the effects; poison is held with its aggregate",
        arguments=("relay", "inbox", "run", "tests.bench.peers.handlers:many"),
    ),
    Contender(
        name="relay, one by one",
        side="inbox",
        how="relay inbox run, defaults; one INSERT for each message",
        order="per aggregate, 1, 2, 3 ... without a hole, whatever the broker did",
        safety="exactly once, in the transaction of the effects; poison is held with its aggregate",
        arguments=("relay", "inbox", "run", "tests.bench.peers.handlers:one"),
    ),
    Contender(
        name="pg-transactional-outbox 0.5.7, replication",
        side="inbox",
        how="amqplib consumer, 100 messages a transaction into its table; logical replication, 20 messages at once",
        order="none: messages of one aggregate are handled at once",
        safety="exactly once, in the transaction of the effects; abandoned after 5 attempts",
        packages=NODE,
        driver="pg_transactional_inbox.mjs",
        arguments=("replication",),
        most=30_000,
    ),
    Contender(
        name="pactix 0.2.0",
        side="inbox",
        how="aio-pika consumer, 500 messages a transaction into its table; 4 InboxRunners, batch 250",
        order="of arrival, per ordering key",
        safety="at least once: effects are outside the runner's transaction; failed after 10 attempts",
        packages=PACTIX,
        driver="pactix_inbox.py",
        most=50_000,
    ),
)


async def run(
    postgres: Postgres,
    rabbitmq: RabbitMQ,
    contender: Contender,
    installed: Installed | None,
    *,
    events: int,
    number: int,
    duplicates: float = 0.0,
    swaps: float = 0.0,
) -> Run:
    """One run, verified: each event has exactly one effect. Raises Failed or Stalled."""
    events = min(events, contender.most or events)
    wanted = Wanted(events=events, aggregates=AGGREGATES, duplicates=duplicates, swaps=swaps, seed=number)
    async with place(postgres, rabbitmq, f"inbox_{number}") as here:
        await _fill(RabbitmqSettings(url=here.url), contender, wanted)
        async with connected(here.dsn) as db:
            await db.execute(EFFECTS)
            if installed is None:
                await migrate(db)
            else:
                await here.prepare(contender, installed)
            await db.execute("CHECKPOINT")
            started = time.perf_counter()
            async with here.running(contender, installed) as program:
                seen = await watched(lambda: _given(db), events, alive=program.alive)
                await _committed(db, events)
                wall_s = time.perf_counter() - started
                await asyncio.sleep(SETTLE_S)
            in_order = await _verified(db, contender, events)
    return Run(
        contender=contender.name,
        queue_type=QUEUE_TYPE,
        round=number,
        events=events,
        rate=seen.rate,
        wall_s=wall_s,
        cpu_us=1e6 * program.cpu_s / events,
        in_order=in_order,
    )


async def _fill(settings: RabbitmqSettings, contender: Contender, wanted: Wanted) -> None:
    """The queue as its consumer wants it, full before the consumer starts."""
    if contender.ours:
        session = await connect(settings, name="peers")
        await ensure_queue(session, settings, InboxQueue(name=QUEUE, bindings=("#",), delivery_limit=100))
        await close(session)
    else:
        async with channel(settings.url.get_secret_value()) as opened:
            await bound_queue(opened, QUEUE_TYPE)
    publisher = await open_publisher(settings, confirm_timeout_s=30, name="peers")
    try:
        for page in pages(wanted):
            if not all(isinstance(outcome, Confirmed) for outcome in await publisher.publish(page)):
                raise Failed("the queue could not be filled")
    finally:
        await publisher.close()


async def _given(db: Connection) -> int:
    """Numbers of effects given out: cheap to ask often. Rolled back ones are among them, see `_committed`."""
    return int(await db.fetchval("SELECT coalesce(pg_sequence_last_value('effect_id_seq'), 0)"))


async def _committed(db: Connection, events: int) -> None:
    """Wait, briefly, until the last of them is committed."""
    async with asyncio.timeout(30):
        while await db.fetchval("SELECT count(*) FROM effect") < events:  # noqa: ASYNC110 - a table sets no event
            await asyncio.sleep(0.01)


async def _verified(db: Connection, contender: Contender, events: int) -> bool:
    """Whether all aggregates' effects came in the order of their numbers. Raises Failed unless each event has one effect."""
    row = await db.fetchrow("SELECT count(*) AS effects, count(DISTINCT (aggregate, seq)) AS distinct FROM effect")
    assert row is not None
    if (row["effects"], row["distinct"]) != (events, events):
        raise Failed(
            f"{contender.name}: {events:,} events, {row['effects']:,} effects of {row['distinct']:,} distinct events"
        )
    swapped = await db.fetchval(
        "SELECT count(*) FROM (SELECT seq, lag(seq) OVER (PARTITION BY aggregate ORDER BY id) AS before FROM effect) AS e "
        "WHERE seq < before"
    )
    return bool(swapped == 0)
