"""relay.inbox_take and relay.inbox_fail: many takers, each aggregate in order and each message once, whatever commits or rolls back."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

import asyncpg
import pytest

from relay.inbox.stored import Stored
from relay.message import Event
from relay.postgres.connect import Connection
from relay.sandbox import Postgres
from tests.harness.logins import Logins
from tests.harness.outbox import connected, until

TAKE = "SELECT * FROM relay.inbox_take($1, $2)"
FAIL = "SELECT relay.inbox_fail($1, $2, make_interval(secs => $3))"


async def store(
    db: Connection, *names: tuple[str | None, int | None], consumer: str = "c", body: bytes = b"{}"
) -> None:
    """Store these (aggregate, seq) in one transaction, as the sidecar does."""
    async with db.transaction():
        shelf = Stored(db, consumer)
        for aggregate, seq in names:
            await shelf.add(
                Event(
                    source="shop",
                    aggregate_type="order",
                    aggregate_id=aggregate,
                    seq=seq,
                    event_type="T",
                    message_id=f"{aggregate}/{seq}",
                    content_type="application/json",
                    body=body,
                )
            )
        await shelf.write()


async def fill(db: Connection, aggregate: str, first: int, last: int) -> None:
    """A long line of one aggregate, as one batch would store it; the test's own statement because of its length."""
    await db.execute(
        "INSERT INTO relay.inbox (consumer, source, aggregate_type, aggregate_id, seq, event_type, message_id, content_type, headers, body, leads)"
        " SELECT 'c', 'shop', 'order', $1, i, 'T', i, '', '{}', '{}', i = $2 FROM generate_series($2::bigint, $3::bigint) AS i",
        aggregate,
        first,
        last,
    )


async def take(db: Connection, n: int = 100, consumer: str | None = "c") -> list[tuple[str | None, int | None]]:
    return [(r["aggregate_id"], r["seq"]) for r in await db.fetch(TAKE, n, consumer)]


