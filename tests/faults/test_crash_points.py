"""Exhaustive crash points: at every named point of both pipelines a process is killed at the first, a middle and the last message.

However it dies: nothing is lost, every event has exactly one effect, in order, and no cursor is past what is not so.
`pytest -n 0 -s tests/faults/test_crash_points.py | grep '^|'` prints the table of README.md.
"""

from __future__ import annotations

import ast
import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import relay
from relay.failpoints import Point
from relay.outbox import retention
from relay.sandbox import Postgres, RabbitMQ
from tests.faults.crash import InHandler, Place
from tests.faults.crash_case import LOAD, PATIENCE_S, Case, Ground, Verdict, nursery
from tests.faults.lab.amqp_proxy import AmqpProxy
from tests.faults.lab.proxy import Bites
from tests.harness.outbox import until

SLOT_S = 2 * 86400  # a slot is filled for two days, see the migration

RUN = ("run", "--drain")
CONSUME = ("inbox", "run", "tests.faults.crash:inbox")
STORE = ("inbox", "run", "--consumer", "effects", "--store")

CROOKED = [LOAD[i] for i in (3, 0, 4, 1, 5, 2, 6, 7, 8)]
"""Of every aggregate the second message comes before the first."""

LOST = (("account/a", 1), ("account/b", 2), ("lonely/x", 3))
"""The first, a middle and the last message: that it is missing, the last one, only a mark can tell."""

BEFORE = (0, 4, 8)
"""How many events are dealt with before a point that is passed once in a session."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Where a point is (after `relay.`), how it is reached, and at which times of reaching it the process is killed."""

    where: str
    scenario: Callable[[Case], Awaitable[None]]
    nth: tuple[int, int, int] = (1, 1, 1)


# --- outbox


async def takes_over(case: Case) -> None:
    """Some of the log was published by a relay before."""
    await case.route_all()
    await case.emit(LOAD[: BEFORE[case.which]])
    await case.publish()
    await case.emit(LOAD[BEFORE[case.which] :])
    await case.crash(*RUN)


async def takes_over_a_restored_log(case: Case) -> None:
    """The same, but the log says that it is another cluster's."""
    await case.route_all()
    await case.emit(LOAD[: BEFORE[case.which]])
    await case.publish()
    await case.emit(LOAD[BEFORE[case.which] :])
    await case.db.execute("UPDATE relay.outbox_cursor SET cluster_id = 1")
    await case.crash(*RUN)


async def publishes(case: Case) -> None:
    """Nine pages of one row; a third of them is unroutable."""
    await case.emit()
    await case.crash(*RUN)


async def ends(case: Case) -> None:
    """The end of a drain, after one event, five, all; nothing of it is checkpointed before."""
    await case.route_all()
    before = (1, 5, 9)[case.which]
    await case.emit(LOAD[:before])
    await case.crash(*RUN, outbox__checkpoint_interval_s=60)
    await case.emit(LOAD[before:])


async def retries(case: Case) -> None:
    """Three parked rows of one aggregate, one after the other."""
    await case.emit()
    await case.publish()
    await case.route_all()
    await case.retry_now()
    await case.crash(*RUN, outbox__order="strict")


async def tries_alone(case: Case) -> None:
    """The same, three times until a head is written down as one whose queue never confirmed."""
    await case.emit()
    await case.publish()
    await case.route_all()
    await case.db.execute(
        "UPDATE relay.outbox_parked SET reason = 'unconfirmed', state = 'retrying', attempts = 1, next_attempt_at = now()"
    )
    await case.crash(*RUN)


async def sleeps(case: Case) -> None:
    """A relay that falls asleep three times: three events are committed each time that it has."""
    await case.route_all()
    doomed = await case.start("run")
    left = [LOAD[i : i + 3] for i in (0, 3, 6)]
    asleep = 0
    while left and await doomed.until(f"ASLEEP {asleep + 1}"):
        asleep += 1
        if case.place is Point.ASLEEP and asleep == case.nth:
            break  # it dies here
        await case.emit(left.pop(0))
    await case.dies(doomed)
    for events in left:
        await case.emit(events)


