"""A connection that falls silent while a consumer waits for another one's locks: found by the laboratory (seed 402).

Both consumers did nothing for ten minutes: the longest time that a batch may wait for its cursors, and nobody asked the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import asyncpg
import pytest
from pydantic import SecretStr

from relay.errors import PostgresError, PostgresRefused, PostgresUnavailable
from relay.inbox.database import Database
from relay.inbox.failures import CommitFailed
from relay.inbox.pace import Pace
from relay.settings import PostgresSettings, Settings
from tests.faults.lab.postgres_proxy import PostgresProxy
from tests.harness.outbox import connected
from tests.integration.inbox_harness import World, eventually, recording, stream, world

READING = "SELECT FROM relay.inbox_progress"
SLOW_COMMIT = """
CREATE TABLE slow (id bigint GENERATED ALWAYS AS IDENTITY);
CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_sleep(0.11);
  IF NEW.id > 1 THEN RAISE EXCEPTION 'no more than one'; END IF;
  RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER slowly AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slowly()
"""
LOCKING = "LOCK TABLE relay.inbox_progress IN ACCESS EXCLUSIVE MODE"
PATIENCE_S = 20.0
"""For what takes a moment."""


@asynccontextmanager
async def through_a_proxy(there: World) -> AsyncIterator[tuple[PostgresProxy, Settings]]:
    parts = urlsplit(there.dsn)
    assert parts.port is not None
    proxy = PostgresProxy(parts.port)
    port = await proxy.start()
    dsn = parts._replace(netloc=parts.netloc.replace(f":{parts.port}", f":{port}")).geturl()
    try:
        yield proxy, there.settings.model_copy(update={"postgres": PostgresSettings(dsn=SecretStr(dsn))})
    finally:
        await proxy.close()


@pytest.mark.parametrize("side", ["request", "answer"])
async def test_a_session_that_is_silent_at_the_locks_of_a_batch_is_given_up_soon_and_the_batch_is_applied(
    database: str, broker: str, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    """`answer`: PostgreSQL has the locks, and keeps them until the next session of ours ends that backend."""
    monkeypatch.setattr("relay.inbox.database._ASK_S", 0.2)
    async with world(database, broker) as there, through_a_proxy(there) as (proxy, settings):
        async with there.running(recording(), settings=settings):
            await there.publish(stream("1", 1))
            await there.until(lambda total: total.applied == 1)
            async with proxy.black_holing_at("FOR UPDATE", side=side) as bites:  # type: ignore[arg-type]
                await there.publish(stream("1", 3)[1:])
                await there.until(lambda total: total.applied >= 3)
                assert bites.count == 1
        assert await there.effects() == [1, 2, 3]


async def test_a_session_that_waits_its_turn_is_left_in_peace_however_often_it_is_asked(
    database: str, broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.inbox.database._ASK_S", 0.02)
    asked, cut = 0, 0
    ask, discard = Database._is_at_work, Database.discard

    async def counted(self: Database) -> bool:
        nonlocal asked
        asked += 1
        return await ask(self)

    def seen(self: Database) -> None:
        nonlocal cut
        cut += 1
        discard(self)

    monkeypatch.setattr(Database, "_is_at_work", counted)
    async with world(database, broker) as there:
        async with there.running(recording()):
            await there.publish(stream("1", 1))
            await there.until(lambda total: total.applied == 1)
            monkeypatch.setattr(Database, "discard", seen)
            async with there.db.transaction():
                await there.db.execute("SELECT FROM relay.inbox_aggregate FOR UPDATE")
                await there.publish(stream("1", 2)[1:])

                async def asked_often() -> bool:
                    return asked >= 5

                await eventually(asked_often)
            await there.until(lambda total: total.applied == 2)
        assert await there.effects() == [1, 2]
    assert cut == 0


@pytest.mark.parametrize("appliers", [1, 2])
async def test_the_time_for_which_another_consumer_is_waited_for_does_not_make_the_next_batch_smaller(
    database: str, broker: str, monkeypatch: pytest.MonkeyPatch, appliers: int
) -> None:
    """Of two appliers one has nothing to do here, and so waits for nobody."""
    took: list[float] = []

    async def patiently(self: Database, locking: Awaitable[object]) -> object:
        self.waited_s += 1000
        return await locking

    monkeypatch.setattr(Database, "patiently", patiently)
    monkeypatch.setattr(Pace, "took", lambda _, messages, seconds: took.append(seconds) if messages else None)
    async with world(database, broker, appliers=appliers) as there, there.running(recording()):
        await there.publish(stream("1", 1))
        await there.until(lambda total: total.applied == 1)
    assert took
    assert all(seconds < 0 for seconds in took)


async def test_a_slow_commit_is_waited_for_as_well(database: str) -> None:
    async with connected(database) as db:
        await db.execute(SLOW_COMMIT)
    slow = Database(PostgresSettings(dsn=SecretStr(database)), application="test")

    async def insert() -> None:
        async with slow.transaction() as tx:
            await tx.execute("INSERT INTO slow DEFAULT VALUES")

    try:
        await insert()
        assert slow.waited_s > 0.1
        before = slow.waited_s
        with pytest.raises(CommitFailed, match="no more than one"):
            await insert()
        assert slow.waited_s - before > 0.1
    finally:
        await slow.close()


class Refusal:
    """A connection that cannot be opened."""

    def __init__(self, error: PostgresError) -> None:
        self.error = error

    async def __aenter__(self) -> None:
        raise self.error

    async def __aexit__(self, *_: object) -> None:
        """It was never open."""


@pytest.mark.parametrize(
    ("error", "at_work"),
    [
        (PostgresUnavailable("too many clients", sqlstate="53300"), True),
        (PostgresRefused("password authentication failed", sqlstate="28P01"), True),
        (PostgresUnavailable("no answer in time"), False),
        (PostgresUnavailable("connection was closed", sqlstate="08003"), False),
    ],
    ids=["full", "password changed", "silent", "closed"],
)
async def test_a_server_that_answers_the_question_with_a_refusal_is_there_and_nobody_is_cut_for_it(
    database: str, broker: str, monkeypatch: pytest.MonkeyPatch, error: PostgresError, at_work: bool
) -> None:
    async with world(database, broker) as there:
        asking = Database(there.settings.postgres, application="test")
        await asking.connection()
        monkeypatch.setattr(Database, "_another", lambda _: Refusal(error))
        try:
            assert await asking._is_at_work() == at_work
        finally:
            await asking.close()


@asynccontextmanager
async def opened(dsn: str) -> AsyncIterator[Database]:
    """A consumer's connection, without the consumer."""
    database = Database(PostgresSettings(dsn=SecretStr(dsn)), application="test")
    await database.connection()
    try:
        yield database
    finally:
        await database.close()