class TestOneTaker:
    async def test_gets_each_aggregate_from_its_lowest_number_on_and_the_oldest_first(self, database: str) -> None:
        async with connected(database) as db:
            await store(db, ("b", 1), ("a", 1), ("b", 2))
            await store(db, ("a", 2), (None, None), ("b", 3))
            assert await take(db, 1) == [("b", 1)]
            assert await take(db, 1) == [("a", 1)]
            assert await take(db) == [("b", 2), ("a", 2), (None, None), ("b", 3)]
            assert await take(db) == []

    @pytest.mark.parametrize("n", [1, 2, 3, 7, 1000])
    async def test_gets_everything_once_in_portions_of_any_size(self, database: str, n: int) -> None:
        async with connected(database) as db:
            for first in range(1, 40, 4):
                await store(db, *((a, seq) for seq in range(first, first + 4) for a in "xyz"), (None, None))
            found: list[tuple[str | None, int | None]] = []
            while part := await take(db, n):
                assert len(part) <= n
                found += part
            for aggregate in "xyz":
                assert [seq for a, seq in found if a == aggregate] == list(range(1, 41))
            assert len(found) == 130

    async def test_gets_its_messages_back_after_a_rollback(self, database: str) -> None:
        async with connected(database) as db:
            await store(db, ("a", 1), ("a", 2), ("a", 3), (None, None))
            for _ in range(2):
                attempt = db.transaction()
                await attempt.start()
                assert await take(db, 2) == [("a", 1), ("a", 2)]
                assert await take(db, 2) == [("a", 3), (None, None)]  # the transaction may ask for more
                await attempt.rollback()
            assert await take(db) == [("a", 1), ("a", 2), ("a", 3), (None, None)]

    async def test_may_take_for_one_consumer_or_for_any(self, database: str) -> None:
        async with connected(database) as db:
            for consumer in ("billing", "audit", "mail"):
                await store(db, ("a", 1), ("b", 1), consumer=consumer)
            assert [r["consumer"] for r in await db.fetch(TAKE, 10, "audit")] == ["audit", "audit"]
            assert [r["consumer"] for r in await db.fetch(TAKE, 10, None)] == ["billing", "billing", "mail", "mail"]

    async def test_takes_fewer_when_they_are_large(self, database: str) -> None:
        async with connected(database) as db:
            await store(db, *(("a", seq) for seq in range(1, 6)), body=bytes(16 * 1024 * 1024))
            assert await take(db) == [("a", seq) for seq in range(1, 5)]
            assert await take(db) == [("a", 5)]

    @pytest.mark.parametrize(
        ("body", "payload"),
        [
            (b'{"a": [1, null]}', '{"a": [1, null]}'),
            (b"null", "null"),
            (b'"\\u0000"', None),  # JSON, but jsonb has no NUL
            (b"{", None),
            (b"", None),
            (b"\xff\xfe", None),
            (b"\x00", None),
            (b"1e999999999", None),
            (b"[" * 50_000, None),
            (b'"\\ud800"', None),
        ],
    )
    async def test_gets_a_payload_where_the_body_is_json_and_never_an_error(
        self, database: str, body: bytes, payload: str | None
    ) -> None:
        async with connected(database) as db:
            await store(db, ("a", 1), body=body)
            (row,) = await db.fetch(TAKE, 1, "c")
            assert (row["payload"], row["body"]) == (payload, body)

    @pytest.mark.parametrize("n", [0, -1, None])
    async def test_must_ask_for_at_least_one(self, database: str, n: int | None) -> None:
        async with connected(database) as db:
            with pytest.raises(asyncpg.InvalidParameterValueError, match="it must be at least 1"):
                await take(db, n)  # type: ignore[arg-type]

    @pytest.mark.parametrize("isolation", ["repeatable_read", "serializable"])
    async def test_is_told_when_its_transaction_cannot_see_what_others_commit(
        self, database: str, isolation: Any
    ) -> None:
        async with connected(database) as db, db.transaction(isolation=isolation):
            with pytest.raises(asyncpg.InvalidTransactionStateError, match="it must be READ COMMITTED"):
                await take(db)


class TestTwoTakers:
    async def test_never_have_rows_of_one_aggregate_at_the_same_time(self, database: str) -> None:
        async with connected(database) as db, connected(database) as other:
            await store(db, ("a", 1), ("a", 2), ("b", 1), ("b", 2))
            async with db.transaction():
                assert await take(db, 1) == [("a", 1)]
                assert await take(other) == [("b", 1), ("b", 2)]
                await store(other, ("a", 3))
                assert await take(other) == []
            assert await take(other) == [("a", 2), ("a", 3)]

    async def test_a_rollback_of_one_lets_the_other_begin_where_it_began(self, database: str) -> None:
        async with connected(database) as db, connected(database) as other:
            await store(db, ("a", 1), ("a", 2), ("a", 3))
            attempt = db.transaction()
            await attempt.start()
            assert await take(db, 2) == [("a", 1), ("a", 2)]
            await attempt.rollback()
            assert await take(other, 2) == [("a", 1), ("a", 2)]

    async def test_share_messages_without_an_aggregate(self, database: str) -> None:
        async with connected(database) as db, connected(database) as other:
            await store(db, *[(None, None)] * 4)
            async with db.transaction():
                assert len(await take(db, 2)) == 2
                assert len(await take(other)) == 2

    async def test_a_savepoint_rolled_back_lets_go(self, database: str) -> None:
        async with connected(database) as db, connected(database) as other:
            await store(db, ("a", 1))
            async with db.transaction():
                savepoint = db.transaction()
                await savepoint.start()
                assert await take(db) == [("a", 1)]
                await savepoint.rollback()
                assert await take(other) == [("a", 1)]
                assert await take(db) == []


