"""Pauses in the outbox daemon: what is paused waits in order, everybody else flows on, and a resume is heard at once."""

from __future__ import annotations

import asyncio
import json
from itertools import product
from typing import Any, TypeAlias

import asyncpg
import pytest
from structlog.testing import capture_logs

from relay.daemon import Outbox
from relay.operate.outbox_acts import Purge, Retry
from relay.operate.selection import Selection
from relay.outbox.pause import Pauses
from relay.outbox.store import Store
from relay.outbox.wakeup import WAKE_LOCK, Wakeup
from relay.postgres.queries import query
from tests.harness.acts import act_on
from tests.harness.audit import audit
from tests.harness.outbox import (
    RelayProcess,
    connected,
    insert,
    outbox_running,
    settings_for,
    shard_of,
    until,
    wait_until,
)
from tests.unit.test_parking import rows

Db: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

LONG_S = 3600.0
"""A poll interval, and a delay of retries, that no test survives: whatever happens was announced."""


@pytest.fixture(autouse=True)
def _only_by_notification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.outbox.blocked._RELOAD_S", LONG_S)


async def pause(db: Db, **what: Any) -> None:
    """As `relay pause` does it: the row, its record, and the notification, in one transaction."""
    scope = "shard" if "shard" in what else "_".join(sorted(what)) if len(what) == 1 else "aggregate"
    async with db.transaction():
        audited = await db.fetchval(
            "INSERT INTO relay.audit (who, side, act, selection, rows) VALUES ('test', 'outbox', 'pause', '{}', 1) RETURNING id"
        )
        columns = ["scope", "audit_id", *what]
        marks = ", ".join(f"${n}" for n in range(1, len(columns) + 1))
        await db.execute(
            f"INSERT INTO relay.outbox_pause ({', '.join(columns)}) VALUES ({marks})", scope, audited, *what.values()
        )
        await db.execute("SELECT pg_notify('relay_outbox', 'operate')")


async def resume(db: Db) -> None:
    async with db.transaction():
        await db.execute("DELETE FROM relay.outbox_pause")
        await db.execute("SELECT pg_notify('relay_outbox', 'operate')")


async def parked(db: Db) -> list[tuple[Any, ...]]:
    rows = await db.fetch(
        "SELECT aggregate_type || '/' || aggregate_id AS aggregate, seq, reason, state FROM relay.outbox_parked ORDER BY id"
    )
    return [tuple(r) for r in rows]


PAUSES: dict[str, dict[str, Any]] = {
    "an aggregate": {"aggregate_type": "order", "aggregate_id": "1"},
    "a type of aggregates": {"aggregate_type": "order"},
    "a type of events": {"event_type": "Paid"},
}


@pytest.mark.parametrize("what", PAUSES)
async def test_a_pause_holds_what_it_names_in_order_and_nothing_else_until_it_is_resumed(
    database: str, broker: str, what: str
) -> None:
    settings = settings_for(database, broker, outbox__poll_interval_s=LONG_S)
    async with audit(broker) as witness, connected(database) as db, outbox_running(settings) as outbox:
        progress = await shard_of(outbox)
        await insert(db, "order/1")
        await witness.wait_for(1)
        await pause(db, **PAUSES[what])
        await until(lambda: _knows_pauses(outbox))
        await insert(db, "order/1", event_type="Paid")
        await insert(db, "order/1", count=2)
        await insert(db, "invoice/1", count=3)
        await witness.wait_for(4)
        await wait_until(progress, lambda p: p.parked == 3)
        assert await parked(db) == [
            ("order/1", 2, "paused", "paused"),
            ("order/1", 3, "behind", "waiting"),
            ("order/1", 4, "behind", "waiting"),
        ]
        await resume(db)
        await wait_until(progress, lambda p: p.unparked == 3)
        await insert(db, "order/1")
        await witness.wait_for(8)
        assert await parked(db) == []
    assert witness.sequences(first_only=False) == {"order/1": [1, 2, 3, 4, 5], "invoice/1": [1, 2, 3]}


async def _knows_pauses(outbox: Outbox) -> bool:
    """True when the daemon has looked since it began: the notification made it."""
    return outbox.progress[0].looks > 0


