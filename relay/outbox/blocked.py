"""What of a shard may not be published now: the aggregates with parked rows, and what operators have paused."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from relay.message import Aggregate
from relay.outbox.parking import Parked
from relay.outbox.pause import Pauses
from relay.outbox.store import Store

_RELOAD_S = 10.0
"""Time between two looks at the tables: an operator may have changed them by hand, or the notification was lost."""

_RELOAD_SHARE = 20
"""A look that took t seconds (a million paused rows: some) is repeated after this many t at the earliest."""


class Blocked:
    """Knows it for the owner of a shard: as the tables said at the last look, and as what was parked and released since."""

    def __init__(self, *, store: Store, shard: int) -> None:
        self.aggregates: set[Aggregate] = set()  # their rows may not be published past the parked ones
        self.rows = 0  # parked
        self.held_by_pause = 0  # rows of those that wait for nothing but an operator's resume
        self.pauses = Pauses()
        self._store = store
        self._shard = shard
        self._paused: set[Aggregate] = set()  # of the aggregates, those whose head is paused
        self._clock = asyncio.get_running_loop().time
        self._look_at = self._clock()

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
        return self.rows > 0 or self.shard_is_paused

    @property
    def refused_rows(self) -> int:
        """Parked rows that no pause holds: what outbox.parked_limit is about."""
        return self.rows - self.held_by_pause

    async def look(self) -> None:
        """Learn from the tables. Afterwards every blocked aggregate has a row that is tried, is paused, or is stuck."""
        started = self._clock()
        self.pauses = await self._store.pauses()
        found = await self._store.blocked()
        if found and await self._store.reconcile(self.pauses):
            found = await self._store.blocked()
        self.aggregates = {aggregate for aggregate in found if aggregate is not None}
        self.rows = sum(parked for parked, _ in found.values())
        self.held_by_pause = sum(held for _, held in found.values())
        self._paused = {aggregate for aggregate, (_, held) in found.items() if held and aggregate is not None}
        took_s = self._clock() - started
        self._look_at = self._clock() + max(_RELOAD_S, took_s * _RELOAD_SHARE)

    def note(self, parked: Sequence[Parked]) -> None:
        """Rows have been parked."""
        for p in parked:
            aggregate = p.row.aggregate
            self.rows += 1
            if aggregate is not None:
                self.aggregates.add(aggregate)
                if p.is_paused:
                    self._paused.add(aggregate)
            if p.is_paused or aggregate in self._paused:
                self.held_by_pause += 1

    def release(self, rows: int, aggregates: AbstractSet[Aggregate], still: Mapping[Aggregate, bool]) -> None:
        """So many parked rows of these aggregates went out; `still`: those that are blocked even so, and whether by a pause."""
        self.rows -= rows
        self.aggregates -= aggregates - still.keys()
        if any(paused and aggregate not in self._paused for aggregate, paused in still.items()):
            self._look_at = self._clock()  # how many rows wait behind it, the table says