class TestAFailure:
    async def test_holds_its_message_and_what_follows_and_nothing_else(self, database: str) -> None:
        async with connected(database) as db:
            await store(db, ("a", 1), ("a", 2), ("a", 3), ("b", 1), (None, None))
            poison = await db.fetchval("SELECT id FROM relay.inbox WHERE aggregate_id = 'a' AND seq = 2")
            assert await db.fetchval(FAIL, poison, "no such account", 3600.0) is True
            assert await take(db) == [("a", 1), ("b", 1), (None, None)]
            await store(db, ("a", 4))
            assert await take(db) == []
            row = await db.fetchrow("SELECT attempts, error FROM relay.inbox WHERE id = $1", poison)
            assert row is not None
            assert tuple(row.values()) == (1, "no such account")
            await db.execute("UPDATE relay.inbox SET next_take_at = NULL")  # an operator's retry
            assert await take(db) == [("a", 2), ("a", 3), ("a", 4)]

    async def test_is_over_when_its_time_has_passed_by_the_databases_clock(self, database: str) -> None:
        async with connected(database) as db:
            await store(db, ("a", 1))
            (row,) = await db.fetch("SELECT id FROM relay.inbox")
            await db.fetchval(FAIL, row["id"], "e", 0.0)
            await db.fetchval(FAIL, row["id"], "e", -1.0)
            assert await db.fetchval("SELECT attempts FROM relay.inbox") == 2
            assert await take(db) == [("a", 1)]

    @pytest.mark.parametrize("n", [1, 3, 1000])
    async def test_of_many_at_once_is_over_for_all_of_them(self, database: str, n: int) -> None:
        async with connected(database) as db, connected(database) as other:
            await store(db, *((str(a), seq) for seq in (1, 2) for a in range(30)), (None, None))
            await db.execute(
                "UPDATE relay.inbox SET attempts = 1, next_take_at = now() WHERE leads"
            )  # one moment for all
            await store(db, ("fresh", 1))
            async with other.transaction():
                assert len(await take(other, 2)) == 2  # somebody else's are passed over
                found: list[tuple[str | None, int | None]] = []
                while part := await take(db, n, None):
                    assert len(part) <= n
                    found += part
            while part := await take(db, n):
                found += part
            assert len(found) == 60
            for a in range(30):
                assert [seq for name, seq in found if name == str(a)] in ([1, 2], [2], [])
            assert await db.fetchval("SELECT count(*) FROM relay.inbox") == 0

    async def test_does_not_hold_what_precedes_it_though_it_led_before(self, database: str) -> None:
        """By policy none a lower number may be stored later."""
        async with connected(database) as db:
            await store(db, ("a", 5))
            await store(db, ("a", 3))
            await db.execute("UPDATE relay.inbox SET leads = seq = 5")  # as another hand may leave it
            await db.execute("SELECT relay.inbox_fail(id, 'e', NULL) FROM relay.inbox WHERE seq = 5")
            assert await take(db) == [("a", 3)]

    async def test_without_a_time_waits_for_an_operator(self, database: str) -> None:
        async with connected(database) as db:
            await store(db, (None, None))
            (row,) = await db.fetch("SELECT id FROM relay.inbox")
            assert await db.fetchval("SELECT relay.inbox_fail($1, 'e', NULL)", row["id"])
            assert await db.fetchval("SELECT next_take_at = 'infinity' FROM relay.inbox")
            assert await take(db) == []

    async def test_of_a_message_that_is_gone_says_so(self, database: str) -> None:
        async with connected(database) as db:
            assert await db.fetchval("SELECT relay.inbox_fail(7, 'too late')") is False


