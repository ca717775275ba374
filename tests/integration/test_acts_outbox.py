"""Acts on the outbox, end to end with the daemon: retry, skip, purge, pause, resume. Real servers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from relay.daemon import Outbox
from relay.errors import ConfigError, NothingSelected
from relay.message import TOMBSTONE
from relay.operate.act import Act, Done, perform
from relay.operate.outbox_acts import Purge, Retry, Skip, SkipNumber
from relay.operate.outbox_pauses import Pause, Resume
from relay.operate.selection import Selection, aggregate_text
from relay.postgres.connect import Connection
from relay.postgres.queries import query
from relay.settings import Settings
from tests.harness.acts import TESTER, act_on, audits, contents
from tests.harness.audit import Audit, audit
from tests.harness.outbox import connected, insert, outbox_running, settings_for, until

NOW = "relay publishes the tombstones as soon as a relay runs (none does now), in order; consumers pass over them"
LATER = "paused: relay publishes the tombstones after `relay resume`, in order; consumers pass over them"
TABLES = ("outbox_parked", "outbox_tombstone", "outbox_pause", "audit", "audit_aggregate")


@dataclass
class World:
    """A database, a broker where only `order.#` has a queue, and no retries but an operator's."""

    settings: Settings
    db: Connection
    witness: Audit

    async def act(self, act: Act) -> Done:
        return await act_on(self.settings, act)

    async def parked(self) -> list[tuple[Any, ...]]:
        rows = await self.db.fetch(
            "SELECT aggregate_type || '/' || aggregate_id, seq, reason, state FROM relay.outbox_parked ORDER BY aggregate_id, seq"
        )
        return [tuple(r.values()) for r in rows]

    async def until_parked(self, n: int) -> None:
        await until(lambda: self._parked(n))

    async def _parked(self, n: int) -> bool:
        return bool(await self.db.fetchval("SELECT count(*) = $1 FROM relay.outbox_parked", n))

    async def is_stuck(self, attempts: int) -> bool:
        return bool(
            await self.db.fetchval("SELECT state = 'stuck' AND attempts = $1 FROM relay.outbox_parked", attempts)
        )

    def seen(self) -> list[tuple[str, int, bool]]:
        """(aggregate, seq, whether it was a tombstone) as they arrived."""
        return [
            ("/".join((str(m.headers["x-aggregate-type"]), str(m.headers["x-aggregate-id"]))), int(str(m.headers["x-sequence"])), m.type == TOMBSTONE)
            for m in self.witness.messages
        ]  # fmt: skip

    async def poison(self, aggregate: str, event_type: str = "Poison") -> None:
        """An event whose routing key no queue is bound for, in the place where its aggregate's events go otherwise."""
        kind, _, name = aggregate.partition("/")
        await self.db.execute(
            "INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload, routing_key) VALUES ($1, $2, $3, '{}', $4)",
            kind,
            name,
            event_type,
            f"nowhere.{event_type}",
        )


@pytest.fixture
async def tables(database: str) -> AsyncIterator[World]:
    """The same without a broker: for what an act does to the tables alone."""
    settings = settings_for(database, "amqp://127.0.0.1:1/")
    async with connected(database) as db:
        yield World(settings, db, None)  # type: ignore[arg-type]


@pytest.fixture
async def world(database: str, broker: str) -> AsyncIterator[World]:
    settings = settings_for(database, broker, outbox__retry_first_s=300, outbox__retry_max_s=300)
    async with connected(database) as db, audit(broker, "order.#") as witness:
        yield World(settings, db, witness)


async def until_empty(world: World) -> None:
    await world.until_parked(0)


