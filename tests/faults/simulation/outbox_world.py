"""Relays and producers in one world, and what must hold in it at every step and in the end.

The relays are the real daemon (`relay.daemon.Outbox`: supervisor, lease, wake-up, shard, retry, store, reader), connected to
the models. A schedule is the calls on a World: what producers, faults and operators do, and how long nothing else happens.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from relay.daemon import Outbox
from relay.errors import RelayError
from relay.message import Message
from relay.outbox.lease import Ownership
from relay.outbox.progress import Progress
from relay.rabbitmq.contract import Publisher
from relay.services import Service
from relay.settings import DaemonSettings, OutboxSettings, Settings
from tests.faults.simulation.clock import VirtualLoop
from tests.faults.simulation.connection import Connection, Fate, Process
from tests.faults.simulation.outbox_database import LogRow, OutboxDatabase, Place, ProducerTransaction, Snapshot
from tests.faults.simulation.outbox_parked import Pause
from tests.faults.simulation.publisher import Arrival, Broker
from tests.faults.simulation.server import Session, Transaction
from tests.faults.simulation.violation import Violation

AWAKE_S = 2.5
"""An event must be out so soon after its commit when nothing is broken: the slowest answers, and no poll interval."""

HEALED_S = 20.0
"""All must be out so soon after everything was healed: two looks at the tables (10 s each), or a few poll intervals."""

OWNER = (727003, 0)
"""The session lock of the shard's owner."""

SETTLED_S = 5.0
"""So long after healing every relay has noticed what it has lost, and one is the owner, and asleep."""


def settings_for(**outbox: Any) -> Settings:
    """Settings with short delays."""
    given = {"page_rows": 3, "poll_interval_s": 5.0, "checkpoint_interval_s": 0.01, "confirm_timeout_s": 0.5}
    given |= {"standby_interval_s": 0.2, "retry_first_s": 0.03, "retry_max_s": 0.5, "max_attempts": 1_000_000}
    return Settings(
        source="shop",
        outbox=OutboxSettings.model_validate(given | outbox),
        daemon=DaemonSettings(backoff_first_s=0.05, backoff_max_s=0.4),
    )


@dataclass(slots=True)
class ModelledOutbox(Outbox):
    """The daemon, connected to the models. Services beside the pipeline are left out."""

    world: Any = None
    process: Any = None

    def _connection(self, role: str, shard: int) -> AbstractAsyncContextManager[Any]:
        return self._opened(role)

    @asynccontextmanager
    async def _opened(self, role: str) -> AsyncIterator[Connection]:
        await self.world.loop.sleep(0.001)
        opened = Connection(self.world.database, self.process, role)
        if self.process.is_dead:
            opened.cut()
        try:
            yield opened
        finally:
            opened.cut()

    @asynccontextmanager
    async def _publisher(self, shard: int) -> AsyncIterator[Publisher]:
        publisher = await self.world.broker.open(self.process)
        try:
            yield publisher
        finally:
            await publisher.close()

    def _services(self, ownership: Ownership, source: str) -> dict[str, Service]:
        return {}


