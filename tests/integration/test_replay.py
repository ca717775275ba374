"""`relay replay`: retained rows are sent again, to one queue or to everyone; interrupted and resumed without a hole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import aiormq
import pytest

from relay.daemon import Outbox
from relay.errors import BrokerError, BrokerRefused, ConfigError, NothingSelected
from relay.message import TOMBSTONE
from relay.operate.audit import Operator
from relay.operate.replay import Sending, State, require_target
from relay.operate.replays import (
    Replay,
    abandon,
    begin,
    find,
    find_unfinished,
    got_to,
    listed,
    selection_from,
    source_of,
)
from relay.operate.retained import Count, Missing, Retained
from relay.operate.selection import Selection
from relay.postgres.connect import connection
from relay.rabbitmq.stock_publisher import StockPublisher
from relay.sandbox import RabbitMQ
from relay.settings import Settings
from tests.harness.outbox import connected, insert, settings_for, until

ME = Operator(who="tester@here", why="a test")


class Queue:
    """A queue of the test's own: what is in it, in order."""

    def __init__(self, broker: str, name: str) -> None:
        self.name = name
        self._broker = broker

    async def declare(self, *, bind: str | None = None, arguments: dict[str, Any] | None = None) -> Queue:
        async with self._channel() as channel:
            await channel.exchange_declare("relay.events", exchange_type="topic", durable=True)
            await channel.queue_declare(self.name, durable=True, arguments=arguments)
            if bind is not None:
                await channel.queue_bind(self.name, "relay.events", bind)
        return self

    async def take(self) -> list[tuple[str, int | None, str]]:
        """(aggregate, seq, type) of everything in it, taken out."""
        return [
            (f"{h.get('x-aggregate-type')}/{h.get('x-aggregate-id')}", h.get("x-sequence"), kind)
            for h, kind, _ in await self.messages()
        ]

    async def messages(self) -> list[tuple[dict[str, Any], str, str]]:
        """(headers, type, message id) of everything in it, taken out."""
        found = []
        async with self._channel() as channel:
            while (got := await channel.basic_get(self.name, no_ack=True)).delivery_tag:
                properties = got.header.properties
                found.append(
                    (dict(properties.headers or {}), properties.message_type or "", properties.message_id or "")
                )
        return found

    async def count(self) -> int:
        async with self._channel() as channel:
            return (await channel.queue_declare(self.name, passive=True)).message_count or 0

    async def delete(self) -> None:
        async with self._channel() as channel:
            await channel.queue_delete(self.name)

    @asynccontextmanager
    async def _channel(self) -> AsyncIterator[aiormq.abc.AbstractChannel]:
        opened = await aiormq.connect(self._broker)
        try:
            yield await opened.channel(publisher_confirms=True)
        finally:
            await opened.close()


async def published(settings: Settings, events: Sequence[tuple[str, int]], **more: Any) -> None:
    """Events of aggregates, so many of each, that a relay has published: as its cursor tells."""
    await write(settings, events, **more)
    async with connected(settings.postgres.dsn.get_secret_value()) as db:
        await db.execute(
            "UPDATE relay.outbox_cursor SET snapshot = pg_current_snapshot(), source = 'shop', "
            "high_id = (SELECT coalesce(max(id), 0) FROM relay.outbox)"
        )


async def write(settings: Settings, events: Sequence[tuple[str, int]], **more: Any) -> None:
    """Insert events of aggregates, so many of each."""
    async with connected(settings.postgres.dsn.get_secret_value()) as db:
        for aggregate, count in events:
            kind, _, name = aggregate.partition("/")
            await db.execute(
                "INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload) "
                "SELECT $1, $2, $3, '{}' FROM generate_series(1, $4)",
                kind,
                name,
                more.get("event_type", "Changed"),
                count,
            )


async def drain(settings: Settings) -> None:
    await Outbox(settings).run(drain=True)


async def count(settings: Settings, selection: Selection) -> Count:
    async with connection(settings.postgres, application="test") as opened:
        return await Retained(opened).count(selection)


