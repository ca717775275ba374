"""One specification for all drivers: what is committed is there, what is rolled back is not, and order is kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar, cast

import asyncpg
import django
import django.conf
import django.db
import psycopg
import pytest
import sqlalchemy as sa
import sqlalchemy.ext.asyncio as sa_async
from django.db import connections, transaction
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy.orm import Session

from relay.errors import InputError
from relay.producer import NewEvent
from relay.producer import asyncpg as by_asyncpg
from relay.producer import django as by_django
from relay.producer import psycopg as by_psycopg
from relay.producer import sqlalchemy as by_sqlalchemy

T = TypeVar("T")
MORE = b"\x00\xff\\'\"{},NULL"


def paid(aggregate_id: str | None = "42", **fields: Any) -> NewEvent:
    if "body" not in fields:
        fields.setdefault("payload", {"amount": 100})
    return NewEvent(aggregate_type="order", aggregate_id=aggregate_id, event_type="OrderPaid", **fields)


class Undo(Exception):
    """Leaves a transaction by its bad exit."""


class Driver:
    """A driver's connection, spoken to in one way. Savepoints are transactions within a transaction."""

    def __init__(self, transaction: Callable[[], AbstractAsyncContextManager[Any]], emit: Any, emit_many: Any) -> None:
        self.transaction = transaction
        self.emit: Callable[..., Awaitable[int | None]] = emit
        self.emit_many: Callable[..., Awaitable[list[int | None]]] = emit_many


def a(function: Callable[..., T]) -> Callable[..., Awaitable[T]]:
    async def called(*args: Any, **options: Any) -> T:
        return function(*args, **options)

    return called


def as_async(manager: Callable[[], Any]) -> Callable[[], AbstractAsyncContextManager[Any]]:
    @asynccontextmanager
    async def entered() -> AsyncIterator[Any]:
        with manager() as inner:
            yield inner

    return entered


@asynccontextmanager
async def with_asyncpg(dsn: str) -> AsyncIterator[Driver]:
    connection = await asyncpg.connect(dsn)
    try:
        yield Driver(
            connection.transaction,
            lambda *x, **o: by_asyncpg.emit(connection, *x, **o),
            lambda *x, **o: by_asyncpg.emit_many(connection, *x, **o),
        )
    finally:
        await connection.close()


@asynccontextmanager
async def with_asyncpg_pool_and_codecs(dsn: str) -> AsyncIterator[Driver]:
    """The caller's own codecs must not matter."""
    import json

    async def init(connection: Any) -> None:
        for name in ("json", "jsonb"):
            await connection.set_type_codec(name, encoder=json.dumps, decoder=json.loads, schema="pg_catalog")

    async with asyncpg.create_pool(dsn, min_size=1, max_size=1, init=init) as pool:
        async with pool.acquire() as connection:
            yield Driver(
                connection.transaction,
                lambda *x, **o: by_asyncpg.emit(connection, *x, **o),
                lambda *x, **o: by_asyncpg.emit_many(connection, *x, **o),
            )


@asynccontextmanager
async def with_psycopg(dsn: str) -> AsyncIterator[Driver]:
    with psycopg.connect(dsn) as connection:
        yield Driver(
            as_async(connection.transaction),
            a(lambda *x, **o: by_psycopg.emit(connection, *x, **o)),
            a(lambda *x, **o: by_psycopg.emit_many(connection, *x, **o)),
        )


@asynccontextmanager
async def with_psycopg_cursor(dsn: str) -> AsyncIterator[Driver]:
    """A cursor with another row factory, of an autocommit connection."""
    with psycopg.connect(dsn, autocommit=True, row_factory=psycopg.rows.dict_row) as connection:
        with connection.cursor() as cursor:
            yield Driver(
                as_async(connection.transaction),
                a(lambda *x, **o: by_psycopg.emit(cursor, *x, **o)),
                a(lambda *x, **o: by_psycopg.emit_many(cursor, *x, **o)),
            )


@asynccontextmanager
async def with_psycopg_async(dsn: str) -> AsyncIterator[Driver]:
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        yield Driver(
            connection.transaction,
            lambda *x, **o: by_psycopg.emit_async(connection, *x, **o),
            lambda *x, **o: by_psycopg.emit_many_async(connection.cursor(), *x, **o),
        )