async def test_an_event_without_an_aggregate_is_paused_by_its_type(database: str, broker: str) -> None:
    async with audit(broker) as witness, connected(database) as db:
        await pause(db, event_type="Ping")
        async with outbox_running(settings_for(database, broker, outbox__poll_interval_s=LONG_S)) as outbox:
            for kind in ("Ping", "Pong"):
                await db.execute("INSERT INTO relay.outbox (event_type, payload) VALUES ($1, '{}')", kind)
            await wait_until(await shard_of(outbox), lambda p: p.parked == 1)
            await witness.wait_for(1)
            await resume(db)
            await witness.wait_for(2)
    assert [m.type for m in witness.messages] == ["Pong", "Ping"]


async def test_a_parked_head_is_paused_where_it_stands_and_a_resume_tries_it_at_once(
    database: str, broker: str
) -> None:
    settings = settings_for(database, broker, outbox__poll_interval_s=LONG_S, outbox__retry_first_s=0.2)
    async with audit(broker, "order.#") as witness, connected(database) as db, outbox_running(settings) as outbox:
        progress = await shard_of(outbox)
        await insert(db, "ghost/1", count=3)
        await wait_until(progress, lambda p: p.parked == 3)
        await pause(db, aggregate_type="ghost", aggregate_id="1")
        await until(lambda: _states(db, ["paused", "waiting", "waiting"]))
        assert {p[2] for p in await parked(db)} == {"unroutable", "behind"}  # still told why
        await witness.queue.bind(witness.exchange, "ghost.#")
        await asyncio.sleep(0.5)  # two delays of a retry: had it been tried, it would have gone out
        assert witness.messages == []
        await resume(db)
        await witness.wait_for(3)
        await wait_until(progress, lambda p: p.unparked == 3)
    assert witness.sequences(first_only=False) == {"ghost/1": [1, 2, 3]}


async def _states(db: Db, states: list[str]) -> bool:
    return [p[3] for p in await parked(db)] == states


async def test_a_paused_type_behind_a_head_of_another_type_is_not_sent_when_the_head_goes_out(
    database: str, broker: str
) -> None:
    settings = settings_for(
        database, broker, outbox__poll_interval_s=LONG_S, outbox__retry_first_s=LONG_S, outbox__retry_max_s=LONG_S
    )
    async with audit(broker, "order.#") as witness, connected(database) as db, outbox_running(settings) as outbox:
        progress = await shard_of(outbox)
        for kind in ("Changed", "Changed", "Paid", "Changed"):
            await insert(db, "ghost/1", event_type=kind)
        await wait_until(progress, lambda p: p.parked == 4)
        await pause(db, event_type="Paid")
        await witness.queue.bind(witness.exchange, "ghost.#")
        async with db.transaction():  # as `relay retry` does it
            await db.execute("UPDATE relay.outbox_parked SET next_attempt_at = now() WHERE state = 'retrying'")
            await db.execute("SELECT pg_notify('relay_outbox', 'operate')")
        await until(lambda: _states(db, ["paused", "waiting"]))
        assert [p[1:3] for p in await parked(db)] == [(3, "paused"), (4, "behind")]
        await resume(db)
        await witness.wait_for(4)
    assert witness.sequences(first_only=False) == {"ghost/1": [1, 2, 3, 4]}


async def test_a_stuck_row_stays_stuck_through_a_pause(database: str, broker: str) -> None:
    settings = settings_for(database, broker, outbox__max_attempts=1, outbox__poll_interval_s=LONG_S)
    async with connected(database) as db, outbox_running(settings) as outbox:
        progress = await shard_of(outbox)
        await insert(db, "ghost/1")
        await wait_until(progress, lambda p: p.parked == 1)
        looks = progress.looks
        await pause(db, aggregate_type="ghost")
        await wait_until(progress, lambda p: p.looks > looks)
        await resume(db)
        await wait_until(progress, lambda p: p.looks > looks + 1)
        assert await parked(db) == [("ghost/1", 1, "unroutable", "stuck")]


