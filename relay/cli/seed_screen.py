"""What `relay inbox seed` shows: what it found, what it did, what to look after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from relay.operate.act import counted
from relay.operate.counters import Counters
from relay.operate.seed import Compared, Seeded
from relay.operate.selection import Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is to be seeded."""

    consumer: str
    selection: Selection
    types: tuple[str, ...] = ()  # only of these aggregate types
    at: int | None = None  # of one aggregate, by hand
    force: bool

    @property
    def also(self) -> dict[str, object]:
        """What the audit tells beside the selection."""
        told: dict[str, object] = {} if self.at is None else {"at": self.at}
        return told | ({"types": list(self.types)} if len(self.types) > 1 else {})


def compared_lines(order: Order, counters: Counters, found: Compared, notes: Sequence[str]) -> list[str]:
    """Before: what would become of the cursors."""
    types = ", ".join(f"{kind} {n:,}" for kind, n in counters.types.items())
    aggregates = counted(counters.aggregates, "aggregate") + (f" ({types})" if types else "")
    start = f"consumer {order.consumer} would start where source {counters.source} has counted to: {aggregates}"
    if order.at is not None:
        start = f"consumer {order.consumer} would start {order.selection.aggregate} of source {counters.source} after {order.at}"
    lines = [
        start,
        f"  {counted(found.missing + found.at_zero, 'cursor')} would be put there, {found.same:,} are there already",
    ]
    if found.elsewhere:
        fate = "would be moved as well (--force)" if order.force else "would be left alone (--force moves them, too)"
        lines.append(f"  {counted(found.elsewhere, 'cursor counts', 'cursors count')} already and {fate}")
    return lines + [f"  {note}" for note in notes]


def done_lines(order: Order, done: Seeded, notes: Sequence[str]) -> list[str]:
    """After: what became of them."""
    put = done.created + done.moved
    lines = [
        f"consumer {order.consumer}: {counted(put, 'cursor')} put where source {done.source} has counted to, {done.left_alone:,} left as they were"
    ]
    if order.at is not None:
        now = (
            f"is at {order.at} now; {order.at + 1} is applied next"
            if put
            else "was left as it is: it is there, or counts already (--force moves it)"
        )
        lines = [f"consumer {order.consumer}: {order.selection.aggregate} of source {done.source} {now}"]
    if done.set_aside:
        lines.append(
            f"  {counted(done.set_aside, 'held message')} from before went to relay.inbox_quarantine (reason skipped)"
        )
    return lines + [f"  {note}" for note in notes]


def as_json(order: Order, counters: Counters, outcome: Seeded | Compared) -> dict[str, Any]:
    """What `--json` prints; a contract."""
    return {
        "act": "seed",
        "side": "inbox",
        "consumer": order.consumer,
        "source": counters.source,
        "dry_run": isinstance(outcome, Compared),
        "aggregates": counters.aggregates,
    } | (asdict(outcome) | ({} if isinstance(outcome, Compared) else {"left_alone": outcome.left_alone}))


def binding_notes(bindings: Sequence[str], types: Sequence[str]) -> list[str]:
    """Whoever is not seeded starts at number 1, and waits for it: so the queue should not receive it."""
    wider = [b for b in bindings if not any(b.startswith(f"{kind}.") for kind in types)]
    if not types or not wider:
        return []
    wanted = ",".join(f"{kind}.#" for kind in types)
    return [
        f"the queue is bound with {', '.join(wider)}: other aggregates that come through it start at number 1 and wait for it. "
        f"Bind only what is seeded: inbox.bindings = {wanted}"
    ]