@contextmanager
def sa_transaction(connection: Any) -> Iterator[None]:
    with connection.begin_nested() if connection.in_transaction() else connection.begin():
        yield


@asynccontextmanager
async def with_sqlalchemy(dsn: str) -> AsyncIterator[Driver]:
    engine = sa.create_engine(dsn.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.NullPool)
    with engine.connect() as connection:
        yield Driver(
            as_async(lambda: sa_transaction(connection)),
            a(lambda *x, **o: by_sqlalchemy.emit(connection, *x, **o)),
            a(lambda *x, **o: by_sqlalchemy.emit_many(connection, *x, **o)),
        )


@asynccontextmanager
async def with_sqlalchemy_session(dsn: str) -> AsyncIterator[Driver]:
    engine = sa.create_engine(dsn.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.NullPool)
    with Session(engine) as session:
        yield Driver(
            as_async(lambda: sa_transaction(session)),
            a(lambda *x, **o: by_sqlalchemy.emit(session, *x, **o)),
            a(lambda *x, **o: by_sqlalchemy.emit_many(session, *x, **o)),
        )


def sa_async_transaction(connection: Any) -> Callable[[], AbstractAsyncContextManager[Any]]:
    return lambda: connection.begin_nested() if connection.in_transaction() else connection.begin()


@asynccontextmanager
async def with_sqlalchemy_async(dsn: str) -> AsyncIterator[Driver]:
    engine = sa_async.create_async_engine(dsn.replace("postgresql://", "postgresql+asyncpg://"), poolclass=sa.NullPool)
    async with engine.connect() as connection:
        yield Driver(
            sa_async_transaction(connection),
            lambda *x, **o: by_sqlalchemy.emit_async(connection, *x, **o),
            lambda *x, **o: by_sqlalchemy.emit_many_async(connection, *x, **o),
        )


@asynccontextmanager
async def with_sqlalchemy_async_session(dsn: str) -> AsyncIterator[Driver]:
    engine = sa_async.create_async_engine(dsn.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.NullPool)
    async with sa_async.AsyncSession(engine) as session:
        yield Driver(
            sa_async_transaction(session),
            lambda *x, **o: by_sqlalchemy.emit_async(session, *x, **o),
            lambda *x, **o: by_sqlalchemy.emit_many_async(session, *x, **o),
        )


@contextmanager
def django_database(dsn: str, **options: Any) -> Iterator[str]:
    """An alias for a database, known to Django for the while."""
    if not django.conf.settings.configured:
        django.conf.settings.configure(DATABASES={})
        django.setup()
    parts = conninfo_to_dict(dsn)
    names = {"NAME": "dbname", "HOST": "host", "PORT": "port", "USER": "user", "PASSWORD": "password"}
    wanted = {key: str(parts[name]) for key, name in names.items() if name in parts}
    configured = {"shop": {"ENGINE": "django.db.backends.postgresql", **wanted, "OPTIONS": options}}
    registered = cast(Any, connections).settings
    registered["shop"] = cast(Any, connections).configure_settings({"default": {}, **configured})["shop"]
    try:
        yield "shop"
    finally:
        del registered["shop"]


@asynccontextmanager
async def with_django(dsn: str, **options: Any) -> AsyncIterator[Driver]:
    with django_database(dsn, **options) as alias:
        # Django refuses its connection inside a running loop, as it should: the driver is called in a thread of its own.
        with one_thread() as within:
            yield Driver(
                lambda: DjangoAtomic(alias, within),
                lambda *x, **o: within(lambda: by_django.emit(*x, using=alias, **o)),
                lambda *x, **o: within(lambda: by_django.emit_many(*x, using=alias, **o)),
            )
            await within(lambda: connections[alias].close())


@asynccontextmanager
async def with_django_server_side_binding(dsn: str) -> AsyncIterator[Driver]:
    async with with_django(dsn, server_side_binding=True) as driver:
        yield driver


@contextmanager
def one_thread() -> Iterator[Callable[[Callable[[], T]], Awaitable[T]]]:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as executor:
        yield lambda function: asyncio.get_running_loop().run_in_executor(executor, function)