async def test_rows_that_a_pause_holds_do_not_count_toward_the_parked_limit(database: str, broker: str) -> None:
    settings = settings_for(database, broker, outbox__parked_limit=2, outbox__poll_interval_s=LONG_S)
    async with audit(broker, "order.#") as witness, connected(database) as db:
        await pause(db, aggregate_type="invoice")
        await insert(db, "invoice/1", count=5)
        async with outbox_running(settings) as outbox:
            progress = await shard_of(outbox)
            await wait_until(progress, lambda p: p.parked == 5)
            await insert(db, "invoice/1", count=5)
            await insert(db, "ghost/1", count=2)
            await insert(db, "order/1")
            await witness.wait_for(1)
            await wait_until(progress, lambda p: p.parked == 12)
        async with outbox_running(settings):  # and neither does what a session finds
            await insert(db, "order/1")
            await witness.wait_for(2)


async def test_more_refused_rows_than_the_limit_pause_the_shard_until_an_operator_frees_them(
    database: str, broker: str
) -> None:
    long: dict[str, Any] = dict.fromkeys(
        ("outbox__retry_first_s", "outbox__retry_max_s", "outbox__poll_interval_s"), LONG_S
    )
    settings = settings_for(database, broker, outbox__parked_limit=1, **long)
    async with audit(broker, "order.#") as witness, connected(database) as db:
        with capture_logs() as told:
            async with outbox_running(settings) as outbox:
                await insert(db, "ghost/1", count=2)
                await wait_until(await shard_of(outbox), lambda p: p.parked == 2)
                await until(lambda: _told(told, "paused"))
                await insert(db, "order/1")
                async with db.transaction():
                    await db.execute("DELETE FROM relay.outbox_parked")
                    await db.execute("SELECT pg_notify('relay_outbox', 'operate')")
                await witness.wait_for(1)
    assert [t["event"] for t in told if t["event"] in ("paused", "resumed")] == ["paused", "resumed"]


async def test_a_resume_of_more_rows_than_the_limit_holds_nobody_up(database: str, broker: str) -> None:
    settings = settings_for(database, broker, outbox__parked_limit=5, outbox__poll_interval_s=LONG_S)
    async with audit(broker) as witness, connected(database) as db:
        await pause(db, aggregate_type="order")
        with capture_logs() as told:
            async with outbox_running(settings) as outbox:
                for name in range(50):
                    await insert(db, f"order/{name}", count=2)
                await db.execute(
                    "INSERT INTO relay.outbox (aggregate_type, event_type, payload) SELECT 'order', 'Ping', '{}' FROM generate_series(1, 10)"
                )
                progress = await shard_of(outbox)
                await wait_until(progress, lambda p: p.parked == 110)
                await resume(db)
                await insert(db, "invoice/1")
                await wait_until(progress, lambda p: p.unparked == 110)
                await witness.wait_for(111)
    assert not [t["event"] for t in told if t["event"] in ("paused", "resumed")]


async def _told(told: list[Any], event: str) -> bool:
    return any(t["event"] == event for t in told)