class TestRetry:
    async def test_after_binding_the_queue_the_aggregate_goes_out_in_order(self, world: World) -> None:
        await insert(world.db, "stock/1", count=3)
        await insert(world.db, "stock/2", count=2)
        async with outbox_running(world.settings):
            await world.until_parked(5)
            await world.witness.queue.bind(world.witness.exchange, "stock.#")
            done = await world.act(Retry(Selection(aggregate="stock/1")))
            assert (done.rows, done.aggregates) == (1, 1)
            await world.witness.wait_for(3, timeout_s=8)  # at once: not at the next look of ten seconds
            await world.until_parked(2)
        assert world.seen() == [("stock/1", n, False) for n in (1, 2, 3)]
        assert await world.parked() == [("stock/2", 1, "unroutable", "retrying"), ("stock/2", 2, "behind", "waiting")]
        assert await audits(world.db) == [("outbox", "retry", {"aggregate": "stock/1"}, 1, ["stock/1"])]

    async def test_what_is_stuck_and_refused_once_more_is_stuck_again(
        self, world: World, database: str, broker: str
    ) -> None:
        settings = settings_for(database, broker, outbox__max_attempts=1)
        await insert(world.db, "stock/1")
        async with outbox_running(settings):
            await until(lambda: world.db.fetchval("SELECT state = 'stuck' FROM relay.outbox_parked"))
            for attempts in (2, 3):
                await world.act(Retry(Selection(state="stuck")))
                await until(partial(world.is_stuck, attempts))

    async def test_all_of_a_cause_leaves_the_others_alone(self, tables: World) -> None:
        await parked(tables, "stock/1", "unroutable")
        await parked(tables, "stock/2", "nacked")
        await parked(tables, "stock/3", "unroutable")
        done = await tables.act(Retry(Selection(cause="unroutable")))
        assert (done.rows, done.aggregates) == (2, 2)
        assert [(r[0], r[3]) for r in await tables.parked()] == [
            ("stock/1", "retrying"), ("stock/2", "stuck"), ("stock/3", "retrying")
        ]  # fmt: skip

    async def test_what_is_paused_stays_paused_and_is_told(self, tables: World) -> None:
        await parked(tables, "stock/1", "paused", state="paused")
        await parked(tables, "stock/2", "nacked")
        plan = await Retry(Selection(everything=True)).plan(tables.db)
        assert (plan.rows, plan.notes) == (1, ["1 aggregate left alone: paused (`relay resume`)"])
        await tables.act(Retry(Selection(everything=True)))
        assert [r[3] for r in await tables.parked()] == ["paused", "retrying"]
        with pytest.raises(NothingSelected, match=r"paused .*: nothing was changed\. `relay resume` lets it go on"):
            await tables.act(Retry(Selection(aggregate="stock/1")))


class TestSkip:
    async def test_the_head_is_given_up_and_what_waits_behind_it_is_published(self, world: World) -> None:
        await insert(world.db, "order/1")
        await world.poison("order/1")
        async with outbox_running(world.settings):
            await world.until_parked(1)
            await insert(world.db, "order/1", count=2)
            await world.until_parked(3)
            done = await world.act(Skip(Selection(aggregate="order/1")))
            assert (done.rows, done.aggregates) == (1, 1)
            await until_empty(world)
            await world.witness.wait_for(3, timeout_s=8)
        # The tombstone goes where the event would have gone: nobody is bound there, so nobody waits for it.
        assert world.seen() == [("order/1", 1, False), ("order/1", 3, False), ("order/1", 4, False)]
        assert await world.db.fetchval("SELECT array_agg(act) FROM relay.outbox_tombstone") == ["skip"]
        assert await audits(world.db) == [("outbox", "skip", {"aggregate": "order/1"}, 1, ["order/1"])]

    async def test_a_tombstone_with_the_same_number_and_id_goes_where_the_event_would_have_gone(
        self, world: World
    ) -> None:
        await insert(world.db, "stock/1", count=3)
        async with outbox_running(world.settings):
            await world.until_parked(3)
            await world.witness.queue.bind(world.witness.exchange, "stock.#")
            await world.act(Skip(Selection(aggregate="stock/1")))
            await world.witness.wait_for(3, timeout_s=8)
            await until_empty(world)
        assert world.seen() == [("stock/1", 1, True), ("stock/1", 2, False), ("stock/1", 3, False)]
        assert world.witness.messages[0].body == b""

    async def test_only_what_was_refused_is_a_head_to_skip(self, tables: World) -> None:
        await parked(tables, "stock/1", "behind", state="retrying")  # its turn has just come
        await parked(tables, "stock/2", "paused", state="paused")
        await parked(tables, "stock/3", "nacked")
        done = await tables.act(Skip(Selection(everything=True)))
        assert done.rows == 1
        assert (
            await tables.db.fetchval("SELECT aggregate_id FROM relay.outbox_tombstone JOIN relay.outbox USING (id)")
            == "3"
        )
        row = await tables.db.fetchrow("SELECT state, attempts FROM relay.outbox_parked WHERE aggregate_id = '3'")
        assert row is not None
        assert tuple(row.values()) == ("retrying", 0)  # the tombstone has never been refused
        with pytest.raises(NothingSelected, match="1 row given up already, on the way as tombstones"):
            await tables.act(Skip(Selection(aggregate="stock/3")))

    async def test_a_head_that_went_out_meanwhile_is_not_replaced_by_the_next_one(self, tables: World) -> None:
        await parked(tables, "stock/1", "nacked", count=2)
        act = Skip(Selection(aggregate="stock/1"))
        plan = await act.plan(tables.db)
        await tables.db.execute("DELETE FROM relay.outbox_parked WHERE seq = 1")
        await tables.db.execute("UPDATE relay.outbox_parked SET reason = 'nacked', state = 'stuck'")
        with pytest.raises(NothingSelected, match=r"what was counted \(1 row\) went out meanwhile"):
            await perform(tables.db, act, plan, TESTER)
        assert await tables.db.fetchval("SELECT count(*) FROM relay.outbox_tombstone") == 0
        assert await audits(tables.db) == []

    async def test_a_row_without_an_aggregate_goes_and_is_remembered(self, world: World) -> None:
        await world.db.execute("INSERT INTO relay.outbox (event_type, payload) VALUES ('Lost', '{}')")
        async with outbox_running(world.settings):
            await world.until_parked(1)
            done = await world.act(Skip(Selection(cause="unroutable")))
            assert (done.rows, done.aggregates) == (1, 0)
            await until_empty(world)
        assert await world.db.fetchval("SELECT count(*) FROM relay.outbox_tombstone") == 1
        assert await audits(world.db) == [("outbox", "skip", {"cause": "unroutable"}, 1, [])]


