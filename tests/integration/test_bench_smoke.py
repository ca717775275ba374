"""The benches against which we are measured and by which we measure ourselves, tiny: that they run, and count what they did."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import aio_pika
import pytest

from relay.bench.measure import Bench
from relay.bench.servers import Servers, Vhosts
from relay.sandbox import Postgres, RabbitMQ
from tests.bench import textbook
from tests.bench.endurance.__main__ import summary, write
from tests.bench.endurance.load import Comparison, Plan
from tests.bench.endurance.sides import SIDES, prepare
from tests.bench.flat_cost import bind, drain, fill, publish
from tests.bench.peers.place import EXCHANGES, bound_queue, channel, depth
from tests.harness.outbox import connected, settings_for


@pytest.mark.parametrize("way", ["each", "gathered"])
async def test_the_textbook_relay_publishes_each_row_once_and_marks_it_as_sent(
    empty_database: str, broker: str, way: textbook.Way
) -> None:
    async with connected(empty_database) as db, channel(broker) as opened:
        await bound_queue(opened, "classic")
        await db.execute(textbook.SCHEMA)
        await db.execute(textbook.FILL, 120, 10, 100)
        assert await textbook.run(empty_database, broker, way=way, batch=50, drain=True) == 120
        assert await depth(opened) == 120
        assert await db.fetchval("SELECT count(*) FROM textbook_outbox WHERE sent_at IS NULL") == 0


async def test_the_textbook_relay_marks_nothing_as_sent_that_nobody_received(empty_database: str, broker: str) -> None:
    async with connected(empty_database) as db:
        await db.execute(textbook.SCHEMA)
        await db.execute(textbook.FILL, 3, 1, 100)
        with pytest.raises(aio_pika.exceptions.PublishError):
            await textbook.run(empty_database, broker, way="gathered", batch=50, drain=True)
        assert await db.fetchval("SELECT count(*) FROM textbook_outbox WHERE sent_at IS NULL") == 3


async def test_flat_cost_tells_what_an_event_costs_and_what_a_message_without_the_database(
    postgres: Postgres, rabbitmq: RabbitMQ, database: str, broker: str
) -> None:
    settings = settings_for(database, broker, source="bench", outbox__page_rows=50)
    bench = Bench(Servers(postgres, Vhosts(rabbitmq)))
    await fill(settings, 1500, block=500)
    await bind(settings)
    for found in (await publish(bench, settings, 1500, block=500), await drain(bench, settings, 1500)):
        assert found.events == 1500
        assert 0 < found.seconds < 60
        assert 0 < (found.cpu_us["relay"] or 0) < 1e6
    async with channel(broker) as opened:
        assert await depth(opened) == 3000
    async with connected(database) as db:
        numbers = "SELECT count(*), count(DISTINCT id), count(DISTINCT (aggregate_id, seq)), max(seq) FROM relay.outbox"
        assert tuple(await db.fetchrow(numbers) or ()) == (1500, 1500, 1500, 3)


async def test_an_endurance_run_measures_both_relays_through_a_held_transaction(
    empty_database: str, broker: str, tmp_path: Path
) -> None:
    async with connected(empty_database) as db:
        await prepare(db)
    plan = Plan(seconds=4, hold=(1, 3), rate=500, aggregates=20, window_s=1, burst=500, burst_every_s=3)
    comparison = Comparison(plan=plan, dsn=empty_database, url=broker, sides=SIDES)
    await comparison.run()
    for side in SIDES:
        found = [window for window in comparison.windows if window.side == side.name]
        assert len(found) == 4
        assert {window.held for window in found} == {True, False}
        assert comparison.meters[side.name].arrived > 0
        assert comparison.meters[side.name].inserted >= plan.burst + plan.rows
        assert all(window.table_bytes > 0 for window in found)
    write(comparison, tmp_path)
    assert ElementTree.parse(tmp_path / "endurance.svg").getroot().tag.endswith("svg")  # noqa: S314 - our own
    assert len(json.loads((tmp_path / "endurance.json").read_text())["windows"]) == 8
    assert "textbook" in summary(comparison)


async def test_a_queue_for_peers_receives_from_each_contenders_exchange(broker: str) -> None:
    async with channel(broker) as opened:
        await bound_queue(opened, "quorum")
        for name in EXCHANGES:
            exchange = await opened.get_exchange(name)
            await exchange.publish(aio_pika.Message(b"{}"), "bench.Measured", mandatory=True)
        assert await depth(opened) == len(EXCHANGES)
