"""The named points of both pipelines at which a crash is tried: tests install a hook and end the process in it.

Nothing but a test's own code arms them, no setting and no environment variable. What is not armed costs a comparison for each
page, batch or transaction; none is passed for each message. Imports nothing of ours: every layer may reach a point.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, unique


@unique
class Point(Enum):
    """Where the way of a row may end, in the order in which it passes. The value says what is done already, and what is not."""

    # --- outbox: becoming the owner of a shard
    REBASING = "the log of another cluster is re-based in the transaction that raises the epoch, not committed"
    REBASED = "the log of another cluster is re-based, committed"
    OWNED = "the shard is ours: lock held, epoch raised and committed, nothing read"

    # --- read, publish, checkpoint
    PAGE_READ = "a page is read, nothing of it sent"
    PUBLISHING = "messages are handed to the client library, nothing of them confirmed"
    CONFIRMED = "the broker has answered for the whole page, the cursor is still before it"
    CURSOR_MOVED = "the cursor is moved behind the page, not committed"
    ROWS_PARKED = "rows that were refused are parked in the same transaction, not committed"
    CHECKPOINTED = "cursor and parked rows are committed, nothing of that is counted in memory"

    # --- parked rows
    RETRYING = "parked rows are about to be sent again"
    RETRIED = "the broker has answered for them, they are still parked"
    ROWS_UNPARKED = "rows that went out are not parked any more, not committed; the rows behind them still wait"
    UNPARKED = "they are not parked any more, committed, and the rows behind them are due"
    TRYING_ALONE = "a row that ended a session is about to be sent on a connection of its own"
    TRIED_ALONE = "the broker has answered for it, it is still parked"

    # --- nothing to do, and the end
    FALLING_ASLEEP = "producers notify from here on; not looked once more for what came just before"
    ASLEEP = "looked once more; about to wait for a producer's notification"
    WOKEN = "woken, producers still notify, nothing read"
    STOPPING = "told to stop, or drained: what is confirmed is not all checkpointed"
    STOPPED = "all that is confirmed is checkpointed, connections are open"

    # --- beside the pipeline
    MARKS_PUBLISHED = "inboxes are told how far is published"
    REPAIR_TAKEN = "an inbox's request is taken, nothing answered"
    REPAIR_SENT = "some of what it asked for is sent again"
    REPAIR_ANSWERED = "all of its request is answered, and it is not acknowledged"
    SLOT_SCANNED = "every row of a slot is found to be published and old, nothing removed"
    SLOT_EMPTIED = "the slot is emptied, committed"

    # --- inbox: receive, apply, acknowledge
    RECEIVED = "deliveries are taken, nothing is done with them"
    CURSORS_LOCKED = "the cursors of their aggregates are locked, no handler called"
    FOLLOWED = "held successors are applied behind them, nothing written"
    ROWS_HELD = "what came early or failed is in the table, not committed"
    STORED = "store mode: events are in relay.inbox, not committed"
    CONTROL_HEEDED = "marks and answers of relays are noted, not committed"
    WRITTEN = "effects, cursors and held messages are written, not committed"
    COMMITTED = "they are committed, nothing acknowledged"
    ACKNOWLEDGED = "the acknowledgement is handed to the client library"

    # --- failed and missing messages
    SET_APART = "a handler has failed and all is rolled back: what failed is tried again by itself"
    RETRYING_HELD = "held messages are due and about to be tried again"
    GAP_NOTED = "a number is found to be missing, committed, and not asked for"
    GAP_CLAIMED = "it is ours alone to ask for, for half a minute, committed; nobody is asked"
    GAP_WRITTEN = "it is written down as asked for, committed, and not asked"
    GAP_ASKED = "it is asked for"
    GAP_CLOSED = "all that was missing is there, the gap is removed, committed"


Hook = Callable[[Point], None]

_hook: Hook | None = None


def reached(point: Point) -> None:
    """The way of a row has come to `point`."""
    if _hook is not None:
        _hook(point)


def install(hook: Hook | None) -> None:
    """Call `hook` at every point from here on; None: at none. For tests only, before any event loop runs."""
    global _hook
    _hook = hook
