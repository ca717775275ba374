"""The models of the simulation answer as PostgreSQL answers: relay's own Reader, Store and Applier, on both, side by side.

Everything is compared that relay can see: pages, blocked aggregates, what is due; cursors, held messages, effects.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import asyncpg
import pytest
from pydantic import SecretStr

from relay.errors import LeaseLost
from relay.inbox.apply import Applier
from relay.inbox.database import Database
from relay.inbox.handlers import Inbox
from relay.inbox.sequencer import Arrival
from relay.inbox.work import Batch, Rules
from relay.message import Event, to_event
from relay.outbox.cursor import Position, Snapshot
from relay.outbox.parking import Parked
from relay.outbox.reader import Reader
from relay.outbox.store import Due, Store
from relay.postgres.connect import Connection as RealConnection
from relay.postgres.connect import connection
from relay.postgres.planning import Planning
from relay.settings import PostgresSettings
from tests.faults.simulation import inbox_world, outbox_world
from tests.faults.simulation.clock import VirtualLoop
from tests.faults.simulation.connection import Connection, Process
from tests.faults.simulation.inbox_database import EFFECT, InboxDatabase
from tests.faults.simulation.outbox_database import OutboxDatabase, ProducerTransaction
from tests.faults.simulation.outbox_parked import Pause

NAMES = ("a", "b", "c")
NEVER_S = 3600.0
START = Position(Snapshot.parse("1:1:"))


class AtOnce(Connection):
    """A connection to a model whose answers take no time."""

    async def _ask(self, effect: Callable[..., Any], args: tuple[Any, ...], timeout: float | None = None) -> Any:
        self._server.loop.run_until(self._server.loop.time() + 0.001)
        try:
            result = self._take_effect(effect, args)
            return await result if inspect.iscoroutine(result) else result
        except asyncpg.PostgresError:
            if self.session.tx is not None:
                self.session.tx.is_aborted = True
            raise


def at_once(server: Any) -> Any:
    return AtOnce(server, Process("relay", random.Random(0)), "reader")


@asynccontextmanager
async def session(dsn: str) -> AsyncIterator[RealConnection]:
    async with connection(PostgresSettings(dsn=SecretStr(dsn)), application="relay simulation") as opened:
        yield opened


class Producers:
    """Transactions of three applications, on both sides at once."""

    def __init__(self, model: OutboxDatabase, connections: list[RealConnection]) -> None:
        self._model = model
        self._connections = connections
        self._open: dict[int, tuple[ProducerTransaction, Any]] = {}

    async def act(self, dice: random.Random) -> None:
        producer = dice.randrange(len(self._connections))
        if producer not in self._open:
            await self._begin(producer)
        elif dice.random() < 0.6:
            await self._insert(producer, dice.choice(NAMES), dice.choice(("Booked", "Paid")))
        else:
            await self.end(producer, commit=dice.random() < 0.75)

    async def _begin(self, producer: int) -> None:
        real = self._connections[producer].transaction()
        await real.start()
        await self._connections[producer].execute("SELECT pg_current_xact_id()")
        self._open[producer] = (ProducerTransaction(self._model), real)

    async def _insert(self, producer: int, name: str, event_type: str) -> None:
        modelled, _ = self._open[producer]
        row = modelled.insert(("order", name), event_type)
        if row is None:
            return  # it would wait for another transaction
        found = await self._connections[producer].fetchrow(
            "INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload) VALUES ('order', $1, $2, '{}') RETURNING id, seq",
            name,
            event_type,
        )
        assert found is not None
        assert (found["id"], found["seq"]) == (row.id, row.seq)

    async def end(self, producer: int, *, commit: bool) -> None:
        modelled, real = self._open.pop(producer)
        if commit:
            await real.commit()
            modelled.commit()
        else:
            await real.rollback()
            modelled.roll_back()

    async def end_all(self) -> None:
        for producer in [*self._open]:
            await self.end(producer, commit=True)


@pytest.mark.parametrize("seed", range(4))
async def test_the_model_of_the_log_reads_as_postgresql_reads(database: str, seed: int) -> None:
    dice = random.Random(seed)
    model = OutboxDatabase(VirtualLoop(), dice)  # type: ignore[abstract]
    async with (
        session(database) as reading,
        session(database) as one,
        session(database) as two,
        session(database) as three,
    ):
        producers = Producers(model, [one, two, three])
        limits: dict[str, Any] = {"shard": 0, "page_rows": dice.randint(1, 3), "page_bytes": 10_000}
        readers = [Reader(each, **limits, planning=Planning(each)) for each in (reading, at_once(model))]
        position = modelled = START
        read = 0
        for act in range(250):
            if dice.random() < 0.6:
                await producers.act(dice)
            elif act > 240:
                await producers.end_all()
            page, twin = await readers[0].read(position), await readers[1].read(modelled)
            assert [(row.id, row.aggregate, row.seq, row.event_type) for row in page.rows] == [
                (row.id, row.aggregate, row.seq, row.event_type) for row in twin.rows
            ]
            assert page.complete == twin.complete
            read += len(page.rows)
            position, modelled = position.after(page), modelled.after(twin)
        assert read > 20


class Both:
    """A Store on PostgreSQL and one on the model: the same calls, the same answers."""

    def __init__(self, real: Store, modelled: Store) -> None:
        self._stores = (real, modelled)

    async def __call__(self, name: str, *args: Any) -> Any:
        answers = []
        for store in self._stores:
            try:
                answers.append(await getattr(store, name)(*args))
            except LeaseLost:
                answers.append("lost")
        if name == "next_attempts_s":
            seen = [[None if s is None else s > 60 for s in answer] for answer in answers]
            assert seen[0] == seen[1], (name, answers)
        elif name in ("due", "due_alone"):
            seen = [[(d.row.id, d.attempts, d.at is None) for d in _all(answer)] for answer in answers]
            assert seen[0] == seen[1], (name, answers)
        else:
            assert answers[0] == answers[1], (name, args, answers)
        return answers


def _all(answer: Any) -> list[Due]:
    return answer if isinstance(answer, list) else [] if answer is None else [answer]


@pytest.mark.parametrize("retry_first_s", [0.0001, NEVER_S], ids=["due-at-once", "due-never"])
async def test_the_model_of_parked_rows_answers_as_postgresql_answers(database: str, retry_first_s: float) -> None:
    dice = random.Random(int(retry_first_s))
    settings = outbox_world.settings_for(retry_first_s=retry_first_s, retry_max_s=retry_first_s, max_attempts=4).outbox
    model = OutboxDatabase(VirtualLoop(), dice)  # type: ignore[abstract]
    async with session(database) as owning, session(database) as producing:
        await producing.execute("ALTER TABLE relay.outbox_pause DROP CONSTRAINT outbox_pause_audit_id_fkey")
        producers = Producers(model, [producing])
        for _ in range(60):
            await producers.act(dice)
        await producers.end_all()
        sides = [
            Store(each, shard=0, epoch=0, settings=settings, planning=Planning(each))
            for each in (owning, at_once(model))
        ]
        ask = Both(*sides)
        page = await Reader(owning, shard=0, page_rows=100, page_bytes=10_000, planning=Planning(owning)).read(START)
        rows = {row.id: row for row in page.rows}
        for _ in range(150):
            await _act_on_parked(dice, ask, rows, owning, model)
            await ask("blocked")
            await ask("next_attempts_s", [])
        assert await owning.fetchval("SELECT count(*) FROM relay.outbox_parked") == len(model.tables["parked"])


async def _act_on_parked(
    dice: random.Random, ask: Both, rows: dict[int, Any], owning: RealConnection, model: OutboxDatabase
) -> None:
    suspects = dice.sample(sorted(rows), 2)
    match dice.randrange(7):
        case 0 | 1:
            await _park(dice, ask, rows)
        case 2:
            await _try(dice, ask, await ask("due", 2, suspects))
        case 3:
            await _try(dice, ask, await ask("due_alone", suspects))
        case 4:
            await _pause(dice, owning, model)
        case 5:
            await ask("hold", [rows[row_id] for row_id in suspects])
        case _:
            pauses = await ask("pauses")
            await ask("reconcile", pauses[0])


async def _park(dice: random.Random, ask: Both, rows: dict[int, Any]) -> None:
    """A few rows of one aggregate, from one of them to its end, as `settle` has it."""
    place = ("order", dice.choice(NAMES))
    line = [row for row in rows.values() if row.aggregate == place]
    start = dice.randrange(len(line))
    reason: Any = dice.choice(("nacked", "unroutable", "refused", "unconfirmed", "paused"))
    parked = [Parked(row, "behind" if position else reason) for position, row in enumerate(line[start:])]
    await ask("checkpoint", START, 0, parked)


async def _try(dice: random.Random, ask: Both, answers: list[Any]) -> None:
    """Some of what is due is published, or refused again; each side with what it has read itself."""
    found = [_all(answer) for answer in answers]
    published = {due.row.id for due in found[0] if dice.random() < 0.5}
    told = []
    for store, due in zip(ask._stores, found, strict=True):
        refused = [(Parked(d.row, "nacked"), d) for d in due if d.row.id not in published]
        told.append(await store.unpark([d.row for d in due if d.row.id in published], refused))
    assert told[0] == told[1]


async def _pause(dice: random.Random, owning: RealConnection, model: OutboxDatabase) -> None:
    name, pauses = dice.choice(NAMES), model.tables["pauses"]
    pause = dice.choice((Pause(place=("order", name)), Pause(event_type="Paid")))
    if pause in pauses:
        del pauses[pause]
        await owning.execute(
            "DELETE FROM relay.outbox_pause WHERE aggregate_id IS NOT DISTINCT FROM $1 AND event_type IS NOT DISTINCT FROM $2",
            pause.place and pause.place[1],
            pause.event_type,
        )
    else:
        pauses[pause] = True
        await owning.execute(
            "INSERT INTO relay.outbox_pause (scope, aggregate_type, aggregate_id, event_type, audit_id) VALUES ($1, $2, $3, $4, 0)",
            "event_type" if pause.place is None else "aggregate",
            pause.place and "order",
            pause.place and pause.place[1],
            pause.event_type,
        )


class DatabaseOfModel(Database):
    """relay's own transactions, on a model."""

    model: Any

    async def connection(self) -> RealConnection:
        if self._connection is None or self._connection.is_closed():
            self._connection = cast("RealConnection", at_once(self.model))
        return self._connection