async def begun(settings: Settings, selection: Selection, to_queue: str | None = "one") -> Replay:
    async with connection(settings.postgres, application="test") as opened:
        counted = await Retained(opened).count(selection)
        return await begin(opened, selection=selection, count=counted, to_queue=to_queue, operator=ME)


async def send(settings: Settings, to_send: Replay, *, stop: asyncio.Event | None = None, **more: Any) -> State:
    values: dict[str, Any] = {"rate": 100_000, "stop": stop or asyncio.Event()} | more
    return await Sending(settings, to_send, **values).run()


async def replayed(settings: Settings, selection: Selection, to_queue: str | None = "one", **more: Any) -> State:
    return await send(settings, await begun(settings, selection, to_queue), **more)


@pytest.fixture
def settings(database: str, broker: str) -> Settings:
    return settings_for(database, broker, outbox__page_rows=10)


@pytest.fixture
async def one(broker: str) -> Queue:
    """The one consumer's queue; bound to nothing."""
    return await Queue(broker, "one").declare()


@pytest.fixture
async def everyone(broker: str) -> Queue:
    """What everybody gets."""
    return await Queue(broker, "everyone").declare(bind="#")


async def test_one_queue_gets_what_is_selected_in_order_and_nobody_else_does(
    settings: Settings, one: Queue, everyone: Queue
) -> None:
    await write(settings, [("order/1", 25), ("order/2", 7), ("invoice/1", 3)])
    await drain(settings)
    originals = {message[2] for message in await everyone.messages()}
    state = await replayed(settings, Selection(aggregate_type="order"))
    again = await one.messages()
    assert (state.done, state.sent, state.total, state.unroutable, state.short) == (True, 32, 32, 0, 0)
    assert [h["x-sequence"] for h, _, _ in again if h["x-aggregate-id"] == "1"] == list(range(1, 26))
    assert len(again) == 32
    assert {message_id for _, _, message_id in again} < originals
    assert await everyone.count() == 0


async def test_everyone_gets_it_under_the_routing_key_it_had(settings: Settings, everyone: Queue, broker: str) -> None:
    orders = await Queue(broker, "orders").declare(bind="order.Changed")
    await published(settings, [("order/1", 2), ("invoice/1", 1)])
    await replayed(settings, Selection(everything=True), None)
    assert await orders.take() == [("order/1", 1, "Changed"), ("order/1", 2, "Changed")]
    assert len(await everyone.take()) == 3


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(aggregate="order/1"), ["order/1 1", "order/1 2", "order/1 3"]),
        (Selection(aggregate="order/1", from_seq=2), ["order/1 2", "order/1 3"]),
        (Selection(aggregate="order/1", from_seq=2, to_seq=2), ["order/1 2"]),
        (Selection(aggregate="order/1*", to_seq=1), ["order/1 1", "order/10 1"]),
        (Selection(aggregate="*/1", to_seq=1), ["order/1 1", "invoice/1 1"]),
        (Selection(event_type="Paid"), ["invoice/1 1"]),
        (Selection(aggregate_type="invoice", event_type="Changed"), []),
        (Selection(ids=(1, 4, 999)), ["order/1 1", "order/10 1"]),
        (Selection(ids=(1, 4), aggregate="order/10"), ["order/10 1"]),
        (Selection(since=datetime(2020, 1, 1, tzinfo=UTC), until=datetime(2021, 1, 1, tzinfo=UTC)), ["order/1 2"]),
        (Selection(aggregate="order/1", until=datetime(2021, 1, 1, tzinfo=UTC)), ["order/1 2"]),
        (Selection(everything=True), ["order/1 1", "order/1 2", "order/1 3", "order/10 1", "invoice/1 1"]),
    ],
    ids=lambda value: "-".join(map(str, value.as_json())) if isinstance(value, Selection) else "",
)
async def test_every_filter_selects_what_it_says(
    settings: Settings, one: Queue, everyone: Queue, selection: Selection, expected: list[str]
) -> None:
    await published(settings, [("order/1", 3), ("order/10", 1)])
    await published(settings, [("invoice/1", 1)], event_type="Paid")
    async with connected(settings.postgres.dsn.get_secret_value()) as db:
        await db.execute("UPDATE relay.outbox SET created_at = '2020-06-01Z' WHERE id = 2")
    counted = await count(settings, selection)
    assert counted.rows == len(expected)
    if expected:
        await replayed(settings, selection)
        assert [f"{aggregate} {seq}" for aggregate, seq, _ in await one.take()] == expected
    assert selection_from(json.loads(json.dumps(selection.as_json()))) == selection