async def empties_slots(case: Case) -> None:
    """All is published and applied, and old: three slots of the ring with three rows each.

    The last of them may have been filled until a moment ago: whoever empties it here has no patience (`_LEAST_S`), see `impatient`.
    """
    await _until_no_slot_ends_soon()
    await case.route_all()
    case.flags["outbox__retention_s"] = 0
    period = int(time.time()) // SLOT_S
    for number, slots_ago in ((1, 3), (2, 2), (3, 1)):
        events = [event for event in LOAD if event[1] == number]
        await case.emit(events, in_slot=((period - slots_ago) % 4, 2 * slots_ago))
    async with case.consumer():
        await case.crash(*RUN)

    async def all_emptied() -> bool:
        await case.publish()  # a drain ends with a look at the slots
        return bool(await case.db.fetchval("SELECT count(*) FROM relay.outbox") == 0)

    await until(all_emptied)


async def _until_no_slot_ends_soon() -> None:
    """The oldest slot of the ring is the current one afterwards."""
    if (left_s := SLOT_S - time.time() % SLOT_S) < PATIENCE_S:
        await asyncio.sleep(left_s + 1)


async def tells_and_answers(case: Case) -> None:
    """A message is lost from the queue; the consumer is told of it by a mark, or sees it, and asks."""
    case.with_repair()
    await case.route_all()
    await case.emit()
    await case.publish()
    await case.requeue([event for event in LOAD if event != LOST[case.which]])
    async with case.consumer():
        await case.crash("run")


# --- inbox


async def consumes(case: Case) -> None:
    """Nine messages, one a batch, not in order."""
    await case.route_all()
    await case.emit()
    await case.publish()
    await case.requeue(CROOKED)
    await case.crash(*CONSUME)


async def stores(case: Case) -> None:
    """The same in store mode."""
    case.flags["inbox__mode"] = "store"
    await case.route_all()
    await case.emit()
    await case.publish()
    await case.requeue(CROOKED)
    await case.crash(*STORE)


async def fails(case: Case) -> None:
    """The handler of the first event fails three times; each time it is called once more, by itself."""
    await case.route_all()
    await case.emit(fails=6)
    await case.publish()
    await case.crash(*CONSUME)


async def misses(case: Case) -> None:
    """A message is lost from the queue, and a relay answers for it."""
    lost = LOST[case.which]
    if case.place is Point.GAP_NOTED and case.which == 2:
        lost = ("lonely/x", 2)  # the last one that is seen to be missing without a mark
    case.with_repair()
    await case.route_all()
    await case.emit()
    await case.publish()
    await case.requeue([event for event in LOAD if event != lost])
    async with case.relay():
        await case.crash(*CONSUME)


EACH = (1, 5, 9)  # the one in the middle is unroutable until somebody is bound for it
THREE = (1, 2, 3)

