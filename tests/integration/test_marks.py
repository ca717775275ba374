"""How far each aggregate is published is told by marks, so that what was lost without a successor is missed as well."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from relay.control import MARKS, Mark, Marks, marks_message
from relay.message import Row
from relay.outbox.marks import MarksService
from relay.outbox.recent import Recent
from relay.postgres.connect import PLANS, Connection, connection
from relay.postgres.queries import query
from relay.settings import PostgresSettings
from tests.harness.databases import TABLES, Databases
from tests.harness.outbox import until
from tests.harness.pair import QUICK, RARE, Pair, pair, taken
from tests.integration.test_gap_repair import a_row, signed

__all__ = ["pair"]


async def test_a_lost_last_message_is_missed_and_sent_again(pair: Pair) -> None:
    await pair.declare()
    await pair.emit("order/1", 3)
    await pair.publish()
    await pair.lose(("1", 3))
    with capture_logs() as told:
        async with pair.both():
            await pair.applied("1", [1, 2, 3])
            await pair.no_gap()
    assert [(t["first"], t["last"], t["found_by"]) for t in told if t["event"] == "gap"] == [(3, 3, "mark")]


async def test_a_lost_first_and_only_message_is_missed_and_sent_again(pair: Pair) -> None:
    await pair.declare()
    await pair.emit("order/1")
    await pair.publish()
    await pair.lose(("1", 1))
    async with pair.both():
        await pair.applied("1", [1])


async def test_the_inbox_binds_its_queue_to_the_marks_by_itself(pair: Pair) -> None:
    """Nothing was declared before; events published while the queue did not exist are filled in."""
    async with pair.relay(), pair.inbox():
        await pair.emit("order/1", 2)
        await pair.applied("1", [1, 2])


async def test_a_late_joiner_with_empty_tables_is_filled_completely(pair: Pair) -> None:
    """What was published before its queue existed went to another one."""
    async with pair.channel() as channel:
        exchange = await channel.declare_exchange("relay.events", "topic", durable=True)
        other = await channel.declare_queue("other", durable=True)
        await other.bind(exchange, "#")
    for n in range(30):
        await pair.emit(f"order/{n}", n % 5 + 1)
    await pair.publish()
    await pair.declare()
    async with pair.both():
        for n in range(30):
            await pair.applied(str(n), range(1, n % 5 + 2))
        await pair.no_gap()


async def test_a_mark_that_is_lost_is_followed_by_another(pair: Pair) -> None:
    await pair.declare()
    await pair.emit("order/1", 3)
    async with pair.relay():
        await until(lambda: marks_arrived(pair))
        await pair.purge()  # the events, and the marks so far
        async with pair.inbox():
            await pair.applied("1", [1, 2, 3])


async def test_what_is_recent_is_told_without_waiting_for_the_sweep(pair: Pair) -> None:
    await pair.declare()
    pace = QUICK.__class__(interval_s=0.1, sweep_s=3600)
    async with pair.relay(pace):
        await until(lambda: is_swept(pair))
        await pair.emit("order/1")
        await until(lambda: marks_arrived(pair))
        async with pair.channel() as channel:
            messages = await taken(await channel.get_queue("billing"))
    marks = [m for m in messages if m.type == MARKS]
    assert {m.routing_key for m in marks} == {"order.Changed"}
    assert json.loads(marks[-1].body) == {"marks": [["order", "1", 1]]}


async def test_a_mark_of_events_that_are_on_their_way_is_no_gap(pair: Pair) -> None:
    await pair.declare()
    pair.with_inbox(gap_alert_after_s=3600)
    await pair.emit("order/1", 2)
    with capture_logs() as told:
        async with pair.inbox():
            await send_mark(pair, Mark("order", "1", 2))
            gap = await pair.gap("found_by = 'mark'")
            await pair.publish()
            await pair.applied("1", [1, 2])
    assert (gap["alerted_at"], gap["asks"], gap["to_seq"]) == (None, 0, 2)
    assert [t for t in told if t["event"] in ("gap", "gap_closed")] == []


async def test_a_mark_of_what_is_held_is_no_gap_of_its_own(pair: Pair) -> None:
    await pair.declare(marks=False)
    pair.with_inbox(gap_alert_after_s=3600)
    async with pair.inbox():
        await pair.send_row(a_row(3))
        await send_mark(pair, Mark("order", "1", 3))
        await send_mark(pair, Mark("order", "2", 1))
        await pair.gap("aggregate_id = '2'")
    assert [g["aggregate_id"] for g in await pair.gaps()] == ["2"]


async def test_without_order_nothing_is_missed_and_of_the_newest_state_only_the_newest_is(pair: Pair) -> None:
    await pair.declare()
    pair.with_inbox(policies={"note": "none", "stock": "latest"})
    await pair.emit("note/1", 3)
    await pair.emit("stock/1", 3)
    await pair.emit("order/1", 3)
    await pair.publish()
    await pair.purge()
    async with pair.both():
        await pair.effects_of("1", 4)
        kinds = await pair.consumer_db.fetch(
            "SELECT aggregate_type, array_agg(last_seq) AS seqs FROM relay.inbox_aggregate GROUP BY 1 ORDER BY 1"
        )
    assert [tuple(k) for k in kinds] == [("order", [3]), ("stock", [3])]
    assert sorted(await pair.effects("1")) == [1, 2, 3, 3]


async def test_only_published_rows_of_aggregates_without_parked_ones_are_told(pair: Pair) -> None:
    await pair.declare()
    await pair.emit("order/1", 2)
    await pair.emit("order/2", 2)
    await pair.publish()
    await pair.emit("order/3")  # not published
    await pair.db.execute(
        "INSERT INTO relay.outbox_parked (id, shard, aggregate_type, aggregate_id, seq, reason, state) "
        "SELECT id, shard, aggregate_type, aggregate_id, seq, 'unroutable', 'stuck' FROM relay.outbox "
        "WHERE aggregate_id = '2' AND seq = 2"
    )
    rows = await pair.db.fetch(query("sweep_aggregates"), 0, "", "", 100)
    assert [(r["aggregate_id"], r["seq"]) for r in rows] == [("1", 2), ("2", None), ("3", None)]
    rows = await pair.db.fetch(query("sweep_aggregates"), 0, "order", "1", 1)
    assert [r["aggregate_id"] for r in rows] == ["2"]


async def test_marks_are_few_where_every_aggregate_has_a_routing_key_of_its_own(pair: Pair) -> None:
    recent = Recent()
    recent.wanted = True
    settings = pair.producer.model_copy(
        update={"outbox": pair.producer.outbox.model_copy(update={"routing_key": "{aggregate_type}.{aggregate_id}"})}
    )
    service = MarksService(settings, shard=0, source="shop", recent=recent, pace=RARE)
    recent.note(a_named_row(str(n), 1) for n in range(5000))
    published: list[int] = []

    class Target:
        lost = None

        async def publish(self, messages: list[Any]) -> None:
            published.append(len(messages))

    async with connection(pair.producer.postgres, application="test") as opened:
        for _ in range(3):
            await service._pass(opened, Target())  # type: ignore[arg-type]
    assert published == [100, 100, 100]


async def test_a_sweep_over_many_routing_keys_leaves_none_out_however_much_is_recent(pair: Pair) -> None:
    await pair.declare()
    await pair.emit("order/0", 1)
    await pair.publish()
    await pair.db.execute("ALTER TABLE relay.outbox DISABLE TRIGGER outbox_assign")
    await pair.db.execute(
        "INSERT INTO relay.outbox (id, xid, slot, shard, aggregate_type, aggregate_id, seq, event_type, payload, size) "
        "SELECT id + i, xid, slot, shard, 'order', i, 1, 'T', '1', 1 FROM relay.outbox, generate_series(1, 1500) i"
    )
    await pair.db.execute("INSERT INTO relay.outbox_aggregate SELECT 'order', i, 1 FROM generate_series(1, 1500) i")
    recent = Recent()
    settings = pair.producer.model_copy(
        update={"outbox": pair.producer.outbox.model_copy(update={"routing_key": "{aggregate_type}.{aggregate_id}"})}
    )
    service = MarksService(settings, shard=0, source="shop", recent=recent, pace=RARE)
    recent.wanted = True
    told: set[str] = set()

    class Target:
        lost = None

        async def publish(self, messages: list[Any]) -> None:
            assert len(messages) <= 100
            told.update(m.routing_key for m in messages)

    async with connection(pair.producer.postgres, application="test") as opened:
        for _ in range(31):
            await service._pass(opened, Target())  # type: ignore[arg-type]
            recent.note(a_named_row(f"new-{n}", 1) for n in range(500))
    assert told >= {f"order.{n}" for n in range(1501)}


def test_of_what_was_published_the_newest_is_remembered_and_no_content() -> None:
    recent = Recent()
    recent.note([a_named_row("1", 1)])
    assert recent.take() == []  # nobody wants it
    recent.wanted = True
    recent.note([a_named_row("1", 1), a_named_row("1", 2), a_named_row("2", 1)])
    assert [(n.aggregate, n.seq) for n in recent.take()] == [(("order", "1"), 2), (("order", "2"), 1)]
    assert recent.take() == []


# --- what it costs


IDS = [str(i) for i in range(200)]
ONES, SHOPS, ORDERS = [1] * 200, ["shop"] * 200, ["order"] * 200
OUTBOX = {
    "last_numbers": (ORDERS, IDS),
    "retained_numbers": (ORDERS, IDS, ONES, [2] * 200),
    "retained_rows": ([0] * 200, list(range(1, 201))),
    "sweep_aggregates": (0, "", "", 2000),
}
INBOX: dict[str, tuple[Any, ...]] = {
    "note_early": ("c", 5.0, datetime(1970, 1, 1, tzinfo=UTC), 0, 2000, ["order"], ["sequence"], "latest"),
    "note_marks": ("c", SHOPS, ORDERS, IDS, ONES, 5.0, False),
    "walk_gaps": ("c", "", "", "", 1000),
    "gap_states": ("c", SHOPS, ORDERS, IDS),
    "close_gaps": ("c", SHOPS, ORDERS, IDS, ONES),
    "make_gaps_due": ("c", SHOPS, ORDERS, IDS),
    "claim_gaps": ("c", 500, 30.0),
    "gap_numbers": ("c", SHOPS, ORDERS, IDS, [9] * 200, ONES, 50),
    "stick_gaps": ("c", SHOPS, ORDERS, IDS, ONES, IDS),
    "drop_announced": ("c", SHOPS, ORDERS, IDS, ONES),
    "asked_numbers": ("c", 5000),
    "next_gap": ("c",),
}


@pytest.fixture(scope="module", params=[0, 20_000], ids=["empty", "large"])
def filled(databases: Databases, request: pytest.FixtureRequest) -> Iterator[str]:
    """The DSN of tables of both sides over all partitions, never analysed, for all statements: none is executed."""
    with databases.one("plans") as dsn:
        asyncio.run(fill(dsn, request.param))
        yield dsn


@pytest.fixture
async def log(filled: str) -> AsyncIterator[Connection]:
    """A session of a statement's own, in these tables."""
    async with connection(PostgresSettings(dsn=SecretStr(filled)), application="plans") as opened:
        yield opened


