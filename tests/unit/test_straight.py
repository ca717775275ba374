"""A batch that is recognised as a whole is dealt with as its lines would deal with it, event by event, whatever is held of them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from unittest.mock import patch

from hypothesis import event as note
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.inbox import Inbox, work
from relay.inbox.charges import Charges, Suspects
from relay.inbox.sequencer import Arrival, Cursor, Key, Line, Placed, key_of
from relay.inbox.stats import Stats
from relay.inbox.store import Conflict, GivenUp, Store
from relay.inbox.straight import cursors_after
from relay.inbox.work import Batch, Rules, Work
from relay.message import TOMBSTONE, Event
from relay.postgres.connect import Connection
from relay.settings import InboxSettings
from tests.unit.test_sequencer import event

CURSOR = st.builds(
    Cursor,
    last_seq=st.integers(0, 3),
    last_digest=st.sampled_from([None, b"a", b"b"]),
    blocked=st.sampled_from([False] * 9 + [True]),
    has_held=st.just(False),
)
KINDS = ["Changed", "Moved", "Unknown", TOMBSTONE]


@st.composite
def batches(draw: st.DrawFn) -> tuple[dict[Key, Cursor], list[Arrival]]:
    """Cursors, and events that mostly are the next of their aggregate."""
    cursors = {("shop", "order", name): draw(CURSOR) for name in "123"}
    heads = {key[2]: cursor.last_seq for key, cursor in cursors.items()}
    arrivals = []
    for tag, name in enumerate(draw(st.lists(st.sampled_from("123"), max_size=8)), start=1):
        seq = max(1, heads[name] + draw(st.sampled_from([1] * 18 + [0, 2])))
        heads[name] = seq
        kind = draw(st.sampled_from(KINDS))
        arrivals.append(Arrival(event(seq, aggregate=name, event_type=kind), tag))
    return cursors, arrivals


@st.composite
def held_messages(draw: st.DrawFn) -> list[Arrival]:
    """Messages in the table: of numbers that are past, in the batch or beyond it, with the batch's content or other."""
    names = draw(st.lists(st.tuples(st.sampled_from("123"), st.integers(1, 9)), max_size=6, unique=True))
    return [
        Arrival(
            event(seq, draw(st.sampled_from([b"", b"x"])), aggregate=name, event_type=draw(st.sampled_from(KINDS))),
            held_id=held_id,
        )
        for held_id, (name, seq) in enumerate(names, start=1)
    ]


def in_lines(placed: Sequence[Placed], cursors: Mapping[Key, Cursor], policy: Any) -> dict[Key, Cursor] | None:
    """What the lines come to; None if they do not simply apply all of it in this order."""
    lines = {key: Line(cursor, policy) for key, cursor in cursors.items()}
    for key, arrival in placed:
        assert key is not None
        if lines[key].offer(arrival) is not None or lines[key].next() is not arrival:
            return None
        lines[key].applied(arrival)
    if any([*line.left()] or line.clears_held or line.follows for line in lines.values()):
        return None
    return {key: line.cursor for key, line in lines.items() if line.cursor != line.before}


@given(batches(), st.sampled_from(["sequence", "latest"]))
def test_the_cursors_are_where_the_lines_would_leave_them(
    batch: tuple[dict[Key, Cursor], list[Arrival]], policy: str
) -> None:
    cursors, arrivals = batch
    placed: list[Placed] = [(key_of(arrival.event), arrival) for arrival in arrivals]
    if (after := cursors_after(placed, cursors)) is not None:
        note("straight")
        assert after == in_lines(placed, cursors, policy)
        assert list(after) == [key for key in cursors if key in after]
    elif policy == "sequence" and not any(cursor.blocked for cursor in cursors.values()):
        assert in_lines(placed, cursors, policy) is None


class Nowhere:
    """A connection that nothing is asked."""

    def is_closed(self) -> bool:
        return False

    def is_in_transaction(self) -> bool:
        return True


@dataclass
class Tables:
    """What a transaction finds, and leaves."""

    cursors: dict[Key, tuple[Any, ...]]
    held: dict[int, Event]
    quarantine: list[object] = field(default_factory=list)
    new: list[object] = field(default_factory=list)  # held by this transaction

    def of(self, key: Key) -> dict[int, int]:
        """Which numbers are held of an aggregate, as which rows."""
        return {event.seq: row for row, event in self.held.items() if key_of(event) == key and event.seq is not None}