class TestSkipANumber:
    async def test_that_was_published_sends_its_tombstone_to_everybody(self, world: World) -> None:
        await insert(world.db, "order/1", count=3)
        async with outbox_running(world.settings):
            await world.witness.wait_for(3)
            await until(lambda: is_published(world, "order/1", 2))
            plan = await number("order/1", 2).plan(world.db)
            assert plan.notes == [
                "it is seq 2, Changed",
                "order/1 seq 2 was published already: its tombstone is sent to everyone who gets its aggregate",
            ]
            await world.act(number("order/1", 2))
            await world.witness.wait_for(4, timeout_s=8)
            await until_empty(world)
            await insert(world.db, "order/1")
            await world.witness.wait_for(5)
        assert world.seen()[3:] == [("order/1", 2, True), ("order/1", 4, False)]
        assert await audits(world.db) == [
            ("outbox", "skip", {"aggregate": "order/1", "from_seq": 2, "to_seq": 2}, 1, ["order/1"])
        ]

    async def test_in_the_middle_of_a_parked_line_waits_for_its_turn(self, world: World) -> None:
        await insert(world.db, "stock/1", count=4)
        async with outbox_running(world.settings):
            await world.until_parked(4)
            plan = await number("stock/1", 3).plan(world.db)
            assert plan.notes == [
                "it is seq 3, Changed: behind, waiting",
                "stock/1 seq 3 waits behind seq 1: its tombstone goes out when its turn comes",
            ]
            await world.act(number("stock/1", 3))
            assert [r[3] for r in await world.parked()] == ["retrying", "waiting", "waiting", "waiting"]
            await world.witness.queue.bind(world.witness.exchange, "stock.#")
            await world.act(Retry(Selection(aggregate="stock/1")))
            await world.witness.wait_for(4, timeout_s=8)
        assert [(seq, dead) for _, seq, dead in world.seen()] == [(1, False), (2, False), (3, True), (4, False)]

    async def test_before_what_is_parked_goes_out_before_it(self, world: World) -> None:
        await insert(world.db, "order/1", count=2)
        await world.poison("order/1")
        async with outbox_running(world.settings):
            await world.until_parked(1)
            await insert(world.db, "order/1")
            await world.until_parked(2)
            await until(lambda: is_published(world, "order/1", 1))
            await world.act(number("order/1", 1))
            await world.witness.wait_for(3, timeout_s=8)
            await world.until_parked(2)
        assert world.seen()[2] == ("order/1", 1, True)
        assert [r[1:3] for r in await world.parked()] == [(3, "unroutable"), (4, "behind")]

    async def test_is_refused_where_nothing_can_be_published_in_its_place(self, world: World) -> None:
        await insert(world.db, "order/1", count=2)
        for seq, told in (
            (1, "order/1 seq 1 is neither published nor parked yet: `relay run` has not come to it"),
            (9, "order/1 has no seq 9 yet: its last one is 2"),
        ):
            with pytest.raises(NothingSelected, match=told):
                await world.act(number("order/1", seq))
        with pytest.raises(NothingSelected, match="there is no event of order/7 in this outbox"):
            await world.act(number("order/7", 1))
        async with outbox_running(world.settings):
            await until(lambda: is_published(world, "order/1", 2))
        await world.db.execute("TRUNCATE relay.outbox")
        with pytest.raises(NothingSelected, match=r"not retained any more.*relay inbox skip order/1 --through 1"):
            await world.act(number("order/1", 1))
        assert await contents(world.db, *TABLES) == {table: [] for table in TABLES}

    @pytest.mark.parametrize(
        "selection",
        [
            Selection(aggregate="order/1", from_seq=1, to_seq=2),
            Selection(aggregate="order/*", from_seq=1, to_seq=1),
            Selection(aggregate_type="order", from_seq=1, to_seq=1),
            Selection(aggregate="order/1", from_seq=1, to_seq=1, cause="nacked"),
        ],
    )
    def test_needs_one_number_of_one_aggregate(self, selection: Selection) -> None:
        with pytest.raises(ConfigError, match="--seq skips one number of one aggregate"):
            SkipNumber(selection)