@pytest.mark.parametrize("name", OUTBOX | INBOX)
async def test_no_statement_scans_a_table(log: Connection, name: str) -> None:
    if name in INBOX:
        for setting in PLANS:
            await log.execute(f"SET {setting} TO {PLANS[setting]}")
        await log.execute("RESET enable_bitmapscan")
    arguments = (OUTBOX | INBOX)[name]
    plan = "\n".join(r[0] for r in await log.fetch("EXPLAIN " + query(name), *arguments))
    assert "Seq Scan" not in plan, plan
    if name in ("retained_numbers", "sweep_aggregates"):
        assert "outbox_0_aggregate_id_aggregate_type_seq_idx" in plan, plan
    if name == "note_early":
        assert "inbox_held_early" in plan, plan
    if name in ("claim_gaps", "next_gap"):
        assert "inbox_gap_due" in plan, plan


# --- helpers


async def fill(dsn: str, rows: int) -> None:
    """So many rows in every table; autovacuum, which would analyse them after a minute, keeps off."""
    async with connection(PostgresSettings(dsn=SecretStr(dsn)), application="plans") as opened:
        for table in await opened.fetch(TABLES):
            await opened.execute(f"ALTER TABLE {table['name']} SET (autovacuum_enabled = off)")
        await opened.execute("ALTER TABLE relay.outbox DISABLE TRIGGER outbox_assign")
        await opened.execute(
            "INSERT INTO relay.outbox (id, xid, slot, shard, aggregate_type, aggregate_id, seq, event_type, payload, size) "
            f"SELECT i, '700', i % 4, 0, 'order', i / 10, i % 10 + 1, 'T', '1', 1 FROM generate_series(1, {rows}) i"
        )
        await opened.execute(
            f"INSERT INTO relay.outbox_aggregate SELECT 'order', i, 10 FROM generate_series(0, {rows} / 10) i"
        )
        await opened.execute(
            "INSERT INTO relay.inbox_aggregate (consumer, source, aggregate_type, aggregate_id, last_seq) "
            f"SELECT 'c', 'shop', 'order', i, 0 FROM generate_series(1, {rows}) i"
        )
        await opened.execute(
            "INSERT INTO relay.inbox_held (consumer, source, aggregate_type, aggregate_id, seq, message_id, event_type, content_type, "
            "body, digest, reason, state, held_at) SELECT 'c', 'shop', 'order', i, 3, i, 'T', '', '', '', 'early', 'waiting', "
            f"now() - interval '1 min' FROM generate_series(1, {rows}) i"
        )
        await opened.execute(
            "INSERT INTO relay.inbox_gap (consumer, source, aggregate_type, aggregate_id, to_seq, found_by, next_ask_at) "
            f"SELECT 'c', 'shop', 'order', i, 2, 'successor', now() FROM generate_series(1, {rows}) i"
        )


def a_named_row(name: str, seq: int) -> Row:
    return Row(
        id=seq,
        aggregate_type="order",
        aggregate_id=name,
        seq=seq,
        event_type="Changed",
        content_type="application/json",
        headers={},
        routing_key=None,
        created_at=datetime.now(UTC),
        body=b"{}",
    )


async def send_mark(pair: Pair, mark: Mark) -> None:
    message = marks_message(Marks(source="shop", marks=(mark,)), routing_key="order.Changed", at=datetime.now(UTC))
    await pair.send(message.body, **signed(MARKS, message.body))


async def marks_arrived(pair: Pair) -> bool:
    """Whether marks are in the queue; leaves everything where it is."""
    async with pair.channel() as channel:
        return any(m.type == MARKS for m in await taken(await channel.get_queue("billing")))


async def is_swept(pair: Pair) -> bool:
    """Whether the relay's service is at work: its connection has asked for the sweep."""
    found = await pair.db.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'relay marks' AND state = 'idle' "
        "AND query LIKE '%walk.aggregate_type%' AND datname = current_database()"
    )
    return bool(found)