TABLE: Mapping[Place, Trial] = {
    Point.REBASING: Trial("outbox.lease._rebase", takes_over_a_restored_log),
    Point.REBASED: Trial("outbox.lease._take", takes_over_a_restored_log),
    Point.OWNED: Trial("outbox.lease._take", takes_over),
    Point.PAGE_READ: Trial("outbox.shard.Shard._begin", publishes, EACH),
    Point.PUBLISHING: Trial(
        "outbox.pipeline.Pipeline._send", publishes, (1, 4, 7)
    ),  # what is behind a parked row is not sent
    Point.CONFIRMED: Trial("outbox.shard.Shard._settle", publishes, EACH),
    Point.CURSOR_MOVED: Trial("outbox.store.Store.checkpoint", publishes, EACH),
    Point.ROWS_PARKED: Trial("outbox.store.Store.checkpoint", publishes, THREE),
    Point.CHECKPOINTED: Trial("outbox.store.Store.checkpoint", publishes, EACH),
    Point.RETRYING: Trial("outbox.retry.Retry._send", retries, THREE),
    Point.RETRIED: Trial("outbox.retry.Retry._send", retries, THREE),
    Point.ROWS_UNPARKED: Trial("outbox.store.Store.unpark", retries, THREE),
    Point.UNPARKED: Trial("outbox.store.Store.unpark", retries, THREE),
    Point.TRYING_ALONE: Trial("outbox.alone.Alone._try", tries_alone, THREE),
    Point.TRIED_ALONE: Trial("outbox.retry.Retry.settle_alone", tries_alone, THREE),
    Point.FALLING_ASLEEP: Trial("outbox.wakeup.Wakeup.try_fall_asleep", sleeps, THREE),
    Point.ASLEEP: Trial("outbox.shard.Shard._rest", sleeps, THREE),
    Point.WOKEN: Trial("outbox.shard.Shard._rest", sleeps, THREE),
    Point.STOPPING: Trial("outbox.shard.Shard.run", ends),
    Point.STOPPED: Trial("outbox.shard.Shard.run", ends),
    Point.MARKS_PUBLISHED: Trial("outbox.marks.MarksService._pass", tells_and_answers),
    Point.REPAIR_TAKEN: Trial("outbox.repair.Repair._answer_all", tells_and_answers),
    Point.REPAIR_SENT: Trial("outbox.repair.Repair._send", tells_and_answers),
    Point.REPAIR_ANSWERED: Trial("outbox.repair.Repair._answer_all", tells_and_answers),
    Point.SLOT_SCANNED: Trial("outbox.retention.Retention._scan", empties_slots, THREE),
    Point.SLOT_EMPTIED: Trial("outbox.retention.Retention._consider", empties_slots, THREE),
    Point.RECEIVED: Trial("inbox.consumer._Loop._deliver", consumes, EACH),
    Point.CURSORS_LOCKED: Trial("inbox.work.Work.run", consumes, EACH),
    InHandler.HANDLER_CALLED: Trial("(the handler)", consumes, EACH),
    InHandler.HANDLER_DONE: Trial("(the handler)", consumes, EACH),
    Point.FOLLOWED: Trial("inbox.work.Work._follow", consumes, THREE),
    Point.ROWS_HELD: Trial("inbox.work.Work._hold", consumes, THREE),
    Point.STORED: Trial("inbox.stored.Stored.write", stores, (1, 3, 6)),  # three transactions store two
    Point.CONTROL_HEEDED: Trial("inbox.work.Work._heed", misses),
    Point.WRITTEN: Trial("inbox.work.Work.run", consumes, EACH),
    Point.COMMITTED: Trial("inbox.apply.Applier._transaction", consumes, EACH),
    Point.ACKNOWLEDGED: Trial("inbox.consumer._Loop._deliver", consumes, EACH),
    Point.SET_APART: Trial("inbox.apply.Applier.apply", fails, THREE),
    Point.RETRYING_HELD: Trial("inbox.apply.Applier.retry_due", fails, THREE),
    Point.GAP_NOTED: Trial("inbox.healing.Healing._look", misses),
    Point.GAP_CLAIMED: Trial("inbox.healing.Healing._ask", misses),
    Point.GAP_WRITTEN: Trial("inbox.healing.Healing._ask_for", misses),
    Point.GAP_ASKED: Trial("inbox.healing.Healing._ask_for", misses),
    Point.GAP_CLOSED: Trial("inbox.healing.Healing._close", misses),
}