@pytest.mark.parametrize("seed", range(4))
async def test_many_takers_that_roll_back_at_random_have_each_effect_once_and_in_order(
    database: str, seed: int
) -> None:
    """Storing goes on meanwhile, in several transactions at once; failures are told, and retried at once or a little later."""
    lines, length, takers = 12, 30, 6
    dice = random.Random(seed)
    stored = asyncio.Event()
    async with connected(database) as db:
        await db.execute("CREATE TABLE effect (id bigint GENERATED ALWAYS AS IDENTITY, aggregate text, seq bigint)")

        async def storing(mine: Sequence[int]) -> None:
            async with connected(database) as sidecar:
                at = dict.fromkeys(mine, 0)
                while left := [a for a in mine if at[a] < length]:
                    batch = []
                    for a in dice.sample(left, dice.randint(1, len(left))):
                        upto = min(length, at[a] + dice.randint(1, 6))
                        batch += [(str(a), seq) for seq in range(at[a] + 1, upto + 1)]
                        at[a] = upto
                    dice.shuffle(batch)
                    batch.sort(key=lambda name: name[1])
                    batch.insert(0, (None, None))  # type: ignore[arg-type]
                    await store(sidecar, *batch)
                    await asyncio.sleep(dice.choice((0, 0, 0.002)))

        async def taking() -> None:
            async with connected(database) as taker:
                while True:
                    over = stored.is_set()
                    attempt = taker.transaction()
                    await attempt.start()
                    rows = [
                        r for _ in range(dice.randint(1, 2)) for r in await taker.fetch(TAKE, dice.randint(1, 9), None)
                    ]
                    for row in rows:
                        await taker.execute(
                            "INSERT INTO effect (aggregate, seq) VALUES ($1, $2)", row["aggregate_id"], row["seq"]
                        )
                    await asyncio.sleep(dice.choice((0, 0, 0.003)))
                    if dice.random() < 0.4:
                        await attempt.rollback()
                        if rows and dice.random() < 0.5:
                            await taker.fetchval(FAIL, dice.choice(rows)["id"], "e", dice.choice((0.0, 0.01)))
                        continue
                    await attempt.commit()
                    if not rows and over and not await taker.fetchval("SELECT count(*) FROM relay.inbox"):
                        return

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for _ in range(takers):
                group.create_task(taking())
            async with asyncio.TaskGroup() as sidecars:
                for part in range(3):
                    sidecars.create_task(storing(range(part, lines, 3)))
            stored.set()

        for a in range(lines):
            rows = await db.fetch("SELECT seq FROM effect WHERE aggregate = $1 ORDER BY id", str(a))
            assert [r["seq"] for r in rows] == list(range(1, length + 1))


class TestWithoutACliff:
    """On tables that were never analysed, with a session's default planner settings. The bounds are ten times what was measured."""

    async def _ms(self, db: Connection, n: int, expected: int) -> float:
        """The median of five takes that are rolled back."""
        took = []
        for _ in range(5):
            attempt = db.transaction()
            await attempt.start()
            started = time.perf_counter()
            found = len(await take(db, n))
            took.append((time.perf_counter() - started) * 1000)
            assert found == expected
            await attempt.rollback()
        return sorted(took)[2]

    async def test_behind_a_locked_aggregate_with_100_000_rows(self, database: str) -> None:
        async with connected(database) as db, connected(database) as other:
            await fill(db, "hot", 1, 100_000)
            await store(db, *((str(a), 1) for a in range(200)))
            async with other.transaction():
                assert len(await take(other, 10)) == 10
                assert await self._ms(db, 100, 100) < 50
            assert await self._ms(db, 100, 100) < 50
            await other.execute(
                "SELECT relay.inbox_fail(min(id), 'e', '1 h') FROM relay.inbox WHERE aggregate_id = 'hot'"
            )
            for seq in range(100_001, 100_051):  # it goes on growing, one message a batch
                await store(db, ("hot", seq))
            assert await db.fetchval("SELECT count(*) FROM relay.inbox WHERE leads AND aggregate_id = 'hot'") == 1
            assert await self._ms(db, 100, 100) < 50

    async def test_among_100_000_aggregates(self, database: str) -> None:
        async with connected(database) as db:
            await db.execute(
                "INSERT INTO relay.inbox (consumer, source, aggregate_type, aggregate_id, seq, event_type, message_id, content_type, headers, body)"
                " SELECT 'c', 'shop', 'order', i, 1, 'T', i, '', '{}', '{}' FROM generate_series(1, 100000) AS i"
            )
            assert await self._ms(db, 100, 100) < 50
            assert await self._ms(db, 1000, 1000) < 300

    async def test_behind_30_000_that_wait_for_an_operator(self, database: str) -> None:
        async with connected(database) as db:
            await db.execute(
                "INSERT INTO relay.inbox (consumer, source, aggregate_type, aggregate_id, seq, event_type, message_id, content_type, headers, body,"
                " attempts, next_take_at) SELECT 'c', 'shop', 'order', i, 1, 'T', i, '', '{}', '{}', 1,"
                " CASE i % 2 WHEN 0 THEN 'infinity' ELSE now() + '1 h' END FROM generate_series(1, 30000) AS i"
            )
            assert await self._ms(db, 100, 0) < 50
            await store(db, ("new", 1))
            assert await self._ms(db, 100, 1) < 50

    async def test_when_nobody_has_told_who_leads(self, database: str) -> None:
        """Rows from another hand all lead: more is looked at, nothing is taken out of order."""
        async with connected(database) as db, connected(database) as other:
            await fill(db, "hot", 1, 20_000)
            await db.execute("UPDATE relay.inbox SET leads = true")
            await store(db, ("b", 1))
            async with other.transaction():
                assert await take(other, 2) == [("hot", 1), ("hot", 2)]
                assert await self._ms(db, 100, 1) < 300
            assert await take(db, 2) == [("hot", 3), ("hot", 4)]


