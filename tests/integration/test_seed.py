"""Late joiners: `relay counters` at the producer, `relay inbox seed` at the consumer; nothing before, everything after, in order."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from relay.operate.counters import Counter, from_lines, last_line, to_lines
from relay.sandbox import Postgres
from relay.settings import Settings
from tests.harness import console
from tests.harness.console import Answer
from tests.harness.logins import Logins
from tests.harness.outbox import connected, insert, outbox_running, settings_for, until
from tests.integration.inbox_harness import recording, stream, world
from tests.integration.test_replay import Queue, published, write


@pytest.fixture
def producer(database: str, broker: str) -> Settings:
    return settings_for(database, broker)


@dataclass
class Consumer:
    """The consumer `shop`, and `relay inbox ...` on it, in this process."""

    dsn: str
    db: Any
    monkeypatch: pytest.MonkeyPatch

    async def relay(self, *arguments: str, dsn: str | None = None) -> Answer:
        return await asyncio.to_thread(console.relay, dsn or self.dsn, *arguments)

    async def seed(self, *arguments: str) -> Answer:
        return await self.relay("inbox", "seed", "--consumer", "shop", *arguments)

    async def cursors(self) -> dict[str, int]:
        rows = await self.db.fetch(
            "SELECT aggregate_type || '/' || aggregate_id AS name, last_seq FROM relay.inbox_aggregate"
        )
        return {r["name"]: r["last_seq"] for r in rows}

    async def cursor(self, aggregate: str, last_seq: int) -> None:
        kind, _, name = aggregate.partition("/")
        await self.db.execute(
            "INSERT INTO relay.inbox_aggregate (consumer, source, aggregate_type, aggregate_id, last_seq) VALUES ('shop', 'shop', $1, $2, $3)",
            kind,
            name,
            last_seq,
        )

    async def hold(self, aggregate_id: str, seq: int) -> None:
        await self.db.execute(
            "INSERT INTO relay.inbox_held (consumer, source, aggregate_type, aggregate_id, seq, message_id, event_type, content_type, "
            "body, digest, reason, state) VALUES ('shop', 'shop', 'order', $1, $2::bigint, 'id-' || $2::bigint, 'T', 'text/plain', 'b', 'd', 'early', 'waiting')",
            aggregate_id,
            seq,
        )


@pytest.fixture
async def consumer(
    consumer_database: str, producer: Settings, broker: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Consumer]:
    monkeypatch.setenv("RELAY_RABBITMQ_URL", broker)
    monkeypatch.setenv("RELAY_PRODUCER_DSN", producer.postgres.dsn.get_secret_value())
    async with connected(consumer_database) as db:
        yield Consumer(consumer_database, db, monkeypatch)


async def test_a_consumer_that_joins_while_producers_write_applies_exactly_what_comes_after(
    producer: Settings, consumer: Consumer, broker: str
) -> None:
    """Three producers write all the time, transactions that are open across the seed among them."""
    stop = asyncio.Event()
    await Queue(broker, "others").declare(bind="#")  # what is not in our queue is lost to us, not parked
    async with outbox_running(producer), world(consumer.dsn, broker, start_from="now", repair=False) as w:
        writers = [asyncio.create_task(write_until(stop, producer, name)) for name in ("1", "2", "3")]
        async with connected(producer.postgres.dsn.get_secret_value()) as db:
            await until(lambda: counter(db, "3", at_least=5))
            async with connected(producer.postgres.dsn.get_secret_value()) as slow, slow.transaction():
                await insert(slow, "order/4", event_type="T")  # not committed when the counters are read: after
                seeded = await consumer.seed("--yes", "--json")
                assert seeded.code == 0, seeded.err
            start = await consumer.cursors()
            assert start.keys() == {"order/1", "order/2", "order/3"}
            for name in ("1", "2", "3"):
                await until(functools.partial(counter, db, name, at_least=start[f"order/{name}"] + 5))
            stop.set()
            await asyncio.gather(*writers)
            await insert(db, "order/5", count=2, event_type="T")  # new after the start: from number 1
            last = {r["aggregate_id"]: r["last_seq"] for r in await db.fetch("SELECT * FROM relay.outbox_aggregate")}
        after = sum(last.values()) - sum(start.values())
        async with w.running(recording()):
            await w.until(lambda total: total.applied >= after)
        for name, last_seq in last.items():
            assert await w.effects(name) == list(range(start.get(f"order/{name}", 0) + 1, last_seq + 1))
        assert await w.held() == []


async def write_until(stop: asyncio.Event, producer: Settings, name: str) -> None:
    async with connected(producer.postgres.dsn.get_secret_value()) as db:
        while not stop.is_set():
            async with db.transaction():
                await insert(db, f"order/{name}", event_type="T")
                await asyncio.sleep(0.005)  # the transaction stays open for a moment: seeds fall into it


async def counter(db: Any, name: str, at_least: int) -> bool:
    last = await db.fetchval("SELECT last_seq FROM relay.outbox_aggregate WHERE aggregate_id = $1", name)
    return (last or 0) >= at_least


async def test_what_is_committed_and_not_published_yet_is_before_now(
    producer: Settings, consumer: Consumer, broker: str
) -> None:
    await published(producer, [("order/1", 3)], event_type="T")
    await write(producer, [("order/1", 2)], event_type="T")  # 4 and 5: no relay has seen them
    assert (await consumer.seed("--yes")).code == 0
    async with connected(producer.postgres.dsn.get_secret_value()) as db:
        await insert(db, "order/1", event_type="T")
    async with world(consumer.dsn, broker) as w, outbox_running(producer), w.running(recording()):
        await w.until(lambda total: total.received == 3)
        assert w.total.duplicates == 2
        assert await w.effects() == [6]


async def test_the_queue_collects_before_the_counters_are_read(
    producer: Settings, consumer: Consumer, broker: str
) -> None:
    await published(producer, [("order/1", 1)])
    await consumer.seed("--yes")
    assert await Queue(broker, "shop").count() == 0  # it is there
    seed = await consumer.db.fetchrow("SELECT * FROM relay.inbox_seed")
    act = await consumer.db.fetchrow("SELECT * FROM relay.audit")
    assert (seed["consumer"], seed["source"], seed["aggregates"]) == ("shop", "shop", 1)
    assert (act["act"], act["side"], act["rows"]) == ("seed", "inbox", 1)


async def test_only_what_is_missing_or_at_zero_is_put_there_unless_forced(
    producer: Settings, consumer: Consumer
) -> None:
    await published(producer, [("order/1", 9), ("order/2", 9), ("order/3", 9), ("order/4", 9)])
    await consumer.cursor("order/1", 0)
    await consumer.cursor("order/2", 5)
    await consumer.cursor("order/3", 12)  # a producer that was restored, say
    looked = (await consumer.seed("--dry-run", "--json")).json
    assert [looked[k] for k in ("dry_run", "missing", "at_zero", "same", "elsewhere")] == [True, 1, 1, 0, 2]
    assert await consumer.cursors() == {"order/1": 0, "order/2": 5, "order/3": 12}
    done = (await consumer.seed("--yes", "--json")).json
    assert [done[k] for k in ("aggregates", "created", "moved", "left_alone")] == [4, 1, 1, 2]
    assert await consumer.cursors() == {"order/1": 9, "order/2": 5, "order/3": 12, "order/4": 9}
    again = (await consumer.seed("--yes", "--json")).json
    assert [again[k] for k in ("created", "moved", "left_alone")] == [0, 0, 4]
    forced = (await consumer.seed("--yes", "--force", "--json")).json
    assert [forced[k] for k in ("created", "moved", "left_alone")] == [0, 2, 2]
    assert set((await consumer.cursors()).values()) == {9}


async def test_what_was_stored_after_a_cursor_that_goes_back_is_removed_when_its_taker_is_done(
    producer: Settings, consumer: Consumer
) -> None:
    await published(producer, [("order/1", 9)])
    await consumer.cursor("order/1", 5)
    await consumer.db.execute(
        "INSERT INTO relay.inbox (consumer, source, aggregate_type, aggregate_id, seq, event_type, message_id, content_type, headers, body)"
        " SELECT 'shop', 'shop', 'order', '1', n, 'T', n::text, '', '{}', '{}' FROM generate_series(2, 5) AS n"
    )
    async with connected(consumer.dsn) as taker:
        taking = taker.transaction()
        await taking.start()
        assert await taker.fetchval("SELECT seq FROM relay.inbox_take(1)") == 2  # seeding deletes what is behind it
        seeding = asyncio.create_task(consumer.seed("order/1", "--at", "3", "--force", "--yes"))
        await until(functools.partial(somebody_waits, consumer.db))
        await taking.commit()
        assert (await seeding).code == 0
    assert await consumer.db.fetchval("SELECT array_agg(seq) FROM relay.inbox") == [3]


async def somebody_waits(db: Any) -> bool:
    waits: bool = await db.fetchval(
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database())"
    )
    return waits


async def test_only_the_types_that_are_named(producer: Settings, consumer: Consumer) -> None:
    await published(producer, [("order/1", 2), ("invoice/1", 3), ("shipment/1", 4)])
    answer = await consumer.seed("--type", "order", "--type", "invoice", "--yes")
    assert answer.code == 0
    assert "the queue is bound with #: other aggregates that come through it start at number 1" in answer.out
    assert "inbox.bindings = order.#,invoice.#" in answer.out
    assert await consumer.cursors() == {"order/1": 2, "invoice/1": 3}


async def test_what_is_held_from_before_goes_to_the_quarantine_and_what_follows_is_due(
    producer: Settings, consumer: Consumer
) -> None:
    await published(producer, [("order/1", 5), ("order/2", 5)])
    await consumer.cursor("order/1", 0)
    for seq in (3, 5, 6, 8):
        await consumer.hold("1", seq)
    await consumer.db.execute(
        "INSERT INTO relay.inbox_gap (consumer, source, aggregate_type, aggregate_id, to_seq, found_by, next_ask_at) "
        "VALUES ('shop', 'shop', 'order', '1', 5, 'successor', now())"
    )
    done = (await consumer.seed("--yes", "--json")).json
    assert done["set_aside"] == 2
    held = await consumer.db.fetch("SELECT seq, reason, state FROM relay.inbox_held ORDER BY seq")
    assert [tuple(r) for r in held] == [(6, "behind", "retrying"), (8, "early", "waiting")]
    kept = await consumer.db.fetch("SELECT seq, reason, source, body FROM relay.inbox_quarantine ORDER BY seq")
    assert [tuple(r) for r in kept] == [(3, "skipped", "shop", b"b"), (5, "skipped", "shop", b"b")]
    assert await consumer.db.fetchval("SELECT count(*) FROM relay.inbox_gap") == 0
    assert await consumer.db.fetchval("SELECT blocked FROM relay.inbox_aggregate WHERE aggregate_id = '1'") is True


async def test_a_running_inbox_goes_on_behind_a_cursor_that_was_seeded(consumer: Consumer, broker: str) -> None:
    async with world(consumer.dsn, broker) as w, w.running(recording()):
        await w.publish(stream("1", 8)[5:])  # 6 7 8; 1 to 5 were before its time
        await w.until(lambda total: total.held == 3)
        answer = await consumer.seed("order/1", "--at", "5", "--yes")
        assert answer.code == 0, answer.err
        await w.until(lambda total: total.applied == 3)
        assert await w.effects() == [6, 7, 8]
        assert await w.held() == []


async def test_one_aggregate_by_hand_needs_a_source_that_is_known_or_named(consumer: Consumer) -> None:
    unknown = await consumer.seed("order/1", "--at", "5", "--yes")
    assert (unknown.code, "name the source of order/1 with --source" in unknown.err) == (2, True)
    named = await consumer.seed("order/1", "--at", "5", "--source", "shop", "--yes")
    assert (named.code, named.lines()) == (
        0,
        ["consumer shop: order/1 of source shop is at 5 now; 6 is applied next"],
    )
    assert await consumer.cursors() == {"order/1": 5}
    back = await consumer.seed("order/1", "--at", "3", "--yes", "--force")
    assert (back.code, await consumer.cursors()) == (0, {"order/1": 3})
    assert await consumer.db.fetchval("SELECT count(*) FROM relay.inbox_seed") == 0  # the rest was not seeded


async def test_counters_travel_as_lines_where_the_databases_cannot_see_each_other(
    producer: Settings, consumer: Consumer, tmp_path: Path, postgres: Postgres
) -> None:
    await published(producer, [("order/1", 2), ('order/ü, "x"', 3), ("invoice/1", 4)])
    consumer.monkeypatch.delenv("RELAY_PRODUCER_DSN")
    file = tmp_path / "counters.jsonl"
    early = await consumer.seed("--counters", str(file)) if file.exists() else await consumer.seed("--yes")
    assert (early.code, "where has the producer counted?" in early.err) == (2, True)

    with Logins(postgres) as logins:
        monitor = logins.create(producer.postgres.dsn.get_secret_value(), "relay_monitor")
        counted = await consumer.relay("counters", "--type", "order", dsn=monitor)
    assert counted.code == 0, counted.err
    file.write_text(counted.out)
    unprepared = await consumer.seed("--counters", str(file), "--yes")
    assert (unprepared.code, "First relay inbox seed --prepare" in unprepared.err) == (2, True)
    assert await consumer.cursors() == {}

    tried = await consumer.seed("--prepare", "--dry-run")
    assert (tried.code, "would declare the queue" in tried.out, "nothing was changed" in tried.out) == (0, True, True)
    still = await consumer.seed("--counters", str(file), "--yes")
    assert (still.code, "does not exist" in still.err) == (2, True)
    assert (await consumer.seed("--prepare")).code == 0
    assert "is there already" in (await consumer.seed("--prepare", "--dry-run")).out
    seeded = await consumer.seed("--counters", str(file), "--type", "order", "--yes")
    assert seeded.code == 0, seeded.err
    assert await consumer.cursors() == {"order/1": 2, 'order/ü, "x"': 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "end before their last line"),
        (lambda lines: [lines[0], lines[-1]], "line 2: 2 aggregates were written, 1 are here"),
        (lambda lines: [*lines, lines[0]], "line 4: comes after the last line"),
        (lambda lines: ["not json\n", *lines], "line 1: is not JSON"),
        (lambda lines: [lines[0].replace(": 2", ": 0"), *lines[1:]], "line 1: last_seq is not a whole number from 1"),
        (lambda lines: [lines[0].replace("last_seq", "lastseq"), *lines[1:]], "line 1: expected the keys"),
        (lambda lines: [lines[0].replace('"shop"', '"other"'), *lines[1:]], "of several sources (other, shop)"),
        (lambda lines: [lines[0].replace('"1"', '"\\u0000"'), *lines[1:]], "line 1: aggregate_id"),
    ],
)
async def test_lines_that_were_cut_off_or_changed_are_refused_whole(
    consumer: Consumer, tmp_path: Path, change: Callable[[list[str]], list[str]], message: str
) -> None:
    lines = to_lines("shop", [Counter("order", "1", 2), Counter("order", "2", 3)]).splitlines(keepends=True)
    lines.append(last_line("shop", 2))
    file = tmp_path / "counters.jsonl"
    file.write_text("".join(change(lines)))
    answer = await consumer.seed("--counters", str(file), "--dry-run")
    assert answer.code == 6
    assert message in answer.err
    assert len(list(from_lines(line.encode() for line in lines))) == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("order/1",), 2, "one aggregate needs its number"),
        (("--at", "5"), 2, "one aggregate needs its number"),
        (("order/*", "--at", "5", "--yes"), 2, "name it in full"),
        (("order/1", "--at", "5", "--type", "order"), 2, "seeded by itself"),
        (("--source", "shop"), 2, "--source is for one aggregate"),
        ((), 2, "no terminal to ask on"),
        (("--type", "ordr", "--yes"), 11, "source shop has counted nothing of the type ordr"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
async def test_what_cannot_be_meant_is_said(
    producer: Settings, consumer: Consumer, arguments: tuple[str, ...], code: int, message: str
) -> None:
    await published(producer, [("order/1", 1)])
    answer = await consumer.seed(*arguments)
    assert (answer.code, message in answer.err) == (code, True), answer.err
    assert await consumer.cursors() == {}


async def test_a_dsn_that_is_none_is_refused_without_being_shown(consumer: Consumer, tmp_path: Path) -> None:
    consumer.monkeypatch.setenv("RELAY_PRODUCER_DSN", "mysql://me:hunter2@db/x")
    answer = await consumer.seed("--yes")
    assert (answer.code, "is not a URL like postgresql://" in answer.err, "hunter2" in answer.err) == (2, True, False)
    consumer.monkeypatch.delenv("RELAY_PRODUCER_DSN")
    missing = await consumer.seed("--yes", "--producer-dsn-file", str(tmp_path / "none"))
    assert (missing.code, "cannot read the producer's DSN" in missing.err) == (2, True)


async def test_a_producer_that_was_never_published_has_no_name(producer: Settings, consumer: Consumer) -> None:
    await write(producer, [("order/1", 1)])
    answer = await consumer.seed("--yes")
    assert (answer.code, "Is postgres.dsn the producer's?" in answer.err) == (2, True)
    with_name = await consumer.seed("--yes", "-s", "source=shop")
    assert with_name.code == 0
    assert json.loads((await consumer.seed("--dry-run", "--json", "-s", "source=shop")).out)["same"] == 1


async def test_an_operator_and_a_monitor_may_do_it(
    producer: Settings, consumer: Consumer, postgres: Postgres, broker: str
) -> None:
    await published(producer, [("order/1", 3)])
    await consumer.cursor("order/1", 0)
    await consumer.hold("1", 2)
    with Logins(postgres) as logins:
        consumer.monkeypatch.setenv(
            "RELAY_PRODUCER_DSN", logins.create(producer.postgres.dsn.get_secret_value(), "relay_monitor")
        )
        operator = logins.create(consumer.dsn, "relay_operator")
        answer = await consumer.relay("inbox", "seed", "--consumer", "shop", "--yes", "--force", dsn=operator)
        assert answer.code == 0, answer.err
    assert await consumer.cursors() == {"order/1": 3}