class TestPurge:
    async def test_all_that_waits_becomes_tombstones_in_order_and_new_events_follow(self, world: World) -> None:
        await insert(world.db, "stock/1", count=120)  # more than one portion of the daemon's
        await insert(world.db, "stock/2")
        async with outbox_running(world.settings):
            await world.until_parked(121)
            await world.witness.queue.bind(world.witness.exchange, "stock.#")
            done = await world.act(Purge(Selection(aggregate="stock/1")))
            assert (done.rows, done.aggregates) == (120, 1)
            await insert(world.db, "stock/1")
            await world.witness.wait_for(121, timeout_s=15)
        assert world.seen() == [("stock/1", n, n <= 120) for n in range(1, 122)]
        assert [r[:2] for r in await world.parked()] == [("stock/2", 1)]

    async def test_a_cause_describes_the_head_and_takes_what_waits_behind_it(self, tables: World) -> None:
        await parked(tables, "stock/1", "unroutable", count=3)
        await parked(tables, "stock/2", "nacked", count=3)
        assert (await tables.act(Purge(Selection(cause="unroutable")))).rows == 3
        assert await marked(tables) == [("1", 1), ("1", 2), ("1", 3)]

    async def test_numbers_select_within_the_line(self, tables: World) -> None:
        await parked(tables, "stock/1", "unroutable", count=5)
        assert (await tables.act(Purge(Selection(aggregate="stock/1", from_seq=3, to_seq=4)))).rows == 2
        assert await marked(tables) == [("1", 3), ("1", 4)]
        assert [r[3] for r in await tables.parked()] == ["stuck"] + ["waiting"] * 4

    async def test_what_is_paused_is_left_alone_unless_it_is_asked_for(self, tables: World) -> None:
        await parked(tables, "stock/1", "paused", state="paused", count=2)
        await parked(tables, "stock/2", "nacked", count=2)
        plan = await Purge(Selection(everything=True)).plan(tables.db)
        assert (plan.rows, plan.notes) == (2, ["2 rows left alone: paused (name the aggregate, or say --cause paused)"])
        for selection in (Selection(aggregate="stock/1"), Selection(cause="paused"), Selection(state="paused")):
            assert (await Purge(selection).plan(tables.db)).rows == 2

    async def test_without_an_aggregate_nothing_of_another_is_touched(self, world: World) -> None:
        for _ in range(2):
            await world.db.execute("INSERT INTO relay.outbox (event_type, payload) VALUES ('Lost', '{}')")
        await insert(world.db, "stock/1")
        async with outbox_running(world.settings):
            await world.until_parked(3)
            assert (await world.act(Purge(Selection(event_type="Lost")))).rows == 2
            await world.until_parked(1)
        assert [r[0] for r in await world.parked()] == ["stock/1"]