class DjangoAtomic:
    def __init__(self, alias: str, within: Any) -> None:
        self.atomic = transaction.atomic(using=alias)
        self.within = within

    async def __aenter__(self) -> None:
        await self.within(self.atomic.__enter__)

    async def __aexit__(self, *exc: Any) -> None:
        await self.within(lambda: self.atomic.__exit__(*exc))


DRIVERS = [
    with_asyncpg,
    with_asyncpg_pool_and_codecs,
    with_psycopg,
    with_psycopg_cursor,
    with_psycopg_async,
    with_sqlalchemy,
    with_sqlalchemy_session,
    with_sqlalchemy_async,
    with_sqlalchemy_async_session,
    with_django,
    with_django_server_side_binding,
]


@pytest.fixture(params=DRIVERS, ids=lambda function: function.__name__)
async def driver(request: pytest.FixtureRequest, database: str) -> AsyncIterator[Driver]:
    async with request.param(database) as opened:
        yield opened


def rows(dsn: str) -> list[Any]:
    with psycopg.connect(dsn, row_factory=psycopg.rows.namedtuple_row) as connection:
        return connection.execute("SELECT * FROM relay.outbox ORDER BY id").fetchall()


async def test_a_committed_event_is_there_as_it_was_given(driver: Driver, database: str) -> None:
    async with driver.transaction():
        assert await driver.emit(paid(payload={"t": 'é\n"\\ %s %(p)s :p1 $1'}, headers={"n": 2**40, "b": True})) == 1
        assert await driver.emit(paid(body=MORE, content_type="image/png", routing_key="a.b", seq=2)) == 2
        assert await driver.emit(paid(None, payload=None)) is None
    first, second, third = rows(database)
    assert (first.aggregate_type, first.aggregate_id, first.seq, first.event_type) == ("order", "42", 1, "OrderPaid")
    assert first.payload == {"t": 'é\n"\\ %s %(p)s :p1 $1'}
    assert first.headers == {"n": 2**40, "b": True}
    assert (first.body, first.content_type, first.routing_key) == (None, None, None)
    assert (second.body, second.payload, second.content_type, second.routing_key) == (MORE, None, "image/png", "a.b")
    assert (third.aggregate_id, third.seq, third.size) == (None, None, len("null"))


async def test_many_events_are_there_as_they_were_given(driver: Driver, database: str) -> None:
    events = [
        paid(payload={"t": 'é\n"\\ {NULL,} %s :p1 $1'}),
        paid(body=MORE, content_type="image/png"),
        paid(payload=None, headers={"traceparent": "00-1"}, routing_key="NULL"),
        paid(None),
        paid(body=b"", seq=4),
    ]
    async with driver.transaction():
        assert await driver.emit_many(events) == [1, 2, 3, None, 4]
    found = sorted(rows(database), key=lambda row: (row.seq is None, row.seq))
    assert [row.payload for row in found] == [{"t": 'é\n"\\ {NULL,} %s :p1 $1'}, None, None, None, {"amount": 100}]
    assert [row.body for row in found] == [None, MORE, None, b"", None]
    assert [row.headers for row in found] == [None, None, {"traceparent": "00-1"}, None, None]
    assert [row.routing_key for row in found] == [None, None, "NULL", None, None]
    assert [row.size for row in found][2] == len("null")


async def test_many_of_one_kind_are_inserted_too(driver: Driver, database: str) -> None:
    """A column of nothing but null has no type of its own."""
    async with driver.transaction():
        assert await driver.emit_many([paid(None)]) == [None]
        assert await driver.emit_many([paid(None, body=b"x"), paid(None, body=b"y")]) == [None, None]
    assert len(rows(database)) == 3


async def test_a_rolled_back_event_is_not_there(driver: Driver, database: str) -> None:
    with suppress(Undo):
        async with driver.transaction():
            await driver.emit(paid())
            await driver.emit_many([paid(), paid("43")])
            raise Undo
    assert rows(database) == []
    async with driver.transaction():
        assert await driver.emit(paid()) == 1, "no hole is left behind"


