"""The outbox daemon on real servers: what is published, what is parked, and who owns the log."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aio_pika
import asyncpg
import pytest

from relay.daemon import Outbox
from relay.errors import BrokerRefused, ConfigError, PoolerError, SchemaError
from relay.message import TOMBSTONE, Message
from relay.outbox.cursor import Page
from relay.outbox.reader import Reader
from relay.rabbitmq.contract import Outcome
from relay.rabbitmq.fast_publisher import FastPublisher
from relay.sandbox import RabbitMQ
from tests.harness.audit import Audit, audit
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


async def parked(connection: asyncpg.Connection[asyncpg.Record]) -> list[tuple[Any, ...]]:
    rows = await connection.fetch(
        "SELECT aggregate_id, seq, reason, state, attempts FROM relay.outbox_parked ORDER BY id"
    )
    return [tuple(r) for r in rows]


async def test_a_message_carries_the_whole_wire_contract(database: str, broker: str) -> None:
    async with audit(broker) as witness, connected(database) as db, outbox_running(settings_for(database, broker)):
        await db.execute(
            "INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload, headers) VALUES ($1, $2, $3, $4, $5)",
            "order",
            "Ünïcode/42",
            "OrderPaid",
            '{"amount": 100}',
            json.dumps({"traceparent": "00-abc", "tenant": "é", "retries": 3, "vip": True}),
        )
        (message,) = await witness.wait_for(1)
    assert message.routing_key == "order.OrderPaid"
    assert (message.type, message.app_id, message.content_type) == ("OrderPaid", "shop", "application/json")
    assert message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
    assert message.timestamp is not None
    assert json.loads(message.body) == {"amount": 100}
    assert message.headers["x-aggregate-type"] == "order"
    assert message.headers["x-aggregate-id"] == "Ünïcode/42"
    assert message.headers["x-sequence"] == 1
    assert str(message.headers["x-content-digest"]).startswith("sha256:")
    assert {k: message.headers[k] for k in ("traceparent", "tenant", "retries", "vip")} == {
        "traceparent": "00-abc",
        "tenant": "é",
        "retries": 3,
        "vip": True,
    }


async def test_an_event_gets_the_same_message_id_however_often_it_is_published(database: str, broker: str) -> None:
    settings = settings_for(database, broker)
    async with audit(broker) as witness, connected(database) as db:
        await insert(db, "order/1", count=3)
        await db.execute("INSERT INTO relay.outbox (event_type, body) VALUES ('Ping', 'x')")
        async with outbox_running(settings):
            first = [m.message_id for m in await witness.wait_for(4)]
        await db.execute("UPDATE relay.outbox_cursor SET snapshot = '1:1:', window_snapshot = NULL, after_id = 0")
        async with outbox_running(settings):
            again = [m.message_id for m in await witness.wait_for(8)]
    assert len(set(first)) == 4
    assert again[4:] == first


async def test_bodies_that_are_not_json_arrive_byte_for_byte(database: str, broker: str) -> None:
    bodies = [b"", b"\0\xff\x00", bytes(range(256)) * 4096]
    async with audit(broker) as witness, connected(database) as db, outbox_running(settings_for(database, broker)):
        for body in bodies:
            await db.execute(
                "INSERT INTO relay.outbox (event_type, body, content_type) VALUES ('Blob', $1, 'application/x-thing')",
                body,
            )
        messages = await witness.wait_for(len(bodies))
    assert [m.body for m in messages] == bodies
    assert {m.content_type for m in messages} == {"application/x-thing"}


async def test_pages_end_at_the_byte_limit_and_lose_nothing(database: str, broker: str) -> None:
    settings = settings_for(database, broker, outbox__page_bytes=200_000)
    async with audit(broker) as witness, connected(database) as db:
        for n in range(20):
            await insert(db, "order/1", payload=json.dumps({"n": n, "fill": "x" * 90_000}))
        async with outbox_running(settings) as outbox:
            messages = await witness.wait_for(20)
            await wait_until(await shard_of(outbox), lambda p: p.pages >= 7)
    assert [json.loads(m.body)["n"] for m in messages] == list(range(20))


async def test_an_unroutable_event_holds_only_its_own_aggregate_and_goes_out_in_order_once_a_queue_is_bound(
    database: str, broker: str
) -> None:
    settings = settings_for(database, broker, outbox__retry_first_s=0.2, outbox__retry_max_s=0.2)
    async with audit(broker, "order.#") as witness, connected(database) as db, outbox_running(settings) as outbox:
        progress = await shard_of(outbox)
        await insert(db, "ghost/1", count=3)
        await insert(db, "order/1", count=50)
        await witness.wait_for(50)
        await wait_until(progress, lambda p: p.parked == 3)
        assert [p[:4] for p in await parked(db)] == [
            ("1", 1, "unroutable", "retrying"),
            ("1", 2, "behind", "waiting"),
            ("1", 3, "behind", "waiting"),
        ]
        await insert(db, "ghost/1", count=2)  # later events of a blocked aggregate wait behind it
        await wait_until(progress, lambda p: p.parked == 5)
        await witness.queue.bind(witness.exchange, "ghost.#")
        await wait_until(progress, lambda p: p.unparked == 5)
        await insert(db, "ghost/1")  # and after it has been released, they flow as usual
        await witness.wait_for(56)
        assert await parked(db) == []
    assert witness.sequences() == {"order/1": list(range(1, 51)), "ghost/1": [1, 2, 3, 4, 5, 6]}


async def test_parked_rows_survive_a_restart_of_the_relay_and_still_hold_their_aggregate(
    database: str, broker: str
) -> None:
    settings = settings_for(database, broker, outbox__retry_first_s=300)
    async with audit(broker, "order.#") as witness, connected(database) as db:
        async with outbox_running(settings) as outbox:
            await insert(db, "ghost/1", count=2)
            await wait_until(await shard_of(outbox), lambda p: p.parked == 2)
        await witness.queue.bind(witness.exchange, "ghost.#")
        async with outbox_running(settings) as outbox:
            await insert(db, "ghost/1")
            await wait_until(await shard_of(outbox), lambda p: p.parked == 1)
            assert witness.messages == []  # nothing overtook the parked head
            await db.execute("UPDATE relay.outbox_parked SET next_attempt_at = now() WHERE state = 'retrying'")
        async with outbox_running(settings):
            await witness.wait_for(3)
    assert witness.sequences() == {"ghost/1": [1, 2, 3]}


async def test_after_max_attempts_an_aggregate_is_stuck_and_is_not_tried_again(database: str, broker: str) -> None:
    settings = settings_for(
        database, broker, outbox__retry_first_s=0.05, outbox__retry_max_s=0.05, outbox__max_attempts=3
    )
    async with connected(database) as db, outbox_running(settings):
        await insert(db, "ghost/1")

        async def stuck() -> bool:
            return (await parked(db)) == [("1", 1, "unroutable", "stuck", 3)]

        await until(stuck)
        assert await db.fetchval("SELECT next_attempt_at FROM relay.outbox_parked") is None


async def test_a_full_queue_nacks_and_everything_arrives_in_order_once_there_is_room(
    database: str, broker: str
) -> None:
    settings = settings_for(database, broker, outbox__retry_first_s=0.1, outbox__retry_max_s=0.1)
    async with audit(broker, "none") as witness, connected(database) as db:
        small = await witness.channel.declare_queue(
            "small", durable=True, arguments={"x-max-length": 10, "x-overflow": "reject-publish"}
        )
        await small.bind(witness.exchange, "order.#")
        async with outbox_running(settings) as outbox:
            progress = await shard_of(outbox)
            await insert(db, "order/1", count=30)
            await wait_until(progress, lambda p: p.parked > 0)
            assert "nacked" in {p[2] for p in await parked(db)}
            await small.consume(witness._take, no_ack=True)
            await witness.wait_for_distinct(30)
    assert witness.sequences() == {"order/1": list(range(1, 31))}


async def test_strict_order_never_publishes_a_successor_of_a_refused_event(database: str, broker: str) -> None:
    settings = settings_for(database, broker, outbox__order="strict", outbox__retry_first_s=300)
    async with audit(broker, "order.Good") as witness, connected(database) as db:
        await insert(db, "order/1", event_type="Good")
        await insert(db, "order/1", event_type="Lost")
        await insert(db, "order/1", event_type="Good", count=3)
        await insert(db, "order/2", event_type="Good", count=3)
        async with outbox_running(settings) as outbox:
            await wait_until(await shard_of(outbox), lambda p: p.parked == 4)
            await witness.wait_for(4)
    assert witness.sequences() == {"order/1": [1], "order/2": [1, 2, 3]}


async def test_a_message_that_closes_the_channel_is_found_and_parked_and_the_rest_flows(
    database: str, broker: str, rabbitmq: RabbitMQ
) -> None:
    settings = settings_for(database, broker, outbox__retry_first_s=0.2, outbox__retry_max_s=0.2)
    set_limit = "persistent_term:put(max_message_size, {0}), application:set_env(rabbit, max_message_size, {0})."
    rabbitmq.ctl("eval", set_limit.format(100_000))
    try:
        async with audit(broker) as witness, connected(database) as db:
            await insert(db, "order/1", count=20)
            await insert(db, "big/1", payload=json.dumps("x" * 200_000))
            await insert(db, "order/2", count=20)
            await insert(db, "big/1")
            async with outbox_running(settings) as outbox:
                progress = await shard_of(outbox)
                await witness.wait_for_distinct(40)
                await wait_until(progress, lambda p: p.parked == 2)
                assert [p[:3] for p in await parked(db)] == [("1", 1, "refused"), ("1", 2, "behind")]
                rabbitmq.ctl("eval", set_limit.format(134217728))
                await witness.wait_for_distinct(42)
        assert witness.sequences() == {"order/1": list(range(1, 21)), "order/2": list(range(1, 21)), "big/1": [1, 2]}
    finally:
        rabbitmq.ctl("eval", set_limit.format(134217728))


async def test_drain_ends_when_everything_committed_is_published(database: str, broker: str) -> None:
    async with audit(broker) as witness, connected(database) as db:
        await insert(db, "order/1", count=25)
        process = await RelayProcess.start(settings_for(database, broker, outbox__page_rows=10), "run", "--drain")
        code, logged = await process.wait()
        assert (code, json.loads(logged.splitlines()[-1])["event"]) == (0, "drained")
        await witness.wait_for(25)


async def test_drain_says_with_its_exit_code_that_rows_are_parked(database: str, broker: str) -> None:
    async with connected(database) as db:
        await insert(db, "ghost/1")
    process = await RelayProcess.start(settings_for(database, broker), "run", "--drain")
    code, logged = await process.wait()
    assert code == 8
    assert "1 rows are parked" in logged


async def test_sigterm_drains_checkpoints_and_exits_with_zero(database: str, broker: str) -> None:
    async with audit(broker) as witness, connected(database) as db:
        process = await RelayProcess.start(settings_for(database, broker))
        await insert(db, "order/1", count=10)
        await witness.wait_for(10)
        code, _ = await process.terminate()
        assert code == 0
        again = await RelayProcess.start(settings_for(database, broker), "run", "--drain")
        assert (await again.wait())[0] == 0
        assert len(witness.messages) == 10, "the checkpoint at the end was not written"


async def test_a_standby_takes_over_within_seconds_of_a_kill_9(database: str, broker: str) -> None:
    settings = settings_for(database, broker, outbox__standby_interval_s=0.2)
    async with audit(broker) as witness, connected(database) as db:
        owner = await RelayProcess.start(settings)
        await insert(db, "order/1")
        await witness.wait_for(1)
        standby = await RelayProcess.start(settings)
        try:

            async def waiting() -> Any:
                return await db.fetchval(
                    "SELECT count(*) = 2 FROM pg_stat_activity WHERE application_name = 'relay lease 0' AND datname = current_database()"
                )

            await until(waiting)
            await owner.kill()
            started = asyncio.get_running_loop().time()
            await insert(db, "order/1")
            await witness.wait_for(2)
            assert asyncio.get_running_loop().time() - started < 5
            assert await db.fetchval("SELECT epoch FROM relay.outbox_cursor") == 2
        finally:
            await standby.terminate()
    assert witness.sequences() == {"order/1": [1, 2]}


async def test_an_owner_that_lost_its_lock_without_noticing_cannot_move_the_cursor(database: str, broker: str) -> None:
    settings = settings_for(database, broker)
    async with audit(broker) as witness, connected(database) as db, outbox_running(settings) as outbox:
        await shard_of(outbox)
        await insert(db, "order/1")
        await witness.wait_for(1)
        await db.execute("UPDATE relay.outbox_cursor SET epoch = epoch + 100")  # what a new owner does
        await insert(db, "order/1")
        await witness.wait_for_distinct(2)
        # The zombie's checkpoint was refused, its session ended, and it became an owner of its own right again.

        async def new_epoch() -> Any:
            return await db.fetchval("SELECT epoch = 102 FROM relay.outbox_cursor")

        await until(new_epoch)
        await insert(db, "order/1")
        await witness.wait_for_distinct(3)
    assert witness.sequences() == {"order/1": [1, 2, 3]}


KILL = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = $1 AND datname = current_database()"


@pytest.mark.parametrize("role", ["lease", "reader"])
async def test_a_terminated_connection_costs_nothing_but_a_new_session(database: str, broker: str, role: str) -> None:
    async with audit(broker) as witness, connected(database) as db, outbox_running(settings_for(database, broker)):
        for n in range(1, 6):
            await insert(db, "order/1")
            await witness.wait_for_distinct(n)
            await until(lambda: db.fetchval(KILL, f"relay {role} 0"))
    assert witness.sequences() == {"order/1": [1, 2, 3, 4, 5]}


async def test_a_closed_broker_connection_is_noticed_while_idle_and_the_next_event_flows(
    database: str, broker: str, rabbitmq: RabbitMQ
) -> None:
    async with connected(database) as db, outbox_running(settings_for(database, broker)) as outbox:
        async with audit(broker) as witness:
            await insert(db, "order/1")
            await witness.wait_for(1)
            await wait_until(await shard_of(outbox), lambda p: p.sleeps > 0)
        rabbitmq.close_all_connections()

        async def new_epoch() -> Any:
            return await db.fetchval("SELECT epoch >= 2 FROM relay.outbox_cursor")

        await until(new_epoch)
        async with audit(broker) as witness:
            await insert(db, "order/1")
            await witness.wait_for(1)


async def test_a_deleted_exchange_is_declared_again_and_nothing_is_lost(database: str, broker: str) -> None:
    async with connected(database) as db, outbox_running(settings_for(database, broker)):
        async with audit(broker) as witness:
            await insert(db, "order/1")
            await witness.wait_for(1)
            await witness.exchange.delete()
        await insert(db, "order/1")  # the exchange is gone: this closes the channel
        async with audit(broker) as witness:
            await witness.wait_for_distinct(1, timeout_s=60)


async def test_another_source_than_before_is_refused(database: str, broker: str) -> None:
    async with outbox_running(settings_for(database, broker)) as outbox, connected(database) as db:
        await insert(db, "ghost/1")
        await wait_until(await shard_of(outbox), lambda p: p.parked == 1)
    with pytest.raises(ConfigError, match="published as source 'shop', the setting says 'store'"):
        async with outbox_running(settings_for(database, broker, source="store")) as outbox:
            await asyncio.wait_for(asyncio.shield(outbox.stop.wait()), 2)


async def _run_until_error(settings: Any) -> tuple[int, str]:
    process = await RelayProcess.start(settings, "run")
    return await process.wait(timeout_s=30)


async def test_a_missing_schema_is_an_error_with_its_own_exit_code(empty_database: str, broker: str) -> None:
    code, logged = await _run_until_error(settings_for(empty_database, broker))
    assert code == SchemaError.exit_code
    assert "Run `relay migrate`" in logged


async def test_no_tombstone_type_can_be_inserted_by_hand(database: str) -> None:
    async with connected(database) as db:
        with pytest.raises(asyncpg.CheckViolationError, match="outbox_event_type_is_not_reserved"):
            await insert(db, "order/1", event_type=TOMBSTONE)


def test_pooler_and_broker_errors_have_stable_exit_codes() -> None:
    assert (ConfigError.exit_code, PoolerError.exit_code, SchemaError.exit_code, BrokerRefused.exit_code) == (
        2,
        2,
        3,
        5,
    )


async def test_drain_after_a_backlog_of_whole_pages_publishes_what_came_later(database: str, broker: str) -> None:
    """The last page of a backlog can be full: then an empty page closes its window, and says nothing about what is new."""
    settings = settings_for(database, broker, outbox__page_rows=5)
    async with audit(broker) as witness, connected(database) as db:
        for expected in (10, 11, 12, 17):
            await insert(db, "order/1", count=expected - len(witness.messages))
            await Outbox(settings).run(drain=True)
            await witness.wait_for(expected)
    assert witness.sequences(first_only=False) == {"order/1": list(range(1, 18))}


@asynccontextmanager
async def a_hanging_queue(witness: Audit, broker: str, rabbitmq: RabbitMQ) -> AsyncIterator[Callable[[], object]]:
    """A queue bound to `hung.#` whose process takes nothing until the yielded function is called, or the end."""
    hung = await witness.channel.declare_queue("hung", durable=True)
    await hung.bind(witness.exchange, "hung.#")
    name = f'rabbit_misc:r(<<"{broker.rpartition("/")[2]}">>, queue, <<"hung">>)'
    process = f"{{ok, Q}} = rabbit_amqqueue:lookup({name}), Pid = amqqueue:get_pid(Q)"
    rabbitmq.ctl("eval", f"{process}, sys:suspend(Pid).")
    try:
        yield lambda: rabbitmq.ctl("eval", f"{process}, sys:resume(Pid).")
    finally:
        rabbitmq.ctl("eval", f"{process}, sys:resume(Pid).")


async def test_a_queue_that_never_confirms_holds_only_its_own_aggregates(
    database: str, broker: str, rabbitmq: RabbitMQ
) -> None:
    settings = settings_for(
        database, broker, outbox__confirm_timeout_s=1, outbox__retry_first_s=0.3, outbox__retry_max_s=0.3
    )
    async with audit(broker, "order.#") as witness, connected(database) as db:
        async with a_hanging_queue(witness, broker, rabbitmq) as resume:
            async with outbox_running(settings) as outbox:
                progress = await shard_of(outbox)
                await insert(db, "hung/1", count=2)
                await insert(db, "order/1", count=10)
                await wait_until(progress, lambda p: p.parked == 2)
                assert [p[:3] for p in await parked(db)] == [("1", 1, "unconfirmed"), ("1", 2, "behind")]
                await insert(db, "order/1")
                await witness.wait_for_distinct(11)
                sessions = await db.fetchval("SELECT epoch FROM relay.outbox_cursor")
                for n in range(12, 31):  # while the hung row is tried again and again, alone, the others flow
                    await insert(db, "order/1")
                    await witness.wait_for_distinct(n)

                async def tried_again() -> Any:
                    return await db.fetchval("SELECT max(attempts) > 2 FROM relay.outbox_parked")

                await until(tried_again)
                assert await db.fetchval("SELECT epoch FROM relay.outbox_cursor") == sessions, (
                    "a retry ended the session"
                )
                resume()
                await wait_until(progress, lambda p: p.unparked == 2)
    assert witness.sequences()["order/1"] == list(range(1, 31))


async def test_a_row_that_hangs_alone_in_the_rest_of_a_backlog_does_not_hold_up_what_came_later(
    database: str, broker: str, rabbitmq: RabbitMQ
) -> None:
    settings = settings_for(
        database, broker, outbox__confirm_timeout_s=0.5, outbox__page_rows=2, outbox__retry_first_s=300
    )
    async with audit(broker, "order.#") as witness, connected(database) as db:
        async with a_hanging_queue(witness, broker, rabbitmq):
            await insert(db, "order/1")
            await insert(db, "hung/1")  # the last row of the backlog: nothing that is confirmed follows in its window
            async with outbox_running(settings) as outbox:
                await witness.wait_for_distinct(1)
                await insert(db, "order/1", count=3)
                await wait_until(await shard_of(outbox), lambda p: p.parked == 1)
                await witness.wait_for_distinct(4)


async def test_while_something_stays_unconfirmed_the_log_is_looked_at_seldom(
    database: str, broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as an alarm lasts, say: each look costs the producers' database something. Under load nothing would be noticed of it."""
    looks, sent, answered = 0, asyncio.Event(), asyncio.Event()
    read, publish = Reader.read, FastPublisher.publish

    async def counted(self: Reader, *args: Any, **kwargs: Any) -> Page:
        nonlocal looks
        looks += 1
        return await read(self, *args, **kwargs)

    async def hung(self: FastPublisher, messages: Sequence[Message]) -> list[Outcome]:
        sent.set()
        await answered.wait()
        return await publish(self, messages)

    monkeypatch.setattr(Reader, "read", counted)
    monkeypatch.setattr(FastPublisher, "publish", hung)
    async with audit(broker, "order.#") as witness, connected(database) as db:
        async with outbox_running(settings_for(database, broker)):
            await insert(db, "order/1")
            await sent.wait()
            before = looks
            await asyncio.sleep(1.5)  # no result is waited for: the time is what is measured
            seen = looks - before
            answered.set()
            await witness.wait_for(1)
    assert seen <= 30  # every 80 ms; it was 200 with one look in 5 ms