class TestPause:
    @pytest.mark.parametrize(
        ("selection", "shard"),
        [
            (Selection(aggregate="order/1"), None),
            (Selection(aggregate_type="order"), None),
            (Selection(event_type="Changed"), None),
            (Selection(), 0),
        ],
        ids=["aggregate", "type", "event-type", "shard"],
    )
    async def test_holds_back_and_resume_lets_go_on_in_order(
        self, world: World, selection: Selection, shard: int | None
    ) -> None:
        async with outbox_running(world.settings):
            await insert(world.db, "order/1", count=2)
            await world.witness.wait_for(2)
            done = await world.act(Pause(selection, shard))
            assert (done.rows, done.audit_id is not None) == (1, True)
            await insert(world.db, "order/1", count=3)
            if shard is None:
                await world.until_parked(3)
            assert (await world.act(Resume(selection, shard))).rows == 1
            await insert(world.db, "order/1", count=2)
            await world.witness.wait_for_distinct(7)
            await until_empty(world)
        assert [seq for _, seq, _ in world.seen()] == [1, 2, 3, 4, 5, 6, 7]
        asked = {"shard": 0} if shard is not None else selection.as_json()
        touched = ["order/1"] if selection.aggregate else []
        assert await audits(world.db) == [
            ("outbox", "pause", asked, 1, touched),
            ("outbox", "resume", asked, 1, touched),
        ]

    async def test_twice_is_told_and_leaves_one_record(self, tables: World) -> None:
        await tables.act(Pause(Selection(aggregate="order/1")))
        done = await tables.act(Pause(Selection(aggregate="order/1")))
        assert (done.rows, done.audit_id) == (0, None)
        assert len(done.notes) == 1
        assert done.notes[0].startswith("paused already, since ")
        assert done.notes[0].endswith(" UTC by tester@here: it is a test")
        assert len(await audits(tables.db)) == 1

    async def test_twice_at_the_same_moment_leaves_one_pause(self, tables: World) -> None:
        done = await asyncio.gather(*(tables.act(Pause(Selection(aggregate_type="order"))) for _ in range(5)))
        assert sorted(d.rows for d in done) == [0, 0, 0, 0, 1]
        assert len(await audits(tables.db)) == 1

    async def test_resume_without_a_pause_names_what_is_paused(self, tables: World) -> None:
        with pytest.raises(NothingSelected, match=r"order/2 is not paused, so nothing was resumed\.$"):
            await tables.act(Resume(Selection(aggregate="order/2")))
        await tables.act(Pause(Selection(aggregate="order/1")))
        await tables.act(Pause(Selection(event_type="Paid")))
        with pytest.raises(NothingSelected, match="Paused are: order/1, all events of type Paid"):
            await tables.act(Resume(Selection(aggregate="order/2")))
        assert (await tables.act(Resume(Selection(everything=True)))).rows == 2

    async def test_an_aggregate_without_events_is_told_and_a_shard_that_is_none_refused(self, tables: World) -> None:
        await insert(tables.db, "order/2")
        plan = await Pause(Selection(aggregate="order/1")).plan(tables.db)
        assert plan.notes == ["it has no event yet: the pause holds from its first one on"]
        with pytest.raises(NothingSelected, match="there is no shard 7"):
            await tables.act(Pause(Selection(), 7))

    @pytest.mark.parametrize(
        ("selection", "shard"),
        [
            (Selection(), None),
            (Selection(aggregate="order/1"), 0),
            (Selection(aggregate_type="order", event_type="Paid"), None),
        ],
    )
    def test_is_of_exactly_one_thing(self, selection: Selection, shard: int | None) -> None:
        for act in (Pause, Resume):
            with pytest.raises(ConfigError, match="name one thing"):
                act(selection, shard)
        with pytest.raises(ConfigError, match="is a pattern: name one"):
            Pause(Selection(aggregate="order/*"))

    async def test_a_skipped_head_of_a_paused_aggregate_goes_out_when_it_is_resumed(self, world: World) -> None:
        await insert(world.db, "stock/1", count=2)
        async with outbox_running(world.settings):
            await world.until_parked(2)
            await world.act(Pause(Selection(aggregate="stock/1")))
            await until(lambda: world.db.fetchval("SELECT bool_or(state = 'paused') FROM relay.outbox_parked"))
            await world.witness.queue.bind(world.witness.exchange, "stock.#")
            await world.act(Skip(Selection(aggregate="stock/1")))
            assert [r[3] for r in await world.parked()] == ["paused", "waiting"]
            await world.act(Resume(Selection(aggregate="stock/1")))
            await world.witness.wait_for(2, timeout_s=8)
        assert [(seq, dead) for _, seq, dead in world.seen()] == [(1, True), (2, False)]

    @pytest.mark.parametrize(
        ("pause", "said"),
        [
            (Pause(Selection(aggregate="stock/9")), [NOW]),
            (Pause(Selection(aggregate="stock/1")), [NOW, "3 of them after `relay resume`: paused"]),
            (Pause(Selection(event_type="Second")), [NOW, "2 of them after `relay resume`: paused"]),
            (Pause(Selection(aggregate_type="stock")), [LATER]),
            (Pause(Selection(), 0), [LATER]),
        ],
        ids=["of another", "of one of two", "of an event type, from its first event on", "of a type", "of a shard"],
    )
    async def test_tombstones_that_wait_for_the_resume_are_told(
        self, tables: World, pause: Pause, said: list[str]
    ) -> None:
        """Also before the daemon has come to see the pause."""
        await parked(tables, "stock/1", "nacked", count=3)
        await parked(tables, "stock/2", "nacked")
        await tables.db.execute("UPDATE relay.outbox SET event_type = 'Second' WHERE seq = 2")
        await tables.act(pause)
        assert (await tables.act(Purge(Selection(cause="nacked")))).notes == said

    async def test_the_tombstone_of_a_published_number_waits_for_the_resume_as_well(self, tables: World) -> None:
        await insert(tables.db, "stock/1")
        await tables.db.execute("UPDATE relay.outbox_cursor SET snapshot = pg_current_snapshot()")
        await tables.act(Pause(Selection(aggregate="stock/1")))
        done = await tables.act(SkipNumber(Selection(aggregate="stock/1", from_seq=1, to_seq=1)))
        assert done.notes == [LATER]