async def test_a_rollback_to_a_savepoint_takes_the_event_back(driver: Driver, database: str) -> None:
    async with driver.transaction():
        assert await driver.emit(paid()) == 1
        with suppress(Undo):
            async with driver.transaction():
                assert await driver.emit(paid()) == 2
                raise Undo
        assert await driver.emit(paid()) == 2
    assert [row.seq for row in rows(database)] == [1, 2]


async def test_many_are_numbered_in_their_order_and_answered_in_it(driver: Driver, database: str) -> None:
    """2 100: three statements."""
    events = [paid(str(n * 7919 % 13) if n % 11 else None, payload=n) for n in range(2100)]
    async with driver.transaction():
        assert await driver.emit_many([paid("5"), paid("5")]) == [1, 2]
        seqs = await driver.emit_many(iter(events))
    by_payload = {row.payload: row for row in rows(database)[2:]}  # rows: by id
    assert seqs == [by_payload[n].seq for n in range(2100)]
    for aggregate in {event.aggregate_id for event in events} - {None}:
        placed = [(n, row.seq) for n, row in by_payload.items() if row.aggregate_id == aggregate]
        assert placed == sorted(placed), "by id: both in the order given"
        assert [seq for _, seq in placed] == list(range(placed[0][1], placed[0][1] + len(placed)))


async def test_no_events_are_no_statement(driver: Driver, database: str) -> None:
    async with driver.transaction():
        assert await driver.emit_many([]) == []
    assert rows(database) == []


async def test_a_seq_that_is_not_the_next_is_an_error_of_the_driver_that_tells_the_next(driver: Driver) -> None:
    errors = (
        asyncpg.SerializationError,
        psycopg.errors.SerializationFailure,
        sa.exc.DBAPIError,
        django.db.OperationalError,
    )
    async with driver.transaction():
        await driver.emit(paid())
    with pytest.raises(errors, match="seq 7 was given for order/42, but the next one is 2"):
        async with driver.transaction():
            await driver.emit(paid(seq=7))
    with pytest.raises(errors, match="but the next one is 3"):
        async with driver.transaction():
            await driver.emit_many([paid(seq=2), paid(seq=2)])


async def test_a_seq_may_need_all_of_64_bits(driver: Driver, database: str) -> None:
    with psycopg.connect(database) as connection:
        connection.execute("INSERT INTO relay.outbox_aggregate VALUES ('order', '42', 9007199254740992)")
    async with driver.transaction():
        assert await driver.emit(paid(seq=2**53 + 1)) == 2**53 + 1
        assert await driver.emit_many([paid(seq=2**53 + 2), paid()]) == [2**53 + 2, 2**53 + 3]


async def test_what_is_not_a_new_event_is_refused_before_a_statement(driver: Driver) -> None:
    async with driver.transaction():
        with pytest.raises(InputError, match="takes a NewEvent, not a dict"):
            await driver.emit({"event_type": "OrderPaid"})
        with pytest.raises(InputError, match="for several use emit_many"):
            await driver.emit([paid()])
        with pytest.raises(InputError, match=r"^events\[1500\]: .*not a str"):
            await driver.emit_many([*[paid()] * 1500, "OrderPaid"])
        assert await driver.emit(paid()) == 1, "nothing was sent, and the transaction is still good"


async def test_the_role_of_producers_is_enough(database: str) -> None:
    connection = await asyncpg.connect(database)
    try:
        await connection.execute("SET ROLE relay_producer")
        async with connection.transaction():
            assert await by_asyncpg.emit(connection, paid()) == 1
            assert await by_asyncpg.emit_many(connection, [paid(), paid()]) == [2, 3]
    finally:
        await connection.close()


async def test_a_wrong_seq_among_many_leaves_none_of_them(driver: Driver, database: str) -> None:
    """In the second statement of a transaction; the bad one is named by its aggregate."""
    events = [*(paid(str(n)) for n in range(1000, 2001)), paid("9", seq=3)]
    with pytest.raises(Exception, match="seq 3 was given for order/9, but the next one is 1"):
        async with driver.transaction():
            await driver.emit_many(events)
    assert rows(database) == []