class World:
    """A database, a broker, `relays` relays. The same seed, settings and calls give the same run."""

    def __init__(self, seed: int, settings: Settings, *, relays: int = 1) -> None:
        self.settings = settings
        self.loop = VirtualLoop()  # type: ignore[abstract]
        self.dice = random.Random(seed)
        self.database = OutboxDatabase(self.loop, self.dice)
        self.database.before_commit = self._check_write
        self.database.after_commit = self._check_cursor
        self.broker = Broker(self.loop, self.dice)
        self.broker.on_arrival = self._check_arrival
        self.broker.on_confirmed = self._confirmed
        self.broker.on_refusal = lambda place, seq, answer: self.note(answer, place[1], seq)
        self.journal: list[tuple[Any, ...]] = []
        self.producers: dict[int, ProducerTransaction] = {}
        self.unconfirmed: dict[
            tuple[Place, int], LogRow
        ] = {}  # committed, and nobody has been told that a queue has it
        self.committed_at: dict[tuple[Place, int], float] = {}
        self.arrived: dict[Place, set[int]] = {}
        self.violation: Violation | None = None
        self.is_calm = True  # until something is broken: then an event may be late
        self.processes: list[Process] = []
        self._started = 0
        for position in range(relays):
            self.processes.append(self._start(position))

    # --- time

    @property
    def now(self) -> float:
        return self.loop.time()

    def run(self, seconds: float) -> None:
        """Let everything go on for so long. Raises Violation."""
        self.loop.run_until(self.now + seconds)
        self._raise()

    def note(self, *what: Any) -> None:
        """Remember what happened, for people and for the test of determinism."""
        self.journal.append((round(self.now, 6), *what))

    # --- producers

    def begin(self, producer: int) -> None:
        """BEGIN, and a transaction id."""
        if producer not in self.producers:
            self.producers[producer] = ProducerTransaction(self.database)
            self.note("begin", producer, self.producers[producer].xid)

    def emit(self, producer: int, name: str, event_type: str = "Booked") -> None:
        """An event, in a transaction that is begun if need be. Nothing happens when it would have to wait for a counter."""
        self.begin(producer)
        row = self.producers[producer].insert(("order", name), event_type)
        if row is not None:
            self.note("emit", producer, row.id, name, row.seq)

    def commit(self, producer: int) -> None:
        """COMMIT."""
        if (tx := self.producers.pop(producer, None)) is not None:
            for row in tx.rows:
                self.unconfirmed[row.place, row.seq] = row
                self.committed_at[row.place, row.seq] = self.now
            tx.commit()
            self.note("commit", producer)

    def roll_back(self, producer: int) -> None:
        """ROLLBACK: nothing of it may ever be seen."""
        if (tx := self.producers.pop(producer, None)) is not None:
            tx.roll_back()
            self.note("roll back", producer)

    # --- faults

    def kill(self, position: int) -> None:
        """kill -9 of a relay; another one is started in its place."""
        self._broken("kill", position)
        self.processes[position].kill()

    def strike(self, position: int, operations: int, fate: Fate) -> None:
        """Something happens to a relay at one of its next operations."""
        self._broken("strike", position, operations, fate)
        process = self.processes[position]
        process.fates[process.operations + operations] = fate

    def lose_lease(self, noticed_after: float) -> None:
        """PostgreSQL ends the session that holds the shard's lock; its relay hears of it later: until then it is a zombie."""
        self._broken("lose lease", noticed_after)
        owner = self.database.session_locks.get(OWNER)
        for process in self.processes:
            for link in [*process.links]:
                if isinstance(link, Connection) and link.session is owner:
                    link.lose_silently()
                    self.loop.call_later(noticed_after, link.notice)

    def cut_broker(self, *, down_for: float) -> None:
        """RabbitMQ restarts."""
        self._broken("broker down", down_for)
        self.broker.go_down()
        self.loop.call_later(down_for, setattr, self.broker, "is_down", False)

    def block_broker(self, seconds: float) -> None:
        """An alarm: RabbitMQ takes nothing."""
        self._broken("broker blocked", seconds)
        self.broker.is_blocked = True
        self.loop.call_later(seconds, setattr, self.broker, "is_blocked", False)

    def nack(self, messages: int, *, kept: bool = False) -> None:
        """The next messages are nacked."""
        self._broken("nack", messages, kept)
        self.broker.nacks, self.broker.nacked_are_kept = messages, kept

    def refuse(self, kind: str, name: str) -> None:
        """`unbound`, `full`, `hanging`: what is wrong with the queue of an aggregate."""
        self._broken(kind, name)
        getattr(self.broker, kind).add(("order", name))

    def accept(self, name: str) -> None:
        """The queue of an aggregate is well again."""
        self.note("well", name)
        for kind in (self.broker.unbound, self.broker.full, self.broker.hanging):
            kind.discard(("order", name))

    def poison(self, name: str) -> None:
        """The next event of an aggregate closes the channel, until it is healed."""
        place = ("order", name)
        seq = self.database.counters.get(place, 0) + 1
        self._broken("poison", name, seq)
        self.broker.poison.add((place, seq))

    # --- operators

    def pause(self, name: str | None = None, event_type: str | None = None) -> None:
        """relay pause."""
        self._broken("pause", name, event_type)
        self._operate(Pause(None if name is None else ("order", name), event_type), row=True)

    def resume(self) -> None:
        """relay resume, of all."""
        self.note("resume")
        for pause in [*self.database.tables["pauses"]]:
            self._operate(pause, row=None)

    def _operate(self, pause: Pause, *, row: bool | None) -> None:
        pauses = self.database.tables["pauses"]
        if row is None:
            del pauses[pause]
        else:
            pauses[pause] = row
        self.database.notify("relay_outbox", "operate")

    # --- the end

    def heal(self) -> None:
        """End every fault, and every transaction."""
        self.note("heal")
        broker = self.broker
        broker.is_down = broker.is_blocked = False
        broker.nacks = 0
        for refusing in (broker.unbound, broker.full, broker.hanging, broker.poison):
            refusing.clear()
        for process in self.processes:
            process.fates.clear()
        self.resume()
        for producer in [*self.producers]:
            self.commit(producer)

    def finish(self) -> None:
        """Heal, and check that all of what was committed is out, and that the next event wakes the relay. Raises Violation."""
        was_calm = self.is_calm
        self.heal()
        patience_s = AWAKE_S if was_calm else HEALED_S
        deadline = self.now + patience_s
        while not self._is_done():
            if self.now > deadline:
                self._fail(f"not done {patience_s:g} s after healing: {self._left()}")
            self.run(0.1)
        self.run(1.0 if was_calm else SETTLED_S)
        self.is_calm = True
        self.emit(0, "last")
        self.run(0.003)
        self.commit(0)
        poll = self.settings.outbox.wakeup == "poll"
        self.run(AWAKE_S + (self.settings.outbox.poll_interval_s if poll else 0.0))
        if self.unconfirmed:
            self._fail(f"a lost wake-up: {self._left()}")
        self._check_end()

    def _is_done(self) -> bool:
        db = self.database
        return not (self.unconfirmed or db.tables["parked"]) and all(self._is_covered(row) for row in db.log)

    def _check_end(self) -> None:
        committed = {(row.place, row.seq) for row in self.database.log}
        queued = {(a.place, a.seq) for a in self.broker.queue}
        if committed != queued:
            self._fail(f"lost {sorted(committed - queued)}, phantoms {sorted(queued - committed)}")
        if self.loop.errors:
            self._fail(f"errors that nobody retrieved: {self.loop.errors}")

    def close(self) -> None:
        """End what still runs, so that nothing is left for the garbage collector to complain about."""
        self._started = -1
        for process in self.processes:
            process.kill()
        self.loop.run_until(self.now + 5.0)

    # --- relays

    def _start(self, position: int) -> Process:
        self._started += 1
        process = Process(f"relay-{self._started}", self.dice)
        process.on_fate = lambda name, fate: self.note("struck", name, fate)
        with self.loop.current():
            daemon = ModelledOutbox(self.settings, progress={0: Progress()}, world=self, process=process)
            process.main = self.loop.create_task(self._relay(daemon, process))
        process.main.add_done_callback(lambda task: self._ended(position, process, task))
        return process

    async def _relay(self, daemon: ModelledOutbox, process: Process) -> None:
        try:
            await daemon._supervised(0, "shop", False)
        except RelayError as exc:
            self.note("exit", process.name, type(exc).__name__)

    def _ended(self, position: int, process: Process, task: asyncio.Task[None]) -> None:
        """As a supervisor would: start it again. Anything but an end by a RelayError, or by kill -9, is a mistake of relay's."""
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

    def _check_arrival(self, arrival: Arrival, refused: set[int]) -> None:
        """No phantom; and first publications in order, but for what the broker refused when nobody had been told of it yet."""
        self.note("arrived", arrival.process, arrival.place[1], arrival.seq)
        if (arrival.place, arrival.seq) not in self.committed_at:
            self._fail(f"a phantom: {arrival}")
        arrived = self.arrived.setdefault(arrival.place, set())
        if arrival.seq in arrived:
            if self.is_calm:
                self._fail(f"published twice, though nothing happened: {arrival}")
            return
        allowed = refused if self.settings.outbox.order == "pipelined" else set()
        missing = set(range(1, arrival.seq)) - arrived - allowed
        if missing:
            self._fail(f"out of order: {arrival} before {sorted(missing)}")
        arrived.add(arrival.seq)

    def _confirmed(self, message: Message) -> None:
        place = (str(message.headers["x-aggregate-type"]), str(message.headers["x-aggregate-id"]))
        name = (place, int(message.headers["x-sequence"]))
        row = self.unconfirmed.pop(name, None)
        late = self.now - self.committed_at[name]
        if row is not None and self.is_calm and self.settings.outbox.wakeup == "notify" and late > AWAKE_S:
            self._fail(f"a lost wake-up: {name} was out {late:.2f} s after its commit")

    def _check_write(self, session: Session, tx: Transaction) -> None:
        """A relay that is not the owner any more writes nothing, and once it has been told so it stops."""
        if session.was_refused:
            self._fail(f"{session.process.name} goes on, though another relay is the owner")
        if session.role != "lease" and tx.writes and session.process.epoch != self.database.cursor.epoch:
            self._fail(f"a stale write of {session.process.name}: {tx.writes}")

    def _check_cursor(self, session: Session, tx: Transaction) -> None:
        """The cursor has passed a row only if a queue has it for certain, or it is parked."""
        if not tx.writes:
            return
        self.note("written", session.process.name, self.database.cursor, sorted(self.database.tables["parked"]))
        parked = self.database.tables["parked"]
        for row in self.unconfirmed.values():
            if row.id not in parked and self._is_covered(row):
                self._fail(
                    f"the cursor has passed {row.place} seq {row.seq}, which nobody has confirmed: {self.database.cursor}"
                )
        for producer in self.producers.values():
            if any(self._is_covered(row) for row in producer.rows):
                self._fail(f"the cursor has passed what is not committed yet: {self.database.cursor}")

    def _is_covered(self, row: LogRow) -> bool:
        cursor = self.database.cursor
        if Snapshot(cursor.snapshot).sees(row.xid):
            return True
        return cursor.window is not None and row.id <= cursor.after_id and Snapshot(cursor.window).sees(row.xid)

    def _left(self) -> str:
        return (
            f"unconfirmed {sorted(self.unconfirmed)}, parked {self.database.tables['parked']}, {self.database.cursor}"
        )

    def _broken(self, *what: Any) -> None:
        self.is_calm = False
        self.note(*what)

    def _fail(self, what: str) -> None:
        """A violation ends the run: also where relay would catch it."""
        if self.violation is None:
            self.violation = Violation(f"at {self.now:.3f} s: {what}")
        raise self.violation

    def _raise(self) -> None:
        if self.violation is not None:
            raise self.violation
