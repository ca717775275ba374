"""Consumers in one world, and what must hold in it at every step and in the end.

The consumers are the real daemon (session, loop, applier, work, lines, store, caller), connected to the models. A schedule is
the calls on an InboxWorld: what arrives, what handlers and faults do, and how long nothing else happens.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import cache
from typing import Any, Literal, cast

import asyncpg

from relay.errors import RelayError
from relay.inbox.consumer import _Daemon
from relay.inbox.database import OPERATE_CHANNEL, Database
from relay.inbox.handlers import Inbox
from relay.message import Delivery, Event, Row, content_digest, to_message
from relay.postgres.connect import Connection as RealConnection
from relay.postgres.errors import postgres_errors
from relay.rabbitmq.contract import Consumer
from relay.settings import DaemonSettings, InboxSettings, Settings
from relay.supervisor import supervise
from tests.faults.simulation.clock import VirtualLoop
from tests.faults.simulation.connection import Connection, Fate, Process
from tests.faults.simulation.inbox_database import EFFECT, CursorRow, Effect, HeldRow, InboxDatabase
from tests.faults.simulation.inbox_queue import Queue
from tests.faults.simulation.server import Session, Transaction
from tests.faults.simulation.silence import SILENCE
from tests.faults.simulation.violation import Violation
from tests.harness.deliveries import delivered

Mood = Literal["raises", "raises late", "is slow", "breaks the connection", "collides", "swallows an error"]
MOODS: tuple[Mood, ...] = ("raises", "raises late", "is slow", "breaks the connection", "collides", "swallows an error")

HEALED_S = 30.0
"""Everything must be applied so soon after everything was healed: three looks at what is held (10 s each)."""

KINDS = {"order": "sequence", "state": "latest", "log": "none"}
"""The policy of each aggregate type."""

_SLOW_S = 2.0
_SOURCE = "shop"


def settings_for(**inbox: Any) -> Settings:
    """Settings with short delays."""
    given: dict[str, Any] = {
        "retry_first_s": 0.1,
        "retry_max_s": 0.5,
        "handler_timeout_s": 0.5,
        "max_attempts": 1_000_000,
    }
    given |= {"policies": KINDS, "batch": 100, "prefetch": 100}
    return Settings(
        inbox=InboxSettings.model_validate(given | inbox),
        daemon=DaemonSettings(backoff_first_s=0.05, backoff_max_s=0.4),
    )


@cache
def delivery_of(kind: str, name: str, seq: int, variant: int) -> Delivery:
    """A message as a producer's relay sends it; variant 1: another content under the same number, 2: its tombstone."""
    row = Row(
        id=seq,
        aggregate_type=kind,
        aggregate_id=name,
        seq=seq,
        event_type="Booked",
        content_type="application/json",
        headers={},
        routing_key=None,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        body=b"{}" if variant != 1 else b"[]",
        is_tombstone=variant == 2,
    )
    message = to_message(row, source=_SOURCE, routing_key=f"{kind}.Booked")
    return delivered(message)


class ModelledDatabase(Database):
    """relay's own, but for where the connection leads."""

    world: InboxWorld
    process: Process

    async def connection(self) -> RealConnection:
        if self._connection is None or self._connection.is_closed():
            await self.world.loop.sleep(0.001)
            opened = Connection(self.world.database, self.process, "inbox")
            if self.process.is_dead:
                opened.cut()
            real = cast("RealConnection", opened)
            self._connection = real
            opened.add_termination_listener(self._on_termination)
            with postgres_errors():
                await self._outlive_nothing(real)
                await opened.add_listener(OPERATE_CHANNEL, self._on_operate)
        return self._connection

    async def _is_at_work(self) -> bool:
        """No session of the model falls silent while it waits for a lock."""
        return True


class ModelledDaemon(_Daemon):
    """relay's own, but for where its connections lead."""

    world: InboxWorld
    process: Process

    @asynccontextmanager
    async def _database(self) -> AsyncIterator[Database]:
        database = ModelledDatabase(self._settings.postgres, application="relay inbox", consumer=self._rules.consumer)
        database.world, database.process = self.world, self.process
        try:
            yield database
        except asyncio.CancelledError:
            database.discard()
            raise
        finally:
            await database.close()

    @asynccontextmanager
    async def _consumer(self, prefetch: int) -> AsyncIterator[Consumer]:
        consumer = await self.world.queue.consume(self.process, prefetch)
        try:
            yield consumer
        finally:
            await consumer.close()


