"""The proxies of the fault laboratory do to a connection exactly what they say, and count it exactly."""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aio_pika
import aiormq.exceptions
import asyncpg
import pamqp.frame
import psutil
import psycopg
import pytest
from aio_pika.abc import AbstractChannel, AbstractExchange, AbstractQueue
from pamqp import body, commands, header

from relay.sandbox import Postgres, RabbitMQ
from relay.sandbox.ports import free_ports
from tests.faults.lab import frames, statements
from tests.faults.lab.amqp_proxy import AmqpLink, AmqpProxy
from tests.faults.lab.link import Link
from tests.faults.lab.postgres_proxy import PostgresProxy
from tests.faults.lab.proxy import TcpProxy
from tests.harness.outbox import until

BROKEN = (OSError, aiormq.exceptions.AMQPError, asyncio.CancelledError)
CUT_OFF = (OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)


def through(url: str, proxy: TcpProxy) -> str:
    """The same server, reached through the proxy."""
    parts = urlsplit(url)
    userinfo = parts.netloc.rpartition("@")[0]
    return urlunsplit(parts._replace(netloc=f"{userinfo}@127.0.0.1:{proxy.port}"))


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port


def own_sockets() -> int:
    return len(psutil.Process().net_connections(kind="tcp"))


@pytest.fixture(autouse=True)
async def nothing_is_left() -> AsyncIterator[None]:
    """After every test: no task and no socket more than before."""
    tasks, sockets = asyncio.all_tasks(), own_sockets()
    yield

    async def clean() -> bool:
        return asyncio.all_tasks() <= tasks | {_current()} and own_sockets() <= sockets

    await until(clean, timeout_s=3)


def _current() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


@pytest.fixture(scope="module")
def vhost(rabbitmq: RabbitMQ) -> Iterator[str]:
    """One for all of these tests: they are many and small."""
    name = f"relay_proxies_{secrets.token_hex(4)}"
    yield rabbitmq.create_vhost(name)
    rabbitmq.delete_vhost(name)


@pytest.fixture(scope="module")
def dsn(postgres: Postgres) -> Iterator[str]:
    """The same of a database."""
    name = f"relay_proxies_{secrets.token_hex(4)}"
    yield postgres.create_database(name)
    postgres.drop_database(name)


@pytest.fixture
async def amqp(vhost: str) -> AsyncIterator[AmqpProxy]:
    proxy = AmqpProxy(port_of(vhost), dice=random.Random(7))
    await proxy.start()
    yield proxy
    await proxy.close()
    async with publisher(vhost) as direct:
        await direct.queue.delete(if_unused=False, if_empty=False)


@pytest.fixture
async def pg(dsn: str) -> AsyncIterator[PostgresProxy]:
    proxy = PostgresProxy(port_of(dsn))
    await proxy.start()
    async with session(dsn) as db:
        await db.execute("DROP TABLE IF EXISTS t; CREATE TABLE t (n integer)")
    yield proxy
    await proxy.close()


@asynccontextmanager
async def session(dsn: str, **options: Any) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(dsn, **options)
    try:
        yield connection
    finally:
        connection.terminate()


async def rows(dsn: str) -> list[int]:
    async with session(dsn) as db:
        return [r["n"] for r in await db.fetch("SELECT n FROM t ORDER BY n")]


class Publisher:
    """An aio-pika publisher with a queue behind its exchange."""

    def __init__(self, channel: AbstractChannel, exchange: AbstractExchange, queue: AbstractQueue) -> None:
        self.channel, self.exchange, self.queue = channel, exchange, queue

    async def publish(self, message_id: str, *, key: str = "q", size: int = 10, timeout_s: float = 5) -> Any:
        message = aio_pika.Message(b"x" * size, message_id=message_id, headers={"x-sequence": 1})
        return await self.exchange.publish(message, key, timeout=timeout_s)


@asynccontextmanager
async def publisher(url: str) -> AsyncIterator[Publisher]:
    connection = await aio_pika.connect(url)
    try:
        channel = await connection.channel(on_return_raises=True)
        exchange = await channel.declare_exchange("e")
        queue = await channel.declare_queue("q")
        await queue.bind(exchange, "q")
        yield Publisher(channel, exchange, queue)
    finally:
        with suppress(*BROKEN):
            await asyncio.wait_for(connection.close(), 1)


