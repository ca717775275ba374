"""What happened to messages, counted."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counts of one batch, or of many added up. Every delivery is counted in `received` and in one other.

    A duplicate that is applied while its twin is held counts as applied; the twin goes uncounted.
    """

    received: int = 0  # deliveries from the broker
    applied: int = 0  # handler ran (or it was stored) and committed; of deliveries, and of held messages that followed
    skipped: int = 0  # took their number without a handler: tombstones, event types nobody handles
    duplicates: int = 0  # applied or held before
    stale: int = 0  # policy latest: a newer one was applied before
    early: int = 0  # held: a predecessor is missing
    behind: int = 0  # held: a predecessor is held because it failed
    failed: int = 0  # failures of handlers; each message is held and tried again
    stuck: int = 0  # of the failures, those that were the last: they wait for an operator
    quarantined: int = 0  # foreign, malformed or contradicting
    control: int = 0  # marks and answers of relays: for the inbox itself, not for a handler
    batches: int = 0  # rounds of the loop

    @property
    def held(self) -> int:
        """Messages put into the table to wait."""
        return self.early + self.behind + self.failed

    def __add__(self, other: Stats) -> Stats:
        """The sum, field by field."""
        return Stats(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


class Tally:
    """Counts while a transaction runs; worth something only once it has committed."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def add(self, name: str, n: int = 1) -> None:
        """Count one more of a field of Stats."""
        self._counts[name] = self._counts.get(name, 0) + n

    def stats(self) -> Stats:
        """The counts as a value."""
        return Stats(**self._counts)
