"""The usual batch, recognised as a whole: every event is the next one of its aggregate. Pure.

What a `Line` for each aggregate would come to is then known beforehand: everything is applied in the order it came in, nothing is
refused and nothing left over. What may be held behind it is looked for afterwards, and can only follow. A batch that differs in one
event is not for here: the lines take all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from relay.inbox.sequencer import Cursor, Key, Placed
from relay.message import TOMBSTONE, Event

_cursor = partial(tuple.__new__, Cursor)
"""A Cursor of a tuple of all its fields: half of the time that its constructor takes, which is a function of Python's."""


def cursors_after(placed: Iterable[Placed], cursors: Mapping[Key, Cursor]) -> dict[Key, Cursor] | None:
    """Where the cursors are when all of it has been applied, in this order. None: that is for the lines to find out.

    They are in the order of `cursors`, as they were locked: so their keys need not be told to PostgreSQL anew.
    """
    last: dict[Key, int] = {}
    for name, (last_seq, _, blocked, _) in cursors.items():
        if blocked:
            return None
        last[name] = last_seq
    newest: dict[Key, Event] = {}
    for key, arrival in placed:
        if key is None:
            return None
        event = arrival.event
        last[key] = seq = last[key] + 1
        if event.seq != seq:
            return None
        newest[key] = event
    return {key: _cursor((last[key], _compared(newest[key]), False, True)) for key in cursors if key in newest}


def _compared(event: Event) -> bytes | None:
    """What another message with its number is compared with; a tombstone with nothing."""
    return None if event.event_type == TOMBSTONE else event.digest
