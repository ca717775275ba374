"""Acts on an inbox, end to end with the daemon: retry, skip, purge, over a gap, reset, dismiss. Real servers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from relay.errors import ConfigError, NothingSelected, PostgresUnavailable
from relay.inbox import Event, Inbox
from relay.operate import act as acting
from relay.operate.act import Act, Done, perform
from relay.operate.inbox_acts import Dismiss, Purge, Retry, Skip, lock_first_stored
from relay.operate.inbox_cursors import Reset, SkipThrough
from relay.operate.selection import Selection, aggregate_text
from relay.postgres.connect import Connection
from tests.harness.acts import TESTER, act_on, audits, contents
from tests.harness.outbox import connected
from tests.integration.inbox_harness import Sent, World, eventually, record, recording, stream, world

TABLES = (
    "inbox_aggregate",
    "inbox_held",
    "inbox_seen",
    "inbox_quarantine",
    "inbox_gap",
    "inbox",
    "audit",
    "audit_aggregate",
)
ALL = Selection(everything=True)


@pytest.fixture
async def shop(database: str, broker: str) -> AsyncIterator[World]:
    """A consumer whose failing messages are stuck at once: what goes on, goes on through an operator."""
    async with world(database, broker, max_attempts=1, repair=False) as made:
        yield made


@pytest.fixture
async def tables(database: str) -> AsyncIterator[World]:
    """The same without a broker: for what an act does to the tables alone."""
    async with world(database, "amqp://127.0.0.1:1/") as made:
        yield made


class Patient:
    """A handler that fails for chosen events, until it is mended."""

    def __init__(self, *poison: tuple[str, int]) -> None:
        self.poison = set(poison)
        self.inbox = Inbox("shop")
        self.inbox.on("T")(self.handle)

    async def handle(self, event: Event, tx: Connection) -> None:
        await record(event, tx)
        if (event.aggregate_id, event.seq) in self.poison:
            raise KeyError("a field that only this event lacks")


async def act(shop: World, one: Act) -> Done:
    return await act_on(shop.settings, one)


async def quarantine(shop: World) -> list[tuple[str, str | None, int | None, bytes, bool]]:
    rows = await shop.db.fetch(
        "SELECT reason, aggregate_id, seq, body, dismissed_at IS NOT NULL FROM relay.inbox_quarantine ORDER BY aggregate_id, seq, id"
    )
    return [tuple(r.values()) for r in rows]


async def cursor(shop: World, aggregate: str = "1") -> tuple[int, bool]:
    row = await shop.db.fetchrow(
        "SELECT last_seq, blocked FROM relay.inbox_aggregate WHERE aggregate_id = $1", aggregate
    )
    return (0, False) if row is None else (row["last_seq"], row["blocked"])


async def until_cursor(shop: World, seq: int, aggregate: str = "1") -> None:
    async def is_there() -> bool:
        return (await cursor(shop, aggregate))[0] == seq

    await eventually(is_there)


async def until_held(shop: World, n: int) -> None:
    async def are_held() -> bool:
        return bool(await shop.db.fetchval("SELECT count(*) = $1 FROM relay.inbox_held", n))

    await eventually(are_held)


class TestRetry:
    async def test_after_mending_the_handler_the_aggregate_goes_on_in_order(self, shop: World) -> None:
        patient = Patient(("1", 2), ("2", 1))
        async with shop.running(patient.inbox):
            await shop.publish([*stream("1", 4), *stream("2", 2)])
            await until_held(shop, 5)
            patient.poison = {("2", 1)}
            async with asyncio.timeout(5):  # at once: not at the next look of ten seconds
                done = await act(shop, Retry(Selection(aggregate="order/1")))
                await until_cursor(shop, 4)
            assert (done.rows, done.aggregates) == (1, 1)
        assert await shop.effects("1") == [1, 2, 3, 4]
        assert await shop.held() == [(1, "failed", "stuck", 1), (2, "behind", "waiting", 0)]
        assert await audits(shop.db) == [
            ("inbox", "retry", {"aggregate": "order/1", "consumer": "shop"}, 1, ["order/1"])
        ]

    async def test_what_fails_once_more_is_stuck_again(self, shop: World) -> None:
        patient = Patient(("1", 1))
        async with shop.running(patient.inbox):
            await shop.publish(stream("1", 2))
            await until_held(shop, 2)
            await act(shop, Retry(Selection(error="keyerror")))
            await shop.until(lambda s: s.failed == 2)
            assert await shop.held() == [(1, "failed", "stuck", 2), (2, "behind", "waiting", 0)]

    async def test_a_message_without_an_aggregate_is_tried_again(self, shop: World) -> None:
        patient = Patient((None, None))  # type: ignore[arg-type]
        async with shop.running(patient.inbox):
            await shop.publish([Sent(seq=None, id=1), Sent(seq=None, id=2)])
            await until_held(shop, 2)
            patient.poison = set()
            assert (await act(shop, Retry(ALL))).aggregates == 0
            await until_held(shop, 0)
        assert await shop.db.fetchval("SELECT count(*) FROM effect") == 2

    async def test_nothing_failed_is_told_with_where_to_look(self, shop: World) -> None:
        async with shop.running(recording()):
            await shop.publish(stream("1", 3)[1:])
            await until_held(shop, 2)
        with pytest.raises(NothingSelected, match=r"nothing that failed at consumer shop .*see `relay inbox gaps`"):
            await act(shop, Retry(Selection(aggregate="order/1")))


class TestSkip:
    @pytest.mark.parametrize("consumers", [1, 3])
    async def test_what_failed_is_kept_aside_and_what_waits_behind_it_is_applied(
        self, shop: World, consumers: int
    ) -> None:
        patient = Patient(("1", 2))
        async with shop.running(patient.inbox, consumers=consumers):
            await shop.publish([replace(s, body=b'{"n": %d}' % s.seq) for s in stream("1", 4) if s.seq])
            await until_held(shop, 3)
            async with asyncio.timeout(5):
                done = await act(shop, Skip(Selection(aggregate="order/1")))
                await until_cursor(shop, 4)
            assert (done.rows, done.aggregates) == (1, 1)
            await shop.publish([*stream("1", 2)[1:], Sent(seq=5)])  # a late copy of what was skipped changes nothing
            await until_cursor(shop, 5)
        assert await shop.effects("1") == [1, 3, 4, 5]
        assert await shop.held() == []
        assert await quarantine(shop) == [("skipped", "1", 2, b'{"n": 2}', True)]
        assert (
            await shop.db.fetchval("SELECT detail FROM relay.inbox_quarantine")
            == "skipped by tester@here: it is a test"
        )
        assert await audits(shop.db) == [
            ("inbox", "skip", {"aggregate": "order/1", "consumer": "shop"}, 1, ["order/1"])
        ]

    async def test_what_was_given_up_before_is_not_given_up_again(self, tables: World) -> None:
        await failed(tables, "1")
        await act(tables, Skip(ALL))
        with pytest.raises(NothingSelected):
            await act(tables, Skip(ALL))
        assert (await act(tables, Purge(ALL))).rows == 1  # what waits behind it
        assert [q[0] for q in await quarantine(tables)] == ["skipped", "purged"]

    async def test_by_error_takes_the_failed_ones_only(self, shop: World) -> None:
        patient = Patient(("1", 1), ("2", 1))
        async with shop.running(patient.inbox):
            await shop.publish([*stream("1", 2), *stream("2", 2), Sent(seq=2, aggregate="3")])
            await until_held(shop, 5)
            assert (await act(shop, Skip(Selection(error="KeyError")))).rows == 2
            await until_cursor(shop, 2, "1")
            await until_cursor(shop, 2, "2")
        assert await shop.held() == [(2, "early", "waiting", 0)]

    async def test_without_an_aggregate_it_is_only_set_aside(self, shop: World) -> None:
        patient = Patient((None, None))  # type: ignore[arg-type]
        async with shop.running(patient.inbox):
            await shop.publish([Sent(seq=None, id=1)])
            await until_held(shop, 1)
            await act(shop, Skip(ALL))
            await until_held(shop, 0)
            await shop.publish([Sent(seq=None, id=1)])
            await shop.until(lambda s: s.duplicates == 1)
        assert [q[:3] for q in await quarantine(shop)] == [("skipped", None, None)]

    async def test_under_latest_it_is_passed_over_too(self, database: str, broker: str) -> None:
        async with world(database, broker, max_attempts=1, policy="latest", repair=False) as shop:
            patient = Patient(("1", 3))
            async with shop.running(patient.inbox):
                await shop.publish([Sent(seq=1), Sent(seq=3)])
                await until_held(shop, 1)
                await act(shop, Skip(ALL))
                await until_cursor(shop, 3)
                await until_held(shop, 0)
            assert await shop.effects() == [1]


class TestPurge:
    async def test_all_that_is_held_is_passed_over_and_new_events_are_applied(self, shop: World) -> None:
        patient = Patient(("1", 1))
        async with shop.running(patient.inbox):
            await shop.publish(stream("1", 150))
            await until_held(shop, 150)
            async with asyncio.timeout(5):
                assert (await act(shop, Purge(Selection(aggregate="order/1")))).rows == 150
                await until_cursor(shop, 150)
            await shop.publish([Sent(seq=151)])
            await until_cursor(shop, 151)
        assert await shop.effects() == [151]
        assert [q[:3] for q in await quarantine(shop)] == [("purged", "1", n) for n in range(1, 151)]

    async def test_a_gap_remains_and_is_told_until_what_is_missing_comes(self, shop: World) -> None:
        async with shop.running(recording()):
            await shop.publish(stream("1", 4)[1:])
            await until_held(shop, 3)
            plan = await Purge(Selection(cause="gap")).plan(shop.db)
            assert plan.notes == [
                "1 aggregate of these still miss numbers before what is held: a purge does not fill a gap, `relay inbox skip TYPE/ID"
                " --through N` passes over it"
            ]
            await act(shop, Purge(Selection(cause="gap")))
            assert await cursor(shop) == (0, False)
            await shop.publish([Sent(seq=1), Sent(seq=5)])
            await until_cursor(shop, 5)
        assert await shop.effects() == [1, 5]

    async def test_a_cause_describes_the_head_and_takes_what_waits_behind_it(self, shop: World) -> None:
        patient = Patient(("1", 1))
        async with shop.running(patient.inbox):
            await shop.publish([*stream("1", 3), Sent(seq=2, aggregate="2"), Sent(seq=3, aggregate="2")])
            await until_held(shop, 5)
            assert (await Purge(Selection(cause="failed")).plan(shop.db)).aggregates == [("order", "1")]
            assert (await Purge(Selection(cause="failed")).plan(shop.db)).rows == 3
            assert (await Purge(Selection(cause="early")).plan(shop.db)).rows == 2
            assert (await Purge(ALL).plan(shop.db)).rows == 5


class TestOverAGap:
    async def test_the_cursor_moves_and_what_follows_is_applied(self, shop: World) -> None:
        async with shop.running(recording()):
            await shop.publish([Sent(seq=1), *stream("1", 6)[3:]])
            await until_held(shop, 3)
            await gap(shop, to_seq=3)
            one = SkipThrough(Selection(aggregate="order/1"), 3)
            plan = await one.plan(shop.db)
            assert (plan.rows, plan.notes) == (2, ["consumer shop has applied order/1 up to 1"])
            async with asyncio.timeout(5):
                done = await act(shop, one)
                await until_cursor(shop, 6)
            assert done.notes == ["the cursor is at 3; the inbox goes on with 4"]
            await shop.publish([*stream("1", 3)[1:], Sent(seq=7)])  # what was given up comes after all
            await until_cursor(shop, 7)
        assert await shop.effects() == [1, 4, 5, 6, 7]
        assert await shop.db.fetchval("SELECT count(*) FROM relay.inbox_gap") == 0
        assert await audits(shop.db) == [
            ("inbox", "skip", {"aggregate": "order/1", "consumer": "shop", "through": 3}, 2, ["order/1"])
        ]

    async def test_what_is_held_up_to_there_goes_to_the_quarantine_and_the_rest_of_a_gap_is_asked_for(
        self, shop: World
    ) -> None:
        async with shop.running(recording()):
            await shop.publish([Sent(seq=1), Sent(seq=3), Sent(seq=4)])
            await until_held(shop, 2)
            await gap(shop, to_seq=9, state="stuck")
            plan = await SkipThrough(Selection(aggregate="order/1"), 3).plan(shop.db)
            assert plan.notes[1] == "1 held message up to 3 will not be applied either"
            assert (await act(shop, SkipThrough(Selection(aggregate="order/1"), 3))).rows == 2
            await until_cursor(shop, 4)
        assert await shop.effects() == [1, 4]
        assert [q[:3] for q in await quarantine(shop)] == [("skipped", "1", 3)]
        assert await shop.db.fetchval("SELECT state FROM relay.inbox_gap WHERE to_seq = 9") == "open"

    async def test_a_mark_alone_is_enough_to_know_what_is_missing(self, shop: World) -> None:
        await gap(shop, to_seq=2)
        await act(shop, SkipThrough(Selection(aggregate="order/1"), 2))
        assert await cursor(shop) == (2, False)
        async with shop.running(recording()):
            await shop.publish([Sent(seq=3)])
            await until_cursor(shop, 3)

    async def test_what_is_still_to_come_is_not_skipped(self, tables: World) -> None:
        await gap(tables, to_seq=4)
        with pytest.raises(
            NothingSelected, match="nothing of order/1 is known beyond 4, so skipping through 5 would drop events"
        ):
            await act(tables, SkipThrough(Selection(aggregate="order/1"), 5))
        await act(tables, SkipThrough(Selection(aggregate="order/1"), 4))
        with pytest.raises(NothingSelected, match="has applied order/1 up to 4 already"):
            await act(tables, SkipThrough(Selection(aggregate="order/1"), 4))
        with pytest.raises(NothingSelected, match="has never heard of order/2"):
            await act(tables, SkipThrough(Selection(aggregate="order/2"), 1))

    @pytest.mark.parametrize("through", [-1, 0, 2**63 - 1, 2**63])
    def test_a_number_that_no_cursor_can_have_is_refused(self, through: int) -> None:
        with pytest.raises(ConfigError, match="a number from 1 to 9223372036854775806 is meant"):
            SkipThrough(Selection(aggregate="order/1"), through)

    async def test_the_highest_number_of_a_cursor_can_be_passed_over(self, tables: World) -> None:
        await gap(tables, to_seq=2**63 - 2)
        await act(tables, SkipThrough(Selection(aggregate="order/1"), 2**63 - 2))
        assert await cursor(tables) == (2**63 - 2, False)

    async def test_two_sources_are_told_apart(self, tables: World) -> None:
        await gap(tables, to_seq=2)
        await gap(tables, to_seq=2, source="other")
        with pytest.raises(ConfigError, match=r"order/1 comes from several sources \(other, shop\): say --source NAME"):
            await act(tables, SkipThrough(Selection(aggregate="order/1"), 2))
        await act(tables, SkipThrough(Selection(aggregate="order/1", source="other"), 2))
        assert await tables.db.fetchval("SELECT array_agg(source) FROM relay.inbox_gap") == ["shop"]

    @pytest.mark.parametrize(
        "selection", [ALL, Selection(aggregate="order/*"), Selection(aggregate="order/1", cause="gap")]
    )
    def test_is_of_one_aggregate(self, selection: Selection) -> None:
        with pytest.raises(ConfigError, match="--through moves the cursor of one aggregate"):
            SkipThrough(selection, 2)


class TestReset:
    async def test_what_is_published_again_rebuilds_exactly_what_was_there(self, shop: World) -> None:
        history = [*stream("1", 30), *stream("2", 20), *(Sent(seq=None, id=n) for n in range(1, 6))]
        async with shop.running(recording(), consumers=2):
            await shop.publish(history)
            await shop.until(lambda s: s.applied == 55)
        before = await effects(shop)
        await shop.db.execute("TRUNCATE effect")
        done = await act(shop, Reset(Selection(everything=True, consumer="shop")))
        assert (done.rows, done.aggregates) == (2, 2)
        assert done.notes == ["next: `relay replay --all --to-queue shop` at the producer sends the events again"]
        async with shop.running(recording(), consumers=2):
            random.Random(1).shuffle(history)
            await shop.publish([*history, *history])
            await shop.until(lambda s: s.applied == 110 and s.received == 55 + 110)
        assert await effects(shop) == before
        assert await shop.effects("1") == list(range(1, 31))
        assert await shop.held() == []
        assert await audits(shop.db) == [("inbox", "reset", {"all": True, "consumer": "shop", "to": 0}, 2, [])]

    async def test_what_is_held_stays_and_waits_again_as_early(self, shop: World) -> None:
        patient = Patient(("1", 5))
        async with shop.running(patient.inbox):
            await shop.publish(stream("1", 6))
            await until_held(shop, 2)
        await act(shop, Reset(Selection(aggregate="order/1"), to=2))
        assert await cursor(shop) == (2, False)
        assert await shop.held() == [(5, "early", "waiting", 0), (6, "early", "waiting", 0)]
        patient.poison = set()
        async with shop.running(patient.inbox):
            await shop.publish(stream("1", 4))  # 1 and 2 are duplicates
            await until_cursor(shop, 6)
        assert await shop.effects() == [1, 2, 3, 4, 3, 4, 5, 6]

    async def test_of_one_type_leaves_the_others_and_never_moves_forward(self, shop: World) -> None:
        async with shop.running(recording()):
            await shop.publish(
                [*stream("1", 5), *stream("2", 2), *stream("3", 5, aggregate_type="stock"), Sent(seq=None, id=1)]
            )
            await shop.until(lambda s: s.applied == 13)
        assert (await act(shop, Reset(Selection(aggregate_type="order"), to=3))).rows == 1
        assert [(await cursor(shop, n))[0] for n in ("1", "2", "3")] == [3, 2, 5]
        assert await shop.db.fetchval("SELECT count(*) FROM relay.inbox_seen") == 1
        with pytest.raises(NothingSelected, match="no cursor of consumer shop beyond 3 is selected"):
            await act(shop, Reset(Selection(aggregate_type="order"), to=3))

    async def test_what_was_stored_and_not_taken_is_not_there_twice(self, tables: World) -> None:
        await stored(tables, 1, 2, 3)
        await cursors(tables, "1", 3)
        done = await act(tables, Reset(Selection(aggregate="order/1"), to=1))
        assert done.notes[0] == "2 stored messages that nobody had taken were removed: they are stored again"
        assert await tables.db.fetchval("SELECT array_agg(seq) FROM relay.inbox") == [1]

    async def test_what_was_stored_of_other_aggregates_stays(self, tables: World) -> None:
        """Beyond a cursor is also what came by policy none, where a cursor was left by another policy."""
        for name in ("1", "2"):
            await stored(tables, 4, aggregate=name)
            await cursors(tables, name, 3)
        await act(tables, Reset(Selection(aggregate="order/1")))
        assert await tables.db.fetchval("SELECT array_agg(aggregate_id) FROM relay.inbox") == ["2"]

    async def test_of_everything_stores_what_comes_without_order_once(self, database: str, broker: str) -> None:
        history = [*stream("1", 3), *stream("2", 2, aggregate_type="stock"), Sent(seq=None, id=1)]
        async with world(database, broker, mode="store", policies={"order": "none"}) as shop:
            async with shop.running(Inbox("shop")):
                await shop.publish(history)
                await shop.until(lambda s: s.applied == 6)
            done = await act(shop, Reset(ALL))
            assert done.notes[0] == "6 stored messages that nobody had taken were removed: they are stored again"
            async with shop.running(Inbox("shop")):
                await shop.publish(history)
                await shop.until(lambda s: s.applied == 12)
            assert await shop.db.fetchval("SELECT count(*) FROM relay.inbox") == 6

    async def test_of_a_consumer_that_has_only_events_without_order(self, database: str, broker: str) -> None:
        history = [*stream("1", 3), Sent(seq=None, id=1)]
        async with world(database, broker, policies={"order": "none"}) as shop, shop.running(recording()):
            await shop.publish(history)
            await shop.until(lambda s: s.applied == 4)
            for selection in (Selection(aggregate_type="order"), Selection(aggregate="order/1")):
                with pytest.raises(NothingSelected, match="no cursor of consumer shop is selected"):
                    await act(shop, Reset(selection))
            plan = await Reset(replace(ALL, consumer="shop")).plan(shop.db)
            assert (plan.rows, plan.unit) == (4, "event without order")
            done = await act(shop, Reset(replace(ALL, consumer="shop")))
            assert (done.rows, done.aggregates) == (4, 0)
            await shop.publish(history)
            await shop.until(lambda s: s.applied == 8)
            with pytest.raises(NothingSelected, match="no cursor of consumer shop beyond 1 is selected"):
                await act(shop, Reset(replace(ALL, consumer="shop"), to=1))

    async def test_the_count_names_a_sample_only(self, tables: World) -> None:
        for n in range(30):
            await cursors(tables, f"{n:02}", 1)
        plan = await Reset(ALL).plan(tables.db)
        assert (plan.rows, plan.touched, len(plan.aggregates)) == (30, 30, acting.SAMPLE)


class TestDismiss:
    async def test_a_conflict_that_was_looked_at_does_not_count_any_more_and_stays(self, shop: World) -> None:
        async with shop.running(recording()):
            await shop.publish([Sent(seq=1), Sent(seq=1, body=b'{"other": 1}')])
            await shop.until(lambda s: s.quarantined == 1)
        assert (await act(shop, Dismiss(Selection(cause="conflict")))).rows == 1
        assert await quarantine(shop) == [("conflict", "1", 1, b'{"other": 1}', True)]
        with pytest.raises(NothingSelected, match="nothing in the quarantine of consumer shop is selected"):
            await act(shop, Dismiss(Selection(cause="conflict")))
        assert await audits(shop.db) == [
            ("inbox", "dismiss", {"cause": "conflict", "consumer": "shop"}, 1, ["order/1"])
        ]


class TestStoreMode:
    async def test_retry_lets_it_be_taken_now_and_tells_takers_that_sleep(self, tables: World) -> None:
        ids = await stored(tables, 1, 2)
        await tables.db.execute("SELECT relay.inbox_fail($1, 'no such customer', NULL)", ids[0])
        assert await taken(tables) == []
        woken = asyncio.Event()
        async with connected(tables.dsn) as taker:
            await taker.add_listener("relay_inbox", lambda *_: woken.set())
            for selection in (Selection(cause="taken"), Selection(state="stuck"), Selection(error="customer")):
                assert (await Retry(selection).plan(tables.db)).stored_ids == ids[:1]
            done = await act(tables, Retry(Selection(aggregate="order/1")))
            assert (done.rows, done.aggregates) == (1, 1)
            async with asyncio.timeout(5):
                await woken.wait()
        assert await taken(tables) == [1, 2]

    async def test_skip_sets_it_aside_and_what_waits_behind_it_can_be_taken(self, tables: World) -> None:
        ids = await stored(tables, 1, 2, 3)
        await tables.db.execute("SELECT relay.inbox_fail($1, 'broken', '1 hour')", ids[1])
        assert (await act(tables, Skip(Selection(cause="taken")))).rows == 1
        assert await taken(tables) == [1, 3]
        assert [q[:3] for q in await quarantine(tables)] == [("skipped", "1", 2)]

    async def test_a_taker_at_work_on_the_aggregate_is_waited_for(self, tables: World) -> None:
        ids = await stored(tables, 1, 2, 3)
        await tables.db.execute("SELECT relay.inbox_fail($1, 'broken', '1 hour')", ids[1])
        async with connected(tables.dsn) as taker:
            transaction = taker.transaction()
            await transaction.start()
            assert [r["seq"] for r in await taker.fetch("SELECT seq FROM relay.inbox_take(10)")] == [1]
            skipping = asyncio.create_task(act(tables, Skip(Selection(cause="taken"))))
            await eventually(lambda: waits_for_a_lock(tables))
            await transaction.commit()
            assert (await skipping).rows == 1
        assert await taken(tables) == [3]

    @pytest.mark.parametrize("others", [False, True])
    async def test_no_taker_gets_in_between_when_the_one_that_was_waited_for_took_the_first(
        self, tables: World, *, others: bool
    ) -> None:
        """What was waited for is gone; its successor is to be locked, too, before anything is deleted."""
        ids = await stored(tables, 1, 2, 3)
        ids = ids[2:] + (await stored(tables, 1, 2, aggregate="2") if others else [])
        async with connected(tables.dsn) as taker, connected(tables.dsn) as operator:
            taking, acting = taker.transaction(), operator.transaction()
            await taking.start()
            await acting.start()
            assert [r["seq"] for r in await taker.fetch("SELECT seq FROM relay.inbox_take(1)")] == [1]
            locking = asyncio.create_task(lock_first_stored(operator, "shop", ids))
            await eventually(lambda: waits_for_a_lock(tables))
            await taking.commit()
            await locking
            assert await taken(tables) == []
            await acting.rollback()
        assert await taken(tables) == [2, 3, *([1, 2] if others else [])]

    async def test_takers_that_are_never_done_are_told(self, tables: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("relay.operate.inbox_acts.LOCK_WAIT_S", -1.0)
        ids = await stored(tables, 1, 2)
        async with connected(tables.dsn) as taker, connected(tables.dsn) as operator:
            taking = taker.transaction()
            await taking.start()
            assert [r["seq"] for r in await taker.fetch("SELECT seq FROM relay.inbox_take(1)")] == [1]
            async with operator.transaction():
                locking = asyncio.create_task(lock_first_stored(operator, "shop", ids))
                await eventually(lambda: waits_for_a_lock(tables))
                await taking.commit()
                with pytest.raises(PostgresUnavailable, match="takers have been at work on these stored messages"):
                    await locking

    async def test_purge_sets_aside_what_was_given_back_and_all_that_waits_behind(self, tables: World) -> None:
        ids = await stored(tables, 1, 2, 3, 4)
        await stored(tables, 1, aggregate="2")
        await tables.db.execute("SELECT relay.inbox_fail($1, 'broken', NULL)", ids[1])
        with pytest.raises(NothingSelected):
            await act(tables, Purge(Selection(aggregate="order/1", error="mended")))
        done = await act(tables, Purge(Selection(aggregate="order/1", error="broken")))
        assert (done.rows, done.aggregates) == (3, 1)
        assert [q[:3] for q in await quarantine(tables)] == [("purged", "1", n) for n in (2, 3, 4)]
        assert await taken(tables) == [1, 1]

    async def test_an_id_that_names_two_things_is_refused(self, tables: World) -> None:
        ids = await stored(tables, 1)
        await tables.db.execute("SELECT relay.inbox_fail($1, 'broken', NULL)", ids[0])
        await failed(tables, "2", id=ids[0])
        with pytest.raises(ConfigError, match="--id names a held and a stored message"):
            await act(tables, Skip(Selection(ids=(ids[0],))))
        assert (await Skip(Selection(ids=(ids[0],), cause="taken")).plan(tables.db)).stored_ids == ids


class TestOneConsumer:
    async def test_several_in_a_database_must_be_told_apart(self, tables: World) -> None:
        await failed(tables, "1")
        await failed(tables, "1", consumer="billing")
        with pytest.raises(ConfigError, match=r"several consumers .*\(billing, shop\).*: say --consumer NAME"):
            await act(tables, Skip(ALL))
        await act(tables, Skip(Selection(everything=True, consumer="billing")))
        assert await tables.db.fetchval("SELECT array_agg(consumer) FROM relay.inbox_quarantine") == ["billing"]
        assert await tables.db.fetchval("SELECT array_agg(consumer) FROM relay.inbox_held WHERE state = 'stuck'") == [
            "shop"
        ]

    async def test_the_only_one_need_not_be_named(self, tables: World) -> None:
        await cursors(tables, "1", 1)
        assert (await Reset(ALL).plan(tables.db)).consumer == "shop"

    async def test_none_is_told(self, tables: World) -> None:
        with pytest.raises(
            NothingSelected, match=r"no consumer has its inbox in this database.*Is this postgres\.dsn the consumer's\?"
        ):
            await act(tables, Skip(ALL))


class TestCountedFirst:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: Retry(ALL),
            lambda: Skip(ALL),
            lambda: Purge(ALL),
            lambda: Reset(ALL),
            lambda: SkipThrough(Selection(aggregate="order/9"), 2),
            lambda: Dismiss(ALL),
        ],
        ids=["retry", "skip", "purge", "reset", "skip-through", "dismiss"],
    )
    async def test_counting_changes_nothing(self, tables: World, make: Callable[[], Act]) -> None:
        await everything(tables)
        before = await contents(tables.db, *TABLES)
        assert (await make().plan(tables.db)).rows > 0
        assert await contents(tables.db, *TABLES) == before

    async def test_what_came_after_the_count_is_not_touched(self, tables: World) -> None:
        await failed(tables, "1")
        one = Skip(ALL)
        plan = await one.plan(tables.db)
        await failed(tables, "2")
        assert (await perform(tables.db, one, plan, TESTER)).rows == 1
        assert [q[1] for q in await quarantine(tables)] == ["1"]

    @pytest.mark.parametrize("kind", [Retry, Skip])
    async def test_what_does_not_count_as_failed_any_more_is_left_alone(self, tables: World, kind: type[Act]) -> None:
        await failed(tables, "1")
        one = kind(ALL)
        plan = await one.plan(tables.db)
        await tables.db.execute("UPDATE relay.inbox_held SET reason = 'early', state = 'waiting'")  # as a reset does
        with pytest.raises(NothingSelected, match=r"what was counted \(1 message\) went through meanwhile"):
            await perform(tables.db, one, plan, TESTER)

    async def test_what_went_through_meanwhile_is_told_and_when_it_was_all_nothing_is_recorded(
        self, tables: World
    ) -> None:
        await failed(tables, "1")
        await failed(tables, "2")
        one = Retry(ALL)
        plan = await one.plan(tables.db)
        await tables.db.execute("DELETE FROM relay.inbox_held WHERE aggregate_id = '1'")
        assert (await perform(tables.db, one, plan, TESTER)).notes[0] == "1 message went through meanwhile"
        await tables.db.execute("DELETE FROM relay.inbox_held")
        with pytest.raises(NothingSelected, match=r"what was counted \(2 messages\) went through meanwhile"):
            await perform(tables.db, one, plan, TESTER)
        assert len(await audits(tables.db)) == 1

    async def test_an_act_that_fails_leaves_neither_effect_nor_record(self, tables: World) -> None:
        await everything(tables)
        await tables.db.execute("ALTER TABLE relay.audit ADD CHECK (id < 0)")
        before = await contents(tables.db, *TABLES)
        for one in (
            Retry(ALL),
            Skip(ALL),
            Purge(ALL),
            Reset(ALL),
            SkipThrough(Selection(aggregate="order/9"), 2),
            Dismiss(ALL),
        ):
            with pytest.raises(PostgresUnavailable, match="check constraint"):
                await act(tables, one)
        assert await contents(tables.db, *TABLES) == before


HOSTILE = [
    "a'b",
    'a"b',
    "100%",
    "a_c",
    "abc",
    "a*c",
    r"a\*c",
    "a/b/c",
    "\x1b[31mred",
    "x" * 512,
    "line\nbreak",
    "ü🙂",
    " ",
    "$1",
]


async def test_a_hostile_id_selects_exactly_itself_in_every_act(tables: World) -> None:
    for name in HOSTILE:
        await failed(tables, name)
        await gap(tables, to_seq=5, aggregate=name)
        await strange(tables, name)
    for name in HOSTILE:
        selection = Selection(aggregate=aggregate_text("order", name))
        for kind in (Retry, Skip, Purge, Dismiss, Reset):
            if kind is Reset:
                await cursors(tables, name, 1)
            assert (await kind(selection).plan(tables.db)).aggregates == [("order", name)]
        await act(tables, SkipThrough(selection, 5))
        await act(tables, Dismiss(selection))
    assert await tables.db.fetchval("SELECT array_agg(DISTINCT last_seq) FROM relay.inbox_aggregate") == [5]
    assert await tables.db.fetchval("SELECT count(*) FROM relay.inbox_quarantine WHERE dismissed_at IS NULL") == 0
    assert [a[4] for a in await audits(tables.db)] == [[f"order/{name}"] for name in HOSTILE for _ in range(2)]


class TestBesideTheDaemon:
    async def test_an_act_waits_for_a_handler_and_does_what_is_left_to_do(self, shop: World) -> None:
        entered, leave = asyncio.Event(), asyncio.Event()
        inbox = Inbox("shop")

        @inbox.on("T")
        async def slowly(event: Event, tx: Connection) -> None:
            await record(event, tx)
            if event.seq == 1 and (event.aggregate_id == "2" or not mended.is_set()):
                raise KeyError("at first")
            if event.seq == 1:
                entered.set()
                await leave.wait()

        mended = asyncio.Event()
        async with shop.running(inbox):
            await shop.publish([*stream("1", 2), *stream("2", 2)])
            await until_held(shop, 4)
            one = Skip(ALL)
            plan = await one.plan(shop.db)
            assert plan.rows == 2
            mended.set()
            await act(shop, Retry(Selection(aggregate="order/1")))
            await entered.wait()  # its transaction holds the cursor of order/1
            async with connected(shop.dsn) as operator:
                skipping = asyncio.create_task(perform(operator, one, plan, TESTER))
                await eventually(lambda: waits_for_a_lock(shop))
                leave.set()
                done = await skipping
            assert (done.rows, done.notes[0]) == (1, "1 message went through meanwhile")
            await until_cursor(shop, 2, "1")
            await until_cursor(shop, 2, "2")
        assert (await shop.effects("1"), await shop.effects("2")) == ([1, 2], [2])

    async def test_a_daemon_that_holds_a_cursor_for_too_long_is_told(
        self, tables: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(acting, "LOCK_WAIT_S", 0.1)
        await failed(tables, "1")
        async with connected(tables.dsn) as other, other.transaction():
            await other.execute("SELECT FROM relay.inbox_aggregate FOR UPDATE")
            with pytest.raises(
                PostgresUnavailable,
                match=r"skip: a daemon has been at work .* for more than 0\.1 s .*nothing was changed",
            ):
                await act(tables, Skip(ALL))

    async def test_acts_at_any_moment_leave_every_aggregate_in_order_and_exactly_once(
        self, database: str, broker: str
    ) -> None:
        """Operators retry, skip, purge and pass over gaps while three consumers fail at random, get copies and miss numbers."""
        async with world(database, broker, retry_first_s=0.005, retry_max_s=0.01, max_attempts=3, repair=False) as shop:
            rng = random.Random(7)
            names = [str(n) for n in range(8)]
            inbox = Inbox("shop")
            mended = asyncio.Event()

            @inbox.on("T")
            async def unreliably(event: Event, tx: Connection) -> None:
                await record(event, tx)
                if not mended.is_set() and rng.random() < 0.15:
                    raise ValueError("now and then")

            async with shop.running(inbox, consumers=3):
                feeding = asyncio.create_task(feed(shop, names, rng))
                operators = [asyncio.create_task(operate(shop, names, random.Random(n), feeding)) for n in range(3)]
                missing = await feeding
                await asyncio.gather(*operators)
                mended.set()
                for name, numbers in missing.items():
                    await shop.publish([Sent(seq=n, aggregate=name) for n in numbers])

                async def is_through() -> bool:
                    with suppress(NothingSelected):
                        await act(shop, Retry(ALL))
                    return all([(await cursor(shop, name))[0] == 60 for name in names])

                await eventually(is_through)
                await until_held(shop, 0)
            given_up = {(q[1], q[2]) for q in await quarantine(shop)}
            skips = await shop.db.fetch(
                "SELECT selection ->> 'aggregate' AS a, selection ->> 'through' AS n FROM relay.audit WHERE act = 'skip'"
            )
            passed = {str(r["a"]).removeprefix("order/"): int(r["n"]) for r in skips if r["n"] is not None}
            for name in names:
                did = await shop.effects(name)
                assert did == sorted(set(did)), f"{name}: {did}"
                lost = set(range(1, 61)) - set(did)
                assert all((name, n) in given_up or n <= passed.get(name, 0) for n in lost), f"{name}: lost {lost}"
            assert given_up


async def feed(shop: World, names: list[str], rng: random.Random) -> dict[str, list[int]]:
    """Rounds of events, some twice, some out of order, some not at all: those are returned."""
    missing: dict[str, list[int]] = {name: [] for name in names}
    for first in range(1, 61, 10):
        batch = []
        for name in names:
            for seq in range(first, first + 10):
                if rng.random() < 0.05:
                    missing[name].append(seq)
                else:
                    batch += [Sent(seq=seq, aggregate=name)] * rng.choice((1, 1, 2))
        rng.shuffle(batch)
        await shop.publish(batch)
        await asyncio.sleep(0.1)
    return missing


async def operate(shop: World, names: list[str], rng: random.Random, feeding: asyncio.Task[Any]) -> None:
    while not feeding.done():
        one = Selection(aggregate=f"order/{rng.choice(names)}", consumer="shop")
        acts: list[Act] = [
            Retry(one),
            Skip(one),
            Purge(one),
            SkipThrough(one, rng.randrange(1, 60)),
            Retry(replace(ALL, consumer="shop")),
        ]
        await ignoring_nothing(act(shop, rng.choice(acts)))


async def ignoring_nothing(doing: Awaitable[Done]) -> None:
    with suppress(NothingSelected):
        await doing


async def effects(shop: World) -> list[tuple[Any, ...]]:
    rows = await shop.db.fetch("SELECT aggregate, seq, event_type, count(*) FROM effect GROUP BY 1, 2, 3 ORDER BY 1, 2")
    return [tuple(r.values()) for r in rows]


async def waits_for_a_lock(shop: World) -> bool:
    return bool(
        await shop.db.fetchval(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%$1%')"
        )
    )


async def gap(shop: World, *, to_seq: int, aggregate: str = "1", source: str = "shop", state: str = "open") -> None:
    """As the daemon notes one."""
    await shop.db.execute(
        "INSERT INTO relay.inbox_gap (consumer, source, aggregate_type, aggregate_id, to_seq, found_by, state, next_ask_at)"
        " VALUES ('shop', $1, 'order', $2, $3, 'mark', $4, CASE $4 WHEN 'open' THEN now() + interval '1 hour' END)"
        " ON CONFLICT (aggregate_id, aggregate_type, source, consumer) DO UPDATE SET to_seq = excluded.to_seq, state = excluded.state,"
        " next_ask_at = excluded.next_ask_at",
        source,
        aggregate,
        to_seq,
        state,
    )


async def cursors(shop: World, aggregate: str, seq: int) -> None:
    await shop.db.execute(
        "INSERT INTO relay.inbox_aggregate (consumer, source, aggregate_type, aggregate_id, last_seq) VALUES ('shop', 'shop', 'order', $1, $2)"
        " ON CONFLICT (aggregate_id, aggregate_type, source, consumer) DO UPDATE SET last_seq = $2",
        aggregate,
        seq,
    )


async def failed(shop: World, aggregate: str, *, consumer: str = "shop", id: int | None = None) -> None:
    """A stuck head with one message behind it, as the daemon leaves them."""
    await shop.db.execute(
        "INSERT INTO relay.inbox_aggregate (consumer, source, aggregate_type, aggregate_id, last_seq, blocked) VALUES ($1, 'shop', 'order', $2, 0, true)",
        consumer,
        aggregate,
    )
    await shop.db.execute(
        "INSERT INTO relay.inbox_held (id, consumer, source, aggregate_type, aggregate_id, seq, message_id, event_type, content_type, body, digest,"
        " reason, state, attempts, error)"
        " OVERRIDING SYSTEM VALUE SELECT coalesce($3, nextval(pg_get_serial_sequence('relay.inbox_held', 'id'))), $1, 'shop', 'order', $2, n, n::text,"
        " 'T', 'application/json', '{}', '\\x00', CASE n WHEN 1 THEN 'failed' ELSE 'behind' END, CASE n WHEN 1 THEN 'stuck' ELSE 'waiting' END, 1, 'KeyError'"
        " FROM generate_series(1, CASE WHEN $3::bigint IS NULL THEN 2 ELSE 1 END) AS n",
        consumer,
        aggregate,
        id,
    )


async def stored(shop: World, *seqs: int, aggregate: str = "1") -> list[int]:
    """As the sidecar stores them."""
    rows = await shop.db.fetch(
        "INSERT INTO relay.inbox (consumer, source, aggregate_type, aggregate_id, seq, event_type, message_id, content_type, headers, body)"
        " SELECT 'shop', 'shop', 'order', $2, n, 'T', n::text, 'application/json', '{}', '{}' FROM unnest($1::bigint[]) AS n RETURNING id",
        seqs,
        aggregate,
    )
    return [r["id"] for r in rows]


async def taken(shop: World) -> list[int]:
    return [r["seq"] for r in await shop.db.fetch("SELECT seq FROM relay.inbox_take(10)")]


async def strange(shop: World, aggregate: str) -> None:
    await shop.db.execute(
        "INSERT INTO relay.inbox_quarantine (consumer, reason, detail, exchange, routing_key, properties, body)"
        " VALUES ('shop', 'conflict', 'd', '', '', jsonb_build_object('aggregate_type', 'order', 'aggregate_id', $1::text), '')",
        aggregate,
    )


async def everything(shop: World) -> None:
    """Something for every act."""
    await failed(shop, "1")
    await cursors(shop, "8", 3)
    await gap(shop, to_seq=2, aggregate="9")
    await strange(shop, "1")
    await shop.db.execute("SELECT relay.inbox_fail($1, 'broken', NULL)", (await stored(shop, 1, 2))[0])
    await shop.db.execute("INSERT INTO relay.inbox_seen (consumer, source, message_id) VALUES ('shop', 'shop', 'm')")
