"""One crash: a load, a process that dies at a point, a look at what it left, a recovery without any hook, and the verdict."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relay.daemon import Outbox
from relay.inbox import Inbox
from relay.inbox.stats import Stats
from relay.rabbitmq.control_topology import marks_exchange_name
from relay.rabbitmq.queues import InboxQueue, ensure_queue
from relay.rabbitmq.session import close, connect
from relay.sandbox import Postgres, RabbitMQ
from relay.settings import Settings, environment_name
from tests.faults.crash import Birth, Place, inbox
from tests.faults.shop import APPLY, CONSUMER_TABLES, PRODUCER_TABLES, judge
from tests.harness.audit import EXCHANGE, Audit, audit
from tests.harness.outbox import connected, settings_for, until
from tests.harness.pair import QUICK, taken

PATIENCE_S = 60.0

AGGREGATES = ("account/a", "lonely/x", "account/b")
"""Nobody is bound for `lonely` at first: its rows are unroutable until somebody is."""

LOAD = tuple((aggregate, seq) for seq in (1, 2, 3) for aggregate in AGGREGATES)
"""Nine events, in the order in which they are committed."""

FLAGS: dict[str, Any] = {
    "outbox__page_rows": 1,  # every message goes through every point by itself
    "outbox__checkpoint_interval_s": 0,
    "outbox__standby_interval_s": 0.05,
    "outbox__retry_first_s": 60,  # a parked row is tried when a test says so
    "outbox__retry_max_s": 60,
    "outbox__repair": False,  # what a crash has lost must not be healed by what heals other losses
    "inbox__batch": 1,
    "inbox__prefetch": 10,
    "inbox__bindings": "account.#,lonely.#",
    "inbox__retry_first_s": 0.02,
    "daemon__backoff_first_s": 0.05,
    "daemon__backoff_max_s": 0.5,
}

PASSED = """
SELECT o.aggregate_type || '/' || o.aggregate_id, o.seq FROM relay.outbox o JOIN relay.outbox_cursor c USING (shard)
WHERE NOT EXISTS (SELECT FROM relay.outbox_parked p WHERE p.id = o.id) AND (pg_visible_in_snapshot(o.xid, c.snapshot)
  OR (c.window_snapshot IS NOT NULL AND o.id <= c.after_id AND pg_visible_in_snapshot(o.xid, c.window_snapshot)))
"""
"""What the log says is published."""

CURSORS_THAT_LIE = """
SELECT count(*) FROM (SELECT aggregate_id, last_seq FROM relay.inbox_aggregate) cursor FULL JOIN (
  SELECT aggregate_id, count(*) AS number FROM (
    SELECT aggregate AS aggregate_id FROM effect UNION ALL SELECT aggregate_id FROM relay.inbox) done GROUP BY aggregate_id
) done USING (aggregate_id) WHERE coalesce(last_seq, 0) <> coalesce(number, 0)
"""
"""Aggregates of which more, or less, is applied (or stored) than the inbox's cursor says."""

UNFINISHED = """
SELECT (SELECT count(*) FROM txn_log) - (SELECT count(*) FROM effect) - (SELECT count(*) FROM relay.inbox)
  + (SELECT count(*) FROM relay.outbox_parked) + (SELECT count(*) FROM relay.inbox_held)
  + (SELECT count(*) FROM relay.inbox_gap)
"""