async def test_what_is_still_on_its_way_is_left_out(settings: Settings, one: Queue) -> None:
    await published(settings, [("order/1", 3), ("order/2", 1)])
    async with connected(settings.postgres.dsn.get_secret_value()) as db:
        await insert(db, "order/3")  # not published yet
        await db.execute(
            "INSERT INTO relay.outbox_parked (id, shard, aggregate_type, aggregate_id, seq, reason, state) "
            "SELECT id, shard, aggregate_type, aggregate_id, seq, 'nacked', 'stuck' FROM relay.outbox WHERE aggregate_id = '2'"
        )
        state = await replayed(settings, Selection(everything=True))
        assert await one.take() == [("order/1", n, "Changed") for n in (1, 2, 3)]
        assert (state.total, state.short) == (3, 0)


async def test_what_is_published_after_the_start_is_not_part_of_it(settings: Settings, one: Queue) -> None:
    await published(settings, [("order/1", 3)])
    begun_before = await begun(settings, Selection(everything=True))
    await published(settings, [("order/1", 2)])
    await send(settings, begun_before)
    assert [seq for _, seq, _ in await one.take()] == [1, 2, 3]


async def test_a_window_that_is_being_paged_through_counts_up_to_its_position(settings: Settings, one: Queue) -> None:
    await write(settings, [("order/1", 6)])
    async with connected(settings.postgres.dsn.get_secret_value()) as db:
        await db.execute(
            "UPDATE relay.outbox_cursor SET window_snapshot = pg_current_snapshot(), after_id = 4, high_id = 4, source = 'shop'"
        )
    await replayed(settings, Selection(everything=True), live_first=False)
    assert [seq for _, seq, _ in await one.take()] == [1, 2, 3, 4]


async def test_a_skipped_event_is_sent_again_as_its_tombstone(settings: Settings, one: Queue) -> None:
    await published(settings, [("order/1", 3)])
    async with connected(settings.postgres.dsn.get_secret_value()) as db:
        await db.execute(
            "INSERT INTO relay.outbox (aggregate_type, event_type, payload) VALUES ('order', 'Loose', '{}')"
        )
        audit_id = await db.fetchval(
            "INSERT INTO relay.audit (who, side, act, selection, rows) VALUES ('me', 'outbox', 'skip', '{}', 2) RETURNING id"
        )
        await db.execute("INSERT INTO relay.outbox_tombstone VALUES (2, 0, 'skip', $1), (4, 0, 'skip', $1)", audit_id)
    await published(settings, [])
    state = await replayed(settings, Selection(everything=True))
    assert await one.take() == [("order/1", 1, "Changed"), ("order/1", 2, TOMBSTONE), ("order/1", 3, "Changed")]
    assert (state.sent, state.total) == (3, 3)  # without an aggregate nobody waits for it


async def test_rows_that_nobody_is_bound_for_are_counted_and_the_rest_arrives(settings: Settings, broker: str) -> None:
    orders = await Queue(broker, "orders").declare(bind="order.#")
    await published(settings, [("order/1", 2), ("invoice/1", 3)])
    state = await replayed(settings, Selection(everything=True), None)
    assert (state.done, state.sent, state.unroutable) == (True, 5, 3)
    assert len(await orders.take()) == 2