async def test_a_wrong_seq_among_many_leaves_none_of_them_in_autocommit_either(database: str) -> None:
    events = [*(paid(str(n)) for n in range(1000, 2001)), paid("9", seq=3)]
    options: Any = {"allow_autocommit": True}
    with suppress(asyncpg.SerializationError):
        plain = await asyncpg.connect(database)
        try:
            await by_asyncpg.emit_many(plain, events, **options)
        finally:
            await plain.close()
    with psycopg.connect(database, autocommit=True) as connection, suppress(psycopg.errors.SerializationFailure):
        by_psycopg.emit_many(connection, events, **options)
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as other:
        with suppress(psycopg.errors.SerializationFailure):
            await by_psycopg.emit_many_async(other, events, **options)
    url = database.replace("postgresql://", "postgresql+psycopg://")
    engine = sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as third, suppress(sa.exc.DBAPIError):
        by_sqlalchemy.emit_many(third, events, **options)
    with django_database(database) as alias, one_thread() as within:
        with suppress(django.db.OperationalError):
            await within(lambda: by_django.emit_many(events, using=alias, **options))
        await within(lambda: connections[alias].close())
    assert rows(database) == []


async def test_two_transactions_with_the_same_aggregates_in_opposite_order_do_not_deadlock(database: str) -> None:
    """The second waits at the first aggregate that both have, so it holds none that the first still wants."""
    aggregates = [str(n) for n in range(30)]

    async def emitted(seed: int) -> None:
        connection = await asyncpg.connect(database)
        try:
            for n in range(15):
                mixed = aggregates if (seed + n) % 2 else aggregates[::-1]
                async with connection.transaction():
                    await by_asyncpg.emit_many(connection, [paid(name) for name in mixed])
        finally:
            await connection.close()

    await asyncio.gather(*map(emitted, range(4)))
    assert len(rows(database)) == 4 * 15 * 30


async def test_rows_reach_the_trigger_in_the_order_of_the_arrays_whatever_the_planner_does(database: str) -> None:
    """Sorted in memory, on disk or not at all, with and without a parallel plan: what `insert_events` is built on."""
    connection = await asyncpg.connect(database)
    try:
        await connection.execute(
            "CREATE FUNCTION parallel() RETURNS text LANGUAGE sql AS $$ SELECT CASE WHEN current_setting('server_version_num')::int < 160000 THEN 'force_parallel_mode' ELSE 'debug_parallel_query' END $$"
        )
        for change in (
            "SELECT 1",
            "SET work_mem = '64kB'",
            "SET enable_sort = off",
            "SELECT set_config(parallel(), 'on', false)",
            "SET jit_above_cost = 0",
        ):
            await connection.execute(change)
            async with connection.transaction():
                events = [paid("1", payload={"n": n, "text": "x" * 500}) for n in range(1000)]
                seqs = await by_asyncpg.emit_many(connection, events)
                assert seqs == sorted(seqs, key=lambda seq: seq or 0), change
                found = await connection.fetch(
                    "SELECT (payload ->> 'n')::int AS n, seq FROM relay.outbox WHERE seq >= $1 ORDER BY id", seqs[0]
                )
                assert [(r["n"], r["seq"]) for r in found] == list(enumerate(seqs)), change
    finally:
        await connection.close()


# --- outside a transaction -------------------------------------------------------------------------------------------


async def test_asyncpg_outside_a_transaction_is_refused(database: str) -> None:
    connection = await asyncpg.connect(database)
    try:
        with pytest.raises(InputError, match=r"not in a transaction: .*connection\.transaction\(\).*allow_autocommit"):
            await by_asyncpg.emit(connection, paid())
        with pytest.raises(InputError, match="not in a transaction"):
            await by_asyncpg.emit_many(connection, [])
        await connection.execute("BEGIN")
        assert await by_asyncpg.emit(connection, paid()) == 1, "begun by hand is begun"
        await connection.execute("COMMIT")
        assert await by_asyncpg.emit(connection, paid(), allow_autocommit=True) == 2
    finally:
        await connection.close()
    assert len(rows(database)) == 2


async def test_a_pool_is_not_a_connection(database: str) -> None:
    async with asyncpg.create_pool(database, min_size=1, max_size=1) as pool:
        with pytest.raises(InputError, match="takes a connection, not a pool"):
            await by_asyncpg.emit(cast(Any, pool), paid())


