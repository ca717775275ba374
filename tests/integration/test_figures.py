"""What the owner of a shard writes down for `relay status`: how much it published, how fast, and what ended its last session."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeAlias

import asyncpg
import pytest

from relay.daemon import Outbox
from relay.errors import BrokerError
from relay.outbox.progress import Rate
from tests.harness.audit import audit
from tests.harness.outbox import connected, insert, outbox_running, settings_for, shard_of, until, wait_until

Db: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


async def figures(db: Db) -> dict[str, Any]:
    row = await db.fetchrow(
        "SELECT published, rate, last_error, now() - last_error_at AS error_age, updated_at FROM relay.outbox_cursor"
    )
    assert row is not None
    return dict(row)


async def test_published_adds_up_over_sessions_and_counts_what_was_parked_when_it_goes_out(
    database: str, broker: str
) -> None:
    settings = settings_for(database, broker, outbox__page_rows=7, outbox__retry_first_s=0.1, outbox__retry_max_s=0.1)
    async with audit(broker, "order.#") as witness, connected(database) as db:
        await insert(db, "order/1", count=40)
        await insert(db, "ghost/1", count=5)
        await Outbox(settings).run(drain=True)
        assert (await figures(db))["published"] == 40
        await witness.queue.bind(witness.exchange, "ghost.#")
        async with outbox_running(settings) as outbox:
            await insert(db, "order/1", count=10)
            await wait_until(await shard_of(outbox), lambda p: p.unparked == 5)
            await witness.wait_for(55)
        assert (await figures(db))["published"] == 55


async def test_the_rate_is_that_of_the_last_seconds(database: str, broker: str) -> None:
    async with audit(broker), connected(database) as db:
        await insert(db, "order/1", count=30)
        await Outbox(settings_for(database, broker)).run(drain=True)
        assert 0 < (await figures(db))["rate"] <= 30  # in less than a second, told as in one


async def test_what_ended_a_session_is_written_down_before_the_broker_is_back_and_updated_at_is_not_touched(
    database: str, broker: str
) -> None:
    nowhere = broker.rpartition("/")[0] + "/no-such-vhost"
    async with connected(database) as db:
        before = await figures(db)
        assert before["last_error"] is None
        async with outbox_running(settings_for(database, nowhere)):
            await until(lambda: _has_error(db))
        told = await figures(db)
    kind, _, said = told["last_error"].partition(": ")
    assert kind in {error.__name__ for error in BrokerError.__subclasses__()}
    assert "no-such-vhost" in said
    assert timedelta() <= told["error_age"] < timedelta(seconds=30)
    assert told["updated_at"] == before["updated_at"]  # a restore relies on it: it is the time of the last checkpoint


async def _has_error(db: Db) -> Any:
    return (await figures(db))["last_error"]


async def test_a_session_that_ended_by_itself_leaves_no_error(database: str, broker: str) -> None:
    async with audit(broker), connected(database) as db:
        await insert(db, "order/1")
        await Outbox(settings_for(database, broker)).run(drain=True)
        assert (await figures(db))["last_error"] is None


@pytest.mark.parametrize(
    ("seen", "rate"),
    [
        ([(0, 0), (0.1, 50)], 50),  # less than a second is told as one
        ([(0, 0), (5, 500)], 100),
        ([(0, 0), (100, 0), (100.5, 1000)], 100),  # after a pause: over the last ten seconds
        ([(0, 0), *((t, 100 * t) for t in range(1, 60))], 100),
        ([(0, 0), *((t, 100 * t) for t in range(1, 50)), (70, 4900)], 0),
    ],
)
def test_a_rate_is_over_the_last_ten_seconds(seen: list[tuple[float, int]], rate: float) -> None:
    counting = Rate()
    for at, count in seen:
        told = counting.at(at, count)
    assert told == pytest.approx(rate)
