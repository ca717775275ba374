"""A full queue whose limit is taken away: channels that were open are not told (rabbitmq-server issue 12206), and relay does not wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from relay.message import TOMBSTONE
from relay.operate.outbox_acts import Skip
from relay.operate.selection import Selection
from relay.rabbitmq.fast_publisher import FastPublisher
from relay.sandbox import RabbitMQ
from tests.harness.acts import act_on
from tests.harness.audit import Audit, audit
from tests.harness.outbox import connected, insert, outbox_running, settings_for, until

QUICKLY = {
    "outbox__retry_first_s": 0.1,
    "outbox__retry_max_s": 0.2,
    "outbox__max_attempts": 1000,
    "outbox__repair": False,
}


@pytest.fixture(autouse=True)
def short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.outbox.doubt._SAME_KEY_S", 0.5)
    monkeypatch.setattr("relay.outbox.doubt._ANY_KEY_S", 0.1)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sessions with RabbitMQ that are opened: the shard's, and one for each row that is tried alone."""
    names: list[str] = []
    real = FastPublisher.open

    async def open_it(*args: Any, **kwargs: Any) -> FastPublisher:
        names.append(kwargs["name"])
        return await real(*args, **kwargs)

    monkeypatch.setattr(FastPublisher, "open", open_it)
    return names


@asynccontextmanager
async def a_full_queue(
    witness: Audit, broker: str, rabbitmq: RabbitMQ
) -> AsyncIterator[Callable[[], Awaitable[bytes]]]:
    """A quorum queue for `full.#` that takes about five messages, by a policy that the yielded function deletes."""
    vhost, api = broker.rpartition("/")[2], rabbitmq.management()
    policy = f"/api/policies/{vhost}/full"
    rules: dict[str, object] = {
        "pattern": "^full$",
        "apply-to": "queues",
        "definition": {"max-length": 5, "overflow": "reject-publish"},
    }
    await asyncio.to_thread(api.request, "PUT", policy, rules)
    full = await witness.channel.declare_queue("full", durable=True, arguments={"x-queue-type": "quorum"})
    await full.bind(witness.exchange, "full.#")
    yield lambda: asyncio.to_thread(api.request, "DELETE", policy)


async def _fill(db: asyncpg.Connection[asyncpg.Record]) -> int:
    """Events of full/1 until one is refused: a quorum queue tells publishers a little late that it is full. How many."""
    count = 0
    async with asyncio.timeout(30):
        while await _parked(db) == 0:
            await insert(db, "full/1", count=5)
            count += 5
            await asyncio.sleep(0.02)  # room for the broker to notice
    return count


async def _refused(db: asyncpg.Connection[asyncpg.Record], times: int) -> None:
    """Wait until a row has been nacked so often."""

    async def asked() -> Any:
        return await db.fetchval("SELECT bool_or(reason = 'nacked' AND attempts >= $1) FROM relay.outbox_parked", times)

    await until(asked)


async def _parked(db: asyncpg.Connection[asyncpg.Record]) -> int:
    return int(await db.fetchval("SELECT count(*) FROM relay.outbox_parked"))


@pytest.mark.parametrize("order", ["pipelined", "strict"])
async def test_when_the_policy_is_deleted_while_the_queue_is_full_what_waits_goes_out_by_itself_and_in_order(
    database: str, broker: str, rabbitmq: RabbitMQ, order: str
) -> None:
    settings = settings_for(database, broker, outbox__order=order, **QUICKLY)
    async with audit(broker, "none") as witness, connected(database) as db:
        async with a_full_queue(witness, broker, rabbitmq) as delete_policy, outbox_running(settings):
            count = await _fill(db)
            for aggregate in ("full/2", "full/3"):
                await insert(db, aggregate, count=5)
            await _refused(db, 6)
            await act_on(settings, Skip(Selection(aggregate="full/2")))
            await delete_policy()

            async def all_out() -> bool:
                return await _parked(db) == 0

            await until(all_out, timeout_s=15)
            await insert(db, "full/1")  # and what is new flows as usual
            full = await witness.channel.get_queue("full")
            await full.consume(witness._take, no_ack=True)
            await witness.wait_for_distinct(count + 1 + 10)
    assert witness.sequences() == {
        "full/1": list(range(1, count + 2)),
        "full/2": [1, 2, 3, 4, 5],
        "full/3": [1, 2, 3, 4, 5],
    }
    assert [m.headers["x-aggregate-id"] for m in witness.messages if m.type == TOMBSTONE] == ["2"]


async def test_a_queue_that_stays_full_ends_no_session_and_others_flow_on(
    database: str, broker: str, rabbitmq: RabbitMQ, opened: list[str]
) -> None:
    settings = settings_for(database, broker, **QUICKLY)
    async with audit(broker, "order.#") as witness, connected(database) as db:
        async with a_full_queue(witness, broker, rabbitmq), outbox_running(settings):
            await _fill(db)
            await insert(db, "full/2", count=20)
            sessions = await db.fetchval("SELECT epoch FROM relay.outbox_cursor")
            published = 0
            async with asyncio.timeout(30):
                while len(opened) < 5:  # the shard's own, and doubts again and again
                    await insert(db, "order/1")
                    published += 1
                    await witness.wait_for_distinct(published)
            assert await db.fetchval("SELECT epoch FROM relay.outbox_cursor") == sessions, "a doubt ended the session"
            assert await _parked(db) > 0, "inconclusive: the queue was not full any more"
    assert witness.sequences() == {"order/1": list(range(1, published + 1))}