def test_psycopg_with_autocommit_is_refused_outside_a_transaction(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        with pytest.raises(InputError, match="not in a transaction"):
            by_psycopg.emit(connection, paid())
        with pytest.raises(InputError, match="not in a transaction"):
            by_psycopg.emit_many(connection.cursor(), [paid()])
        with connection.transaction():
            assert by_psycopg.emit(connection, paid()) == 1
        with connection.pipeline(), connection.transaction():
            assert by_psycopg.emit(connection, paid()) == 2
        assert by_psycopg.emit_many(connection, [paid()], allow_autocommit=True) == [3]


def test_psycopg_without_autocommit_begins_by_itself(database: str) -> None:
    with psycopg.connect(database) as connection:
        by_psycopg.emit(connection, paid())
        connection.rollback()
    assert rows(database) == []


async def test_psycopg_async_with_autocommit_is_refused_outside_a_transaction(database: str) -> None:
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        with pytest.raises(InputError, match="not in a transaction"):
            await by_psycopg.emit_async(connection, paid())
        assert await by_psycopg.emit_async(connection, paid(), allow_autocommit=True) == 1


async def test_sync_and_async_of_psycopg_are_told_apart(database: str) -> None:
    with psycopg.connect(database) as connection:
        with pytest.raises(InputError, match=r"use emit$"):
            await by_psycopg.emit_async(cast(Any, connection), paid())
    async with await psycopg.AsyncConnection.connect(database) as other:
        with pytest.raises(InputError, match=r"use emit_async$"):
            by_psycopg.emit(cast(Any, other), paid())


def test_a_cursor_keeps_what_it_has_fetched(database: str) -> None:
    with psycopg.connect(database) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT generate_series(1, 2)")
        by_psycopg.emit(cursor, paid())
        assert cursor.fetchall() == [(1,), (2,)]


@pytest.mark.parametrize("by", ["engine", "connection"])
def test_sqlalchemy_in_autocommit_is_refused(database: str, by: str) -> None:
    url = database.replace("postgresql://", "postgresql+psycopg://")
    options: Any = {"isolation_level": "AUTOCOMMIT"}
    engine = sa.create_engine(url, poolclass=sa.NullPool, **(options if by == "engine" else {}))
    with engine.connect() as plain:
        connection = plain.execution_options(**options) if by == "connection" else plain
        with pytest.raises(InputError, match="not in a transaction"):
            by_sqlalchemy.emit(connection, paid())
        assert by_sqlalchemy.emit(connection, paid(), allow_autocommit=True) == 1


async def test_sqlalchemy_async_in_autocommit_is_refused(database: str) -> None:
    url = database.replace("postgresql://", "postgresql+asyncpg://")
    engine = sa_async.create_async_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        with pytest.raises(InputError, match="not in a transaction"):
            await by_sqlalchemy.emit_many_async(connection, [paid()])
        with pytest.raises(InputError, match=r"use emit_async$"):
            by_sqlalchemy.emit(cast(Any, connection), paid())


def test_sqlalchemy_of_another_database_is_refused() -> None:
    with sa.create_engine("sqlite://", poolclass=sa.StaticPool).connect() as connection:
        with pytest.raises(InputError, match="speaks to sqlite"):
            by_sqlalchemy.emit(connection, paid())
        connection.connection.invalidate()


def test_django_outside_atomic_is_refused(database: str) -> None:
    with django_database(database) as alias:
        with pytest.raises(InputError, match=r"not in a transaction: .*transaction\.atomic\(\)"):
            by_django.emit(paid(), using=alias)
        with pytest.raises(InputError, match="not in a transaction"):
            by_django.emit_many([paid()], using=alias)
        with transaction.atomic(using=alias):
            assert by_django.emit(paid(), using=alias) == 1
        assert by_django.emit(paid(), using=alias, allow_autocommit=True) == 2
        connections[alias].set_autocommit(False)
        assert by_django.emit(paid(), using=alias) == 3
        connections[alias].rollback()
        connections[alias].close()
        del connections[alias]
    assert len(rows(database)) == 2
