"""What operators have paused, and whether that holds a row. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from relay.message import Aggregate, Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Pauses:
    """The rows of relay.outbox_pause. A paused shard is another matter than a paused row: nothing of it is even read."""

    aggregates: frozenset[Aggregate] = frozenset()
    aggregate_types: frozenset[str] = frozenset()
    event_types: frozenset[str] = frozenset()
    shards: frozenset[int] = frozenset()

    @classmethod
    def of(cls, records: Iterable[Any]) -> Pauses:
        """From the table's rows."""
        found = list(records)
        return cls(
            aggregates=frozenset((r["aggregate_type"], r["aggregate_id"]) for r in found if r["scope"] == "aggregate"),
            aggregate_types=frozenset(r["aggregate_type"] for r in found if r["scope"] == "aggregate_type"),
            event_types=frozenset(r["event_type"] for r in found if r["scope"] == "event_type"),
            shards=frozenset(r["shard"] for r in found if r["scope"] == "shard"),
        )

    @property
    def any_rows(self) -> bool:
        """True when there may be a row that they hold."""
        return bool(self.aggregates or self.aggregate_types or self.event_types)

    def hold(self, row: Row) -> bool:
        """True when the row must not be published for now. relay.outbox_is_paused says the same in SQL."""
        return (
            row.event_type in self.event_types
            or row.aggregate_type in self.aggregate_types
            or row.aggregate in self.aggregates
        )