async def queued(url: str) -> list[str | None]:
    """What the broker has, in order; taken away."""
    found = []
    async with publisher(url) as direct:
        while (message := await direct.queue.get(fail=False, no_ack=True)) is not None:
            found.append(message.message_id)
    return found


# --- AMQP, in front of a real broker


async def test_counts_what_passes_and_knows_the_message_ids(amqp: AmqpProxy, vhost: str) -> None:
    async with publisher(through(vhost, amqp)) as there:
        for n in range(3):
            await there.publish(f"m{n}")
        await there.publish("m0")
        with pytest.raises(aiormq.exceptions.PublishError):
            await there.publish("lost", key="nowhere")
        got = [await there.queue.get() for _ in range(4)]
        taken: asyncio.Queue[Any] = asyncio.Queue()
        await there.publish("m3")
        await there.queue.consume(taken.put)
        await (await taken.get()).ack()
        assert len(amqp.links) == 1
    assert [m.message_id for m in got] == ["m0", "m1", "m2", "m0"]
    assert amqp.published == {"m0": 2, "m1": 1, "m2": 1, "m3": 1, "lost": 1}
    assert amqp.confirmed == {"m0", "m1", "m2", "m3", "lost"}
    assert amqp.returned == {"lost": 1}
    expected = {"connection": 1, "publish": 6, "ack": 6, "return": 1, "deliver": 1, "consumer_ack": 1}
    assert {name: amqp.seen[name] for name in expected} == expected
    assert amqp.seen["nack"] == 0
    await until(lambda: _no_links(amqp))


async def _no_links(proxy: TcpProxy) -> bool:
    return not proxy.links


async def test_a_pipeline_of_publishes_is_confirmed_one_by_one_in_the_books(amqp: AmqpProxy, vhost: str) -> None:
    async with publisher(through(vhost, amqp)) as there:
        await asyncio.gather(*(there.publish(f"m{n}", size=n * 100) for n in range(300)))
    assert amqp.confirmed == amqp.published.keys() == {f"m{n}" for n in range(300)}
    assert amqp.seen["publish"] == 300


async def test_an_ack_becomes_a_nack_of_a_message_that_the_broker_has(amqp: AmqpProxy, vhost: str) -> None:
    async with publisher(through(vhost, amqp)) as there:
        async with amqp.acks_as_nacks(share=0.5) as bites:
            answers = await asyncio.gather(*(there.publish(f"m{n}") for n in range(40)), return_exceptions=True)
        nacked = [a for a in answers if isinstance(a, aiormq.exceptions.DeliveryError)]
        assert len([a for a in answers if isinstance(a, commands.Basic.Ack)]) + len(nacked) == 40
        assert 0 < len(nacked) == bites.count < 40
        assert isinstance(await there.publish("after"), commands.Basic.Ack)
    assert await queued(vhost) == [f"m{n}" for n in range(40)] + ["after"]
    assert len(amqp.confirmed) == 41


async def test_all_that_an_ack_stands_for_is_nacked_by_one_nack(amqp: AmqpProxy, vhost: str) -> None:
    async with publisher(through(vhost, amqp)) as there, amqp.acks_as_nacks(share=1, multiple=True) as bites:
        answers = await asyncio.gather(*(there.publish(f"m{n}") for n in range(40)), return_exceptions=True)
    assert bites.count == len([a for a in answers if isinstance(a, aiormq.exceptions.DeliveryError)]) == 40
    assert len(await queued(vhost)) == 40


async def test_a_dropped_ack_leaves_the_publisher_waiting_for_a_message_that_the_broker_has(
    amqp: AmqpProxy, vhost: str
) -> None:
    async with publisher(through(vhost, amqp)) as there:
        async with amqp.dropping_acks() as bites:
            waiting = asyncio.create_task(there.publish("m"))
            await until(lambda: _has_bitten(bites))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(waiting), 0.05)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert bites.count == amqp.seen["ack"] == 1
    assert amqp.confirmed == {"m"}
    assert await queued(vhost) == ["m"]


async def _has_bitten(bites: Any) -> bool:
    return bool(bites.count)


