"""Python's garbage collector in the process of a daemon."""

from __future__ import annotations

import gc

_THRESHOLDS = (20_000, 20, 20)
"""Pages and batches are thousands of objects that live for some milliseconds and are freed by their counts. Python's 700 makes the
collector walk through them again and again: an outbox drained with 13.4 us of CPU a row instead of 14.3, and 14.4 instead of 17.6
on a busier machine (tests/bench/row_cost.py, two interleaved pairs)."""


def calm() -> None:
    """Leave what is imported out of every later collection, and collect less often. Cycles are still found: nothing is switched off."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