@pytest.fixture(scope="module")
def ground(
    postgres: Postgres, rabbitmq: RabbitMQ, template_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("crash")
    with nursery(folder) as socket:
        ground = Ground(postgres, rabbitmq, template_database, socket, folder)
        yield ground
        ground.close()


def users_in_the_product() -> Iterator[tuple[str, ast.Module]]:
    """The modules of relay (after `relay.`) that know of failpoints."""
    root = Path(relay.__file__).parent
    for file in sorted(root.rglob("*.py")):
        if "failpoints" in (source := file.read_text()) or file.stem == "failpoints":
            yield ".".join(file.relative_to(root).with_suffix("").parts), ast.parse(source)


def reached_in(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(point, function), of every call of `reached` in this node of that name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from reached_in(child, f"{name}.{child.name}")
        else:
            yield from reached_in(child, name)
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id == "reached":
            yield ast.unparse(child.args[0]), name


def test_the_table_has_every_point_in_the_order_of_the_way_and_each_is_passed_once_where_it_says() -> None:
    assert [place for place in TABLE if isinstance(place, Point)] == list(Point)
    assert {place for place in TABLE if isinstance(place, InHandler)} == set(InHandler)
    passed = [place for module, tree in users_in_the_product() for place in reached_in(tree, module)]
    assert sorted(passed) == sorted((str(point), TABLE[point].where) for point in Point)


def test_nothing_in_the_product_can_arm_a_point() -> None:
    modules = dict(users_in_the_product())
    imported = {
        module: {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        for module, tree in modules.items()
    }
    assert imported.pop("failpoints") == {"annotations", "Callable", "Enum", "unique"}  # no environment, no settings
    assert all({"Point", "reached"} <= names and not {"install", "failpoints"} & names for names in imported.values())
    assert not [
        n
        for tree in modules.values()
        for n in ast.walk(tree)
        if isinstance(n, ast.Import) and "relay" in ast.unparse(n)
    ]


async def three(case: Callable[[int], Awaitable[Verdict]]) -> list[Verdict]:
    """At the first, a middle and the last message; at the same time, since most of it is waiting."""
    found = await asyncio.gather(*(case(which) for which in range(3)), return_exceptions=True)
    if wrong := [f for f in found if isinstance(f, Exception)]:
        raise ExceptionGroup("first, middle, last: " + ", ".join(map(repr, found)), wrong)
    return [f for f in found if isinstance(f, Verdict)]


async def outcome(ground: Ground, place: Place, which: int) -> Verdict:
    trial = TABLE[place]
    async with ground.case(place, which, trial.nth[which]) as case:
        await trial.scenario(case)
        await case.recover()
        return await case.verdict()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No slot is left alone for the hour after it was filled, when this process sweeps: as tests.faults.crash has it for the others."""
    monkeypatch.setattr(retention, "_LEAST_S", 0.0)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("place", TABLE, ids=lambda place: place.name)
async def test_killed_there_at_the_first_a_middle_and_the_last_message_nothing_is_lost_doubled_or_disordered(
    ground: Ground, place: Place
) -> None:
    found = await three(lambda which: outcome(ground, place, which))
    show(place.name, place.value, found)


async def written(ground: Ground, which: int) -> Verdict:
    """Killed when the message is at the broker, and its confirm has been lost on the way back."""
    async with ground.case(Point.PUBLISHING, which, EACH[which]) as case:
        await case.route_all()
        await case.emit()
        address = urlsplit(case.broker)
        assert address.port is not None
        proxy = AmqpProxy(address.port)
        port = await proxy.start()
        through = address._replace(netloc=f"{address.netloc.rpartition(':')[0]}:{port}").geturl()
        try:
            doomed = await case.start(*RUN, how="stop", broker=through, outbox__order="strict")  # one page in flight
            assert await doomed.until(f"PUBLISHING {case.nth}")
            await doomed.paused()
            async with proxy.dropping_acks() as dropped:
                doomed.send(signal.SIGCONT)
                await until(lambda: bitten(dropped))
                doomed.send(signal.SIGKILL)
                await case.dies(doomed)
        finally:
            await proxy.close()
        await case.recover()
        return await case.verdict()


async def bitten(bites: Bites) -> bool:
    return bites.count > 0


async def test_killed_after_the_write_and_before_the_confirm_the_message_is_published_again_and_applied_once(
    ground: Ground,
) -> None:
    found = await three(lambda which: written(ground, which))
    show("(no point)", "a message is at the broker, its confirm has not arrived", found)
    assert [verdict.copies for verdict in found] == [1, 1, 1]


def show(name: str, what: str, found: Sequence[Verdict]) -> None:
    """A row of the table: copies at the broker / deliveries that the consumer recognised."""
    print(f"\n| {name} | {what} | {' | '.join(map(str, found))} |")
