"""Which rows of a page are done, and which must be parked. Pure.

A row that the broker refuses is parked together with every later row of its aggregate, also those that were confirmed
already: they are published again behind it, so that the last word on the wire is in order (the inbox drops the copies).
A row that an operator's pause holds is parked in the same way, without being sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

from relay.message import Aggregate, Row
from relay.outbox.pause import Pauses
from relay.rabbitmq.contract import Confirmed, Nacked, Outcome, Refused, Returned, Unknown

Reason = Literal["unroutable", "nacked", "refused", "too_large", "unencodable", "unconfirmed", "behind", "paused"]


@dataclass(frozen=True, slots=True)
class Parked:
    """A row to park, and why."""

    row: Row
    reason: Reason
    detail: str | None = None

    @property
    def is_head(self) -> bool:
        """True for the row that holds its aggregate up; the others wait behind one."""
        return self.reason != "behind"

    @property
    def is_paused(self) -> bool:
        """True for a head that is not tried again until an operator resumes."""
        return self.reason == "paused"


@dataclass(frozen=True, slots=True)
class Settlement:
    """What became of the rows of a page, up to the first one whose fate is unknown."""

    settled: int  # rows, from the first on, that are confirmed or parked
    confirmed: Sequence[Row]
    parked: Sequence[Parked]


def unsendable(
    rows: Sequence[Row], blocked: AbstractSet[Aggregate], pauses: Pauses, before: AbstractSet[Aggregate] = frozenset()
) -> frozenset[int]:
    """Positions of the rows that must not be sent: those that a pause holds, and those behind one or in a blocked aggregate.

    `before`: aggregates of which something is held back that is read, and not settled.
    """
    if not blocked and not before and not pauses.any_rows:
        return frozenset()
    held = {*before}  # beside `blocked`, which may be a million: not copied
    found = set()
    for position, row in enumerate(rows):
        if row.aggregate in held or row.aggregate in blocked or pauses.hold(row):
            found.add(position)
            if row.aggregate is not None:
                held.add(row.aggregate)
    return frozenset(found)


def settle(
    rows: Sequence[Row], outcomes: Sequence[Outcome | None], blocked: AbstractSet[Aggregate], pauses: Pauses
) -> Settlement:
    """Divide a page. An outcome None: the row was not sent, because it is paused, or its aggregate is blocked or failed before it."""
    if not blocked and {*map(type, outcomes)} == {Confirmed}:
        return Settlement(len(rows), rows, ())
    confirmed: list[Row] = []
    parked: list[Parked] = []
    held: set[Aggregate] = set()  # beside `blocked`
    settled = 0
    for row, outcome in zip(rows, outcomes, strict=True):
        if isinstance(outcome, Unknown):
            break
        settled += 1
        if row.aggregate in held or row.aggregate in blocked:
            parked.append(Parked(row, "behind"))
        elif isinstance(outcome, Confirmed):
            confirmed.append(row)
        else:
            parked.append(Parked(row, "paused") if pauses.hold(row) else refusal(row, outcome))
            if row.aggregate is not None:
                held.add(row.aggregate)
    return Settlement(settled, confirmed, parked)


def is_done(row: Row, outcome: Outcome | None) -> bool:
    """True when the row need not be sent again: confirmed, or the tombstone of an event that nobody waits for.

    Nobody is bound for it, or it cannot be written down: a routing key that is too long, say, which no event had either.
    """
    if isinstance(outcome, Confirmed):
        return True
    return row.is_tombstone and (
        isinstance(outcome, Returned)
        or (isinstance(outcome, Refused) and outcome.reason in ("unencodable", "too_large"))
    )


def refusal(row: Row, outcome: Outcome | None) -> Parked:
    """The broker's no, as the reason to park a row."""
    match outcome:
        case Returned(reply_text):
            return Parked(row, "unroutable", f"no queue is bound for the routing key: {reply_text}")
        case Nacked():
            return Parked(row, "nacked", "the broker refused responsibility (basic.nack): a full queue, usually")
        case Refused(reason, detail):
            return Parked(row, reason, detail)
        case _:
            raise ValueError(f"row {row.id} was neither confirmed nor refused: {outcome}")


def waves(rows: Sequence[Row]) -> list[list[int]]:
    """Positions of the rows in waves that hold every aggregate at most once: what `order = "strict"` publishes one after the other."""
    found: list[list[int]] = []
    depth: dict[Aggregate, int] = {}
    for position, row in enumerate(rows):
        wave = 0
        if row.aggregate is not None:
            wave = depth.get(row.aggregate, 0)
            depth[row.aggregate] = wave + 1
        if wave == len(found):
            found.append([])
        found[wave].append(position)
    return found


def retry_delay_s(attempts: int, *, first_s: float, longest_s: float) -> float:
    """Seconds until the next attempt after `attempts` refusals: doubles, up to the longest."""
    return float(min(longest_s, first_s * 2.0 ** min(attempts - 1, 60)))
