"""Who got what wrong, computed from the rows of the shop's and of each consumer's tables. Pure: no clock, no I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Step:
    """One event: as the shop committed it, or as a consumer applied it."""

    order_id: int
    step: int  # 1, 2, 3 ... within the order
    event_type: str
    token: str  # names this event, for ever


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """The shop's tables."""

    journal: Sequence[Step]
    states: Mapping[int, str]  # order -> its final state
    paid_cents: Mapping[int, int]  # order -> paid in the end, after what was paid back


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """A consumer's tables."""

    effects: Sequence[Step]  # every application of an event, in the order in which they happened
    states: Mapping[int, str]
    billed_cents: Mapping[int, int]  # order -> invoices less credit notes
    balance_cents: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a consumer got wrong; zero everywhere is right."""

    lost: int  # committed events that were never applied
    phantom: int  # events of rolled-back transactions that were applied
    repeated: int  # applications of an event beyond its first
    overtaken: int  # events first applied after a later one of their order
    invoice_first: int  # payments booked for an order that did not exist yet
    backwards: int  # applications that put an order back to an earlier step, a stale copy's for example
    wrong_state: int  # orders whose final state is not the shop's, or which the shop does not have at all, or has alone
    wrong_billing: int  # orders whose invoices less credit notes are not what was paid
    cents_off: int  # between the balance and what was paid in all

    @property
    def clean(self) -> bool:
        """True when nothing is wrong."""
        return all(getattr(self, f.name) == 0 for f in fields(self))


LABELS = {  # one screen line each
    "lost": "lost: never applied",
    "phantom": "phantom: was rolled back",
    "repeated": "applied more than once",
    "overtaken": "applied after a later one",
    "invoice_first": "invoice before its order",
    "backwards": "order state went backwards",
    "wrong_state": "orders in a wrong state",
    "wrong_billing": "orders billed wrongly",
    "cents_off": "balance off by, EUR",
}


def judge(truth: Truth, books: Books) -> Findings:
    """Compare a consumer's tables with the shop's."""
    times = Counter(effect.token for effect in books.effects)
    committed = {event.token for event in truth.journal}
    invoice_first, backwards = _disorder(books.effects)
    return Findings(
        lost=len(committed - times.keys()),
        phantom=len(times.keys() - committed),
        repeated=sum(n - 1 for n in times.values()),
        overtaken=_overtaken([effect for effect in books.effects if effect.token in committed]),
        invoice_first=invoice_first,
        backwards=backwards,
        wrong_state=_differences(truth.states, books.states, None),
        wrong_billing=_differences(truth.paid_cents, books.billed_cents, 0),
        cents_off=abs(books.balance_cents - sum(truth.paid_cents.values())),
    )


def _overtaken(effects: Sequence[Step]) -> int:
    """First applications that came after that of a later event of the same order."""
    highest: dict[int, int] = {}
    seen: set[str] = set()
    found = 0
    for effect in effects:
        if effect.token not in seen:
            seen.add(effect.token)
            found += effect.step < highest.get(effect.order_id, 0)
            highest[effect.order_id] = max(effect.step, highest.get(effect.order_id, 0))
    return found


def _disorder(effects: Sequence[Step]) -> tuple[int, int]:
    """(payments applied to an order that did not exist yet, applications that put an order back to an earlier step)."""
    last: dict[int, int] = {}
    created: set[int] = set()
    invoice_first = backwards = 0
    for effect in effects:
        if effect.event_type == "OrderCreated":
            created.add(effect.order_id)
        elif effect.event_type == "OrderPaid":
            invoice_first += effect.order_id not in created
        backwards += effect.step < last.get(effect.order_id, 0)
        last[effect.order_id] = effect.step
    return invoice_first, backwards


def _differences(expected: Mapping[int, object], found: Mapping[int, object], absent: object) -> int:
    """Keys of either side whose values differ; `absent` is the value of a missing key."""
    return sum(expected.get(key, absent) != found.get(key, absent) for key in expected.keys() | found.keys())
