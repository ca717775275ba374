"""What the pipeline published lately, for the marks: the pipeline notes, the service of the marks takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from relay.message import Aggregate, Row

_MOST = 20_000
"""Aggregates remembered between two passes; of those beyond, the sweep of the marks tells."""


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest published number of an aggregate, and what its message was addressed by."""

    aggregate: Aggregate
    seq: int
    event_type: str
    routing_key: str | None  # the row's own


class Recent:
    """The newest published row of each aggregate since the last `take`. Costs nothing while nobody wants it."""

    def __init__(self) -> None:
        self.wanted = False
        self._newest: dict[Aggregate, tuple[int, str, str | None]] = {}

    def note(self, rows: Iterable[Row]) -> None:
        """These rows were published, in this order, and are not parked. Never raises; keeps nothing of their content."""
        if not self.wanted:
            return
        newest = self._newest
        for row in rows:
            aggregate = row.aggregate
            if aggregate is not None and row.seq is not None and (aggregate in newest or len(newest) < _MOST):
                newest[aggregate] = (row.seq, row.event_type, row.routing_key)

    def take(self) -> list[Newest]:
        """What was noted; it is forgotten here."""
        taken, self._newest = self._newest, {}
        return [Newest(aggregate, *told) for aggregate, told in taken.items()]
