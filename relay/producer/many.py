"""Many events as few statements: checked, sorted by aggregate, cut into pieces of bounded size. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from relay.errors import InputError
from relay.producer.event import NewEvent
from relay.producer.statement import parameters

STATEMENT_EVENTS = 1_000
STATEMENT_SIZE = 8 * 1024 * 1024
"""Characters or bytes of content in a statement, unless a single event has more. The driver and the server each hold a statement
as a whole, some times over; a larger one is not faster (tests/bench/producer_cost.py)."""


class Many:
    """Events on their way into `insert_events`, and the way back of their numbers into the order in which they were given.

    They are inserted by aggregate, those of one aggregate in the order given. So is every other call's list, and thus two
    transactions with one `emit_many` each lock their aggregates in the same order and cannot deadlock with each other.
    """

    def __init__(self, events: Iterable[NewEvent]) -> None:
        """Take all events. Raises InputError, which tells the place, for what is not an event or is not even made."""
        self._rows = list(_rows(events))
        self._order = sorted(range(len(self._rows)), key=lambda place: _aggregate(self._rows[place]))

    def statements(self, *, at_once: bool) -> Iterator[tuple[list[Any], ...]]:
        """The parameters of each statement: a list a column. `at_once`: one, because only that is all or nothing in autocommit."""
        piece: list[tuple[Any, ...]] = []
        size = 0
        for place in self._order:
            row = self._rows[place]
            grown = size + _size(row)
            if piece and not at_once and (len(piece) == STATEMENT_EVENTS or grown > STATEMENT_SIZE):
                yield _columns(piece)
                piece, grown = [], _size(row)
            piece.append(row)
            size = grown
        if piece:
            yield _columns(piece)

    def as_given(self, seqs: list[int | None]) -> list[int | None]:
        """What the statements returned, one after the other, in the order of the events."""
        result: list[int | None] = [None] * len(self._order)
        for place, seq in zip(self._order, seqs, strict=True):
            result[place] = seq
        return result


def _rows(events: object) -> Iterator[tuple[Any, ...]]:
    if isinstance(events, NewEvent) or not isinstance(events, Iterable):
        hint = "; for one event use emit" if isinstance(events, NewEvent) else ""
        raise InputError(f"emit_many takes an iterable of NewEvent, not a {type(events).__name__}{hint}")
    place = 0
    try:
        for event in events:
            yield parameters(event)
            place += 1
    except InputError as error:  # also of a generator, in which the events are made
        raise InputError(f"events[{place}]: {error}") from error


def _aggregate(row: tuple[Any, ...]) -> tuple[str, str]:
    """By what events are sorted; those without an aggregate, which lock nothing, come first."""
    aggregate_type, aggregate_id = row[:2]
    return ("", "") if aggregate_id is None else (aggregate_type, aggregate_id)


def _size(row: tuple[Any, ...]) -> int:
    _, _, _, payload, body, _, headers, _, _ = row
    return len(payload or "") + len(body or b"") + len(headers or "")


def _columns(rows: list[tuple[Any, ...]]) -> tuple[list[Any], ...]:
    return tuple(list(column) for column in zip(*rows, strict=True))