async def test_parking_the_tombstone_of_a_published_row_looks_at_its_shard_only(tables: World) -> None:
    """It is done while the cursor is locked."""
    await tables.db.execute("SET enable_seqscan = off")
    await tables.db.execute("PREPARE parking AS " + query("park_tombstone"))
    plan = [r[0] for r in await tables.db.fetch("EXPLAIN EXECUTE parking (1, 0)")]
    conditions = [line for line in plan if "Cond:" in line]
    assert conditions
    assert all("shard = " in line and "id = " in line for line in conditions), plan


class TestCountedFirst:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: Retry(Selection(everything=True)),
            lambda: Skip(Selection(everything=True)),
            lambda: Purge(Selection(everything=True)),
            lambda: SkipNumber(Selection(aggregate="stock/1", from_seq=2, to_seq=2)),
            lambda: Pause(Selection(aggregate="stock/1")),
        ],
        ids=["retry", "skip", "purge", "skip-seq", "pause"],
    )
    async def test_counting_changes_nothing(self, tables: World, make: Callable[[], Act]) -> None:
        await parked(tables, "stock/1", "nacked", count=3)
        before = await contents(tables.db, *TABLES, "outbox_cursor", "outbox")
        assert (await make().plan(tables.db)).rows > 0
        assert await contents(tables.db, *TABLES, "outbox_cursor", "outbox") == before

    async def test_what_came_after_the_count_is_not_touched(self, tables: World) -> None:
        await parked(tables, "stock/1", "nacked", count=2)
        act = Purge(Selection(everything=True))
        plan = await act.plan(tables.db)
        await parked(tables, "stock/2", "nacked")
        done = await perform(tables.db, act, plan, TESTER)
        assert (done.rows, await marked(tables)) == (2, [("1", 1), ("1", 2)])
        assert await audits(tables.db) == [("outbox", "purge", {"all": True}, 2, [])]

    async def test_what_was_paused_after_the_count_is_not_retried(self, tables: World) -> None:
        await parked(tables, "stock/1", "nacked")
        await parked(tables, "stock/2", "nacked")
        act = Retry(Selection(everything=True))
        plan = await act.plan(tables.db)
        await tables.db.execute("UPDATE relay.outbox_parked SET state = 'paused' WHERE aggregate_id = '1'")
        done = await perform(tables.db, act, plan, TESTER)
        assert (done.rows, done.notes[0]) == (1, "1 row went out, or was paused, meanwhile")
        assert [r[3] for r in await tables.parked()] == ["paused", "retrying"]

    async def test_what_the_daemon_is_writing_down_as_published_is_waited_for(
        self, tables: World, database: str
    ) -> None:
        await parked(tables, "stock/1", "nacked")
        act = Skip(Selection(everything=True))
        plan = await act.plan(tables.db)
        async with connected(database) as daemon:
            transaction = daemon.transaction()
            await transaction.start()
            await daemon.execute("UPDATE relay.outbox_cursor SET high_id = high_id")  # the fence, which comes first
            await daemon.execute("DELETE FROM relay.outbox_parked")
            acting = asyncio.create_task(perform(tables.db, act, plan, TESTER))
            async with connected(database) as onlooker:
                await until(
                    lambda: onlooker.fetchval(
                        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock')"
                    )
                )
            await transaction.commit()
            with pytest.raises(NothingSelected, match=r"what was counted \(1 row\) went out meanwhile"):
                await acting
        assert await marked(tables) == []

    async def test_an_act_that_fails_leaves_neither_effect_nor_record(self, tables: World) -> None:
        await parked(tables, "stock/1", "nacked")
        await tables.db.execute("ALTER TABLE relay.outbox_tombstone ADD CHECK (id < 0)")
        before = await contents(tables.db, *TABLES)
        with pytest.raises(Exception, match="violates check constraint"):
            await tables.act(Skip(Selection(everything=True)))
        assert await contents(tables.db, *TABLES) == before