@pytest.mark.parametrize("seed", range(4))
async def test_the_model_of_the_inbox_does_as_postgresql_does(database: str, seed: int) -> None:
    dice = random.Random(seed)
    settings = inbox_world.settings_for(retry_first_s=0.0001, retry_max_s=0.0001, max_attempts=3)
    model = InboxDatabase(VirtualLoop(), dice)  # type: ignore[abstract]
    failing: set[tuple[str | None, str | None, int | None]] = set()
    inbox = Inbox("billing")

    @inbox.on("Booked")
    async def book(event: Event, tx: RealConnection) -> None:
        if isinstance(cast("Any", tx), AtOnce):
            await tx.execute(EFFECT, event)
        else:
            await tx.execute(
                "INSERT INTO effect VALUES ($1, $2, $3)", event.aggregate_type, event.aggregate_id, event.seq
            )
        if (event.aggregate_type, event.aggregate_id, event.seq) in failing:
            raise RuntimeError("no")

    rules = Rules(consumer="billing", inbox=inbox, settings=settings.inbox)
    real = Database(PostgresSettings(dsn=SecretStr(database)), application="relay inbox billing", consumer="billing")
    modelled = DatabaseOfModel(PostgresSettings(), application="model")
    modelled.model = model
    appliers = (Applier(real, rules), Applier(modelled, rules))
    async with session(database) as looking:
        await looking.execute("CREATE TABLE effect (kind text, name text, seq bigint, n bigserial)")
        try:
            for _ in range(60):
                batch = Batch(arrivals=[_arrival(dice, tag) for tag in range(dice.randint(1, 5))])
                if dice.random() < 0.3:
                    failing.add((dice.choice(tuple(inbox_world.KINDS)), dice.choice("ab"), dice.randint(1, 5)))
                elif dice.random() < 0.3:
                    failing.clear()
                act = dice.choice((*("apply",) * 7, "retry", "retry", "sweep"))
                done: list[Any] = []
                for applier in appliers:
                    match act:
                        case "apply":
                            done.append(await applier.apply(batch))
                        case "retry":
                            done.append(await applier.retry_due())
                        case _:
                            done.append(await applier.sweep())
                assert done[0] == done[1]
                assert await _tables(looking) == _modelled_tables(model)
        finally:
            await real.close()
    assert len(model.tables["effects"]) > 15