async def test_what_a_pause_holds_and_no_look_has_held_yet_leaves_the_retries_to_others(
    database: str, broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    long: dict[str, Any] = dict.fromkeys(
        ("outbox__retry_first_s", "outbox__retry_max_s", "outbox__poll_interval_s"), LONG_S
    )
    async with audit(broker, "order.#") as witness, connected(database) as db:
        async with outbox_running(settings_for(database, broker, **long)) as outbox:
            progress = await shard_of(outbox)
            for name in range(25):  # more than a portion of retries
                await insert(db, f"ghost/{name}")
            await insert(db, "nobody/1")
            await wait_until(progress, lambda p: p.parked == 26)
            await witness.queue.bind(witness.exchange, "nobody.#")
            monkeypatch.setattr(Store, "reconcile", _not_yet)
            async with db.transaction():
                await db.execute(  # the paused ones are due first
                    "UPDATE relay.outbox_parked SET next_attempt_at = now() - CASE aggregate_type WHEN 'ghost' THEN 2 ELSE 1 END * interval '1 min'"
                )
                await pause(db, aggregate_type="ghost")
            await witness.wait_for(1)
            await wait_until(progress, lambda p: p.unparked == 1)
            assert {p[2:] for p in await parked(db)} <= {("unroutable", "paused"), ("unroutable", "retrying")}


async def _not_yet(_store: Store, _pauses: Pauses) -> bool:
    return False


class TestEventsWithoutAnAggregateIdOfAPausedType:
    """Their aggregate type is in the log only, and the next look does not forget it."""

    async def test_stay_paused_and_leave_the_retries_to_others(self, database: str, broker: str) -> None:
        settings = settings_for(
            database, broker, outbox__poll_interval_s=LONG_S, outbox__retry_first_s=0.1, outbox__max_attempts=1
        )
        async with audit(broker, "order.#", "note.#") as witness, connected(database) as db:
            await pause(db, aggregate_type="note")
            async with outbox_running(settings) as outbox:
                progress = await shard_of(outbox)
                await notes(db, 25)  # more than a portion of retries
                await insert(db, "ghost/1")
                await wait_until(progress, lambda p: p.parked == 26)
                await witness.queue.bind(witness.exchange, "ghost.#")
                await act_on(settings, Retry(Selection(aggregate="ghost/1")))
                await witness.wait_for(1)
                await wait_until(progress, lambda p: p.unparked == 1)
                assert {p[2:] for p in await parked(db)} == {("paused", "paused")}
                await resume(db)
                await witness.wait_for(26)

    async def test_are_not_purged_with_what_was_refused(self, database: str, broker: str) -> None:
        settings = settings_for(database, broker, outbox__poll_interval_s=LONG_S, outbox__max_attempts=1)
        async with audit(broker, "note.#") as witness, connected(database) as db:
            await pause(db, aggregate_type="note")
            async with outbox_running(settings) as outbox:
                progress = await shard_of(outbox)
                await notes(db, 3)
                await insert(db, "ghost/1")
                await wait_until(progress, lambda p: p.parked == 4)
                looks = progress.looks
                await db.execute("SELECT pg_notify('relay_outbox', 'operate')")
                await wait_until(progress, lambda p: p.looks > looks)
                assert (await act_on(settings, Purge(Selection(everything=True)))).rows == 1
                await resume(db)
                await witness.wait_for(3)


async def notes(db: Db, count: int) -> None:
    await db.execute(
        "INSERT INTO relay.outbox (aggregate_type, event_type, payload) SELECT 'note', 'Taken', '{}' FROM generate_series(1, $1::int)",
        count,
    )


class TestAPausedShard:
    @pytest.mark.parametrize("wakeup", ["notify", "poll"])
    async def test_publishes_nothing_and_goes_on_at_once_when_resumed(
        self, database: str, broker: str, wakeup: str
    ) -> None:
        settings = settings_for(database, broker, outbox__poll_interval_s=LONG_S, outbox__wakeup=wakeup)
        async with audit(broker) as witness, connected(database) as db, outbox_running(settings) as outbox:
            progress = await shard_of(outbox)
            await pause(db, shard=0)
            await until(lambda: _is_paused(outbox))
            await insert(db, "order/1", count=3)
            cursor = await db.fetchval("SELECT snapshot::text FROM relay.outbox_cursor")
            looks = progress.looks
            for n in range(1, 4):
                await db.execute("SELECT pg_notify('relay_outbox', 'operate')")
                await wait_until(progress, lambda p, n=n: p.looks >= looks + n)  # type: ignore[misc]
            assert (progress.pages, witness.messages) == (0, [])
            assert await db.fetchval("SELECT snapshot::text FROM relay.outbox_cursor") == cursor
            started = asyncio.get_running_loop().time()
            await resume(db)
            await witness.wait_for(3)
            assert asyncio.get_running_loop().time() - started < 2
        assert witness.sequences(first_only=False) == {"order/1": [1, 2, 3]}

    async def test_tries_no_parked_rows_either(self, database: str, broker: str) -> None:
        settings = settings_for(database, broker, outbox__retry_first_s=0.05, outbox__retry_max_s=0.05)
        async with audit(broker, "order.#") as witness, connected(database) as db, outbox_running(settings) as outbox:
            await insert(db, "ghost/1")
            await wait_until(await shard_of(outbox), lambda p: p.parked == 1)
            await pause(db, shard=0)
            await until(lambda: _is_paused(outbox))
            attempts = await db.fetchval("SELECT attempts FROM relay.outbox_parked")
            await db.execute("UPDATE relay.outbox_parked SET next_attempt_at = now()")
            looks = outbox.progress[0].looks
            for n in range(1, 4):  # each makes it go round, and the row is due
                await db.execute("SELECT pg_notify('relay_outbox', 'operate')")
                await wait_until(outbox.progress[0], lambda p, n=n: p.looks >= looks + n)  # type: ignore[misc]
            assert await db.fetchval("SELECT attempts FROM relay.outbox_parked") == attempts
            await witness.queue.bind(witness.exchange, "ghost.#")
            await resume(db)
            await witness.wait_for(1)

    async def test_that_was_about_to_sleep_does_not_make_producers_notify(
        self, database: str, broker: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fall_asleep = Wakeup.try_fall_asleep
        async with connected(database) as db:

            async def and_then_paused(wakeup: Wakeup) -> bool:
                asleep = await fall_asleep(wakeup)
                if asleep and not await db.fetchval("SELECT EXISTS (SELECT FROM relay.outbox_pause)"):
                    await pause(db, shard=0)
                    await wakeup.urgent.wait()
                return asleep

            monkeypatch.setattr(Wakeup, "try_fall_asleep", and_then_paused)
            async with outbox_running(settings_for(database, broker, outbox__poll_interval_s=LONG_S)) as outbox:
                await until(lambda: _is_paused(outbox))
                await until(lambda: _is_awake(db), timeout_s=5)

    async def test_stops_within_the_grace_period(self, database: str, broker: str) -> None:
        async with connected(database) as db:
            await pause(db, shard=0)
            started = asyncio.get_running_loop().time()
            async with outbox_running(settings_for(database, broker, outbox__poll_interval_s=LONG_S)) as outbox:
                await until(lambda: _is_paused(outbox))
            assert asyncio.get_running_loop().time() - started < 5

    async def test_drained_says_that_it_is_paused_and_not_that_all_is_published(
        self, database: str, broker: str
    ) -> None:
        async with connected(database) as db:
            await pause(db, shard=0)
            await insert(db, "order/1")
            code, logged = await (await RelayProcess.start(settings_for(database, broker), "run", "--drain")).wait()
        assert code == 8
        assert "paused by an operator" in logged.splitlines()[-1]


async def _is_paused(outbox: Outbox) -> bool:
    return outbox.paused


async def _is_awake(db: Db) -> bool:
    return not await db.fetchval(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = $1 AND mode = 'ExclusiveLock'"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        WAKE_LOCK,
    )


async def test_a_drain_publishes_all_that_a_resume_made_due(database: str, broker: str) -> None:
    settings = settings_for(database, broker)
    async with audit(broker) as witness, connected(database) as db:
        await pause(db, aggregate_type="order")
        for name in range(50):  # several portions
            await insert(db, f"order/{name}")
        paused = Outbox(settings)
        await paused.run(drain=True)
        assert paused.parked == 50
        await resume(db)
        resumed = Outbox(settings)
        await resumed.run(drain=True)
        assert resumed.parked == 0
        await witness.wait_for(50)


async def test_a_drain_tries_all_that_is_due_once_more_also_alone_and_ends(database: str, broker: str) -> None:
    settings = settings_for(database, broker, outbox__max_attempts=1)
    async with audit(broker, "order.#") as witness, connected(database) as db:
        for name in range(30):
            await insert(db, f"{'ghost' if name % 2 else 'nobody'}/{name}")
        await Outbox(settings).run(drain=True)
        await db.execute(
            "UPDATE relay.outbox_parked SET reason = 'unconfirmed' WHERE aggregate_id = '1'"
        )  # tried alone
        await witness.queue.bind(witness.exchange, "ghost.#")
        await act_on(settings, Retry(Selection(everything=True)))
        outbox = Outbox(settings)
        await outbox.run(drain=True)
        assert outbox.parked == 15
        assert {p[3] for p in await parked(db)} == {"stuck"}
        await witness.wait_for(15)


async def test_a_drain_ends_with_what_is_paused_and_says_so(database: str, broker: str) -> None:
    async with audit(broker) as witness, connected(database) as db:
        await pause(db, aggregate_type="order", aggregate_id="1")
        await insert(db, "order/1", count=2)
        await insert(db, "order/2", count=2)
        code, logged = await (await RelayProcess.start(settings_for(database, broker), "run", "--drain")).wait()
        assert code == 8
        assert "2 rows are parked" in logged.splitlines()[-1]
        await witness.wait_for(2)
        (drained,) = [line for line in map(json.loads, logged.splitlines()[:-1]) if line["event"] == "drained"]
        assert (drained["published"], drained["parked"]) == (2, 2)


async def test_without_a_notification_a_pause_and_a_resume_are_noticed_by_the_next_look(
    database: str, broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.outbox.blocked._RELOAD_S", 0.1)
    settings = settings_for(database, broker, outbox__poll_interval_s=0.1)
    async with audit(broker) as witness, connected(database) as db, outbox_running(settings) as outbox:
        progress = await shard_of(outbox)
        audited = "WITH a AS (INSERT INTO relay.audit (who, side, act, selection, rows) VALUES ('t', 'outbox', 'pause', '{}', 1) RETURNING id)"
        await db.execute(
            audited + " INSERT INTO relay.outbox_pause (scope, shard, audit_id) SELECT 'shard', 0, id FROM a"
        )
        await until(lambda: _is_paused(outbox))
        await insert(db, "order/1")
        await db.execute("DELETE FROM relay.outbox_pause")
        await witness.wait_for(1)
        assert progress.published >= 0


async def test_the_looks_blocks_hold_and_release_what_python_says_that_a_pause_holds(database: str) -> None:
    async with connected(database) as db:
        for kind, name, event in product(("order", "x", None), ("1", "2", None), ("Paid", "Sent")):
            if kind is not None or name is None:
                await db.execute(
                    "INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload) VALUES ($1, $2, $3, '{}')",
                    *(kind, name, event),
                )
        await db.execute(  # as the daemon parks them: without the aggregate type where there is no id
            "INSERT INTO relay.outbox_parked (id, shard, aggregate_type, aggregate_id, seq, reason, state, next_attempt_at)"
            " SELECT id, 0, CASE WHEN aggregate_id IS NOT NULL THEN aggregate_type END, aggregate_id, seq, 'nacked', 'retrying', now()"
            " FROM relay.outbox"
        )
        log = await db.fetch("SELECT id, aggregate_type, aggregate_id, event_type FROM relay.outbox")
        (template,) = rows("a")
        read = [template._replace(**dict(r)) for r in log]
        assert len(read) == 14
        for what in (*PAUSES.values(), {"shard": 0}):
            await pause(db, **what)
            pauses = Pauses.of(await db.fetch("SELECT * FROM relay.outbox_pause"))
            await db.execute(query("hold_paused"), 0)
            assert await paused_ids(db) == {row.id for row in read if pauses.hold(row)}, what
            await db.execute(query("release_paused"), 0)
            assert await paused_ids(db) == {row.id for row in read if pauses.hold(row)}, what
            await resume(db)
            await db.execute(query("release_paused"), 0)
            assert await paused_ids(db) == set()


async def paused_ids(db: Db) -> set[int]:
    return {r["id"] for r in await db.fetch("SELECT id FROM relay.outbox_parked WHERE state = 'paused'")}


async def test_sql_and_python_agree_on_what_a_pause_holds(database: str) -> None:
    async with connected(database) as db:
        for what in (*PAUSES.values(), {"shard": 0}):
            await pause(db, **what)
            pauses = Pauses.of(await db.fetch("SELECT * FROM relay.outbox_pause"))
            for kind, name, event in product(("order", "x"), ("1", "2", None), ("Paid", "Sent")):
                (row,) = rows(name)
                row = row._replace(aggregate_type=kind, event_type=event)
                said = await db.fetchval("SELECT relay.outbox_is_paused($1, $2, $3)", kind, name, event)
                assert pauses.hold(row) == said, (what, kind, name, event)
            await resume(db)