async def test_a_message_that_ends_the_session_is_found_left_out_and_told(
    settings: Settings, rabbitmq: RabbitMQ, broker: str
) -> None:
    """The broker closes the channel over a topic that we may not write to; everything beside it arrives."""
    orders = await Queue(broker, "orders").declare(bind="order.#")
    vhost, user = broker.rpartition("/")[2], urlsplit(broker).username
    may = {"exchange": "relay.events", "write": "^order", "read": ".*"}
    await asyncio.to_thread(rabbitmq.management().request, "PUT", f"/api/topic-permissions/{vhost}/{user}", may)
    await published(settings, [("order/1", 4), ("invoice/1", 1), ("order/2", 3), ("invoice/2", 1), ("order/3", 8)])
    state = await replayed(settings, Selection(everything=True), None)
    assert (state.done, state.sent, state.not_sent_rows) == (True, 17, 2)
    assert [n.row_id for n in state.not_sent] == [5, 9]
    assert "access to topic 'invoice.Changed'" in state.not_sent[0].detail
    assert {(aggregate, seq) for aggregate, seq, _ in await orders.take()} == (
        {("order/1", n) for n in range(1, 5)}
        | {("order/2", n) for n in range(1, 4)}
        | {("order/3", n) for n in range(1, 9)}
    )


async def test_a_queue_that_does_not_exist_is_told_before_anything_is_sent(settings: Settings) -> None:
    with pytest.raises(BrokerRefused, match="the queue 'nowhere' does not exist"):
        await require_target(settings, "nowhere")


async def test_an_interruption_leaves_no_hole_and_repeats_nothing_that_was_noted(
    settings: Settings, one: Queue
) -> None:
    await published(settings, [("order/1", 45)])
    interrupted = await begun(settings, Selection(aggregate="order/1"))
    stop = asyncio.Event()
    first = await send(settings, interrupted, stop=stop, tell=lambda state: stop.set() if state.sent >= 20 else None)
    assert (first.done, first.sent) == (False, 20)
    async with connection(settings.postgres, application="test") as opened:
        found = await find_unfinished(opened, None)
    assert (found.id, found.sent, found.after_id) == (interrupted.id, 20, 20)
    second = await send(settings, found)
    assert (second.done, second.sent, second.sent_now) == (True, 45, 25)
    assert [seq for _, seq, _ in await one.take()] == list(range(1, 46))


async def test_the_database_may_go_away_in_the_middle(settings: Settings, one: Queue) -> None:
    await published(settings, [("order/1", 45)])
    to_send = await begun(settings, Selection(everything=True))
    cut: list[asyncio.Task[Any]] = []

    def tell(state: State) -> None:
        if state.sent == 20 and not cut:
            cut.append(asyncio.ensure_future(end_sessions(settings, f"relay replay {to_send.id}")))

    state = await send(settings, to_send, tell=tell, rate=100)
    assert state.done
    assert await cut[0] == 1
    assert [seq for _, seq, _ in await one.take()] == list(range(1, 46))


async def test_the_broker_may_go_away_in_the_middle(
    settings: Settings, one: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    await published(settings, [("order/1", 45)])
    opened: list[StockPublisher] = []
    trouble: list[str] = []
    open_one = StockPublisher.open

    async def remembered(*args: Any, **kwargs: Any) -> StockPublisher:
        opened.append(await open_one(*args, **kwargs))
        return opened[-1]

    def tell(state: State) -> None:
        if state.sent == 20 and len(opened) == 1:
            opened[0]._session.abort()  # the socket, as a broker that dies would cut it
        if state.trouble is not None:
            trouble.append(state.trouble)

    monkeypatch.setattr(StockPublisher, "open", remembered)
    state = await replayed(settings, Selection(everything=True), tell=tell)
    assert (state.done, len(opened), len(trouble)) == (True, 2, 1)
    assert sorted({seq for _, seq, _ in await one.take() if seq is not None}) == list(range(1, 46))


async def end_sessions(settings: Settings, name: str) -> int:
    async with connected(settings.postgres.dsn.get_secret_value()) as db:
        ended = await db.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1 "
            "AND datname = current_database()",
            name,
        )
    return len(ended)


async def test_a_queue_that_vanishes_ends_it_with_the_way_on_and_it_can_be_resumed(
    settings: Settings, one: Queue
) -> None:
    await published(settings, [("order/1", 45)])
    to_send = await begun(settings, Selection(everything=True))
    await one.delete()
    with pytest.raises(BrokerError, match=f"'one' is gone.*has sent 0 of 45.*--resume {to_send.id}"):
        await send(settings, to_send, patience_s=0.1)
    await one.declare()
    assert (await send(settings, to_send)).done
    assert [seq for _, seq, _ in await one.take()] == list(range(1, 46))