@pytest.mark.parametrize("hidden", ["track_activities=off", "role=relay_consumer"])
async def test_a_session_whose_state_cannot_be_seen_is_left_in_peace_while_it_waits_its_turn(
    database: str, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    monkeypatch.setattr("relay.inbox.database._ASK_S", 0.02)
    answers: list[bool] = []
    asked_often = asyncio.Event()
    ask = Database._is_at_work

    async def seen(self: Database) -> bool:
        answers.append(await ask(self))
        if len(answers) == 3 or not answers[-1]:
            asked_often.set()
        return answers[-1]

    monkeypatch.setattr(Database, "_is_at_work", seen)
    async with connected(database) as other, opened(f"{database}?{hidden}") as waiting:
        async with other.transaction():
            await other.execute(LOCKING)
            reading = asyncio.ensure_future(waiting.patiently((await waiting.connection()).fetch(READING)))
            await asyncio.wait_for(asked_often.wait(), PATIENCE_S)
        assert await asyncio.wait_for(reading, PATIENCE_S) == []
        assert waiting.waited_s > 0
    assert all(answers)


async def test_a_session_that_is_silent_already_when_a_statement_is_parsed_is_given_up(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL calls it active: it has been told of a statement, and not yet to run it."""
    monkeypatch.setattr("relay.inbox.database._ASK_S", 0.02)
    async with opened(database) as waiting:
        connection = await waiting.connection()
        connection._transport.pause_reading()  # type: ignore[attr-defined]
        with pytest.raises(asyncpg.ConnectionDoesNotExistError):
            await waiting.patiently(connection.fetch(READING, timeout=PATIENCE_S))


async def test_an_answer_is_taken_although_the_question_whether_it_will_come_has_none(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the locks: whoever waits for them must not wait until we have given up to connect."""
    monkeypatch.setattr("relay.inbox.database._ASK_S", 0.02)
    asked = asyncio.Event()

    async def never(_: Database) -> bool:
        asked.set()
        await asyncio.Event().wait()
        return False

    monkeypatch.setattr(Database, "_is_at_work", never)
    async with connected(database) as other, opened(database) as waiting:
        async with other.transaction():
            await other.execute(LOCKING)
            reading = asyncio.ensure_future(waiting.patiently((await waiting.connection()).fetch(READING)))
            await asyncio.wait_for(asked.wait(), PATIENCE_S)
        assert await asyncio.wait_for(reading, PATIENCE_S) == []