@contextmanager
def nursery(folder: Path) -> Iterator[Path]:
    """The process that forks the processes to be killed; yields the socket to ask at."""
    path = folder / "nursery"
    arguments = [sys.executable, "-m", "tests.faults.crash", "--nursery", str(path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield path


class Doomed:
    """A process and what it tells: the points that it has reached, and how it died."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, log: Path) -> None:
        self._reader = reader
        self._writer = writer
        self._log = log
        self.passed: list[str] = []
        self.status: int | None = None
        self.pid = 0

    @classmethod
    async def start(cls, socket: Path, birth: Birth) -> Doomed:
        """Born, and on its way."""
        reader, writer = await asyncio.open_unix_connection(str(socket))
        born = cls(reader, writer, Path(birth.log))
        writer.write(birth.as_line())
        await born.until("born")
        return born

    async def until(self, line: str) -> bool:
        """Read on to this point (`ASLEEP 2`); False if it has died before."""
        async with asyncio.timeout(PATIENCE_S):
            while self.status is None:
                told = (await self._reader.readline()).decode().strip()
                word, _, number = told.partition(" ")
                if word == "born":
                    self.pid = int(number)
                elif word == "died":
                    self.status = int(number)
                else:
                    self.passed.append(told)
                if line in (word, told):
                    return True
        return line == "died"

    async def paused(self) -> None:
        """Wait until it stands still (SIGSTOP)."""

        async def stands() -> bool:
            status = await asyncio.to_thread(Path(f"/proc/{self.pid}/stat").read_text)
            return status.rpartition(") ")[2].startswith("T")

        await until(stands, timeout_s=PATIENCE_S)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    async def killed_at(self, line: str) -> None:
        """Wait for its end; raises if that was not a SIGKILL in this point."""
        with suppress(TimeoutError):
            await self.until("died")
        self._writer.close()
        await self._writer.wait_closed()
        last = self.passed[-1:]
        assert (self.status, last) == (-9, [line]), f"{line}: {self.status}, {self.passed}\n{self._log.read_text()}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a crash has cost: nothing but repetitions."""

    copies: int  # messages that the broker accepted once more
    duplicates: int  # deliveries that the consumer recognised

    def __str__(self) -> str:
        return f"{self.copies} / {self.duplicates}"


@dataclass
class Case:
    """A database that is producer's and consumer's, a virtual host, and one process to be killed at `place`."""

    place: Place
    which: int  # 0: at the first message, 1: at one in the middle, 2: at the last
    nth: int
    dsn: str
    broker: str
    nursery: Path
    folder: Path
    db: Any
    witness: Audit
    flags: dict[str, Any] = field(default_factory=lambda: dict(FLAGS))
    died: bool = False
    stats: Stats = field(default_factory=Stats)  # of the inboxes that were not killed

    @property
    def settings(self) -> Settings:
        """Of everybody in this case."""
        return settings_for(self.dsn, self.broker, **self.flags)

    # --- what happens

    async def emit(
        self, events: Sequence[tuple[str, int]] = LOAD, *, fails: int = 0, in_slot: tuple[int, int] | None = None
    ) -> None:
        """Commit events, each in a transaction of its own. The handler of the first fails so often.

        `in_slot` (slot, days ago): in an older slot of the log's ring, as what is left of earlier days.
        """
        slot, days = (None, 0) if in_slot is None else in_slot
        for aggregate, seq in events:
            kind, _, name = aggregate.partition("/")
            content = {"token": f"{aggregate}/{seq}", "amount": 10 + seq, "fails": fails}
            fails = 0
            async with self.db.transaction():
                await self.db.execute("INSERT INTO txn_log VALUES ($1, $2, $3)", content["token"], name, 10 + seq)
                columns, values = (
                    ("", "") if slot is None else (", slot, created_at", f", {slot}, now() - interval '{days} days'")
                )
                await self.db.execute(
                    f"INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload{columns})"
                    f" VALUES ($1, $2, 'Booked', $3{values})",
                    kind,
                    name,
                    json.dumps(content),
                )

    async def declare(self) -> None:
        """The queues of consumer and witness, bound for `account` only."""
        settings = self.settings
        session = await connect(settings.rabbitmq, name="test")
        queue = InboxQueue(name="effects", bindings=("account.#",), delivery_limit=settings.inbox.delivery_limit)
        await ensure_queue(session, settings.rabbitmq, queue)
        await close(session)

    def with_repair(self) -> None:
        """What is missing is noticed soon, and answered for: the crash is in that."""
        self.flags |= {"outbox__repair": True, "inbox__gap_alert_after_s": 0.1}

    async def route_all(self) -> None:
        """From here on somebody is bound for `lonely`."""
        effects = await self.witness.channel.get_queue("effects", ensure=False)
        for queue, exchange in (
            (self.witness.queue, EXCHANGE),
            (effects, EXCHANGE),
            (effects, marks_exchange_name(self.settings.rabbitmq)),
        ):
            await queue.bind(exchange, "lonely.#")

    async def publish(self) -> None:
        """Publish all that is committed, without being killed."""
        async with asyncio.timeout(PATIENCE_S):
            await Outbox(settings_for(self.dsn, self.broker, **self.flags | {"outbox__page_rows": 100})).run(drain=True)

    async def retry_now(self) -> None:
        """As an operator: what is parked is due."""
        await self.db.execute("UPDATE relay.outbox_parked SET next_attempt_at = now() WHERE state = 'retrying'")

    async def requeue(self, events: Sequence[tuple[str, int]]) -> None:
        """Let the consumer's queue hold these of its messages, in this order, and no others."""
        queue = await self.witness.channel.get_queue("effects")
        found = {}
        for message in await taken(queue):
            kind, name, seq = (message.headers[f"x-{key}"] for key in ("aggregate-type", "aggregate-id", "sequence"))
            found[f"{kind!s}/{name!s}", seq] = message
            await message.ack()
        assert found.keys() == set(LOAD)
        for event in events:
            await self.witness.channel.default_exchange.publish(found[event], "effects")

    @asynccontextmanager
    async def relay(self) -> AsyncIterator[None]:
        """A relay that nobody kills."""
        outbox = Outbox(self.settings, marks_pace=QUICK)
        task = asyncio.create_task(outbox.run())
        try:
            yield
        finally:
            outbox.stop.set()
            async with asyncio.timeout(PATIENCE_S):
                await task

    @asynccontextmanager
    async def consumer(self) -> AsyncIterator[None]:
        """A consumer that nobody kills."""
        stop = asyncio.Event()
        settings = self.settings
        handlers = inbox if settings.inbox.mode == "apply" else Inbox("effects")
        task = asyncio.create_task(handlers.run(settings, stop=stop, on_commit=self._count))
        try:
            yield
        finally:
            stop.set()
            async with asyncio.timeout(PATIENCE_S):
                await task

    def _count(self, stats: Stats) -> None:
        self.stats += stats

    # --- the crash

    async def start(self, *arguments: str, how: str = "kill", broker: str | None = None, **flags: Any) -> Doomed:
        """relay with these arguments, to be killed."""
        values: dict[str, Any] = {"source": "shop", "postgres.dsn": self.dsn, "rabbitmq.url": broker or self.broker}
        values["daemon.log_level"] = "warning"
        values |= {name.replace("__", "."): value for name, value in (self.flags | flags).items()}
        environment = {environment_name(name): str(value) for name, value in values.items()}
        birth = Birth(
            point=self.place.name,
            nth=self.nth,
            arguments=arguments,
            environment=environment,
            log=str(self.folder / f"{self.place.name}-{self.which}.txt"),
            how=how,
        )
        return await Doomed.start(self.nursery, birth)

    async def crash(self, *arguments: str, **flags: Any) -> None:
        """relay with these arguments, until it is killed."""
        await self.dies(await self.start(*arguments, **flags))

    async def dies(self, doomed: Doomed) -> None:
        """Wait for the end of it, which must be the one that was meant; then what it left must be sound already."""
        await doomed.killed_at(f"{self.place.name} {self.nth}")
        self.died = True
        assert await self.db.fetchval(CURSORS_THAT_LIE) == 0
        published = {(r[0], r[1]) for r in await self.db.fetch(PASSED)}
        try:
            await until(self._witnessed(published), timeout_s=5)
        except TimeoutError:
            missing = published - self._accepted().keys()
            raise AssertionError(f"the cursor is past what the broker never had: {missing}") from None

    def _witnessed(self, published: set[tuple[str, int]]) -> Any:
        async def all_there() -> bool:
            return published <= self._accepted().keys()

        return all_there

    def _accepted(self) -> dict[tuple[str, int], int]:
        """What the broker has taken, and how often."""
        found: dict[tuple[str, int], int] = {}
        for aggregate, numbers in self.witness.sequences(first_only=False).items():
            for number in numbers:
                found[aggregate, number] = found.get((aggregate, number), 0) + 1
        return found

    # --- after it

    async def recover(self) -> None:
        """Relay and consumer, started again without a hook, until nothing is left to do."""
        await self.route_all()
        await self.retry_now()
        await self.db.execute(
            "UPDATE relay.inbox_gap SET next_ask_at = now() WHERE state = 'open'"
        )  # the lease is over
        async with self.consumer():
            async with self.relay():
                try:
                    await until(self._finished, timeout_s=PATIENCE_S)
                except TimeoutError:
                    raise AssertionError(f"not recovered: {await self._left()}") from None
        while await self._waiting():  # what is in the queue yet can only do harm: let it
            async with self.consumer():
                await until(self._is_empty)
        await self._take_stored()

    async def _finished(self) -> bool:
        return bool(await self.db.fetchval(UNFINISHED) == 0)

    async def _is_empty(self) -> bool:
        return not await self._waiting()

    async def _waiting(self) -> int:
        """Messages in the consumer's queue that are not on their way to anybody."""
        declared = await self.witness.channel.declare_queue("effects", passive=True)
        count = declared.declaration_result.message_count
        assert count is not None
        return count

    async def _left(self) -> dict[str, list[dict[str, Any]]]:
        tables = ("effect", "relay.outbox_parked", "relay.inbox_held", "relay.inbox_gap", "relay.inbox_quarantine")
        return {t: [dict(r) for r in await self.db.fetch(f"SELECT * FROM {t}")] for t in tables}

    async def _take_stored(self) -> None:
        """Store mode: the service takes what is stored, as the README tells it to."""
        async with self.db.transaction():
            for event in await self.db.fetch("SELECT * FROM relay.inbox_take(100)"):
                content = json.loads(event["payload"])
                await self.db.execute(APPLY, event["aggregate_id"], event["seq"], content["token"], content["amount"])

    async def verdict(self) -> Verdict:
        """Raises what is wrong; else tells what it has cost."""
        assert self.died, "nobody was killed"
        found = await judge(self.dsn, self.dsn)
        assert found.holds, found
        assert found.committed == len(LOAD)
        accepted = self._accepted()
        assert accepted.keys() == set(LOAD), accepted
        first = self.witness.sequences()
        assert all(numbers == [1, 2, 3] for numbers in first.values()), first
        assert not await self.db.fetch("SELECT FROM relay.inbox_quarantine")
        assert await self.db.fetchval(CURSORS_THAT_LIE) == 0
        assert len(await self.db.fetch(PASSED)) == await self.db.fetchval("SELECT count(*) FROM relay.outbox")
        return Verdict(sum(accepted.values()) - len(LOAD), self.stats.duplicates)


EMPTY = """
SELECT string_agg(format('DELETE FROM %s;', oid::regclass), '') FROM pg_class
WHERE relkind IN ('r', 'p') AND NOT relispartition AND relnamespace IN ('relay'::regnamespace, 'public'::regnamespace)
  AND relname <> 'migration'
"""

AS_MIGRATED = "INSERT INTO relay.outbox_cursor (shard, cluster_id) SELECT 0, system_identifier FROM pg_control_system()"


class Ground:
    """What cases are made on. Databases are emptied and used again: to make one costs more than all else in a case."""

    def __init__(self, postgres: Postgres, rabbitmq: RabbitMQ, template: str, nursery: Path, folder: Path) -> None:
        self._postgres = postgres
        self._rabbitmq = rabbitmq
        self._template = template
        self._nursery = nursery
        self._folder = folder
        self._free: list[str] = []
        self._made: list[str] = []

    def close(self) -> None:
        """Drop the databases."""
        for name in self._made:
            self._postgres.drop_database(name)

    @asynccontextmanager
    async def case(self, place: Place, which: int, nth: int) -> AsyncIterator[Case]:
        """A case with a database and a virtual host of its own."""
        name = f"relay_crash_{secrets.token_hex(4)}"
        url = await asyncio.to_thread(self._rabbitmq.create_vhost, name)
        try:
            dsn = self._free.pop() if self._free else await self._database(name)
            async with connected(dsn) as db, audit(url, "account.#") as witness:
                case = Case(place, which, nth, dsn, url, self._nursery, self._folder, db, witness)
                await case.declare()
                yield case
                await db.execute(f"SET session_replication_role = replica; {await db.fetchval(EMPTY)} {AS_MIGRATED}")
            self._free.append(dsn)  # of a case that failed nothing is used again
        finally:
            await asyncio.to_thread(self._rabbitmq.delete_vhost, name)

    async def _database(self, name: str) -> str:
        dsn = await asyncio.to_thread(self._postgres.create_database, name, self._template)
        self._made.append(name)
        async with connected(dsn) as db:
            await db.execute(PRODUCER_TABLES + ";" + CONSUMER_TABLES)
        return dsn