class InboxWorld:
    """A database, a queue, `consumers` consumers. The same seed, settings and calls give the same run.

    `in_batches`: a batch handler, for two events at most or for any number, but for one kind of aggregates.
    """

    def __init__(self, seed: int, settings: Settings, *, consumers: int = 1, in_batches: bool = False) -> None:
        self.settings = settings
        self.loop = VirtualLoop()  # type: ignore[abstract]
        self.dice = random.Random(seed)
        self.database = InboxDatabase(self.loop, self.dice)
        self.database.before_commit = self._check_commit
        self.database.after_commit = self._check_held
        self.queue = Queue(self.loop, self.dice)
        self.journal: list[tuple[Any, ...]] = []
        self.sent: dict[tuple[str, str], int] = {}  # how many numbers were given out
        self.contents: dict[tuple[str, str, int], set[int]] = {}  # the variants that were sent
        self.missing: list[Delivery] = []  # lost on the way
        self.moods: dict[tuple[str, str, int], Mood] = {}
        self.applied: dict[tuple[str, str], list[int]] = {}
        self.violation: Violation | None = None
        self.conflicts = 0
        self._started = 0
        self.inbox = Inbox("billing")
        if in_batches:
            self.inbox.on_batch("Booked", limit=2 if seed % 2 else 1000)(self._handle_all)
            self.inbox.on("Booked", aggregate_type="state")(self._handle)
        else:
            self.inbox.on("Booked")(self._handle)
        self.processes = [self._start(position) for position in range(consumers)]

    # --- time

    @property
    def now(self) -> float:
        return self.loop.time()

    def run(self, seconds: float) -> None:
        """Let everything go on for so long. Raises Violation."""
        self.loop.run_until(self.now + seconds)
        if self.violation is not None:
            raise self.violation

    def note(self, *what: Any) -> None:
        """Remember what happened, for people and for the test of determinism."""
        self.journal.append((round(self.now, 6), *what))

    # --- what arrives

    def send(self, kind: str, name: str, *, position: int | None = None, lost: bool = False) -> None:
        """The next event of an aggregate is sent, and put anywhere into the queue; or it is lost on the way."""
        seq = self.sent[kind, name] = self.sent.get((kind, name), 0) + 1
        self.note("lost" if lost else "sent", kind, name, seq)
        self.contents.setdefault((kind, name, seq), set()).add(0)
        if lost:
            self.missing.append(delivery_of(kind, name, seq, 0))
        else:
            self._put(kind, name, seq, 0, position)

    def send_again(self, kind: str, name: str, seq: int, position: int | None = None) -> None:
        """A duplicate of what was sent, or what was lost."""
        if 1 <= seq <= self.sent.get((kind, name), 0):
            self.note("again", kind, name, seq)
            self._put(kind, name, seq, 0, position)

    def contradict(self, kind: str, name: str, seq: int) -> None:
        """Another content under a number that was sent."""
        if 1 <= seq <= self.sent.get((kind, name), 0):
            self.note("contradiction", kind, name, seq)
            self.conflicts += 1
            self._put(kind, name, seq, 1, None)

    def bury(self, kind: str, name: str, seq: int) -> None:
        """The tombstone of an event that was sent, lost or not."""
        if 1 <= seq <= self.sent.get((kind, name), 0):
            self.note("tombstone", kind, name, seq)
            self._put(kind, name, seq, 2, None)

    def repair(self) -> None:
        """What was lost is sent again, as the producer's relay does when it is asked."""
        missing, self.missing = self.missing, []
        for delivery in missing:
            self.note("repair", delivery.headers["x-aggregate-id"], delivery.headers["x-sequence"])
            self.queue.put(delivery)

    def shuffle(self) -> None:
        """The queue is redelivered in another order."""
        self.note("shuffle")
        self.dice.shuffle(self.queue.ready)

    def _put(self, kind: str, name: str, seq: int, variant: int, position: int | None) -> None:
        self.contents.setdefault((kind, name, seq), set()).add(variant)
        at = None if position is None else position % (len(self.queue.ready) + 1)
        self.queue.put(delivery_of(kind, name, seq, variant), at)

    # --- handlers

    async def _handle(self, event: Event, tx: RealConnection) -> None:
        mood = self.moods.get((str(event.aggregate_type), str(event.aggregate_id), event.seq or 0))
        if mood == "raises":
            raise RuntimeError("no")
        if mood == "is slow":
            await asyncio.sleep(_SLOW_S)
        if mood == "breaks the connection":
            tx.terminate()
        if mood == "collides" and self.dice.random() < 0.7:
            raise asyncpg.SerializationError("could not serialize access")
        if mood == "swallows an error":
            cast("Any", tx).session.tx.is_aborted = True
            return
        await tx.execute(EFFECT, event)
        if mood == "raises late":
            raise RuntimeError("no")

    async def _handle_all(self, events: Sequence[Event], tx: RealConnection) -> None:
        self.note("call", len(events))
        for event in events:
            await self._handle(event, tx)

    def upset(self, kind: str, name: str, seq: int, mood: Mood) -> None:
        """The handler of an event fails, until it is soothed."""
        self.note("handler", kind, name, seq, mood)
        self.moods[kind, name, seq] = mood

    def soothe(self) -> None:
        """All handlers work."""
        self.note("soothe")
        self.moods.clear()

    # --- faults

    def kill(self, position: int) -> None:
        """kill -9 of a consumer; another one is started in its place."""
        self.note("kill", position)
        self.processes[position].kill()

    def strike(self, position: int, operations: int, fate: Fate) -> None:
        """Something happens to a consumer at one of its next operations."""
        self.note("strike", position, operations, fate)
        process = self.processes[position]
        process.fates[process.operations + operations] = fate

    def cut_broker(self, *, down_for: float, in_disorder: bool) -> None:
        """RabbitMQ restarts, and delivers again what was not acknowledged."""
        self.note("broker down", down_for, in_disorder)
        self.queue.redelivers_in_disorder = in_disorder
        self.queue.go_down()
        self.loop.call_later(down_for, setattr, self.queue, "is_down", False)

    # --- the end

    def heal(self) -> None:
        """End every fault, and repair what was lost."""
        self.note("heal")
        self.queue.is_down = False
        for process in self.processes:
            process.fates.clear()
        self.soothe()
        self.repair()

    def finish(self) -> None:
        """Heal, and check that each event has had its effect. Raises Violation."""
        self.heal()
        deadline = self.now + HEALED_S
        while not self.queue.is_empty or self.database.tables["held"]:
            if self.now > deadline:
                self._fail(f"not done {HEALED_S:g} s after healing: {self._left()}")
            self.run(0.2)
        self._contradict_the_last()
        self.run(2.0)
        self._check_end()

    def close(self) -> None:
        """End what still runs."""
        self._started = -1
        for process in self.processes:
            process.kill()
        self.loop.run_until(self.now + 5.0)

    def _contradict_the_last(self) -> None:
        """A number that was used for another content is noticed, as long as it is an aggregate's last."""
        self.quarantined = len(self.database.tables["quarantine"])
        self.expected_conflicts = 0
        for (_source, kind, name), row in self.database.tables["cursors"].items():
            if row.last_digest is not None:
                variant = 1 if row.last_digest == _digest(kind, name, row.last_seq, 0) else 0
                self.note("contradiction", kind, name, row.last_seq)
                self.queue.put(delivery_of(kind, name, row.last_seq, variant))
                self.expected_conflicts += 1

    def _check_end(self) -> None:
        for (kind, name), last in self.sent.items():
            self._check_applied(kind, name, last)
        found = len(self.database.tables["quarantine"]) - self.quarantined
        if found != self.expected_conflicts:
            self._fail(f"{found} of {self.expected_conflicts} contradictions are in the quarantine")
        if self.quarantined and not self.conflicts:
            self._fail(f"{self.quarantined} messages are in the quarantine, and nothing contradicted anything")
        if self.loop.errors:
            self._fail(f"errors that nobody retrieved: {self.loop.errors}")

    def _check_applied(self, kind: str, name: str, last: int) -> None:
        applied = self.applied.get((kind, name), [])
        if KINDS[kind] == "latest":
            if not self._may_be_missing(kind, name, last) and (not applied or applied[-1] != last):
                self._fail(f"the newest of {kind}/{name} is {last}, applied were {applied}")
            return
        missing = set(range(1, last + 1)) - set(applied)
        if any(not self._may_be_missing(kind, name, seq) for seq in missing):
            self._fail(f"lost {sorted(missing)} of {kind}/{name}, applied were {applied}: {self._left()}")

    def _may_be_missing(self, kind: str, name: str, seq: int) -> bool:
        """A tombstone may have taken its place."""
        return 2 in self.contents[kind, name, seq]

    def _left(self) -> str:
        held = [(h.key[1:], h.seq, h.reason, h.state, h.next_attempt_at) for h in self.database.tables["held"].values()]
        return f"queue {len(self.queue.ready)}, held {held}, cursors {self.database.tables['cursors']}"

    # --- consumers

    def _start(self, position: int) -> Process:
        self._started += 1
        process = Process(f"consumer-{self._started}", self.dice)
        process.on_fate = lambda name, fate: self.note("struck", name, fate)
        with self.loop.current():
            daemon = ModelledDaemon(self.inbox, self.settings, asyncio.Event(), lambda _: None)
            daemon.world, daemon.process = self, process
            process.main = self.loop.create_task(self._consumer(daemon, process))
        process.main.add_done_callback(lambda task: self._ended(position, process, task))
        return process

    async def _consumer(self, daemon: ModelledDaemon, process: Process) -> None:
        try:
            await supervise(daemon.session, name="inbox", settings=self.settings.daemon, stop=daemon.stop, log=SILENCE)
        except RelayError as exc:
            self.note("exit", process.name, type(exc).__name__)

    def _ended(self, position: int, process: Process, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not process.is_dead:
            self.violation = self.violation or Violation(f"{process.name} ended by {error!r}")
            self.violation.__cause__ = error
        process.is_dead = True
        if self._started >= 0 and self.violation is None:
            self.loop.call_later(0.05, self._restart, position)

    def _restart(self, position: int) -> None:
        if self._started >= 0:
            self.processes[position] = self._start(position)

    # --- what must hold

    def _check_commit(self, _session: Session, tx: Transaction) -> None:
        """Effects are 1, 2, 3 ... once each, by the order of the commits; and cursors never go back."""
        for (_source, kind, name), row in tx.writes.get("cursors", {}).items():
            before: CursorRow = self.database.tables["cursors"].get((_source, kind, name), CursorRow())
            if row.last_seq < before.last_seq:
                self._fail(f"the cursor of {kind}/{name} goes back from {before.last_seq} to {row.last_seq}")
        for _, effect in sorted(tx.writes.get("effects", {}).items()):
            self._check_effect(effect)

    def _check_effect(self, effect: Effect) -> None:
        kind, name, seq = str(effect.key[0]), str(effect.key[1]), effect.seq or 0
        self.note("effect", kind, name, seq)
        applied = self.applied.setdefault((kind, name), [])
        if seq in applied:
            self._fail(f"{kind}/{name} {seq} has its effect twice: {applied}")
        if KINDS[kind] != "none" and applied and seq < applied[-1]:
            self._fail(f"{kind}/{name} {seq} has its effect after {applied[-1]}")
        if KINDS[kind] == "sequence":
            skipped = range((applied[-1] if applied else 0) + 1, seq)
            if any(not self._may_be_missing(kind, name, other) for other in skipped):
                self._fail(f"{kind}/{name} {seq} has its effect after {applied}")
        applied.append(seq)

    def _check_held(self, session: Session, tx: Transaction) -> None:
        """Nothing waits whose turn has come: no transaction leaves such a row (see release_waiting)."""
        self.note("committed", session.process.name, {t: len(rows) for t, rows in sorted(tx.writes.items())})
        if not (tx.writes.get("held") or tx.writes.get("cursors")):
            return
        held: HeldRow
        for held in self.database.tables["held"].values():
            cursor = self.database.tables["cursors"].get(held.key)
            if cursor is not None and held.state == "waiting" and held.seq == cursor.last_seq + 1:
                self._fail(f"{held.key} {held.seq} waits, and its turn has come: {held}")

    def _fail(self, what: str) -> None:
        """A violation ends the run: also where relay would catch it."""
        if self.violation is None:
            self.violation = Violation(f"at {self.now:.3f} s: {what}")
        raise self.violation


@cache
def _digest(kind: str, name: str, seq: int, variant: int) -> bytes:
    delivery = delivery_of(kind, name, seq, variant)
    return content_digest(str(delivery.event_type), str(delivery.content_type), delivery.body)