async def test_a_stuck_row_that_an_operator_frees_is_tried_again_and_what_waits_behind_nothing_is_released(
    database: str, broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.outbox.blocked._RELOAD_S", 0.2)
    settings = settings_for(database, broker, outbox__max_attempts=1)
    async with audit(broker, "order.#") as witness, connected(database) as db, outbox_running(settings) as outbox:
        progress = await shard_of(outbox)
        await insert(db, "ghost/1", count=2)
        await insert(db, "ghost/2", count=2)
        await wait_until(progress, lambda p: p.parked == 4)
        assert {p[3] for p in await parked(db)} == {"stuck", "waiting"}
        await witness.queue.bind(witness.exchange, "ghost.#")
        await db.execute(
            "UPDATE relay.outbox_parked SET state = 'retrying', next_attempt_at = now() WHERE aggregate_id = '1' AND seq = 1"
        )
        await db.execute("DELETE FROM relay.outbox_parked WHERE aggregate_id = '2' AND seq = 1")
        await witness.wait_for_distinct(3)
        await wait_until(progress, lambda p: p.unparked == 3)
        await insert(db, "ghost/2")
        await witness.wait_for_distinct(4)
    assert witness.sequences() == {"ghost/1": [1, 2], "ghost/2": [2, 3]}