async def test_a_connection_is_cut_instead_of_its_ack_as_often_as_told(amqp: AmqpProxy, vhost: str) -> None:
    async with amqp.cutting_at_ack() as bites:
        async with publisher(through(vhost, amqp)) as there:
            with pytest.raises(BROKEN):
                await there.publish("cut")
        async with publisher(through(vhost, amqp)) as there:
            await there.publish("later")
    assert bites.count == 1
    assert amqp.confirmed == {"cut", "later"}
    assert await queued(vhost) == ["cut", "later"]


@pytest.mark.parametrize(
    ("where", "size"), [(frames.METHOD, 1000), (frames.HEADER, 0), (frames.BODY, 1000), (frames.BODY, 0)]
)
async def test_a_publish_that_is_cut_in_its_middle_is_not_in_the_broker(
    amqp: AmqpProxy, vhost: str, where: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amqp.dice, "choice", lambda kinds: where)
    async with publisher(through(vhost, amqp)) as there, amqp.cutting_inside_publish() as bites:
        with pytest.raises(BROKEN):
            await there.publish("cut", size=size)
    async with publisher(through(vhost, amqp)) as there:
        await there.publish("whole")
    assert bites.count == 1
    assert amqp.published == {"whole": 1}
    assert await queued(vhost) == ["whole"]


async def test_a_broker_that_refuses_a_channel_is_counted(amqp: AmqpProxy, vhost: str) -> None:
    async with publisher(through(vhost, amqp)) as there:
        with pytest.raises(aiormq.exceptions.ChannelClosed):
            await there.channel.declare_queue("no such queue", passive=True)
    assert amqp.seen["channel_close"] == 1


async def test_delay_is_added_each_way_and_keeps_the_order(amqp: AmqpProxy, vhost: str) -> None:
    async with publisher(through(vhost, amqp)) as there:
        async with amqp.delaying(0.1) as bites:
            started = time.monotonic()
            late = asyncio.gather(*(there.publish(f"m{n}") for n in range(20)))
            await until(lambda: _has_bitten(bites))
        await there.publish("last")  # sent without delay, while others are on their way
        await late
        assert time.monotonic() - started >= 0.1
        async with amqp.delaying(0.1):
            started = time.monotonic()
            await there.publish("alone")
            assert time.monotonic() - started >= 0.2
    assert await queued(vhost) == [f"m{n}" for n in range(20)] + ["last", "alone"]


# --- any protocol, in front of an echo


@pytest.fixture
async def echo() -> AsyncIterator[int]:
    """A server that says what it is told."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


@pytest.fixture
async def proxy(echo: int) -> AsyncIterator[TcpProxy]:
    proxy = TcpProxy(echo)
    await proxy.start()
    yield proxy
    await proxy.close()


class Client:
    """One connection to the echo."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def says(self, text: bytes, *, timeout_s: float = 2) -> bytes:
        self.writer.write(text)
        return await asyncio.wait_for(self.reader.readexactly(len(text)), timeout_s)

    async def is_silent(self, text: bytes = b"?") -> bool:
        """No answer for a while. That one would have come, the black hole's own count shows."""
        try:
            await self.says(text, timeout_s=0.05)
        except TimeoutError:
            return True
        return False

    async def is_cut(self) -> bool:
        try:
            return await asyncio.wait_for(self.reader.read(1), 2) == b""
        except ConnectionResetError:
            return True


@asynccontextmanager
async def client(proxy: TcpProxy) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


async def test_large_streams_pass_whole_even_to_a_slow_reader(proxy: TcpProxy) -> None:
    data = random.Random(1).randbytes(5_000_000)
    async with client(proxy) as there:
        there.writer.write(data)
        await asyncio.sleep(0)
        assert await asyncio.wait_for(there.reader.readexactly(len(data)), 10) == data


async def test_nothing_is_read_for_a_peer_that_does_not_read(proxy: TcpProxy) -> None:
    async with client(proxy) as there:
        await there.says(b"hello")
        [link] = proxy.links
        link.server.pause_writing()
        assert not link.client.transport.is_reading()
        link.server.resume_writing()
        assert await there.says(b"again") == b"again"


