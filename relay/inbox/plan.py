"""Which handler is called with which events, in which order: as few calls as the order of the aggregates allows. Pure.

A handler is called when no aggregate has anything for it later, behind something for another one; then it gets all that there is
for it. So a handler is called once (if its limit allows) unless aggregates contradict each other about who comes first. Then the
one is called for which the fewest come later, against those that come now: not always the best choice, but nearly.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from relay.inbox.handlers import Grouped, Handler
from relay.inbox.sequencer import Arrival, Key


class Call(NamedTuple):
    """One call of a handler: with one event, unless it is Grouped."""

    handler: Handler | Grouped
    arrivals: Sequence[Arrival]


Ready = tuple[Handler | Grouped, Key | None, Arrival]
"""(handler, aggregate, arrival): what is to be applied. Without an aggregate (None) it may be applied at any time."""


@dataclass(slots=True, eq=False)
class _Run:
    """Events of one aggregate that follow each other and have the same handler; each with its place in the order of application."""

    handler: Handler | Grouped
    placed: list[tuple[int, Arrival]]


def calls(ready: Sequence[Ready]) -> Iterator[Call]:
    """The calls for these events, given in the order of application; in it they also come within a call."""
    handlers = {id(handler) for handler, _, _ in ready}
    if len(handlers) == 1:
        yield from _limited(ready[0][0], [arrival for _, _, arrival in ready])
    elif handlers:
        yield from _ordered(ready)


def _ordered(ready: Sequence[Ready]) -> Iterator[Call]:
    lines = _lines(ready)
    first: dict[int, list[deque[_Run]]] = {}  # by handler (identity: one with an `__eq__` need not have a hash)
    for line in lines:
        first.setdefault(id(line[0].handler), []).append(line)
    later = Counter(id(run.handler) for line in lines for run in list(line)[1:])
    while first:
        chosen = min(first, key=lambda handler: later[handler] / len(first[handler]))
        now = first.pop(chosen)
        runs = [line.popleft() for line in now]
        for line in filter(None, now):
            following = id(line[0].handler)
            later[following] -= 1
            first.setdefault(following, []).append(line)
        placed = sorted((one for run in runs for one in run.placed), key=lambda one: one[0])
        yield from _limited(runs[0].handler, [arrival for _, arrival in placed])


def _lines(ready: Sequence[Ready]) -> list[deque[_Run]]:
    """The runs of each aggregate."""
    lines: dict[Key | int, deque[_Run]] = {}
    for place, (handler, key, arrival) in enumerate(ready):
        line = lines.setdefault(place if key is None else key, deque())
        if not line or line[-1].handler is not handler:
            line.append(_Run(handler, []))
        line[-1].placed.append((place, arrival))
    return list(lines.values())


def _limited(handler: Handler | Grouped, arrivals: Sequence[Arrival]) -> Iterator[Call]:
    most = handler.limit if isinstance(handler, Grouped) else 1
    for start in range(0, len(arrivals), most):
        yield Call(handler, arrivals[start : start + most])