HOSTILE = [
    "a'b",
    'a"b',
    "100%",
    "a_c",
    "abc",
    "a*c",
    r"a\*c",
    r"a\c",
    "a/b/c",
    "\x1b[31mred",
    "x" * 512,
    "line\nbreak",
    "ü🙂",
    " ",
    r"\%",
    "$1",
]


class TestHostileIds:
    async def test_each_selects_exactly_itself_in_every_act(self, tables: World) -> None:
        for name in HOSTILE:
            await parked(tables, f"stock/{name}", "nacked", count=2)
        for name in HOSTILE:
            selection = Selection(aggregate=aggregate_text("stock", name))
            for act in (Retry, Skip, Purge):
                plan = await act(selection).plan(tables.db)
                assert plan.aggregates == [("stock", name)]
                assert plan.rows == (2 if act is Purge else 1)
            await tables.act(Pause(selection))
            assert (await Resume(selection).plan(tables.db)).aggregates == [("stock", name)]
            await tables.act(SkipNumber(Selection(aggregate=selection.aggregate, from_seq=2, to_seq=2)))
        assert await marked(tables) == sorted((name, 2) for name in HOSTILE)

    async def test_a_pattern_matches_as_a_pattern_and_the_rest_literally(self, tables: World) -> None:
        for name in HOSTILE:
            await parked(tables, f"stock/{name}", "nacked")
        for pattern, found in (
            ("stock/a*c", {"a_c", "abc", "a*c", r"a\*c", r"a\c", "a/b/c"}),
            ("stock/a_*", {"a_c"}),
            ("st_ck/*", set()),
            ("*/100%", {"100%"}),
            ("stock/*", set(HOSTILE)),
        ):
            try:
                plan = await Retry(Selection(aggregate=pattern)).plan(tables.db)
            except NothingSelected:
                assert not found
            else:
                assert {name for _, name in plan.aggregates} == found

    async def test_an_error_text_is_contained_literally_in_any_case(self, tables: World) -> None:
        for name, detail in (("1", "Queue 100% full"), ("2", "queue 100 is full"), ("3", None)):
            await parked(tables, f"stock/{name}", "nacked")
            await tables.db.execute("UPDATE relay.outbox_parked SET detail = $2 WHERE aggregate_id = $1", name, detail)
        plan = await Retry(Selection(error="queue 100% FULL")).plan(tables.db)
        assert plan.aggregates == [("stock", "1")]

    async def test_row_filters_look_at_the_event_itself(self, tables: World) -> None:
        await parked(tables, "stock/1", "nacked", event_type="A")
        await parked(tables, "stock/2", "nacked", event_type="B")
        await tables.db.execute("UPDATE relay.outbox SET created_at = '2026-01-01 00:00Z' WHERE aggregate_id = '2'")
        cut = await tables.db.fetchval("SELECT timestamptz '2026-01-02 00:00Z'")
        for selection, name in (
            (Selection(event_type="A"), "1"),
            (Selection(since=cut), "1"),
            (Selection(until=cut), "2"),
            (Selection(ids=(await tables.db.fetchval("SELECT id FROM relay.outbox WHERE aggregate_id = '2'"),)), "2"),
        ):
            assert (await Retry(selection).plan(tables.db)).aggregates == [("stock", name)]
        with pytest.raises(NothingSelected):
            await Retry(Selection(older_than_s=3600)).plan(tables.db)