class TestWhoeverDeletes:
    async def test_lets_the_next_one_lead(self, database: str) -> None:
        async with connected(database) as db:
            await store(db, ("a", 1), ("a", 2), ("a", 3), ("b", 1))
            await db.execute("DELETE FROM relay.inbox WHERE aggregate_id = 'a' AND seq = 1")
            assert await take(db) == [("a", 2), ("a", 3), ("b", 1)]

    @pytest.mark.parametrize("all_lead", [False, True])
    @pytest.mark.parametrize("taker_is_first", [False, True])
    async def test_without_the_lock_on_the_first_row_strands_nothing(
        self, database: str, *, all_lead: bool, taker_is_first: bool
    ) -> None:
        async with connected(database) as db, connected(database) as taker, connected(database) as hand:
            await store(db, ("a", 1), ("a", 2), ("a", 3))
            await db.execute("UPDATE relay.inbox SET leads = true WHERE seq = 1 OR seq = 2 AND $1", all_lead)
            one, other = taker.transaction(), hand.transaction()

            async def taking() -> None:
                await one.start()
                await take(taker, 1)

            async def deleting() -> None:
                await other.start()
                await hand.execute("DELETE FROM relay.inbox WHERE seq = 2")

            if taker_is_first:
                await taking()
                second, first = asyncio.create_task(deleting()), one
            else:
                await deleting()
                second, first = asyncio.create_task(taking()), other
            await until_done_or_waiting(db, second)
            await first.commit()
            await second
            await (other if taker_is_first else one).commit()
            assert (await take(db))[-1:] == [("a", 3)]
            assert await db.fetchval("SELECT count(*) FROM relay.inbox") == 0


async def until_done_or_waiting(db: Connection, task: asyncio.Task[None]) -> None:
    async def is_so() -> bool:
        return task.done() or await db.fetchval(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database())"
        )

    await until(is_so)


class TestATaker:
    async def test_can_take_and_fail_with_its_own_role_whatever_its_search_path(
        self, database: str, postgres: Postgres
    ) -> None:
        with Logins(postgres) as logins:
            async with connected(logins.create(database, "relay_taker")) as taker, connected(database) as db:
                await taker.execute("SET search_path = ''")
                await store(db, ("a", 1), ("a", 2), ("a", 3))
                assert await take(taker, 1) == [("a", 1)]
                (row,) = await taker.fetch("SELECT id FROM relay.inbox WHERE seq = 2")
                assert await taker.fetchval(FAIL, row["id"], "e", 0.0)
                assert await take(taker) == [("a", 2), ("a", 3)]
