"""What of a batch is tried next as a whole, after parts of it have failed, until what fails is alone. Pure.

A one-by-one handler that fails names its event. A call of a batch handler, a COMMIT, or a connection that breaks only names many:
their aggregates are divided and tried again in parts, of which only one fails again if only one event is to blame.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from relay.inbox.charges import Suspects
from relay.inbox.sequencer import Arrival, Unit
from relay.inbox.work import Batch, Rules

_HALVES = 2
"""With one event to blame among n aggregates, about log2(n) transactions fail, and as many succeed."""

_PARTS = 32
"""The same where a failure is dear: it costs the connection, and has perhaps waited for a time-out or ended the session. So one of
a thousand aggregates is found by two more failures instead of ten, and some sixty transactions that succeed."""

_NAMED = 4
"""After so many aggregates in one batch that were named, the rest is done aggregate by aggregate, not as a whole again."""

_WORTH_IT = 4
"""Dividing may fail once for so many aggregates. After that the rest is done aggregate by aggregate as well: where everything fails
this is a quarter more transactions than without dividing, not twice as many."""


class Narrowing:
    """One batch, from `next` as a whole to what has to be done `apart`: each an aggregate, or a message without order."""

    def __init__(self, batch: Batch, rules: Rules, suspects: Suspects) -> None:
        self._rules = rules
        self._suspects = suspects
        self._named = _NAMED
        self._divisions: int | None = None  # left; None: not needed yet
        self.apart: list[Batch] = []
        self._whole = [part for part in self._without_suspects(batch) if part]

    def next(self) -> Batch | None:
        """What is to be tried as a whole now; None: nothing is left but what is apart."""
        return self._whole.pop(0) if self._whole else None

    def failed(self, batch: Batch, arrivals: Iterable[Arrival], *, dear: bool) -> None:
        """A handler failed over these when the batch was tried as a whole. `dear`: that cost the connection."""
        self._divide(batch, {self._rules.unit(arrival) for arrival in arrivals}, dear=dear)

    def refused(self, batch: Batch) -> bool:
        """The COMMIT of the batch failed. False: there is no event in it that could be to blame."""
        units = by_unit(batch, self._rules)
        if units:
            self._divide(batch, units, dear=False)
        return bool(units)

    def _divide(self, batch: Batch, units: Iterable[Unit], *, dear: bool) -> None:
        taken, rest = split(batch, self._rules, set(units).__contains__)
        singles = list(by_unit(taken, self._rules).values())
        parts: list[Batch] = []
        if len(singles) == 1:
            self.apart += singles
            self._named -= bool(rest.arrivals or rest.due)  # nobody had to divide to find it
        elif dear and len(singles) <= _PARTS:
            self.apart += singles  # a savepoint for each of their events costs less than one more connection
        else:
            parts = self._divided(singles, _PARTS if dear else _HALVES)
        self._whole[:0] = [part for part in (rest, *parts) if part]
        if self._named <= 0 or self._divisions == 0:
            self._give_up()
        self._set_single_ones_apart()

    def _divided(self, singles: Sequence[Batch], parts: int) -> list[Batch]:
        if self._divisions is None:
            self._divisions = max(_NAMED, len(singles) // _WORTH_IT)
        self._divisions -= 1
        return [joined(part) for part in _portions(singles, -(-len(singles) // parts))]

    def _give_up(self) -> None:
        """Aggregate by aggregate, from here on."""
        whole, self._whole = self._whole, []
        for batch in whole:
            self.apart += by_unit(batch, self._rules).values()
            if others := batch.without_events():
                self._whole.append(others)

    def _set_single_ones_apart(self) -> None:
        """A single event is tried in a savepoint at once: as a whole it would only fail once more."""
        self.apart += [batch for batch in self._whole if _is_single(batch)]
        self._whole = [batch for batch in self._whole if not _is_single(batch)]

    def _without_suspects(self, batch: Batch) -> list[Batch]:
        """The rest, durable before anything is tried that may break the connection; then parts of what is suspected together."""
        if not self._suspects:
            return [batch]
        company = self._company(batch)
        taken, rest = split(batch, self._rules, company.__contains__)
        together: dict[int, list[Batch]] = defaultdict(list)
        for unit, single in by_unit(taken, self._rules).items():
            together[-(-company[unit] // _PARTS)].append(single)
        self.apart += together.pop(1, [])
        return [rest, *(joined(part) for size, singles in together.items() for part in _portions(singles, size))]

    def _company(self, batch: Batch) -> dict[Unit, int]:
        """The suspected aggregates, and with how many they are suspected."""
        found: dict[Unit, int] = {}
        company = self._suspects.company
        suspected = [(self._rules.unit(a), n) for a in batch.arrivals if (n := company(a.message))]
        suspected += [(self._rules.unit_of_due(d), n) for d in batch.due if (n := company((d.source, d.message_id)))]
        for unit, n in suspected:
            found[unit] = min(n, found.get(unit, n))
        return found


def split(batch: Batch, rules: Rules, chosen: Callable[[Unit], bool]) -> tuple[Batch, Batch]:
    """(the events of the chosen aggregates, all the rest), each in its order."""
    arrivals: tuple[list[Arrival], list[Arrival]] = ([], [])
    for arrival in batch.arrivals:
        arrivals[not chosen(rules.unit(arrival))].append(arrival)
    due = [d for d in batch.due if chosen(rules.unit_of_due(d))]
    not_due = [d for d in batch.due if not chosen(rules.unit_of_due(d))]
    return Batch(arrivals=arrivals[0], due=due), replace(batch, arrivals=arrivals[1], due=not_due)


def by_unit(batch: Batch, rules: Rules) -> dict[Unit, Batch]:
    """The events of a batch, aggregate by aggregate."""
    arrivals, due = defaultdict(list), defaultdict(list)
    for a in batch.arrivals:
        arrivals[rules.unit(a)].append(a)
    for d in batch.due:
        due[rules.unit_of_due(d)].append(d)
    return {unit: Batch(arrivals=arrivals[unit], due=due[unit]) for unit in dict.fromkeys((*arrivals, *due))}


def joined(batches: Iterable[Batch]) -> Batch:
    """The events of several batches as one."""
    several = list(batches)
    return Batch(arrivals=[a for b in several for a in b.arrivals], due=[d for b in several for d in b.due])


def _portions(singles: Sequence[Batch], size: int) -> list[Sequence[Batch]]:
    return [singles[start : start + size] for start in range(0, len(singles), size)]


def _is_single(batch: Batch) -> bool:
    return len(batch.arrivals) + len(batch.due) == 1 and not batch.strangers and not batch.controls