async def test_a_cut_ends_every_connection_and_says_how_many(proxy: TcpProxy) -> None:
    async with client(proxy) as one, client(proxy) as two:
        await asyncio.gather(one.says(b"hello"), two.says(b"hello"))
        assert proxy.cut() == 2
        assert await one.is_cut()
        assert await two.is_cut()
        async with client(proxy) as three:
            assert await three.says(b"again") == b"again"
    assert proxy.seen["connection"] == 3


async def test_a_black_hole_swallows_bytes_and_goodbyes_and_what_lost_some_stays_silent(proxy: TcpProxy) -> None:
    async with client(proxy) as busy, client(proxy) as idle:
        await asyncio.gather(busy.says(b"hello"), idle.says(b"hello"))
        async with proxy.black_hole() as bites, client(proxy) as new:
            assert await busy.is_silent(b"four")
            assert await new.is_silent(b"seven..")
            assert bites.count == 11
            links = set(proxy.links)
            new.writer.close()
            idle.writer.close()
            await until(lambda: _is_gone(proxy, links))
            [half_open] = [link for link in proxy.links if link.client.gone]
            assert not half_open.server.gone, "the server heard a goodbye out of a black hole"
        await until(lambda: _count_is(proxy, 1))
        assert await busy.is_silent()
        [lost] = proxy.links
        lost.received(lost.server, b"what the server says by itself")
        assert await busy.is_silent()
        async with client(proxy) as later:
            assert await later.says(b"healed") == b"healed"
    await until(lambda: _no_links(proxy))


async def _is_gone(proxy: TcpProxy, before: set[Any]) -> bool:
    return len(proxy.links) == 2 and any(link.client.gone for link in proxy.links)


async def _count_is(proxy: TcpProxy, count: int) -> bool:
    return len(proxy.links) == count


async def test_a_connection_that_lost_nothing_in_a_black_hole_goes_on(proxy: TcpProxy) -> None:
    async with client(proxy) as idle:
        await idle.says(b"before")
        async with proxy.black_hole() as bites:
            pass
        assert bites.count == 0
        assert await idle.says(b"after") == b"after"


async def test_refusing_cuts_the_old_and_turns_away_the_new(proxy: TcpProxy) -> None:
    async with client(proxy) as old:
        await old.says(b"hello")
        async with proxy.refusing() as bites:
            assert await old.is_cut()
            async with client(proxy) as new:
                assert await new.is_cut()
        assert bites.count == 2
        async with client(proxy) as later:
            assert await later.says(b"again") == b"again"


async def test_a_server_that_is_down_is_a_reset_and_one_that_is_back_is_reached(unused_port: int) -> None:
    proxy = TcpProxy(unused_port)
    await proxy.start()
    async with client(proxy) as early:
        assert await early.is_cut()
    server = await asyncio.start_server(_greet, "127.0.0.1", unused_port)
    async with client(proxy) as later:
        assert await asyncio.wait_for(later.reader.read(), 2) == b"back"
    assert proxy.seen["connection"] == 1
    server.close()
    await proxy.close()


async def _greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"back")
    writer.close()


@pytest.fixture
def unused_port() -> int:
    return free_ports(1)[0]


async def test_close_ends_what_is_on_its_way(proxy: TcpProxy) -> None:
    async with client(proxy) as there:
        await there.says(b"hello")
        async with proxy.delaying(30):
            there.writer.write(b"late")
            await until(lambda: _is_late(proxy))
        await proxy.close()
        assert await there.is_cut()
    assert not proxy.links


async def _is_late(proxy: TcpProxy) -> bool:
    return any(link.server._late for link in proxy.links)