class Memory(Store):
    """What the statements do, on tables in memory."""

    tables: Tables

    async def transaction_id(self) -> str:
        return "1"

    async def lock_cursors(self, keys: Iterable[Key], *, is_new: bool = False) -> dict[Key, Cursor]:
        return {key: Cursor(*self.tables.cursors[key]) for key in sorted(keys)}

    async def looked_for_held(self, cursors: Mapping[Key, Cursor]) -> dict[Key, Cursor]:
        return {key: cursor._replace(has_held=bool(self.tables.of(key))) for key, cursor in cursors.items()}

    async def write_cursors(self, cursors: Mapping[Key, Cursor], *, look: bool) -> list[Key]:
        held = [key for key in cursors if look and self.tables.of(key)]
        if not held:
            self.tables.cursors |= {key: cursor[:3] for key, cursor in cursors.items()}
        return held

    async def successors(self, cursors: Mapping[Key, Cursor], portion: int) -> list[Arrival]:
        found = []
        for key, (last_seq, *_) in sorted(cursors.items()):
            rows = self.tables.of(key)
            for seq in itertools.takewhile(rows.__contains__, itertools.count(last_seq + 1)):
                found.append(Arrival(self.tables.held[rows[seq]], held_id=rows[seq]))
        return found

    async def delete_held_through(
        self, cursors: Mapping[Key, Cursor], applied: Mapping[Key, Mapping[int, bytes]]
    ) -> list[Conflict]:
        gone = [self.tables.held.pop(r) for k, c in cursors.items() for s, r in self.tables.of(k).items() if s <= c[0]]
        known = [(event, applied.get(key_of(event) or ("", "", ""), {}).get(event.seq or 0)) for event in gone]
        if given_up := [event.seq or 0 for event, digest in known if digest is not None and event.is_tombstone]:
            raise GivenUp(given_up)
        return [
            Conflict(source="shop", aggregate_type="order", aggregate_id=e.aggregate_id, seq=e.seq, message_id="held")
            for e, digest in known
            if digest is not None and digest != e.digest
        ]

    async def quarantine(self, strangers: Sequence[Any]) -> None:
        self.tables.quarantine += [stranger.message_id for stranger in strangers]

    async def hold(self, holds: Sequence[Any]) -> tuple[list[Arrival], list[Arrival]]:
        self.tables.new += [(hold.arrival.name, hold.reason) for hold in holds]
        return [], []


def handlers(calls: list[object], *, together: bool, all_types: bool) -> Inbox:
    """For two of the four types, or for whatever type; `together`: one of them takes many events in one call."""
    inbox = Inbox("billing")

    async def changed(events: Sequence[Event], tx: Connection) -> None:
        calls.append([each.message_id for each in events])

    async def single(one: Event, tx: Connection) -> None:
        calls.append(one.message_id)

    if together:
        inbox.on_batch("Changed")(changed)
    else:
        inbox.on("Changed")(single)
    inbox.on("Moved")(single)
    return inbox.with_functions({"*": single}) if all_types else inbox


async def done(
    batch: tuple[dict[Key, Cursor], Sequence[Arrival]],
    held: Sequence[Arrival],
    policy: Any,
    *,
    together: bool,
    all_types: bool,
) -> tuple[Stats | set[int], Tables, list[object]]:
    """(counts, or what turned out to be given up; what is in the tables then; which handlers were called)"""
    cursors, arrivals = batch
    calls: list[object] = []
    tables = Tables({key: cursor[:3] for key, cursor in cursors.items()}, {a.held_id or 0: a.event for a in held})
    inbox = handlers(calls, together=together, all_types=all_types)
    rules = Rules(consumer="billing", inbox=inbox, settings=InboxSettings(policy=policy))
    with patch.object(work, "Store", Memory), patch.object(Memory, "tables", tables, create=True):
        once = Work(cast("Connection", Nowhere()), rules, careful=False, charges=Charges(Suspects()))
        try:
            stats: Stats | set[int] = await once.run(Batch(arrivals=arrivals))
        except GivenUp as exc:
            return set(exc.held_ids), Tables({}, {}), calls
        once.committed()
    return stats, tables, calls


@settings(deadline=None, max_examples=60)
@given(batches(), held_messages(), st.sampled_from(["sequence", "latest"]), st.booleans(), st.booleans())
def test_a_transaction_does_the_same_as_with_lines(
    batch: tuple[dict[Key, Cursor], list[Arrival]], held: list[Arrival], policy: str, together: bool, all_types: bool
) -> None:
    straight = asyncio.run(done(batch, held, policy, together=together, all_types=all_types))
    with patch.object(work, "cursors_after", lambda *_: None):
        assert asyncio.run(done(batch, held, policy, together=together, all_types=all_types)) == straight