async def test_a_queue_at_its_limit_is_tried_again_and_not_overrun(settings: Settings, broker: str) -> None:
    full = await Queue(broker, "one").declare(arguments={"x-max-length": 20, "x-overflow": "reject-publish"})
    await published(settings, [("order/1", 45)])
    trouble: list[str] = []
    taken: list[int | None] = []
    emptied: list[asyncio.Task[None]] = []

    async def empty() -> None:
        taken.extend(seq for _, seq, _ in await full.take())

    def tell(state: State) -> None:
        if state.trouble is not None:
            trouble.append(state.trouble)
            emptied.append(asyncio.ensure_future(empty()))

    state = await replayed(settings, Selection(everything=True), tell=tell)
    await asyncio.gather(*emptied)
    await empty()
    assert state.done
    assert "at its limit" in trouble[0]
    assert sorted({seq for seq in taken if seq is not None}) == list(range(1, 46))


async def test_two_processes_cannot_send_one_replay(settings: Settings, one: Queue) -> None:
    await published(settings, [("order/1", 45)])
    to_send = await begun(settings, Selection(everything=True))
    stop = asyncio.Event()
    running = asyncio.create_task(send(settings, to_send, rate=20, stop=stop))
    await until(one.count)
    with pytest.raises(ConfigError, match="is being sent by another process"):
        await send(settings, to_send)
    async with connection(settings.postgres, application="test") as opened:
        assert [one.is_running for one in await listed(opened, rows=5)] == [True]
    stop.set()
    await running
    assert (await send(settings, to_send)).done


async def test_a_process_that_comes_back_goes_on_from_where_another_has_taken_the_replay(
    settings: Settings, one: Queue
) -> None:
    await published(settings, [("order/1", 45)])
    to_send = await begun(settings, Selection(aggregate="order/1"))
    stop = asyncio.Event()
    first = Sending(settings, to_send, rate=100_000, stop=stop, tell=lambda _: stop.set())
    await first.run()  # one page, then it loses its session
    async with connection(settings.postgres, application="test") as opened:
        stop_other = asyncio.Event()
        await send(settings, await find(opened, to_send.id), stop=stop_other, tell=_after(30, stop_other))
        assert (await find(opened, to_send.id)).sent == 30
        stop.clear()
        await first.run()
        second = await find(opened, to_send.id)
        assert second.sent == 40
        assert await got_to(opened, to_send.id, after_id=second.after_id - 1, rows=1, state="unfinished") is None
        assert await find(opened, to_send.id) == second, "it went back"
    stop.clear()
    state = await first.run()
    assert (state.done, state.sent) == (True, 45)
    assert [seq for _, seq, _ in await one.take()] == list(range(1, 46))


def _after(rows: int, stop: asyncio.Event) -> Callable[[State], None]:
    """Stops when so many rows have been sent."""

    def tell(state: State) -> None:
        if state.sent >= rows:
            stop.set()

    return tell


async def test_an_answer_that_was_lost_is_not_waited_for_again(settings: Settings, one: Queue) -> None:
    """The last page was noted, and the session broke before its process heard of it."""
    await published(settings, [("order/1", 45)])
    to_send = await begun(settings, Selection(aggregate="order/1"))
    await send(settings, to_send)
    state = await send(settings, to_send)
    assert (state.done, state.sent, state.sent_now) == (True, 45, 0)
    assert await one.count() == 45


