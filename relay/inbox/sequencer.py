"""What to do with each event of one aggregate: pure, without clock or I/O.

A `Line` takes the arrivals of one aggregate in the broker's order, in any order of their numbers, and says which one may
be applied next. The caller applies it and tells how that went; what is left in the end has to be held.

    line = Line(cursor, "sequence")
    refusal = line.offer(arrival)          # None: kept
    while (arrival := line.next()) is not None:
        line.applied(arrival)              # or line.failed(arrival)
    line.left()                            # (arrival, "early" | "behind" | "failed")
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Literal, NamedTuple

from relay.message import Event

Policy = Literal["sequence", "latest", "none"]
Reason = Literal["early", "behind", "failed"]
Key = tuple[str, str, str]
"""(source, aggregate type, aggregate id): what order is kept for."""
Unit = tuple[str, ...]
"""What fails alone: the Key of an ordered event, (source, message id) of one without order."""


class Cursor(NamedTuple):
    """How far an aggregate has been applied. A named tuple, as `Arrival`: for each event one of each is made."""

    last_seq: int = 0  # 0: nothing yet
    last_digest: bytes | None = None  # of last_seq; None: not comparable (nothing applied, or a tombstone)
    blocked: bool = False  # the next message is in the table, to be tried (again) by the retry timer
    has_held: bool = True  # False: the table is known to hold nothing of the aggregate


class Arrival(NamedTuple):
    """An event on its way to its handler: from the broker (`tag`) or from the table of held ones (`held_id`)."""

    event: Event
    tag: int | None = None
    exchange: str = ""
    routing_key: str = ""
    held_id: int | None = None
    attempts: int = 0  # failures so far

    @property
    def name(self) -> tuple[str, int]:
        """The same for the same arrival, also when a transaction is redone."""
        return ("held", self.held_id) if self.held_id is not None else ("tag", self.tag or 0)

    @property
    def message(self) -> tuple[str, str]:
        """(source, message id): the same for every arrival of the message, in whatever session."""
        return (self.event.source, self.event.message_id)


Placed = tuple[Key | None, Arrival]
"""An arrival with the aggregate whose order it is in; None: without order."""


class Refusal(Enum):
    """Why an arrival is not applied and need not be held."""

    DUPLICATE = "duplicate"  # applied already, or kept already
    STALE = "stale"  # policy latest: a newer one was applied
    CONFLICT = "conflict"  # the same number with another content: quarantine


def key_of(event: Event) -> Key | None:
    """The key that order is kept for; None for an event without an aggregate."""
    if event.aggregate_type is None or event.aggregate_id is None:
        return None
    return (event.source, event.aggregate_type, event.aggregate_id)


def is_ordered(event: Event, policy: Policy) -> bool:
    """False: the event is only deduplicated, by its message id."""
    return event.seq is not None and policy != "none"


class Line:
    """The events of one aggregate in one transaction. Its cursor must be locked while the line is in use."""

    __slots__ = ("_clears_held", "_failed", "_has_held", "_kept", "_latest", "before", "cursor")

    def __init__(self, cursor: Cursor, policy: Policy) -> None:
        self.cursor = cursor
        self.before = cursor
        self._clears_held = False
        self._has_held = cursor.has_held
        self._latest = policy == "latest"
        self._kept: dict[int, Arrival] = {}
        self._failed: list[Arrival] = []

    def offer(self, arrival: Arrival) -> Refusal | None:
        """Keep an arrival, or refuse it. A tombstone is never a conflict: it takes the place of what has its number."""
        event, cursor = arrival.event, self.cursor
        seq = event.seq
        if seq is None:
            raise ValueError("an event without a sequence number is not for a Line")
        if arrival.held_id is not None:
            self._clears_held = True
        if seq <= cursor.last_seq:
            return self._refuse_past(event, seq)
        if (kept := self._kept.get(seq)) is not None and not event.is_tombstone:
            same = kept.event.is_tombstone or kept.event.digest == event.digest
            return Refusal.DUPLICATE if same else Refusal.CONFLICT
        self._kept[seq] = arrival
        if cursor.blocked and seq == cursor.last_seq + 1 and (event.is_tombstone or arrival.held_id is not None):
            self.cursor = cursor._replace(blocked=False)
            self._clears_held = True
        return None if kept is None else Refusal.DUPLICATE

    def next(self) -> Arrival | None:
        """The arrival that may be applied now, None if there is none."""
        if self._latest:
            return next(iter(self._kept.values()), None)
        if self.cursor.blocked:
            return None
        return self._kept.get(self.cursor.last_seq + 1)

    def applied(self, arrival: Arrival) -> None:
        """Its effects (or none: a tombstone, a type without a handler) are in the transaction: advance."""
        seq, event = _seq(arrival), arrival.event
        del self._kept[seq]
        self.cursor = Cursor(seq, None if event.is_tombstone else event.digest, False)
        # Only the first successor of the cursor we found cannot be in the table: it would have been applied long ago.
        if self._latest or seq > self.before.last_seq + 1:
            self._clears_held = True
        if self._failed:
            self._failed = [other for other in self._failed if _seq(other) > seq]

    def failed(self, arrival: Arrival) -> None:
        """Its handler failed: hold it. Under `sequence` everything after it waits; under `latest` a newer one supersedes it."""
        del self._kept[_seq(arrival)]
        self._failed.append(arrival)
        if not self._latest:
            self.block()

    def block(self) -> None:
        """The next message is in the table and will be tried by the retry timer: nothing may overtake it."""
        self.cursor = self.cursor._replace(blocked=True)

    def left(self) -> Iterator[tuple[Arrival, Reason]]:
        """What has to be held, and why."""
        for arrival in self._failed:
            yield arrival, "failed"
        for arrival in self._kept.values():
            yield arrival, "behind" if self.cursor.blocked else "early"

    @property
    def advanced(self) -> bool:
        """True when something was applied."""
        return self.cursor.last_seq > self.before.last_seq

    @property
    def clears_held(self) -> bool:
        """True when the table may hold what the cursor has passed."""
        return self._clears_held and self._has_held

    @property
    def follows(self) -> bool:
        """True when a held successor may be applied now."""
        return self._has_held and self.advanced and not self._latest and not self.cursor.blocked

    def _refuse_past(self, event: Event, seq: int) -> Refusal:
        last = self.cursor
        if seq == last.last_seq:
            same = event.is_tombstone or last.last_digest is None or last.last_digest == event.digest
            return Refusal.DUPLICATE if same else Refusal.CONFLICT
        return Refusal.STALE if self._latest else Refusal.DUPLICATE


def _seq(arrival: Arrival) -> int:
    if arrival.event.seq is None:
        raise ValueError("an event without a sequence number is not for a Line")
    return arrival.event.seq