def _arrival(dice: random.Random, tag: int) -> Arrival:
    kind, name = dice.choice(("order", "order", *inbox_world.KINDS)), dice.choice("ab")
    variant = dice.choice((0, 0, 0, 0, 0, 0, 1, 2))
    return Arrival(event=to_event(inbox_world.delivery_of(kind, name, dice.randint(1, 8), variant)), tag=tag + 1)


async def _tables(looking: RealConnection) -> dict[str, list[Any]]:
    cursors = await looking.fetch(
        "SELECT aggregate_type, aggregate_id, last_seq, last_digest, blocked FROM relay.inbox_aggregate"
    )
    held = await looking.fetch(
        "SELECT aggregate_type, aggregate_id, seq, digest, reason, state, attempts FROM relay.inbox_held WHERE aggregate_id IS NOT NULL"
    )
    effects = await looking.fetch("SELECT kind, name, seq FROM effect ORDER BY n")
    return {
        "cursors": sorted((tuple(r.values()) for r in cursors), key=repr),
        "held": sorted((tuple(r.values()) for r in held), key=repr),
        "effects": [tuple(r.values()) for r in effects],
        "quarantined": [await looking.fetchval("SELECT count(*) FROM relay.inbox_quarantine")],
        "seen": [await looking.fetchval("SELECT count(*) FROM relay.inbox_seen")],
    }


def _modelled_tables(model: InboxDatabase) -> dict[str, list[Any]]:
    tables = model.tables
    return {
        "cursors": sorted(
            ((key[1], key[2], row.last_seq, row.last_digest, row.blocked) for key, row in tables["cursors"].items()),
            key=repr,
        ),
        "held": sorted(
            (
                (h.key[1], h.key[2], h.seq, h.event["digest"], h.reason, h.state, h.attempts)
                for h in tables["held"].values()
                if h.key[2] is not None
            ),
            key=repr,
        ),
        "effects": [(*effect.key, effect.seq) for _, effect in sorted(tables["effects"].items())],
        "quarantined": [len(tables["quarantine"])],
        "seen": [len(tables["seen"])],
    }
