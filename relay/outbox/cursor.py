"""How far a log has been read: two snapshots and an id. Pure.

PostgreSQL's snapshot tells which transactions are finished. A row is new when its transaction was not visible in the
cursor's snapshot; so nothing is skipped because it committed late, and a long transaction elsewhere delays nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from relay.message import Row


@dataclass(frozen=True, slots=True)
class Snapshot:
    """PostgreSQL's pg_snapshot. Transactions below `xmin` are finished, those from `xmax` on are not, `xip` between are not either."""

    xmin: int
    xmax: int
    xip: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """From PostgreSQL's text form `xmin:xmax:xip,xip`. Raises ValueError for anything else."""
        xmin, xmax, xip = text.split(":")
        snapshot = cls(int(xmin), int(xmax), tuple(int(x) for x in xip.split(",") if x))
        if not 0 < snapshot.xmin <= snapshot.xmax or any(not snapshot.xmin <= x < snapshot.xmax for x in snapshot.xip):
            raise ValueError(f"not a snapshot: {text}")
        return snapshot

    def __str__(self) -> str:
        return f"{self.xmin}:{self.xmax}:{','.join(map(str, self.xip))}"

    def sees(self, xid: int) -> bool:
        """True when the transaction had finished when the snapshot was taken (pg_visible_in_snapshot)."""
        return xid < self.xmax and xid not in self.xip


@dataclass(frozen=True, slots=True)
class Page:
    """What one read gave: rows by id, and whether the window ends with them."""

    rows: Sequence[Row]
    snapshot: Snapshot  # of the window that the page belongs to
    complete: bool  # nothing of the window is left behind this page

    @property
    def empty(self) -> bool:
        """True when there is nothing new at all."""
        return self.complete and not self.rows


@dataclass(frozen=True, slots=True)
class Position:
    """All that `snapshot` sees has been dealt with; and of `window`, all up to `after_id`."""

    snapshot: Snapshot
    window: Snapshot | None = None
    after_id: int = 0

    def after(self, page: Page) -> Position:
        """The position behind a whole page: a complete one closes its window."""
        if page.complete:
            return Position(page.snapshot)
        return self.within(page, page.rows[-1].id)

    def within(self, page: Page, row_id: int) -> Position:
        """The position inside a page, behind the row `row_id`."""
        return Position(self.snapshot, page.snapshot, row_id)