async def test_a_connection_that_is_cut_before_its_dialling_began_is_forgotten(
    proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that is cancelled before its first step runs nothing of what it is made of: `close` waited for ever."""
    accepted = proxy.accepted

    def accept_and_cut(link: Link) -> None:
        accepted(link)
        proxy.cut()

    monkeypatch.setattr(proxy, "accepted", accept_and_cut)
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    async with asyncio.timeout(5):
        await proxy.close()
    assert not proxy.links


async def test_the_same_mode_is_not_entered_twice(amqp: AmqpProxy) -> None:
    for mode in (
        amqp.black_hole,
        amqp.refusing,
        lambda: amqp.delaying(0.1),
        amqp.dropping_acks,
        amqp.acks_as_nacks,
        amqp.cutting_at_ack,
        amqp.cutting_inside_publish,
    ):
        async with mode():
            with pytest.raises(RuntimeError):
                await mode().__aenter__()


# --- PostgreSQL


async def test_a_cut_before_commit_leaves_nothing_in_the_table(pg: PostgresProxy, dsn: str) -> None:
    async with session(through(dsn, pg)) as db, pg.cutting_at("^COMMIT") as bites:
        await db.execute("BEGIN")
        await db.execute("INSERT INTO t VALUES (1)")
        with pytest.raises(CUT_OFF):
            await db.execute("COMMIT")
    assert bites.count == 1
    assert await rows(dsn) == []


async def test_a_cut_at_the_answer_of_commit_leaves_the_row_and_a_client_that_does_not_know(
    pg: PostgresProxy, dsn: str
) -> None:
    async with session(through(dsn, pg)) as db, pg.cutting_at("^COMMIT", side="answer") as bites:
        with pytest.raises(CUT_OFF):
            async with db.transaction():
                await db.execute("INSERT INTO t VALUES (1)")
    assert bites.count == 1
    assert await rows(dsn) == [1]


async def test_a_prepared_statement_is_known_by_its_text_whenever_it_runs(pg: PostgresProxy, dsn: str) -> None:
    async with session(through(dsn, pg)) as db:
        await db.execute("INSERT INTO t VALUES ($1)", 1)
        await db.fetchval("SELECT count(*) FROM t WHERE n = $1", 1)
        async with pg.cutting_at(r"INSERT\s+INTO t", side="answer") as bites:
            assert await db.fetchval("SELECT count(*) FROM t WHERE n = $1", 1) == 1
            with pytest.raises(CUT_OFF):
                await db.execute("INSERT INTO t VALUES ($1)", 2)
    assert bites.count == 1
    assert await rows(dsn) == [1, 2]


async def test_a_commit_is_told_from_others_by_what_its_transaction_did(pg: PostgresProxy, dsn: str) -> None:
    async with session(through(dsn, pg)) as db:
        await db.execute("DELETE FROM t WHERE n = $1", 0)
        async with pg.cutting_at("^COMMIT", after="DELETE FROM t", side="answer") as bites:
            async with db.transaction():
                await db.execute("INSERT INTO t VALUES (1)")
            assert bites.count == 0
            await db.execute("BEGIN")
            await db.execute("INSERT INTO t VALUES (2)")
            await db.execute("DELETE FROM t WHERE n = $1", 1)
            with pytest.raises(CUT_OFF):
                await db.execute("COMMIT")
    assert bites.count == 1
    assert await rows(dsn) == [2]


async def test_it_cuts_as_often_as_told_and_an_error_does_not_count(pg: PostgresProxy, dsn: str) -> None:
    async with pg.cutting_at("INSERT", side="answer", times=2) as bites:
        async with session(through(dsn, pg)) as db:
            with pytest.raises(asyncpg.UndefinedColumnError):
                await db.execute("INSERT INTO t (nothing) VALUES (0)")
        assert bites.count == 0
        for n in range(2):
            async with session(through(dsn, pg)) as db:
                with pytest.raises(CUT_OFF):
                    await db.execute(f"INSERT INTO t VALUES ({n})")
        async with session(through(dsn, pg)) as db:
            await db.execute("INSERT INTO t VALUES (2)")
    assert bites.count == 2
    assert await rows(dsn) == [0, 1, 2]


@pytest.mark.parametrize(("side", "expected"), [("request", []), ("answer", [1])])
async def test_a_session_falls_silent_at_a_statement_and_the_server_keeps_it_until_the_mode_ends(
    pg: PostgresProxy, dsn: str, side: Any, expected: list[int]
) -> None:
    async with session(dsn) as direct:
        async with pg.black_holing_at("INSERT", side) as bites:
            async with session(through(dsn, pg)) as db:
                pid = db.get_server_pid()
                statement = asyncio.create_task(db.execute("INSERT INTO t VALUES (1)"))
                await until(lambda: _has_bitten(bites))
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(statement), 0.05)
            await asyncio.gather(statement, return_exceptions=True)
            await until(lambda: _client_is_gone(pg))
            assert await direct.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", pid) == 1
        await until(lambda: _has_no_backend(direct, pid))
    assert bites.count == 1
    assert await rows(dsn) == expected


async def _client_is_gone(proxy: TcpProxy) -> bool:
    return all(link.client.gone for link in proxy.links)


async def _has_no_backend(direct: Any, pid: int) -> bool:
    return bool(await direct.fetchval("SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)", pid))


async def test_a_cancel_request_passes(pg: PostgresProxy, dsn: str) -> None:
    async with session(through(dsn, pg)) as db:
        with pytest.raises(TimeoutError):
            await db.fetchval("SELECT pg_sleep(60)", timeout=0.1)
        assert await asyncio.wait_for(db.fetchval("SELECT 1"), 5) == 1
    assert pg.seen["connection"] == 2


@pytest.mark.parametrize("wishes", [{"ssl": "prefer"}, {"ssl": False}])
async def test_a_client_may_ask_for_encryption_and_be_told_no(
    pg: PostgresProxy, dsn: str, wishes: dict[str, Any]
) -> None:
    async with session(through(dsn, pg), **wishes) as db, pg.cutting_at("SELECT 7") as bites:
        assert await db.fetchval("SELECT repeat('x', 3000000)") == "x" * 3_000_000
        with pytest.raises(CUT_OFF):
            await db.execute("SELECT 7")
    assert bites.count == 1


async def test_psycopg_is_understood_as_well(pg: PostgresProxy, dsn: str) -> None:
    connection = await psycopg.AsyncConnection.connect(through(dsn, pg))
    try:
        async with pg.cutting_at("^COMMIT", side="answer", after="INSERT") as bites:
            await connection.execute("INSERT INTO t VALUES (%s)", (1,))
            with pytest.raises(psycopg.OperationalError):
                await connection.commit()
    finally:
        await connection.close()
    assert bites.count == 1
    assert await rows(dsn) == [1]


# --- pure


def test_a_message_id_is_found_whatever_other_properties_there_are() -> None:
    values: dict[str, Any] = {
        "content_type": "application/json",
        "content_encoding": "",
        "headers": {"a": 1, "b": {"c": [True, "x" * 500]}},
        "delivery_mode": 2,
        "priority": 3,
        "correlation_id": "c",
        "reply_to": "r" * 255,
        "expiration": "60",
        "message_id": "the ïd",
        "message_type": "Booked",
        "user_id": "u",
        "app_id": "shop",
    }
    for size in (0, 1, 2, len(values) - 1, len(values)):
        for names in itertools.combinations(values, size):
            properties = commands.Basic.Properties(**{name: values[name] for name in names})
            data = pamqp.frame.marshal(header.ContentHeader(body_size=77, properties=properties), 5)
            frame = frames.Frame(frames.HEADER, 5, data)
            assert frame.message_id == (values["message_id"] if "message_id" in names else None), names
            assert frame.body_size == 77


def test_frames_are_the_same_however_they_are_torn() -> None:
    wire = b"AMQP\x00\x00\x09\x01" + b"".join(publish(1, f"m{n}", b"\xce" * n * 50) for n in range(6))
    whole, expected = frames.Splitter().feed(wire)
    assert whole == wire
    assert [f.kind for f in expected[:4]] == [frames.PROTOCOL, frames.METHOD, frames.HEADER, frames.METHOD]
    for seed in range(50):
        dice, splitter = random.Random(seed), frames.Splitter()
        found: list[frames.Frame] = []
        rest = wire
        while rest:
            size = dice.choice((1, 3, 7, 20, 300))
            found += splitter.feed(rest[:size])[1]
            rest = rest[size:]
        assert [bytes(f.data) for f in found] == [bytes(f.data) for f in expected]


def test_built_answers_are_what_pamqp_reads() -> None:
    for frame, kind in ((frames.ack(3, 2**40, multiple=True), "Basic.Ack"), (frames.nack(3, 2**40), "Basic.Nack")):
        _, channel, method = pamqp.frame.unmarshal(frame)
        assert (channel, method.name, method.delivery_tag) == (3, kind, 2**40)  # type: ignore[union-attr]
        assert method.multiple is (kind == "Basic.Ack")  # type: ignore[union-attr]


def publish(channel: int, message_id: str, content: bytes = b"", exchange: str = "e") -> bytes:
    parts: list[Any] = [
        commands.Basic.Publish(exchange=exchange, routing_key="k"),
        header.ContentHeader(body_size=len(content), properties=commands.Basic.Properties(message_id=message_id)),
    ]
    return b"".join(
        pamqp.frame.marshal(p, channel) for p in (*parts, *([body.ContentBody(content)] if content else []))
    )


def method(channel: int, value: Any) -> bytes:
    return pamqp.frame.marshal(value, channel)


def answers(wire: bytes) -> list[tuple[str, int, bool]]:
    """(method, tag, multiple) of each frame."""
    found = []
    while wire:
        size, _, value = pamqp.frame.unmarshal(wire)
        found.append((value.name, value.delivery_tag, value.multiple))  # type: ignore[union-attr]
        wire = wire[size:]
    return found


def confirming_link(proxy: AmqpProxy, *message_ids: str, channel: int = 1) -> AmqpLink:
    link = AmqpLink(proxy)
    link.from_client(method(channel, commands.Channel.Open()))
    link.from_client(publish(channel, "before confirms"))
    link.from_client(method(channel, commands.Confirm.Select()))
    for message_id in message_ids:
        link.from_client(publish(channel, message_id))
    return link


def test_tags_count_from_confirm_select_and_an_ack_of_several_confirms_only_what_is_open() -> None:
    proxy = AmqpProxy(0)
    link = confirming_link(proxy, "a", "b", "c", "d")
    link.from_server(frames.ack(1, 2))
    assert proxy.confirmed == {"b"}
    link.from_server(frames.nack(1, 1))
    link.from_server(frames.ack(1, 3, multiple=True))
    assert proxy.confirmed == {"b", "c"}, "the nacked one is none of those that the multiple ack stands for"
    link.from_server(frames.ack(1, 0, multiple=True))
    assert proxy.confirmed == {"b", "c", "d"}
    assert proxy.published == {"before confirms": 1, "a": 1, "b": 1, "c": 1, "d": 1}
    assert (proxy.seen["ack"], proxy.seen["nack"]) == (3, 1)


def test_channels_have_tags_of_their_own_and_a_reopened_one_begins_again() -> None:
    proxy = AmqpProxy(0)
    link = confirming_link(proxy, "a")
    link.from_client(method(2, commands.Channel.Open()) + method(2, commands.Confirm.Select()) + publish(2, "x"))
    link.from_server(frames.ack(2, 1))
    assert proxy.confirmed == {"x"}
    link.from_client(method(1, commands.Channel.Open()) + method(1, commands.Confirm.Select()) + publish(1, "b"))
    link.from_server(frames.ack(1, 1))
    assert proxy.confirmed == {"x", "b"}


async def test_an_ack_of_several_is_split_into_nacks_and_an_ack_of_the_rest() -> None:
    proxy = AmqpProxy(0, dice=random.Random(3))
    link = confirming_link(proxy, *(f"m{n}" for n in range(1, 21)))
    async with proxy.acks_as_nacks(share=0.3) as bites:
        got = answers(link.from_server(frames.ack(1, 20, multiple=True)))
    nacked = [tag for name, tag, multiple in got if name == "Basic.Nack" and not multiple]
    assert 0 < len(nacked) == bites.count < 20
    rest = max(set(range(1, 21)) - set(nacked))
    assert got == [("Basic.Nack", tag, False) for tag in nacked] + [("Basic.Ack", rest, True)]


async def test_an_ack_that_overtook_another_is_never_turned_into_a_multiple_nack() -> None:
    proxy = AmqpProxy(0)
    link = confirming_link(proxy, "a", "b", "c")
    async with proxy.acks_as_nacks(share=1, multiple=True) as bites:
        assert answers(link.from_server(frames.ack(1, 2))) == [("Basic.Ack", 2, False)]
        assert answers(link.from_server(frames.ack(1, 1))) == [("Basic.Nack", 1, True)]
        assert answers(link.from_server(frames.ack(1, 0, multiple=True))) == [("Basic.Nack", 3, True)]
    assert bites.count == 2


async def test_a_lie_about_one_exchange_spares_and_does_not_count_what_went_to_another() -> None:
    proxy = AmqpProxy(0)
    link = confirming_link(proxy, "event", "event too")
    link.from_client(publish(1, "mark", exchange="other"))
    async with proxy.acks_as_nacks(share=1, about="e") as nacks:
        got = answers(link.from_server(frames.ack(1, 3, multiple=True)))
    assert (got[:2], nacks.count) == ([("Basic.Nack", 1, False), ("Basic.Nack", 2, False)], 2)
    link.from_client(publish(1, "mark", exchange="other") + publish(1, "event"))
    async with proxy.dropping_acks(about="e") as dropped:
        assert link.from_server(frames.ack(1, 4) + frames.ack(1, 5)) == b""
    assert dropped.count == 1, "both are dropped, and only the event counts"
    link.from_client(publish(1, "mark", exchange="other") + publish(1, "event"))
    async with proxy.cutting_at_ack(about="e") as cuts:
        assert answers(link.from_server(frames.ack(1, 6))) == [("Basic.Ack", 6, False)]
        assert (link.doomed, cuts.count) == (None, 0)
        assert link.from_server(frames.ack(1, 7)) == b""
    assert (link.doomed, cuts.count) == ("reset", 1)
    other = AmqpLink(proxy)
    async with proxy.cutting_inside_publish(about="e") as cuts:
        mark = publish(1, "mark", exchange="other")
        assert other.from_client(mark) == mark
        assert other.from_client(event := publish(1, "event", b"content")) != event
    assert cuts.count == 1


def test_a_watch_counts_what_is_handed_out_while_it_lasts_and_tells_redeliveries_apart() -> None:
    def deliver(message_id: str, *, redelivered: bool) -> bytes:
        parts = (
            commands.Basic.Deliver("consumer", 1, redelivered, "e", "k"),
            header.ContentHeader(body_size=0, properties=commands.Basic.Properties(message_id=message_id)),
        )
        return b"".join(pamqp.frame.marshal(part, 1) for part in parts)

    proxy = AmqpProxy(0)
    link = AmqpLink(proxy)
    link.from_server(deliver("before", redelivered=True))
    with proxy.watching() as watch:
        link.from_server(
            deliver("a", redelivered=False) + deliver("a", redelivered=True) + deliver("b", redelivered=True)
        )
    link.from_server(deliver("after", redelivered=False))
    assert (watch.first, watch.again) == ({"a": 1}, {"a": 1, "b": 1})


def test_what_is_no_amqp_passes_unread() -> None:
    link = AmqpLink(AmqpProxy(0))
    hello = b"\x16\x03\x01" + bytes(300)
    assert link.from_client(hello[:4]) + link.from_client(hello[4:]) == hello


def test_statements_are_the_same_however_they_are_torn() -> None:
    def message(kind: bytes, data: bytes) -> bytes:
        return kind + (len(data) + 4).to_bytes(4, "big") + data

    wire = (
        message(b"", b"\x00\x03\x00\x00user\0x\0\0")
        + message(b"Q", b"BEGIN;\0")
        + message(b"P", b"s1\0SELECT $1\0\0\0")
        + message(b"B", b"\0s1\0" + bytes(300))
        + message(b"E", b"\0" + bytes(4))
        + message(b"S", b"")
        + message(b"C", b"Ss1\0")
        + message(b"B", b"p\0s1\0")
        + message(b"E", b"p\0" + bytes(4))
        + message(b"Q", b"COMMIT\0")
    )
    for size in (1, 2, 5, 11, 1000):
        splitter, known, run, passed = statements.Splitter(starts=True), statements.Statements(), [], b""
        for at in range(0, len(wire), size):
            data = wire[at : at + size]
            while True:
                whole, found = splitter.feed(data)
                passed, data = passed + whole, b""
                run += [text for m in found if m.kind and (text := known.run_by(m)) is not None]
                if not found or found[-1].kind != statements.STARTUP:
                    break
                splitter.starting = False
        assert run == ["BEGIN;", "SELECT $1", "", "COMMIT"]
        assert passed == wire
