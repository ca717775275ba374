"""A batch that is recognised as a whole is dealt with as its lines would deal with it, event by event."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast
from unittest.mock import patch

from hypothesis import event as note
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.inbox import Inbox, work
from relay.inbox.charges import Charges, Suspects
from relay.inbox.sequencer import Arrival, Cursor, Key, Line, Placed, key_of
from relay.inbox.stats import Stats
from relay.inbox.store import Store
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
    has_held=st.sampled_from([False] * 9 + [True]),
)


@st.composite
def batches(draw: st.DrawFn) -> tuple[dict[Key, Cursor], list[Arrival]]:
    """Cursors, and events that mostly are the next of their aggregate."""
    cursors = {("shop", "order", name): draw(CURSOR) for name in "123"}
    heads = {key[2]: cursor.last_seq for key, cursor in cursors.items()}
    arrivals = []
    for tag, name in enumerate(draw(st.lists(st.sampled_from("123"), max_size=8)), start=1):
        seq = max(1, heads[name] + draw(st.sampled_from([1] * 18 + [0, 2])))
        heads[name] = seq
        kind = draw(st.sampled_from(["Changed", "Moved", "Unknown", TOMBSTONE]))
        arrivals.append(Arrival(event(seq, aggregate=name, event_type=kind), tag))
    return cursors, arrivals


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
    elif policy == "sequence" and not any(cursor.has_held or cursor.blocked for cursor in cursors.values()):
        assert in_lines(placed, cursors, policy) is None


class Nowhere:
    """A connection that nothing is asked."""

    def is_closed(self) -> bool:
        return False

    def is_in_transaction(self) -> bool:
        return True


class Memory(Store):
    """Cursors in a dictionary; of what is to be held, the names."""

    cursors: Mapping[Key, Cursor]
    wrote: list[object]

    async def transaction_id(self) -> str:
        return "1"

    async def lock_cursors(self, keys: Iterable[Key]) -> dict[Key, Cursor]:
        return {key: self.cursors[key]._replace(has_held=False) for key in keys}

    async def write_cursors(self, cursors: Mapping[Key, Cursor]) -> None:
        self.wrote += sorted((key, cursor[:3]) for key, cursor in cursors.items())

    async def quarantine(self, strangers: Sequence[Any]) -> None:
        self.wrote += [stranger.message_id for stranger in strangers]

    async def hold(self, holds: Sequence[Any]) -> tuple[list[Arrival], list[Arrival]]:
        self.wrote += [(hold.arrival.name, hold.reason) for hold in holds]
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
    cursors: Mapping[Key, Cursor], arrivals: Sequence[Arrival], *, together: bool, all_types: bool
) -> tuple[Stats, list[object], list[object]]:
    """(counts, what was written, which handlers were called)"""
    calls: list[object] = []
    wrote: list[object] = []
    inbox = handlers(calls, together=together, all_types=all_types)
    rules = Rules(consumer="billing", inbox=inbox, settings=InboxSettings())
    with patch.object(work, "Store", Memory), patch.multiple(Memory, create=True, cursors=cursors, wrote=wrote):
        once = Work(cast("Connection", Nowhere()), rules, careful=False, charges=Charges(Suspects()))
        stats = await once.run(Batch(arrivals=arrivals))
        once.committed()
    return stats, wrote, calls


@settings(deadline=None, max_examples=60)
@given(batches(), st.booleans(), st.booleans())
def test_a_transaction_does_the_same_as_with_lines(
    batch: tuple[dict[Key, Cursor], list[Arrival]], together: bool, all_types: bool
) -> None:
    straight = asyncio.run(done(*batch, together=together, all_types=all_types))
    with patch.object(work, "cursors_after", lambda *_: None):
        assert asyncio.run(done(*batch, together=together, all_types=all_types)) == straight
