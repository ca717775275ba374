"""What of a shard may not be published now: the aggregates with parked rows, and what operators have paused."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from relay.message import Aggregate, Row
from relay.outbox.parking import Parked
from relay.outbox.pause import Pauses
from relay.outbox.store import Store

_RELOAD_S = 10.0
"""Time between two looks at the tables: an operator may have changed them by hand, or the notification was lost."""

_RELOAD_SHARE = 20
"""A look that took t seconds (a million paused rows: some) is repeated after this many t at the earliest."""

_HEED_SHARE = 5
"""The same where an operator acted. Any login can say so, again and again: events keep five sixths of the time."""


class Blocked:
    """Knows it for the owner of a shard: as the tables said at the last look, and as what was parked and released since."""

    def __init__(self, *, store: Store, shard: int) -> None:
        self.rows = 0  # parked
        self.refused_rows = 0  # of those, what outbox.parked_limit is about: refused, or behind a row that was
        self.pauses = Pauses()
        self._store = store
        self._shard = shard
        self._lines: dict[Aggregate, int] = {}  # parked rows of each blocked aggregate
        self._refused: set[Aggregate] = set()  # of those, the ones that a refused row blocks
        self._clock = asyncio.get_running_loop().time
        self._look_at = self._not_before = self._clock()
        self._is_asked = False  # to look before the time

    @property
    def aggregates(self) -> AbstractSet[Aggregate]:
        """Those with parked rows: nothing of theirs may be published past them."""
        return self._lines.keys()

    @property
    def look_at(self) -> float:
        """When the tables should be looked at again, by the event loop's clock."""
        return self._look_at

    @property
    def shard_is_paused(self) -> bool:
        """True while an operator's pause holds all of the shard."""
        return self._shard in self.pauses.shards

    @property
    def may_change_unseen(self) -> bool:
        """True when there is something that an operator could free without a new event: worth a look while nothing happens."""
        return self.rows > 0 or self.shard_is_paused or self._is_asked

    async def look(self) -> None:
        """Learn from the tables. Afterwards every blocked aggregate has a row that is tried, is paused, or is stuck."""
        started = self._clock()
        self.pauses = await self._store.pauses()
        found = await self._store.blocked()
        if found and await self._store.reconcile(self.pauses):
            found = await self._store.blocked()
        self.rows = sum(parked for parked, _ in found.values())
        self.refused_rows = sum(refused for _, refused in found.values())
        self._lines = {aggregate: parked for aggregate, (parked, _) in found.items() if aggregate is not None}
        self._refused = {aggregate for aggregate, (_, refused) in found.items() if refused and aggregate is not None}
        took_s = self._clock() - started
        self._look_at = self._clock() + max(_RELOAD_S, took_s * _RELOAD_SHARE)
        self._not_before = self._clock() + took_s * _HEED_SHARE
        self._is_asked = False

    async def heed(self) -> None:
        """An operator acted: know what is paused at once, and look at all tables at once, or soon if that was just done."""
        self.pauses = await self._store.pauses()
        self._look_at = min(self._look_at, max(self._clock(), self._not_before))
        self._is_asked = True

    def note(self, parked: Sequence[Parked]) -> None:
        """Rows have been parked."""
        for p in parked:
            aggregate = p.row.aggregate
            refused = p.is_head and not p.is_paused
            self.rows += 1
            if aggregate is not None:
                self._lines[aggregate] = self._lines.get(aggregate, 0) + 1
                if refused:
                    self._refused.add(aggregate)
                refused = aggregate in self._refused
            self.refused_rows += refused

    def release(
        self,
        published: Sequence[Row],
        refused: Sequence[Parked],
        gone: Mapping[int, bool],
        still: Mapping[Aggregate, bool],
        *,
        first_refusals: int,
    ) -> None:
        """Parked rows were published or refused. `gone`, `still`: what Store.unpark says of the rows, and of their aggregates.

        `first_refusals`: rows without an aggregate that had only been paused until now.
        """
        self.refused_rows += first_refusals
        for row in published:
            if row.id in gone:
                if row.aggregate is None:
                    self.rows -= 1
                    self.refused_rows -= gone[row.id]
                elif row.aggregate in self._lines:
                    self.rows -= 1
                    self._lines[row.aggregate] -= 1
                    self.refused_rows -= row.aggregate in self._refused
        for aggregate in {row.aggregate for row in (*published, *(parked.row for parked in refused))}:
            if aggregate is not None:
                self._note_head(aggregate, still.get(aggregate))

    def _note_head(self, aggregate: Aggregate, refused: bool | None) -> None:
        """What blocks an aggregate now: a row that was refused, another one, or nothing (None)."""
        rows = self._lines.get(aggregate, 0)
        self.refused_rows += rows * (bool(refused) - (aggregate in self._refused))
        (self._refused.add if refused else self._refused.discard)(aggregate)
        if refused is None and self._lines.pop(aggregate, 0):
            self.rows -= rows  # counted twice: parked by a session that did not hear of it