async def test_a_replay_that_is_given_up_stops_where_it_runs_and_cannot_be_resumed(
    settings: Settings, one: Queue
) -> None:
    await published(settings, [("order/1", 45)])
    to_send = await begun(settings, Selection(everything=True))
    running = asyncio.create_task(send(settings, to_send, rate=20))
    await until(one.count)
    async with connection(settings.postgres, application="test") as opened:
        await abandon(opened, await find(opened, to_send.id), operator=ME)
        with pytest.raises(ConfigError, match="was abandoned"):
            await running
        with pytest.raises(ConfigError, match=f"replay {to_send.id} is abandoned"):
            await find_unfinished(opened, to_send.id)
        with pytest.raises(NothingSelected, match="no replay is unfinished"):
            await find_unfinished(opened, None)
        acts = await opened.fetch("SELECT act, who, why, rows FROM relay.audit ORDER BY id")
    assert [(act["act"], act["who"], act["why"]) for act in acts] == [
        ("replay", "tester@here", "a test"),
        ("abandon", "tester@here", "a test"),
    ]
    assert acts[0]["rows"] == 45


async def test_numbers_and_rows_that_are_no_longer_retained_are_named(settings: Settings) -> None:
    await published(settings, [("order/1", 30)])
    async with connected(settings.postgres.dsn.get_secret_value()) as db:
        await db.execute("DELETE FROM relay.outbox WHERE seq <= 17 OR seq = 20")  # as if their slots had been emptied
    gone = (await count(settings, Selection(aggregate="order/1"))).missing
    assert gone == Missing(numbers=((1, 17), (20, 20)))
    assert (await count(settings, Selection(aggregate="order/1", from_seq=10, to_seq=18))).missing.numbers == (
        (10, 17),
    )
    assert not (await count(settings, Selection(aggregate="order/1", from_seq=21, to_seq=99))).missing
    assert not (await count(settings, Selection(aggregate="order/1", from_seq=31))).missing
    assert (await count(settings, Selection(ids=(3, 25, 99)))).missing.ids == (3, 99)
    assert (await count(settings, Selection(since=datetime(2020, 1, 1, tzinfo=UTC)))).missing.before is not None


async def test_rows_that_go_while_it_is_interrupted_are_missed(settings: Settings, one: Queue) -> None:
    await published(settings, [("order/1", 30)])
    to_send = await begun(settings, Selection(everything=True))
    async with connected(settings.postgres.dsn.get_secret_value()) as db:
        await db.execute("DELETE FROM relay.outbox WHERE seq > 25")
    state = await send(settings, to_send)
    assert (state.done, state.sent, state.total, state.short) == (True, 25, 30, 5)


async def test_it_waits_while_the_relay_is_behind_and_goes_on_after(settings: Settings, one: Queue) -> None:
    await published(settings, [("order/1", 15)])
    to_send = await begun(settings, Selection(everything=True))
    async with connected(settings.postgres.dsn.get_secret_value()) as db:
        await insert(db, "order/2")
        await db.execute("UPDATE relay.outbox SET created_at = now() - interval '40 s' WHERE aggregate_id = '2'")
    told: list[State] = []
    sending = asyncio.create_task(send(settings, to_send, tell=told.append))

    async def waits() -> bool:
        return bool(told and told[-1].held_back_s)

    await until(waits)
    assert 39 < (told[-1].held_back_s or 0) < 70
    assert await one.count() == 0
    await published(settings, [])  # the relay has caught up
    assert (await sending).done
    assert await one.count() == 15


async def test_the_rate_is_kept(settings: Settings, one: Queue) -> None:
    await published(settings, [("order/1", 40)])
    started = asyncio.get_running_loop().time()
    await replayed(settings, Selection(everything=True), rate=50)
    assert (
        asyncio.get_running_loop().time() - started > 0.55
    )  # the first page of 10 or 25 goes at once, the rest at its time


async def test_another_source_or_another_cluster_is_refused(settings: Settings) -> None:
    async with connection(settings.postgres, application="test") as opened:
        with pytest.raises(NothingSelected, match="no relay has published anything"):
            await source_of(opened, settings)
        await published(settings, [("order/1", 1)])
        assert await source_of(opened, settings) == "shop"
        with pytest.raises(ConfigError, match="published as source 'shop', the setting says 'other'"):
            await source_of(opened, settings.model_copy(update={"source": "other"}))
        await opened.execute("UPDATE relay.outbox_cursor SET cluster_id = 1")
        with pytest.raises(ConfigError, match="restored from another server"):
            await source_of(opened, settings)