class TestBesideTheDaemon:
    async def test_acts_at_any_moment_leave_no_hole_and_no_row_without_its_last_word(
        self, world: World, database: str, broker: str
    ) -> None:
        """Operators retry, skip, purge and pause while the daemon tries the very same rows every few milliseconds."""
        settings = settings_for(
            database, broker, outbox__retry_first_s=0.005, outbox__retry_max_s=0.01, outbox__max_attempts=1000
        )
        rng = random.Random(3)
        names = [f"{kind}/{i}" for kind in ("order", "stock") for i in range(6)]
        async with outbox_running(settings) as outbox:
            feeding = asyncio.create_task(feed(database, names, rounds=15))
            operators = [
                asyncio.create_task(operate(settings, random.Random(rng.random()), names, feeding)) for _ in range(3)
            ]
            await asyncio.gather(feeding, *operators)
            await ignoring_nothing(world.act(Resume(Selection(everything=True))))
            await world.witness.queue.bind(world.witness.exchange, "stock.#")
            await ignoring_nothing(world.act(Retry(Selection(everything=True))))
            await until_empty(world)
            assert_is_running(outbox)
        dead = {(r["n"], r["seq"]) for r in await world.db.fetch(
            "SELECT aggregate_type || '/' || aggregate_id AS n, seq FROM relay.outbox_tombstone JOIN relay.outbox USING (id)"
        )}  # fmt: skip
        words: dict[tuple[str, int], bool] = {}
        last_word: dict[tuple[str, int], int] = {}
        for position, (name, seq, is_dead) in enumerate(world.seen()):
            words[name, seq] = words.get((name, seq), False) or is_dead
            last_word[name, seq] = position
        # What a refusal in a pipelined portion let overtake comes again behind it: the last words are in order. (A tombstone may
        # be asked for again at any time.)
        for name in names:
            alive = sorted(key for key in last_word if key[0] == name and key not in dead)
            assert sorted(alive, key=last_word.__getitem__) == alive
        for name, seq in dead & words.keys():
            assert words[name, seq], f"the tombstone of {name} {seq} never came"
        for name in names:
            kind, _, i = name.partition("/")
            total = await world.db.fetchval(
                "SELECT last_seq FROM relay.outbox_aggregate WHERE aggregate_type = $1 AND aggregate_id = $2", kind, i
            )
            missing = {seq for seq in range(1, total + 1) if (name, seq) not in words}
            assert missing <= {seq for n, seq in dead if n == name}, f"{name}: lost {missing}"
            assert kind == "stock" or not missing, f"{name}: {missing} never came, though its queue was bound"
        assert dead


def assert_is_running(outbox: Outbox) -> None:
    assert not outbox.stop.is_set()


async def feed(database: str, names: list[str], *, rounds: int) -> None:
    async with connected(database) as db:
        for _ in range(rounds):
            for name in names:
                await insert(db, name)
            await asyncio.sleep(0.02)


async def operate(settings: Settings, rng: random.Random, names: list[str], feeding: asyncio.Task[None]) -> None:
    kinds: list[type[Retry | Skip | Purge | Pause | Resume]] = [Retry, Skip, Purge, Pause, Resume]
    while not feeding.done():
        name = rng.choice(names)
        acts: list[Act] = [kind(Selection(aggregate=name)) for kind in kinds]
        await ignoring_nothing(
            act_on(settings, rng.choice([*acts, Retry(Selection(everything=True)), number(name, 1)]))
        )


async def ignoring_nothing(acting: Awaitable[Done]) -> None:
    with suppress(NothingSelected):
        await acting


def number(aggregate: str, seq: int) -> SkipNumber:
    return SkipNumber(Selection(aggregate=aggregate, from_seq=seq, to_seq=seq))


async def is_published(world: World, aggregate: str, seq: int) -> bool:
    """As far as the persisted cursor knows."""
    try:
        await number(aggregate, seq).plan(world.db)
    except NothingSelected:
        return False
    return True


async def parked(
    world: World, aggregate: str, reason: str, *, state: str = "stuck", count: int = 1, event_type: str = "Changed"
) -> None:
    """Rows as the daemon parks them, without one."""
    kind, _, name = aggregate.partition("/")
    await insert(world.db, aggregate, count=count, event_type=event_type)
    await world.db.execute(
        "INSERT INTO relay.outbox_parked (id, shard, aggregate_type, aggregate_id, seq, reason, attempts, state, next_attempt_at)"
        " SELECT id, shard, aggregate_type, aggregate_id, seq, CASE seq WHEN 1 THEN $3 ELSE 'behind' END, CASE seq WHEN 1 THEN 20 ELSE 0 END, CASE seq WHEN 1 THEN $4 ELSE 'waiting' END,"
        " CASE WHEN seq = 1 AND $4 = 'retrying' THEN now() END FROM relay.outbox WHERE aggregate_type = $1 AND aggregate_id = $2",
        kind,
        name,
        reason,
        state,
    )


async def marked(world: World) -> list[tuple[str, int]]:
    rows = await world.db.fetch("SELECT aggregate_id, seq FROM relay.outbox_tombstone JOIN relay.outbox USING (id)")
    return sorted((r["aggregate_id"], r["seq"]) for r in rows)
