"""Pages in flight: sent in their order, answered in any, settled in their order again; and nothing in between is believed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import BrokerUnavailable
from relay.message import Aggregate, Message, Row
from relay.outbox.blocked import Blocked
from relay.outbox.cursor import Page, Position, Snapshot
from relay.outbox.parking import Parked, Settlement
from relay.outbox.pause import Pauses
from relay.outbox.pipeline import Pipeline
from relay.outbox.progress import Progress
from relay.outbox.routing import route
from relay.rabbitmq.contract import Confirmed, Nacked, Outcome, Publisher, Refused, Returned, Unknown
from relay.settings import OutboxSettings
from tests.unit.test_parking import TEMPLATE

START = Position(Snapshot(1, 1))
WINDOW = Snapshot(9, 9)
ORDER_A = Pauses(aggregates=frozenset({("order", "a")}))
SENT = Pauses(event_types=frozenset({"Sent"}))


class ScriptedPublisher:
    """The seam, answering when and what a test says."""

    def __init__(self) -> None:
        self.lost: BaseException | None = None
        self.message_is_suspect = False
        self.calls: list[tuple[Sequence[Message], asyncio.Future[list[Outcome]]]] = []

    async def publish(self, messages: Sequence[Message]) -> list[Outcome]:
        if self.lost is not None:
            return [Unknown("lost")] * len(messages)
        answer: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()
        self.calls.append((messages, answer))
        return await answer

    @property
    def unanswered(self) -> list[tuple[Sequence[Message], asyncio.Future[list[Outcome]]]]:
        return [call for call in self.calls if not call[1].done()]

    def answer(self, call: int, outcomes: Sequence[Outcome]) -> None:
        self.unanswered[call][1].set_result([*outcomes])

    def lose(self, outcomes: Sequence[Outcome]) -> None:
        """Every message without an answer has one of these, in turn; what is begun later has none."""
        self.lost = BrokerUnavailable("cut")
        given = iter(outcomes)
        for messages, answer in self.unanswered:
            answer.set_result([next(given, Unknown("cut")) for _ in messages])


class Bench:
    """A pipeline, and the least of a shard around it: what is settled is noted as parked, and remembered."""

    def __init__(self, **configured: Any) -> None:
        self.publisher = ScriptedPublisher()
        self.blocked = Blocked(store=cast("Any", None), shard=0)
        self.progress = Progress()
        self.pipeline = Pipeline(
            position=START,
            publisher=cast("Publisher", self.publisher),
            blocked=self.blocked,
            message=lambda row: route(row, source="shop", template="{aggregate_type}"),
            settings=OutboxSettings.model_validate(configured),
            progress=self.progress,
        )
        self.last_id = 0
        self.log: list[Row] = []
        self.confirmed: list[int] = []
        self.parked: list[Parked] = []

    def page(
        self, *aggregates: str | None, complete: bool = False, body: bytes = b"{}", types: Sequence[str] = ()
    ) -> Page:
        """The next rows of the log; the types of the first of them, if they are not Paid."""
        rows = []
        for aggregate in aggregates:
            self.last_id += 1
            seq = None if aggregate is None else self.last_id
            rows.append(TEMPLATE._replace(id=self.last_id, aggregate_id=aggregate, seq=seq, body=body))
        rows = [row._replace(event_type=t) for row, t in zip(rows, types, strict=False)] + rows[len(types) :]
        self.log += rows
        return Page(rows, WINDOW, complete)

    async def begin(self, *aggregates: str | None, **about: Any) -> Page:
        page = self.page(*aggregates, **about)
        self.pipeline.begin(page)
        await asyncio.sleep(0)
        return page

    async def settle(self) -> Settlement:
        await self.pipeline.wait()
        settlement = self.pipeline.settle()
        self.confirmed += [row.id for row in settlement.confirmed]
        self.parked += settlement.parked
        self.blocked.note(settlement.parked)
        return settlement

    def is_full(self) -> bool:
        return self.pipeline.is_full

    def is_settleable(self) -> bool:
        return self.pipeline.is_settleable

    @property
    def sent(self) -> list[list[str | None]]:
        """The aggregates of what was sent, by call."""
        return [
            [cast("str | None", m.headers.get("x-aggregate-id")) for m in messages]
            for messages, _ in self.publisher.calls
        ]


OK = Confirmed()


async def test_pages_are_sent_at_once_in_their_order_and_settled_in_it_whatever_is_answered_first() -> None:
    bench = Bench()
    first = await bench.begin("a", "b")
    second = await bench.begin("c")
    assert bench.sent == [["a", "b"], ["c"]]
    bench.publisher.answer(1, [OK])
    await bench.pipeline.wait(0.001)
    assert not bench.pipeline.is_answered  # the second is, but it is not its turn
    assert bench.pipeline.position == START
    bench.publisher.answer(0, [OK, OK])
    await bench.settle()
    assert bench.pipeline.position == START.after(first)
    await bench.settle()
    assert bench.pipeline.position == START.after(first).after(second) == bench.pipeline.read_to


async def test_a_row_of_a_later_page_is_parked_behind_what_was_refused_in_an_earlier_one_though_it_was_confirmed() -> (
    None
):
    bench = Bench()
    await bench.begin("a", "b")
    await bench.begin("a", "b")
    bench.publisher.answer(1, [OK, OK])
    bench.publisher.answer(0, [Nacked(), OK])
    await bench.settle()
    await bench.settle()
    assert [(p.row.id, p.reason) for p in bench.parked] == [(1, "nacked"), (3, "behind")]
    assert bench.confirmed == [2, 4]


async def test_nothing_of_an_aggregate_is_sent_once_a_settled_page_has_blocked_it() -> None:
    bench = Bench()
    await bench.begin("a")
    bench.publisher.answer(0, [Nacked()])
    await bench.settle()
    await bench.begin("a", "b")
    assert bench.sent == [["a"], ["b"]]


async def test_a_page_of_which_nothing_may_be_sent_is_settled_in_its_turn() -> None:
    bench = Bench()
    bench.blocked.pauses = ORDER_A
    await bench.begin("b")
    await bench.begin("a")
    assert bench.sent == [["b"]]
    bench.publisher.answer(0, [OK])
    await bench.settle()
    await bench.settle()
    assert [(p.row.id, p.reason) for p in bench.parked] == [(2, "paused")]


async def test_nothing_overtakes_what_is_held_back_in_a_page_before() -> None:
    bench = Bench()
    bench.blocked.pauses = SENT
    await bench.begin("b", "a", types=["Paid", "Sent"])
    await bench.begin("a", "b")
    assert bench.sent == [["b"], ["b"]]
    bench.publisher.answer(0, [OK])
    bench.publisher.answer(0, [OK])
    await bench.settle()
    await bench.settle()
    assert [(p.row.id, p.reason) for p in bench.parked] == [(2, "paused"), (3, "behind")]


@pytest.mark.parametrize(("configured", "careful", "depth"), [({}, 0, 4), ({"order": "strict"}, 0, 1), ({}, 5, 1)])
async def test_four_pages_are_in_flight_one_where_one_message_must_wait_for_another(
    configured: dict[str, Any], careful: int, depth: int
) -> None:
    bench = Bench(**configured)
    bench.progress.careful = careful
    for _ in range(depth):
        assert not bench.is_full()
        await bench.begin("a")
    assert bench.is_full()
    bench.publisher.answer(0, [OK])
    await bench.settle()
    assert not bench.is_full()


async def test_two_full_pages_are_in_flight_when_rows_are_large() -> None:
    bench = Bench(page_bytes=1024)
    await bench.begin("a", "b", body=b"x" * 512)
    assert not bench.is_full()
    await bench.begin("a", body=b"x" * 1024)
    assert bench.is_full()
    bench.publisher.answer(0, [OK, OK])
    await bench.settle()
    assert not bench.is_full()


async def test_a_window_that_turns_out_to_be_over_ends_behind_its_last_page_in_flight() -> None:
    bench = Bench()
    await bench.begin("a")
    bench.pipeline.skip(bench.page(complete=True))
    assert bench.pipeline.read_to == Position(WINDOW)
    assert bench.pipeline.position == START
    bench.publisher.answer(0, [OK])
    await bench.settle()
    assert bench.pipeline.position == Position(WINDOW)


async def test_nothing_new_moves_the_position_only_when_nothing_is_in_flight() -> None:
    bench = Bench()
    await bench.begin("a", complete=True)
    bench.pipeline.skip(Page([], Snapshot(20, 20), complete=True))
    assert bench.pipeline.read_to == Position(WINDOW)
    bench.publisher.answer(0, [OK])
    await bench.settle()
    bench.pipeline.skip(Page([], Snapshot(20, 20), complete=True))
    assert bench.pipeline.position == bench.pipeline.read_to == Position(Snapshot(20, 20))


async def test_a_lost_session_leaves_all_behind_the_first_unknown_row_unsettled() -> None:
    bench = Bench()
    first = await bench.begin("a", "b", "c")
    await bench.begin("d")
    bench.publisher.lose([OK, Unknown("cut"), OK, OK])
    await bench.pipeline.conclude()
    assert bench.is_settleable()
    await bench.settle()
    assert not bench.is_settleable()
    assert bench.pipeline.position == START.within(first, 1)
    assert (bench.confirmed, bench.pipeline.rows) == ([1], 3)


LATE = Unknown("late", timed_out=True)


async def test_that_another_page_was_confirmed_is_evidence_against_a_row_that_is_late_again() -> None:
    bench = Bench()
    bench.progress.unconfirmed = {1: 1}
    await bench.begin("a")
    await bench.begin("b")
    bench.publisher.lose([LATE, OK])
    await bench.pipeline.conclude()
    await bench.settle()
    await bench.settle()
    assert [(p.row.id, p.reason) for p in bench.parked] == [(1, "unconfirmed")]
    assert bench.confirmed == [2]


async def test_many_rows_that_are_late_all_together_say_nothing_against_one_of_them() -> None:
    bench = Bench()
    for _ in range(2):
        await bench.begin(*"abcdef")
    bench.publisher.lose([LATE] * 12)
    await bench.pipeline.conclude()
    assert bench.progress.unconfirmed == {}
    assert not bench.is_settleable()


async def test_what_is_in_flight_at_the_end_is_ended() -> None:
    bench = Bench()
    await bench.begin("a")
    await bench.begin("b")
    await bench.pipeline.close()
    assert all(answer.cancelled() for _, answer in bench.publisher.calls)


ANSWERS: st.SearchStrategy[Outcome] = st.sampled_from(
    [OK, OK, OK, OK, Returned("NO_ROUTE"), Nacked(), Refused("too_large", "x")]
)
AGGREGATES = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=4)
PAUSES = st.sampled_from([Pauses(), ORDER_A, SENT])


class Schedule:
    """Random acts on a bench, and what the log must come to, worked out row by row as if nothing overlapped."""

    def __init__(self, data: st.DataObject) -> None:
        self.draw = data.draw
        self.outcomes: dict[int, Outcome] = {}  # by id, of what was sent
        self.held: dict[int, bool] = {}  # by id, of what a pause held when its page was begun
        self.waiting: set[Aggregate] = set()  # of which something is held back
        self.freed: list[tuple[int, str]] = []  # (the last id before, aggregate): its parked rows went out after all

    async def play(self) -> None:
        self.bench = Bench()
        for _ in range(self.draw(st.integers(1, 12))):
            await getattr(
                self, self.draw(st.sampled_from(["begin", "begin", "begin", "answer", "answer", "settle", "operate"]))
            )()
        if self.draw(st.booleans()):
            self._learn(range(len(self.bench.publisher.unanswered)), st.one_of(ANSWERS, st.just(Unknown("cut"))))
            await self.bench.pipeline.conclude()
        while self.bench.publisher.unanswered:
            await self.answer()
        while not self.bench.pipeline.is_empty and (self.bench.publisher.lost is None or self.bench.is_settleable()):
            await self.bench.settle()
        await self.bench.pipeline.close()

    async def begin(self) -> None:
        if not self.bench.is_full():
            names = self.draw(AGGREGATES)
            types = self.draw(st.lists(st.sampled_from(["Paid", "Sent"]), min_size=len(names), max_size=len(names)))
            calls = len(self.bench.publisher.calls)
            page = await self.bench.begin(*names, types=types, complete=self.draw(st.booleans()))
            self.held |= {row.id: self.bench.blocked.pauses.hold(row) for row in page.rows}
            sent = [m for messages, _ in self.bench.publisher.calls[calls:] for m in messages]
            self._overtakes_nothing({self._id(message) for message in sent}, page)

    def _overtakes_nothing(self, sent: set[int], page: Page) -> None:
        """What is sent is behind nothing that is held back: parked, or read and not sent."""
        for row in page.rows:
            if row.aggregate is not None and row.id not in sent:
                self.waiting.add(row.aggregate)
            assert row.id not in sent or row.aggregate not in self.waiting | self.bench.blocked.aggregates

    async def answer(self) -> None:
        if waiting := len(self.bench.publisher.unanswered):
            self._learn([self.draw(st.integers(0, waiting - 1))], ANSWERS)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def settle(self) -> None:
        if self.bench.pipeline.is_answered:
            await self.bench.settle()

    async def operate(self) -> None:
        """What changes what may be sent, with nothing in flight, as the shard sees to."""
        while self.bench.publisher.unanswered:
            await self.answer()
        while not self.bench.pipeline.is_empty:
            await self.bench.settle()
        self.bench.blocked.pauses = self.draw(PAUSES)
        self.waiting.clear()
        for aggregate in sorted(self.bench.blocked.aggregates):
            if self.draw(st.booleans()):
                del self.bench.blocked._lines[aggregate]
                self.freed.append((self.bench.last_id, aggregate[1]))

    def _learn(self, calls: Sequence[int], answers: st.SearchStrategy[Outcome]) -> None:
        """Answer calls; of all at once, the session is lost with it."""
        unanswered = self.bench.publisher.unanswered
        given: list[Outcome] = []
        for call in calls:
            for message in unanswered[call][0]:
                outcome = self.draw(answers)
                given.append(outcome)
                self.outcomes[self._id(message)] = outcome
        if isinstance(calls, range):
            self.bench.publisher.lose(given)
        else:
            self.bench.publisher.answer(calls[0], given)

    def _id(self, message: Message) -> int:
        return next(
            row.id for row in self.bench.log if route(row, source="shop", template="").message_id == message.message_id
        )

    def expected(self) -> tuple[list[int], list[tuple[int, bool]]]:
        """(confirmed, (parked, whether as a head))."""
        confirmed, parked = [], []
        blocked: set[str | None] = set()
        freed = iter([*self.freed, (self.bench.last_id + 1, "")])
        until, aggregate = next(freed)
        for row in self.bench.log:
            while row.id > until:
                blocked.discard(aggregate)
                until, aggregate = next(freed)
            outcome = self.outcomes.get(row.id)
            if isinstance(outcome, Unknown):
                break
            if row.aggregate_id in blocked:
                parked.append((row.id, False))
            elif isinstance(outcome, Confirmed):
                confirmed.append(row.id)
            else:
                assert outcome is not None or self.held[row.id], f"{row} was not sent, and nothing held it"
                parked.append((row.id, True))
                if row.aggregate_id is not None:
                    blocked.add(row.aggregate_id)
        return confirmed, parked


@settings(max_examples=300)
@given(st.data())
def test_whatever_is_answered_when_and_whatever_operators_do_the_log_is_settled_as_if_nothing_overlapped(
    data: st.DataObject,
) -> None:
    schedule = Schedule(data)
    asyncio.run(schedule.play())
    bench = schedule.bench
    confirmed, parked = schedule.expected()
    assert bench.confirmed == confirmed
    assert [(p.row.id, p.is_head) for p in bench.parked] == parked
    settled = len(confirmed) + len(parked)
    assert bench.pipeline.rows == len(bench.log) - settled
    assert bench.pipeline.is_empty == (settled == len(bench.log))
    first_open = bench.log[settled].id if settled < len(bench.log) else bench.last_id + 1
    assert bench.pipeline.position.after_id < first_open
